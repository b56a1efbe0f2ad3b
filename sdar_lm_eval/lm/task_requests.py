"""What lm_eval knows of a task's requests, and does not tell a model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lm_eval.api.instance import Instance
from lm_eval.api.task import Task

from sdar_lm_eval.report.live import Filter

TemplatedBy = Literal["lm_eval", "sdar_lm_eval"]


def repeats_of(request: Instance) -> int:
    """Return how many answers a request asks for, at least 1."""
    return max(request.repeats or 1, 1)


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
