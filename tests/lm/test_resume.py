"""A run that is killed goes on where it stopped, and ends with what an undisturbed run gives."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
from lm_eval.tasks import TaskManager
from support import QUICK_START, environment, fork_of

import sdar_lm_eval.tasks
from sdar_lm_eval.lm.model import SDARLM
from sdar_lm_eval.report.results import results_in

TASKS = str(Path(sdar_lm_eval.tasks.__file__).parent)
# Short answers, one at a time: slow enough to be killed in the middle.
DOCUMENTS = 10
TASK = f"include: {TASKS}/gsm8k_sdar_demo.yaml\n"
GREEDY = f"{TASK}task: greedy\ngeneration_kwargs: {{until: [], do_sample: false, max_gen_toks: 16}}\n"
SAMPLED = f"{TASK}task: sampled\nrepeats: 2\ngeneration_kwargs: {{until: [], do_sample: true, max_gen_toks: 16}}\n"
MODEL = {"pretrained": "demo", "max_active": 1, "remasking_strategy": "low_confidence_static"}
ANSWERS = 3 * DOCUMENTS


def _trace(folder: Path, run: str = "trace.jsonl") -> list[dict[str, Any]]:
    """The answers that a run computed."""
    lines = [line for path in folder.glob(run) for line in path.read_text().split("\n")[:-1]]
    answers = [json.loads(line) for line in lines[1:]]
    return [answer for answer in answers if not answer.get("stored")]


def _scores(results: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in results["results"].items() if name in ("greedy", "sampled")}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "greedy.yaml").write_text(GREEDY)
    (tmp_path / "tasks" / "sampled.yaml").write_text(SAMPLED)
    return tmp_path


@pytest.mark.slow
def test_a_killed_run_computes_only_what_was_missing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model_args = ",".join(f"{name}={value}" for name, value in {**MODEL, "trace": "trace.jsonl"}.items())
    command = [sys.executable, "-m", "sdar_lm_eval", "run", "--model", "sdar", "--model_args", model_args]
    command += ["--include_path", "tasks", "--tasks", "greedy,sampled", "--limit", str(DOCUMENTS)]
    command += ["--use_cache", "answers/cache", "--output_path", "results", "--log_samples"]
    variables = environment(QUICK_START)
    log = folder / "log.txt"
    with log.open("w") as output:
        running = subprocess.Popen(command, cwd=folder, env=variables, stdout=output, stderr=output)
        deadline = time.monotonic() + 300
        while len(_trace(folder)) < ANSWERS // 4:
            assert running.poll() is None, log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(fork_of(running.pid), signal.SIGKILL)
        assert running.wait() == -signal.SIGKILL
    finished = _trace(folder)
    assert ANSWERS // 4 <= len(finished) < ANSWERS
    assert not list((folder / "results").iterdir())

    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    again = _trace(folder, "trace-*.jsonl")
    traced = finished + again
    computed = len(again)
    # An answer is in the cache before it is in the trace, so one may have been kept and not traced.
    assert computed in (ANSWERS - len(finished), ANSWERS - len(finished) - 1)
    assert len({(line["task"], line["document"], line["repeat"]) for line in traced}) == len(traced)  # none twice
    assert {line["task"] for line in traced[: len(finished)]} == {"greedy", "sampled"}
    (results,) = folder.glob("results/*/results_*.json")
    resumed = json.loads(results.read_text())
    assert resumed["config"]["sdar_lm_eval"]["run"]["requests"] == computed

    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda _: None)  # slow, and of no interest here
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    manager = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
    lm = SDARLM(**(MODEL | {"max_active": 24}))
    undisturbed = lm_eval.simple_evaluate(lm, tasks=["greedy", "sampled"], task_manager=manager, limit=DOCUMENTS)
    torch.set_num_threads(threads)
    assert undisturbed is not None
    assert _scores(resumed) == json.loads(json.dumps(_scores(dict(undisturbed))))
    for task in ("greedy", "sampled"):
        (path,) = folder.glob(f"results/*/samples_{task}_*.jsonl")
        samples = [json.loads(line) for line in path.read_text().splitlines()]
        expected = {(s["doc_id"], s["filter"]): s["resps"] for s in undisturbed["samples"][task]}
        assert {(s["doc_id"], s["filter"]): s["resps"] for s in samples} == expected
        kept = results_in(results)[0].denoising(task)
        expected_lines = list(lm.denoising_lines()(task))
        assert [(k.document, k.repeat, k.token_ids, k.steps) for k in kept] == [
            (line["document"], line["repeat"], tuple(line["token_ids"]), tuple(line["steps"] or ()))
            for line in expected_lines
        ]
        assert len(kept) == DOCUMENTS * (2 if task == "sampled" else 1)
    drawn = [s["resps"][0] for s in undisturbed["samples"]["sampled"]]
    assert any(first != second for first, second in drawn)


# AIME's protocol (tasks/_competition_repeats_yaml), with some of the demo's problems and short answers
PROBLEMS, SAMPLES = 12, 32
AIME = f"{TASK}task: aime\nrepeats: {SAMPLES}\n"
AIME += "generation_kwargs: {until: [], do_sample: true, temperature: 1.0, top_p: 1.0, top_k: 0, max_gen_toks: 16}\n"
PAGE = 16  # tokens; whole pages of a prompt are shared


@pytest.mark.slow
def test_aime_s_protocol_goes_on_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "aime.yaml").write_text(AIME)
    model_args = "pretrained=demo,answers=answers,trace=trace.jsonl"
    command = [sys.executable, "-m", "sdar_lm_eval", "run", "--model", "sdar", "--model_args", model_args]
    command += ["--include_path", "tasks", "--tasks", "aime", "--limit", str(PROBLEMS)]
    command += ["--output_path", "results", "--log_samples"]
    variables = environment(QUICK_START)
    log = tmp_path / "log.txt"
    with log.open("w") as output:
        running = subprocess.Popen(command, cwd=tmp_path, env=variables, stdout=output, stderr=output)
        deadline = time.monotonic() + 300
        while len(_trace(tmp_path)) < PROBLEMS * SAMPLES // 3:
            assert running.poll() is None, log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(fork_of(running.pid), signal.SIGKILL)
        assert running.wait() == -signal.SIGKILL
    assert not list((tmp_path / "results").iterdir())
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("results/*/results_*.json")
    resumed = json.loads(file.read_text())
    computed = _trace(tmp_path, "trace-*.jsonl")
    assert 0 < len(computed) <= PROBLEMS * SAMPLES * 2 // 3
    run = resumed["config"]["sdar_lm_eval"]["run"]
    assert (run["requests"], run["stored_requests"]) == (len(computed), PROBLEMS * SAMPLES - len(computed))

    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda _: None)  # slow, and of no interest here
    manager = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    lm = SDARLM(pretrained="demo", trace=str(tmp_path / "whole.jsonl"))
    undisturbed = lm_eval.simple_evaluate(lm, tasks=["aime"], task_manager=manager, limit=PROBLEMS)
    assert undisturbed is not None
    assert resumed["results"]["aime"] == json.loads(json.dumps(undisturbed["results"]["aime"]))
    # Cut answers have no right one; their last numbers agree now and then.
    assert 0 < undisturbed["results"]["aime"]["agreement,flexible-extract"] < 1
    (path,) = tmp_path.glob("results/*/samples_aime_*.jsonl")
    samples = [json.loads(line) for line in path.read_text().splitlines()]
    answers = {sample["doc_id"]: sample["resps"][0] for sample in samples}
    assert answers == {sample["doc_id"]: sample["resps"][0] for sample in undisturbed["samples"]["aime"]}
    assert sum(map(len, answers.values())) == PROBLEMS * SAMPLES
    assert all(len(set(of_document)) > 1 for of_document in answers.values())  # each sample is drawn anew

    # Each prompt is prefilled once, whatever the number of its samples.
    whole = _trace(tmp_path, "whole.jsonl")
    for traced, results in ((whole, undisturbed), (computed, resumed)):
        pages = {line["document"]: line["prompt_tokens"] // PAGE for line in traced}
        shared = PAGE * (sum(pages[line["document"]] for line in traced) - sum(pages.values()))
        assert results["config"]["sdar_lm_eval"]["shared_prompt_tokens"] == shared
    assert len(whole) == PROBLEMS * SAMPLES and len({line["document"] for line in whole}) == PROBLEMS
