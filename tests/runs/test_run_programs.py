from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from sdar_lm_eval.runs.merge import publish
from sdar_lm_eval.runs.programs import batches, run_here
from sdar_lm_eval.runs.settings import RunSettings, runs_from_flags
from sdar_lm_eval.runs.shards import answer_shard
from sdar_lm_eval.tasks import programs
from sdar_lm_eval.tasks.programs import Job

MARK = "mark = 1"
TESTS = ("def check(one): assert one() == 1", "def check(one): assert one() == 2", "def check(one): one()")


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Job]:
    """Programs of the model that this process runs; those by which tasks try whether programs run are not among them.

    The prompts are whole functions, and any answer of one line is a comment behind them.
    """
    rows = [
        {"task_id": f"HumanEval/{n}", "entry_point": "one", "test": test, "prompt": f"{MARK}\ndef one(): return 1\n#"}
        for n, test in enumerate(TESTS)
    ]
    (tmp_path / "HumanEval.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setenv("SDAR_HUMANEVAL_DIR", str(tmp_path))
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda _: None)
    jobs, run = [], programs._run

    def watched(job: Job) -> bool:
        if job.program.startswith(MARK):
            jobs.append(job)
        return run(job)

    monkeypatch.setattr(programs, "_run", watched)
    return jobs


def _run() -> RunSettings:
    flags: dict[str, Any] = {
        "model_name": "demo", "num_samples": None, "block_length": "4", "denoising_steps": "4", "temperature": "0",
        "remasking_strategy": "dynamic", "confidence_threshold": "0.85", "max_gen_length": 4, "verbose": False,
        "engine": "native", "tasks": "humaneval_sdar", "confirm_run_unsafe_code": True,
    }  # fmt: skip
    (run,) = runs_from_flags(**flags)
    return run


def test_programs_run_where_the_caller_says(ran: list[Job], tmp_path: Path) -> None:
    asked: list[Sequence[Job]] = []

    def elsewhere(jobs: Sequence[Job]) -> list[bool]:
        asked.append(jobs)
        return [False, True, True]

    answer_shard(_run(), tmp_path, 1, 1)
    content = json.loads(publish(_run(), tmp_path, elsewhere).read_text())
    assert ran == []
    (jobs,) = asked  # all at once
    assert [job.tests.splitlines()[0] for job in jobs] == list(TESTS)
    assert content["metrics"]["humaneval_sdar"]["pass@1,code-block"] == pytest.approx(2 / 3)
    assert run_here(jobs) == [True, False, True]  # the machine's own pool is back
    assert [job.tests for job in ran] == [job.tests for job in jobs]


def test_programs_run_here_by_default(ran: list[Job], tmp_path: Path) -> None:
    answer_shard(_run(), tmp_path, 1, 1)
    assert ran == []
    content = json.loads(publish(_run(), tmp_path).read_text())
    assert len(ran) == 3 and content["metrics"]["humaneval_sdar"]["pass@1,code-block"] == pytest.approx(2 / 3)


def test_an_error_elsewhere_is_the_run_s(ran: list[Job], tmp_path: Path) -> None:
    def broken(_: Sequence[Job]) -> list[bool]:
        raise ConnectionError("no container")

    answer_shard(_run(), tmp_path, 1, 1)
    with pytest.raises(ConnectionError, match="no container"):
        publish(_run(), tmp_path, broken)
    assert not (tmp_path / _run().name).exists()
    publish(_run(), tmp_path)
    assert len(ran) == 3


def test_batches() -> None:
    jobs = [Job("x" * size, "", 1.0) for size in (4, 5, 9, 1, 30, 2)]
    assert [[len(job.program) for job in batch] for batch in batches(jobs, 10)] == [[4, 5], [9, 1], [30], [2]]
    assert list(batches([], 10)) == []
