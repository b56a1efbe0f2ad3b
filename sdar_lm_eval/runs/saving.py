"""Evaluates a model by the harness, and writes lm_eval's files into a folder that appears only once it is complete."""

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
    """Evaluate a model, and make a folder of lm_eval's results and samples files. The folder replaces an older one.

    Args:
        folder: the folder of this evaluation's results.
        lm: the model.
        model: the model's name in the results file.
        model_args: the model's arguments in the results file.
        facts: name -> value, added to `config.sdar_lm_eval` of the results file; None: nothing.
        finish: called with the folder before it appears, to add files; None: nothing.
        call: further arguments of `lm_eval.simple_evaluate`.

    Raises:
        UserError: the model or a task refuses a setting, or lm_eval could not write its files.
        EngineError: the engine stopped.
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
    tracker.general_config_tracker.log_experiment_args(
        model, dict(model_args), system_instruction=None, chat_template=None, fewshot_as_multiturn=True
    )
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
    """Raise `UserError` where files are incomplete: lm_eval only logs a warning where the disk is full.

    Args:
        folder: the folder of the files.
        lines: task -> number of lines of its samples file.
    """
    whole = False
    if any(folder.rglob("results_*.json")):
        (results,) = results_in(folder)
        files = {task: results.samples_file(task) for task in lines}
        whole = all(file.exists() and file.read_bytes().count(b"\n") == lines[task] for task, file in files.items())
    if not whole:
        raise UserError(
            f"lm_eval could not write its results into {folder.parent}. Free some space, and run the same command "
            "again: the finished answers are kept."
        )
