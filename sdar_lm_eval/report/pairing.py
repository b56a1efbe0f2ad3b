"""Pairs the documents of two runs of a task, and reads the documents' scores from samples files.

lm_eval's hash identifies a document. Equal documents of a task have equal hashes, so their order tells them apart.
Where a samples file has no hashes, index and gold answer identify a document.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import NamedTuple

import numpy as np

from sdar_lm_eval.errors import UserError
from sdar_lm_eval.report.results import Results
from sdar_lm_eval.report.runs import Metric, MetricKey, Run, mean_value, metrics_of
from sdar_lm_eval.report.samples import Sample
from sdar_lm_eval.report.statistics import FloatArray, cluster_values, mean_stderr


class DocumentKey(NamedTuple):
    """Identifies a document of a task, or of a group of tasks (`groups.pooled_key`).

    Attributes:
        name: the document's hash, or its index and gold answer (`document_name`).
        number: the document's number among documents with this name, from 0.
    """

    name: str
    number: int


LOST = "the samples file has"
"""The beginning of the flaw of samples that lost lines. The metric's value is over the lost documents too."""


@dataclass(frozen=True)
class PairedDocument:
    """A document of a task, as a run has it.

    Attributes:
        index: the document's index in the data set.
        target: the gold answer.
        prompt: lm_eval's hash of the first prompt that was sent; the prompt itself where the file has no hashes.
        as_messages: whether the prompt was sent as chat messages.
    """

    index: int
    target: str
    prompt: str
    as_messages: bool = False


@dataclass(frozen=True)
class Scores:
    """A run's scores of a metric, document by document.

    Attributes:
        metric: the metric over all documents, pooled over the run's seeds (`over_seeds`).
        answers: document -> (number of answers,) the values of its answers.
        means: which means of `answers` equal the metric's value. "documents": the mean over documents of each
            document's mean. "answers": the mean over all answers. "tasks", of a group: the mean over its tasks of each
            task's mean over documents.
        flaw: why the values cannot be tested; "" where they can.
    """

    metric: Metric
    answers: Mapping[DocumentKey, FloatArray]
    means: frozenset[str]
    flaw: str = ""


@dataclass(frozen=True)
class TaskScores:
    """What a run's samples files say about a task.

    Attributes:
        documents: the documents, in the order of their indices.
        scores: metric -> its scores.
        reworded: number of documents whose prompts differ between the run's repeats, as few-shot examples may.
    """

    documents: Mapping[DocumentKey, PairedDocument]
    scores: Mapping[MetricKey, Scores]
    reworded: int = 0


@dataclass(frozen=True)
class _Line:
    """The parts of a samples file's line that pairing needs; `values` has None for a metric that is not a number."""

    document: PairedDocument
    doc_hash: str | None
    filter: str
    values: Mapping[str, tuple[float, ...] | None]


def read_pair(a: Run, b: Run, task: str) -> tuple[TaskScores, TaskScores]:
    """Return the scores of two runs in a task. A document that both runs have has the same key in both.

    Raises:
        UserError: a run has no samples of the task, or a samples file cannot be read.
    """
    lines_of = [[_read_lines(results, task) for results in run.of_tasks[task]] for run in (a, b)]
    for run, lines in zip((a, b), lines_of, strict=True):
        if not any(lines):
            raise UserError(f"{run.label} has no samples of {task}. Evaluate again with --log_samples.")
    hashed = all(line.doc_hash is not None for lines in lines_of for each in lines for line in each)
    first, second = (
        _task_scores(run.of_tasks[task], task, lines, hashed=hashed)
        for run, lines in zip((a, b), lines_of, strict=True)
    )  # fmt: skip
    return first, second


def document_values(run: Run, task: str) -> dict[MetricKey, dict[DocumentKey, float]]:
    """Return for each metric of a task a value for each document, such that the values' mean is the metric.

    Metrics without such values are left out: those of a run without samples, and those that are no mean. Some metrics,
    such as IFEval's of instructions, count each answer the same, not each document (`cluster_values`).
    """
    found: dict[MetricKey, dict[DocumentKey, float]] = {}
    with contextlib.suppress(UserError):  # a run without samples
        for key, scores in read_pair(run, run, task)[0].scores.items():
            if not scores.flaw:
                found[key] = dict(zip(scores.answers, _values(scores.answers, scores.means).tolist(), strict=True))
    return found


def over_seeds(run: Run, task: str) -> list[Metric]:
    """Return a task's metrics, as means over all seeds of a run.

    A document's answers with several seeds are not independent, so the standard error is clustered by document. The
    standard error is None without samples, and for metrics that are no mean.
    """
    of_task, metrics = run.of_tasks[task], run.metrics(task)
    if len(of_task) == 1:
        return metrics
    with contextlib.suppress(UserError):  # a run without samples
        return [scores.metric for scores in read_pair(run, run, task)[0].scores.values()]
    return [replace(each, value=mean_value(of_task, task, each.key), stderr=None) for each in metrics]


def document_warnings(
    a: Run, b: Run, task: str, scores_a: TaskScores, scores_b: TaskScores, paired: Sequence[DocumentKey]
) -> list[str]:
    """Return warnings about documents, prompts, gold answers and versions of a task that differ between the runs."""
    found = []
    alone_a, alone_b = len(scores_a.documents) - len(paired), len(scores_b.documents) - len(paired)
    if alone_a or alone_b:
        alone = [f"{n:,} only in run {name}" for n, name in ((alone_a, "A"), (alone_b, "B")) if n]
        both = "is in both runs and is" if len(paired) == 1 else "are in both runs and are"
        found.append(f"{task}: {documents_in_words(len(paired))} {both} compared; {' and '.join(alone)}.")
    pairs = [(scores_a.documents[key], scores_b.documents[key]) for key in paired]
    alike = [(one, other) for one, other in pairs if one.as_messages == other.as_messages]
    prompts = sum(bool(one.prompt and other.prompt) and one.prompt != other.prompt for one, other in alike)
    targets = sum(one.target != other.target for one, other in pairs)
    if prompts:
        found.append(f"{task}: the prompts of {prompts:,} of {documents_in_words(len(paired))} differ.")
    if len(alike) < len(pairs):
        served, whole = ("A", "B") if pairs[0][0].as_messages else ("B", "A")
        found.append(
            f"{task}: run {served} sent chat messages, and its server put them into a chat template. Run {whole} sent "
            "whole prompts. The files do not say whether the prompts are equal."
        )
    if targets:
        found.append(f"{task}: the gold answers of {targets:,} of {documents_in_words(len(paired))} differ.")
    found += [
        f"{task}: the prompts of {documents_in_words(of_run.reworded)} differ between the repeats of run {name}. "
        "Interval and p are over documents: they leave out what new few-shot examples change in all documents."
        for name, of_run in (("A", scores_a), ("B", scores_b))
        if of_run.reworded
    ]
    versions = [run.results_of(task).content.part_or_empty("versions").content.get(task) for run in (a, b)]
    if versions[0] != versions[1]:
        found.append(f"{task}: the task's versions differ ({versions[0]} and {versions[1]}).")
    return found


def documents_in_words(number: int) -> str:
    """Return "1 document", "1,000 documents"."""
    return "1 document" if number == 1 else f"{number:,} documents"


def numbers_of(value: object) -> tuple[float, ...] | None:
    """Return the values of a metric for a document's answers; None where a value is not a number."""
    values = value if isinstance(value, list) else [value]
    if isinstance(value, str):  # lm_eval writes NumPy's booleans and float32 as text
        try:
            return (float({"True": 1, "False": 0}.get(value, value)),)
        except ValueError:
            return None
    try:
        found = tuple(float(each) for each in values if isinstance(each, (bool, int, float)))
    except OverflowError:  # an int beyond what a float holds
        return None
    return found if found and len(found) == len(values) else None


def mean_kinds(answers: Iterable[FloatArray], value: float) -> frozenset[str]:
    """Return which means of the documents' answers equal a metric's value, as `Scores.means`; empty where none does."""
    of_documents = list(answers)
    return frozenset(
        name
        for name, weigh_answers in (("documents", False), ("answers", True))
        if is_value(float(cluster_values(of_documents, weigh_answers).mean()), value)
    )


def is_value(mean: float, value: float) -> bool:
    """Return whether a mean is a metric's value, up to rounding."""
    return math.isclose(mean, value, rel_tol=1e-6, abs_tol=1e-9)


def document_name(doc_hash: str | None, index: int, gold: str, *, hashed: bool) -> str:
    """Return what identifies a document: its hash or, unless all documents are `hashed`, its index and gold answer."""
    return doc_hash or "" if hashed else f"{index}: {gold}"


def keyed(names: Iterable[str]) -> Iterator[DocumentKey]:
    """Yield the key of each document by its `document_name`. Equal documents come by rising index."""
    seen: Counter[str] = Counter()
    for name in names:
        yield DocumentKey(name, seen[name])
        seen[name] += 1


@functools.lru_cache(maxsize=256)  # a baseline is compared with many runs, task by task
def _read_lines(results: Results, task: str) -> list[_Line]:
    names = {metric.name for metric in metrics_of(results, task)}
    return sorted(
        (_line(sample, names) for sample in results.each_sample(task)),
        key=lambda line: (line.filter, line.document.index),
    )


def _line(sample: Sample, names: Iterable[str]) -> _Line:
    content = sample.line.content
    return _Line(
        document=PairedDocument(
            sample.document, sample.target, sample.prompt_hash or sample.prompt, sample.as_messages
        ),
        doc_hash=sample.doc_hash,
        filter=sample.filter,
        values={name: numbers_of(content[name]) for name in names if name in content},
    )


def _by_filter(lines: Iterable[_Line], *, hashed: bool) -> dict[str, list[tuple[DocumentKey, _Line]]]:
    """Filter -> the lines of its documents, each with the document's key; `lines` are as `_read_lines` returns them."""
    found = {}
    for name, group in itertools.groupby(lines, key=lambda line: line.filter):
        members = list(group)
        documents = [(line.doc_hash, line.document.index, line.document.target) for line in members]
        keys = keyed(document_name(*document, hashed=hashed) for document in documents)
        found[name] = list(zip(keys, members, strict=True))
    return found


def _task_scores(
    results: Sequence[Results], task: str, lines_of_results: Sequence[Sequence[_Line]], *, hashed: bool
) -> TaskScores:
    """What the lines of the repeats' samples files, in the order of `results`, say about a task."""
    documents: dict[DocumentKey, PairedDocument] = {}
    reworded: set[DocumentKey] = set()
    found: dict[MetricKey, list[Scores]] = {}
    for each, lines in zip(results, lines_of_results, strict=True):
        by_filter = _by_filter(lines, hashed=hashed)
        for key, line in itertools.chain.from_iterable(by_filter.values()):
            if documents.setdefault(key, line.document).prompt != line.document.prompt:
                reworded.add(key)
        for metric in metrics_of(each, task):
            scores = _scores(each, task, metric, by_filter.get(metric.filter, ()))
            found.setdefault(metric.key, []).append(scores)
    ordered = dict(sorted(documents.items(), key=lambda item: item[1].index))
    return TaskScores(ordered, {key: _joined(parts) for key, parts in found.items()}, len(reworded))


def _scores(results: Results, task: str, metric: Metric, lines: Sequence[tuple[DocumentKey, _Line]]) -> Scores:
    """The scores of a metric in one results file."""
    expected = results.answered(task)
    given = {key: line.values[metric.name] for key, line in lines if metric.name in line.values}
    answers = {key: np.array(values) for key, values in given.items() if values is not None}
    flaw, means = "", frozenset[str]()
    if expected is not None and len(lines) < expected:
        flaw = f"{LOST} {len(lines):,} of {expected:,} documents"
    elif not given:
        flaw = "the samples have no values of this metric"
    elif len(answers) < len(given):
        flaw = "the samples' values are not numbers"
    elif not all(np.isfinite(values).all() for values in answers.values()):
        flaw = "some of the samples' values are infinite or not a number"
    else:
        means = mean_kinds(answers.values(), metric.value)
        flaw = "" if means else "the metric is not a mean over documents"
    return Scores(metric, answers, means, flaw)


def _joined(parts: Sequence[Scores]) -> Scores:
    """The scores of all repeats together: a document's answers are those of every repeat."""
    if len(parts) == 1:
        return parts[0]
    answers: dict[DocumentKey, list[FloatArray]] = {}
    for part in parts:
        for key, values in part.answers.items():
            answers.setdefault(key, []).append(values)
    joined = {key: np.concatenate(values) for key, values in answers.items()}
    means = frozenset.intersection(*(part.means for part in parts))
    flaw = next((part.flaw for part in parts if part.flaw), "")
    value, stderr = fmean(part.metric.value for part in parts), None
    if not flaw and means:
        values = _values(joined, means)
        value, stderr = float(values.mean()), mean_stderr(values)
    return Scores(replace(parts[0].metric, value=value, stderr=stderr), joined, means, flaw)


def _values(answers: Mapping[DocumentKey, FloatArray], means: frozenset[str]) -> FloatArray:
    """A value for each document, (n,), whose mean is the metric (`Scores.means`)."""
    return cluster_values(list(answers.values()), weigh_answers="documents" not in means)
