"""What a user may get wrong on lm_eval's command line: each is one line that says what to do.

Most cases run lm_eval's own `main` in this process, as errors of ours; a real process shows the line and exit code.
"""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lm_eval.__main__ import cli_evaluate
from lm_eval.tasks import TaskManager
from support import QUICK_START, environment

import sdar_lm_eval.tasks
from sdar_lm_eval.demo import CHECKPOINT as DEMO
from sdar_lm_eval.errors import SDARError

TASKS = str(Path(sdar_lm_eval.tasks.__file__).parent)
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")

Lm_eval = Callable[..., str]


@pytest.fixture
def error_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Lm_eval:
    """Return a function that runs `lm_eval run --model sdar …` and returns its error, which must be one of ours."""
    # Without the index of stock tasks, which takes seconds.
    ours_alone = functools.partial(TaskManager, include_defaults=False)
    monkeypatch.setattr(
        "lm_eval.tasks.TaskManager", lambda include_path=None, **kw: ours_alone(include_path=TASKS, **kw)
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.delenv("SDAR_GSM8K_DIR", raising=False)

    def run(model_args: str = "pretrained=demo", *arguments: str, task: str = "gsm8k_sdar_demo") -> str:
        words = ["lm_eval", "run", "--model", "sdar", "--model_args", model_args, "--tasks", task, "--limit", "1"]
        monkeypatch.setattr(sys, "argv", [*words, *arguments])
        with pytest.raises(SDARError) as caught:
            cli_evaluate()
        return str(caught.value)

    return run


def copy_of_demo(folder: Path, **config: object) -> Path:
    shutil.copytree(DEMO, folder)
    content = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("model_args", "says"),
    [
        ("confidence_treshold=0.9", "'confidence_treshold' is unknown. Did you mean 'confidence_threshold'? Known: "),
        ("batchsize=4", "'batchsize' is unknown. Did you mean 'batch_size'?"),
        ("block_length=0", "block_length=0 is out of range: it must be a whole number from 1"),
        ("block_length=4.5", "block_length=4.5 is not a whole number"),
        (
            "denoising_steps=5",
            "denoising_steps=5 is out of range: it must be a whole number from 1 to block_length (4)",
        ),
        ("confidence_threshold=1.5", "confidence_threshold=1.5 is out of range: it must be a probability from 0 to 1"),
        ("confidence_threshold=high", "confidence_threshold='high' is not a number"),
        ("temperature=-1", "temperature=-1.0 is out of range: it must be 0 (greedy), or from 0.0001 to 10,000"),
        ("top_p=0", "top_p=0.0 is out of range: it must be above 0 and at most 1 (off)"),
        (
            "remasking_strategy=low_confidence_statc",
            "is unknown; choose one of entropy_bounded (or entropy), low_confidence_dynamic (or dynamic), ",
        ),
        ("max_gen_toks=0", "max_gen_toks=0 is out of range: it must be 1 or more"),
        (
            "max_length=128,max_gen_toks=128",
            "max_gen_toks=128 must be below max_length=128, to leave room for a prompt.",
        ),
        ("max_active=0", "max_active=0 is out of range: it must be 1 or more"),
        ("kv_pages=none_of_it", "kv_pages='none_of_it' is not a whole number"),
        ("kv_pages=2", "or more if the memory suffices"),
        ("share_prefixes=maybe", "share_prefixes='maybe' is neither true nor false"),
        ("seed=abc", "seed='abc' is not a whole number"),
        ("chat_template=maybe", "chat_template='maybe' is unknown; choose auto, on, off"),
        ("trace=missing/trace.jsonl", "trace='missing/trace.jsonl' cannot be written: No such file or directory"),
        ("trace=.", "trace='.' cannot be written: it is a folder. Name a file."),
        ("likelihood=chian", "likelihood='chian' is unknown; choose chain or nelbo. Did you mean 'chain'?"),
        ("likelihood=nelbo,mc_samples=5", "mc_samples=5 is out of range: it must be an even number from 2"),
        ("mc_samples=many", "mc_samples='many' is not a whole number"),
        ("device=gpu", "device='gpu' is unknown; choose cpu, cuda, cuda:N or auto"),
        ("dtype=int8", "dtype='int8' is unknown; choose "),
        ("revision=main,pretrained=.", "revision='main' was given, but '.' is "),
        pytest.param(
            "device=cuda", "device='cuda': this machine has no usable GPU(s); choose cpu or auto", marks=NO_GPU
        ),
    ],
)
def test_model_args(error_of: Lm_eval, model_args: str, says: str) -> None:
    error = error_of(f"pretrained=demo,{model_args}")
    assert says in error
    assert "\n" not in error


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--gen_kwargs temprature=1", "gen_kwargs: 'temprature' is unknown. Did you mean 'temperature'?"),
        ("--gen_kwargs max_new_tokens=4096", "max_gen_toks=4096 must be below max_length=2048"),
        ("--gen_kwargs block_length=none", "block_length='none' is not a whole number"),
        ("--gen_kwargs until=5", "until=5 is neither a text nor a list of texts. Give one of these"),
        ("--include_path missing", "--include_path missing: no such folder. Give the folder that has the YAML files"),
        ("--batch_size many", "batch_size='many' is not a whole number"),
        pytest.param("--device cuda", "device='cuda': this machine has no usable GPU(s)", marks=NO_GPU),
    ],
)
def test_other_arguments(error_of: Lm_eval, arguments: str, says: str) -> None:
    assert says in error_of("pretrained=demo", *arguments.split())


def test_checkpoints(error_of: Lm_eval, tmp_path: Path) -> None:
    assert "pretrained='./missing': no such folder. Give an existing folder, a hub id" in error_of(
        "pretrained=./missing"
    )
    assert "cannot be downloaded from the hub" in error_of("pretrained=owner/name")
    (tmp_path / "empty").mkdir()
    assert "has no config.json" in error_of("pretrained=./empty")
    copy_of_demo(tmp_path / "other", model_type="llama")
    assert "has model_type 'llama'; this package runs 'sdar'" in error_of("pretrained=./other")
    weights = copy_of_demo(tmp_path / "weights") / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1000])
    assert "is not a whole safetensors file" in error_of("pretrained=./weights")
    weights.unlink()
    assert "has no weights" in error_of("pretrained=./weights")


def test_data(error_of: Lm_eval, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    metadata = ("--metadata", json.dumps({"gsm8k_dir": str(tmp_path / "data")}))
    assert "holds no test.jsonl" in error_of("pretrained=demo", *metadata, task="gsm8k_sdar")
    (tmp_path / "data" / "test.jsonl").write_text('{"question": "q", "answer": "#### 1"}\n{"question": "q"\n')
    assert "line 2" in error_of("pretrained=demo", *metadata, task="gsm8k_sdar")


@pytest.mark.slow
def test_a_process_prints_one_line_and_exits_with_1(tmp_path: Path) -> None:
    """An error in the middle of the run. `test_install` has one while the model is made."""
    command = [
        sys.executable,
        "-m",
        "sdar_lm_eval",
        "run",
        "--model",
        "sdar",
        "--model_args",
        "pretrained=demo,kv_pages=1",
    ]
    command += ["--tasks", "gsm8k_sdar_demo", "--limit", "1"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment(QUICK_START), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("sdar_lm_eval: error: a request of ")
    assert done.stderr.count("error:") == 1
