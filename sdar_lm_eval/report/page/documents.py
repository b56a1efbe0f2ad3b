"""The documents of runs, as the page's script reads them: JSON values in four parts.

    index    {"tasks": [{"name", "metrics": [[metric, filter, lower], …], "filters": [filter, …], "main",
                         "extracts"}, …],
              "documents": [[task, document, question, gold, [outcome, …], twin], …]}
    texts    [[[text, …], …], …]                    document -> run -> its answers
    tokens   [token, …]                             the distinct texts of tokens
    details  [[prompt, doc, [[answer, …], …]], …]   document -> run -> its answers

`lower` is true where lower values are better; `main` is the metric that decides right and wrong unless the reader
chooses another; `extracts` is false for tasks that compare log-likelihoods. `twin` counts the documents before this one
that have its index, where runs had different data. A document has an outcome for each run, null where the run lacks the
document:

    [scores, extracted, cut, answers]
    scores      for each metric of the task the mean over the answers; null where the score is no number
    extracted   for each filter of the task what it extracted from the first answer; null where it found nothing
    cut         answers that ended at the limit of new tokens; null where the run has no records
    answers     how many answers there are

A text is a string or, where the answer's tokens are known, [string or length, [index into `tokens`, …]]. A length says
that the text is so many UTF-16 code units of the tokens' texts. An answer of `details` is [scores, extracted, record].
A record is null or

    {"steps": differences of the answer's denoising steps, "confidences": of 10,000, "finish", "forwards", "seconds",
     "blocks": index of each block's first token}

with null for steps and confidences where the engine records none.
"""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import NamedTuple, TypedDict

from sdar_lm_eval.report.compare import question_of
from sdar_lm_eval.report.denoising import CONFIDENCE_SCALE, Denoising
from sdar_lm_eval.report.gsm8k_json import PREFERRED_FILTER
from sdar_lm_eval.report.pairing import Key, MetricKey, keyed, numbers_of
from sdar_lm_eval.report.results import Results, Sample
from sdar_lm_eval.report.runs import Run, metrics_of

NOTHING_EXTRACTED = ("", "[invalid]")
"""What filters return for an answer that they find nothing in."""

LAST_OF_PROMPT = 400
"""Characters of the prompt's end that stand for the question where a document names none."""

Scores = list["float | None"]


class TaskPart(TypedDict):
    """A task, as `index` has it."""

    name: str
    metrics: list[tuple[str, str, bool]]
    filters: list[str]
    main: int
    extracts: bool


class Outcome(NamedTuple):
    """A run's outcome of a document, as `index` has it."""

    scores: Scores
    extracted: list[str | None]
    cut: int | None
    answers: int


class Row(NamedTuple):
    """A document, as `index` has it."""

    task: int
    document: int
    question: str
    gold: str
    outcomes: list[Outcome | None]
    twin: int


@dataclass
class Documents:
    """What the module's docstring describes."""

    tasks: list[TaskPart] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    texts: list[list[list[object]]] = field(default_factory=list)
    details: list[tuple[str, str, list[list[object]]]] = field(default_factory=list)
    tokens: dict[str, int] = field(default_factory=dict)

    @property
    def parts(self) -> dict[str, object]:
        """The parts by name, but for `details`."""
        return {
            "index": {"tasks": self.tasks, "documents": self.rows},
            "texts": self.texts,
            "tokens": list(self.tokens),
        }

    def scores(self, task: str) -> dict[MetricKey, list[Scores]]:
        """Return metric -> run -> the scores of the task's documents, None where the run has none."""
        number = next(number for number, each in enumerate(self.tasks) if each["name"] == task)
        outcomes = [row.outcomes for row in self.rows if row.task == number]
        return {
            (name, filter_name): [
                [each and each.scores[place] for each in of_run] for of_run in zip(*outcomes, strict=True)
            ]
            for place, (name, filter_name, _) in enumerate(self.tasks[number]["metrics"])
        }


@dataclass(frozen=True)
class _Answered:
    """A results file's answers to a document.

    Attributes:
        of_filters: filter -> the sample line.
        texts: the answers.
        records: how each answer was written; None where that is not known.
    """

    of_filters: Mapping[str, Sample]
    texts: Sequence[str]
    records: Sequence[Denoising | None]

    @property
    def sample(self) -> Sample:
        """The line of the first filter."""
        return next(iter(self.of_filters.values()))


def collect(runs: Sequence[Run], tasks: Iterable[str]) -> Documents:
    """Return the documents of some tasks, task by task, each in the order of its data set.

    Raises:
        UserError: a file of a run cannot be read, or is not as lm_eval writes it.
    """
    found = Documents()
    for task in tasks:
        _add_task(found, runs, task)
    return found


def _add_task(found: Documents, runs: Sequence[Run], task: str) -> None:
    having = [results for run in runs for results in run.of_tasks.get(task, [])]
    lower = {
        (metric.name, metric.filter): metric.higher_is_better is False
        for results in having
        for metric in metrics_of(results, task)
    }
    metrics = list(lower)
    answered = _answered(runs, task)
    first = {key: parts[0] for each in reversed(answered) for key, parts in each.items()}
    filters = list(dict.fromkeys(name for part in first.values() for name in part.of_filters))
    number = len(found.tasks)
    found.tasks.append(
        {
            "name": task,
            "metrics": [(*names, is_lower) for names, is_lower in lower.items()],
            "filters": filters,
            "main": next((i for i, (_, name) in enumerate(metrics) if name == PREFERRED_FILTER), 0),
            "extracts": not any(_is_likelihood(results, task) for results in having),
        }
    )
    twins: Counter[int] = Counter()
    for key in sorted(first, key=lambda key: (first[key].sample.document, key)):
        sample = first[key].sample
        of_runs = [each.get(key, []) for each in answered]
        outcomes = [_outcome(parts, metrics, filters) for parts in of_runs]
        twin = twins[sample.document]
        twins[sample.document] += 1
        found.rows.append(Row(number, sample.document, _question(sample), _gold(sample), outcomes, twin))
        found.texts.append(
            [
                [
                    _text(text, record, found.tokens)
                    for part in parts
                    for text, record in zip(part.texts, part.records, strict=True)
                ]
                for parts in of_runs
            ]
        )
        answers: list[list[object]] = [
            [
                [_means([part], metrics), _extracted(part, filters), _record(record)]
                for part in parts
                for record in part.records
            ]
            for parts in of_runs
        ]
        doc = json.dumps(sample.doc, ensure_ascii=False, indent=1) if sample.doc else ""
        found.details.append((sample.prompt, doc, answers))


def _question(sample: Sample) -> str:
    """A document's question; the end of the prompt where the document names none."""
    text = question_of(sample)
    return text[-LAST_OF_PROMPT:] if text == sample.prompt else text


def _answered(runs: Sequence[Run], task: str) -> list[dict[Key, list[_Answered]]]:
    """Each run's answers to the documents of a task, those of each results file by themselves.

    Documents have the keys by which `compare` pairs them.
    """
    files = [[(results, _by_filter(results, task)) for results in run.of_tasks.get(task, [])] for run in runs]
    hashed = all(
        sample.doc_hash is not None
        for of_run in files
        for _, by_filter in of_run
        for samples in by_filter.values()
        for sample in samples
    )
    found = []
    for of_run in files:
        answered: dict[Key, list[_Answered]] = {}
        for results, by_filter in of_run:
            lines: dict[Key, dict[str, Sample]] = {}
            for name, samples in by_filter.items():
                keys = keyed((_name(sample, hashed), sample.document) for sample in samples)
                for key, sample in zip(keys, samples, strict=True):
                    lines.setdefault(key, {})[name] = sample
            records = {(record.document, record.repeat): record for record in results.denoising(task)}
            likelihood = _is_likelihood(results, task)
            for key, of_filters in lines.items():
                sample = next(iter(of_filters.values()))
                texts = [_likelihoods(sample)] if likelihood else list(sample.responses)
                part = _Answered(of_filters, texts, _records(sample.document, texts, records))
                answered.setdefault(key, []).append(part)
        found.append(answered)
    return found


def _by_filter(results: Results, task: str) -> dict[str, list[Sample]]:
    found: dict[str, list[Sample]] = {}
    for sample in results.each_sample(task):
        found.setdefault(sample.filter, []).append(sample)
    return {name: sorted(samples, key=lambda sample: sample.document) for name, samples in found.items()}


def _name(sample: Sample, hashed: bool) -> str:
    return sample.doc_hash or "" if hashed else f"{sample.document}: {sample.target}"


def _records(
    document: int, texts: Sequence[str], records: Mapping[tuple[int, int], Denoising]
) -> list[Denoising | None]:
    """How each answer was written. Repeats of a deterministic answer share the record of the first."""
    first = records.get((document, 0))
    return [records.get((document, repeat), first if text == texts[0] else None) for repeat, text in enumerate(texts)]


def _is_likelihood(results: Results, task: str) -> bool:
    kind = results.content.part_or_empty("configs").part_or_empty(task).content.get("output_type")
    return kind in ("loglikelihood", "loglikelihood_rolling", "multiple_choice")


def _likelihoods(sample: Sample) -> str:
    """The log-likelihood of each continuation, a line each; the largest is marked."""
    arguments, scored = sample.line.part_or_empty("arguments"), sample.line.content.get("resps")
    values = [_leaf(each) for each in scored] if isinstance(scored, list) else []
    lines = []
    for number, value in enumerate(values):
        continuation = arguments.part_or_empty(f"gen_args_{number}").content.get("arg_1")
        mark = "▸" if len(values) > 1 and value == max(values) else " "
        lines.append(f"{mark} {value:10.3f}  {continuation if isinstance(continuation, str) else ''}".rstrip())
    return "\n".join(lines)


def _leaf(nested: object) -> float:
    """The first number in lists of any depth; not a number where there is none."""
    while isinstance(nested, list):
        nested = nested[0] if nested else None
    try:
        return float(str(nested))
    except ValueError:
        return math.nan


def _gold(sample: Sample) -> str:
    """The gold answer; a choice's text for its index."""
    choices = sample.doc.get("choices")
    texts = choices.get("text") if isinstance(choices, dict) else choices
    if isinstance(texts, list) and sample.target.isdigit() and int(sample.target) < len(texts):
        return f"{sample.target}: {texts[int(sample.target)]}"
    return sample.target


def _means(parts: Sequence[_Answered], metrics: Sequence[MetricKey]) -> Scores:
    """For each metric the mean of the values in some results files; None where they are no numbers."""
    found: Scores = []
    for name, filter_name in metrics:
        samples = [part.of_filters[filter_name] for part in parts if filter_name in part.of_filters]
        values = [numbers_of(sample.line.content.get(name)) for sample in samples]
        mean = fmean(value for each in values for value in each or ()) if values and None not in values else math.nan
        found.append(mean if math.isfinite(mean) else None)
    return found


def _extracted(answered: _Answered, filters: Sequence[str]) -> list[str | None]:
    found = []
    for name in filters:
        sample = answered.of_filters.get(name)
        found.append(None if sample is None or sample.filtered in NOTHING_EXTRACTED else sample.filtered)
    return found


def _outcome(parts: Sequence[_Answered], metrics: Sequence[MetricKey], filters: Sequence[str]) -> Outcome | None:
    records = [record for part in parts for record in part.records]
    if not records:
        return None
    known = [record for record in records if record is not None]
    cut = sum(record.finish_reason == "length" for record in known) if known else None
    return Outcome(_means(parts, metrics), _extracted(parts[0], filters), cut, len(records))


def _text(text: str, record: Denoising | None, tokens: dict[str, int]) -> object:
    if record is None:
        return text
    known = "".join(record.texts).startswith(text)
    units = len(text.encode("utf-16-le", "surrogatepass")) // 2
    return [units if known else text, [tokens.setdefault(token, len(tokens)) for token in record.texts]]


def _record(record: Denoising | None) -> dict[str, object] | None:
    if record is None:
        return None
    steps, confidences = record.global_steps, record.confidences
    return {
        # Differences repeat from block to block, so they deflate to a third.
        "steps": None if steps is None else [b - a for a, b in itertools.pairwise((0, *steps))],
        "confidences": None if confidences is None else [round(c * CONFIDENCE_SCALE) for c in confidences],
        "blocks": [block.start for block in record.blocks],
        "finish": record.finish_reason,
        "forwards": dict(record.forwards),
        "seconds": record.seconds,
    }
