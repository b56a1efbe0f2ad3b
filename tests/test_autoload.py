"""autoload.py against stand-ins for the shapes lm_eval has had, each in a Python of its own: what it patches is global.

The stand-ins keep what autoload.py touches and what it must not break; test_install.py uses the real lm_eval.
"""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from sdar_lm_eval import autoload, command_line
from sdar_lm_eval.commands import INTERRUPTED
from sdar_lm_eval.engines.registry import MODELS
from sdar_lm_eval.errors import EngineError, Interrupted, OtherRankError, UserError
from sdar_lm_eval.files import require_folders

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

ROOT = Path(autoload.__file__).parents[1]

DICT_REGISTRY = """
    MODEL_REGISTRY = {}

    def register_model(name):
        def decorate(cls):
            assert name not in MODEL_REGISTRY
            MODEL_REGISTRY[name] = cls
            return cls
        return decorate

    def get_model(name):
        try:
            return MODEL_REGISTRY[name]
        except KeyError:
            raise ValueError(f"no model {name!r}, only {', '.join(MODEL_REGISTRY.keys())}")
"""
LAZY_REGISTRY = """
    import importlib

    class Registry:
        def __init__(self):
            self._objs = {}

        def register(self, *aliases, target=None):
            assert target is not None and len(aliases) == 1
            if self._objs.get(aliases[0], target) != target:
                raise ValueError(f"{aliases[0]!r} already registered")
            self._objs[aliases[0]] = target

        def get(self, name):
            module, _, attribute = self._objs[name].partition(":")
            return getattr(importlib.import_module(module), attribute)

        def __contains__(self, name):
            return name in self._objs

        def keys(self):
            return self._objs.keys()

    MODEL_REGISTRY = model_registry = Registry()

    def get_model(name):
        import lm_eval.models
        if name not in model_registry:
            raise ValueError(f"no model {name!r}, only {', '.join(model_registry.keys())}")
        return model_registry.get(name)
"""
# main since pull request 4013: a name not known yet is looked up among the entry points `lm_eval.models`.
ENTRY_POINT_REGISTRY = (
    LAZY_REGISTRY
    + """
    def load_plugins():
        for name, target in [("sdar", "sdar_lm_eval.lm.model:SDARLM"), ("other", "lm_eval.models.dummy:Dummy")]:
            if name not in model_registry:
                model_registry.register(name, target=target)
"""
)
TASK_MANAGER = """
    import pathlib

    class TaskManager:
        def __init__(self, verbosity=None, include_path=None, include_defaults=True, metadata=None):
            self.include_path = include_path
            self.metadata = metadata
            folders = ["defaults"] if include_defaults else []
            if include_path is not None:
                folders += include_path if isinstance(include_path, (list, tuple)) else [include_path]
            self.folders = [str(folder) for folder in folders]
            self.index = {}
            for folder in self.folders:
                found = {path.stem: folder for path in pathlib.Path(folder).glob("*.yaml")}
                self.index = {**self.index, **found}
"""
TASK_MANAGER_0_4_9 = TASK_MANAGER.replace("{**self.index, **found}", "{**found, **self.index}")
# Pull request 4015; `found` stands for what the entry points `lm_eval.tasks` resolve to.
PLUGIN_TASK_MANAGER = """
    found = []

    def discover_plugin_task_paths():
        return [pathlib.Path(folder) for folder in found]
"""
REGISTERS_CLASS = """
    from lm_eval.api.registry import register_model

    @register_model("dummy")
    class Dummy:
        pass
"""
REGISTERS_NAME = """
    from lm_eval.api.registry import model_registry

    model_registry.register("dummy", target="lm_eval.models.dummy:Dummy")
"""
IN_MANAGER = {"tasks/__init__.py": "from lm_eval.tasks.manager import TaskManager", "tasks/manager.py": TASK_MANAGER}
BY_NAME = {"models/__init__.py": REGISTERS_NAME, "models/dummy.py": "class Dummy: pass"}

SHAPES: dict[str, dict[str, str]] = {
    "0.4.9": {
        # It imports all of itself before it says its version.
        "__init__.py": "from lm_eval import models, tasks\n__version__ = '0.4.9'",
        "api/registry.py": DICT_REGISTRY,
        "models/__init__.py": "from . import dummy",
        "models/dummy.py": REGISTERS_CLASS,
        "tasks/__init__.py": TASK_MANAGER_0_4_9,
    },
    "0.4.10": {"api/registry.py": LAZY_REGISTRY, **BY_NAME, "tasks/__init__.py": TASK_MANAGER},
    "0.4.13": {"api/registry.py": LAZY_REGISTRY, **BY_NAME, **IN_MANAGER},
    "main": {"api/registry.py": ENTRY_POINT_REGISTRY, **BY_NAME, **IN_MANAGER},
    "plugin-tasks": {
        "api/registry.py": ENTRY_POINT_REGISTRY,
        **BY_NAME,
        **IN_MANAGER,
        "tasks/manager.py": TASK_MANAGER + PLUGIN_TASK_MANAGER,
    },
    "unknown": {
        "api/registry.py": "def get_model(name): return name.upper()",
        "models/__init__.py": "",
        "tasks/__init__.py": "class TaskManager:\n    def __init__(self, *, where): self.folders = where",
    },
}
KNOWN = ["0.4.9", "0.4.10", "0.4.13", "main", "plugin-tasks"]

# The harness's module loads torch; a stand-in shows when it is imported, and that it is what a name resolves to.
HARNESS = """
import importlib.abc, importlib.machinery, sys
class HarnessFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, self) if name == "sdar_lm_eval.lm.model" else None
    def exec_module(self, module):
        module.SDARLM = type("SDARLM", (), {})
sys.meta_path.insert(0, HarnessFinder())
"""
INSTALL = "from sdar_lm_eval import autoload; autoload.install()\n"


class Sandbox:
    """Runs Python where `lm_eval` is a stand-in. `-S` keeps out every `.pth` file, ours included."""

    def __init__(self, folder: Path, shape: str) -> None:
        self.folder, self.shape = folder, shape
        for name, source in {
            "__init__.py": f'__version__ = "{shape}"',
            "__main__.py": "def cli_evaluate():\n    import lm_eval.program",
            "api/__init__.py": "",
            **SHAPES[shape],
        }.items():
            self.write(f"lm_eval/{name}", source)

    def write(self, name: str, source: str) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dedent(source))
        return path

    def run(self, *command: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-S", *command],
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(self.folder), str(ROOT)]), **env},
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def python(self, code: str, **env: str) -> str:
        done = self.run("-c", HARNESS + code, **env)
        assert done.returncode == 0, done.stderr
        assert not done.stderr, done.stderr
        return done.stdout.strip()


@pytest.fixture
def sandbox(tmp_path: Path, request: pytest.FixtureRequest) -> Sandbox:
    return Sandbox(tmp_path, getattr(request, "param", "0.4.13"))


every_known_shape = pytest.mark.parametrize("sandbox", KNOWN, indirect=True)


# Models


@every_known_shape
@pytest.mark.parametrize("order", ["installed first", "lm_eval first"])
def test_model_is_known_and_imported_only_when_asked_for(sandbox: Sandbox, order: str) -> None:
    imports = "import lm_eval.models, lm_eval.tasks\n"
    sandbox.python(
        (INSTALL + imports if order == "installed first" else imports + INSTALL)
        + dedent("""
            from lm_eval.api.registry import MODEL_REGISTRY, get_model
            assert "sdar" in MODEL_REGISTRY and "sdar" in MODEL_REGISTRY.keys()
            assert "sdar_lm_eval.lm.model" not in sys.modules
            assert get_model("sdar").__name__ == "SDARLM"
            assert get_model("sdar") is get_model("sdar") is sys.modules["sdar_lm_eval.lm.model"].SDARLM
            assert get_model("dummy").__name__ == "Dummy"
            try:
                get_model("sdra")
            except ValueError as error:
                assert "sdar" in str(error) and "dummy" in str(error)
        """)
    )


@every_known_shape
def test_a_name_already_taken_is_left_alone(sandbox: Sandbox) -> None:
    for name in ("models/__init__.py", "models/dummy.py"):
        path = sandbox.folder / "lm_eval" / name
        path.write_text(path.read_text().replace('"dummy"', '"sdar"'))
    assert sandbox.python(INSTALL + "from lm_eval.api.registry import get_model; import lm_eval.models\n"
                          "print(get_model('sdar').__name__)") == "Dummy"  # fmt: skip


@pytest.mark.parametrize("sandbox", ["main"], indirect=True)
def test_entry_points_read_afterwards_do_not_collide(sandbox: Sandbox) -> None:
    sandbox.python(
        INSTALL + "import lm_eval.models; from lm_eval.api.registry import get_model, load_plugins\n"
        "load_plugins(); assert get_model('sdar').__name__ == 'SDARLM' and get_model('other').__name__ == 'Dummy'"
    )


def test_pyproject_declares_the_same_models() -> None:
    tomllib = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")
    entry_points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    assert entry_points["lm_eval.models"] == MODELS
    assert entry_points["lm_eval.tasks"] == {"sdar": "sdar_lm_eval.tasks"}


# Tasks


@every_known_shape
@pytest.mark.parametrize(
    ("arguments", "users"),
    [
        ("", []),
        ("include_path=None", []),
        ("include_path='mine'", ["mine"]),
        ("include_path=pathlib.Path('mine')", ["mine"]),
        ("include_path=['mine', pathlib.Path('more')]", ["mine", "more"]),
        ("include_path=('mine', 'more')", ["mine", "more"]),
        ("None, 'mine', True, {'a': 1}", ["mine"]),
    ],
)
def test_our_folder_is_searched_beside_the_users(sandbox: Sandbox, arguments: str, users: list[str]) -> None:
    folders, kept = sandbox.python(
        INSTALL + "import pathlib; from lm_eval.tasks import TaskManager\n"
        f"given = (lambda verbosity=None, include_path=None, *rest, **more: include_path)({arguments})\n"
        f"manager = TaskManager({arguments}); print(manager.folders); print(manager.include_path == given)"
    ).splitlines()
    expected = [*users, autoload.TASKS] if sandbox.shape == "0.4.9" else [autoload.TASKS, *users]
    assert folders == str(["defaults", *expected])
    assert kept == "True"


@every_known_shape
@pytest.mark.parametrize(
    "arguments", ["include_defaults=False", "None, ['mine'], False", f"include_path=[{autoload.TASKS!r}]"]
)
def test_our_folder_is_not_added(sandbox: Sandbox, arguments: str) -> None:
    """Where only the given folders are wanted, and where ours is among them."""
    code = f"from lm_eval.tasks import TaskManager; print(TaskManager({arguments}).folders)"
    assert sandbox.python(INSTALL + code) == sandbox.python(code)


@every_known_shape
def test_the_users_task_wins_over_ours_of_the_same_name(sandbox: Sandbox) -> None:
    sandbox.write("ours/task.yaml", "")
    sandbox.write("mine/task.yaml", "")
    assert (
        sandbox.python(
            INSTALL.replace("; ", "; autoload.TASKS = 'ours'; ") + "from lm_eval.tasks import TaskManager\n"
            "assert TaskManager().index == {'task': 'ours'}\n"
            "print(TaskManager(include_path='mine').index)"
        )
        == "{'task': 'mine'}"
    )


@every_known_shape
def test_task_manager_keeps_its_signature_and_errors(sandbox: Sandbox) -> None:
    sandbox.python(
        "import inspect, lm_eval.tasks; from lm_eval.tasks import TaskManager; init = TaskManager.__init__\n"
        + INSTALL
        + dedent("""
            assert TaskManager.__init__ is not init and TaskManager.__init__.__wrapped__ is init
            assert inspect.signature(TaskManager.__init__) == inspect.signature(init)
            assert TaskManager(metadata={"a": 1}).metadata == {"a": 1}
            try:
                TaskManager(no_such_argument=1)
            except TypeError as error:
                assert "no_such_argument" in str(error)
            class Mine(TaskManager):
                def __init__(self):
                    super().__init__(None, "mine")
            assert set(Mine().folders) == {"defaults", "mine", autoload.TASKS}
        """)
    )


@pytest.mark.parametrize("sandbox", ["plugin-tasks"], indirect=True)
def test_nothing_is_added_where_lm_eval_finds_our_tasks_itself(sandbox: Sandbox) -> None:
    manager = sandbox.folder / "lm_eval/tasks/manager.py"
    manager.write_text(manager.read_text().replace("found = []", f"found = [{autoload.TASKS!r}]"))
    code = "from lm_eval.tasks import TaskManager; assert not hasattr(TaskManager.__init__, '__wrapped__')"
    sandbox.python(INSTALL + code)


# The import hook


@every_known_shape
def test_installing_twice_changes_nothing(sandbox: Sandbox) -> None:
    sandbox.python(
        INSTALL
        + INSTALL
        + dedent("""
            import lm_eval.models, lm_eval.tasks, lm_eval.api.registry as registry
            before = list(sys.meta_path), lm_eval.tasks.TaskManager.__init__, registry.MODEL_REGISTRY, sys.excepthook
            sys.meta_path = [finder for finder in sys.meta_path if type(finder).__name__ != "_Finder"]
            autoload.install(); autoload.install()
            after = list(sys.meta_path), lm_eval.tasks.TaskManager.__init__, registry.MODEL_REGISTRY, sys.excepthook
            assert len(before[0]) == len(after[0]) and before[1:] == after[1:]
        """)
    )


@every_known_shape
def test_the_modules_keep_their_own_loaders(sandbox: Sandbox) -> None:
    code = "import lm_eval.models as m, lm_eval.tasks as t; print([(type(x.__loader__), type(x.__spec__.loader), "
    code += "x.__spec__.has_location, x.__file__, x.__path__) for x in (m, t)])"
    assert sandbox.python(INSTALL + code) == sandbox.python(code)


def test_a_finder_that_asks_all_others_is_no_endless_loop(sandbox: Sandbox) -> None:
    sandbox.python(
        INSTALL
        + dedent("""
            class Curious:
                def find_spec(self, name, path=None, target=None):
                    others = (finder for finder in sys.meta_path if finder is not self)
                    return next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
            sys.meta_path.insert(1, Curious())
            from lm_eval.api.registry import get_model
            assert get_model("sdar").__name__ == "SDARLM"
        """)
    )


def test_errors_of_lm_eval_itself_pass_through(sandbox: Sandbox) -> None:
    sandbox.write("lm_eval/models/__init__.py", "import no_such_module")
    done = sandbox.run("-c", INSTALL + "import lm_eval.models")
    assert "No module named 'no_such_module'" in done.stderr and "sdar_lm_eval knows" not in done.stderr


def test_no_lm_eval_no_harm(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-S", "-c", INSTALL + "import lm_eval.models"],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert "No module named 'lm_eval'" in done.stderr


@pytest.mark.parametrize("sandbox", ["unknown"], indirect=True)
def test_an_lm_eval_changed_beyond_recognition_works_on_with_a_warning(sandbox: Sandbox) -> None:
    done = sandbox.run(
        "-c",
        INSTALL + "import lm_eval.models, lm_eval.tasks; from lm_eval.api.registry import get_model\n"
        "print(get_model('hf'), lm_eval.tasks.TaskManager(where=1).folders)",
    )
    assert done.stdout == "HF 1\n"
    warnings = done.stderr.splitlines()
    assert len(warnings) == 2, done.stderr
    assert "lm_eval.models cannot be extended" in warnings[0] and "MODEL_REGISTRY" in warnings[0]
    assert "lm_eval.tasks cannot be extended" in warnings[1] and "include_path" in warnings[1]


def test_importing_the_package_loads_next_to_nothing_and_installs(sandbox: Sandbox) -> None:
    """It happens whenever Python starts: not torch, not lm_eval, not even `typing` or `logging`."""
    code = "import os, sys; before = set(sys.modules); import sdar_lm_eval; print(sorted(set(sys.modules) - before)); "
    code += "print(type(sys.meta_path[0]).__name__)"
    done = sandbox.run("-c", code)
    assert done.stdout.splitlines() == ["['__future__', 'sdar_lm_eval', 'sdar_lm_eval.autoload']", "_Finder"]


def test_the_environment_switches_it_off(sandbox: Sandbox) -> None:
    code = "import sdar_lm_eval, lm_eval.models; from lm_eval.api.registry import model_registry; "
    code += "print(sorted(model_registry.keys()))"
    assert sandbox.python(code) == str(["dummy", *sorted(MODELS)])
    assert sandbox.python(code, SDAR_LM_EVAL_AUTOLOAD="0") == "['dummy']"


@pytest.mark.parametrize("switch", ["0", "1"])
def test_running_the_package_is_lm_eval_whatever_the_environment_says(sandbox: Sandbox, switch: str) -> None:
    sandbox.write(
        "lm_eval/program.py",
        "import sys, lm_eval.models; from lm_eval.api.registry import model_registry\n"
        "print(sys.argv, sorted(model_registry.keys()))",
    )
    done = sandbox.run("-m", "sdar_lm_eval", "ls", "tasks", SDAR_LM_EVAL_AUTOLOAD=switch)
    assert done.stdout == f"['python -m sdar_lm_eval', 'ls', 'tasks'] {['dummy', *sorted(MODELS)]}\n", done.stderr


# Errors on the command line

FAILS = """
    import lm_eval.models
    from sdar_lm_eval.errors import UserError
    raise UserError("block_length=3 is not possible.\\n  Allowed: 4, 8.")
"""
SHORT = "sdar_lm_eval: error: block_length=3 is not possible.\n  Allowed: 4, 8.\n"


def commands(sandbox: Sandbox, program: str) -> dict[str, list[str]]:
    """The ways to start lm_eval's command line, with `program` as what lm_eval does."""
    sandbox.write("lm_eval/program.py", program)
    with (sandbox.folder / "lm_eval/__main__.py").open("a") as main:
        main.write("\nif __name__ == '__main__':\n    import sdar_lm_eval\n    cli_evaluate()\n")
    script = "import sdar_lm_eval; from lm_eval.__main__ import cli_evaluate; cli_evaluate()"
    for name in ("lm_eval", "lm-eval", "script.py"):
        sandbox.write(f"bin/{name}", script)
    return {
        "lm_eval": [str(sandbox.folder / "bin/lm_eval")],
        "lm-eval": [str(sandbox.folder / "bin/lm-eval")],
        "python -m lm_eval": ["-m", "lm_eval"],
        "python -m sdar_lm_eval": ["-m", "sdar_lm_eval", "ls"],
        "script": [str(sandbox.folder / "bin/script.py")],
        "-c": ["-c", script],
    }


@pytest.mark.parametrize("way", ["lm_eval", "lm-eval", "python -m lm_eval", "python -m sdar_lm_eval"])
def test_our_error_is_a_message_on_the_command_line(sandbox: Sandbox, way: str) -> None:
    done = sandbox.run(*commands(sandbox, FAILS)[way])
    assert (done.returncode, done.stderr) == (1, SHORT)


@pytest.mark.parametrize("way", ["script", "-c"])
def test_our_error_is_a_traceback_in_a_program_of_the_users(sandbox: Sandbox, way: str) -> None:
    done = sandbox.run(*commands(sandbox, FAILS)[way])
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback") and "sdar_lm_eval: error" not in done.stderr


def test_the_environment_asks_for_the_traceback(sandbox: Sandbox) -> None:
    command = commands(sandbox, FAILS)["python -m lm_eval"]
    done = sandbox.run(*command, SDAR_LM_EVAL_TRACEBACK="1")
    assert done.stderr.startswith("Traceback") and done.stderr.endswith("UserError: " + SHORT.partition("error: ")[2])
    assert sandbox.run(*command, SDAR_LM_EVAL_TRACEBACK="0").stderr == SHORT


def test_errors_of_others_go_to_the_hook_before_ours(sandbox: Sandbox) -> None:
    program = (
        "import sys; sys.excepthook = lambda *error: print('theirs', error[1]); import lm_eval.models, lm_eval.tasks; "
    )
    command = commands(sandbox, program + "raise ValueError('x')")["lm_eval"]
    done = sandbox.run(*command)
    assert (done.returncode, done.stdout, done.stderr) == (1, "theirs x\n", "")


OURS = "This package's: sdar, sdar-jetengine, sdar-lmdeploy. --model_args pretrained=… names the checkpoint."


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ("--model sdarr", "ValueError(\"Attempted to load model 'sdarr', but no model for this name found!\")",
         f"--model sdarr is unknown. Did you mean 'sdar'? {OURS}"),
        ("--model sdra", "ValueError(\"Attempted to load model 'sdra', but no model for this name found!\")",
         f"--model sdra is unknown. Did you mean 'sdar'? {OURS}"),
        ("--model demo", "ValueError(\"Attempted to load model 'demo', but no model for this name found!\")",
         f"--model demo is unknown. {OURS}"),
        ("--model vlm", "ValueError(\"Attempted to load model 'vlm', but no model for this name found! "
         "Supported model names: hf, vllm, sdar\")", f"--model vlm is unknown. Did you mean 'vllm'? {OURS}"),
        ("--model sdar", "ValueError('Attempted to run task: humaneval_sdar which is marked as unsafe. Set x=True')",
         "--tasks: humaneval_sdar runs programs that the model wrote. --confirm_run_unsafe_code allows them."),
        ("--model sdar --tasks gsm8k_sdr", "ValueError('Tasks not found: gsm8k_sdr')",
         "--tasks: gsm8k_sdr is unknown. Did you mean 'gsm8k_sdar'? `lm_eval ls tasks` lists all."),
    ],
)  # fmt: skip
def test_slips_of_the_pen_with_our_models_are_one_line(sandbox: Sandbox, arguments: str, error: str, says: str) -> None:
    command = commands(sandbox, f"import lm_eval.models\nraise {error}")["lm_eval"]
    done = sandbox.run(*command, *arguments.split())
    assert done.returncode != 0
    assert done.stderr == f"sdar_lm_eval: error: {says}\n"


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ("--model=sdar", "KeyboardInterrupt()", "Interrupted while no answers were made."),
        ("", "__import__('sdar_lm_eval.errors').errors.Interrupted('3 of 5 are kept')", "3 of 5 are kept"),
    ],
)
def test_an_interruption_is_no_error_and_has_its_exit_code(
    sandbox: Sandbox, arguments: str, error: str, says: str
) -> None:
    command = commands(sandbox, f"import lm_eval.models\nraise {error}")["lm_eval"]
    done = sandbox.run(*command, *arguments.split())
    assert (done.returncode, done.stderr) == (INTERRUPTED, f"sdar_lm_eval: {says}\n")


RANKS_HOOK = """
import io, sys, lm_eval.models
from sdar_lm_eval.errors import Interrupted
ours = sys.excepthook

def torchs(*error):
    before, sys.stderr = sys.stderr, io.StringIO()
    try:
        ours(*error)
    finally:
        said, sys.stderr = sys.stderr.getvalue(), before
    sys.stderr.write(said)

sys.excepthook = torchs
try:
    raise Interrupted("3 of 5 are kept")
finally:
    raise KeyboardInterrupt
"""


@pytest.mark.parametrize(("local_rank", "says"), [("0", "sdar_lm_eval: 3 of 5 are kept\n"), ("1", "")])
def test_an_interruption_of_ranks_is_told_once_a_machine(sandbox: Sandbox, local_rank: str, says: str) -> None:
    """Through the hook of torch.distributed, and where the launcher repeats the signal."""
    command = commands(sandbox, RANKS_HOOK)["lm_eval"]
    done = sandbox.run(*command, "--model", "sdar", WORLD_SIZE="4", LOCAL_RANK=local_rank)
    assert (done.returncode, done.stderr) == (INTERRUPTED, says)


@pytest.mark.parametrize(
    ("error", "model", "waits"),
    [
        (UserError("x"), "hf", [0, 3, 4]),
        (EngineError("x"), "sdar", [0, 3, 4]),
        (ValueError("x"), "sdar", [0, 3, 4]),
        (OtherRankError("x"), "sdar", [2, 3, 4]),
        (Interrupted("x"), "sdar", [0, 0, 0]),
        (ValueError("x"), "hf", [0, 0, 0]),
    ],
)
def test_a_rank_lets_the_ranks_before_it_speak(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, model: str, waits: list[int]
) -> None:
    """The launcher ends the ranks that wait."""
    monkeypatch.setattr(sys, "argv", ["lm_eval", "run", "--model", model])
    slept = [0.0] * len(waits)
    for rank in range(len(waits)):
        monkeypatch.setattr(command_line.time, "sleep", lambda seconds, rank=rank: slept.__setitem__(rank, seconds))
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "1")
        command_line.let_others_speak(error)
        assert not slept[rank]
        monkeypatch.setenv("WORLD_SIZE", "3")
        command_line.let_others_speak(error)
    assert slept == waits


@pytest.mark.parametrize("arguments", ["", "--model hf", "--model"])
def test_slips_of_the_pen_with_others_models_are_lm_eval_s_business(sandbox: Sandbox, arguments: str) -> None:
    command = commands(sandbox, "import lm_eval.models\nraise ValueError('Tasks not found: gsm8k_sdr')")["lm_eval"]
    done = sandbox.run(*command, *arguments.split())
    assert done.stderr.startswith("Traceback") and done.stderr.endswith("ValueError: Tasks not found: gsm8k_sdr\n")


@pytest.mark.parametrize(("arguments", "policy"), [("--model sdar", "PASSIVE"), ("--model hf", "None"), ("", "None")])
def test_threads_of_a_command_of_our_models_sleep_while_they_wait(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, arguments: str, policy: str
) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    command = commands(sandbox, "import os; print(os.environ.get('OMP_WAIT_POLICY'))")["lm_eval"]
    assert sandbox.run(*command, *arguments.split()).stdout == f"{policy}\n"
    assert sandbox.run(*command, *arguments.split(), OMP_WAIT_POLICY="ACTIVE").stdout == "ACTIVE\n"


def test_the_hook_is_not_there_before_lm_eval_is(sandbox: Sandbox) -> None:
    sandbox.python(
        INSTALL + "assert sys.excepthook is sys.__excepthook__\n"
        "import lm_eval.models; assert sys.excepthook is autoload._excepthook\n"
        "import lm_eval.tasks; assert sys.excepthook is autoload._excepthook"
    )


# The index of tasks, with the installed lm_eval


@pytest.fixture
def indexed(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each index that is built: whether lm_eval's own tasks belong to it. None of these is read."""
    manager = pytest.importorskip("lm_eval.tasks.manager")
    if not isinstance(inspect.getattr_static(getattr(manager, "TaskIndex", None), "build", None), staticmethod):
        pytest.skip("this lm_eval builds its index another way")
    build, defaults, found = manager.TaskIndex.build, Path(manager.__file__).parent, []

    def without_defaults(paths: list[Path]) -> Any:
        found.append(defaults in paths)
        return build([path for path in paths if path != defaults])

    monkeypatch.setattr(manager.TaskIndex, "build", staticmethod(without_defaults))
    return found


def tasks_of(tasks: str | list[str], model: str = "sdar", **settings: Any) -> TaskManager:
    from lm_eval.config.evaluate_config import EvaluatorConfig

    return EvaluatorConfig(model=model, tasks=tasks, **settings).process_tasks()


@pytest.mark.parametrize("gen_kwargs", [{"strategy": "statc"}, {"thresold": 0.5}, {"temperature": -1}, {"until": 3}])
def test_wrong_gen_kwargs_end_a_command_before_the_model_is_loaded(
    indexed: list[bool], gen_kwargs: dict[str, Any]
) -> None:
    for model in MODELS:
        with pytest.raises(UserError, match=next(iter(gen_kwargs)).replace("strategy", "remasking_strategy")):
            tasks_of("gsm8k_sdar", model, gen_kwargs=gen_kwargs)
    assert indexed == []
    tasks_of("gsm8k_sdar", "hf", gen_kwargs=gen_kwargs)


def test_a_missing_folder_of_tasks_ends_a_command_before_the_tasks_are_indexed(
    indexed: list[bool], tmp_path: Path
) -> None:
    (tmp_path / "file.yaml").write_text("task: mine\n")
    for missing in ("missing", "file.yaml", "x" * 300, "~"):  # no shell expands ~ in --include_path=~
        path = missing if missing == "~" else str(tmp_path / missing)
        for given in (path, [str(tmp_path), path]):
            with pytest.raises(UserError, match=rf"--include_path .*{missing}: no such folder\. Give the folder"):
                tasks_of("gsm8k_sdar", include_path=given)
    assert indexed == []
    tasks_of("gsm8k_sdar", "hf", include_path=str(tmp_path / "missing"))  # another model's command stays as it is


@pytest.mark.parametrize(
    "tasks",
    ["gsm8k_sdar", ["gsm8k_sdar", "math500_sdar"], "gsm8k_sdar,math500_sdar", "sdar_bench", ["mmlu_sdar,gsm8k_sdar"]],
)
def test_a_command_with_our_tasks_only_does_not_index_others(indexed: list[bool], tasks: str | list[str]) -> None:
    manager = tasks_of(tasks)
    assert not any(indexed) and "gsm8k_sdar" in manager.all_tasks
    from lm_eval.tasks import TaskManager

    TaskManager()
    assert indexed[-1]  # a later manager knows all tasks again


def test_a_command_with_other_tasks_indexes_all(indexed: list[bool], tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("task: mine\ndataset_path: json\noutput_type: generate_until\n")
    for tasks, settings, missing in [
        (["gsm8k_sdar", "hellaswag"], {}, "hellaswag"),
        ("no_such_task", {}, "no_such_task"),
        (["gsm8k_sdar*"], {}, ""),
        (["gsm8k_sdar"], {"include_path": str(tmp_path)}, ""),
        (["gsm8k_sdar", "mine"], {"include_path": str(tmp_path)}, ""),
    ]:
        indexed.clear()
        if missing:
            with pytest.raises(ValueError, match=f"Tasks not found: {missing}"):
                tasks_of(tasks, **settings)
        else:
            tasks_of(tasks, **settings)
        assert indexed[-1]


def test_an_error_while_our_tasks_are_read_costs_the_whole_index_only(
    indexed: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(tasks: object) -> None:
        raise TypeError("another lm_eval")

    monkeypatch.setattr(autoload, "manager_of_ours", fails)
    assert "gsm8k_sdar" in tasks_of("gsm8k_sdar").all_tasks
    assert indexed == [True]


def test_our_groups_have_our_tasks_only() -> None:
    """A group that named a task of lm_eval's own could not be loaded from our folder alone."""
    groups, members = [], []
    for path in Path(autoload.TASKS).rglob("*.yaml"):
        content = yaml.load(path.read_text(), Loader=AnyTag)
        if "group" in content and isinstance(content["task"], list):
            groups.append(content["group"])
            members += [task if isinstance(task, str) else task["task"] for task in content["task"]]
    assert len(groups) > 5 and autoload.manager_of_ours([*groups, *members])


class AnyTag(yaml.SafeLoader):
    """Takes `!function …` for text."""


AnyTag.add_multi_constructor("!", lambda loader, suffix, node: str(node.value))


def test_no_task_is_not_ours() -> None:
    assert autoload.manager_of_ours([]) is None


def test_an_include_path_that_cannot_be_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)  # root can read every folder
    with pytest.raises(UserError, match=r"--include_path .*: the folder cannot be read\. Give the folder"):
        require_folders("--include_path", [tmp_path.parent, tmp_path])
