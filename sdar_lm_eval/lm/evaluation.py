"""What lm_eval keeps from its models: which evaluation, task and document a request belongs to.

lm_eval hands a model bare requests. It does not say that another evaluation has begun, whether a prompt is in the chat
template, what its system instruction is, or which documents `--samples` chose. `watch` wraps lm_eval's
`evaluate`, `simple_evaluate` (for the seed) and `CachingLM`. While an evaluation of a model of this package lasts,
`_told` replaces methods of each task. Evaluations of other models are unchanged.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import itertools
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, ClassVar, Literal, Protocol, TypeGuard

from lm_eval.api.instance import Instance

from sdar_lm_eval.errors import UserError, did_you_mean
from sdar_lm_eval.report.counts import Counts

logger = logging.getLogger(__name__)

TemplatedBy = Literal["lm_eval", "sdar_lm_eval"]


@dataclass(frozen=True)
class TaskRequests:
    """What lm_eval knows of a task's requests beside the requests themselves.

    Attributes:
        name: lm_eval's for the task in this evaluation.
        templated_by: who asked for the chat template: lm_eval's user (`--apply_chat_template`), this package
            (chat_template=auto or on), or None where prompts are plain text.
        documents: the documents that `--samples` chose, ascending; None where all or the first ones are evaluated.
        scored: it asks for log-likelihoods of continuations.
        borrowed: this rank has no document of the task; its only request is a copy of another rank's.
        decoding: the decoding of the task's published protocol (`metadata: {sdar_decoding: …}` of its YAML).
        judge: what says how answers will score (`metadata: {sdar_judge: …}`, see report/live.py).
    """

    name: str
    templated_by: TemplatedBy | None = None
    documents: tuple[int, ...] | None = None
    scored: bool = False
    borrowed: bool = False
    decoding: Mapping[str, Any] | None = None
    judge: Mapping[str, str] | None = None

    def document(self, request: Instance) -> int:
        """The document's place in the data set; lm_eval counts among the chosen ones."""
        doc_id = int(request.doc_id or 0)
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
        tasks: whose requests lm_eval built, by lm_eval's name for them.
        counts: what was computed.
        decoding: task -> how its answers were made.
        sent: task -> what was sent.
        template_hash: of the chat template in use.
        over: it has ended; requests that come now are of no evaluation.
    """

    seed: int
    tasks: dict[str, TaskRequests] = field(default_factory=dict)
    counts: Counts = field(default_factory=Counts)
    decoding: dict[str, dict[str, Any]] = field(default_factory=dict)
    sent: dict[str, SentPrompts] = field(default_factory=dict)
    template_hash: str | None = None
    over: bool = False
    _of_requests: dict[int, tuple[TaskRequests, Instance]] = field(default_factory=dict, repr=False)

    def add(self, task: TaskRequests, requests: Iterable[Instance]) -> None:
        """Learn of a task and its requests."""
        self.tasks[task.name] = task
        self._of_requests |= {id(request): (task, request) for request in requests}  # which keeps the ids theirs

    def task_of(self, request: Instance) -> TaskRequests:
        """The task that a request is of; its name alone where lm_eval built it in no evaluation that was seen."""
        found = self._of_requests.get(id(request))
        return TaskRequests(name=str(request.task_name)) if found is None else found[0]

    def end(self) -> None:
        """Forget the requests; what was done stays."""
        self.over = True
        self._of_requests.clear()

    def sent_of(self, task: str) -> SentPrompts:
        """What was sent for a task."""
        return self.sent.setdefault(task, SentPrompts())

    def __getstate__(self) -> dict[str, Any]:
        """What other ranks get to see."""
        return self.__dict__ | {"_of_requests": {}}


def facts_of_evaluation(ranks: Sequence[Evaluation]) -> dict[str, Any]:
    """Return what the results file says of an evaluation that these processes did together.

    Args:
        ranks: one a process.
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
            "chat_template_sha256": ranks[0].template_hash if by else None,
            "tokens_sha256": hashlib.sha256(json.dumps(sorted(tokens.items())).encode()).hexdigest()[:16],
            "example": sent[0].example,
        }
    return {
        "decoding_of_tasks": decoding,
        "published_decoding_of_tasks": {name: dict(task.decoding) for name, task in tasks.items() if task.decoding},
        "prompts": prompts,
        "run": Counts.of_ranks([of_rank.counts for of_rank in ranks]).as_dict(),
    }


class Watched(Protocol):
    """A model that is told of its evaluations: those of this package."""

    watched: ClassVar[bool]
    """True. A class attribute, since reading other models' properties may raise."""

    renders: bool
    """Whether prompts of generating tasks are to be put into the chat template where lm_eval's user did not ask."""

    @property
    def tokenizer_name(self) -> str:
        """Stands for tokenizer and template in lm_eval's cache of built requests."""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Render a conversation."""

    def check_cache(self, path: str) -> None:
        """Refuse a file of `--use_cache` that cannot be used."""

    def evaluation_begins(self, *, seed: int | None, cached: bool, template: str | None) -> None:
        """An evaluation begins.

        Args:
            seed: lm_eval's for torch; None where it has none.
            cached: lm_eval keeps its answers (`--use_cache`).
            template: the name of the chat template that the user chose; None: the default one.
        """

    def task_begins(self, task: TaskRequests, requests: Sequence[Instance]) -> None:
        """A task's requests are built."""

    def evaluation_ends(self) -> None:
        """It ended, by an error or without."""


def is_watched(lm: Any) -> TypeGuard[Watched]:
    """Whether an lm_eval model is told of its evaluations."""
    return getattr(type(lm), "watched", False) is True


_seed: ContextVar[int | None] = ContextVar("torch_random_seed", default=None)


def watch(evaluator: ModuleType) -> None:
    """Have lm_eval's `evaluate` tell watched models what they evaluate. Calling it again does nothing."""
    from lm_eval.api.model import CachingLM

    evaluate, simple_evaluate = evaluator.evaluate, evaluator.simple_evaluate
    if hasattr(evaluate, "tells_watched_models"):
        return
    signature, simple_signature = inspect.signature(evaluate), inspect.signature(simple_evaluate)

    @functools.wraps(evaluate)
    def telling(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        lm = call.arguments["lm"]
        model = lm.lm if isinstance(lm, CachingLM) else lm  # --use_cache wraps the model
        if not is_watched(model):
            return evaluate(*args, **kwargs)
        _check_limit(call.arguments.get("limit"))
        tasks = _tasks_of(call.arguments["task_dict"])
        if (samples := call.arguments.get("samples")) is not None:
            call.arguments["samples"] = _ascending(samples, list(tasks))
        template = call.arguments.get("apply_chat_template")
        model.evaluation_begins(
            seed=_seed.get(), cached=model is not lm, template=template if isinstance(template, str) else None
        )
        try:
            with contextlib.ExitStack() as stack:
                for task, name in {id(task): (task, name) for name, task in tasks.items()}.values():
                    stack.enter_context(_told(task, name, model))
                return evaluate(**call.arguments)
        finally:
            model.evaluation_ends()

    @functools.wraps(simple_evaluate)
    def seeding(*args: Any, **kwargs: Any) -> Any:
        call = simple_signature.bind(*args, **kwargs)
        call.apply_defaults()
        token = _seed.set(call.arguments.get("torch_random_seed"))
        try:
            return simple_evaluate(*args, **kwargs)
        finally:
            _seed.reset(token)

    telling.tells_watched_models = True  # type: ignore[attr-defined]
    evaluator.evaluate, evaluator.simple_evaluate = telling, seeding  # type: ignore[attr-defined]
    _watch_caches()


def _watch_caches() -> None:
    """Have a watched model look at the file of `--use_cache` first: SQLite's own errors there come from a thread."""
    from lm_eval.api.model import CachingLM

    init = CachingLM.__init__

    @functools.wraps(init)
    def checking(self: Any, lm: Any, cache_db: str) -> None:
        if is_watched(lm):
            lm.check_cache(cache_db)
        init(self, lm, cache_db)

    CachingLM.__init__ = checking  # type: ignore[method-assign]


def _tasks_of(found: Any, name: str = "") -> dict[str, Any]:
    """The tasks in what `evaluate` takes, by name: nested mappings, in older versions with pairs of group and task."""
    if hasattr(found, "build_all_requests"):
        return {name or str(found.config.task): found}
    tasks: dict[str, Any] = {}
    if isinstance(found, Mapping):
        for key, value in found.items():
            tasks |= _tasks_of(value, str(key))
    elif isinstance(found, tuple):
        for value in found:
            tasks |= _tasks_of(value, name)
    return tasks


def _check_limit(limit: Any) -> None:
    if limit is not None and not (isinstance(limit, (int, float)) and limit > 0):
        raise UserError(f"--limit {limit}: give a number of documents above 0, or a part of them between 0 and 1.")


def _ascending(samples: Any, tasks: Sequence[str]) -> dict[str, list[int]]:
    """`--samples`, ascending: lm_eval takes documents in that order, and names the k-th answer by the k-th id.

    Raises:
        UserError: no mapping from tasks to document numbers, ids of a task that is not evaluated, or none at all, for
            which lm_eval would evaluate everything.
    """
    if not isinstance(samples, Mapping):
        raise UserError(f'--samples {samples}: give document numbers of tasks, such as {{"{tasks[0]}": [0, 3]}}.')
    for name, ids in samples.items():
        if name not in tasks:
            raise UserError(
                f"--samples names task {name!r}, which is not evaluated.{did_you_mean(name, tasks)} "
                f"Evaluated: {', '.join(tasks)}."
            )
        if not (isinstance(ids, (list, tuple)) and ids and all(type(i) is int and i >= 0 for i in ids)):
            raise UserError(f"--samples {name!r}: {ids}; give a list of document numbers, 0 or more, at least one.")
    return {name: sorted(set(ids)) for name, ids in samples.items()}


@contextlib.contextmanager
def _told(task: Any, name: str, model: Watched) -> Iterator[None]:
    """Put ours before three methods of a task, as attributes of the task, while an evaluation lasts."""
    borrowed: list[bool] = []
    own: dict[str, Callable[..., Any]] = {
        "build_all_requests": _telling_build(task, name, model, borrowed),
        "apply_filters": _filtering_own(task),
    }
    if lendable := _lending_iterator(task, borrowed):
        own["doc_iterator"] = lendable
    task.__dict__.update(own)
    try:
        yield
    finally:
        for attribute in own:
            del task.__dict__[attribute]


def _filtering_own(task: Any) -> Callable[[], Any]:
    """Filters without the answers to copies by which lm_eval pads a rank that has fewer documents than another."""
    apply_filters = task.apply_filters

    def filter_own() -> Any:
        for instance in task.instances:
            del instance.resps[max(instance.repeats or 1, 1) :]
        return apply_filters()

    return filter_own


def _telling_build(task: Any, name: str, model: Watched, borrowed: Sequence[bool]) -> Callable[..., None]:
    build = task.build_all_requests

    def build_all_requests(**settings: Any) -> None:
        if settings.get("cache_requests") or settings.get("rewrite_requests_cache"):
            _say_requests_are_built()
            settings |= {"cache_requests": False, "rewrite_requests_cache": False}
        templated_by: TemplatedBy | None = "lm_eval" if settings.get("apply_chat_template") else None
        if task.OUTPUT_TYPE == "loglikelihood_rolling":  # its texts go into no template
            templated_by = None
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
        chosen, metadata = settings.get("samples"), task.config.metadata or {}
        model.task_begins(
            TaskRequests(
                name=name,
                templated_by=templated_by,
                documents=tuple(chosen) if chosen else None,
                scored=task.OUTPUT_TYPE in ("loglikelihood", "multiple_choice"),
                borrowed=any(borrowed),
                decoding=metadata.get("sdar_decoding"),
                judge=metadata.get("sdar_judge"),
            ),
            task.instances,
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


@functools.cache
def _say_requests_are_built() -> None:
    logger.warning(
        "--cache_requests is passed over: requests are built anew. lm_eval's key for them holds no gen_kwargs, "
        "documents or wording, so lm_eval could send another run's requests."
    )


def differences(theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> str:
    """Return in words where two settings differ."""
    return "; ".join(
        f"{name} was {theirs.get(name)!r}, is {mine.get(name)!r}"
        for name in {**theirs, **mine}
        if theirs.get(name) != mine.get(name)
    )
