from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from sdar_lm_eval import arguments
from sdar_lm_eval.autoload import TASKS
from sdar_lm_eval.engines.registry import ENGINES
from sdar_lm_eval.errors import UserError
from sdar_lm_eval.runs import settings
from sdar_lm_eval.runs.settings import RunSettings, runs_from_flags, scored_by
from sdar_lm_eval.settings import read_generation
from sdar_lm_eval.spellings import ALIASES

DEFAULTS: dict[str, Any] = {
    "model_name": "JetLM/SDAR-4B-Chat",
    "num_samples": None,
    "block_length": "4",
    "denoising_steps": "4",
    "temperature": "1.0",
    "remasking_strategy": "low_confidence_dynamic",
    "confidence_threshold": "0.85",
    "max_gen_length": None,
    "verbose": True,
    "engine": "jetengine",
    "tasks": "gsm8k_sdar",
}


def _runs(**flags: Any) -> list[RunSettings]:
    return runs_from_flags(**(DEFAULTS | flags))


def test_the_defaults_are_the_original_benchmark_s() -> None:
    (run,) = _runs()
    assert run.harness_call() == {
        "model": "sdar-jetengine",
        "model_args": {"pretrained": "JetLM/SDAR-4B-Chat", "seed": 0, "verbose": True},
        "tasks": ["gsm8k_sdar"],
        "gen_kwargs": {
            "do_sample": True,
            "temperature": 1.0,
            "block_length": 4,
            "denoising_steps": 4,
            "remasking_strategy": "low_confidence_dynamic",
            "confidence_threshold": 0.85,
        },
        "limit": None,
    }
    assert run.name == "gsm8k_sdar"


def test_flags_become_the_harness_call() -> None:
    (run,) = _runs(
        temperature="0", num_samples=10, max_gen_length=64, engine="native", verbose=False, seed=3, revision="v1",
        tasks="gsm8k_sdar, math500_sdar",
    )  # fmt: skip
    call = run.harness_call(pretrained="/models/x", answers="/results/a")
    assert (call["model"], call["limit"], call["tasks"]) == ("sdar", 10, ["gsm8k_sdar", "math500_sdar"])
    assert call["model_args"] == {"pretrained": "/models/x", "revision": "v1", "seed": 3, "answers": "/results/a"}
    assert call["gen_kwargs"]["do_sample"] is False and call["gen_kwargs"]["max_gen_toks"] == 64
    generation = read_generation(call["gen_kwargs"], {})
    assert generation.decoding.greedy and generation.max_gen_toks == 64
    assert run.name == "gsm8k_sdar+math500_sdar-first-10"


def test_the_command_line_is_the_same_call() -> None:
    from lm_eval._cli.utils import key_val_to_dict

    (run,) = _runs(num_samples=10, seed=3)
    words = shlex.split(run.command_line())
    given = dict(zip(words[2::2], words[3::2], strict=True))
    call = run.harness_call()
    assert words[:2] == ["lm_eval", "run"]
    assert key_val_to_dict(given["--gen_kwargs"]) == call["gen_kwargs"]
    assert key_val_to_dict(given["--model_args"]) == call["model_args"]
    assert (given["--model"], given["--tasks"], given["--limit"]) == ("sdar-jetengine", "gsm8k_sdar", "10")


def test_a_sweep_is_a_grid() -> None:
    runs = _runs(confidence_threshold="0.8, 0.9,0.8", remasking_strategy="low_confidence_dynamic,sequential")
    assert [(r.decoding.remasking_strategy, r.decoding.confidence_threshold) for r in runs] == [
        ("low_confidence_dynamic", 0.8), ("low_confidence_dynamic", 0.9), ("sequential", 0.85),
    ]  # fmt: skip
    assert [run.decoding.temperature for run in _runs(temperature="0:1:0.5")] == [0.0, 0.5, 1.0]


def test_a_setting_that_a_sweep_does_not_vary_stays_as_it_was_asked_for() -> None:
    """Answers of earlier versions are in a folder that its name finds."""
    (run,) = _runs(remasking_strategy="sequential", confidence_threshold="0.5")
    assert run.decoding.confidence_threshold == 0.5


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"remasking_strategy": "sequentially"},
            "'sequentially' is unknown; choose one of .* Did you mean 'sequential'",
        ),
        (
            {"denoising_steps": "8"},
            r"denoising_steps=8 is out of range: it must be a whole number from 1 to block_length",
        ),
        ({"block_length": "four"}, "--block-length='four' is not a whole number"),
        ({"temperature": "0.5,"}, r"--temperature '0\.5,' has an empty value"),
        ({"temperature": "-1"}, r"temperature=-1\.0 is out of range"),
        ({"confidence_threshold": "85"}, r"confidence_threshold=85\.0 is out of range"),
        ({"num_samples": 0}, "--num-samples 0 is out of range: it must be 1 or more"),
        ({"max_gen_length": 0}, "--max-gen-length 0 is out of range"),
        ({"seed": -1}, "--seed -1 is out of range"),
        ({"model_name": " "}, "--model-name is empty"),
        ({"tasks": ""}, "--tasks '' has an empty value"),
        (
            {"block_length": "4,8", "denoising_steps": "4,8"},
            r"denoising_steps=8 .* The sweep asks for it at block_length=4, denoising_steps=8\. Nothing was run",
        ),
        (
            {"block_length": "4,128"},
            r"--block-length 128 is not for --engine jetengine, .* 64\. .*--engine native",
        ),
        (
            {"engine": "lmdeploy", "remasking_strategy": "entropy_bounded"},
            "--remasking-strategy entropy_bounded is not for --engine lmdeploy, which takes low_confidence_dynamic,",
        ),
        ({"engine": "jetengin"}, "--engine jetengin is unknown; .*Did you mean 'jetengine'"),
    ],
)
def test_mistakes(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        _runs(**flags)


def test_limits_are_the_engines() -> None:
    for spec in ENGINES.values():
        for name, allowed in (("block_length", spec.block_lengths), ("remasking_strategy", spec.strategies)):
            for value in allowed or ():
                assert _runs(**{"engine": spec.name, name: str(value), "denoising_steps": "1"})
    assert _runs(engine="native", block_length="3", denoising_steps="3", remasking_strategy="entropy_bounded")


def test_model_args_of_thinking_models() -> None:
    expected = {"answer_prefix": r"<think>\n", "max_thinking_toks": "9"}
    as_json = json.dumps({"answer_prefix": r"<think>\n", "max_thinking_toks": 9})
    for text in (r"answer_prefix=<think>\n,max_thinking_toks=9", as_json):
        (run,) = _runs(thoughts=text)
        arguments = run.harness_call()["model_args"]
        assert {name: arguments[name] for name in expected} == expected
        assert "answer_prefix=<think>" in shlex.split(run.command_line())[5]
    for text in ("max_gen_toks=9", "answer_prefix", "{"):
        with pytest.raises(UserError, match="--thoughts"):
            _runs(thoughts=text)


def test_model_args_of_the_engine() -> None:
    as_json = json.dumps({"max_active": 64, "reproducible": True, "dtype": "float16"})
    for text in (
        "max_active=64,reproducible=true,dtype=float16",
        "max_active=64,reproducible=True,dtype=float16",
        as_json,
    ):
        (run,) = _runs(engine="native", engine_args=text)
        given = run.harness_call()["model_args"]
        assert {name: given[name] for name in ("max_active", "reproducible", "dtype")} == json.loads(as_json)
        assert "max_active=64,reproducible=true,dtype=float16" in shlex.split(run.command_line())[5]
    assert _runs(engine="jetengine", engine_args="gpu_memory_utilization=0.5")[0].engine_args == (
        ("gpu_memory_utilization", 0.5),
    )
    # Another engine's, one for several GPUs, one that another flag has, none.
    for text in ("kv_pages=9", "tensor_parallel_size=2", "temperature=1", "max_active", "[1]"):
        with pytest.raises(UserError, match=r"--engine-args .* names out of dtype, max_active, max_length, gpu_memory"):
            _runs(engine="jetengine", engine_args=text)
    for text, told in (
        ("max_active=many", "max_active='many' is not a whole number"),
        ("kernels=3", "neither true nor"),
    ):
        with pytest.raises(UserError, match=rf"--engine-args {text}: .*{told}"):
            _runs(engine="native", engine_args=text)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_engines_arguments_reach_the_model(engine: str) -> None:
    """Each name is one that the model takes."""
    takes = get_type_hints(getattr(arguments, ENGINES[engine].arguments))
    assert set(settings.engine_arguments(engine)) <= set(takes)


def test_the_folder_s_name_is_of_all_that_changes_answers() -> None:
    def folder(checkpoint: str = "abc", machine: tuple[str, ...] = ("H100!",), **flags: Any) -> str:
        return _runs(**flags)[0].folder(checkpoint, machine)

    base = folder()
    assert base.startswith("JetLM_SDAR-4B-Chat-jetengine-")
    # Which documents are answered, and what is told of them, change no answer.
    assert folder(num_samples=3) == folder(verbose=False) == folder(tasks="math500_sdar") == base
    others = [
        folder(checkpoint="abd"), folder(machine=("H200",)), folder(seed=1), folder(temperature="0.0"),
        folder(block_length="8"), folder(denoising_steps="2"), folder(confidence_threshold="0.9"),
        folder(remasking_strategy="sequential"), folder(max_gen_length=256), folder(engine="native"),
        folder(thoughts="answer_prefix=<think>"), folder(engine_args="dtype=float16"),
    ]  # fmt: skip
    assert len({base, *others}) == 1 + len(others)


def test_a_comment_costs_no_answer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Sources name no folder of answers, the revision of what decoding can answer does; results are scored again."""
    monkeypatch.setattr(settings, "_PACKAGE", tmp_path)
    source = tmp_path / "engines" / "sampler.py"
    source.parent.mkdir()
    named, scorers = [], []
    for text in ("t = 1\n", "t = 1  # the temperature\n"):
        source.write_text(text)
        scored_by.cache_clear()
        named.append(_runs()[0].folder("abc", ["H100!"]))
        scorers.append(scored_by())
    scored_by.cache_clear()
    assert named[0] == named[1] and scorers[0] != scorers[1]
    monkeypatch.setattr(settings, "ANSWER_REVISION", settings.ANSWER_REVISION + 1)
    assert _runs()[0].folder("abc", ["H100!"]) != named[0]


def test_short_names_are_those_of_gen_kwargs() -> None:
    full = _runs(remasking_strategy="low_confidence_static,low_confidence_dynamic,entropy_bounded", engine="native")
    assert _runs(remasking_strategy="static,dynamic,entropy,low_confidence_static", engine="native") == full
    short = {"strategy": "static", "threshold": "0.5,0.6", "steps": "2", "block": "8"}
    assert set(short) < set(ALIASES)
    assert _runs(short=short | {"strategy": None}) == _runs(
        confidence_threshold="0.5,0.6", denoising_steps="2", block_length="8"
    )
    assert _runs(short=short)[0].decoding.remasking_strategy == "low_confidence_static"
    with pytest.raises(UserError, match="--confidence-threshold='high' is not a number"):
        _runs(short={"threshold": "high"})


def test_tasks_that_run_programs_are_the_ones_that_say_so() -> None:
    texts = {path.stem: path.read_text("utf-8") for path in Path(TASKS).rglob("*.yaml")}
    unsafe = {name for name, text in texts.items() if re.search("^unsafe_code: true", text, re.MULTILINE)}
    groups = {name for name, text in texts.items() if set(re.findall(r"^  - (\w+)", text, re.MULTILINE)) & unsafe}
    assert unsafe and groups and set(settings.RUN_PROGRAMS) == unsafe | groups


@pytest.mark.parametrize("task", settings.RUN_PROGRAMS)
def test_programs_of_a_model_are_confirmed_first(task: str) -> None:
    with pytest.raises(UserError, match=f"--tasks {task}: scored by running .* say --confirm-run-unsafe-code"):
        _runs(tasks=f"gsm8k_sdar,{task}")
    (run,) = _runs(tasks=task, confirm_run_unsafe_code=True)
    assert run.command_line().endswith("--confirm_run_unsafe_code")
    assert run.folder("abc", []) == _runs()[0].folder("abc", [])


def test_a_machine_without_torch_and_lm_eval_can_ask() -> None:
    """What the user of Modal has: this package's folder, and modal."""
    code = (
        "import sys\n"
        "for name in ('torch', 'lm_eval', 'transformers', 'datasets', 'numpy', 'tqdm'): sys.modules[name] = None\n"
        "from sdar_lm_eval.runs import summary\n"
        "from sdar_lm_eval.runs.settings import runs_from_flags\n"
        f"print(summary.configuration(runs_from_flags(**{DEFAULTS!r}), {{}}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.startswith("Configuration"), done.stderr
