"""Writes a GSM8K run as one JSON file: config, metrics, performance and each answer."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from sdar_lm_eval.files import write_output
from sdar_lm_eval.report.gsm8k_json import PREFERRED_FILTER, convert

EXAMPLE = "sdar_lm_eval gsm8k-json demo_results --output gsm8k_results.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.add_argument(
        "path", metavar="RUN", type=Path, help="the folder of --output_path; the run needs --log_samples"
    )
    parser.add_argument("--task", help="the task; needed if the run has several GSM8K tasks")
    parser.add_argument(
        "--filter", help=f"the filter whose answers are scored; default: {PREFERRED_FILTER}, else the task's first"
    )
    parser.add_argument("--output", metavar="FILE", help="write the JSON to this file, and print only the accuracy")


def run(arguments: argparse.Namespace) -> str:
    """Return the JSON text; with --output, write the text there, and return the file's name and the accuracy.

    Raises:
        UserError: the run cannot be converted, or the output cannot be written.
    """
    content = convert(arguments.path, arguments.task, arguments.filter)
    text = json.dumps(content, indent=2, ensure_ascii=False)
    if arguments.output is None:
        return text
    write_output(Path(arguments.output), text + "\n")
    metrics = content["metrics"]
    return f"{arguments.output}: {metrics['percentage']} ({metrics['correct']}/{metrics['total']})"
