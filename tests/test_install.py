"""What a user gets: wheel and editable install in fresh environments, and the real lm_eval started there in each way.

A fresh environment has nothing but our package; lm_eval and all else come from the Python that runs the tests, through
a `.pth` file that names its site-packages. Folders named there are searched for modules, but the `.pth` files inside
them are not read, so an install of ours on the testing side does not show (`test_environments_are_fresh`).

A start of lm_eval takes seconds, most of them spent on reading 14,000 task files, so the few commands here cover the
routes between them, and find an lm_eval that has no tasks of its own (`without_stock_tasks`). One with all its tasks
runs in tests/tools/test_release_check.py, from the wheel in a fresh environment.
"""

from __future__ import annotations

import email
import importlib.util
import os
import pkgutil
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
BIN, EXE = ("Scripts", ".exe") if os.name == "nt" else ("bin", "")
EVALUATION = ["--model", "sdar", "--model_args", "pretrained=demo", "--tasks", "gsm8k_sdar_demo", "--limit", "2"]
EVALUATION += ["--gen_kwargs", "max_gen_toks=8"]
STARTUP_FILES = {"sdar_lm_eval_autoload.pth", "sdar_lm_eval_autoload.start"}
Done = subprocess.CompletedProcess[str]

needs_model = pytest.mark.skipif(
    not (ROOT / "sdar_lm_eval/lm/model.py").exists()
    or not (ROOT / "sdar_lm_eval/demo/checkpoint/model.safetensors").exists(),
    reason="needs sdar_lm_eval/lm/model.py and the demo's checkpoint",
)

# What pip writes for `lm_eval = lm_eval.__main__:cli_evaluate` where it installs lm_eval. In a fresh environment it is
# only found, so the tests write it.
CONSOLE_SCRIPT = """
import re
import sys
from lm_eval.__main__ import cli_evaluate
if __name__ == '__main__':
    sys.argv[0] = re.sub(r'(-script\\.pyw|\\.exe)?$', '', sys.argv[0])
    sys.exit(cli_evaluate())
"""


class Environment:
    """A virtual environment of its own, and a folder to work in that holds nothing."""

    def __init__(self, folder: Path) -> None:
        self.work = folder / "work"
        self.work.mkdir(parents=True)
        run([sys.executable, "-m", "venv", "--without-pip", str(folder / "env")])
        self.bin = folder / "env" / BIN
        self.site = Path(self.python("-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip())
        folders = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
        (self.site / "dependencies.pth").write_text("\n".join(folders))
        for name in ("lm_eval", "lm-eval"):
            script = self.bin / name
            script.write_text(f"#!{self.bin / f'python{EXE}'}\n{CONSOLE_SCRIPT}")
            script.chmod(0o755)

    def run(self, command: list[str], **env: str) -> Done:
        # The tester's own settings would let our package in by another door, or change what it does.
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "SDAR_", "LOGLEVEL"))}
        return run(command, cwd=self.work, env={**kept, "HF_HUB_OFFLINE": "1", **env}, check=False)

    def python(self, *arguments: str, **env: str) -> Done:
        return self.run([str(self.bin / f"python{EXE}"), *arguments], **env)

    def pip(self, *arguments: str) -> None:
        # --ignore-installed: pip sees the testing side's packages too, and must not take ours there for this one.
        options = ["--no-index", "--no-deps", "--ignore-installed"] if arguments[0] == "install" else ["--yes"]
        python = str(self.bin / f"python{EXE}")
        run([sys.executable, "-m", "pip", "--python", python, "--quiet", *arguments, *options])


def run(command: list[str], check: bool = True, **options: Any) -> Done:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, **options)
    assert done.returncode == 0 or not check, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)], cwd=ROOT)
    (wheel,) = folder.glob("*.whl")
    return wheel


def install(folder: Path, kind: str, wheel: Path) -> Environment:
    environment = Environment(folder)
    environment.pip("install", *([str(wheel)] if kind == "wheel" else ["--no-build-isolation", "-e", str(ROOT)]))
    return environment


@pytest.fixture(scope="session")
def environments(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> dict[str, Environment]:
    return {kind: install(tmp_path_factory.mktemp(kind), kind, wheel) for kind in ("wheel", "editable")}


# What is installed


def test_wheel_holds_the_whole_package_and_the_startup_files(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    package = (path for path in (ROOT / "sdar_lm_eval").rglob("*") if path.is_file() and path.suffix != ".pyc")
    assert names == {path.relative_to(ROOT).as_posix() for path in package} | STARTUP_FILES


def test_links_of_the_readme_lead_to_the_repository(wheel: Path) -> None:
    """PyPI shows the readme of the metadata, where relative links would lead nowhere."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = email.message_from_bytes(archive.read(name))
    urls = dict(url.split(", ") for url in metadata.get_all("Project-URL") or [])
    repository, shown = urls["Repository"], metadata.get_payload(decode=True).decode("utf-8")
    written = (ROOT / "README.md").read_text("utf-8")
    assert metadata["Description-Content-Type"].startswith("text/markdown")

    expected = [
        target if ":" in target or target.startswith("#") else f"{repository}/blob/main/{target}"
        for target in targets(written)
    ]
    assert targets(shown) == expected and len(set(expected) - set(targets(written))) >= 10
    assert all((ROOT / t.removeprefix(f"{repository}/blob/main/").partition("#")[0]).exists()
               for t in expected if t.startswith(repository))  # fmt: skip
    assert shown.replace(f"{repository}/blob/main/", "") == written


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("[a\nb](docs/c.md#d)", "[a\nb]({}/blob/main/docs/c.md#d)"),
        ("![a](b.png)", "![a]({}/raw/main/b.png)"),
        ("[![a](b.svg)](c.md)", "[![a]({}/raw/main/b.svg)]({}/blob/main/c.md)"),
        ("[a](#b) [c](https://d.org/e) [f](mailto:g@h.org)", "[a](#b) [c](https://d.org/e) [f](mailto:g@h.org)"),
    ],
)
def test_how_the_metadata_rewrite_links(written: str, shown: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    for rule in project["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]["substitutions"]:
        written = re.sub(rule["pattern"], rule["replacement"], written)
    assert written == shown.replace("{}", project["project"]["urls"]["Repository"])


def targets(markdown: str) -> list[str]:
    """What links and pictures of a page lead to, in order."""
    html = MarkdownIt("commonmark").enable("table").render(markdown)
    return re.findall(r'(?:href|src)="([^"]*)"', html)


def test_startup_files_do_what_they_say() -> None:
    """One line to run, for every Python: an import up to 3.14, a function to call from 3.15 on (PEP 829)."""
    lines = (ROOT / "sdar_lm_eval_autoload.pth").read_text().splitlines()
    assert [line for line in lines if not line.startswith("#")] == ["import sdar_lm_eval"]
    (entry_point,) = (ROOT / "sdar_lm_eval_autoload.start").read_text().splitlines()
    assert callable(pkgutil.resolve_name(entry_point))


def test_environments_are_fresh(tmp_path: Path) -> None:
    environment = Environment(tmp_path / "fresh")
    other = tmp_path / "other"
    other.mkdir()
    (other / "startup.pth").write_text("import sys; sys.startup_was_read = True\n")
    (environment.site / "more.pth").write_text(str(other))
    code = "import sys; print(hasattr(sys, 'startup_was_read'), sys.argv[1] in sys.path, 'sdar_lm_eval' in sys.modules)"
    assert environment.python("-c", code, str(other)).stdout.split() == ["False", "True", "False"]


@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_uninstalling_leaves_nothing(tmp_path: Path, wheel: Path, kind: str) -> None:
    before = Environment(tmp_path / "before")
    after = install(tmp_path / "after", kind, wheel)
    files = sorted(path.name for path in after.site.iterdir())
    assert set(files) > STARTUP_FILES
    if kind == "editable":  # Python reads them by name, and the package has to be found before ours imports it
        assert files.index("_sdar_lm_eval.pth") < files.index("sdar_lm_eval_autoload.pth")
    after.pip("uninstall", "sdar-lm-eval")
    for folder in ("site", "bin"):
        left = {path.name for path in getattr(after, folder).iterdir()} - {"__pycache__"}
        assert left == {path.name for path in getattr(before, folder).iterdir()}
    assert after.python("-c", "pass").stderr == ""


# What Python knows then

KNOWN = """
import sys, lm_eval.models, lm_eval.tasks
from lm_eval.api.registry import model_registry
from sdar_lm_eval import autoload
from sdar_lm_eval.engines.registry import MODELS
known = [name for name in MODELS if name in model_registry]
print(known == list(MODELS), hasattr(lm_eval.tasks.TaskManager.__init__, "adds_sdar_tasks"),
      "torch" in sys.modules, autoload.__file__)
"""


@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_lm_eval_knows_us_without_an_import_of_ours(environments: dict[str, Environment], kind: str) -> None:
    environment = environments[kind]
    done = environment.python("-c", KNOWN)
    models, tasks, torch, file = done.stdout.split()
    assert (models, tasks, torch, done.stderr) == ("True", "True", "False", "")
    assert Path(file).is_relative_to(ROOT if kind == "editable" else environment.site)
    switched_off = environment.python("-c", KNOWN, SDAR_LM_EVAL_AUTOLOAD="0")
    assert switched_off.stdout.split()[:2] == ["False", "False"], switched_off.stderr


def test_where_pth_files_are_skipped_an_import_of_ours_does_it(tmp_path: Path, wheel: Path) -> None:
    environment = Environment(tmp_path / "fresh")
    target = str(tmp_path / "target")
    environment.pip("install", str(wheel), "--target", target)
    assert "No module named 'sdar_lm_eval'" in environment.python("-c", KNOWN).stderr
    loaded = "import sys; print('sdar_lm_eval' in sys.modules)"
    assert environment.python("-c", loaded, PYTHONPATH=target).stdout == "False\n"
    done = environment.python("-c", "import sdar_lm_eval" + KNOWN, PYTHONPATH=target)
    assert done.stdout.split()[:2] == ["True", "True"], done.stderr
    done = environment.python("-m", "sdar_lm_eval", "run", "--help", PYTHONPATH=target)
    assert done.stdout.startswith("usage: lm-eval"), done.stderr


# The ways to start lm_eval


@pytest.fixture(scope="session")
def without_stock_tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the setting for an lm_eval of links to the installed one's files, all but those of its tasks."""
    folder = tmp_path_factory.mktemp("lm_eval")
    (folder / "lm_eval" / "tasks").mkdir(parents=True)
    spec = importlib.util.find_spec("lm_eval")
    assert spec is not None and spec.origin is not None
    installed = Path(spec.origin).parent
    code = [path for path in installed.iterdir() if path.name not in ("tasks", "__pycache__")]
    for path in [*code, *(installed / "tasks").glob("*.py")]:
        (folder / "lm_eval" / path.relative_to(installed)).symlink_to(path)
    return {"PYTHONPATH": str(folder)}


SIMPLE_EVALUATE = """
import lm_eval
results = lm_eval.simple_evaluate(model="sdar", model_args="pretrained=demo", tasks=["gsm8k_sdar_demo"], limit=2,
                                  gen_kwargs="max_gen_toks=8")
print(results["n-samples"]["gsm8k_sdar_demo"])
"""


VALIDATE = ["validate", "--tasks", "gsm8k_sdar,gsm8k_sdar_paper,gsm8k_sdar_hash"]


def test_our_script_finds_our_tasks_where_lm_eval_would_not(
    environments: dict[str, Environment], without_stock_tasks: dict[str, str]
) -> None:
    wheel = environments["wheel"]
    done = wheel.run(
        [str(wheel.bin / f"sdar_lm_eval{EXE}"), *VALIDATE], SDAR_LM_EVAL_AUTOLOAD="0", **without_stock_tasks
    )
    assert "All tasks found and valid" in done.stdout, done.stderr


def test_accelerate_launch_finds_our_tasks(
    environments: dict[str, Environment], without_stock_tasks: dict[str, str]
) -> None:
    """`accelerate launch -m lm_eval` starts `python -m lm_eval`, so that way is tried with it."""
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "-m", "lm_eval"]
    done = environments["editable"].python(*launch, *VALIDATE, **without_stock_tasks)
    assert "All tasks found and valid" in done.stdout, done.stderr


@needs_model
def test_plain_lm_eval_evaluates(environments: dict[str, Environment], without_stock_tasks: dict[str, str]) -> None:
    wheel = environments["wheel"]
    done = wheel.python(str(wheel.bin / "lm_eval"), *EVALUATION, **without_stock_tasks)
    assert done.returncode == 0, done.stderr
    assert re.search(r"gsm8k_sdar_demo.*exact_match", done.stdout), done.stdout


@needs_model
def test_a_wrong_argument_is_one_line(
    environments: dict[str, Environment], without_stock_tasks: dict[str, str]
) -> None:
    wheel = environments["wheel"]
    wrong = ["--model_args", "pretrained=demo,no_such_setting=1"]
    done = wheel.python(str(wheel.bin / "lm-eval"), "run", *EVALUATION, *wrong, **without_stock_tasks)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.splitlines()[-1].startswith("sdar_lm_eval: error: model_args: 'no_such_setting' is unknown.")
    assert done.stderr.count("error:") == 1


@needs_model
def test_simple_evaluate_evaluates(environments: dict[str, Environment], without_stock_tasks: dict[str, str]) -> None:
    done = environments["editable"].python("-c", SIMPLE_EVALUATE, **without_stock_tasks)
    assert done.returncode == 0, done.stderr
    assert "'effective': 2" in done.stdout
