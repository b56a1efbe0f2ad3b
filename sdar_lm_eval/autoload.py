"""Makes plain `lm_eval` know this package's models and tasks.

lm_eval up to 0.4.13 finds no plug-ins: a model or a task folder has to be named in its own source. So a one-line `.pth`
file imports this package when Python starts, and `install` below puts a finder on `sys.meta_path` that waits for three
modules: once `lm_eval.models` has run, our models are added to its registry, by name, without importing them; once
`lm_eval.tasks` has run, `TaskManager` looks into our folder of tasks too; once `lm_eval.evaluator` has run, our models
are told of evaluations (`lm/evaluation.py`). From then on errors of ours are also printed
without a traceback, on lm_eval's command line only. In a Python that never imports lm_eval nothing happens at all.

`SDAR_LM_EVAL_AUTOLOAD=0` switches it off, except for `python -m sdar_lm_eval`. This module runs whenever Python
starts, so it imports only what Python has loaded by then (`typing` alone would cost several times the rest).
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.abc import Loader
    from importlib.machinery import ModuleSpec
    from types import ModuleType, TracebackType

    from lm_eval.tasks import TaskManager
else:
    Loader = object

TASKS = os.path.join(os.path.dirname(os.path.realpath(__file__)), "tasks")  # noqa: PTH118, PTH120  (no pathlib at start)


def install_unless_disabled() -> None:
    """What a Python start and `import sdar_lm_eval` do: `install`, unless SDAR_LM_EVAL_AUTOLOAD is 0."""
    if os.environ.get("SDAR_LM_EVAL_AUTOLOAD") != "0":
        _let_threads_sleep()
        install()


def _let_threads_sleep() -> None:
    """Set OMP_WAIT_POLICY=PASSIVE for a command of our models, before torch reads it.

    Threads that spin while they wait make small models many times slower where the machine is shared.
    """
    words = getattr(sys, "orig_argv", [])
    if any(words[i] == "--model" and words[i + 1].startswith("sdar") for i in range(len(words) - 1)):
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def install() -> None:
    """Register with lm_eval: now where it is imported already, else as soon as it is. Calling it again does nothing."""
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _Finder())
    for name in _PATCHES:
        if name in sys.modules:
            _patch(sys.modules[name])


class _Finder:
    """Finds the modules to patch through all other finders, and has them patched once they have run."""

    def __init__(self) -> None:
        self._searching: set[str] = set()

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        # A finder like this one asks us in return: answer None, or the two would ask each other forever.
        if name not in _PATCHES or name in self._searching:
            return None
        self._searching.add(name)
        try:
            for finder in sys.meta_path:
                find_spec = None if finder is self else getattr(finder, "find_spec", None)
                spec: ModuleSpec | None = find_spec(name, path, target) if find_spec else None
                if spec is not None:
                    if spec.loader is not None and hasattr(spec.loader, "exec_module"):
                        spec.loader = _PatchingLoader(spec.loader)
                    return spec
            return None
        finally:
            self._searching.discard(name)


class _PatchingLoader(Loader):
    """A module's own loader, followed by our patch. It puts the own loader back, so the module shows no trace of it."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> object:
        return getattr(self._loader, name)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        _patch(module)


def _patch(module: ModuleType) -> None:
    _shorten_errors()
    try:
        _PATCHES[module.__name__](module)
    except Exception as error:  # lm_eval has changed: it must go on working for everybody else's models
        import logging

        logging.getLogger("sdar_lm_eval").warning(
            "This lm_eval differs from those sdar_lm_eval knows (0.4.9 to 0.4.13), and %s cannot be extended: %s: %s",
            module.__name__,
            type(error).__name__,
            error,
        )


def _add_models(_: ModuleType) -> None:
    from lm_eval.api import registry

    from sdar_lm_eval.engines.registry import MODELS

    models = getattr(registry, "model_registry", None)
    if models is None:
        models = registry.MODEL_REGISTRY = _LazyRegistry(registry.MODEL_REGISTRY)
    for name, target in MODELS.items():
        if name not in models:
            models.register(name, target=target)


class _LazyRegistry(dict[str, object]):
    """lm_eval 0.4.9's registry, a plain dict of classes, with "module:Class" imported when it is asked for.

    Registering the class itself would load our engines into every run of every model, and wrapping `get_model` would
    miss those who imported it by name. A dict that differs in reading alone serves both, and the error message that
    lists the known names.
    """

    def register(self, name: str, *, target: str) -> None:
        self[name] = target

    def __getitem__(self, name: str) -> object:
        target = super().__getitem__(name)
        if isinstance(target, str):
            from importlib import import_module

            module, _, attribute = target.partition(":")
            target = self[name] = getattr(import_module(module), attribute)
        return target


def _add_tasks(tasks: ModuleType) -> None:
    import functools
    import inspect

    manager = tasks.TaskManager  # its home is lm_eval.tasks.manager since 0.4.12
    init = manager.__init__
    if hasattr(init, "adds_sdar_tasks"):
        return
    discover = getattr(sys.modules[manager.__module__], "discover_plugin_task_paths", None)
    if discover and TASKS in map(os.path.realpath, discover()):
        return  # lm_eval reads the entry points `lm_eval.tasks` (its pull request 4015) and found ours
    signature = inspect.signature(init)
    if "include_path" not in signature.parameters:
        raise TypeError("TaskManager takes no include_path")

    @functools.wraps(init)
    def init_with_our_tasks(self: TaskManager, *args: object, **kwargs: object) -> None:
        call = signature.bind(self, *args, **kwargs)
        given = call.arguments.get("include_path")
        users = list(given) if isinstance(given, (list, tuple)) else [given] if given else []
        if call.arguments.get("include_defaults", True) and TASKS not in map(os.path.realpath, users):
            # The user's task must win over ours of the same name. The later folder's wins, but in 0.4.9 the earlier's.
            user_first = getattr(sys.modules["lm_eval"], "__version__", None) == "0.4.9"
            call.arguments["include_path"] = [*users, TASKS] if user_first else [TASKS, *users]
        init(*call.args, **call.kwargs)
        self.include_path = given  # what the caller gave: our folder is added anew wherever this is passed on

    init_with_our_tasks.adds_sdar_tasks = True  # type: ignore[attr-defined]
    manager.__init__ = init_with_our_tasks


def _watch_evaluations(evaluator: ModuleType) -> None:
    from sdar_lm_eval.lm.evaluation import watch

    watch(evaluator)


_PATCHES: dict[str, Callable[[ModuleType], None]] = {
    "lm_eval._cli": lambda _: None,  # from its flags on, errors are shortened
    "lm_eval.models": _add_models,
    "lm_eval.tasks": _add_tasks,
    "lm_eval.evaluator": _watch_evaluations,
}


_previous_excepthook: Callable[[type[BaseException], BaseException, TracebackType | None], object] | None = None


def _shorten_errors() -> None:
    global _previous_excepthook
    if _previous_excepthook is None:
        _previous_excepthook, sys.excepthook = sys.excepthook, _excepthook


def _excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """On lm_eval's command line, an error of ours is a message to its user: print that, and not our call stack."""
    message = None
    if _is_command_line() and os.environ.get("SDAR_LM_EVAL_TRACEBACK", "0") in ("", "0"):
        from sdar_lm_eval import command_line

        message = command_line.message_of(error)
    if message is None:
        (_previous_excepthook or sys.__excepthook__)(kind, error, trace)
    else:
        print(f"sdar_lm_eval: error: {message}", file=sys.stderr)


def _is_command_line() -> bool:
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    if spec is not None:  # python -m, which is also what `accelerate launch -m` starts
        return spec.name in ("lm_eval.__main__", "sdar_lm_eval.__main__")
    program = os.path.splitext(os.path.basename(sys.argv[0]))[0]  # noqa: PTH119, PTH122
    return program in ("lm_eval", "lm-eval", "sdar_lm_eval")
