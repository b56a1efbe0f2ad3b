"""The state of an evaluation: each request's task, document and template, and the tokens that were sent.

lm_eval hands a model bare requests. `hooks.py` learns the rest from lm_eval and fills an `Evaluation`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from lm_eval.api.instance import Instance
from lm_eval.api.task import Task

from sdar_lm_eval.lm.account import Account, TemplatedBy
from sdar_lm_eval.report.live import Filter

T = TypeVar("T")


@dataclass(frozen=True)
class TaskRequests:
    """What lm_eval knows of a task's requests beside the requests themselves.

    Attributes:
        name: lm_eval's name of the task in this evaluation.
        templated_by: who asked for the chat template: lm_eval's user (`--apply_chat_template`), this package
            (chat_template=auto or on), or None where prompts are plain text.
        documents: the documents that `--samples` chose, ascending; None where all or the first ones are evaluated.
        scored: whether the task asks for log-likelihoods of continuations.
        borrowed: whether this rank has no document of the task; the task's only request here is a copy of another
            rank's.
        decoding: the decoding of the task's published protocol (`metadata: {sdar_decoding: …}` of its YAML).
        begins_answers: whether the task begins the answers itself (its `gen_prefix`).
        judge: the function that predicts how answers will score (`metadata: {sdar_judge: …}`, see report/live.py).
        copies: returns document -> the number of earlier documents with the same content, for documents that have
            any. Only drawn answers need these numbers, and counting reads all documents.
        filters: the task's filters by name; empty where they are unknown.
    """

    name: str
    templated_by: TemplatedBy | None = None
    documents: tuple[int, ...] | None = None
    scored: bool = False
    borrowed: bool = False
    decoding: Mapping[str, object] | None = None
    begins_answers: bool = False
    judge: Mapping[str, str] | None = None
    copies: Callable[[], Mapping[int, int]] = dict
    filters: Mapping[str, Filter] = field(default_factory=dict)

    def document(self, request: Instance) -> int:
        """The document's index in the data set; lm_eval's `doc_id` is an index into the chosen documents."""
        doc_id = int(request.doc_id or 0)
        return doc_id if self.documents is None else self.documents[doc_id]


def filters_of(task: Task) -> dict[str, Filter]:
    """Return a task's filters by name; no filter where the task's class filters in its own way."""

    def apply(ensemble: Any, doc: Mapping[str, object], text: str) -> tuple[object, str]:
        request = Instance("generate_until", dict(doc), (text,), 0, resps=[text])
        ensemble.apply([request])
        value = request.filtered_resps[ensemble.name]
        return value[0] if isinstance(value, list) and len(value) == 1 else value, str(task.doc_to_target(request.doc))

    return {each.name: functools.partial(apply, each) for each in getattr(task, "_filters", ())}


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


def _emptied(found: object) -> dict[object, list[object]] | list[object]:
    """A task's metrics by name (a mapping) or its samples (a list), without any values."""
    return {name: [] for name in found} if isinstance(found, dict) else []
