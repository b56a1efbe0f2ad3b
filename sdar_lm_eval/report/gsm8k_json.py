"""The GSM8K benchmark's JSON file (config, metrics, results) from what lm_eval wrote for any model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from sdar_lm_eval.errors import UserError, did_you_mean
from sdar_lm_eval.report.results import Results, read_lines
from sdar_lm_eval.report.runs import metrics_of, read_one_run
from sdar_lm_eval.report.samples import Sample
from sdar_lm_eval.report.speed import ratio, work_of

PREFERRED_FILTER = "flexible-extract"
"""The filter that counts where nobody chooses: as the original benchmark's, it takes the last number if need be."""

_METRIC = "exact_match"
_DECODING = ("block_length", "denoising_steps", "temperature", "remasking_strategy", "confidence_threshold")
_VERSIONS = (
    "torch", "transformers", "engine_version", "engine_commit", "flash-attn", "flashinfer-python", "lmdeploy", "python",
)  # fmt: skip


class FilterMetrics(TypedDict):
    """The score by one filter; `stderr` is null where lm_eval computed none."""

    accuracy: float
    correct: int
    total: int
    percentage: str
    stderr: float | None


class Metrics(FilterMetrics):
    """The score by the filter that counts, and by every filter."""

    filter: str
    by_filter: dict[str, FilterMetrics]


class Performance(TypedDict):
    """Speed, null where it is unknown; stored answers count too.

    Times cover all tasks of the run; tokens and forwards cover this task.
    """

    total_seconds: float | None
    seconds_per_question: float | None
    tokens_per_second: float | None
    tokens_per_forward: float | None
    new_tokens: int | None


class Result(TypedDict):
    """A question and its answer; the last two are null where they are unknown."""

    idx: int
    question: str
    ground_truth: str
    generated_text: str
    predicted_answer: str
    correct: bool
    generation_time: float | None
    tokens_per_second: float | None


class Benchmark(TypedDict):
    """The file. `config` has null for settings that a model does not say."""

    config: dict[str, object]
    metrics: Metrics
    performance: Performance
    results: list[Result]


@dataclass(frozen=True)
class _Cost:
    """What an answer took, as a trace or a folder of answers has it."""

    text: str | None
    seconds: float
    new_tokens: int


def convert(path: Path, task: str | None = None, filter_name: str | None = None) -> Benchmark:
    """Return the benchmark's JSON of the run in a folder; of several seeds or tasks, the newest results count.

    An answer's `generation_time` and `tokens_per_second` are known where the run has denoising records, or the run's
    `trace=` or `answers=` named a place in the folder.

    Args:
        path: the path that `--output_path` named, or a results file.
        task: the task's name; needed where the run has several GSM8K tasks.
        filter_name: the filter whose answers count.

    Raises:
        UserError: the path holds no run or several, there is no such task or filter, samples were not logged, the
            samples give another score than the results, or a file is not as lm_eval writes it.
    """
    results = max(read_one_run(path).results, key=lambda each: each.date)
    samples_of = {name: results.samples(name) for name in results.configs.content}
    task = _task_of(path, samples_of, task)
    samples = samples_of[task]
    filters = list(dict.fromkeys(sample.filter for sample in samples))
    if filter_name is None:
        filter_name = PREFERRED_FILTER if PREFERRED_FILTER in filters else filters[0]
    if filter_name not in filters:
        hint = did_you_mean(filter_name, filters)
        raise UserError(f"--filter {filter_name} is unknown to {task}; choose {', '.join(filters)}.{hint}")
    chosen = sorted((s for s in samples if s.filter == filter_name), key=lambda sample: sample.document)
    costs = _costs(results, path if path.is_dir() else path.parent, task)
    scores = {name: _metrics(results, task, name, samples) for name in filters}
    _check_scores(results, task, scores)
    return {
        "config": _config(results, task),
        "metrics": {**scores[filter_name], "filter": filter_name, "by_filter": scores},
        "performance": _performance(results, task, len(chosen)),
        "results": [_result(sample, costs.get(sample.document)) for sample in chosen],
    }


def _task_of(path: Path, samples_of: Mapping[str, Sequence[Sample]], asked: str | None) -> str:
    """Return the run's task of GSM8K: the only one, or the one that is asked for.

    Raises:
        UserError: as `convert`.
    """
    known = [name for name, samples in samples_of.items() if is_gsm8k(samples)]
    if not known:
        what = "samples (--log_samples)"
        if all(samples_of.values()):
            what = "GSM8K's questions and answers, scored by exact_match"
        raise UserError(
            f"{str(path)!r} has no {what}: the run was of {', '.join(samples_of)}. Evaluate a task of GSM8K with "
            "--log_samples, and without --predict_only."
        )
    task = known[0] if asked is None and len(known) == 1 else asked
    if task is None or task not in known:
        given = "several tasks of GSM8K" if task is None else f"no task {task!r} of GSM8K"
        hint = did_you_mean(task or "", known)
        raise UserError(f"{str(path)!r} has {given}; give --task {' or '.join(known)}.{hint}")
    return task


def is_gsm8k(samples: Sequence[Sample]) -> bool:
    """Whether a task's samples are GSM8K's: a question, a worked answer, and exact_match between numbers."""
    if not samples:
        return False
    doc = samples[0].doc
    return _METRIC in samples[0].line.content and "question" in doc and "####" in str(doc.get("answer"))


def _result(sample: Sample, cost: _Cost | None) -> Result:
    # The folder may hold the costs of another run's answer to the same question.
    known = cost if cost is not None and cost.text in (None, sample.response) else None
    return {
        "idx": sample.document,
        "question": str(sample.doc["question"]),
        "ground_truth": sample.target,
        "generated_text": sample.response,
        "predicted_answer": sample.filtered,
        "correct": _is_right(sample),
        "generation_time": None if known is None else known.seconds,
        "tokens_per_second": round(known.new_tokens / known.seconds, 1) if known and known.seconds else None,
    }


def _is_right(sample: Sample) -> bool:
    value = sample.line.content.get(_METRIC)
    if value not in (0, 1):
        raise sample.line.malformed(_METRIC, "0 or 1")
    return bool(value)


def _metrics(results: Results, task: str, filter_name: str, samples: Sequence[Sample]) -> FilterMetrics:
    of_filter = [_is_right(sample) for sample in samples if sample.filter == filter_name]
    correct, total = sum(of_filter), len(of_filter)
    own = (each for each in metrics_of(results, task) if each.key == (_METRIC, filter_name))
    return {
        "accuracy": correct / total,
        "correct": correct,
        "total": total,
        "percentage": f"{correct / total:.2%}",
        "stderr": next((each.stderr for each in own), None),
    }


def _check_scores(results: Results, task: str, scores: Mapping[str, FilterMetrics]) -> None:
    """Raise `UserError` where the samples give another score than lm_eval computed: then some samples are missing."""
    for metric in metrics_of(results, task):
        if metric.name != _METRIC:
            continue
        found = scores[metric.filter]["accuracy"] if metric.filter in scores else None
        if found is None or not math.isclose(found, metric.value, abs_tol=1e-9):
            raise UserError(
                f"{results.samples_file(task)} does not give the score of the results: {_METRIC} of {metric.filter} is "
                f"{metric.value:.4f}, but {'missing in' if found is None else f'{found:.4f} by'} the samples. Copy the "
                "whole folder of the run, or evaluate again."
            )


def _config(results: Results, task: str) -> dict[str, object]:
    ours, decoding = results.ours, results.decoding_of(task).content
    generation = results.configs.part(task).part_or_empty("generation_kwargs").content
    settings = {name: decoding.get(name) for name in _DECODING}
    if not decoding:
        settings["temperature"] = generation.get("temperature") if generation.get("do_sample") else 0.0
    versions: dict[str, object] = {
        "sdar_lm_eval": ours.text("version"),
        "lm_eval": results.content.text("lm_eval_version"),
    }
    versions |= {name: ours.content[name] for name in _VERSIONS if ours.content.get(name)}
    versions.setdefault("transformers", results.content.text("transformers_version"))
    return {
        "model_name": results.model,
        **settings,
        "max_gen_length": decoding.get("max_gen_toks", generation.get("max_gen_toks")),
        "engine": ours.text("engine") or results.config.content.get("model"),
        "versions": versions,
        "gpu": ours.text("gpu"),
        "task": task,
        "seed": ours.whole("seed"),
        "dtype": ours.text("dtype"),
        "checkpoint_fingerprint": ours.text("checkpoint_fingerprint"),
    }


def _performance(results: Results, task: str, questions: int) -> Performance:
    work, run = work_of(results, task), results.ours.part_or_empty("run")
    answers = (run.whole("requests") or 0) + (run.whole("stored_requests") or 0) or questions
    per_second, per_forward = ratio([(work.tokens_of_all, work.seconds)]), ratio([(work.tokens, work.forwards)])
    return {
        "total_seconds": None if not work.seconds else round(work.seconds, 2),
        "seconds_per_question": None if not work.seconds else round(work.seconds / answers, 4),
        "tokens_per_second": None if per_second is None else round(per_second, 1),
        "tokens_per_forward": None if per_forward is None else round(per_forward, 3),
        "new_tokens": work.tokens,
    }


def _costs(results: Results, folder: Path, task: str) -> Mapping[int, _Cost]:
    """What each document's first answer took, from the run's records.

    Where the run has none: from traces and stored answers in the folder; the newest line counts.
    """
    records = [each for each in results.denoising(task) if each.repeat == 0]
    costs = {each.document: _Cost(None, each.seconds, len(each.token_ids)) for each in records}
    if costs:
        return costs
    for file in sorted(folder.rglob("*.jsonl")):
        if file.name.startswith("samples_"):
            continue
        for line in read_lines(file, whole=False):
            if line.content.get("task") != task or line.content.get("repeat") != 0:
                continue
            document, seconds, tokens = line.whole("document"), line.number("seconds"), line.whole("new_tokens")
            if document is not None and seconds is not None and tokens is not None:
                costs[document] = _Cost(line.text("text"), seconds, tokens)
    return costs
