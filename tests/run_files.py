"""Runs of lm_eval for tests: made by lm_eval, and files in lm_eval's format with given scores."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager

from sdar_lm_eval.autoload import TASKS

Score = Any  # what a samples line has under a metric's name
DATE = "2026-01-02T03-04-05.678901"


def evaluate(
    folder: Path,
    model: str,
    model_args: dict[str, Any],
    *,
    log_samples: bool = True,
    tasks_of: Any = TASKS,
    **settings: Any,
) -> Any:
    """Evaluate as lm_eval's command line does, save the run in `folder`, and return the results."""
    tracker = EvaluationTracker(output_path=str(folder))
    settings = {"tasks": ["gsm8k_sdar_demo"], "limit": 6} | settings
    results = lm_eval.simple_evaluate(
        model,
        model_args=model_args,
        task_manager=TaskManager(include_path=tasks_of, include_defaults=False),
        evaluation_tracker=tracker,
        log_samples=log_samples,
        **settings,
    )
    assert results is not None
    samples = results.pop("samples", None)
    tracker.save_results_aggregated(results=results, samples=samples)
    for task in results["configs"] if log_samples else ():
        tracker.save_results_samples(task_name=task, samples=samples[task])
    return results


def write_run(
    folder: Path,
    scores: Mapping[str, Mapping[str, Sequence[Score]]],
    *,
    date: str = DATE,
    documents: Sequence[int] | None = None,
    aggregated: Mapping[str, float] | None = None,
    better: Mapping[str, bool] | None = None,
    version: object = 1.0,
    prompt: str = "",
    hashes: bool = True,
    samples: bool = True,
    target: str = "gold",
    **model_args: object,
) -> Path:
    """Write a results file and samples files, and return the folder.

    Args:
        folder: made if it is not there.
        scores: task -> "metric,filter" -> a value for each document.
        date: the date in the files' names.
        documents: the documents' indices; document i is the i-th of its data set, so equal indices are equal documents.
        aggregated: "metric,filter" -> the results file's value; default: the mean over documents.
        better: metric -> whether higher is better; default: it is.
        version: the task's.
        prompt: stands before each question.
        hashes: whether lines have hashes.
        samples: whether there are samples files.
        target: the gold answer of all documents.
        model_args: settings of the model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[str, Any]] = {}
    number = 0
    for task, of_task in scores.items():
        lines: dict[tuple[str, int], dict[str, Any]] = {}  # of a filter and a document's place
        results[task] = {"alias": task}
        for key, values in of_task.items():
            metric, _, filter_name = key.partition(",")
            number = len(values)
            if aggregated is None:
                results[task][key] = float(np.mean([np.mean(value) for value in values]))
            else:
                results[task][key] = aggregated[key]
            results[task][f"{metric}_stderr,{filter_name}"] = "N/A"
            for place, (index, value) in enumerate(zip(documents or range(number), values, strict=True)):
                line = lines.setdefault((filter_name, place), _line(index, filter_name, value, prompt, hashes, target))
                line[metric] = value
        if samples:
            text = "".join(json.dumps(line) + "\n" for line in lines.values())
            (folder / f"samples_{task}_{date}.jsonl").write_text(text)
    metrics = {task: {key.partition(",")[0] for key in of_task} for task, of_task in scores.items()}
    content = {
        "results": results,
        "configs": {task: {"task": task} for task in scores},
        "versions": dict.fromkeys(scores, version),
        "n-shot": dict.fromkeys(scores, 0),
        "n-samples": {task: {"original": 1000, "effective": number} for task in scores},
        "higher_is_better": {task: dict.fromkeys(names, True) | dict(better or {}) for task, names in metrics.items()},
        "config": {"model": "hf", "model_args": {"pretrained": "tiny"} | model_args},
        "date": 1.0,
        "model_name": "tiny",
    }
    (folder / f"results_{date}.json").write_text(json.dumps(content))
    return folder


def _line(index: int, filter_name: str, value: Score, prompt: str, hashes: bool, target: str) -> dict[str, Any]:
    question = f"Question {index}?"
    line = {
        "doc_id": index,
        "doc": {"question": question},
        "target": target,
        "arguments": {"gen_args_0": {"arg_0": prompt + question, "arg_1": {"until": []}}},
        "resps": [[f"answer {value}"]],
        "filtered_resps": [f"answer {value}"],
        "filter": filter_name,
    }
    if hashes:
        line |= {"doc_hash": sha256(question.encode()).hexdigest()}
        line |= {"prompt_hash": sha256((prompt + question).encode()).hexdigest()}
    return line
