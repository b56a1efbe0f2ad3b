"""The documents of runs, as the page's script reads them: JSON values in four parts.

    index    {"tasks": [{"name", "metrics": [[metric, filter, lower], …], "filters": [filter, …], "main",
                         "extracts"}, …],
              "documents": [[task, document, question, gold, [outcome, …], twin], …]}
    texts    [[[text, …], …], …]                    document -> run -> its answers
    tokens   [token, …]                             the distinct texts of tokens
    details  [[prompt, doc, [[answer, …], …]], …]   document -> run -> its answers

`lower` is true where lower values are better. `main` is the index of the metric that decides right and wrong, unless
the reader chooses another metric. `extracts` is false for tasks that compare log-likelihoods. `task` is an index into
`tasks`. `twin` is the number of earlier documents of the task with the same index: runs on different data have such
documents. A document has an outcome for each run, null where the run lacks the document:

    [scores, extracted, cut, answers]
    scores      for each metric of the task the mean over the answers; null where the score is no number
    extracted   for each filter of the task what it extracted from the first answer; null where it found nothing
    cut         number of answers that ended at the limit of new tokens; null where the run has no denoising records
    answers     number of answers

A text is a string or, where the answer's tokens are known, [string or length, [index into `tokens`, …]]. A length n
says that the text is the first n UTF-16 code units of the tokens' joined texts. An answer in `details` is [scores,
extracted, record], and [thought, whether the thought has an end] where the answer has a thought. Where a filter makes
one value of several answers, the first answer has the value, and the others have null and "". A record is null or

    {"steps": each token's step, minus that of the token before, "confidences": 10,000 times each token's confidence,
     "finish", "forwards", "seconds", "blocks": index of each block's first token,
     "forced": number of tokens that were not drawn, where there are any}

Steps count from 0 over the whole answer. `steps` and `confidences` are null where the engine records none.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypedDict

from sdar_lm_eval.report.denoising import CONFIDENCE_SCALE, Denoising
from sdar_lm_eval.report.documents import Answer, Document, by_key, is_likelihood, main_key_of
from sdar_lm_eval.report.runs import MetricKey, Run, metrics_of

AnswerScores = list["float | None"]


class TaskPart(TypedDict):
    """A task of `index`."""

    name: str
    metrics: list[tuple[str, str, bool]]
    filters: list[str]
    main: int
    extracts: bool


class Outcome(NamedTuple):
    """A run's outcome in a document of `index`."""

    scores: AnswerScores
    extracted: list[str | None]
    cut: int | None
    answers: int


class Row(NamedTuple):
    """A document of `index`."""

    task: int
    document: int
    question: str
    gold: str
    outcomes: list[Outcome | None]
    twin: int


@dataclass
class Documents:
    """The four parts of the data; the module's docstring describes them."""

    tasks: list[TaskPart] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    texts: list[list[list[object]]] = field(default_factory=list)
    details: list[tuple[str, str, list[list[list[object]]]]] = field(default_factory=list)
    tokens: dict[str, int] = field(default_factory=dict)

    @property
    def parts(self) -> dict[str, object]:
        """Name -> part, for all parts but `details`."""
        return {
            "index": {"tasks": self.tasks, "documents": self.rows},
            "texts": self.texts,
            "tokens": list(self.tokens),
        }

    def scores(self, task: str) -> dict[MetricKey, list[AnswerScores]]:
        """Return metric -> for each run the scores of the task's documents, None where the run has no score."""
        number = next(number for number, each in enumerate(self.tasks) if each["name"] == task)
        outcomes = [row.outcomes for row in self.rows if row.task == number]
        return {
            MetricKey(name, filter_name): [
                [each and each.scores[place] for each in of_run] for of_run in zip(*outcomes, strict=True)
            ]
            for place, (name, filter_name, _) in enumerate(self.tasks[number]["metrics"])
        }


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
    files = [results for run in runs for results in run.of_tasks.get(task, [])]
    lower_is_better = {
        metric.key: metric.higher_is_better is False for results in files for metric in metrics_of(results, task)
    }
    metrics = list(lower_is_better)
    main = main_key_of(runs, task)
    of_runs = by_key(runs, task)
    first = {key: document for each in reversed(of_runs) for key, document in each.items()}
    filters = list(dict.fromkeys(name for document in first.values() for name in document.answers[0].extracted))
    number = len(found.tasks)
    found.tasks.append(
        {
            "name": task,
            "metrics": [(*metric, lower) for metric, lower in lower_is_better.items()],
            "filters": filters,
            "main": 0 if main is None else metrics.index(main),
            "extracts": not any(is_likelihood(results, task) for results in files),
        }
    )
    twins: Counter[int] = Counter()
    for key, document in sorted(first.items(), key=lambda item: (item[1].index, item[0])):
        its = [each.get(key) for each in of_runs]
        outcomes = [_outcome(each, metrics, filters) for each in its]
        found.rows.append(
            Row(number, document.index, document.question, document.gold, outcomes, twins[document.index])
        )
        twins[document.index] += 1
        answers = [each.answers if each else () for each in its]
        found.texts.append([[_text(answer, found.tokens) for answer in each] for each in answers])
        doc = json.dumps(document.doc, ensure_ascii=False, indent=1) if document.doc else ""
        details = [[_detail(answer, metrics, filters) for answer in each] for each in answers]
        found.details.append((document.prompt, doc, details))


def _outcome(document: Document | None, metrics: Sequence[MetricKey], filters: Sequence[str]) -> Outcome | None:
    if document is None:
        return None
    known = [answer.denoising for answer in document.answers if answer.denoising is not None]
    cut = sum(record.finish_reason == "length" for record in known) if known else None
    first = document.answers[0]
    extracted = [first.extracted.get(name) for name in filters]
    return Outcome([document.score(metric) for metric in metrics], extracted, cut, len(document.answers))


def _text(answer: Answer, tokens: dict[str, int]) -> object:
    record = answer.denoising
    if record is None:
        return answer.text
    known = "".join(record.texts).startswith(answer.text)
    units = len(answer.text.encode("utf-16-le", "surrogatepass")) // 2
    return [units if known else answer.text, [tokens.setdefault(token, len(tokens)) for token in record.texts]]


def _detail(answer: Answer, metrics: Sequence[MetricKey], filters: Sequence[str]) -> list[object]:
    scores = [answer.own_scores.get(metric) for metric in metrics]
    detail: list[object] = [scores, [answer.extracted.get(name, "") for name in filters], _record(answer.denoising)]
    return detail if answer.thought is None else [*detail, [answer.thought.text, answer.thought.ended]]


def _record(record: Denoising | None) -> dict[str, object] | None:
    if record is None:
        return None
    steps, confidences = record.global_steps, record.confidences
    return {
        # Differences repeat from block to block, so they deflate to a third of the steps' size.
        "steps": None if steps is None else [b - a for a, b in itertools.pairwise((0, *steps))],
        "confidences": None if confidences is None else [round(c * CONFIDENCE_SCALE) for c in confidences],
        "blocks": [block.start for block in record.blocks],
        "finish": record.finish_reason,
        "forwards": dict(record.forwards),
        "seconds": record.seconds,
        **({"forced": record.forced_tokens} if record.forced_tokens else {}),
    }
