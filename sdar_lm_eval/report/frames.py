"""Runs and comparisons as pandas data frames, for notebooks:

run = read_run("runs/threshold-0.6")
run.scores, run.samples, run.answers
compare("runs/threshold-0.6", "runs/threshold-0.85").table
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from os import PathLike
from pathlib import Path

import pandas as pd

from sdar_lm_eval.checks import checks_types
from sdar_lm_eval.errors import UserError
from sdar_lm_eval.files import plain_text
from sdar_lm_eval.report import compare_text
from sdar_lm_eval.report.changed import ChangedDocument, changed_documents
from sdar_lm_eval.report.compare import Comparison, Difference, compare_runs
from sdar_lm_eval.report.denoising import Denoising
from sdar_lm_eval.report.pairing import numbers_of, over_seeds
from sdar_lm_eval.report.runs import Run, read_runs
from sdar_lm_eval.report.samples import Sample

SAMPLE_COLUMNS = (
    "task", "document", "filter", "repeat", "doc_hash", "response", "filtered", "target", "prompt",
)  # fmt: skip
ANSWER_COLUMNS = (
    "task", "document", "repeat", "block_length", "prompt_tokens", "tokens", "blocks", "denoising_steps",
    "mean_confidence", "min_confidence", "finish_reason", "forwards_prefill", "forwards_denoising", "forwards_commit",
    "seconds", "token_ids", "texts", "steps", "confidences",
)  # fmt: skip


class RunFrames:
    """A run as data frames. Each frame is read when it is first used, and kept.

    Attributes:
        run: the run.
    """

    def __init__(self, run: Run) -> None:
        self.run = run

    def __repr__(self) -> str:
        return f"RunFrames({self.run.label!r}: {', '.join(self.run.tasks)})"

    def _repr_html_(self) -> str:
        """Return the HTML that a notebook shows: the label and the scores."""
        return f"<p>{escape(self.run.label)}</p>{self.scores.to_html(index=False)}"

    @cached_property
    def scores(self) -> pd.DataFrame:
        """A row for each task, metric and filter.

        Columns are task, metric, filter, value, stderr, higher_is_better and documents (their number). Of several
        seeds, `value` is the mean, and `stderr` is clustered by document, or missing without --log_samples.

        Raises:
            UserError: a results file is not as lm_eval writes it.
        """
        rows = []
        for task in self.run.tasks:
            documents = self.run.results_of(task).answered(task)
            rows += [
                (task, each.name, each.filter, each.value, each.stderr, each.higher_is_better, documents)
                for each in over_seeds(self.run, task)
            ]
        columns = ["task", "metric", "filter", "value", "stderr", "higher_is_better", "documents"]
        return pd.DataFrame(rows, columns=columns)

    @cached_property
    def samples(self) -> pd.DataFrame:
        """A row for each document, answer and filter; empty without --log_samples.

        Columns are `SAMPLE_COLUMNS` and, before `response`, a column for each metric with the value of the row's
        answer. Where a filter makes one value of several answers, the rows of these answers all have that value, and
        `filtered` is missing in all of these rows but the first. `repeat` numbers a document's answers from 0, over all
        seeds. A task that compares log-likelihoods has one row for each document and filter, whose `response` is empty.

        Raises:
            UserError: a samples file cannot be read.
        """
        rows = [row for task in self.run.tasks for row in self._sample_rows(task)]
        metrics = dict.fromkeys(metric.name for task in self.run.tasks for metric in self.run.metrics(task))
        before = SAMPLE_COLUMNS.index("response")
        return pd.DataFrame(rows, columns=[*SAMPLE_COLUMNS[:before], *metrics, *SAMPLE_COLUMNS[before:]])

    @cached_property
    def answers(self) -> pd.DataFrame:
        """A row for each denoising record of an answer; empty where the run has no records.

        Columns are `ANSWER_COLUMNS`; `repeat` is that of `samples`. `tokens`, `blocks` and `denoising_steps` are counts
        over the answer, the `forwards_…` count forwards, and `seconds` is a time. `token_ids`, `texts`, `steps` and
        `confidences` are tuples with an entry for each token; steps count from 0 within a block, and confidences are 0
        to 1.

        Raises:
            UserError: a denoising file, or of several seeds a samples file, cannot be read.
        """
        rows = []
        for task in self.run.tasks:
            before = 0
            for results in self.run.of_tasks[task]:
                records = results.denoising(task)
                rows += [_answer_row(task, record, before) for record in records]
                if results is not self.run.of_tasks[task][-1]:
                    # A run's answers may lack records, so that `repeat` is by the samples, as in `samples`.
                    before += max((len(_repeats(sample)) for sample in results.each_sample(task)), default=0)
        return pd.DataFrame(rows, columns=list(ANSWER_COLUMNS))

    def _sample_rows(self, task: str) -> Iterator[Mapping[str, object]]:
        names = [metric.name for metric in self.run.metrics(task)]
        before = 0
        for results in self.run.of_tasks[task]:
            most = 0
            for sample in results.each_sample(task):
                responses = _repeats(sample)
                most = max(most, len(responses))
                values = {name: _values_of_answers(sample, name, len(responses)) for name in names}
                for repeat, response in enumerate(responses):
                    yield {
                        "task": task,
                        "document": sample.document,
                        "filter": sample.filter,
                        "repeat": before + repeat,
                        "doc_hash": sample.doc_hash,
                        "response": response,
                        "filtered": sample.extracted_from(repeat),
                        "target": sample.target,
                        "prompt": sample.prompt,
                        **{name: of_answers[repeat] for name, of_answers in values.items()},
                    }
            before += most


@dataclass(frozen=True, repr=False)
class ComparisonFrames:
    """A comparison of two runs as data frames. `print` shows what `sdar_lm_eval compare` prints.

    Attributes:
        comparison: the comparison.
    """

    comparison: Comparison

    @property
    def table(self) -> pd.DataFrame:
        """A row for each difference, groups of tasks first; the columns are the fields of `compare.Difference`."""
        return _frame(self.comparison.rows, Difference)

    @property
    def settings(self) -> pd.DataFrame:
        """A row for each setting that differs; the index is the setting's name, the columns a and b are its values."""
        rows = list(self.comparison.settings.values())
        return pd.DataFrame(rows, columns=["a", "b"], index=pd.Index(list(self.comparison.settings), name="setting"))

    @property
    def warnings(self) -> tuple[str, ...]:
        """Sentences about what else than the settings may explain differences between the runs."""
        return self.comparison.warnings

    @checks_types
    def changed(self, task: str | None = None, metric: str | None = None, filter: str | None = None) -> pd.DataFrame:
        """Return the documents whose scores differ; the columns are the fields of `changed.ChangedDocument`.

        Args:
            task: the task; None: the comparison's first.
            metric: the metric; None: the task's first.
            filter: the filter; None: the metric's first.

        Raises:
            UserError: there is no such score, or a samples file cannot be read.
        """
        asked = (task, metric, filter)
        for each in self.comparison.differences:
            own = [(each.task, each.metric, name) for name in (each.filter, *each.equal_filters)]
            found = next(
                (names for names in own if all(a in (None, b) for a, b in zip(asked, names, strict=True))), None
            )
            if found is not None:
                return _frame(changed_documents(self.comparison.a, self.comparison.b, *found), ChangedDocument)
        asked_for = ", ".join(name for name in asked if name is not None)
        raise UserError(f"The comparison has no score {asked_for}; `table` lists the scores that it has.")

    def __repr__(self) -> str:
        return compare_text.as_text([self.comparison])

    def _repr_html_(self) -> str:
        """Return the HTML that a notebook shows: what `print` shows, with the tables as HTML."""
        head, *rows = compare_text.table([self.comparison])
        parts = [
            f"<p>A: {escape(self.comparison.a.label)}<br>B: {escape(self.comparison.b.label)}</p>",
            self.settings.to_html() if self.comparison.settings else "",
            *(f"<p>Warning: {escape(text)}</p>" for text in self.warnings),
            pd.DataFrame(rows, columns=head).to_html(index=False),
            *(f"<p>{escape(text)}</p>" for text in compare_text.sentences([self.comparison])),
            *(f"<p>{escape(text)}</p>" for text in compare_text.speeds([self.comparison])),
            f"<p>{escape(' '.join(compare_text.notes([self.comparison])))}</p>",
        ]
        return "".join(parts)


@checks_types
def read_run(path: str | PathLike[str], label: str | None = None) -> RunFrames:
    """Return a run as data frames. The run may be of any model that lm_eval evaluated.

    Args:
        path: the folder that `--output_path` named, or a results file.
        label: the run's label, or a part that no other run's label has; needed where the folder holds several runs.

    Raises:
        UserError: the path does not exist, or holds no run, or not exactly one run with this label.
    """
    runs = read_runs([Path(plain_text(path))])
    found = [run for run in runs if label is None or run.label == label] or [
        run for run in runs if str(label) in run.label
    ]
    if len(found) != 1:
        labels = "; ".join(run.label for run in runs)
        what = f"holds {len(runs)} runs" if label is None else f"holds {len(found) or 'no'} runs with label {label!r}"
        raise UserError(f"{str(path)!r} {what}. Give label= a part of one of these: {labels}.")
    return RunFrames(found[0])


@checks_types
def compare(
    a: str | PathLike[str] | RunFrames,
    b: str | PathLike[str] | RunFrames,
    *,
    tasks: Collection[str] | None = None,
    metrics: Collection[str] | None = None,
    filters: Collection[str] | None = None,
) -> ComparisonFrames:
    """Compare two runs on the documents that both answered.

    Args:
        a: the baseline: a path as `read_run` takes, or what `read_run` returned.
        b: the run that is compared with the baseline, likewise.
        tasks: names of tasks or groups of tasks; None or empty: all tasks that both runs have.
        metrics: names of metrics; None or empty: all.
        filters: names of filters; None or empty: all.

    Raises:
        UserError: as `read_run`; or the runs share no task, metric or document, or one has no samples.
    """
    given = [each if isinstance(each, RunFrames) else read_run(each) for each in (a, b)]
    names = {
        name: () if value is None else (value,) if isinstance(value, str) else tuple(value)
        for name, value in (("tasks", tasks), ("metrics", metrics), ("filters", filters))
    }
    return ComparisonFrames(compare_runs(given[0].run, given[1].run, **names))


def _frame(
    rows: Sequence[Difference] | Sequence[ChangedDocument], kind: type[Difference | ChangedDocument]
) -> pd.DataFrame:
    """A row for each instance of a dataclass; the columns are the class's fields, even where there is no row."""
    return pd.DataFrame(list(rows), columns=[field.name for field in dataclasses.fields(kind)])


def _repeats(sample: Sample) -> tuple[str, ...]:
    """A document's answers; a single empty answer where the task compares log-likelihoods."""
    return sample.responses if sample.asks_for_answers and sample.responses else ("",)


def _values_of_answers(sample: Sample, metric: str, answers: int) -> Sequence[object]:
    """A metric's value for each of a document's answers: one value, or one of another kind, is that of all answers."""
    value = sample.line.content.get(metric)
    numbers = numbers_of(value)
    if numbers is None or len(numbers) not in (1, answers):
        return [value] * answers
    return numbers if len(numbers) == answers else numbers * answers


def _answer_row(task: str, record: Denoising, before: int) -> dict[str, object]:
    """Column -> value, in the order of `ANSWER_COLUMNS`; `before` is the number of answers with earlier seeds."""
    steps, confidences = record.global_steps, record.confidences
    return {
        "task": task,
        "document": record.document,
        "repeat": before + record.repeat,
        "block_length": record.block_length,
        "prompt_tokens": record.prompt_tokens,
        "tokens": len(record.token_ids),
        "blocks": len(record.blocks),
        "denoising_steps": len(set(steps)) if steps is not None else None,
        "mean_confidence": sum(confidences) / len(confidences) if confidences else None,
        "min_confidence": min(confidences) if confidences else None,
        "finish_reason": record.finish_reason,
        **{f"forwards_{kind}": record.forwards.get(kind) for kind in ("prefill", "denoising", "commit")},
        "seconds": record.seconds,
        "token_ids": record.token_ids,
        "texts": record.texts,
        "steps": record.steps,
        "confidences": record.confidences,
    }
