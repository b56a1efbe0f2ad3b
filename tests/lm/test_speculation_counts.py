"""What an evaluation with speculation writes to its results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lm_eval
import pytest
from lm_eval.tasks import TaskManager

from sdar_lm_eval import SDARLM
from sdar_lm_eval.autoload import TASKS


def test_results_files_have_what_speculation_did(tmp_path: Path) -> None:
    """With a folder of stored answers, whose second run computes nothing."""
    runs = []
    given: list[tuple[str, dict[str, Any]]] = [
        ("plain", {}),
        ("guessed", {"speculate": 3}),
        ("again", {"speculate": 3}),
    ]
    for name, options in given:
        lm = SDARLM("demo", device="cpu", answers=tmp_path / ("plain" if name == "plain" else "answers"), **options)
        tasks = TaskManager(include_path=TASKS, include_defaults=False)
        results = lm_eval.simple_evaluate(lm, tasks=["gsm8k_sdar_demo"], limit=3, task_manager=tasks)
        runs.append((results, results["config"]["sdar_lm_eval"]))
    (plain, without), (guessed, facts), (_, stored) = runs
    assert guessed["results"] == plain["results"]
    assert "speculation" not in without["run"] and "speculate" not in without
    assert facts["speculate"] == 3
    assert facts["run"]["forwards"] == without["run"]["forwards"]
    assert facts["run"]["tokens_per_forward"] == without["run"]["tokens_per_forward"]
    done = facts["run"]["speculation"]
    assert done == facts["run"]["tasks"]["gsm8k_sdar_demo"]["speculation"]
    assert done["passes"] + done["guesses"]["right"] == facts["run"]["forwards"]["denoising"]
    assert done["tokens_per_pass"] == pytest.approx(facts["run"]["new_tokens"] / done["passes"], abs=1e-3)
    assert "speculation" not in stored["run"]
