"""Scores of lm_eval's groups of tasks, document by document: the pooled documents of the group's tasks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from sdar_lm_eval.errors import UserError
from sdar_lm_eval.report.pairing import DocumentKey, Scores, TaskScores, is_value, mean_kinds, read_pair
from sdar_lm_eval.report.runs import Metric, Run, mean_value, metrics_of
from sdar_lm_eval.report.statistics import cluster_values, mean_stderr, stratified_stderr


def groups_of(run: Run) -> dict[str, list[str]]:
    """Return group -> its tasks, for each group with a score in a run; a group within a group stands for its tasks."""
    found: dict[str, list[str]] = {}
    for results in run.results:
        groups = results.groups
        for group in groups:
            tasks = list(dict.fromkeys(_tasks_in(group, groups, frozenset())))
            if tasks and group in results.scores.content and group not in run.of_tasks:
                found.setdefault(group, tasks)
    return found


def pooled(run: Run, group: str, of_tasks: Mapping[str, TaskScores]) -> TaskScores:
    """Return the scores of a group: those of the documents of all its tasks.

    A metric of the group that is a mean neither over these documents nor over the tasks' means gets a flaw
    (`Scores.flaw`).

    Args:
        run: the run.
        group: the group.
        of_tasks: the group's tasks -> their scores.
    """
    repeats = [results for results in run.results if group in results.scores.content]
    scores = {}
    for metric in metrics_of(repeats[0], group):
        parts = {task: each.scores[metric.key] for task, each in of_tasks.items() if metric.key in each.scores}
        answers = {
            pooled_key(task, each): values for task, part in parts.items() for each, values in part.answers.items()
        }
        flaw = next((part.flaw for part in parts.values() if part.flaw), "")
        if len(parts) < len(of_tasks):
            flaw = "some of the group's tasks do not have this metric"
        means = frozenset[str]()
        value, stderr = mean_value(repeats, group, metric.key), metric.stderr if len(repeats) == 1 else None
        if answers and not flaw:
            means = mean_kinds(answers.values(), value)
            of_parts = [cluster_values(list(part.answers.values())).mean() for part in parts.values()]
            if is_value(float(np.mean(of_parts)), value):
                means |= {"tasks"}
            flaw = "" if means else "the group's value is a mean neither over documents nor over tasks"
        if means and len(repeats) > 1:
            values = cluster_values(list(answers.values()), weigh_answers=means == {"answers"})
            by_task = means == {"tasks"}
            stderr = stratified_stderr(values, [task_of(key) for key in answers]) if by_task else mean_stderr(values)
        scores[metric.key] = Scores(replace(metric, value=value, stderr=stderr), answers, means, flaw)
    documents = {
        pooled_key(task, key): document for task, each in of_tasks.items() for key, document in each.documents.items()
    }
    return TaskScores(documents, scores)


def group_over_seeds(run: Run, group: str) -> list[Metric]:
    """Return a group's metrics, as means over all seeds of a run; the standard errors are as for `over_seeds`."""
    repeats = [results for results in run.results if group in results.scores.content]
    if len(repeats) > 1:
        with contextlib.suppress(UserError):  # a run without samples
            of_tasks = {task: read_pair(run, run, task)[0] for task in groups_of(run)[group]}
            return [scores.metric for scores in pooled(run, group, of_tasks).scores.values()]
    return [
        replace(each, value=mean_value(repeats, group, each.key), stderr=each.stderr if len(repeats) == 1 else None)
        for each in metrics_of(repeats[0], group)
    ]


def pooled_key(task: str, key: DocumentKey) -> DocumentKey:
    """Return a document's key among the documents of all tasks."""
    return DocumentKey(f"{task}\0{key.name}", key.number)


def task_of(key: DocumentKey) -> str:
    """Return the task of a document by its `pooled_key`."""
    return key.name.partition("\0")[0]


def _tasks_in(name: str, groups: Mapping[str, Sequence[str]], above: frozenset[str]) -> Iterator[str]:
    """Yield the tasks of a group, or a task itself; `above` are the groups that contain it."""
    if name not in groups:
        yield name
        return
    for part in groups[name]:
        if part not in above | {name}:
            yield from _tasks_in(part, groups, above | {name})
