"""Hooks into lm_eval, by which a model learns of its evaluations.

lm_eval does not say that another evaluation has begun. `watch` wraps lm_eval's `evaluate`, `CachingLM`, and
`simple_evaluate`, which knows the seed and the tracker that saves samples. During an evaluation of this package's
models, `task_methods.py` replaces methods of each task. Evaluations of other models are unchanged.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from lm_eval.api.model import LM, CachingLM
from lm_eval.api.task import Task
from lm_eval.utils import simple_parse_args_string

from sdar_lm_eval.checks import check_limit
from sdar_lm_eval.engines.registry import MODELS
from sdar_lm_eval.errors import UserError, did_you_mean
from sdar_lm_eval.files import require_writable
from sdar_lm_eval.lm.denoising import Tracker, keep_beside_samples, leave_samples_alone, output_folder
from sdar_lm_eval.lm.task_methods import methods_replaced
from sdar_lm_eval.lm.watched import Watched, is_watched


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
    if hasattr(evaluator, "get_git_commit_hash"):
        vars(evaluator)["get_git_commit_hash"] = _without_gits_error(evaluator.get_git_commit_hash)
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
        running = _call.get()
        outer = running or _Call()
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
                    stack.enter_context(methods_replaced(task, name, model, running.gen_kwargs if running else None))
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


def _without_gits_error(get_commit: Callable[[], object]) -> Callable[[], object]:
    """Return lm_eval's `get_git_commit_hash` without the error that git prints outside of a repository."""

    @functools.wraps(get_commit)
    def get_quietly() -> object:
        with contextlib.suppress(OSError):  # git is not installed, which lm_eval handles
            failed = subprocess.run(["git", "describe", "--always"], capture_output=True, check=False).returncode
            if failed and not Path(".git").exists():  # where there is a .git, lm_eval reads it
                return None
        return get_commit()

    return get_quietly


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
