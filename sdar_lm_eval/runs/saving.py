"""Evaluates by the harness, and writes lm_eval's results and samples files into a folder that appears whole or not."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.api.model import LM
from lm_eval.loggers import EvaluationTracker

from sdar_lm_eval.errors import UserError
from sdar_lm_eval.report.results import results_in


def evaluate_into(
    folder: Path,
    lm: LM,
    *,
    model: str,
    model_args: Mapping[str, object],
    facts: Mapping[str, object] | None = None,
    finish: Callable[[Path], object] | None = None,
    **call: Any,
) -> None:
    """Evaluate a model, and make a folder of lm_eval's results and samples files. An older folder is replaced.

    Args:
        folder: the results' own folder.
        lm: the model.
        model: what the results file says of it: lm_eval's name.
        model_args: what the results file says of it.
        facts: further facts for the results file's `config.sdar_lm_eval`.
        finish: adds files to the folder before it appears.
        call: further arguments of `lm_eval.simple_evaluate`.

    Raises:
        UserError: the model or the task refuses, or lm_eval could not write its files.
        OSError: the folder cannot be made.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    tracker = EvaluationTracker(output_path=str(partial))
    results = lm_eval.simple_evaluate(lm, evaluation_tracker=tracker, **call)
    assert results is not None
    results["config"] |= {"model": model, "model_args": dict(model_args)}
    if facts is not None:
        results["config"]["sdar_lm_eval"] |= facts
    tracker.general_config_tracker.log_experiment_args(model, dict(model_args), None, None, True)
    samples = results.pop("samples")
    tracker.save_results_aggregated(results=results, samples=samples)
    for task in results["configs"]:
        tracker.save_results_samples(task_name=task, samples=samples[task])
    _check(partial, {task: len(samples[task]) for task in results["configs"]})
    if finish is not None:
        finish(partial)
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)


def _check(folder: Path, lines: Mapping[str, int]) -> None:
    """Refuse files that are not whole: lm_eval logs a full disk as a warning, and goes on."""
    whole = False
    if any(folder.rglob("results_*.json")):
        (results,) = results_in(folder)
        files = {task: results.samples_file(task) for task in lines}
        whole = all(file.exists() and file.read_bytes().count(b"\n") == lines[task] for task, file in files.items())
    if not whole:
        raise UserError(
            f"lm_eval could not write its results into {folder.parent}. Free some space; the same command goes on from "
            "the finished answers."
        )
