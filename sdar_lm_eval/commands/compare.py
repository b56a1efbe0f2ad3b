"""Compares runs on the documents that the runs share: paired differences, intervals, tests, and settings that differ.

Each run needs samples (--log_samples), and may be of any model of the harness. The first run, or the run that
--baseline names, is A. Each other run is compared with A.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from sdar_lm_eval.commands.given import names
from sdar_lm_eval.errors import UserError, did_you_mean
from sdar_lm_eval.files import write_output
from sdar_lm_eval.report import compare_text
from sdar_lm_eval.report.changed import ChangedDocument, changed_documents
from sdar_lm_eval.report.compare import Comparison, adjusted, compare_runs
from sdar_lm_eval.report.runs import Run, read_runs
from sdar_lm_eval.report.text_table import columns_of_terminal

logger = logging.getLogger(__name__)

EXAMPLE = "sdar_lm_eval compare runs/threshold-0.6 runs/threshold-0.85 --list"

FORMATS = ("text", "markdown", "csv", "json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.add_argument(
        "paths",
        nargs="+",
        metavar="RUN",
        type=Path,
        help="the folder of --output_path; one folder may hold several runs",
    )
    parser.add_argument(
        "--baseline",
        metavar="RUN",
        help="the run to compare with (A): a number from 1, a label, or a part of a label; default: 1",
    )
    parser.add_argument("--tasks", type=names, default=(), metavar="T,…", help="only these tasks")
    parser.add_argument(
        "--metric",
        type=names,
        default=(),
        metavar="M,…",
        help="only these metrics; default: all metrics, but of pass@k only the largest k",
    )
    parser.add_argument("--filter", type=names, default=(), metavar="F,…", help="only these filters")
    parser.add_argument("--list", action="store_true", help="list the documents whose scores differ between A and B")
    parser.add_argument("--format", choices=FORMATS, default="text", help="default: text")
    parser.add_argument("--json", dest="format", action="store_const", const="json", help="short for --format json")
    parser.add_argument(
        "--output", metavar="FILE", type=Path, help="write the comparison to this file, and print only the conclusions"
    )


def run(arguments: argparse.Namespace) -> str:
    """Return the text to print: the comparison, or its sentences where --output names a file.

    Raises:
        UserError: there are fewer than two runs, or no run can be compared with A, or the output cannot be written.
    """
    runs = read_runs(arguments.paths)
    if len(runs) < 2:
        raise UserError(f"{runs[0].label} is one run, and compare takes two or more. Name another run's folder.")
    if arguments.list and arguments.format == "csv":
        raise UserError("--list has no CSV form. Give --format json, or leave --list out.")
    baseline = _baseline(runs, arguments.baseline)
    comparisons = _comparisons(baseline, runs, arguments)
    documents = _changed(comparisons) if arguments.list else None
    if arguments.format == "csv":
        for comparison in comparisons:
            for warning in comparison.warnings:  # a CSV file has no place for them
                logger.warning("A: %s, B: %s: %s", comparison.a.label, comparison.b.label, warning)
        text = compare_text.as_csv(comparisons)
    elif arguments.format == "json":
        text = compare_text.as_json(comparisons, documents)
    elif arguments.format == "markdown":
        text = compare_text.as_markdown(comparisons, documents)
    else:
        width = columns_of_terminal() if arguments.output is None else None
        text = compare_text.as_text(comparisons, documents, width)
    if arguments.output is None:
        return text
    write_output(arguments.output, text + "\n")
    return "\n".join([*compare_text.sentences(comparisons), f"Written to {arguments.output}."])


def _baseline(runs: Sequence[Run], given: str | None) -> Run:
    """The run with a number or label, or the only run whose label has this part."""
    if given is None:
        return runs[0]
    labels = [run.label for run in runs]
    if given in labels:
        return runs[labels.index(given)]
    if given.isdecimal() and 1 <= int(given) <= len(runs):
        return runs[int(given) - 1]
    fitting = [] if given.isdecimal() else [run for run in runs if given in run.label]
    if len(fitting) == 1:
        return fitting[0]
    listed = "; ".join(f"{number}: {label}" for number, label in enumerate(labels, 1))
    what = "fits several runs" if fitting else "is no run"
    raise UserError(f"--baseline {given} {what}; choose {listed}.{'' if fitting else did_you_mean(given, labels)}")


def _comparisons(baseline: Run, runs: Sequence[Run], arguments: argparse.Namespace) -> list[Comparison]:
    """The comparisons with the baseline. A WARNING names a run that is left out, since it cannot be compared."""
    found, problems = [], []
    for other in runs:
        if other is baseline:
            continue
        try:
            chosen = {"tasks": arguments.tasks, "metrics": arguments.metric, "filters": arguments.filter}
            found.append(compare_runs(baseline, other, **chosen))
        except UserError as error:
            problems.append(error)
    if not found:
        raise problems[0]
    for problem in problems:
        logger.warning("%s The run is left out.", problem)
    return adjusted(found)


def _changed(comparisons: Sequence[Comparison]) -> dict[tuple[int, int], list[ChangedDocument]]:
    return {
        (i, j): changed_documents(comparison.a, comparison.b, each.task, each.metric, each.filter)
        for i, comparison in enumerate(comparisons)
        for j, each in enumerate(comparison.differences)
        if each.p is not None
    }
