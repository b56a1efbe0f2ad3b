"""The state of an evaluation: each request's task, and the account of what was done.

lm_eval hands a model bare requests. `hooks.py` and `task_methods.py` learn the rest from lm_eval.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from lm_eval.api.instance import Instance

from sdar_lm_eval.lm.account import Account
from sdar_lm_eval.lm.task_requests import TaskRequests

T = TypeVar("T")


@dataclass
class Evaluation:
    """The state of an evaluation in this process.

    Attributes:
        account: what was done.
        tasks: name -> the tasks whose requests lm_eval built.
        over: whether the evaluation has ended; requests that come now belong to no evaluation.
    """

    account: Account
    tasks: dict[str, TaskRequests] = field(default_factory=dict)
    over: bool = False
    _of_requests: dict[int, tuple[TaskRequests, Instance]] = field(default_factory=dict, repr=False)

    def add(self, task: TaskRequests, requests: Iterable[Instance]) -> None:
        """Note a task and its requests."""
        self.tasks[task.name] = task
        if task.decoding:
            self.account.published[task.name] = dict(task.decoding)
        # The request is kept too: Python may give its id to another object once the request is gone.
        self._of_requests |= {id(request): (task, request) for request in requests}

    def task_of(self, request: Instance) -> TaskRequests:
        """The task of a request; only the task's name is known where lm_eval built the request in no evaluation."""
        found = self._of_requests.get(id(request))
        return TaskRequests(name=str(request.task_name)) if found is None else found[0]

    def next(self, seed: int) -> Evaluation:
        """The evaluation after this one. The time of loading goes to the first evaluation that has counts."""
        following = Account(seed)
        if not self.account.counts.tasks:
            following.counts.load_seconds = self.account.counts.load_seconds
        return Evaluation(following)

    def end(self) -> None:
        """Forget the tasks and their requests; the account stays."""
        self.over = True
        self.tasks.clear()
        self._of_requests.clear()

    def answer_own(
        self, requests: Sequence[Instance], answer: Callable[[Sequence[Instance]], Sequence[T]], blank: T
    ) -> list[T]:
        """Answer the requests of this rank's documents. Nobody reads a borrowed document's answer, so it is blank."""
        answers = iter(answer([request for request in requests if not self.task_of(request).borrowed]))
        return [blank if self.task_of(request).borrowed else next(answers) for request in requests]

    def without_borrowed(self, of_tasks: object) -> object:
        """lm_eval's samples or metrics by task, without those of borrowed documents; other objects as they are."""
        if not isinstance(of_tasks, dict):
            return of_tasks
        borrowed = {task.name for task in self.tasks.values() if task.borrowed}
        return {task: _emptied(found) if task in borrowed else found for task, found in of_tasks.items()}

    def in_document_order(self, parts: list[object]) -> list[object]:
        """Return the ranks' samples or metrics in the order of one process: the first part has all, the others none.

        lm_eval puts rank after rank. Bootstrapped standard errors and lm_eval's hash of a task depend on the order.

        Args:
            parts: what each rank sent, task -> samples or metrics. Rank r of n has the documents r, r + n, r + 2n, …
        """
        of_ranks = [part for part in parts if isinstance(part, dict) and part.keys() == self.tasks.keys()]
        if len(of_ranks) < len(parts):
            return parts
        united = {task: _united([of_rank[task] for of_rank in of_ranks]) for task in self.tasks}
        emptied = {task: _emptied(found) for task, found in united.items()}
        return [united, *[emptied] * (len(parts) - 1)]


def _united(found: Sequence[Any]) -> dict[object, list[object]] | list[object]:
    """A task's metrics or samples of all ranks; a metric that some documents lack may be missing on a rank."""
    if isinstance(found[0], dict):
        names = dict.fromkeys(name for of_rank in found for name in of_rank)
        return {name: _in_turn([of_rank.get(name, []) for of_rank in found]) for name in names}
    samples = _in_turn(found)
    filters = list(dict.fromkeys(sample["filter"] for sample in samples))
    return sorted(samples, key=lambda sample: (filters.index(sample["filter"]), sample["doc_id"]))


def _in_turn(of_ranks: Sequence[Sequence[Any]]) -> list[Any]:
    missing = object()
    turns = itertools.zip_longest(*of_ranks, fillvalue=missing)
    return [value for turn in turns for value in turn if value is not missing]


def _emptied(found: object) -> dict[object, list[object]] | list[object]:
    """A task's metrics by name (a mapping) or its samples (a list), without any values."""
    return {name: [] for name in found} if isinstance(found, dict) else []
