"""docs/extend.md: its examples, added to a copy of the package by its steps, work."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pages import blocks
from support import ROOT

pytestmark = pytest.mark.slow

PROGRAM = """
import json, sys
import sdar_lm_eval, lm_eval
from lm_eval.tasks import TaskManager
from sdar_lm_eval import load

def evaluate(model, arguments, task):
    found = lm_eval.simple_evaluate(
        model, model_args=arguments, tasks=[task], limit=2, bootstrap_iters=0, log_samples=True,
        task_manager=TaskManager(include_path="my_tasks", include_defaults=False),
    )
    return found["results"][task], [sample["resps"][0][0] for sample in found["samples"][task]]

with load("demo") as model:
    asked = ({"strategy": "timid", "timid_count": 2}, {"strategy": "static"})
    answers = [model.generate("Tom has 5 pens.", max_gen_toks=16, **settings) for settings in asked]
    try:
        sdar_lm_eval.DecodingConfig(timid_count=1.5)
    except sdar_lm_eval.UserError as error:
        mistake = str(error)
    told = {
        "mistake": mistake,
        "package": sdar_lm_eval.__path__[0],
        "steps": [list(answer.denoising.steps) for answer in answers],
        "confidences": [list(answer.denoising.confidences) for answer in answers],
    }
told["mine"] = evaluate("sdar", "pretrained=demo", "mine")
told["family"] = evaluate("sdar", "pretrained=renamed", "mine")
told["echo"] = evaluate("sdar-echo", "pretrained=demo", "mine")
print("told:" + json.dumps(told))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package with all examples."""
    folder = tmp_path_factory.mktemp("extended")
    shutil.copytree(ROOT / "sdar_lm_eval", folder / "sdar_lm_eval", ignore=shutil.ignore_patterns("__pycache__"))
    for block in blocks("python", "yaml", "text"):
        path, _, line = block.title.partition(", after: ")
        file = folder / path
        if line:
            lines = file.read_text("utf-8").splitlines(keepends=True)
            (index,) = (i for i, each in enumerate(lines) if each.strip() == line)
            lines.insert(index + 1, block.text)
            file.write_text("".join(lines), "utf-8")
        elif block.title:
            assert not file.exists()
            file.parent.mkdir(exist_ok=True)
            file.write_text(block.text, "utf-8")
    shutil.copytree(ROOT / "sdar_lm_eval" / "demo" / "checkpoint", folder / "renamed")
    config = json.loads((folder / "renamed" / "config.json").read_text())
    (folder / "renamed" / "config.json").write_text(json.dumps(config | {"model_type": "my_sdar"}))
    return folder


def run(folder: Path, *words: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(folder), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


def test_each_example_works(folder: Path) -> None:
    printed = run(folder, "-c", PROGRAM)
    told = json.loads(printed.partition("told:")[2])
    assert Path(told["package"]).parent == folder
    assert "timid_count=1.5" in told["mistake"] and "whole number" in told["mistake"]

    # Both see the same first forward: timid keeps the least confident token, static the most confident one.
    timid, static = (of[steps.index(0)] for steps, of in zip(told["steps"], told["confidences"], strict=True))
    assert timid < static
    assert max(told["steps"][0]) == 1  # two of four tokens a step

    scores, answers = told["mine"]
    assert scores["exact_match,last-number"] == 1 and "####" in answers[0]
    assert told["family"] == told["mine"]
    scores, answers = told["echo"]
    assert scores["exact_match,last-number"] == 0 and len(set(answers)) == 1


def test_the_command_of_the_page(folder: Path) -> None:
    assert run(folder, "-m", "sdar_lm_eval", "hello", "runs") == "Hello, runs.\n"
    assert "greet a run" in run(folder, "-m", "sdar_lm_eval", "--help")


def test_the_packages_tests_hold(folder: Path) -> None:
    """Another strategy and another engine break no test that goes over all of them. The pages have no new rows here."""
    for each in ("tests", "tools", "docs", "README.md", "modal_runner.py", "pyproject.toml"):
        copy = shutil.copytree if (ROOT / each).is_dir() else shutil.copy
        copy(ROOT / each, folder / each)
    page = folder / "docs" / "settings.md"
    page.write_text(page.read_text("utf-8") + "\n<!-- table: echo -->\n\n", "utf-8")
    run(folder, "tools/settings_tables.py")
    assert "`timid_count`" in page.read_text("utf-8")
    files = (
        "docs/test_site.py::test_all_settings_are_listed", "engines/native/test_strategies.py",
        "engines/native/test_watching.py", "engines/test_registry.py", "test_decoding.py", "test_reading_settings.py",
    )  # fmt: skip
    options = ("-q", "-x", "-o", "addopts=", "-p", "no:cacheprovider", "-m", "not slow", "-k", "not pages_name_them")
    run(folder, "-m", "pytest", *(f"tests/{each}" for each in files), *options)


def test_the_code_keeps_the_rules(folder: Path) -> None:
    """ruff's, as for the package. mypy takes 20 s and more."""
    pytest.importorskip("ruff")
    shutil.copy(ROOT / "pyproject.toml", folder)
    titles = [block.title for block in blocks("python")]
    added = [title for title in titles if title.startswith("sdar_lm_eval") and "," not in title]
    run(folder, "-m", "ruff", "check", *added)
    run(folder, "-m", "ruff", "format", "--check", *added)
