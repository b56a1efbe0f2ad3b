"""A run's scores beside those that SDAR's authors published, and which differences are larger than chance."""

from __future__ import annotations

import argparse
import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdar_lm_eval.errors import UserError, did_you_mean
from sdar_lm_eval.report.results import model_of, results_in

logger = logging.getLogger(__name__)

NAME = "table"
HELP = "a run's scores beside the published ones"

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
"""A difference of more standard errors than this is larger than chance: one in twenty is, by chance alone."""


@dataclass(frozen=True)
class Column:
    """A column of the published table (arXiv 2510.06303, table 1).

    Attributes:
        title: as the table has it.
        task: ours that reproduces it.
        metric: that task's, with its filter, as results files spell it.
        questions: how many the benchmark has.
        shots: how many solved questions stand before each.
        published: per cent, for each of `MODELS`.
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
        stderr: its standard error; None where a single question leaves it unknown.
        questions: how many were answered.
        shots: how many solved questions stood before each; None where the file does not say.
        settings: decoding settings of the run, where the model is ours.
    """

    value: float
    stderr: float | None
    questions: int
    shots: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Difference:
    """A score minus a published one.

    Attributes:
        points: per cent points.
        stderr: its standard error; None where the score's is unknown.
    """

    points: float
    stderr: float | None

    @property
    def verdict(self) -> str:
        """Whether it is larger than chance."""
        if self.stderr is None:
            return "unknown"
        return "LARGER than chance" if abs(self.points) > STANDARD_ERRORS * self.stderr else "within chance"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.add_argument("paths", nargs="+", metavar="OUTPUT_DIR", help="what lm_eval's --output_path named")
    parser.add_argument(
        "--published", metavar="MODEL", help=f"published model to compare with: {', '.join(MODELS)}; default: by name"
    )


def run(arguments: argparse.Namespace) -> str:
    """Return the report on the results files in `arguments.paths`."""
    if arguments.published not in (None, *MODELS):
        hint = did_you_mean(arguments.published, MODELS)
        raise UserError(f"--published {arguments.published!r} is unknown; choose {', '.join(MODELS)}.{hint}")
    runs = read_runs([Path(path) for path in arguments.paths])
    tables = [render(model, scores, arguments.published or published_as(model)) for model, scores in runs.items()]
    return "\n\n".join([*tables, _LEGEND])


_LEGEND = (
    f"± is one standard error. A difference is larger than chance if it exceeds {STANDARD_ERRORS} standard errors of\n"
    "two runs on different questions. These answered the same ones, which makes chance smaller: a marked difference\n"
    "is hardly chance, and an unmarked one may be real."
)


def read_runs(paths: Iterable[Path]) -> dict[str, dict[str, Score]]:
    """Return model -> task -> score, of the newest run of each, from lm_eval's results files in folders or named.

    Raises:
        UserError: a path does not exist, holds no results of these tasks, or holds some that cannot be read.
    """
    found = sorted((run for path in paths for run in results_in(path)), key=lambda run: run[1]["date"])
    runs: dict[str, dict[str, Score]] = {}
    for file, result in found:
        for column in COLUMNS:
            try:
                score = _score(result, column)
                if score is not None:
                    runs.setdefault(model_of(result) or "?", {})[column.task] = score
                elif column.task in result["results"]:
                    logger.warning(
                        "%s has no %s of %s, which the table shows: evaluate it again.",
                        file,
                        column.metric,
                        column.task,
                    )
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise UserError(
                    f"{file} is not as lm_eval writes it ({type(error).__name__}: {error}), so {column.task} cannot be "
                    "read. Evaluate again, or name the folders of other runs."
                ) from error
    if not runs:
        tasks = sorted({task for _, result in found for task in result["results"]})
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

    A few answers may be all right or all wrong by chance, and then tell nothing of their spread: it counts as no
    smaller than the published model's on as many questions.
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
            row[2:] = [f"{score.questions:,}", _with_error(100 * score.value, score.stderr, 100)]
            notes += _notes(column, score)
        if published is not None:
            row.append(f"{column.published[MODELS.index(published)]:.1f}")
            if score is not None:
                found = difference(score, column, published)
                row += [_with_error(found.points, found.stderr, sign="+"), found.verdict]
        rows.append(row)
    if published is None:
        title = f"{model}: which published model it is, its name does not say (--published {'|'.join(MODELS)})"
    else:
        title = f"{model} beside SDAR-{published}-Chat as published (arXiv 2510.06303, table 1)"
        head += ["published, %", "difference", ""]
    return "\n".join([title, "", *_aligned([head, *rows]), *([""] if notes else []), *notes])


def _score(result: Mapping[str, Any], column: Column) -> Score | None:
    """The column's score in a results file; a group's is the mean of its tasks, each counted once."""
    tasks = result.get("group_subtasks", {}).get(column.task) or [column.task]
    values = [result["results"].get(task, {}).get(column.metric) for task in tasks]
    if any(value is None for value in values):
        return None
    questions = [result["n-samples"][task]["effective"] for task in tasks]
    errors = [_stderr(value, number) for value, number in zip(values, questions, strict=True)]
    known = [error for error in errors if error is not None]
    settings = (result["config"].get("sdar_lm_eval") or {}).get("decoding_of_tasks", {})
    return Score(
        value=sum(values) / len(values),
        stderr=math.hypot(*known) / len(tasks) if len(known) == len(tasks) else None,
        questions=sum(questions),
        shots=result.get("n-shot", {}).get(tasks[0]),
        settings=settings.get(tasks[0], {}),
    )


def _stderr(value: float, questions: int) -> float | None:
    """Standard error of a mean of zeros and ones, as lm_eval has it; None for a single question."""
    return math.sqrt(value * (1 - value) / (questions - 1)) if questions > 1 else None


def _notes(column: Column, score: Score) -> list[str]:
    """What else, besides chance, may explain a difference."""
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


def _with_error(value: float, stderr: float | None, scale: float = 1.0, sign: str = "") -> str:
    return f"{value:{sign}.1f}" + ("" if stderr is None else f" ± {scale * stderr:.1f}")


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    width = max(map(len, rows))
    filled = [[*row, *[""] * (width - len(row))] for row in rows]
    widths = [max(map(len, cells)) for cells in zip(*filled, strict=True)]
    # Names to the left, numbers to the right, the verdict to the left.
    left = {0, 1, 6}
    return [
        "  ".join(
            cell.ljust(size) if place in left else cell.rjust(size)
            for place, (cell, size) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in filled
    ]
