"""Tables of a run's scores beside published ones, which say what differences are larger than chance."""

from __future__ import annotations

import itertools
import logging
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from sdar_lm_eval.decoding import spelled
from sdar_lm_eval.report import text_table
from sdar_lm_eval.report.columns import TABLES, Column
from sdar_lm_eval.report.pairing import over_seeds
from sdar_lm_eval.report.printing import printable
from sdar_lm_eval.report.published import Published, published_as
from sdar_lm_eval.report.results import Results
from sdar_lm_eval.report.runs import Metric, Run, metrics_of, read_runs
from sdar_lm_eval.report.several import is_of_several
from sdar_lm_eval.report.text_table import as_markdown, escaped, fitted, with_error

logger = logging.getLogger(__name__)

STANDARD_ERRORS = 1.96
"""A difference of more standard errors than this is called larger than chance; chance exceeds it in 5% of cases."""


@dataclass(frozen=True)
class Score:
    """A task's score in a run.

    Attributes:
        value: the mean score, 0 to 1; over the seeds where there are several.
        stderr: standard error; None where it is unknown, as for a single question. Of several seeds, the error is
            clustered by question (`over_seeds`), or that of the first seed (`of_one_seed`).
        questions: number of questions (documents) that were answered.
        shots: number of few-shot examples before each question; None where the file does not say.
        settings: the run's decoding settings; empty for a model of another package.
        seeds: number of results files, each with its own seed, that `value` is the mean of.
        answers: number of answers to each question; the question's score is the mean of theirs.
        of_one_seed: whether `stderr` is that of the first of several seeds, since samples are missing.
    """

    value: float
    stderr: float | None
    questions: int
    shots: int | None = None
    settings: Mapping[str, object] = field(default_factory=dict)
    seeds: int = 1
    answers: int = 1
    of_one_seed: bool = False


@dataclass(frozen=True)
class PublishedDifference:
    """A score minus a published one.

    Attributes:
        points: the difference in percentage points.
        stderr: standard error of `points`; None where the score's standard error is unknown.
    """

    points: float
    stderr: float | None

    @property
    def verdict(self) -> str:
        """Whether the difference is larger than chance, in words."""
        if self.stderr is None:
            return "unknown"
        return "LARGER than chance" if abs(self.points) > STANDARD_ERRORS * self.stderr else "within chance"


@dataclass(frozen=True)
class Table:
    """A run beside published rows.

    Attributes:
        run: the run.
        scores: task of a column -> the run's score; without the columns that the run lacks.
        rows: the published rows to compare with.
        others: task -> its metrics, of the tasks that are no column of a published table; values are means over seeds.
        several: task of a column -> its metrics of several answers (report/several.py), of the column's filter.
    """

    run: Run
    scores: Mapping[str, Score]
    rows: Sequence[Published]
    others: Mapping[str, Sequence[Metric]]
    several: Mapping[str, Sequence[Metric]]

    @property
    def model(self) -> str:
        """The checkpoint, as the user named it; "?" where the run does not say."""
        return str(self.run.settings(self.run.tasks[0]).get("pretrained") or "?")

    @property
    def columns(self) -> list[Column]:
        """The columns of each published table in which the run has a score."""
        return [column for columns in TABLES if any(c.task in self.scores for c in columns) for column in columns]

    @property
    def title(self) -> str:
        """The checkpoint and the run's label."""
        return f"{self.model}, {self.run.label}"

    def as_dict(self) -> dict[str, object]:
        """Return the table as values that JSON has; scores are in per cent."""
        return {
            "run": self.run.label,
            "model": self.model,
            "columns": [self._column(column) for column in self.columns],
            "others": [
                {"task": task, "questions": self.answered(task), **asdict(each)}
                | ({} if math.isfinite(each.value) else {"value": None})  # JSON has neither NaN nor infinity
                for task, found in self.others.items()
                for each in found
            ],
        }

    def answered(self, task: str) -> int | None:
        """The number of questions (documents) of a task that were answered; None where the file does not say."""
        return self.run.results_of(task).answered(task)

    def _column(self, column: Column) -> dict[str, object]:
        score = self.scores.get(column.task)
        compared = []
        for row in self.rows:
            value = row.scores.get(column.task)
            found = None if value is None or score is None else difference(score, column, value)
            compared.append(
                {
                    "name": row.name,
                    "source": row.source,
                    "score": value,
                    "difference": None if found is None else found.points,
                    "stderr": None if found is None else found.stderr,
                    "verdict": None if found is None else found.verdict,
                }
            )
        return {
            "title": column.title,
            "task": column.task,
            "questions": None if score is None else score.questions,
            **({"answers": score.answers} if score is not None and score.answers > 1 else {}),
            "score": None if score is None else 100 * score.value,
            "stderr": None if score is None or score.stderr is None else 100 * score.stderr,
            "published": compared,
            **({"several": [asdict(each) for each in several]} if (several := self.several.get(column.task)) else {}),
        }


def read_tables(paths: Iterable[Path], rows: Sequence[Published] = ()) -> list[Table]:
    """Return a table of each run in some paths.

    Args:
        paths: results files of lm_eval, or folders that hold some.
        rows: published rows to compare with; empty: the published rows of the run's model, if there are some.

    Raises:
        UserError: as `read_runs`, or a score is not from 0 to 1.
    """
    return [_table(run, rows) for run in read_runs(paths)]


def difference(score: Score, column: Column, published: float) -> PublishedDifference:
    """Return a score's difference from a published score, which is in per cent.

    Hazard: a few answers may all be right, or all wrong, by chance; the score's standard error is then 0. So this
    standard error is taken to be at least the standard error that the published score would have on as many answers (on
    as many questions, where the score's standard error is 0).

    The published score is taken to be at least as uncertain as the run's score would be on all questions, where the
    run's standard error is not simply that of a share: where questions have several answers, and where the score is a
    mean of subjects of different sizes, such as MMLU. The standard error of a share would be too small there.
    """
    stderr = None
    if score.stderr is not None:
        questions = column.questions or score.questions
        answers = score.answers * (1 if score.of_one_seed else score.seeds) if score.stderr > 0 else 1
        of_few, of_all = (_stderr(published / 100, number * answers) or 0.0 for number in (score.questions, questions))
        own = max(score.stderr, of_few)
        of_share = _stderr(score.value, score.questions) or 0.0
        if score.answers > 1 or score.stderr > of_share * (1 + 1e-6):
            of_all = max(of_all, own * math.sqrt(score.questions / questions))
        stderr = 100 * math.hypot(own, of_all)
    return PublishedDifference(100 * score.value - published, stderr)


def render(table: Table, width: int | None = None, markdown: bool = False) -> str:
    """Return a table as text, or as Markdown; `width` is as for `fitted`."""
    head = ["column", "task", "questions", "this run, %"]
    for row in table.rows:
        head += [f"{row.name}, %", "difference" if len(table.rows) == 1 else f"difference from {row.name}"]
    scores = [(column, table.scores.get(column.task)) for column in table.columns]
    lines = [_cells(column, score, table.rows) for column, score in scores]
    notes = [note for column, score in scores if score is not None for note in _notes(column, score, table.rows)]
    title, told = table.title, []
    if not lines:
        told = [
            "No task of the run is a column of a published table. The groups sdar_bench, sdar_sci, sdar_sci_s, trado, "
            "trado_static and trado_think have the columns."
        ]
    elif table.rows:
        title += " beside " + "; ".join(f"{row.name} ({row.source})" for row in table.rows)
    else:
        told = [f"No published model is named {table.model}. --published NAME compares with a published model."]
    rows = _grid([head, *lines], {0, 1, *range(5, len(head), 2)}, width, markdown, 1) if lines else []
    several, (others, notes_of_others) = _several(table, width, markdown), _others(table, width, markdown)
    if markdown:
        title = f"## {escaped(title)}"
        told = list(map(escaped, told))
        notes, notes_of_others = ([f"- {escaped(note)}" for note in each] for each in (notes, notes_of_others))
    parts = [[title], told, rows, notes, several, others, notes_of_others]
    return printable("\n\n".join("\n".join(part) for part in parts if part))


def _grid(
    rows: Sequence[Sequence[str]], left: Collection[int], width: int | None, markdown: bool, names: int | None = None
) -> list[str]:
    return as_markdown(rows, left) if markdown else fitted(rows, left, width, names)


def _cells(column: Column, score: Score | None, rows: Sequence[Published]) -> list[str]:
    """A column of the published table as a line, with the cells of each published row."""
    cells = [column.title, column.task, "", "not run"]
    if score is not None:
        cells[2:] = [f"{score.questions:,}", with_error(score.value, score.stderr, 100)]
    for row in rows:
        published = row.scores.get(column.task)
        if published is None:
            cells += ["", ""]
        elif score is None:
            cells += [f"{published:.1f}", ""]
        else:
            found = difference(score, column, published)
            cells += [f"{published:.1f}", f"{with_error(found.points, found.stderr, sign='+')}, {found.verdict}"]
    return cells


def _notes(column: Column, score: Score, rows: Sequence[Published]) -> list[str]:
    """What a score is the mean of, and what besides chance may explain its differences from published rows."""
    notes = []
    if score.answers > 1:
        notes.append(f"{column.task}: mean of {score.answers} answers to each question; the error is over questions")
    if score.seeds > 1:
        notes.append(_of_seeds(column.task, score.seeds, "that of one seed" if score.of_one_seed else "over questions"))
    for row in rows:
        if column.task in row.scores and (reasons := _reasons(column, score, row)):
            notes.append(f"{column.task} beside {row.name}: {'; '.join(reasons)}")
    return notes


def _several(table: Table, width: int | None, markdown: bool) -> list[str]:
    """The metrics of several answers to a question, a row for each task, where n is the number of answers."""
    of_tasks = {
        task: {re.sub(r"majority@\d+", "majority@n", each.name): each for each in found}
        for task, found in table.several.items()
    }
    names = sorted({name for found in of_tasks.values() for name in found}, key=_place)
    rows = [
        [task, str(table.scores[task].answers), *(_shown(found[name]) if name in found else "" for name in names)]
        for task, found in of_tasks.items()
    ]
    head = ["several answers", "n", *(f"{name}, %" for name in names)]
    return _grid([head, *rows], {0}, width, markdown) if rows else []


def _place(metric: str) -> tuple[bool, int, str]:
    """Sorts pass@k by k, and before the others."""
    match = re.fullmatch(r"pass@(\d+)", metric)
    return match is None, -1 if match is None else int(match[1]), metric if match is None else ""


def _others(table: Table, width: int | None, markdown: bool) -> tuple[list[str], list[str]]:
    """The scores of tasks that no published table has, and notes on them."""
    rows = [
        [task, each.name, each.filter, _count(table.answered(task)), _shown(each)]
        for task, found in table.others.items()
        for each in found
    ]
    head = ["not in a published table", "metric", "filter", "questions", "value (shares in %)"]
    notes = [
        _of_seeds(task, seeds, "over questions" if any(each.stderr is not None for each in metrics) else "unknown")
        for task, metrics in table.others.items()
        if (seeds := len(table.run.of_tasks[task])) > 1
    ]
    return _grid([head, *rows], {0, 1, 2}, width, markdown) if rows else [], notes


def _of_seeds(task: str, seeds: int, error: str) -> str:
    return f"{task}: mean of {seeds} seeds; the error is {error}"


def _count(number: int | None) -> str:
    return "" if number is None else f"{number:,}"


def _shown(metric: Metric) -> str:
    return text_table.score(metric.value, metric.stderr, share=0 <= metric.value <= 1)


_FOREIGN = "the source used other prompts and scorers"

ERRORS = "± is one standard error."

LEGEND = (
    f"{ERRORS} LARGER than chance: the difference exceeds {STANDARD_ERRORS} standard errors of two "
    "runs on different questions.\n"
    "Where the published run answered the same questions, chance plays a smaller part: the test then errs towards "
    "`within chance`.\n"
    "Without a true difference, chance calls 1 of 20 differences LARGER. So of many differences, one LARGER proves "
    "little."
)


def _table(run: Run, rows: Sequence[Published]) -> Table:
    scores: dict[str, Score] = {}
    several: dict[str, list[Metric]] = {}
    used: set[str] = set()
    for column in itertools.chain.from_iterable(TABLES):
        # A results file may hold the newest results of one task, and results of another task that newer ones replace.
        newest = [
            each for each in run.results if all(each in run.of_tasks.get(task, []) for task in _tasks_of(each, column))
        ]
        found = [(results, _score(results, column)) for results in newest]
        known = [(results, score) for results, score in found if score is not None]
        if not known:
            if column.task in run.tasks:
                file = run.results_of(column.task).file
                logger.warning(
                    "%s has no %s of %s, which the table needs. Evaluate the task again%s.",
                    file,
                    column.metric,
                    column.task,
                    "" if run.is_scored(column.task) else ", without --predict_only",
                )
            continue
        first, score = known[0]
        mean = sum(each.value for _, each in known) / len(known)
        score = replace(score, value=mean, seeds=len(known))
        if score.seeds > 1:
            stderr = _stderr_of_seeds(run, _tasks_of(first, column), column.metric)
            score = replace(score, of_one_seed=stderr is None, stderr=score.stderr if stderr is None else stderr)
        scores[column.task] = score
        if found_several := _several_of(first, column):
            several[column.task] = found_several
        used |= {column.task, *_tasks_of(first, column)}
    others = {task: over_seeds(run, task) for task in run.tasks if task not in used}
    if not rows:
        own = published_as(str(run.settings(run.tasks[0]).get("pretrained")))
        rows = [row for row in own if (row.scores.keys() - row.foreign) & scores.keys()]
    return Table(run, scores, rows, others, several)


def _stderr_of_seeds(run: Run, tasks: Sequence[str], metric: str) -> float | None:
    """The standard error over all seeds of the mean of some tasks' scores; None without samples."""
    found = [each.stderr for task in tasks for each in over_seeds(run, task) if each.key.in_results == metric]
    known = [each for each in found if each is not None]
    return math.hypot(*known) / len(tasks) if len(known) == len(tasks) else None


def _several_of(results: Results, column: Column) -> list[Metric]:
    if column.task not in results.scores.content:
        return []
    filter_name = column.metric.partition(",")[2]
    return [
        each for each in metrics_of(results, column.task) if is_of_several(each.name) and each.filter == filter_name
    ]


def _tasks_of(results: Results, column: Column) -> list[str]:
    """The tasks whose scores a column averages: the tasks of the column's group, or the column's own task."""
    return results.groups.get(column.task, [column.task])


def _score(results: Results, column: Column) -> Score | None:
    """The column's score in a results file; None where the file has none. A group's score is its tasks' mean."""
    tasks = _tasks_of(results, column)
    values, questions = [], []
    errors: list[float | None] = []
    for task in tasks:
        metrics = results.scores.part_or_empty(task)
        value = metrics.number(column.metric)
        if value is None:
            return None
        if not 0 <= value <= 1:
            raise metrics.malformed(column.metric, "a share from 0 to 1")
        numbers = results.content.part("n-samples").part(task)
        answered = numbers.whole("effective")
        if answered is None or answered < 1:
            raise numbers.malformed("effective", "a whole number above 0")
        values.append(value)
        questions.append(answered)
        name, _, filter_name = column.metric.partition(",")
        stderr = metrics.content.get(f"{name}_stderr,{filter_name}")  # "N/A" where lm_eval computed none
        if isinstance(stderr, (int, float)) and math.isfinite(stderr):
            errors.append(stderr)
        else:
            errors.append(None if column.weighted else _stderr(value, answered))
    known = [error for error in errors if error is not None]
    return Score(
        value=sum(values) / len(values),
        stderr=math.hypot(*known) / len(tasks) if len(known) == len(tasks) else None,
        questions=sum(questions),
        shots=results.content.part_or_empty("n-shot").whole(tasks[0]),
        settings=results.decoding_of(tasks[0]).content,
        answers=results.content.part_or_empty("configs").part_or_empty(tasks[0]).whole("repeats") or 1,
    )


def _stderr(value: float, questions: int) -> float | None:
    """Standard error of a mean of zeros and ones, as lm_eval computes it; None for a single question."""
    return math.sqrt(value * (1 - value) / (questions - 1)) if questions > 1 else None


def _reasons(column: Column, score: Score, row: Published) -> list[str]:
    """What besides chance may explain a difference from a published row; empty where nothing is known."""
    found = [
        f"{name}={spelled(score.settings[name])} (published: {spelled(value)})"
        for name, value in row.decoding.items()
        if name in score.settings and score.settings[name] != value
    ]
    caveat = _FOREIGN if column.task in row.foreign else row.caveat
    if not caveat and score.shots not in (None, column.shots):
        found.insert(0, f"num_fewshot={score.shots} (published: {column.shots})")
    if column.questions is not None and score.questions < column.questions:
        found.insert(0, f"{score.questions:,} of {column.questions:,} questions")
    return found + [each for each in (caveat, column.caveat) if each]
