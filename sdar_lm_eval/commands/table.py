"""Prints a run's scores beside those that SDAR's authors published, and which differences are larger than chance."""

from __future__ import annotations

import argparse
from pathlib import Path

from sdar_lm_eval.report.table import MODELS, report_of

EXAMPLE = "sdar_lm_eval table runs --published 8B"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.add_argument("paths", nargs="+", metavar="RUN", type=Path, help="what lm_eval's --output_path named")
    parser.add_argument(
        "--published", metavar="MODEL", help=f"published model to compare with: {', '.join(MODELS)}; default: by name"
    )


def run(arguments: argparse.Namespace) -> str:
    """Return the tables."""
    return report_of(arguments.paths, arguments.published)
