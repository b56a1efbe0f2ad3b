"""Bring the figures of another bundled checkpoint into README.md.

    python tools/demo_figures.py SWEEP [--write]

SWEEP is the folder of the sweep that README.md gives for its table of the demo checkpoint. The command prints each row
as it is and as the sweep has it, marks rows whose accuracy changed by more than 3 percentage points, and, with
`--write`, puts the sweep's figures into README.md and its chart into docs/.

What else depends on the checkpoint's weights, and what makes it again:

    tests/golden/answers.json         python tests/golden/answers.py
    docs/api.ipynb                    python tools/demo_figures.py --notebook
    README.md, "make demo"            make demo
    README.md, "compare" and "show"   the commands that stand there
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
NOTEBOOK = ROOT / "docs" / "api.ipynb"
CHART = ROOT / "docs" / "demo_accuracy.svg"
MOST_CHANGE = 3.0  # percentage points

NAMES = {"low_confidence_static": "static", "low_confidence_dynamic": "dynamic"}
SETTINGS = {"denoising_steps": "{} step{s} a block", "confidence_threshold": "threshold {}", "eb_threshold": "bound {}"}
ROW = re.compile(r"^\| (\w+) \| ([^|]+) \| ([\d.]+) ± [\d.]+ \| [\d.]+ \|$", re.MULTILINE)


def row_of(point: dict[str, Any]) -> str:
    """Return a point of a sweep as a row of README.md's table."""
    settings = point["settings"]
    strategy = NAMES.get(settings["remasking_strategy"], settings["remasking_strategy"])
    dial = next(
        name for name in ("confidence_threshold", "eb_threshold", "denoising_steps") if settings.get(name) is not None
    )
    setting = SETTINGS[dial].format(settings[dial], s="" if settings[dial] == 1 else "s")
    accuracy = f"{point['accuracy']:.1f} ± {point['stderr']:.1f}"
    return f"| {strategy} | {setting} | {accuracy} | {point['tokens_per_forward']:.2f} |"


def replaced(text: str, points: list[dict[str, Any]]) -> tuple[str, list[str]]:
    """Return README.md with the points' rows, and what to print of each row.

    Raises:
        SystemExit: the table has a row that the sweep lacks.
    """
    new = {tuple(row.split(" | ")[:2]): row for row in map(row_of, points)}
    told = []

    def other(found: re.Match[str]) -> str:
        key = (f"| {found[1]}", found[2])
        if key not in new:
            raise SystemExit(f"The sweep has no {found[1]}, {found[2]}. Run the sweep that README.md gives.")
        match = ROW.match(new[key])
        assert match is not None
        change = float(match[3]) - float(found[3])
        told.append(f"{new[key]}  was {found[3]}, {change:+.1f}{'  CHECK' if abs(change) > MOST_CHANGE else ''}")
        return new[key]

    return ROW.sub(other, text), told


def run_notebook() -> None:
    """Run docs/api.ipynb and store it with its outputs."""
    import nbclient
    import nbformat

    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": folder}}).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    nbformat.write(notebook, NOTEBOOK)


def main() -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(description="Bring the figures of another bundled checkpoint into README.md.")
    parser.add_argument("sweep", type=Path, nargs="?", help="the sweep's folder")
    parser.add_argument("--write", action="store_true", help="change README.md and docs/demo_accuracy.svg")
    parser.add_argument("--notebook", action="store_true", help="run docs/api.ipynb and store its outputs")
    args = parser.parse_args()
    if args.sweep:
        (task,) = json.loads((args.sweep / "points.json").read_text("utf-8"))["tasks"]
        text, told = replaced(README.read_text("utf-8"), task["points"])
        print("\n".join(told))
        if args.write:
            README.write_text(text, "utf-8")
            shutil.copy(args.sweep / "accuracy.svg", CHART)
    if args.notebook:
        run_notebook()
    if not args.sweep and not args.notebook:
        parser.print_help(sys.stderr)


if __name__ == "__main__":
    main()
