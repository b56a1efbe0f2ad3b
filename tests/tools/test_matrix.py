"""The matrix of versions: what it tries, what an attempt leaves, and its page."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import matrix
import pytest
from matrix import COMBINATIONS, ROOT, Combination

PROJECT = (ROOT / "pyproject.toml").read_text()
# Stands in for uv: makes a link to a Python, installs nothing, lists two packages.
UV = """#!{python}
import json, os, pathlib, sys
if sys.argv[1] == "venv":
    bin = pathlib.Path(sys.argv[-1], "bin")
    bin.mkdir(parents=True)
    (bin / "python").symlink_to({program!r})
elif sys.argv[2] == "install":
    pathlib.Path({log!r}).write_text(json.dumps(sys.argv))
    sys.exit({code})
else:
    print(json.dumps([{{"name": "torch", "version": "9.0"}}, {{"name": "lm-eval", "version": "8.0"}}]))
"""
# Stands in for the environment's Python.
PYTHON = """#!{python}
import json, pathlib, sys
if sys.argv[1] == "-c":
    print("3.12.9")
elif sys.argv[2] == "pytest":
    print("2 failed, 30 passed, 1 skipped in 3.21s")
    sys.exit({code})
else:
    score = 0.9 if "--nproc_per_node" in sys.argv else 0.95
    folder = pathlib.Path(sys.argv[-1])
    folder.mkdir()
    scores = {{"gsm8k_sdar_demo": {{"exact_match,flexible-extract": score}}}}
    (folder / "results_1.json").write_text(json.dumps({{"results": scores}}))
"""


def stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch, uv: int = 0, tests: int = 0) -> Path:
    """Put stand-ins on PATH with these exit codes; return the file that gets the arguments of `uv pip install`."""
    log, program = folder / "log.json", folder / "stand_in_python"
    (folder / "uv").write_text(UV.format(python=sys.executable, program=str(program), log=str(log), code=uv))
    program.write_text(PYTHON.format(python=sys.executable, code=tests))
    for file in (folder / "uv", program):
        file.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    return log


def test_each_python_and_each_end_of_the_ranges_is_tried() -> None:
    pythons = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', PROJECT)
    assert {f"python-{python}" for python in pythons} <= set(COMBINATIONS)
    for name, package in {"torch": "torch", "lm-eval": "lm-eval"}.items():
        (oldest,) = re.findall(rf'"{package}>=([\d.]+)', PROJECT)
        assert any(key.startswith(f"{name}-{oldest}") for key in COMBINATIONS)
    assert COMBINATIONS["lowest"].resolution == "lowest-direct"


def test_an_attempt_tells_what_was_installed_and_what_passed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = stand_in(tmp_path, monkeypatch)
    outcome = matrix.attempt(Combination("3.12", {"lm-eval": "8.0"}), tmp_path / "work")
    assert outcome["python"] == "3.12.9" and outcome["versions"] == {"torch": "9.0", "lm-eval": "8.0"}
    assert outcome["tests"] == {"failed": 2, "passed": 30, "skipped": 1}
    assert (outcome["demo"], outcome["two processes"]) == ("19/20", "18/20")
    assert "error" not in outcome
    asked = json.loads(log.read_text())
    assert "lm-eval==8.0" in asked and f"{ROOT}[tasks]" in asked


def test_what_fails_is_kept_without_this_machines_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path, monkeypatch, tests=1)
    outcome = matrix.attempt(Combination("3.12"), tmp_path / "work")
    assert outcome["error"] == "2 failed, 30 passed, 1 skipped in 3.21s" and outcome["demo"] == "19/20"
    stand_in(tmp_path, monkeypatch, uv=2)
    outcome = matrix.attempt(Combination("3.12"), tmp_path / "other")
    assert "error" in outcome and "tests" not in outcome and str(tmp_path) not in outcome["error"]


def test_the_page_is_of_the_kept_outcomes() -> None:
    """`python tools/matrix.py --page` writes it again."""
    assert matrix.PAGE.read_text() == matrix.page(json.loads(matrix.OUTCOMES.read_text()))


def test_a_page_tells_failures_and_what_was_not_run() -> None:
    outcome = {"python": "3.12.9", "date": "2026-12-01", "versions": {"torch": "9.0"}, "tests": {"passed": 3}}
    page = matrix.page({"python-3.12": outcome | {"demo": None, "error": "No such package"}})
    assert "| python-3.12 | 3.12.9 | 9.0 |  |  | 3 passed | - | - | 2026-12-01 |" in page
    assert "| lowest | 3.10 | | | | not run | | | |" in page
    assert "## What failed: python-3.12\n\n```\nNo such package\n```\n" in page
