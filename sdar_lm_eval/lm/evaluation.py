"""What lm_eval keeps from its models: which evaluation, task and document a request belongs to.

lm_eval hands a model bare requests. It does not say that another evaluation has begun, whether a prompt is in the chat
template, what its system instruction is, or which documents `--samples` chose. All of that passes through two calls:
`evaluate(lm, task_dict, …)` and each task's `build_all_requests`. `watch` wraps the first for the models of this
package, and the wrapper puts itself before the second while that evaluation lasts. Other models' evaluations pass.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Literal, Protocol, runtime_checkable

from sdar_lm_eval.errors import UserError, did_you_mean
from sdar_lm_eval.report.counts import Counts

TemplatedBy = Literal["lm_eval", "sdar_lm_eval"]


@dataclass(frozen=True)
class TaskRequests:
    """What lm_eval knows of a task's requests beside the requests themselves.

    Attributes:
        name: of the task.
        templated_by: who asked for the chat template: lm_eval's user (`--apply_chat_template`), this package
            (chat_template=auto or on), or None where prompts are plain text.
        documents: the documents that `--samples` chose, ascending; None where all or the first ones are evaluated.
        scored: it asks for log-likelihoods, not for answers.
        borrowed: this rank has no document of the task; its only request is a copy of another rank's.
        decoding: the decoding of the task's published protocol (`metadata: {sdar_decoding: …}` of its YAML).
    """

    name: str
    templated_by: TemplatedBy | None = None
    documents: tuple[int, ...] | None = None
    scored: bool = False
    borrowed: bool = False
    decoding: Mapping[str, Any] | None = None

    def document(self, doc_id: int) -> int:
        """The document's place in the data set; lm_eval counts among the chosen ones."""
        return doc_id if self.documents is None else self.documents[doc_id]


@dataclass
class SentPrompts:
    """What was sent for a task.

    Attributes:
        tokens: document -> hashes of its requests' token ids.
        example: the first prompt as text.
        templated_by: who put the prompts into the chat template.
    """

    tokens: dict[int, list[str]] = field(default_factory=dict)
    example: str | None = None
    templated_by: TemplatedBy | None = None

    def add(self, document: int, prompt: str, token_ids: Sequence[int], templated_by: TemplatedBy | None) -> None:
        """Note a request."""
        self.templated_by = templated_by
        self.tokens.setdefault(document, []).append(hashlib.sha256(json.dumps(token_ids).encode()).hexdigest()[:16])
        self.example = prompt if self.example is None else self.example


@dataclass
class Evaluation:
    """What is known of an evaluation, and what was done in it.

    Attributes:
        seed: of what is sampled.
        tasks: whose requests lm_eval built.
        counts: what was computed.
        decoding: task -> how its answers were made.
        sent: task -> what was sent.
    """

    seed: int
    tasks: dict[str, TaskRequests] = field(default_factory=dict)
    counts: Counts = field(default_factory=Counts)
    decoding: dict[str, dict[str, Any]] = field(default_factory=dict)
    sent: dict[str, SentPrompts] = field(default_factory=dict)

    def sent_of(self, task: str) -> SentPrompts:
        """What was sent for a task."""
        return self.sent.setdefault(task, SentPrompts())


def facts_of_evaluation(ranks: Sequence[Evaluation], template_hash: str | None) -> dict[str, Any]:
    """Return what the results file says of an evaluation that these processes did together.

    Args:
        ranks: one a process.
        template_hash: of the checkpoint's chat template.
    """
    tasks = {name: task for of_rank in ranks for name, task in of_rank.tasks.items()}
    decoding: dict[str, Any] = {}
    prompts: dict[str, Any] = {}
    for of_rank in ranks:
        decoding |= of_rank.decoding
    for name in dict.fromkeys(name for of_rank in ranks for name in of_rank.sent):
        sent = [of_rank.sent[name] for of_rank in ranks if name in of_rank.sent]
        tokens = {document: hashes for of_rank in sent for document, hashes in of_rank.tokens.items()}
        by = sent[0].templated_by
        prompts[name] = {
            "chat_template_applied_by": by,
            "chat_template_sha256": template_hash if by else None,
            "tokens_sha256": hashlib.sha256(json.dumps(sorted(tokens.items())).encode()).hexdigest()[:16],
            "example": sent[0].example,
        }
    return {
        "decoding_of_tasks": decoding,
        "published_decoding_of_tasks": {name: dict(task.decoding) for name, task in tasks.items() if task.decoding},
        "prompts": prompts,
        "run": Counts.of_ranks([of_rank.counts for of_rank in ranks]).as_dict(),
    }


@runtime_checkable
class Watched(Protocol):
    """A model that is told of its evaluations: those of this package."""

    renders: bool
    """Whether prompts of generating tasks are to be put into the chat template where lm_eval's user did not ask."""

    @property
    def tokenizer_name(self) -> str:
        """Stands for tokenizer and template in lm_eval's cache of built requests."""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Render a conversation."""

    def check_cache(self, path: str) -> None:
        """Refuse a file of `--use_cache` that cannot be used."""

    def evaluation_begins(self, cached: bool) -> None:
        """An evaluation begins; `cached`: lm_eval keeps its answers (`--use_cache`)."""

    def task_begins(self, task: TaskRequests) -> None:
        """A task's requests are built."""


def watch(evaluator: ModuleType) -> None:
    """Have `lm_eval.evaluator.evaluate` tell watched models what they evaluate. Calling it again does nothing."""
    evaluate = evaluator.evaluate
    if hasattr(evaluate, "tells_watched_models"):
        return
    signature = inspect.signature(evaluate)

    @functools.wraps(evaluate)
    def telling(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        lm = call.arguments["lm"]
        model = getattr(lm, "lm", lm)  # --use_cache wraps the model
        if not isinstance(model, Watched):
            return evaluate(*args, **kwargs)
        if (limit := call.arguments.get("limit")) is not None and limit <= 0:
            raise UserError(
                f"--limit {limit:g}: give a number of documents above 0, or a part of them between 0 and 1."
            )
        tasks = list(_tasks_of(call.arguments["task_dict"]))
        if samples := call.arguments.get("samples"):
            call.arguments["samples"] = _ascending(samples, [task.config.task for task in tasks])
        model.evaluation_begins(cached=model is not lm)
        with contextlib.ExitStack() as stack:
            for task in tasks:
                stack.enter_context(_told(task, model))
            return evaluate(**call.arguments)

    telling.tells_watched_models = True  # type: ignore[attr-defined]
    evaluator.evaluate = telling  # type: ignore[attr-defined]
    _watch_caches()


def _watch_caches() -> None:
    """Have a watched model look at the file of `--use_cache` first: SQLite's own errors there come from a thread."""
    from lm_eval.api.model import CachingLM

    init = CachingLM.__init__

    @functools.wraps(init)
    def checking(self: Any, lm: Any, cache_db: str) -> None:
        if isinstance(lm, Watched):
            lm.check_cache(cache_db)
        init(self, lm, cache_db)

    CachingLM.__init__ = checking  # type: ignore[method-assign]


def _tasks_of(found: Any) -> Iterator[Any]:
    """The tasks in what `evaluate` takes: nested mappings, in older versions with pairs of group and task."""
    if hasattr(found, "build_all_requests"):
        yield found
    elif isinstance(found, (Mapping, tuple)):
        for value in found.values() if isinstance(found, Mapping) else found:
            yield from _tasks_of(value)


def _ascending(samples: Mapping[str, Sequence[int]], tasks: Sequence[str]) -> dict[str, list[int]]:
    """`--samples` in the order in which lm_eval takes the documents: it names the k-th answer by the k-th id.

    Raises:
        UserError: ids of a task that is not evaluated, none at all (lm_eval would evaluate everything), negative ones.
    """
    for name, ids in samples.items():
        if name not in tasks:
            raise UserError(
                f"--samples names task {name!r}, which is not evaluated.{did_you_mean(name, tasks)} "
                f"Evaluated: {', '.join(tasks)}."
            )
        if not ids or min(ids) < 0:
            raise UserError(f"--samples {name!r}: {list(ids)}; give document numbers, 0 or more, at least one.")
    return {name: sorted(set(ids)) for name, ids in samples.items()}


@contextlib.contextmanager
def _told(task: Any, model: Watched) -> Iterator[None]:
    """Put ours before a task's `build_all_requests` and `doc_iterator`, as attributes of the task, for a while."""
    borrowed: list[bool] = []
    own: dict[str, Callable[..., Any]] = {"build_all_requests": _telling_build(task, model, borrowed)}
    if lendable := _lending_iterator(task, borrowed):
        own["doc_iterator"] = lendable
    task.__dict__.update(own)
    try:
        yield
    finally:
        for name in own:
            del task.__dict__[name]


def _telling_build(task: Any, model: Watched, borrowed: Sequence[bool]) -> Callable[..., None]:
    build = task.build_all_requests

    def build_all_requests(**settings: Any) -> None:
        templated_by: TemplatedBy | None = "lm_eval" if settings.get("apply_chat_template") else None
        if templated_by is None and model.renders and task.OUTPUT_TYPE == "generate_until":
            templated_by = "sdar_lm_eval"
            settings |= {
                "apply_chat_template": True,
                "chat_template": model.apply_chat_template,
                "tokenizer_name": model.tokenizer_name,
            }
            if settings.get("fewshot_as_multiturn", False) is None:  # lm_eval's default under --apply_chat_template
                settings["fewshot_as_multiturn"] = True
        build(**settings)
        if settings.get("cache_requests"):
            _check_stored_requests(task, settings)
        chosen = settings.get("samples")
        model.task_begins(
            TaskRequests(
                name=task.config.task,
                templated_by=templated_by,
                documents=tuple(chosen) if chosen else None,
                scored=task.OUTPUT_TYPE != "generate_until",
                borrowed=any(borrowed),
                decoding=(task.config.metadata or {}).get("sdar_decoding"),
            )
        )

    return build_all_requests


def _lending_iterator(task: Any, borrowed: list[bool]) -> Callable[..., Iterator[tuple[int, Any]]] | None:
    """A `doc_iterator` by which a rank without documents borrows the first one: lm_eval refuses a rank without any.

    The rank then takes part in all that the ranks exchange; the model leaves the borrowed document out of scores and
    samples. Versions without `LM.gather_object` collect these themselves, so there nothing is lent.
    """
    from lm_eval.api.model import LM

    if not hasattr(LM, "gather_object"):
        return None
    documents_of = task.doc_iterator

    def doc_iterator(*, rank: int = 0, **settings: Any) -> Iterator[tuple[int, Any]]:
        documents = documents_of(rank=rank, **settings)
        first = list(itertools.islice(documents, 1))
        borrowed[:] = [not first and rank > 0]
        if any(borrowed):
            return itertools.islice(documents_of(rank=0, **settings), 1)
        return itertools.chain(first, documents)

    return doc_iterator


def _check_stored_requests(task: Any, settings: Mapping[str, Any]) -> None:
    """Refuse requests of another run that lm_eval took from its `--cache_requests` store for this run's.

    lm_eval's key holds neither gen_kwargs nor the documents, so its results would claim settings that were never sent.

    Raises:
        UserError: says what differs, and what to do.
    """
    from lm_eval.api.task import ConfigurableTask

    places = {name: settings[name] for name in ("rank", "limit", "world_size", "samples") if name in settings}
    documents = dict(task.doc_iterator(**places))
    stale = ""
    if any(documents.get(instance.doc_id) != instance.doc for instance in task.instances) or documents.keys() != {
        instance.doc_id for instance in task.instances
    }:
        stale = "their documents are not this run's"
    elif (
        task.OUTPUT_TYPE == "generate_until"
        and type(task).construct_requests is ConfigurableTask.construct_requests
        and (stored := next((i.args[1] for i in task.instances if i.args[1] != task.config.generation_kwargs), None))
    ):
        stale = differences(stored, task.config.generation_kwargs)
    if stale:
        raise UserError(
            f"--cache_requests: the stored requests of task {task.config.task!r} are of another run ({stale}). Build "
            "them anew with --cache_requests refresh (rewrite_requests_cache=True from Python), or leave it out."
        )


def differences(theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> str:
    """Return in words where two settings differ."""
    return "; ".join(
        f"{name} was {theirs.get(name)!r}, is {mine.get(name)!r}"
        for name in {**theirs, **mine}
        if theirs.get(name) != mine.get(name)
    )
