"""Makes plain `lm_eval` know this package's models and tasks.

lm_eval up to 0.4.13 has no plug-ins: lm_eval's source names each model and each task folder. So a one-line `.pth` file
imports this package when Python starts. `install` then puts a finder on `sys.meta_path`. The finder patches these
modules of lm_eval after the module's code has run:

    lm_eval.models      the registry gets this package's models by name, without importing them
    lm_eval.tasks       `TaskManager` looks into this package's task folder too
    lm_eval.config.evaluate_config
                        a command that names this package's tasks only does not index lm_eval's thousands of tasks; a
                        wrong `--gen_kwargs` or `--include_path` ends the command before the model is loaded
    lm_eval.evaluator   the evaluator tells this package's models of evaluations (`lm/evaluation.py`)

After the first patch, lm_eval's command line prints this package's errors without a traceback. A Python process that
never imports lm_eval is not changed.

`SDAR_LM_EVAL_AUTOLOAD=0` switches autoloading off, except for `python -m sdar_lm_eval`. This module runs whenever
Python starts. So the module imports only modules that Python has loaded already: importing `typing` alone would take
several times as long as everything else here.
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

    from lm_eval.config.evaluate_config import EvaluatorConfig
    from lm_eval.tasks import TaskManager
else:
    Loader = object

TASKS = os.path.join(os.path.dirname(os.path.realpath(__file__)), "tasks")  # noqa: PTH118, PTH120  (no pathlib at start)


def install_unless_disabled() -> None:
    """Install, and set OpenMP's wait policy, unless SDAR_LM_EVAL_AUTOLOAD is 0.

    A start of Python and `import sdar_lm_eval` call this function.
    """
    if os.environ.get("SDAR_LM_EVAL_AUTOLOAD") != "0":
        _set_wait_policy()
        install()


def _set_wait_policy() -> None:
    """Set OMP_WAIT_POLICY=PASSIVE before torch reads it, where the command line names one of this package's models.

    OpenMP threads that spin while they wait make small models many times slower on a shared machine.
    """
    words = getattr(sys, "orig_argv", [])
    if any(words[i] == "--model" and words[i + 1].startswith("sdar") for i in range(len(words) - 1)):
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def install() -> None:
    """Patch lm_eval's modules: those imported already now, others once they have run. A second call does nothing."""
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _Finder())
    for name in _PATCHES:
        if name in sys.modules:
            _patch(sys.modules[name])


class _Finder:
    """Finds the modules to patch by asking all other finders, and has them patched once they have run."""

    def __init__(self) -> None:
        self._searching: set[str] = set()

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        # Another finder of this kind asks this one in return: without an answer of None, the two would recurse forever.
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
    """Runs a module by the module's own loader, then patches it. The module keeps its own loader as its attribute."""

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
    """Patch a module of lm_eval; errors are short from the first patch on."""
    _shorten_errors()
    try:
        _PATCHES[module.__name__](module)
    except Exception as error:  # lm_eval has changed: it must still run other models
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
    """lm_eval 0.4.9's registry, a plain dict of classes, whose values may be "module:Class" until they are read.

    Registering the class itself would import torch and an engine into every run of every model. Wrapping `get_model`
    would miss modules that imported it by name.
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
        return  # this lm_eval found the folder by the entry points `lm_eval.tasks` (its pull request 4015)
    signature = inspect.signature(init)
    if "include_path" not in signature.parameters:
        raise TypeError("TaskManager takes no include_path")

    @functools.wraps(init)
    def init_with_our_tasks(self: TaskManager, *args: object, **kwargs: object) -> None:
        call = signature.bind(self, *args, **kwargs)
        given = call.arguments.get("include_path")
        users = list(given) if isinstance(given, (list, tuple)) else [given] if given else []
        if _our_tasks_suffice:
            call.arguments["include_defaults"], call.arguments["include_path"] = False, [TASKS]
        elif call.arguments.get("include_defaults", True) and TASKS not in map(os.path.realpath, users):
            # A user's task must override this package's task of the same name. The later folder wins; in 0.4.9 the
            # earlier one does.
            user_first = getattr(sys.modules["lm_eval"], "__version__", None) == "0.4.9"
            call.arguments["include_path"] = [*users, TASKS] if user_first else [TASKS, *users]
        init(*call.args, **call.kwargs)
        self.include_path = given  # without this package's folder, which each TaskManager adds by itself

    init_with_our_tasks.adds_sdar_tasks = True  # type: ignore[attr-defined]
    manager.__init__ = init_with_our_tasks


_our_tasks_suffice = False  # whether a `TaskManager` that is made now needs no tasks but this package's


def manager_of_ours(tasks: Sequence[str]) -> TaskManager | None:
    """A manager of this package's tasks and groups only; None if `tasks` names another, or is empty."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=TASKS, include_defaults=False)
    return manager if tasks and set(tasks) <= set(manager.all_tasks) else None


def _extend_commands(config: ModuleType) -> None:
    import functools

    settings: type[EvaluatorConfig] | None = getattr(config, "EvaluatorConfig", None)
    if settings is None or hasattr(settings.process_tasks, "checks_options"):
        return
    process: Callable[..., TaskManager] = settings.process_tasks

    @functools.wraps(process)
    def process_tasks(self: EvaluatorConfig, *args: object, **kwargs: object) -> TaskManager:
        global _our_tasks_suffice
        _check_options(self)
        try:
            named = [self.tasks] if isinstance(self.tasks, str) else self.tasks or []
            names = [name for some in named for name in str(some).split(",")]
            _our_tasks_suffice = not self.include_path and manager_of_ours(names) is not None
        except Exception:  # lm_eval has changed: its whole index is right too, only slower
            _our_tasks_suffice = False
        try:
            return process(self, *args, **kwargs)
        finally:
            _our_tasks_suffice = False

    process_tasks.checks_options = True  # type: ignore[attr-defined]
    settings.process_tasks = process_tasks


def _check_options(config: EvaluatorConfig) -> None:
    from sdar_lm_eval.engines.registry import MODELS

    if getattr(config, "model", None) not in MODELS:
        return
    from sdar_lm_eval.files import require_folders
    from sdar_lm_eval.settings import check_gen_kwargs

    if given := getattr(config, "include_path", None):
        require_folders("--include_path", given)
    if isinstance(given := getattr(config, "gen_kwargs", None), dict):
        check_gen_kwargs(given)


def _watch_evaluations(evaluator: ModuleType) -> None:
    from sdar_lm_eval.lm.hooks import watch

    watch(evaluator)


_PATCHES: dict[str, Callable[[ModuleType], None]] = {
    "lm_eval._cli": lambda _: None,  # so that errors are short from the parsing of flags on
    "lm_eval.models": _add_models,
    "lm_eval.tasks": _add_tasks,
    "lm_eval.config.evaluate_config": _extend_commands,
    "lm_eval.evaluator": _watch_evaluations,
}


_previous_excepthook: Callable[[type[BaseException], BaseException, TracebackType | None], object] | None = None


def _shorten_errors() -> None:
    global _previous_excepthook
    if _previous_excepthook is None:
        _previous_excepthook, sys.excepthook = sys.excepthook, _excepthook


def _excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print an error of this package without its traceback, on lm_eval's command line."""
    message = None
    if _is_command_line():
        from sdar_lm_eval import command_line

        command_line.let_others_speak(error)
        if os.environ.get("SDAR_LM_EVAL_TRACEBACK", "0") in ("", "0"):
            message = command_line.message_of(error)
    if message is None:
        (_previous_excepthook or sys.__excepthook__)(kind, error, trace)
    elif isinstance(error, KeyboardInterrupt):
        from sdar_lm_eval.commands import INTERRUPTED

        if command_line.is_first_of_machine():
            # torch.distributed's hook, which calls this one, loses what sys.stderr gets before a SystemExit.
            print(f"sdar_lm_eval: {message}", file=sys.__stderr__)
        raise SystemExit(INTERRUPTED)  # becomes the exit code
    else:
        print(f"sdar_lm_eval: error: {message}", file=sys.stderr)


def _is_command_line() -> bool:
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    if spec is not None:  # python -m, by which `accelerate launch -m` starts processes too
        return spec.name in ("lm_eval.__main__", "sdar_lm_eval.__main__")
    program = os.path.splitext(os.path.basename(sys.argv[0]))[0]  # noqa: PTH119, PTH122
    return program in ("lm_eval", "lm-eval", "sdar_lm_eval")
