"""Compares two runs on the documents that both answered: differences, intervals, tests, settings that differ, warnings.

`compare_runs` needs samples of both runs (`--log_samples`). The runs may be of any model that lm_eval evaluates.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sdar_lm_eval.errors import UserError, did_you_mean, listed
from sdar_lm_eval.report.groups import groups_of, pooled, task_of
from sdar_lm_eval.report.pairing import (
    LOST,
    DocumentKey,
    Scores,
    TaskScores,
    document_warnings,
    documents_in_words,
    read_pair,
)
from sdar_lm_eval.report.runs import SEEDS, MetricKey, Run, differing
from sdar_lm_eval.report.several import smaller_passes
from sdar_lm_eval.report.speed import RunSpeed, speed_of
from sdar_lm_eval.report.statistics import (
    FEWEST_IN_STRATUM,
    FloatArray,
    cluster_values,
    compare_means,
    compare_shares,
    holm,
    mean_stderr,
    stratified_stderr,
    weights_of_strata,
)

EXACT, PAIRED_T = "exact McNemar", "paired t"


@dataclass(frozen=True)
class Difference:
    """The difference between two runs, run b minus run a, in one metric of one task.

    Attributes:
        task: the task.
        metric: the metric's name.
        filter: the filter whose output was scored.
        a: run a's value over the paired documents; over all documents of run a where there is no test.
        a_stderr: standard error of `a`, clustered by document; None where it is unknown.
        b: run b's value, likewise.
        b_stderr: standard error of `b`, likewise.
        difference: b - a; NaN where one of them is not finite, or where they are over different documents.
        low: lower end of the difference's paired 95% interval; None where there is no interval.
        high: upper end of that interval.
        p: two-sided p of the test; None where there is no test.
        p_holm: p after Holm's adjustment over the family's tests, in the comparison or all comparisons of `adjusted`.
        test: "exact McNemar" or "paired t", or the reason why there is no test.
        documents: number of paired documents that have a value of the metric in both runs.
        only_a: number of documents that run a alone has right; None where scores are not 0 or 1.
        only_b: number of documents that run b alone has right; None where `only_a` is None.
        detectable: smallest true difference that the test finds with probability 0.8; None where it is unknown.
        higher_is_better: whether higher values are better; None where the results files do not say.
        equal_filters: further filters of the metric that give each document the same score as `filter`, in each run.
        family: the smallest group that contains the task (or the group) and has a test of the metric; "" where none
            does. A test within a group is exploratory.
    """

    task: str
    metric: str
    filter: str
    a: float
    a_stderr: float | None
    b: float
    b_stderr: float | None
    difference: float
    low: float | None
    high: float | None
    p: float | None
    p_holm: float | None
    test: str
    documents: int
    only_a: int | None
    only_b: int | None
    detectable: float | None
    higher_is_better: bool | None
    equal_filters: tuple[str, ...] = ()
    family: str = ""

    @property
    def key(self) -> MetricKey:
        """The metric and its filter."""
        return MetricKey(self.metric, self.filter)


@dataclass(frozen=True)
class Comparison:
    """What differs between two runs.

    Attributes:
        a: the baseline.
        b: the run that is compared with the baseline.
        settings: the settings that differ: name -> (a's value, b's value), None where a run lacks the setting. A
            setting that differs in some tasks only has the name "name (task)".
        warnings: sentences about what else than the settings may explain differences between run A and run B.
        differences: the differences of tasks, in the order of a's tasks and metrics.
        groups: the differences of groups of tasks that both runs have; `Difference.task` is the group's name.
        speeds: task -> the speeds of run a and run b, of tasks in which the runs have the same documents.
    """

    a: Run
    b: Run
    settings: dict[str, tuple[object, object]]
    warnings: tuple[str, ...]
    differences: tuple[Difference, ...]
    groups: tuple[Difference, ...] = ()
    speeds: Mapping[str, tuple[RunSpeed, RunSpeed]] = dataclasses.field(default_factory=dict)

    @property
    def rows(self) -> tuple[Difference, ...]:
        """The differences in the order of a table's rows: those of groups first."""
        return (*self.groups, *self.differences)


def compare_runs(
    a: Run,
    b: Run,
    *,
    tasks: Collection[str] = (),
    metrics: Collection[str] = (),
    filters: Collection[str] = (),
) -> Comparison:
    """Compare two runs on the documents that both answered.

    Args:
        a: the baseline.
        b: the run that is compared with the baseline.
        tasks: names of tasks or groups of tasks; empty: all tasks that both runs have.
        metrics: names of metrics; empty: all, but of a task's pass@k of several answers only the largest k. A test of
            each k would cost the others power, by Holm's adjustment.
        filters: names of filters; empty: all.

    Returns:
        The comparison, with Holm's adjustment over the tests of each family. A warning names a task that cannot be
        compared.

    Raises:
        UserError: the runs share no task, metric or document, or one has no samples, or a samples file cannot be read.
    """
    shared = _shared_tasks(a, b, tasks)
    warnings = [
        f"Run {name} alone has {listed(alone)}."
        for name, run, other in (("A", a, b), ("B", b, a))
        if not tasks and (alone := [task for task in run.tasks if task not in other.of_tasks])
    ]
    differences: list[Difference] = []
    problems: list[UserError] = []
    read: dict[str, tuple[TaskScores, TaskScores]] = {}
    for task in shared:
        try:
            _require_shared_metric(a, b, task)
            scores_a, scores_b = read_pair(a, b, task)
            paired = _paired(a, b, task, scores_a, scores_b)
        except UserError as error:  # other tasks may be comparable
            problems.append(error)
            continue
        read[task] = scores_a, scores_b
        warnings += document_warnings(a, b, task, scores_a, scores_b, paired)
        differences += _differences(task, scores_a, scores_b, paired, metrics, filters)
    if not differences and problems:
        raise problems[0]
    if not differences:
        raise _nothing_chosen(a, b, shared, metrics, filters)
    warnings += [f"{error} The task is left out." for error in problems]
    groups = _groups(a, b, read, metrics, filters)
    settings = differing_settings(a, b, shared)
    speeds = {
        task: (speed_of(a, task), speed_of(b, task))
        for task, (scores_a, scores_b) in read.items()
        if scores_a.documents.keys() == scores_b.documents.keys()  # a run's speed is over all of its documents
    }
    of_tasks, of_groups = (_with_families(rows, groups, a) for rows in (differences, groups))
    return adjusted([Comparison(a, b, settings, tuple(warnings), of_tasks, of_groups, speeds)])[0]


def adjusted(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Return comparisons that are shown together, with Holm's adjustment over each family's tests in all of them.

    A group and its tasks in one family would make the group's own test hopeless: MMLU has 57 tasks.
    """
    rows = [each for comparison in comparisons for each in comparison.rows]
    p_of: dict[str, list[float]] = {}
    for each in rows:
        if each.p is not None:
            p_of.setdefault(each.family, []).append(each.p)
    p_holm = {family: iter(holm(p)) for family, p in p_of.items()}
    new = (each if each.p is None else dataclasses.replace(each, p_holm=next(p_holm[each.family])) for each in rows)
    return [
        dataclasses.replace(
            comparison,
            groups=tuple(next(new) for _ in comparison.groups),
            differences=tuple(next(new) for _ in comparison.differences),
        )
        for comparison in comparisons
    ]


def differing_settings(a: Run, b: Run, tasks: Iterable[str]) -> dict[str, tuple[object, object]]:
    """Return the settings that differ: name -> (a's value, b's value), as `Comparison.settings`.

    Where a run has several repeats, the first of several seeds with the same values stands for these seeds.
    """
    of_tasks: dict[str, dict[str, tuple[object, object]]] = {}
    for task in tasks:
        found_of = {name: (one, other) for name, (one, other) in differing([a.told(task), b.told(task)]).items()}
        if len(a.of_tasks[task]) > 1 or len(b.of_tasks[task]) > 1:
            seeds = {found_of[name]: name for name in reversed(SEEDS) if name in found_of}
            found_of = {n: its for n, its in found_of.items() if n not in SEEDS or seeds[its] == n}
        of_tasks[task] = found_of
    found: dict[str, tuple[object, object]] = {}
    for task, settings in of_tasks.items():
        for name, values in settings.items():
            everywhere = all(other.get(name) == values for other in of_tasks.values())
            found[name if everywhere else f"{name} ({task})"] = values
    return found


def _shared_tasks(a: Run, b: Run, tasks: Collection[str]) -> list[str]:
    shared = [task for task in a.tasks if task in b.of_tasks]
    if not shared:
        raise UserError(
            f"{a.label} and {b.label} share no task: the first has {listed(a.tasks)}, the second {listed(b.tasks)}. "
            "Evaluate one of these tasks with both."
        )
    groups = groups_of(a)
    for task in tasks:
        if task not in shared and not set(groups.get(task, ())) & set(shared):
            hint = did_you_mean(task, shared)
            raise UserError(f"--tasks {task}: the runs do not share this task; choose {', '.join(shared)}.{hint}")
    chosen = {task for name in tasks for task in groups.get(name, [name])}
    return [task for task in shared if not tasks or task in chosen]


def _groups(
    a: Run,
    b: Run,
    read: Mapping[str, tuple[TaskScores, TaskScores]],
    metrics: Collection[str],
    filters: Collection[str],
) -> list[Difference]:
    """The differences of the groups that have the same tasks in both runs, and whose tasks were all read."""
    found, of_b = [], groups_of(b)
    for group, tasks in groups_of(a).items():
        if set(tasks) == set(of_b.get(group, ())) and all(task in read for task in tasks):
            scores_a, scores_b = (pooled(run, group, {t: read[t][i] for t in tasks}) for i, run in enumerate((a, b)))
            paired = [key for key in scores_a.documents if key in scores_b.documents]
            found += _differences(group, scores_a, scores_b, paired, metrics, filters)
    return found


def _with_families(rows: Sequence[Difference], groups: Sequence[Difference], run: Run) -> tuple[Difference, ...]:
    """The rows with their families."""
    tasks_of = {group: frozenset(tasks) for group, tasks in groups_of(run).items()}
    tested = {(each.task, each.metric) for each in groups if each.p is not None}

    def family(row: Difference) -> str:
        own = tasks_of.get(row.task, frozenset([row.task]))
        above = [
            group
            for group, tasks in tasks_of.items()
            if (group, row.metric) in tested and own <= tasks and (row.task not in tasks_of or own != tasks)
        ]
        return min(above, key=lambda group: len(tasks_of[group]), default="")

    return tuple(dataclasses.replace(row, family=family(row)) for row in rows)


def _nothing_chosen(
    a: Run, b: Run, tasks: Iterable[str], metrics: Collection[str], filters: Collection[str]
) -> UserError:
    """The error for runs that share none of the metrics and filters that the user named."""
    of_a, of_b = ([key for task in tasks for key in _metric_keys(run, task)] for run in (a, b))
    shared = [key for key in dict.fromkeys(of_a) if key in of_b]
    asked = [f"--metric {', '.join(metrics)}"] * bool(metrics) + [f"--filter {', '.join(filters)}"] * bool(filters)
    return UserError(f"{' and '.join(asked)}: the runs share no such score; choose from {listed(shared)}.")


def _metric_keys(run: Run, task: str) -> list[MetricKey]:
    return [metric.key for metric in run.metrics(task)]


def _require_shared_metric(a: Run, b: Run, task: str) -> None:
    for run in (a, b):
        run.require_scores(task)
    of_a, of_b = _metric_keys(a, task), _metric_keys(b, task)
    if set(of_a).isdisjoint(of_b):
        raise UserError(
            f"{task}: {a.label} and {b.label} share no metric: the first has {listed(of_a)}, the second "
            f"{listed(of_b)}. Evaluate both with one version of the task."
        )


def _paired(a: Run, b: Run, task: str, scores_a: TaskScores, scores_b: TaskScores) -> list[DocumentKey]:
    paired = [key for key in scores_a.documents if key in scores_b.documents]
    if not paired:
        raise UserError(
            f"{task}: {a.label} and {b.label} answered no common document. Evaluate the same documents with both: the "
            "same data set, --limit or --samples."
        )
    return paired


def _differences(
    task: str,
    scores_a: TaskScores,
    scores_b: TaskScores,
    paired: Sequence[DocumentKey],
    metrics: Collection[str],
    filters: Collection[str],
) -> list[Difference]:
    found: dict[Hashable, Difference] = {}  # the metric's key, or the metric's name and both runs' values -> a row
    left_out = set() if metrics else smaller_passes(key.name for key in scores_a.scores.keys() & scores_b.scores.keys())
    for metric, of_a in scores_a.scores.items():
        of_b = scores_b.scores.get(metric)
        is_wanted = metric.name in (metrics or [metric.name]) and metric.filter in (filters or [metric.filter])
        if of_b is None or metric.name in left_out or not is_wanted:
            continue
        keys = [key for key in paired if key in of_a.answers and key in of_b.answers]
        means = of_a.means & of_b.means
        flaw = of_a.flaw or of_b.flaw or ("" if means else "the runs average the metric differently")
        if flaw or not keys:
            found[metric] = _untested(task, of_a, of_b, len(keys), flaw or "no document has a value in both runs")
            continue
        answers_a, answers_b = [of_a.answers[key] for key in keys], [of_b.answers[key] for key in keys]
        by_answer = "answers" in means and "documents" not in means
        values_a, values_b = cluster_values(answers_a, by_answer), cluster_values(answers_b, by_answer)
        values = (metric.name, values_a.tobytes(), values_b.tobytes())
        if (equal := found.get(values)) is not None:
            found[values] = dataclasses.replace(equal, equal_filters=(*equal.equal_filters, metric.filter))
        elif means == {"tasks"}:
            tasks = [task_of(key) for key in keys]
            found[values] = _tested_by_task(task, of_a, of_b, values_a, values_b, tasks)
        else:
            single = all(len(each) == 1 for each in (*answers_a, *answers_b))
            found[values] = _tested(task, of_a, of_b, values_a, values_b, single)
    rows = list(found.values())
    if len(paired) == len(scores_a.documents) == len(scores_b.documents):
        return rows
    return [each if each.p is not None or each.test.startswith(LOST) else _of_other_documents(each) for each in rows]


def _of_other_documents(untested: Difference) -> Difference:
    """A row without a test, whose values are over all documents of each run, where the runs have other documents."""
    why = f"{untested.test}, and the values are over different documents"
    return dataclasses.replace(untested, difference=math.nan, test=why)


def _tested_by_task(
    group: str, of_a: Scores, of_b: Scores, values_a: FloatArray, values_b: FloatArray, tasks: Sequence[str]
) -> Difference:
    """The difference of a group whose value is the mean of its tasks' means; `tasks` are the documents' tasks."""
    smallest, documents = min(Counter(tasks).items(), key=lambda item: item[1])
    if documents < FEWEST_IN_STRATUM:
        why = f"the group weighs its tasks equally, and {smallest} has only {documents_in_words(documents)}"
        return _untested(group, of_a, of_b, len(tasks), why)
    weights = weights_of_strata(tasks)
    weighted = _tested(group, of_a, of_b, weights * values_a, weights * values_b, single=False)
    stderr_a, stderr_b = stratified_stderr(values_a, tasks), stratified_stderr(values_b, tasks)
    return dataclasses.replace(weighted, a_stderr=stderr_a, b_stderr=stderr_b)


def _tested(
    task: str, of_a: Scores, of_b: Scores, values_a: FloatArray, values_b: FloatArray, single: bool
) -> Difference:
    better = of_a.metric.higher_is_better if of_a.metric.higher_is_better is not None else of_b.metric.higher_is_better
    only_a = only_b = None
    right_or_wrong = single and bool(np.isin(values_a, (0, 1)).all() and np.isin(values_b, (0, 1)).all())
    if right_or_wrong:
        more_a, more_b = int((values_a > values_b).sum()), int((values_b > values_a).sum())
        result = compare_shares(more_a, more_b, len(values_a))
        only_a, only_b = (more_b, more_a) if better is False else (more_a, more_b)
    else:
        result = compare_means(values_a, values_b)
    return Difference(
        task=task,
        metric=of_a.metric.name,
        filter=of_a.metric.filter,
        a=float(values_a.mean()),
        a_stderr=mean_stderr(values_a),
        b=float(values_b.mean()),
        b_stderr=mean_stderr(values_b),
        difference=result.difference,
        low=result.low,
        high=result.high,
        p=result.p,
        p_holm=result.p,
        test=EXACT if right_or_wrong else PAIRED_T,
        documents=len(values_a),
        only_a=only_a,
        only_b=only_b,
        detectable=result.detectable,
        higher_is_better=better,
    )


def _untested(task: str, of_a: Scores, of_b: Scores, documents: int, why: str) -> Difference:
    a, b = of_a.metric, of_b.metric
    return Difference(
        task=task,
        metric=a.name,
        filter=a.filter,
        a=a.value,
        a_stderr=a.stderr,
        b=b.value,
        b_stderr=b.stderr,
        difference=b.value - a.value if math.isfinite(a.value) and math.isfinite(b.value) else math.nan,
        low=None,
        high=None,
        p=None,
        p_holm=None,
        test=why,
        documents=documents,
        only_a=None,
        only_b=None,
        detectable=None,
        higher_is_better=a.higher_is_better,
    )
