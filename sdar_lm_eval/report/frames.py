"""Runs and comparisons as pandas data frames, for notebooks.

run = read_run("runs/threshold-0.6")
run.scores, run.samples, run.answers
compare("runs/threshold-0.6", "runs/threshold-0.85").table
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from html import escape
from os import PathLike
from pathlib import Path

import pandas as pd

from sdar_lm_eval.errors import UserError
from sdar_lm_eval.report import compare_text
from sdar_lm_eval.report.compare import ChangedDocument, Comparison, Difference, changed_documents, compare_runs
from sdar_lm_eval.report.denoising import Denoising
from sdar_lm_eval.report.pairing import numbers_of
from sdar_lm_eval.report.results import Sample
from sdar_lm_eval.report.runs import Run, read_runs

SAMPLE_COLUMNS = (
    "task", "document", "filter", "repeat", "doc_hash", "response", "filtered", "target", "prompt",
)  # fmt: skip
ANSWER_COLUMNS = (
    "task", "document", "repeat", "block_length", "prompt_tokens", "tokens", "blocks", "denoising_steps",
    "mean_confidence", "min_confidence", "finish_reason", "forwards_prefill", "forwards_denoising", "forwards_commit",
    "seconds", "token_ids", "texts", "steps", "confidences",
)  # fmt: skip


class RunFrames:
    """A run as data frames, each read when it is first asked for.

    Attributes:
        run: the run.
    """

    def __init__(self, run: Run) -> None:
        self.run = run

    def __repr__(self) -> str:
        return f"RunFrames({self.run.label!r}: {', '.join(self.run.tasks)})"

    def _repr_html_(self) -> str:
        """What a notebook shows: the label and the scores."""
        return f"<p>{escape(self.run.label)}</p>{self.scores.to_html(index=False)}"

    @cached_property
    def scores(self) -> pd.DataFrame:
        """A row for each task, metric and filter: task, metric, filter, value, stderr, higher_is_better, documents."""
        rows = []
        for task in self.run.tasks:
            numbers = self.run.results_of(task).content.part_or_empty("n-samples").part_or_empty(task)
            documents = numbers.whole("effective")
            rows += [
                (task, each.name, each.filter, each.value, each.stderr, each.higher_is_better, documents)
                for each in self.run.metrics(task)
            ]
        columns = ["task", "metric", "filter", "value", "stderr", "higher_is_better", "documents"]
        return pd.DataFrame(rows, columns=columns)

    @cached_property
    def samples(self) -> pd.DataFrame:
        """A row for each answer of a document and filter; empty without --log_samples.

        Columns are `SAMPLE_COLUMNS`, and one for each metric, by its name: the value of the row's answer. Where a
        filter makes one value of several answers, each of their rows has that value, and `filtered` of all but the
        first is missing. `repeat` counts a document's
        answers from 0, those of runs with other seeds too. A task that scores log-likelihoods has one row for a
        document, whose `response` is empty.

        Raises:
            UserError: a samples file cannot be read.
        """
        rows = [row for task in self.run.tasks for row in self._sample_rows(task)]
        metrics = dict.fromkeys(metric.name for task in self.run.tasks for metric in self.run.metrics(task))
        return pd.DataFrame(rows, columns=[*SAMPLE_COLUMNS[:5], *metrics, *SAMPLE_COLUMNS[5:]])

    @cached_property
    def answers(self) -> pd.DataFrame:
        """A row for each answer with a record of how it was written, with `ANSWER_COLUMNS`; empty without records.

        `blocks` and `denoising_steps` are numbers of the whole answer; confidences are 0 to 1; `token_ids`, `texts`,
        `steps` and `confidences` are tuples with an entry for each token.

        Raises:
            UserError: a file of records cannot be read.
        """
        rows = []
        for task in self.run.tasks:
            before = 0
            for results in self.run.of_tasks[task]:
                records = results.denoising(task)
                rows += [_answer_row(task, record, before) for record in records]
                before += max((record.repeat + 1 for record in records), default=0)
        return pd.DataFrame(rows, columns=list(ANSWER_COLUMNS))

    def _sample_rows(self, task: str) -> Iterator[Mapping[str, object]]:
        names = [metric.name for metric in self.run.metrics(task)]
        before = 0
        for results in self.run.of_tasks[task]:
            most = 0
            for sample in results.each_sample(task):
                responses = _repeats(sample)
                most = max(most, len(responses))
                values = {name: numbers_of(sample.line.content.get(name)) for name in names}
                for repeat, response in enumerate(responses):
                    row: dict[str, object] = {
                        "task": task,
                        "document": sample.document,
                        "filter": sample.filter,
                        "repeat": before + repeat,
                        "doc_hash": sample.doc_hash,
                        "response": response,
                        "filtered": sample.extracted_from(repeat),
                        "target": sample.target,
                        "prompt": sample.prompt,
                    }
                    for name, found in values.items():
                        if found is not None and len(found) in (1, len(responses)):
                            row[name] = found[repeat if len(found) > 1 else 0]
                        else:
                            row[name] = sample.line.content.get(name)
                    yield row
            before += most


@dataclass(frozen=True, repr=False)
class ComparisonFrames:
    """A comparison of two runs, which prints as `sdar_lm_eval compare` does.

    Attributes:
        comparison: the comparison.
    """

    comparison: Comparison

    @property
    def table(self) -> pd.DataFrame:
        """A row for each difference, those of groups of tasks first; the columns are the fields of `Difference`."""
        fields = [field.name for field in dataclasses.fields(Difference)]
        rows = [
            [getattr(each, name) for name in fields] for each in (*self.comparison.groups, *self.comparison.differences)
        ]
        return pd.DataFrame(rows, columns=fields)

    @property
    def settings(self) -> pd.DataFrame:
        """A row for each setting that differs, by its name; columns a and b."""
        rows = list(self.comparison.settings.values())
        return pd.DataFrame(rows, columns=["a", "b"], index=pd.Index(list(self.comparison.settings), name="setting"))

    @property
    def warnings(self) -> tuple[str, ...]:
        """What makes the difference between the runs less clear."""
        return self.comparison.warnings

    def changed(self, task: str | None = None, metric: str | None = None, filter: str | None = None) -> pd.DataFrame:
        """Return the documents whose scores differ; the columns are the fields of `ChangedDocument`.

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
                rows = changed_documents(self.comparison.a, self.comparison.b, *found)
                columns = [field.name for field in dataclasses.fields(ChangedDocument)]
                return pd.DataFrame([dataclasses.asdict(row) for row in rows], columns=columns)
        asked_for = ", ".join(name for name in asked if name is not None)
        raise UserError(f"The comparison has no score {asked_for}; its table names those that it has.")

    def __repr__(self) -> str:
        return compare_text.as_text([self.comparison])

    def _repr_html_(self) -> str:
        """What a notebook shows: the labels, settings and warnings, the table and a sentence for each difference."""
        head, *rows = compare_text.table([self.comparison])
        parts = [
            f"<p>A: {escape(self.comparison.a.label)}<br>B: {escape(self.comparison.b.label)}</p>",
            self.settings.to_html() if self.comparison.settings else "",
            *(f"<p>Warning: {escape(text)}</p>" for text in self.warnings),
            pd.DataFrame(rows, columns=head).to_html(index=False),
            *(f"<p>{escape(text)}</p>" for text in compare_text.sentences([self.comparison])),
        ]
        return "".join(parts)


def read_run(path: str | PathLike[str], label: str | None = None) -> RunFrames:
    """Return a run of lm_eval as data frames, of any model.

    Args:
        path: what `--output_path` named: a folder, or a results file.
        label: which run, where the folder holds several: its label, or a part that no other run's label has.

    Raises:
        UserError: the path does not exist, or holds no run, or holds several and `label` is that of none or of many.
    """
    runs = read_runs([Path(path)])
    found = [run for run in runs if label is None or run.label == label] or [
        run for run in runs if str(label) in run.label
    ]
    if len(found) != 1:
        labels = "; ".join(run.label for run in runs)
        what = f"holds {len(runs)} runs" if label is None else f"holds {len(found) or 'no'} runs with label {label!r}"
        raise UserError(f"{str(path)!r} {what}. Give label= a part of one of these: {labels}.")
    return RunFrames(found[0])


def compare(
    a: str | PathLike[str] | RunFrames,
    b: str | PathLike[str] | RunFrames,
    *,
    tasks: Collection[str] = (),
    metrics: Collection[str] = (),
    filters: Collection[str] = (),
) -> ComparisonFrames:
    """Compare two runs on the documents that both answered.

    Args:
        a: the run that is compared with: a path as `read_run` takes, or what `read_run` returned.
        b: the other run.
        tasks: which tasks; empty: all that both runs have.
        metrics: names of the metrics; empty: all.
        filters: names of the filters; empty: all.

    Raises:
        UserError: as `read_run`; or the runs share no task, metric or document, or one has no samples.
    """
    given = [each if isinstance(each, RunFrames) else read_run(each) for each in (a, b)]
    names = {
        name: (value,) if isinstance(value, str) else value
        for name, value in (("tasks", tasks), ("metrics", metrics), ("filters", filters))
    }
    return ComparisonFrames(compare_runs(given[0].run, given[1].run, **names))


def _repeats(sample: Sample) -> tuple[str, ...]:
    """A document's answers; one, which is empty, where the document was scored by log-likelihoods."""
    request = sample.line.part_or_empty("arguments").part_or_empty("gen_args_0").content
    return sample.responses if isinstance(request.get("arg_1"), dict) and sample.responses else ("",)


def _answer_row(task: str, record: Denoising, before: int) -> tuple[object, ...]:
    steps, confidences = record.global_steps, record.confidences
    return (
        task,
        record.document,
        before + record.repeat,
        record.block_length,
        record.prompt_tokens,
        len(record.token_ids),
        len(record.blocks),
        len(set(steps)) if steps is not None else None,
        sum(confidences) / len(confidences) if confidences else None,
        min(confidences) if confidences else None,
        record.finish_reason,
        record.forwards.get("prefill"),
        record.forwards.get("denoising"),
        record.forwards.get("commit"),
        record.seconds,
        record.token_ids,
        record.texts,
        record.steps,
        record.confidences,
    )
