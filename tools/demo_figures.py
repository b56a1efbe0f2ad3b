"""Bring the figures of another bundled checkpoint into the documentation.

    python tools/demo_figures.py SWEEP [--write]

SWEEP is the folder of the sweep that docs/commands.md gives for the table of the demo checkpoint, which is in
docs/measurements.md. README.md has five of the table's rows. The command prints each row as it is and as the sweep has
it, and marks rows whose accuracy changed by more than 3 percentage points. `--write` puts the sweep's figures into both
files, and its chart into docs/.

What else depends on the checkpoint's weights, and what makes it again:

    tests/golden/answers.json         python tests/golden/answers.py
    docs/api.ipynb                    python tools/demo_figures.py --notebook
    README.md, docs/commands.md       the commands there, whose output tests/docs/test_pages_commands.py compares
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

from sdar_lm_eval.spellings import ALIASES

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "docs" / "measurements.md", ROOT / "README.md")
NOTEBOOK = ROOT / "docs" / "api.ipynb"
CHART = ROOT / "docs" / "demo_accuracy.svg"
MOST_CHANGE = 3.0  # percentage points

NAMES = {"low_confidence_static": "static", "low_confidence_dynamic": "dynamic"}
SETTINGS = {"denoising_steps": "{} step{s} a block", "confidence_threshold": "threshold {}", "eb_threshold": "bound {}"}
# A row of docs/measurements.md, or of README.md: `strategy` (a remark) | `short name` | `setting=value` | …
ROW = re.compile(
    r"^(?P<row>\| (?P<strategy>\w+) \| (?P<setting>[^|]+) "
    r"|\| `(?P<full>\w+)`[^|]* \| [^|]*\| `(?P<dial>\w+)=(?P<value>[\d.]+)` )"
    r"\| (?P<accuracy>[\d.]+) ± [\d.]+ \| [\d.]+ \|$",
    re.MULTILINE,
)


def key_of(strategy: str, dial: str, value: str) -> tuple[str, str]:
    """Return the first two cells of a row of docs/measurements.md."""
    name = ALIASES.get(dial, dial)
    return NAMES.get(strategy, strategy), SETTINGS[name].format(value, s="" if value == "1" else "s")


def figures_of(point: dict[str, Any]) -> tuple[tuple[str, str], str]:
    """Return the first two cells of a point of a sweep, and its figures as the other two cells of a row."""
    settings = point["settings"]
    dial = next(
        name for name in ("confidence_threshold", "eb_threshold", "denoising_steps") if settings.get(name) is not None
    )
    figures = f"| {point['accuracy']:.1f} ± {point['stderr']:.1f} | {point['tokens_per_forward']:.2f} |"
    return key_of(settings["remasking_strategy"], dial, str(settings[dial])), figures


def replaced(text: str, points: list[dict[str, Any]]) -> tuple[str, list[str]]:
    """Return a page with the points' figures, and what to print of each row.

    Raises:
        SystemExit: the page has a row that the sweep lacks.
    """
    new = dict(map(figures_of, points))
    told = []

    def other(found: re.Match[str]) -> str:
        key = (found["strategy"], found["setting"])
        if found["full"]:
            key = key_of(found["full"], found["dial"], found["value"])
        if key not in new:
            raise SystemExit(f"The sweep has no {', '.join(key)}. Run the sweep that docs/commands.md gives.")
        row = found["row"] + new[key]
        change = float(new[key].split()[1]) - float(found["accuracy"])
        told.append(f"{row}  was {found['accuracy']}, {change:+.1f}{'  CHECK' if abs(change) > MOST_CHANGE else ''}")
        return row

    return ROW.sub(other, text), told


def run_notebook() -> None:
    """Run docs/api.ipynb and store it with its outputs."""
    import nbclient
    import nbformat

    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        place = {"metadata": {"path": folder}}
        nbclient.NotebookClient(notebook, timeout=600, resources=place, coalesce_streams=True).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    nbformat.write(notebook, NOTEBOOK)


def main() -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(
        description="Bring the figures of another bundled checkpoint into the documentation."
    )
    parser.add_argument("sweep", type=Path, nargs="?", help="the sweep's folder")
    parser.add_argument("--write", action="store_true", help="change the pages and docs/demo_accuracy.svg")
    parser.add_argument("--notebook", action="store_true", help="run docs/api.ipynb and store its outputs")
    args = parser.parse_args()
    if args.sweep:
        (task,) = json.loads((args.sweep / "points.json").read_text("utf-8"))["tasks"]
        for page in PAGES:
            text, told = replaced(page.read_text("utf-8"), task["points"])
            print("\n".join([f"{page.name}:", *told]))
            if args.write:
                page.write_text(text, "utf-8")
        if args.write:
            shutil.copy(args.sweep / "accuracy.svg", CHART)
    if args.notebook:
        run_notebook()
    if not args.sweep and not args.notebook:
        parser.print_help(sys.stderr)


if __name__ == "__main__":
    main()
