"""Writes runs as one HTML page: settings, scores, comparison, and each answer with its denoising.

The page is one file, and loads nothing from a network.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from sdar_lm_eval.commands.given import names
from sdar_lm_eval.files import write_output
from sdar_lm_eval.report.page.rendering import page_of
from sdar_lm_eval.report.runs import read_runs

EXAMPLE = "sdar_lm_eval report runs/0.6 runs/0.85 -o report.html"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.add_argument(
        "paths",
        nargs="+",
        metavar="RUN",
        type=Path,
        help="the folder of --output_path; each other run is compared with the first run",
    )
    parser.add_argument(
        "-o", "--output", metavar="FILE", type=Path, default=Path("report.html"), help="default: %(default)s"
    )
    parser.add_argument("--tasks", type=names, metavar="TASK,…", default=(), help="only these tasks")
    parser.add_argument("--title", help="the page's title; default: model and tasks")


def run(arguments: argparse.Namespace) -> str:
    """Write the page, and return its file and size.

    Raises:
        UserError: a run cannot be read, no run has one of the tasks, or the page cannot be written.
    """
    text = page_of(read_runs(arguments.paths), arguments.tasks, arguments.title)
    write_output(arguments.output, text)
    return f"{arguments.output}: {len(text) / 1e6:,.1f} MB"
