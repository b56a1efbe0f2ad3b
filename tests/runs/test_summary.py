from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lm_eval
import pytest
from lm_eval.loggers import EvaluationTracker

from sdar_lm_eval.lm.model import SDARLM
from sdar_lm_eval.report.gsm8k_json import convert
from sdar_lm_eval.report.table import read_tables
from sdar_lm_eval.runs import summary
from sdar_lm_eval.runs.settings import RunSettings, runs_from_flags
from sdar_lm_eval.runs.shards import task_manager

FLAGS: dict[str, Any] = {
    "model_name": "JetLM/SDAR-4B-Chat", "num_samples": 124, "block_length": "4", "denoising_steps": "4",
    "temperature": "1.0", "remasking_strategy": "low_confidence_dynamic", "confidence_threshold": "0.85",
    "max_gen_length": None, "verbose": True, "engine": "jetengine", "tasks": "gsm8k_sdar",
}  # fmt: skip
METRICS = {"accuracy": 0.75, "correct": 93, "total": 124, "percentage": "75.00%", "stderr": 0.039}
PERFORMANCE = {
    "total_seconds": 62.0, "seconds_per_question": 0.5, "tokens_per_second": 2345.6, "tokens_per_forward": 1.43,
}  # fmt: skip
REPORT: dict[str, Any] = {
    "config": {"engine": "jetengine"},
    "metrics": METRICS | {"filter": "flexible-extract", "by_filter": {"strict-match": METRICS | {"stderr": None}}},
    "performance": PERFORMANCE,
    "results": [{"idx": 0}],
}


def _runs(**flags: Any) -> list[RunSettings]:
    return runs_from_flags(**(FLAGS | flags))


def _rows(text: str) -> dict[str, str]:
    return {line[2:24].strip(): line[24:] for line in text.splitlines() if line.startswith("  ")}


def test_the_configuration() -> None:
    text = summary.configuration(_runs(temperature="0.0"), {"gpu": "H100!"})
    assert text.splitlines()[0] == "Configuration" and "Each run is: lm_eval run --model sdar-jetengine" in text
    assert _rows(text) == {
        "model": "JetLM/SDAR-4B-Chat", "engine": "jetengine", "tasks": "gsm8k_sdar", "samples": "the first 124",
        "block length": "4", "denoising steps": "4", "temperature": "0 (greedy)",
        "remasking strategy": "low_confidence_dynamic", "confidence threshold": "0.85",
        "max gen length": "the task's", "seed": "0", "verbose": "true", "gpu": "H100!",
    }  # fmt: skip
    assert _rows(summary.configuration(_runs(temperature="1.0,0.5"), {}))["temperature"] == "1, 0.5"
    swept = summary.configuration(_runs(temperature="0.5,0,1", num_samples=None), {})
    assert swept.startswith("Configuration: a sweep of 3 runs")
    assert _rows(swept)["temperature"] == "0.5, 0 (greedy), 1" and _rows(swept)["samples"] == "all"


def test_the_end_of_a_run() -> None:
    assert summary.result(REPORT).splitlines()[3:] == [
        "Accuracy: 75.00% (93/124) ± 3.90 points",
        "  strict-match: 75.00% (93/124)",
        "Average time a question: 0.50 s",
        "Throughput: 2,345.6 returned tokens/s",
        "Tokens per forward: 1.43",
        "Total time: 62.0 s of generation",
    ]


def test_the_end_of_a_run_of_other_tasks() -> None:
    run = {"tokens_per_second": 10.0, "tokens_per_forward": 1.0, "generation_seconds": 5.0}
    scores = {"alias": "math500_sdar", "sample_len": 500, "math_verify,none": 0.728, "math_verify_stderr,none": 0.02}
    text = summary.result({"config": {}, "metrics": {"math500_sdar": scores}, "performance": run})
    assert "math500_sdar: math_verify,none 0.728\n" in text and "Total time: 5.0 s" in text


def test_a_sweep_s_table_and_json() -> None:
    runs = _runs(confidence_threshold="0.8,0.9", block_length="4,8")
    reports = [REPORT, None, REPORT | {"metrics": METRICS | {"stderr": None}}, REPORT]
    assert [line.split() for line in summary.sweep_table(reports, runs).splitlines()] == [
        ["block_length", "confidence_threshold", "accuracy,", "%", "tokens/s", "tokens", "per", "forward"],
        ["4", "0.8", "75.0", "±", "3.9", "2,345.6", "1.43"],
        ["4", "0.9", "failed"],
        ["8", "0.8", "75.0", "2,345.6", "1.43"],
        ["8", "0.9", "75.0", "±", "3.9", "2,345.6", "1.43"],
    ]
    content = summary.sweep_json(reports, runs, ["a", "b", "c", "d"])["runs"]
    assert [(run["folder"], run["failed"]) for run in content] == [
        ("a", False),
        ("b", True),
        ("c", False),
        ("d", False),
    ]
    assert content[0]["block_length"] == 4 and content[0]["metrics"]["accuracy"] == 0.75
    assert "metrics" not in content[1] and "results" not in content[0]
    json.dumps(content)


SPEEDS = {"tokens_per_second": "2,345.6", "tokens_per_forward": "1.43"}
UNKNOWN: dict[str, Any] = dict.fromkeys(PERFORMANCE)


@pytest.mark.parametrize("known", [{}, *({name: value} for name, value in PERFORMANCE.items())])
def test_what_is_unknown_is_left_out(known: dict[str, float]) -> None:
    """Each figure by itself may be null: where all answers were there already, say."""
    unknown = REPORT | {"performance": UNKNOWN | known}
    assert len(summary.result(unknown).splitlines()) == 5 + len(known)
    row = summary.sweep_table([unknown], _runs()).splitlines()[1].split()
    speeds = [text for name, text in SPEEDS.items() if name in known]
    assert row == ["4", "4", "1", "low_confidence_dynamic", "0.85", "75.0", "±", "3.9", *speeds]


def test_a_run_whose_answers_were_there_already(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As lm_eval writes it and `gsm8k-json` reads it."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda _: None)
    for folder in ("first", "second"):
        tracker = EvaluationTracker(output_path=str(tmp_path / folder))
        results = lm_eval.simple_evaluate(
            SDARLM("demo", answers=str(tmp_path / "answers")),
            tasks=["gsm8k_sdar_demo"],
            task_manager=task_manager(["gsm8k_sdar_demo"]),
            gen_kwargs="max_gen_toks=8",
            limit=2,
        )
        assert results is not None
        samples = results.pop("samples")
        tracker.save_results_aggregated(results=results, samples=samples)
        tracker.save_results_samples(task_name="gsm8k_sdar_demo", samples=samples["gsm8k_sdar_demo"])
    first, second = (convert(tmp_path / folder) for folder in ("first", "second"))
    assert all(value is not None for value in first["performance"].values())
    for name in ("new_tokens", "tokens_per_forward"):
        assert second["performance"][name] == first["performance"][name]  # type: ignore[literal-required]
    assert second["metrics"] == first["metrics"]
    assert "Throughput" in summary.result(first) and "Throughput" in summary.result(second)
    (table,) = read_tables([tmp_path / "second"])
    assert list(table.others) == ["gsm8k_sdar_demo"] and not table.scores


def test_what_a_run_of_a_sweep_is_told_by() -> None:
    assert summary.sweep_label(_runs()[0], _runs()) == ""
    runs = _runs(temperature="0,0.5", block_length="4,8")
    assert summary.sweep_label(runs[1], runs) == " (block_length 4, temperature 0.5)"
