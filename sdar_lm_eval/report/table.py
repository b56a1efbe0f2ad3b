"""A run's scores beside those that SDAR's authors published, and which differences are larger than chance."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sdar_lm_eval.errors import UserError, did_you_mean
from sdar_lm_eval.report.results import Results, results_in
from sdar_lm_eval.report.text_table import aligned, with_error

logger = logging.getLogger(__name__)

MODELS = ("1.7B", "4B", "8B", "30B-A3B")
"""The published models, by what stands between "SDAR-" and "-Chat" in their names."""

PROTOCOL = {
    "block_length": 4,
    "denoising_steps": 4,
    "remasking_strategy": "low_confidence_static",
    "temperature": 0.0,
    "repetition_penalty": 1.0,
    "max_gen_toks": 4096,
}
"""Decoding settings of the published runs (JetAstra/SDAR at c2041a8, evaluation/opencompass/configs)."""

STANDARD_ERRORS = 1.96
"""A difference of more standard errors than this is called larger than chance. Chance alone exceeds it 1 time in 20."""


@dataclass(frozen=True)
class Column:
    """A column of the published table (arXiv 2510.06303, table 1).

    Attributes:
        title: as the table has it.
        task: this package's task that reproduces the column; one of `tasks/sdar_bench.yaml`.
        metric: the task's metric and filter, as results files spell them.
        questions: how many the benchmark has.
        shots: how many solved questions stand before each question.
        published: the score of each of `MODELS`, in per cent.
    """

    title: str
    task: str
    metric: str
    questions: int
    shots: int
    published: tuple[float, float, float, float]


COLUMNS = (
    Column("MMLU (5-shot)", "mmlu_sdar", "exact_match,first-option", 14042, 5, (62.9, 74.9, 78.6, 82.8)),
    Column("GSM8K", "gsm8k_sdar_paper", "exact_match,opencompass", 1319, 0, (80.1, 89.9, 91.3, 91.4)),
    Column("MATH500", "math500_sdar", "math_verify,none", 500, 0, (63.2, 72.8, 78.6, 77.8)),
    Column("HumanEval", "humaneval_sdar", "pass@1,code-block", 164, 0, (61.6, 72.0, 78.7, 87.2)),
    Column("MBPP (sanitized)", "mbpp_sdar", "pass@1,code-block", 257, 0, (61.1, 65.4, 72.0, 71.6)),
    Column("IFEval (prompt strict)", "ifeval_sdar", "prompt_level_strict_acc,none", 541, 0, (43.4, 56.6, 61.4, 60.6)),
)


@dataclass(frozen=True)
class Score:
    """A task's score in a run.

    Attributes:
        value: mean, 0 to 1.
        stderr: the mean's standard error; None for a single question.
        questions: how many were answered.
        shots: how many solved questions stood before each question; None where the file does not say.
        settings: the run's decoding settings; empty for a model of another package.
    """

    value: float
    stderr: float | None
    questions: int
    shots: int | None = None
    settings: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Difference:
    """A score minus a published one.

    Attributes:
        points: per cent points.
        stderr: the difference's standard error; None where the score's is unknown.
    """

    points: float
    stderr: float | None

    @property
    def verdict(self) -> str:
        """Whether the difference is larger than chance."""
        if self.stderr is None:
            return "unknown"
        return "LARGER than chance" if abs(self.points) > STANDARD_ERRORS * self.stderr else "within chance"


def report_of(paths: Iterable[Path], published: str | None = None) -> str:
    """Return the tables of the runs in results files or folders.

    Args:
        paths: as `read_runs`.
        published: one of `MODELS` to compare with; None: by each run's name.

    Raises:
        UserError: as `read_runs`, or `published` is unknown.
    """
    if published not in (None, *MODELS):
        hint = did_you_mean(str(published), MODELS)
        raise UserError(f"--published {published!r} is unknown; choose {', '.join(MODELS)}.{hint}")
    runs = read_runs(paths)
    tables = [render(model, scores, published or published_as(model)) for model, scores in runs.items()]
    return "\n\n".join([*tables, _LEGEND])


_LEGEND = (
    f"± is one standard error. A difference is called larger than chance if it exceeds {STANDARD_ERRORS} standard\n"
    "errors of two runs on different questions. Both runs here answered the same questions, so chance plays a smaller\n"
    "part: a difference marked LARGER is hardly chance, and one within chance may be real."
)


def read_runs(paths: Iterable[Path]) -> dict[str, dict[str, Score]]:
    """Return model -> task -> score in the newest run of the task.

    Args:
        paths: results files of lm_eval, or folders that hold some.

    Raises:
        UserError: a path does not exist, there are no results of the table's tasks, or a file is not as lm_eval writes
            it.
    """
    found = sorted((run for path in paths for run in results_in(path)), key=lambda run: run.date)
    runs: dict[str, dict[str, Score]] = {}
    for results in found:
        for column in COLUMNS:
            score = _score(results, column)
            if score is not None:
                runs.setdefault(results.model or "?", {})[column.task] = score
            elif column.task in results.scores.content:
                logger.warning(
                    "%s has no %s of %s, which the table shows: evaluate it again.",
                    results.file,
                    column.metric,
                    column.task,
                )
    if not runs:
        tasks = sorted({task for results in found for task in results.scores.content})
        raise UserError(
            f"No results of the table's tasks, only of {', '.join(tasks[:8])}. Run --tasks sdar_bench, or some of "
            f"{', '.join(column.task for column in COLUMNS)}."
        )
    return runs


def published_as(model: str) -> str | None:
    """Return which of `MODELS` a checkpoint's name or folder says it is, or None."""
    sizes = "|".join(re.escape(size) for size in MODELS)
    match = re.search(rf"SDAR-({sizes})-Chat(?![\w-])", model, re.IGNORECASE)
    return match[1].upper() if match else None


def difference(score: Score, column: Column, model: str) -> Difference:
    """Return how far a score is from that of a published model, one of `MODELS`.

    A few answers may all be right, or all wrong, by chance, and their standard error is then 0. So the score's standard
    error counts as at least that of the published score on as many questions.
    """
    published = column.published[MODELS.index(model)]
    stderr = None
    if score.stderr is not None:
        of_few, of_all = (_stderr(published / 100, number) or 0.0 for number in (score.questions, column.questions))
        stderr = 100 * math.hypot(max(score.stderr, of_few), of_all)
    return Difference(100 * score.value - published, stderr)


def render(model: str, scores: Mapping[str, Score], published: str | None) -> str:
    """Return the table of one model as text."""
    head = ["column", "task", "questions", "this run, %"]
    rows, notes = [], []
    for column in COLUMNS:
        score = scores.get(column.task)
        row = [column.title, column.task, "", "not run"]
        if score is not None:
            row[2:] = [f"{score.questions:,}", with_error(score.value, score.stderr, 100)]
            notes += _notes(column, score)
        if published is not None:
            row.append(f"{column.published[MODELS.index(published)]:.1f}")
            if score is not None:
                found = difference(score, column, published)
                row += [with_error(found.points, found.stderr, sign="+"), found.verdict]
        rows.append(row)
    if published is None:
        title = f"{model}: the name is that of no published model (--published {'|'.join(MODELS)} compares with one)"
    else:
        title = f"{model} beside SDAR-{published}-Chat as published (arXiv 2510.06303, table 1)"
        head += ["published, %", "difference", ""]
    return "\n".join([title, "", *aligned([head, *rows], left={0, 1, 6}), *([""] if notes else []), *notes])


def _score(results: Results, column: Column) -> Score | None:
    """The column's score in a results file, None where the file has none. A group's score is the mean of its tasks'."""
    groups = results.content.part_or_empty("group_subtasks").content
    subtasks = groups.get(column.task)
    tasks = list(map(str, subtasks)) if isinstance(subtasks, list) and subtasks else [column.task]
    values, questions = [], []
    for task in tasks:
        metrics = results.scores.part_or_empty(task)
        value = metrics.number(column.metric)
        if value is None:
            return None
        if not 0 <= value <= 1:
            raise metrics.malformed(column.metric, "a share from 0 to 1")
        numbers = results.content.part("n-samples").part(task)
        answered = numbers.whole("effective")
        if answered is None:
            raise numbers.malformed("effective", "a whole number")
        values.append(value)
        questions.append(answered)
    errors = [_stderr(value, number) for value, number in zip(values, questions, strict=True)]
    known = [error for error in errors if error is not None]
    return Score(
        value=sum(values) / len(values),
        stderr=math.hypot(*known) / len(tasks) if len(known) == len(tasks) else None,
        questions=sum(questions),
        shots=results.content.part_or_empty("n-shot").whole(tasks[0]),
        settings=results.decoding_of(tasks[0]).content,
    )


def _stderr(value: float, questions: int) -> float | None:
    """Standard error of a mean of zeros and ones, as lm_eval has it; None for a single question."""
    return math.sqrt(value * (1 - value) / (questions - 1)) if questions > 1 else None


def _notes(column: Column, score: Score) -> list[str]:
    """What else than chance may explain a difference."""
    found = [
        f"{name}={score.settings[name]} (published: {value})"
        for name, value in PROTOCOL.items()
        if name in score.settings and score.settings[name] != value
    ]
    if score.shots not in (None, column.shots):
        found.insert(0, f"num_fewshot={score.shots} (published: {column.shots})")
    if score.questions < column.questions:
        found.insert(0, f"{score.questions:,} of {column.questions:,} questions")
    return [f"{column.task}: {'; '.join(found)}"] if found else []
