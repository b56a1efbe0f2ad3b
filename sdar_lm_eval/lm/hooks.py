"""Hooks into lm_eval: how a model learns a request's evaluation, task and document, and who applied the chat template.

lm_eval does not say that another evaluation has begun, whether a prompt is in the chat template, or which documents
`--samples` chose. `watch` wraps lm_eval's `evaluate`, `CachingLM`, and `simple_evaluate`, which knows the seed and the
tracker that saves samples. During an evaluation of this package's models, `_methods_replaced` replaces methods of
each task. Evaluations of other models are unchanged.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, ClassVar, Protocol, TypeGuard

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM, CachingLM
from lm_eval.api.samplers import FirstNSampler
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.utils import simple_parse_args_string

from sdar_lm_eval.checks import check_limit
from sdar_lm_eval.engines.registry import MODELS
from sdar_lm_eval.errors import UserError, did_you_mean
from sdar_lm_eval.files import require_writable
from sdar_lm_eval.hashing import hex_digest
from sdar_lm_eval.lm.denoising import LinesOf, Tracker, keep_beside_samples, leave_samples_alone, output_folder
from sdar_lm_eval.lm.task_requests import TaskRequests, TemplatedBy, filters_of, repeats_of
from sdar_lm_eval.settings import read_published
from sdar_lm_eval.spellings import overridden

logger = logging.getLogger(__name__)


class Watched(Protocol):
    """A model that is told of its evaluations: the models of this package."""

    watched: ClassVar[bool]
    """True. A class attribute, since reading other models' properties may raise."""

    renders: bool
    """Whether prompts of generating tasks go into the chat template where lm_eval's user did not ask for it."""

    @property
    def tokenizer_name(self) -> str:
        """Key of tokenizer and template in lm_eval's cache of built requests."""

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True, *, prefixed: bool = True
    ) -> str:
        """Render a conversation; `prefixed`: with the setting answer_prefix, which is for generated answers."""

    def check_cache(self, path: str) -> None:
        """Refuse a file of `--use_cache` that cannot be used."""

    def evaluation_begins(self, *, seed: int | None, cached: bool, template: str | None) -> None:
        """An evaluation begins.

        Args:
            seed: lm_eval's seed for torch; None where it has none.
            cached: whether lm_eval keeps the answers (`--use_cache`).
            template: the name of the chat template that the user chose; None: the default one.
        """

    def add_thoughts(self, samples: Mapping[str, Sequence[dict[str, Any]]]) -> None:
        """Put the thoughts of the last evaluation's answers into lm_eval's samples, by task."""

    def denoising_lines(self) -> LinesOf:
        """Return a function: task -> the lines of its denoising file; none for a task without records."""

    def task_begins(self, task: TaskRequests, requests: Sequence[Instance]) -> None:
        """lm_eval has built a task's requests."""

    def evaluation_ends(self) -> None:
        """The evaluation ended, with or without an error."""

    def get_model_info(self) -> dict[str, object]:
        """Facts for `results["config"]`: on the model, and on what the last evaluation did."""


def is_watched(lm: object) -> TypeGuard[Watched]:
    """Whether an lm_eval model is told of its evaluations."""
    return getattr(type(lm), "watched", False) is True


@dataclass
class _Call:
    """A call of lm_eval's `simple_evaluate`.

    Attributes:
        seed: the call's seed for torch.
        tracker: the object that saves the evaluation's samples.
        gen_kwargs: the user's settings, which lm_eval merges into those of each task.
        model: the model of this package that its `evaluate` evaluates; None: no such model, or not yet.
    """

    seed: int | None = None
    tracker: Tracker | None = None
    gen_kwargs: Mapping[str, object] = field(default_factory=dict)
    model: Watched | None = None


_call: ContextVar[_Call | None] = ContextVar("call", default=None)
"""The running `simple_evaluate`, which alone knows what a `_Call` has; None where `evaluate` is called by itself."""
_shared_out: ContextVar[bool] = ContextVar("shared_out", default=False)


@contextlib.contextmanager
def samples_are_a_share() -> Iterator[None]:
    """Have evaluations take `samples` as a machine's share of all documents: each gets the prompt of a whole run."""
    before = _shared_out.set(True)
    try:
        yield
    finally:
        _shared_out.reset(before)


def watch(evaluator: ModuleType) -> None:
    """Have lm_eval's `evaluate` tell watched models what they evaluate. A second call does nothing."""
    if hasattr(evaluator.evaluate, "tells_watched_models"):
        return
    evaluate, simple_evaluate = (
        _wrapped_evaluate(evaluator.evaluate),
        _wrapped_simple_evaluate(evaluator.simple_evaluate),
    )
    evaluate.tells_watched_models = True  # type: ignore[attr-defined]
    vars(evaluator).update(evaluate=evaluate, simple_evaluate=simple_evaluate)
    _check_caches_first()


def _wrapped_evaluate(evaluate: Callable[..., object]) -> Callable[..., object]:
    """Return an `evaluate` that tells a watched model what it evaluates."""
    signature = inspect.signature(evaluate)

    @functools.wraps(evaluate)
    def evaluate_and_tell(*args: object, **kwargs: object) -> object:
        call = signature.bind(*args, **kwargs)
        lm = call.arguments["lm"]
        model = lm.lm if isinstance(lm, CachingLM) else lm  # --use_cache wraps the model
        if not is_watched(model):
            return evaluate(*args, **kwargs)
        outer = _call.get() or _Call()
        outer.model = model
        check_limit(call.arguments.get("limit"))
        if outer.tracker is not None and outer.tracker.output_path and lm.rank == 0:
            # lm_eval writes after the evaluation, and only warns where that fails
            folder = output_folder(outer.tracker)
            require_writable(f"--output_path {folder}", folder)
        tasks = _tasks_of(call.arguments["task_dict"])
        if (samples := call.arguments.get("samples")) is not None:
            call.arguments["samples"] = _ascending(samples, tasks)
        template = call.arguments.get("apply_chat_template")
        model.evaluation_begins(
            seed=outer.seed, cached=model is not lm, template=template if isinstance(template, str) else None
        )
        try:
            with contextlib.ExitStack() as stack:
                once = {id(task): (task, name) for name, task in tasks.items()}  # one object may have two names
                for task, name in once.values():
                    stack.enter_context(_methods_replaced(task, name, model))
                results = evaluate(**call.arguments)
            if isinstance(results, dict) and "samples" in results:
                model.add_thoughts(results["samples"])
            if outer.tracker is not None:
                keep_beside_samples(outer.tracker, model.denoising_lines())
            return results
        finally:
            model.evaluation_ends()

    return evaluate_and_tell


def _wrapped_simple_evaluate(simple_evaluate: Callable[..., Any]) -> Callable[..., object]:
    """Return a `simple_evaluate` whose `_Call` the `evaluate` within it knows."""
    signature = inspect.signature(simple_evaluate)

    @functools.wraps(simple_evaluate)
    def simple_evaluate_and_tell(*args: object, **kwargs: object) -> object:
        call = signature.bind(*args, **kwargs)
        call.apply_defaults()
        tracker = call.arguments.get("evaluation_tracker")
        if tracker is not None:
            leave_samples_alone(tracker)
        gen_kwargs = call.arguments.get("gen_kwargs") or {}
        if isinstance(gen_kwargs, str):
            gen_kwargs = simple_parse_args_string(gen_kwargs)
        own = _Call(call.arguments.get("torch_random_seed"), tracker, gen_kwargs)
        before = _call.set(own)
        model = call.arguments["model"]
        of_ours = model in MODELS if isinstance(model, str) else is_watched(model)
        try:
            with _without_advice(own) if of_ours else contextlib.nullcontext():
                results = simple_evaluate(*args, **kwargs)
            # lm_eval before 0.4.10 asks only its own Hugging Face models for their facts.
            if results and "sdar_lm_eval" not in results["config"] and own.model is not None:
                results["config"].update(own.model.get_model_info())
            return results
        finally:
            _call.reset(before)

    return simple_evaluate_and_tell


_ADVICE = {
    "lm_eval.evaluator": "Recommend setting `apply_chat_template`",  # this package's models apply the template
    "lm_eval.api.task": "Custom kwargs can be passed to `--metadata`",  # two lines for each of MMLU's 57 tasks
}
"""Logger of lm_eval -> words of advice that is wrong or of no use to users of this package's models."""


@contextlib.contextmanager
def _without_advice(call: _Call) -> Iterator[None]:
    """Leave `_ADVICE` out of lm_eval's log of a call. Another thread, or a call within the call, keeps the advice."""
    with contextlib.ExitStack() as stack:
        for name, advice in _ADVICE.items():

            def keeps(record: logging.LogRecord, advice: str = advice) -> bool:
                return _call.get() is not call or advice not in " ".join(str(record.msg).split())

            logging.getLogger(name).addFilter(keeps)
            stack.callback(logging.getLogger(name).removeFilter, keeps)
        yield


def _check_caches_first() -> None:
    """Have a watched model check `--use_cache`'s file first: lm_eval opens it in a thread, whose errors are lost."""
    init = CachingLM.__init__

    @functools.wraps(init)
    def check_and_init(self: CachingLM, lm: LM, cache_db: str) -> None:
        if is_watched(lm):
            lm.check_cache(cache_db)
        init(self, lm, cache_db)

    CachingLM.__init__ = check_and_init  # type: ignore[method-assign]


def _tasks_of(task_dict: object, name: str = "") -> dict[str, Task]:
    """The tasks in `evaluate`'s task_dict of nested mappings, by name. Older versions nest pairs of group and task."""
    if isinstance(task_dict, Task):
        return {name or str(task_dict.config.task): task_dict}
    tasks: dict[str, Task] = {}
    if isinstance(task_dict, Mapping):
        for key, value in task_dict.items():
            tasks |= _tasks_of(value, str(key))
    elif isinstance(task_dict, tuple):
        for value in task_dict:
            tasks |= _tasks_of(value, name)
    return tasks


def _ascending(samples: object, tasks: Mapping[str, Task]) -> dict[str, list[int]]:
    """`--samples` with ascending ids: lm_eval takes documents in ascending order, but names the k-th by the k-th id.

    Raises:
        UserError: `samples` is no mapping from tasks to document numbers, has ids of a task that is not evaluated, has
            no ids of a task, for which lm_eval would evaluate everything, or an id that no document has.
    """
    if not isinstance(samples, Mapping):
        first = next(iter(tasks))
        raise UserError(f'--samples {samples}: give document numbers of tasks, such as {{"{first}": [0, 3]}}.')
    for name, ids in samples.items():
        if name not in tasks:
            raise UserError(
                f"--samples names task {name!r}, which is not evaluated.{did_you_mean(name, tasks)} "
                f"Evaluated: {', '.join(tasks)}."
            )
        if not (isinstance(ids, (list, tuple)) and ids and all(type(i) is int and i >= 0 for i in ids)):
            raise UserError(f"--samples {name!r}: {ids}; give a list of document numbers, 0 or more, at least one.")
        if max(ids) >= (number := len(tasks[name].eval_docs)):
            raise UserError(f"--samples {name!r}: {max(ids)}; the task has documents 0 to {number - 1}.")
    return {name: sorted(set(ids)) for name, ids in samples.items()}


@contextlib.contextmanager
def _methods_replaced(task: Task, name: str, model: Watched) -> Iterator[None]:
    """Replace methods of a task by attributes of the same names, and its settings, while an evaluation lasts."""
    generation_kwargs = task.config.generation_kwargs
    borrowed: list[bool] = []
    replacements: dict[str, Callable[..., object]] = {
        "build_all_requests": _build_in_template(task, name, model, borrowed),
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


def _build_in_template(task: Task, name: str, model: Watched, borrowed: Sequence[bool]) -> Callable[..., None]:
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
        if task.OUTPUT_TYPE == "generate_until" and (call := _call.get()) is not None:
            task.config.generation_kwargs = overridden(task.config.generation_kwargs or {}, call.gen_kwargs)
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
    """Number the requests of each document whose numbers repeat, in lm_eval's order, which is by number.

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
