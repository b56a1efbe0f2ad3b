"""The documents of a run's task, each with its prompt, answers, extracted answers, scores and denoising records."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple

import numpy as np

from sdar_lm_eval.report.columns import main_metric
from sdar_lm_eval.report.denoising import Denoising
from sdar_lm_eval.report.pairing import DocumentKey, document_name, keyed, mean_kinds, numbers_of
from sdar_lm_eval.report.results import Results
from sdar_lm_eval.report.runs import NOT_SCORED, Metric, MetricKey, Run, metrics_of
from sdar_lm_eval.report.samples import Sample, first_of
from sdar_lm_eval.thinking import Thought

NOTHING_EXTRACTED = ("", "[invalid]")
"""What a filter returns for an answer in which the filter finds nothing."""

LAST_OF_PROMPT = 400
"""Characters of the prompt's end that stand for the question, where no field of the document is named as one."""


class _Identity(NamedTuple):
    """A document's index, and lm_eval's hash of the document, None in old files."""

    document: int
    doc_hash: str | None


@dataclass(frozen=True)
class Answer:
    """An answer to a document.

    Attributes:
        text: the answer, without its thought; for a task of log-likelihoods, one line for each continuation.
        scores: metric and filter -> the answer's score, or the document's where the task scores its answers as one;
            only scores that are numbers.
        extracted: filter -> what the filter extracted; None where the filter found nothing. Where a filter makes one
            value of several answers, the first answer alone has the value.
        denoising: the answer's denoising record; None where the run has no record.
        thought: the answer's thought; None where it has none. An answer whose thought has no end is scored as "".
    """

    text: str
    scores: Mapping[MetricKey, float]
    extracted: Mapping[str, str | None]
    denoising: Denoising | None
    thought: Thought | None = None

    @property
    def ended_while_thinking(self) -> bool:
        """Whether the answer ended in its thought."""
        return self.thought is not None and not self.thought.ended

    @property
    def own_scores(self) -> dict[MetricKey, float]:
        """The scores of filters that made something of this answer."""
        return {key: score for key, score in self.scores.items() if key.filter in self.extracted}


@dataclass(frozen=True)
class Document:
    """A document of a task.

    Attributes:
        index: the document's index in the data set.
        doc_hash: lm_eval's hash of the document; None in old files.
        question: the field of the document that holds its question, else the end of the prompt.
        prompt: the first prompt that was sent for the document.
        gold: the gold answer.
        doc: the document as the samples file has it: field -> value.
        answers: the answers: several where the document has repeats, or was evaluated with several seeds.
        as_messages: whether the prompt was sent as chat messages (`Sample.as_messages`).
    """

    index: int
    doc_hash: str | None
    question: str
    prompt: str
    gold: str
    doc: Mapping[str, object]
    answers: Sequence[Answer]
    as_messages: bool = False

    def score(self, metric: MetricKey) -> float | None:
        """Return the mean of the answers' scores; None where an answer has no score."""
        scores = [answer.scores.get(metric) for answer in self.answers]
        known = [score for score in scores if score is not None]
        return fmean(known) if known and len(known) == len(scores) else None

    def is_invalid(self, filter_name: str) -> bool:
        """Return whether a filter found nothing in at least one answer."""
        return any(filter_name in a.extracted and a.extracted[filter_name] is None for a in self.answers)

    @property
    def ended_while_thinking(self) -> bool:
        """Whether at least one answer ended in its thought."""
        return any(answer.ended_while_thinking for answer in self.answers)

    @property
    def is_cut(self) -> bool:
        """Whether at least one answer ended at the limit of new tokens."""
        return any(a.denoising is not None and a.denoising.finish_reason == "length" for a in self.answers)


def documents_of(run: Run, task: str) -> list[Document]:
    """Return the documents of a task in the order of its data set; none where the run has no samples.

    Raises:
        UserError: a file of the run cannot be read, or is not as lm_eval writes it.
    """
    first: dict[_Identity, Sample] = {}
    answers: dict[_Identity, list[Answer]] = {}
    names = {metric.name for metric in run.metrics(task)}
    for results in run.of_tasks[task]:
        lines: dict[_Identity, dict[str, Sample]] = {}
        for sample in results.each_sample(task):
            lines.setdefault(_Identity(sample.document, sample.doc_hash), {})[sample.filter] = sample
        records = {(record.document, record.repeat): record for record in results.denoising(task)}
        of_likelihoods = is_likelihood(results, task)
        scored = names - _without_scores(lines.values(), metrics_of(results, task), of_likelihoods)
        for identity, of_filters in lines.items():
            sample = next(iter(of_filters.values()))
            first.setdefault(identity, sample)
            texts = [_likelihoods(sample)] if of_likelihoods else list(sample.responses)
            found = answers.setdefault(identity, [])
            for repeat, record in enumerate(_records(identity.document, texts, records)):
                scores = _scores(of_filters, scored, repeat, len(texts))
                extracted = _extracted(of_filters, repeat)
                found.append(Answer(texts[repeat], scores, extracted, record, sample.thought(repeat)))
    return [
        Document(
            index=identity.document,
            doc_hash=identity.doc_hash,
            question=sample.named_question or sample.prompt[-LAST_OF_PROMPT:],
            prompt=sample.prompt,
            gold=_gold(sample),
            doc=sample.doc,
            answers=answers[identity],
            as_messages=sample.as_messages,
        )
        for identity, sample in sorted(first.items(), key=lambda item: (item[0].document, item[0].doc_hash or ""))
    ]


def by_key(runs: Sequence[Run], task: str) -> list[dict[DocumentKey, Document]]:
    """Return for each run key -> document, without documents that have no answer. `compare` pairs by the same keys.

    Raises:
        UserError: as `documents_of`.
    """
    of_runs = [
        [document for document in documents_of(run, task) if document.answers] if task in run.of_tasks else []
        for run in runs
    ]
    hashed = all(document.doc_hash is not None for each in of_runs for document in each)
    found = []
    for each in of_runs:
        names = [document_name(d.doc_hash, d.index, d.gold, hashed=hashed) for d in each]
        found.append(dict(zip(keyed(names), each, strict=True)))
    return found


def main_key_of(runs: Sequence[Run], task: str) -> MetricKey | None:
    """Return the metric by which runs are judged: the main metric of the first run that scored the task."""
    keys = [key for run in runs if task in run.of_tasks and (key := main_key(run, task)) is not None]
    return next((key for key in keys if key.name != NOT_SCORED), next(iter(keys), None))


def main_key(run: Run, task: str) -> MetricKey | None:
    """The metric and filter that decide right and wrong where nobody chooses; None where the task has no metric."""
    metric = main_metric(task, run.metrics(task))
    return None if metric is None else metric.key


def is_likelihood(results: Results, task: str) -> bool:
    """Return whether a task compares log-likelihoods."""
    kind = results.content.part_or_empty("configs").part_or_empty(task).content.get("output_type")
    return kind in ("loglikelihood", "loglikelihood_rolling", "multiple_choice")


def _records(
    document: int, texts: Sequence[str], records: Mapping[tuple[int, int], Denoising]
) -> list[Denoising | None]:
    """Each answer's record. An answer without a record that equals the first answer gets the first answer's record."""
    first = records.get((document, 0))
    return [records.get((document, repeat), first if text == texts[0] else None) for repeat, text in enumerate(texts)]


def _extracted(of_filters: Mapping[str, Sample], repeat: int) -> dict[str, str | None]:
    """Filter -> its value of an answer, as `Answer.extracted`."""
    found = {name: sample.extracted_from(repeat) for name, sample in of_filters.items()}
    return {name: None if text in NOTHING_EXTRACTED else text for name, text in found.items() if text is not None}


def _scores(
    of_filters: Mapping[str, Sample], names: Collection[str], repeat: int, answers: int
) -> dict[MetricKey, float]:
    """The scores of one of a document's answers, as `Answer.scores`."""
    found: dict[MetricKey, float] = {}
    for filter_name, sample in of_filters.items():
        for name, value in sample.line.content.items():
            numbers = numbers_of(value) if name in names else None
            if numbers is not None and all(map(math.isfinite, numbers)):
                found[MetricKey(name, filter_name)] = numbers[repeat] if len(numbers) == answers else fmean(numbers)
    return found


def _without_scores(
    documents: Iterable[Mapping[str, Sample]], metrics: Iterable[Metric], of_likelihoods: bool
) -> set[str]:
    """The names of metrics whose values in the samples are lists, but no lists of scores.

    A perplexity has (log-likelihood, number of words), and F1 has (gold answer, answer). The metric of such lists is no
    mean of them. Accuracy over instructions has a score for each instruction.
    """
    listed = list(documents)
    found = set()
    for metric in metrics:
        samples = [of_filters[metric.filter] for of_filters in listed if metric.filter in of_filters]
        values = [(numbers_of(sample.line.content.get(metric.name)), sample) for sample in samples]
        known = [np.array(numbers) for numbers, _ in values if numbers is not None]
        are_lists = any(
            numbers is not None and len(numbers) not in (1, 1 if of_likelihoods else len(sample.responses))
            for numbers, sample in values
        )
        if are_lists and not mean_kinds(known, metric.value):
            found.add(metric.name)
    return found


def _likelihoods(sample: Sample) -> str:
    """A line for each continuation with its log-likelihood; ▸ marks the largest."""
    scored = sample.line.content.get("resps")
    values = [_number(first_of(each)) for each in scored] if isinstance(scored, list) else []
    lines = []
    for request, value in enumerate(values):
        mark = "▸" if len(values) > 1 and value == max(values) else " "
        lines.append(f"{mark} {value:10.3f}  {sample.continuation(request) or ''}".rstrip())
    return "\n".join(lines)


def _number(text: str) -> float:
    """The number that a text is; NaN where the text is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def _gold(sample: Sample) -> str:
    """The gold answer; an index into choices is followed by the choice's text."""
    choices = sample.doc.get("choices")
    texts = choices.get("text") if isinstance(choices, dict) else choices
    if isinstance(texts, list) and sample.target.isdecimal() and int(sample.target) < len(texts):
        return f"{sample.target}: {texts[int(sample.target)]}"
    return sample.target
