"""A group of tasks has one score and one error in all outputs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from sdar_lm_eval.report.compare import compare_runs
from sdar_lm_eval.report.groups import group_over_seeds
from sdar_lm_eval.report.page.data import collect
from sdar_lm_eval.report.page.overview import score_rows
from sdar_lm_eval.report.runs import Run, read_one_run
from sdar_lm_eval.report.table import read_tables
from sdar_lm_eval.report.text_table import score

GROUP = "mmlu_sdar"
TASKS = {"mmlu_sdar_anatomy": 12, "mmlu_sdar_virology": 30}
METRIC = "exact_match,first-option"


def write(folder: Path, answers: dict[str, np.ndarray], *, samples: bool = True) -> Path:
    """Write a run of the group; `answers` are task -> (seeds, documents), 0 or 1. The group is its tasks' mean."""
    for seed in range(3):
        of_seed = folder / str(seed)
        of_seed.mkdir(parents=True)
        means = {task: float(its[seed].mean()) for task, its in answers.items()}
        scores = {task: {METRIC: mean, "exact_match_stderr,first-option": 0.5} for task, mean in means.items()}
        scores[GROUP] = {METRIC: float(np.mean(list(means.values()))), "exact_match_stderr,first-option": 0.5}
        content = {
            "results": scores,
            "group_subtasks": {GROUP: list(answers)},
            "config": {"model": "sdar", "sdar_lm_eval": {"seed": seed, "decoding_of_tasks": {}}},
            "n-samples": {task: {"effective": its.shape[1]} for task, its in answers.items()},
            "date": 1.0,
        }
        (of_seed / "results_1.json").write_text(json.dumps(content))
        for task, its in answers.items() if samples else ():
            lines = [
                {"doc_id": i, "doc": {}, "target": "A", "filter": "first-option", "doc_hash": f"{task} {i}",
                 "resps": [["A"]], "filtered_resps": ["A"], "exact_match": value}
                for i, value in enumerate(its[seed].tolist())
            ]  # fmt: skip
            (of_seed / f"samples_{task}_1.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def cell_of_page(run: Run) -> str:
    (row,) = [row for row in score_rows([run], [], collect([run], run.tasks)) if row.task == GROUP]
    return row.of_runs[0]


def test_seeds_of_a_group_are_one_score_with_one_error(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    answers = [
        {task: (rng.random((3, number)) < share).astype(float) for task, number in TASKS.items()}
        for share in (0.4, 0.8)
    ]
    of_documents = [its.mean(0) for its in answers[0].values()]
    value = np.mean([its.mean() for its in of_documents])
    stderr = np.hypot(*(its.std(ddof=1) / np.sqrt(len(its)) for its in of_documents)) / 2
    a, b = (read_one_run(write(tmp_path / name, its)) for name, its in zip("ab", answers, strict=True))
    (metric,) = group_over_seeds(a, GROUP)
    (row,) = compare_runs(a, b).groups
    (table,) = read_tables([tmp_path / "a"])
    found = table.scores[GROUP]
    assert not found.of_one_seed
    for known in ((metric.value, metric.stderr), (row.a, row.a_stderr), (found.value, found.stderr)):
        assert known == pytest.approx((value, stderr))
    assert cell_of_page(a) == score(float(value), float(stderr), share=True)


def test_without_samples_the_error_of_several_seeds_is_unknown(tmp_path: Path) -> None:
    answers = {task: np.eye(3, number) for task, number in TASKS.items()}
    run = read_one_run(write(tmp_path / "run", answers, samples=False))
    value = np.mean([1 / number for number in TASKS.values()])
    (metric,) = group_over_seeds(run, GROUP)
    assert (metric.value, metric.stderr) == (pytest.approx(value), None)
    assert cell_of_page(run) == score(float(value), None, share=True)
    (table,) = read_tables([tmp_path / "run"])
    assert table.scores[GROUP].of_one_seed
