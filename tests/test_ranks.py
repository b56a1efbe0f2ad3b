"""Several processes evaluate together, with the same numbers and answers as one.

The first test starts two processes once and lets them run through all of `scenarios`; this file is their program too.
"""

from __future__ import annotations

import datetime
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lm_eval
import lm_eval.evaluator
import pytest
import torch
from lm_eval.tasks import TaskManager
from support import QUICK_START, environment

import sdar_lm_eval.tasks
from sdar_lm_eval import ranks
from sdar_lm_eval.errors import EngineError
from sdar_lm_eval.harness import SDARLM
from sdar_lm_eval.ranks import Ranks

TASKS = str(Path(sdar_lm_eval.tasks.__file__).parent)
REPEATED = """
include: gsm8k_sdar_demo.yaml
task: demo_repeated
repeats: 3
generation_kwargs: {until: [], do_sample: true, temperature: 1.0, max_gen_toks: 24}
"""
CHOICES = """
include: gsm8k_sdar_demo.yaml
task: demo_choices
output_type: multiple_choice
doc_to_text: "{{question}} It is"
doc_to_choice: ["1", "20", "300"]
doc_to_target: 1
filter_list: null
metric_list: [{metric: acc}]
"""
LAUNCHER_VARIABLES = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "ACCELERATE_USE_CPU",
    "OMP_NUM_THREADS",
)  # fmt: skip


def scenarios(folder: Path) -> dict[str, Any]:
    """Evaluate in several ways; return what this process learns of each: scores and answers, and what it computed."""
    manager = TaskManager(include_path=[TASKS, str(folder)], include_defaults=False)
    lm = SDARLM("demo")
    found: dict[str, Any] = {"threads": torch.get_num_threads()}

    def evaluate(name: str, task: str, **settings: Any) -> None:
        counts = lm.report.counts
        before = counts.requests + counts.scored_requests
        settings |= {"gen_kwargs": "max_gen_toks=24", "bootstrap_iters": 0, "log_samples": True}
        results = lm_eval.simple_evaluate(lm, tasks=[task], task_manager=manager, **settings)
        computed = counts.requests + counts.scored_requests - before
        found[name] = {"computed": computed, "results": results and _essence(results)}

    cache = str(folder / "cache")
    evaluate("greedy", "gsm8k_sdar_demo", limit=7)
    evaluate("fewer", "gsm8k_sdar_demo", limit=3)
    evaluate("chosen", "gsm8k_sdar_demo", samples={"gsm8k_sdar_demo": [5, 2, 9]})
    evaluate("repeated", "demo_repeated", limit=3)
    evaluate("cached", "gsm8k_sdar_demo", limit=4, use_cache=cache)  # each rank has a cache of its own
    if lm.rank == 0:
        lm.cache_hook.dbdict.terminate()  # deletes the file
    evaluate("cached on rank 1", "gsm8k_sdar_demo", limit=4, use_cache=cache)
    evaluate("all cached", "gsm8k_sdar_demo", limit=4, use_cache=cache)
    evaluate("repeated, cached", "demo_repeated", limit=3, use_cache=cache)
    evaluate("repeated, all cached", "demo_repeated", limit=3, use_cache=cache)
    evaluate("choices", "demo_choices", limit=3)
    found["run"] = lm.get_model_info()["sdar_lm_eval"]["run"]
    return found


def _essence(results: Any) -> dict[str, Any]:
    samples = {}
    for task, of_task in results["samples"].items():
        # lm_eval logs the answers to its padding with the document that it copied: they stand behind its own.
        own = results["configs"][task]["repeats"]
        samples[task] = sorted(
            (s["doc_id"], s["filter"], _rounded(s["resps"][0][:own]), s["doc"]["question"]) for s in of_task
        )
    return {"scores": results["results"], "samples": samples}


def _rounded(responses: list[Any]) -> list[Any]:
    """Log-likelihoods up to what batches of other shapes change in their last bits; texts as they are."""
    return [r if isinstance(r, str) else (round(r[0], 3), r[1]) for r in responses]


if __name__ == "__main__":
    logging.disable()
    lm_eval.evaluator.add_env_info = lambda _: None  # as below
    output = Path(sys.argv[1])
    found = scenarios(output)
    (output / f"found{os.environ['RANK']}.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    os._exit(0)  # on a busy machine gloo's threads abort a process that ends in the usual way while its peer still runs


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTHONPATH", environment(QUICK_START)["PYTHONPATH"])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("two", "one"):
        (tmp_path / name).mkdir()
        for task, text in {"repeated": REPEATED, "choices": CHOICES}.items():
            (tmp_path / name / f"demo_{task}.yaml").write_text(text.replace("gsm8k", f"{TASKS}/gsm8k", 1))
    return tmp_path


def test_two_processes_give_what_one_gives(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda _: None)  # slow, and of no interest here
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launcher, __file__, str(folder / "two")], timeout=300, capture_output=True, text=True, cwd=folder, check=False
    )
    assert done.returncode == 0, done.stderr
    rank0, rank1 = (json.loads((folder / "two" / f"found{rank}.json").read_text()) for rank in (0, 1))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in each of the two, where there are two cores
    alone = json.loads(json.dumps(scenarios(folder / "one")))
    torch.set_num_threads(threads)

    def computed(name: str) -> tuple[int, int]:
        return rank0[name]["computed"], rank1[name]["computed"]

    names = [name for name in alone if name not in ("threads", "run")]
    for name in names:
        assert rank0[name]["results"] == alone[name]["results"], name
        assert rank1[name]["results"] is None
    assert computed("greedy") == (4, 3)  # and none for the padding
    assert computed("fewer") == computed("chosen") == (2, 1)
    assert computed("repeated") == computed("repeated, cached") == (6, 3)
    assert computed("cached") == (2, 2)
    assert computed("cached on rank 1") == (2, 0)
    assert computed("all cached") == computed("repeated, all cached") == (0, 0)
    answers = rank0["repeated"]["results"]["samples"]["demo_repeated"]
    assert any(len(set(responses)) == 3 for _, _, responses, _ in answers)
    assert computed("choices") == (6, 3)
    assert rank0["run"]["likelihoods"]["requests"] == 9
    assert rank0["run"]["requests"] == sum(sum(computed(name)) for name in names) - 9
    assert rank0["threads"] == rank1["threads"] == max(1, ranks._cores() // 2)


def test_the_command_line_says_everything_once(folder: Path) -> None:
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launcher += ["--main_process_port", "0", "-m", "sdar_lm_eval", "run"]
    arguments = "--model sdar --model_args pretrained=demo,trace=trace.jsonl --tasks gsm8k_sdar_demo --limit 3"
    arguments += " --gen_kwargs max_gen_toks=24 --output_path results --log_samples"
    done = subprocess.run(
        [*launcher, *arguments.split()], timeout=300, capture_output=True, text=True, cwd=folder, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("exact_match") == 2  # a table with a row for each of two filters
    for said in ("on the native engine", "put into the checkpoint's chat template", "requests, "):
        assert done.stderr.count(said) == 1, said
    assert "2 ranks: 3 requests" in done.stderr
    assert done.stderr.count("GSM8K Eval:   0%") == 1  # how a bar begins
    (samples,) = folder.glob("results/*/samples_*.jsonl")
    assert sorted({json.loads(line)["doc_id"] for line in samples.read_text().splitlines()}) == [0, 1, 2]
    (results,) = folder.glob("results/*/results_*.json")
    info = json.loads(results.read_text())["config"]["sdar_lm_eval"]
    assert (info["ranks"], info["run"]["requests"]) == (2, 3)
    traced = [(folder / f"trace.jsonl.rank{rank}").read_text().splitlines() for rank in (0, 1)]
    assert sorted(len(lines) for lines in traced) == [1, 2]


def test_a_process_alone_needs_no_others() -> None:
    alone = Ranks()
    assert (alone.rank, alone.world_size) == (0, 1)
    assert alone.gather_object("x") == ["x"]
    alone.barrier()


def test_accelerate_that_started_one_process_is_told_apart(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    Ranks()
    assert not caplog.text
    # What `accelerate launch --cpu --num_processes 2` sets: the address for others, but no rank.
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    Ranks()
    assert not caplog.text
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    Ranks()
    assert "the only process" in caplog.text
    assert "torchrun --nproc_per_node N" in caplog.text


@pytest.mark.parametrize("address", [None, "127.0.0.1"])
def test_others_that_never_come_are_an_error_not_a_wait(monkeypatch: pytest.MonkeyPatch, address: str | None) -> None:
    monkeypatch.setattr(ranks, "PATIENCE_AT_START", datetime.timedelta(seconds=1))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    if address:
        monkeypatch.setenv("MASTER_ADDR", address)
        monkeypatch.setenv("MASTER_PORT", "0")
    with pytest.raises(EngineError, match="WORLD_SIZE is 2, but the other processes cannot be reached"):
        Ranks()


@pytest.mark.parametrize(
    ("world_size", "variables", "threads"),
    [
        (1, {}, None),
        (2, {}, 4),
        (4, {"LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}, 4),  # torchrun's, on two machines
        (16, {}, 1),
        (2, {"OMP_NUM_THREADS": "3"}, None),  # somebody chose it
    ],
)
def test_ranks_share_the_cores(
    monkeypatch: pytest.MonkeyPatch, world_size: int, variables: dict[str, str], threads: int | None
) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(ranks, "_cores", lambda: 8)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    several = Ranks()
    several.world_size = world_size
    several.share_cpu()
    assert chosen == ([] if threads is None else [threads])
