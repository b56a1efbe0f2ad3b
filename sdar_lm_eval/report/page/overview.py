"""The parts of the page above its documents, for the template: runs, settings, scores, comparisons, charts."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from urllib.parse import urlencode

from sdar_lm_eval.errors import UserError
from sdar_lm_eval.report.compare import Comparison, Difference, adjusted, compare_runs
from sdar_lm_eval.report.compare_text import conclusions, p_as_text, warnings_of
from sdar_lm_eval.report.curve import chart_svg
from sdar_lm_eval.report.documents import main_key_of
from sdar_lm_eval.report.groups import group_over_seeds
from sdar_lm_eval.report.page.data import Documents
from sdar_lm_eval.report.page.embedding import allowed_in_html
from sdar_lm_eval.report.pairing import over_seeds
from sdar_lm_eval.report.points import Point, points_of
from sdar_lm_eval.report.results import Results
from sdar_lm_eval.report.runs import Metric, MetricKey, Run
from sdar_lm_eval.report.text_table import NONE, score

SHARES = ("acc", "acc_norm", "exact_match")
"""Metrics that are taken to be shares where a run has no samples that show it."""


@dataclass(frozen=True)
class SettingRow:
    """The values of a setting in some tasks.

    Attributes:
        name: the setting's name.
        tasks: the tasks in which the setting has these values; "" for all tasks.
        of_runs: the setting's value in each run, as text.
    """

    name: str
    tasks: str
    of_runs: tuple[str, ...]


@dataclass(frozen=True)
class ScoreRow:
    """The values of a metric in each run, and the number of documents: one, or each run's where the numbers differ."""

    task: str
    metric: str
    filter: str
    of_runs: tuple[str, ...]
    documents: str


@dataclass(frozen=True)
class Plot:
    """An interval `low` to `high` around a difference `at`, and the zero, in per cent of the drawing's width."""

    zero: float
    low: float
    high: float
    at: float


@dataclass(frozen=True)
class DifferenceRow:
    """A difference as text, with links to the documents that only one run has right; "" where there are none."""

    task: str
    metric: str
    filters: str
    a: str
    b: str
    difference: str
    interval: str
    plot: Plot | None
    p: str
    p_holm: str
    family: str
    test: str
    only_a: str
    only_a_link: str
    only_b: str
    only_b_link: str
    documents: str
    detectable: str


@dataclass(frozen=True)
class Pair:
    """A comparison of the first run with run number `b`: settings that differ, warnings, differences, conclusions."""

    b: int
    settings: tuple[tuple[str, str, str], ...]
    warnings: tuple[str, ...]
    rows: tuple[DifferenceRow, ...]
    conclusions: tuple[str, ...]


def key_of(number: int) -> str:
    """Return the letter that stands for a run, from 0: A to Z, then AA, AB, …"""
    rest, last = divmod(number, len(ascii_uppercase))
    return (key_of(rest - 1) if rest else "") + ascii_uppercase[last]


def settings_rows(runs: Sequence[Run], tasks: Sequence[str]) -> tuple[list[SettingRow], list[SettingRow]]:
    """Return (the settings that differ between runs, the settings that do not)."""
    of_tasks: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for task in tasks:
        settings = [run.told(task) if task in run.of_tasks else None for run in runs]
        for name in dict.fromkeys(name for each in settings for name in each or {}):
            values = tuple(NONE if each is None else shown_value(each.get(name)) for each in settings)
            of_tasks.setdefault((name, values), []).append(task)
    rows = [
        (SettingRow(name, "" if len(its) == len(tasks) else ", ".join(its), values), _of_having(values, its, runs))
        for (name, values), its in of_tasks.items()
    ]
    return [row for row, having in rows if len(set(having)) > 1], [
        SettingRow(row.name, row.tasks, having[:1]) for row, having in rows if len(set(having)) == 1
    ]


def _of_having(values: Sequence[str], tasks: Sequence[str], runs: Sequence[Run]) -> tuple[str, ...]:
    """The values of those runs that have one of the tasks."""
    return tuple(value for value, run in zip(values, runs, strict=True) if any(task in run.of_tasks for task in tasks))


def shown_value(value: object) -> str:
    """Return a setting's value as text."""
    if value is None:
        return NONE
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def speeds_of(runs: Sequence[Run], task: str) -> list[Point | None]:
    """Return each run's point in a task, by the runs' main metric; None where the run lacks the task, or any metric.

    A run that lacks the main metric has a speed all the same, and NaN as its accuracy.
    """
    main = main_key_of(runs, task)
    found: list[Point | None] = []
    for run in runs:
        keys = [metric.key for metric in run.metrics(task)] if task in run.of_tasks else []
        if main is not None and main in keys:
            found += points_of([run], task, main.in_results)
        elif keys:
            found.append(dataclasses.replace(points_of([run], task)[0], accuracy=math.nan, stderr=None))
        else:
            found.append(None)
    return found


def forwards_rows(task: str, points: Sequence[Point | None]) -> list[ScoreRow]:
    """Return the row of the runs' tokens per forward in a task; none where no run's are known."""
    values = [None if point is None else point.tokens_per_forward for point in points]
    return [_speed_row(task, "tokens per forward", values, ",.2f")] if any(values) else []


def rate_rows(points: Sequence[tuple[str, Sequence[Point | None]]]) -> list[ScoreRow]:
    """Return the row of the runs' tokens/s, which are over all tasks of a results file.

    A run whose tasks have results files of their own has several such speeds: then each task has a row.
    """
    known = [
        (task, [None if each is None else each.tokens_per_second for each in of_task])
        for task, of_task in points
        if any(each and each.tokens_per_forward for each in of_task)
    ]
    of_runs = [[value for value in of_run if value] for of_run in zip(*(values for _, values in known), strict=True)]
    if len(known) > 1 and all(len(set(of_run)) < 2 for of_run in of_runs):
        known = [("all tasks of the run", [next(iter(of_run), None) for of_run in of_runs])]
    return [_speed_row(task, "tokens/s", values, ",.0f") for task, values in known if any(values)]


def _speed_row(task: str, name: str, values: Sequence[float | None], form: str) -> ScoreRow:
    return ScoreRow(task, name, "", tuple(NONE if value is None else f"{value:{form}}" for value in values), "")


def charts_of(points: Sequence[tuple[str, Sequence[Point | None]]]) -> list[tuple[str, str]]:
    """Return (task, SVG of accuracy against speed) for tasks in which both are known of two runs."""
    found = []
    for task, of_runs in points:
        scored = [point for point in of_runs if point and math.isfinite(point.accuracy)]
        known = [_drawable(point) for point in scored if point.tokens_per_forward]
        if len(known) > 1:
            found.append((task, without_styles(chart_svg(known))))
    return found


def _drawable(point: Point) -> Point:
    """The point with names that matplotlib can draw."""
    settings = {
        name: allowed_in_html(value) if isinstance(value, str) else value for name, value in point.settings.items()
    }
    return dataclasses.replace(point, model=allowed_in_html(point.model), settings=settings)


def without_styles(svg: str) -> str:
    """Return an SVG element with attributes in the place of style attributes, which the page's policy forbids."""

    def attributes(style: re.Match[str]) -> str:
        pairs = (part.partition(":") for part in style[1].split(";") if part.strip())
        return " ".join(f'{name.strip()}="{value.strip()}"' for name, _, value in pairs)

    return re.sub(r'\bstyle="([^"]*)"', attributes, svg)


def shares(documents: Documents, task: str) -> set[MetricKey]:
    """Return the metrics of a task that are shares: the scores of all documents lie between 0 and 1."""
    found = set()
    for key, of_runs in documents.scores(task).items():
        values = [value for of_run in of_runs for value in of_run if value is not None]
        if all(0 <= value <= 1 for value in values) and (values or key.name in SHARES):
            found.add(key)
    return found


def score_rows(
    runs: Sequence[Run], points: Sequence[tuple[str, Sequence[Point | None]]], documents: Documents
) -> list[ScoreRow]:
    """Return scores and speeds: groups of tasks first, then the tasks."""
    groups = dict.fromkeys(
        name for run in runs for results in run.results for name in results.scores.content if name in results.groups
    )
    rows = []
    for group in groups:
        having = [next((each for each in run.results if group in each.scores.content), None) for run in runs]
        metrics = [
            [] if first is None else group_over_seeds(run, group) for run, first in zip(runs, having, strict=True)
        ]
        are_shares = {each.key for of_run in metrics for each in of_run if each.name in SHARES}
        rows += _rows_of(group, having, metrics, are_shares)
    for task, of_task in points:
        having = [run.results_of(task) if task in run.of_tasks else None for run in runs]
        metrics = [over_seeds(run, task) if task in run.of_tasks else [] for run in runs]
        rows += _rows_of(task, having, metrics, shares(documents, task))
        rows += forwards_rows(task, of_task)
    return rows + rate_rows(points)


def _rows_of(
    task: str,
    having: Sequence[Results | None],
    of_runs: Sequence[Sequence[Metric]],
    are_shares: set[MetricKey],
) -> list[ScoreRow]:
    cells: dict[MetricKey, list[str]] = {}
    for number, metrics in enumerate(of_runs):
        for metric in metrics:
            row = cells.setdefault(metric.key, [NONE] * len(of_runs))
            row[number] = score(metric.value, metric.stderr, share=metric.key in are_shares)
    answered = [None if first is None else first.answered(task) for first in having]
    return [
        ScoreRow(task, name, filter_name, tuple(row), _counted(row, answered))
        for (name, filter_name), row in cells.items()
    ]


def _counted(row: Sequence[str], answered: Sequence[int | None]) -> str:
    """The number of documents of the runs that have a value; each run's in turn where the numbers differ."""
    counts = [None if value == NONE else number for value, number in zip(row, answered, strict=True)]
    known = {number for number in counts if number is not None}
    if len(known) > 1:
        return " / ".join(NONE if number is None else f"{number:,}" for number in counts)
    return "".join(f"{number:,}" for number in known)


def pairs_of(runs: Sequence[Run], tasks: Sequence[str], documents: Documents) -> list[Pair]:
    """Return the comparison of each other run with the first. A warning says why two runs cannot be compared."""
    comparisons: dict[int, Comparison] = {}
    refused: list[Pair] = []
    for number, other in enumerate(runs[1:], 1):
        try:
            shared = [task for task in tasks if task in runs[0].of_tasks and task in other.of_tasks]
            comparisons[number] = compare_runs(runs[0], other, tasks=shared)
        except UserError as error:
            refused.append(Pair(number, (), (str(error),), (), ()))
    whole = zip(comparisons, adjusted(list(comparisons.values())), strict=True)
    pairs = [*refused, *(_pair(number, comparison, documents) for number, comparison in whole)]
    return sorted(pairs, key=lambda pair: pair.b)


def _pair(number: int, comparison: Comparison, documents: Documents) -> Pair:
    settings = tuple((name, shown_value(a), shown_value(b)) for name, (a, b) in comparison.settings.items())
    warnings = warnings_of(comparison, key_of(number))
    rows = _difference_rows(comparison, number, documents)
    return Pair(number, settings, warnings, rows, tuple(conclusions(comparison, key_of(number))))


def _difference_rows(comparison: Comparison, number: int, documents: Documents) -> tuple[DifferenceRow, ...]:
    shares_of = {task: shares(documents, task) for task in {each.task for each in comparison.differences}}
    of_tasks = {each: each.key in shares_of[each.task] for each in comparison.differences}
    others = {each.key for each, share in of_tasks.items() if not share}
    kinds = {each: each.key not in others for each in comparison.groups} | of_tasks
    return tuple(
        _difference_row(each, number if each in of_tasks else None, share, _ends(kinds, share))
        for each, share in kinds.items()
    )


def _ends(kinds: Mapping[Difference, bool], kind: bool) -> tuple[float, float]:
    """The ends of the axis that the differences of one kind (shares, or other values) have in common."""
    ends = [end for each, its in kinds.items() if its == kind for end in (each.low, each.high) if end is not None]
    return min([0.0, *ends]), max([0.0, *ends])


def _difference_row(each: Difference, number: int | None, share: bool, ends: tuple[float, float]) -> DifferenceRow:
    """The row of a difference, with links to the documents of run `number`; None: no links, as for a group."""
    plot, interval = None, NONE
    if each.low is not None and each.high is not None:
        interval = f"{score(each.low, None, share=share, sign='+')} to {score(each.high, None, share=share, sign='+')}"
        if ends[0] < ends[1]:
            places = (
                5 + 90 * (value - ends[0]) / (ends[1] - ends[0]) for value in (0, each.low, each.high, each.difference)
            )
            plot = Plot(*(round(place, 2) for place in places))

    def link(flag: str, count: int | None) -> str:
        if not count or number is None:
            return ""
        chosen = {"task": each.task, "score": f"{each.metric}, {each.filter}", "run": number, "show": f"changed,{flag}"}
        return "#" + urlencode(chosen)

    return DifferenceRow(
        task=each.task,
        metric=each.metric,
        filters=", ".join((each.filter, *each.equal_filters)),
        a=score(each.a, each.a_stderr, share=share),
        b=score(each.b, each.b_stderr, share=share),
        difference=score(each.difference, None, share=share, sign="+"),
        interval=interval,
        plot=plot,
        p=p_as_text(each.p) or NONE,
        p_holm=p_as_text(each.p_holm) or NONE,
        family=each.family,
        test=each.test,
        only_a=NONE if each.only_a is None else f"{each.only_a:,}",
        only_a_link=link("wrong", each.only_a),
        only_b=NONE if each.only_b is None else f"{each.only_b:,}",
        only_b_link=link("right", each.only_b),
        documents=f"{each.documents:,}",
        detectable=NONE if each.detectable is None else score(each.detectable, None, share=share),
    )
