"""Prints a run's scores beside published ones, and says which differences are larger than chance."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from sdar_lm_eval.report.published import PUBLISHED, SIZES, published
from sdar_lm_eval.report.table import ERRORS, LEGEND, read_tables, render
from sdar_lm_eval.report.text_table import columns_of_terminal

EXAMPLE = "sdar_lm_eval table runs --published 8B --published dLLM-RL:SDAR-8B-Chat-static"


FORMATS = ("text", "markdown", "json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.add_argument("paths", nargs="+", metavar="RUN", type=Path, help="the folder of lm_eval's --output_path")
    parser.add_argument(
        "--published",
        metavar="MODEL",
        action="append",
        default=[],
        help="a published row to compare with; may be repeated; default: the row whose name is the run's model. "
        f"Rows: {', '.join([*SIZES, *PUBLISHED])}",
    )
    parser.add_argument("--format", choices=FORMATS, default="text", help="default: text")
    parser.add_argument("--json", dest="format", action="store_const", const="json", help="short for --format json")


def run(arguments: argparse.Namespace) -> str:
    """Return the tables as text, Markdown or JSON.

    Raises:
        UserError: a row is unknown, or no run has scores of the tables' tasks.
    """
    tables = read_tables(arguments.paths, [published(name) for name in arguments.published])
    if arguments.format == "json":
        return json.dumps([table.as_dict() for table in tables], indent=2, ensure_ascii=False)
    legend = LEGEND if any(table.scores for table in tables) else ERRORS
    width, markdown = columns_of_terminal(), arguments.format == "markdown"
    return "\n\n".join([*(render(table, width, markdown) for table in tables), legend])
