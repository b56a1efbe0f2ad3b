"""The documents whose scores differ between two runs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sdar_lm_eval.errors import UserError, listed
from sdar_lm_eval.report.pairing import read_pair
from sdar_lm_eval.report.runs import MetricKey, Run
from sdar_lm_eval.report.samples import Sample


@dataclass(frozen=True)
class ChangedDocument:
    """A document whose scores differ between two runs.

    Attributes:
        document_a: the document's index in run a's data set.
        document_b: the document's index in run b's data set.
        question: the document's question.
        target: the gold answer.
        a: run a's score; the mean where there are several answers.
        b: run b's score, likewise.
        filtered_a: the filter's value of run a's first answer, or the choice that is likeliest in run a.
        filtered_b: the filter's value, or the choice, in run b.
    """

    document_a: int
    document_b: int
    question: str
    target: str
    a: float
    b: float
    filtered_a: str
    filtered_b: str


def changed_documents(a: Run, b: Run, task: str, metric: str, filter: str) -> list[ChangedDocument]:
    """Return the documents whose scores differ between two runs, ordered by index in run a.

    Raises:
        UserError: a run has no samples of the task, or no such metric, or a samples file cannot be read.
    """
    scores_a, scores_b = read_pair(a, b, task)
    key = MetricKey(metric, filter)
    for run, scores in ((a, scores_a), (b, scores_b)):
        if key not in scores.scores:
            raise UserError(f"{run.label} has no {key} in {task}; choose {listed(list(scores.scores))}.")
    answers_a, answers_b = scores_a.scores[key].answers, scores_b.scores[key].answers
    changed = [
        (each, float(answers_a[each].mean()), float(answers_b[each].mean()))
        for each in scores_a.documents
        if each in answers_a and each in answers_b and answers_a[each].mean() != answers_b[each].mean()
    ]
    indices_a = [scores_a.documents[each].index for each, _, _ in changed]
    indices_b = [scores_b.documents[each].index for each, _, _ in changed]
    samples_a, samples_b = _samples_of(a, task, filter, indices_a), _samples_of(b, task, filter, indices_b)
    return [
        ChangedDocument(
            document_a=index_a,
            document_b=index_b,
            question=samples_a[index_a].question,
            target=samples_a[index_a].target,
            a=value_a,
            b=value_b,
            filtered_a=samples_a[index_a].extracted,
            filtered_b=samples_b[index_b].extracted,
        )
        for (_, value_a, value_b), index_a, index_b in zip(changed, indices_a, indices_b, strict=True)
    ]


def _samples_of(run: Run, task: str, filter: str, indices: Iterable[int]) -> dict[int, Sample]:
    """Index -> the run's first sample of the document, for some documents."""
    wanted, found = set(indices), dict[int, Sample]()
    for results in run.of_tasks[task]:
        for sample in results.each_sample(task) if wanted - found.keys() else ():
            if sample.filter == filter and sample.document in wanted:
                found.setdefault(sample.document, sample)
    return found
