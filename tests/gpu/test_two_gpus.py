"""The command line on two GPUs beside one, over the demo's 200 problems: `python -m pytest -s` with this file.

Data parallel for each engine, and tensor parallel where the installed one has it; engines that are missing are skipped.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import save_file
from support import QUICK_START, environment, read_weights

from sdar_lm_eval import EngineError
from sdar_lm_eval.demo import CHECKPOINT
from sdar_lm_eval.engines.adapters.jetengine.versions import find_jetengine
from sdar_lm_eval.engines.adapters.lmdeploy.versions import find_lmdeploy

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs here")

LMDEPLOY = "pretrained=demo,cache_max_entry_count=0.2"  # other tests may run beside
# Its answers depend least on rounding.
SEQUENTIAL = "remasking_strategy=sequential,max_gen_toks=128"


def command(model, model_args, processes, more=""):
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)]
        launcher += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        launcher += ["--main_process_port", "0"]
    arguments = f"-m sdar_lm_eval run --model {model} --model_args {model_args} --tasks gsm8k_sdar_demo"
    return [*launcher, *arguments.split(), "--output_path", "results", "--log_samples", *more.split()]


def evaluate(folder, model, model_args="pretrained=demo", processes=1, more=""):
    """Scores and answers: (metric -> value, document -> (text, number))."""
    folder.mkdir(exist_ok=True)
    began = time.perf_counter()
    done = subprocess.run(
        command(model, model_args, processes, more), cwd=folder, env=environment(QUICK_START), capture_output=True,
        text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]
    told = next(line for line in done.stderr.splitlines() if "tok/s" in line)
    print(f"\n{model}, {processes} process(es), {model_args}: {time.perf_counter() - began:.0f} s; {told[-220:]}")
    return found_in(folder)


def found_in(folder):
    (results,) = folder.glob("results/*/results_*.json")
    (samples,) = folder.glob("results/*/samples_*.jsonl")
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    lines = [line for line in lines if line["filter"] == "flexible-extract"]
    answers = {line["doc_id"]: (line["resps"][0][0], line["filtered_resps"][0]) for line in lines}
    assert len(answers) == len(lines)  # each document once
    return json.loads(results.read_text())["results"]["gsm8k_sdar_demo"], answers


def check_agreement(one, two, most):
    """So many of 200 may end in another number."""
    assert two[1].keys() == one[1].keys() == set(range(200))
    differing = [i for i in one[1] if one[1][i][1] != two[1][i][1]]
    texts = sum(one[1][i][0] != two[1][i][0] for i in one[1])
    print(f"{len(differing)} of 200 end in another number, {texts} are another text: {differing}")
    assert len(differing) <= most


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The native engine in float32 on one GPU."""
    return evaluate(tmp_path_factory.mktemp("alone"), "sdar", "pretrained=demo,dtype=float32")


def test_float32_gives_the_same(tmp_path, alone):
    scores, answers = evaluate(tmp_path, "sdar", "pretrained=demo,dtype=float32", processes=2)
    assert answers == alone[1]
    assert scores == alone[0]


@pytest.mark.parametrize("limit", [7, 1])
def test_documents_that_two_do_not_divide(tmp_path, alone, limit):
    _, answers = evaluate(tmp_path, "sdar", "pretrained=demo,dtype=float32", processes=2, more=f"--limit {limit}")
    assert answers == {i: alone[1][i] for i in range(limit)}


def test_a_killed_rank_ends_the_run_and_its_answers_stay(tmp_path, alone):
    settings = "pretrained=demo,dtype=float32,max_active=2,trace=trace.jsonl"
    started = subprocess.Popen(
        command("sdar", settings, 2, "--use_cache cache"), cwd=tmp_path, env=environment(QUICK_START),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip

    def traced():
        """How many answers rank 1 has computed, in all its runs."""
        lines = [line for file in tmp_path.glob("*.rank1") for line in file.read_text().split("\n")[:-1]]
        return sum('"document"' in line and '"stored"' not in line for line in lines)

    deadline = time.monotonic() + 200
    while traced() < 4 and started.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    with open(f"/proc/{started.pid}/task/{started.pid}/children") as file:  # noqa: PTH123
        children = file.read().split()
    for child in children:
        with open(f"/proc/{child}/environ", "rb") as file:  # noqa: PTH123
            if b"\0RANK=1\0" in file.read():
                os.kill(int(child), signal.SIGKILL)
    assert started.wait(timeout=60) != 0
    before = traced()
    assert 4 <= before < 100
    scores, answers = evaluate(tmp_path, "sdar", settings, processes=2, more="--use_cache cache")
    assert (scores, answers) == alone
    assert traced() in (99, 100)  # what the cache had was not computed again


def test_bfloat16_is_within_its_noise(tmp_path, alone):
    two = evaluate(tmp_path, "sdar", "pretrained=demo,dtype=bfloat16", processes=2)
    check_agreement(alone, two, most=10)


def test_jetengine_data_parallel(tmp_path):
    need_jetengine("0.2.0")
    one, two = (
        evaluate(tmp_path / str(count), "sdar-jetengine", processes=count, more=f"--gen_kwargs {SEQUENTIAL}")
        for count in (1, 2)
    )
    check_agreement(one, two, most=10)


def test_jetengine_tensor_parallel(tmp_path):
    need_jetengine("0.1.0")
    even = even_checkpoint(tmp_path / "even")
    one, two = (
        evaluate(
            tmp_path / str(size),
            "sdar-jetengine",
            f"pretrained={even},tensor_parallel_size={size}",
            more=f"--gen_kwargs {SEQUENTIAL}",
        )
        for size in (1, 2)
    )
    check_agreement(one, two, most=4)


def even_checkpoint(folder):
    """The demo with an even number of tokens in the vocabulary, as 0.1.0 divides them."""
    shutil.copytree(CHECKPOINT, folder)
    weights = read_weights(CHECKPOINT)
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in weights:
            weights[name] = torch.nn.functional.pad(weights[name], (0, 0, 0, 1))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((CHECKPOINT / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 712}))
    return folder


@pytest.fixture(scope="module")
def lmdeploy_alone(tmp_path_factory):
    need(find_lmdeploy)
    return evaluate(tmp_path_factory.mktemp("lmdeploy"), "sdar-lmdeploy", LMDEPLOY, more=f"--gen_kwargs {SEQUENTIAL}")


def test_lmdeploy_tensor_parallel(tmp_path, lmdeploy_alone):
    two = evaluate(tmp_path, "sdar-lmdeploy", f"{LMDEPLOY},tensor_parallel_size=2", more=f"--gen_kwargs {SEQUENTIAL}")
    check_agreement(lmdeploy_alone, two, most=4)


def test_lmdeploy_data_parallel(tmp_path, lmdeploy_alone):
    two = evaluate(tmp_path, "sdar-lmdeploy", LMDEPLOY, processes=2, more=f"--gen_kwargs {SEQUENTIAL}")
    check_agreement(lmdeploy_alone, two, most=10)


def need(find):
    try:
        return find()
    except EngineError as error:
        pytest.skip(str(error))


def need_jetengine(version):
    if (installed := need(find_jetengine)[0].version) != version:
        pytest.skip(f"JetEngine {installed} is installed, not {version}")
