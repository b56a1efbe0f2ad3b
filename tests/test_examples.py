"""The scripts of examples/ run on the bundled checkpoint, and find what is there to be found."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support import QUICK_START, ROOT, environment

pytestmark = pytest.mark.slow

EXAMPLES = ROOT / "examples"


def run(script: str, folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / script), *arguments],
        cwd=folder, env=environment(QUICK_START), capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_each_example_is_listed_and_tested() -> None:
    scripts = {path.name for path in EXAMPLES.glob("*.py")}
    listed = set(re.findall(r"^\| \[(\w+\.py)\]\(\1\)", (EXAMPLES / "README.md").read_text(), re.MULTILINE))
    assert scripts == listed == set(re.findall(r'run\("(\w+\.py)"', Path(__file__).read_text()))


def test_own_questions(tmp_path: Path) -> None:
    """An answer that the file has wrong counts as wrong; the others are mostly right."""
    lines = (EXAMPLES / "questions.jsonl").read_text().splitlines()
    wrong = json.loads(lines[0]) | {"answer": "1"}
    (tmp_path / "own.jsonl").write_text("\n".join([json.dumps(wrong), *lines[1:]]))
    told = run("evaluate_questions.py", tmp_path, "--questions", "own.jsonl")
    rows = [row for row in told.splitlines() if row.endswith(("True", "False"))]
    assert len(rows) == len(lines) and rows[0].endswith("False")
    found = re.search(r"(\d) of 6 right\n$", told)
    assert found is not None and int(found[1]) == sum(row.endswith("True") for row in rows) >= 4


def test_a_sweep_and_its_chart(tmp_path: Path) -> None:
    arguments = ["--limit", "6", "--thresholds", "0.5,0.9", "--plot", "chart.svg"]
    told = run("sweep_and_plot.py", tmp_path, *arguments)
    rows = re.findall(r"^ *(low_confidence_\w+) +([\d.]+|NaN) +[\d.]+ +[\d.]+ +([\d.]+)$", told, re.MULTILINE)
    assert [row[:2] for row in rows] == [
        ("low_confidence_dynamic", "0.5"), ("low_confidence_dynamic", "0.9"), ("low_confidence_static", "NaN"),
    ]  # fmt: skip
    assert float(rows[0][2]) > float(rows[2][2])  # fewer forwards than one token a step
    chart = (tmp_path / "chart.svg").read_text()
    assert chart.startswith("<?xml") and all(f"<!-- {text} -->" in chart for text in ("tokens per forward", " 0.5"))


@pytest.mark.parametrize("likelihood", ["chain", "nelbo"])
def test_scores(tmp_path: Path, likelihood: str) -> None:
    told = run("score_texts.py", tmp_path, "--likelihood", likelihood)
    _, first, *others = told.splitlines()
    assert first.endswith("We get 4 * 38 = 152 coins.") and len(others) == 2
    shares = [float(line.split()[2]) for line in (first, *others)]
    assert shares == sorted(shares, reverse=True) and sum(shares) == pytest.approx(1, abs=0.002)
