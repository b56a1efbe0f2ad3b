"""Replacements of a task's methods: the chat template, the requests that the model learns of, documents, examples.

lm_eval does not say whether a prompt is in the chat template, or which documents `--samples` chose.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.samplers import FirstNSampler
from lm_eval.api.task import ConfigurableTask, Task

from sdar_lm_eval.hashing import hex_digest
from sdar_lm_eval.lm.task_requests import TaskRequests, TemplatedBy, filters_of, repeats_of
from sdar_lm_eval.lm.watched import Watched
from sdar_lm_eval.settings import read_published
from sdar_lm_eval.spellings import overridden

logger = logging.getLogger(__name__)

_shared_out: ContextVar[bool] = ContextVar("shared_out", default=False)


@contextlib.contextmanager
def samples_are_a_share() -> Iterator[None]:
    """Have evaluations take `samples` as a machine's share of all documents: each gets the prompt of a whole run."""
    before = _shared_out.set(True)
    try:
        yield
    finally:
        _shared_out.reset(before)


@contextlib.contextmanager
def methods_replaced(task: Task, name: str, model: Watched, gen_kwargs: Mapping[str, object] | None) -> Iterator[None]:
    """Replace methods of a task by attributes of the same names, and its settings, while an evaluation lasts.

    Args:
        task: the task.
        name: lm_eval's name of the task in this evaluation.
        model: the model that is evaluated.
        gen_kwargs: the user's settings, which lm_eval merges into the task's; None: the user could give none.
    """
    generation_kwargs = task.config.generation_kwargs
    borrowed: list[bool] = []
    replacements: dict[str, Callable[..., object]] = {
        "build_all_requests": _build_in_template(task, name, model, borrowed, gen_kwargs),
        "apply_filters": _filter_without_padding(task),
    }
    # Without `LM.gather_object`, lm_eval collects samples itself: a borrowed document could not be left out of them.
    if hasattr(LM, "gather_object"):
        replacements["doc_iterator"] = _iterate_or_borrow(task, borrowed)
    if task.config.num_fewshot and not isinstance(getattr(task, "sampler", None), FirstNSampler):
        iterate = replacements.get("doc_iterator", task.doc_iterator)
        replacements |= _draw_examples_of_whole_run(task, iterate)
    task.__dict__.update(replacements)
    try:
        yield
    finally:
        task.config.generation_kwargs = generation_kwargs  # another model may evaluate the same task object
        for attribute in replacements:
            del task.__dict__[attribute]


def _filter_without_padding(task: Task) -> Callable[[], object]:
    """Return an `apply_filters` that drops the answers to copies: lm_eval pads a rank that has fewer documents."""
    apply_filters = task.apply_filters

    def filter_own() -> object:
        for instance in task.instances:
            del instance.resps[repeats_of(instance) :]
        return apply_filters()

    return filter_own


def _build_in_template(
    task: Task, name: str, model: Watched, borrowed: Sequence[bool], gen_kwargs: Mapping[str, object] | None
) -> Callable[..., None]:
    """Return a `build_all_requests` that asks for the chat template, and tells the model of the task's requests."""
    build = task.build_all_requests

    def build_all_requests(**settings: object) -> None:
        if settings.get("cache_requests") or settings.get("rewrite_requests_cache"):
            warn_of_cached_requests()
            settings |= {"cache_requests": False, "rewrite_requests_cache": False}
        types = _request_types(task)
        templated_by: TemplatedBy | None = "lm_eval" if settings.get("apply_chat_template") else None
        if types == {"loglikelihood_rolling"}:  # lm_eval puts its texts into no template
            templated_by = None
        if templated_by is None and model.renders and types == {"generate_until"}:
            templated_by = "sdar_lm_eval"
            settings |= {
                "apply_chat_template": True,
                "chat_template": model.apply_chat_template,
                "tokenizer_name": model.tokenizer_name,
            }
            if settings.get("fewshot_as_multiturn", False) is None:  # lm_eval's default under --apply_chat_template
                settings["fewshot_as_multiturn"] = True
        renders: list[None] = []
        if settings.get("chat_template") is not None:
            prefixed = "generate_until" in types

            def render(*args: Any, **options: Any) -> str:
                renders.append(None)
                return model.apply_chat_template(*args, **options, prefixed=prefixed)

            settings["chat_template"] = render
        if task.OUTPUT_TYPE == "generate_until" and gen_kwargs is not None:
            task.config.generation_kwargs = overridden(task.config.generation_kwargs or {}, gen_kwargs)
        build(**settings)
        _number(task.instances)
        if not renders:  # a task of a class of its own may make prompts without the template
            templated_by = None
        samples, metadata = settings.get("samples"), task.config.metadata or {}
        model.task_begins(
            TaskRequests(
                name=name,
                templated_by=templated_by,
                documents=tuple(samples) if isinstance(samples, Sequence) and samples else None,
                scored=any(request.request_type == "loglikelihood" for request in task.instances),
                borrowed=any(borrowed),
                decoding=read_published(metadata) or None,
                begins_answers=bool(getattr(task.config, "gen_prefix", None)),
                judge=metadata.get("sdar_judge"),
                copies=functools.cache(functools.partial(_copies, task)),
                filters=filters_of(task),
            ),
            task.instances,
        )

    return build_all_requests


def _request_types(task: Task) -> set[str]:
    """The types of a task's requests; the class of a task may make other requests than its OUTPUT_TYPE says."""
    if type(task).construct_requests is ConfigurableTask.construct_requests:
        return {str(task.OUTPUT_TYPE)}
    doc: Any = next(iter(task.eval_docs), None)
    if doc is None:  # lm_eval refuses a task without documents
        return set()
    settings: dict[str, Any] = {"apply_chat_template": False, "chat_template": None}
    made = task.construct_requests(doc=doc, ctx=str(task.doc_to_text(doc)), metadata=(None, 0, 1), **settings)
    return {request.request_type for request in (made if isinstance(made, list) else [made])}


def _number(requests: Iterable[Instance]) -> None:
    """Number a document's requests in lm_eval's order, if two of the requests have the same number.

    A task class may leave all numbers at 0. Traces, thoughts and denoising records name an answer by the number.
    """
    of_documents: dict[object, list[Instance]] = {}
    for request in requests:
        of_documents.setdefault(request.doc_id, []).append(request)
    for together in of_documents.values():
        if len({request.idx for request in together}) < len(together):
            for number, request in enumerate(sorted(together, key=lambda request: request.idx)):
                request.idx = number


def _copies(task: Task) -> dict[int, int]:
    """Document -> the number of earlier documents with the same content, for documents that have any."""
    seen: Counter[str] = Counter()
    copies = {}
    for document, content in enumerate(task.eval_docs):
        digest = hex_digest(content)
        if seen[digest]:
            copies[document] = seen[digest]
        seen[digest] += 1
    return copies


def _iterate_or_borrow(task: Task, borrowed: list[bool]) -> Callable[..., Iterator[tuple[int, object]]]:
    """Return a `doc_iterator` by which a rank without documents borrows the first one: lm_eval refuses such a rank.

    The rank then takes part in all exchanges between ranks. The model leaves the borrowed document out of scores and
    samples.

    Args:
        task: the task.
        borrowed: gets whether the document is a borrowed one, as its only element.
    """
    documents_of = task.doc_iterator

    def doc_iterator(*, rank: int = 0, **settings: object) -> Iterator[tuple[int, object]]:
        documents = documents_of(rank=rank, **settings)
        first = list(itertools.islice(documents, 1))
        borrowed[:] = [not first and rank > 0]
        if any(borrowed):
            return itertools.islice(documents_of(rank=0, **settings), 1)
        return itertools.chain(first, documents)

    return doc_iterator


def _draw_examples_of_whole_run(task: Task, iterate: Callable[..., Any]) -> dict[str, Callable[..., object]]:
    """Return methods by which a process draws few-shot examples as one process with all documents does.

    lm_eval draws the examples of one document after the other from one generator. So a process with a part of the
    documents would send other prompts, and find no stored answer of other processes. Here the process also draws the
    examples of the documents between its own.

    Args:
        task: the task.
        iterate: the task's `doc_iterator`.
    """
    documents_of, build = task.doc_iterator, task.fewshot_context
    others: Iterator[tuple[int, object]] = iter(())
    skipped: Iterator[int] = iter(())  # for each own document, how many documents lie between it and the one before

    def doc_iterator(*, rank: int = 0, world_size: int = 1, **settings: Any) -> Iterator[tuple[int, object]]:
        nonlocal others, skipped
        if settings.get("samples") and _shared_out.get():
            places = settings["samples"]
            others = documents_of(rank=0, world_size=1)
            skipped = (place - before - 1 for before, place in itertools.pairwise([-1, *places]))
        else:
            others = documents_of(rank=0, world_size=1, **settings)
            skipped = itertools.chain([rank], itertools.repeat(world_size - 1))
        return iterate(rank=rank, world_size=world_size, **settings)  # type: ignore[no-any-return]

    def fewshot_context(doc: object, *args: object, **settings: object) -> object:
        for _, other in itertools.islice(others, next(skipped, 0)):
            build(other, *args, **settings)
        next(others, None)
        return build(doc, *args, **settings)

    return {"doc_iterator": doc_iterator, "fewshot_context": fewshot_context}


@functools.cache
def warn_of_cached_requests() -> None:
    """Say once that lm_eval's cache of built requests is not used."""
    logger.warning(
        "--cache_requests is ignored, and requests are built again: lm_eval's key of cached requests holds no "
        "gen_kwargs, documents or wording, so the cache could give another run's requests."
    )
