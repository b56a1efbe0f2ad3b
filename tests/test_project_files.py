"""What stands beside the package: the workflow, the pre-commit hooks, the citation, and the version."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from support import ROOT

MAKEFILE = (ROOT / "Makefile").read_text()
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]


def read(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def made(run: str) -> list[str]:
    """The targets of a step's `make` commands."""
    return [target for line in run.splitlines() if line.startswith("make ") for target in line.split()[1:]]


def test_each_target_that_the_workflow_makes_exists() -> None:
    jobs = read(".github/workflows/ci.yml")["jobs"]
    used = {target for job in jobs.values() for step in job["steps"] for target in made(step.get("run", ""))}
    assert used == {"check", "test", "test-slow", "docs", "wheel"}
    assert used <= set(re.findall(r"^([\w-]+):", MAKEFILE, re.MULTILINE))


def test_whole_runs_take_the_documentation_and_all_tests() -> None:
    targets = dict(re.findall(r"^([\w-]+):.*\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE))
    selected = {name: re.findall(r'-m (?:"(.+?)"|(\w+)) --num', targets[name]) for name in targets if "test" in name}
    assert selected == {"test": [("not slow", "")], "test-slow": [("", "slow")], "test-all": []}
    script = ROOT / ".ci" / "run"
    if script.exists():  # an sdist has none
        assert set(made(script.read_text())) >= {"check", "docs", "test-all"}


def test_the_workflow_tries_each_python_that_the_metadata_name() -> None:
    jobs = read(".github/workflows/ci.yml")["jobs"]
    named = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', (ROOT / "pyproject.toml").read_text())
    assert named == jobs["test"]["strategy"]["matrix"]["python"] == jobs["wheel"]["strategy"]["matrix"]["python"]


def test_hooks_are_what_make_check_runs() -> None:
    (repository,) = read(".pre-commit-config.yaml")["repos"]
    hooks = [hook["entry"] for hook in repository["hooks"]]
    check = re.search(r"^check:.*\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE)
    assert check is not None
    commands = [line.strip().removesuffix(" .") for line in check[1].splitlines()]
    assert hooks == [command.replace("$(BIN)", ".venv/bin") for command in commands]


def test_a_package_that_lists_modules_lists_all_of_them() -> None:
    lists = 0
    for file in (ROOT / "sdar_lm_eval").rglob("__init__.py"):
        text = ast.get_docstring(ast.parse(file.read_text("utf-8"))) or ""
        if len(re.findall(r"^ *\w+\.py\b", text, re.MULTILINE)) > 1:
            lists += 1
            own = {module.name for module in file.parent.glob("*.py")} - {"__init__.py"}
            assert own <= set(re.findall(r"\b\w+\.py\b", text)), file
    assert lists > 5


def test_files_and_classes_stay_short() -> None:
    for file in (ROOT / "sdar_lm_eval").rglob("*.py"):
        text = file.read_text("utf-8")
        assert text.count("\n") <= 450, file
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef):
                assert (node.end_lineno or 0) - node.lineno < 350, (file, node.name)


def test_the_version_has_one_place() -> None:
    """The package: the metadata take it from there, and the citation leaves it out, as its format allows."""
    assert 'dynamic = ["version", ' in (ROOT / "pyproject.toml").read_text()
    assert "version" not in read("CITATION.cff")


@pytest.mark.slow
def test_the_citation_is_valid(tmp_path: Path) -> None:
    """By cffconvert, whose jsonschema is older than this environment's: so the test installs it apart."""
    folder = str(tmp_path / "cffconvert")
    packages = ["cffconvert==2.0.0", "setuptools<81"]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-compile", "--target", folder, *packages]
    installed = subprocess.run(pip, capture_output=True, text=True, check=False)
    if installed.returncode:
        pytest.skip(f"cffconvert cannot be installed: {installed.stderr[-200:]}")
    program = "from cffconvert.cli.cli import cli; cli()"

    def validate(text: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / "CITATION.cff").write_text(text)
        variables = {**os.environ, "PYTHONPATH": folder}
        command = [sys.executable, "-c", program, "--validate"]
        return subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, check=False)

    citation = (ROOT / "CITATION.cff").read_text()
    done = validate(citation)
    assert (done.returncode, "valid according to schema version 1.2.0" in done.stdout) == (0, True), done.stderr
    assert validate(citation.replace("type: software", "type: no-such-type", 1)).returncode != 0
