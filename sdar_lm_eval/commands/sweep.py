"""Evaluates a grid of decoding settings on this machine, and draws accuracy against speed.

Each setting takes one value or several: 0.8,0.9 is two values, 0.5:0.9 is a range in steps of 0.1 (1 for whole
numbers), and 0.5:0.9:0.05 is a range in steps of 0.05. The sweep evaluates all combinations of a grid's values; --and
begins another grid. The weights are loaded once. The sweep's folder keeps each combination's results, samples and
finished answers. After an interruption, the same command computes only what is missing.
"""

from __future__ import annotations

import argparse
import contextlib
import glob
import itertools
import json
import logging
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdar_lm_eval.arguments import decoding_descriptions
from sdar_lm_eval.commands.given import pairs
from sdar_lm_eval.decoding import DECODING_SETTINGS
from sdar_lm_eval.errors import EngineError, UserError
from sdar_lm_eval.spellings import ALIASES

if TYPE_CHECKING:
    from sdar_lm_eval.report.curve import Summary
    from sdar_lm_eval.report.results import Results
    from sdar_lm_eval.report.runs import Run
    from sdar_lm_eval.runs.earlier import PlannedEvaluation
    from sdar_lm_eval.runs.plan import Plan

EXAMPLE = (
    "sdar_lm_eval sweep --model_args pretrained=demo --tasks gsm8k_sdar_demo --strategy dynamic --threshold 0.5:0.9 "
    "--and --strategy static --steps 1,2,4"
)

TABLE, POINTS, CHART = "table{}.md", "points{}.json", "accuracy{}.svg"
"""Files that a sweep writes into its folder; the first sweep's have "" in the place of {}, the second's "-2"."""


class _Setting(argparse.Action):
    """Adds a setting to the last grid."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        *earlier, last = namespace.grids
        if self.dest in last:
            parser.error(f"argument {option}: given twice; separate values by commas, or begin another grid by --and")
        namespace.grids = [*earlier, {**last, self.dest: values}]


class _And(argparse.Action):
    """Begins another grid."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        namespace.grids = [*namespace.grids, {}]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.set_defaults(grids=[{}])
    parser.add_argument("--model", "-M", default="sdar", help="a model of this package (default: sdar)")
    parser.add_argument(
        "--model_args",
        "-a",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="as lm_eval's: pretrained, device, dtype, …",
    )
    parser.add_argument("--tasks", "-t", nargs="+", required=True, metavar="TASK", help="tasks that generate answers")
    parser.add_argument(
        "--limit",
        "-L",
        type=float,
        metavar="N",
        help="evaluate the first N documents of each task; a number below 1 is a share of the documents",
    )
    parser.add_argument(
        "--num_fewshot",
        "-f",
        type=int,
        metavar="N",
        help="few-shot examples in each prompt; default: as each task says",
    )
    parser.add_argument(
        "--gen_kwargs", nargs="+", default=[], metavar="NAME=VALUE", help="settings that all combinations share"
    )
    parser.add_argument("--include_path", metavar="FOLDER", help="a folder with your own tasks")
    parser.add_argument(
        "--confirm_run_unsafe_code", action="store_true", help="allow tasks that run programs written by the model"
    )
    grid = parser.add_argument_group("decoding settings, each with one value or several")
    described = decoding_descriptions() | {"denoising_steps": "denoising steps of a block"}
    for name in DECODING_SETTINGS:
        short = [f"--{alias}" for alias, full in ALIASES.items() if full == name and alias != "block_size"]
        text = described[name].split(". ")[0].rstrip(".").replace("%", "%%")
        grid.add_argument(f"--{name}", *short, dest=name, action=_Setting, metavar="VALUES", help=text)
    grid.add_argument(
        "--and", nargs=0, action=_And, help="begin another grid; settings before and after --and are not combined"
    )
    parser.add_argument(
        "--seed", type=int, metavar="N", help="seed of sampled answers; default: the seed in --model_args, else 1234"
    )
    parser.add_argument(
        "--repeats",
        type=int,
        default=1,
        metavar="N",
        help="evaluate each sampled combination N times, with the seeds S, S + 1, …; S is --seed",
    )
    parser.add_argument(
        "--output_path", "-o", type=Path, metavar="FOLDER", help="the sweep's folder; default: sweeps/<model>-<tasks>"
    )
    parser.add_argument(
        "--metric", metavar="NAME[,FILTER]", help="the metric to plot as accuracy; default: the task's first"
    )
    parser.add_argument(
        "--y_max",
        type=float,
        metavar="PERCENT",
        help="the accuracy that AUP (accuracy under parallelism) is relative to; default: the sweep's best",
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="write the chart to this file too: .svg, .png or .pdf"
    )
    parser.add_argument("--json", action="store_true", help="print JSON rather than tables")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="list the evaluations without running any; a checkpoint from the hub is still fetched",
    )


def run(arguments: argparse.Namespace) -> str:
    """Run the sweep, write its table, points and chart, and return the text to print.

    Raises:
        UserError: an argument cannot be used, or a file cannot be written.
        EngineError: the engine cannot run, or some evaluations failed.
    """
    from lm_eval.utils import setup_logging

    from sdar_lm_eval.runs.plan import SweepArguments, plan

    setup_logging("WARNING")
    if not os.environ.get("LMEVAL_LOG_LEVEL"):  # lm_eval warns of each combination's gen_kwargs
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        logging.getLogger("sdar_lm_eval").setLevel(logging.WARNING)
    if arguments.plot is not None:
        from sdar_lm_eval.report.curve import check_suffix

        check_suffix(arguments.plot)
    if arguments.y_max is not None and not arguments.y_max > 0:
        raise UserError(f"--y_max {arguments.y_max:g} is out of range: give a percentage above 0.")
    if not all(arguments.grids):
        raise UserError("A grid has no settings. Give some, such as --threshold 0.5:0.9, before and after each --and.")
    planned = plan(
        SweepArguments(
            model=arguments.model,
            model_args=pairs("--model_args", arguments.model_args),
            tasks=tuple(dict.fromkeys(name for words in arguments.tasks for name in words.split(",") if name)),
            grids=tuple(arguments.grids),
            gen_kwargs=pairs("--gen_kwargs", arguments.gen_kwargs),
            limit=arguments.limit,
            num_fewshot=arguments.num_fewshot,
            seed=arguments.seed,
            repeats=arguments.repeats,
            output=arguments.output_path,
            include_path=arguments.include_path,
            confirm_run_unsafe_code=arguments.confirm_run_unsafe_code,
            metric=arguments.metric,
        )
    )
    if arguments.dry_run:
        return _listed(planned, arguments.json)
    return _run(planned, arguments)


def _run(planned: Plan, arguments: argparse.Namespace) -> str:
    from sdar_lm_eval.report.pairing import documents_in_words
    from sdar_lm_eval.report.points import points_of
    from sdar_lm_eval.report.runs import Run
    from sdar_lm_eval.report.text_table import columns_of_terminal, with_error
    from sdar_lm_eval.runs import local

    total = len(planned.evaluations)

    def tell(number: int, evaluation: PlannedEvaluation, results: Results | None, error: str | None) -> None:
        told = f"failed: {error}"
        if results is not None:
            task = planned.tasks[0]
            alone = Run(evaluation.label, evaluation.folder, {task: [results]})
            (point,) = points_of([alone], task, arguments.metric)
            documents = "" if point.documents is None else f"{documents_in_words(point.documents)} of "
            told = f"{with_error(point.accuracy, point.stderr)}% of {documents}{task}"
        _say(f"{number}/{total} {evaluation.title}: {told}")

    _say(_counted(planned))
    outcome = local.run(planned, tell)
    summaries = _summaries(outcome.runs, planned.tasks, arguments) if outcome.runs else []
    content = {
        "folder": str(planned.output),
        "sweep": {
            "evaluations": [f"{each.folder.name}/{each.name}" for each in planned.evaluations],
            "metric": arguments.metric,
            "y_max": arguments.y_max,
        },
        "tasks": [summary.as_dict() for summary in summaries],
        "failed": outcome.failed,
    }
    as_json = json.dumps(content, indent=2, ensure_ascii=False)
    parts = []
    if summaries:
        files = _write_files(summaries, content, planned.output, arguments.plot)
        parts = [
            *_tables(summaries, width=columns_of_terminal()),
            f"Written: {', '.join(map(str, files))}\n{_next_steps(planned, summaries)}",
        ]
    text = as_json if arguments.json else "\n\n".join(parts)
    if not outcome.failed:
        return text
    print(text, flush=True)
    raise EngineError(
        f"{len(outcome.failed)} of {total} evaluations failed. The same command runs these again.\n"
        + "\n".join(f"  {name}: {error}" for name, error in outcome.failed.items())
    )


def _summaries(runs: Sequence[Run], tasks: Sequence[str], arguments: argparse.Namespace) -> list[Summary]:
    """Return a summary for each task."""
    from sdar_lm_eval.report.curve import summarized
    from sdar_lm_eval.report.points import metric_of, points_of, scores_of

    found = []
    for task in tasks:
        metric = metric_of(runs[0], task, arguments.metric)
        name = f"{metric.name},{metric.filter}"
        points, scores = points_of(runs, task, name), scores_of(runs, task, name)
        found.append(summarized(task, name, points, arguments.y_max, scores))
    return found


def _tables(summaries: Sequence[Summary], markdown: bool = False, width: int | None = None) -> list[str]:
    """Return a titled table for each task, then one for all tasks where there are several."""
    from sdar_lm_eval.report.by_task import by_task
    from sdar_lm_eval.report.curve import table

    title = "## " if markdown else ""
    tables = [f"{title}{each.task}\n\n{table(each, markdown, width)}" for each in summaries]
    return tables + [f"{title}All tasks\n\n{by_task(summaries, markdown, width)}"] * (len(summaries) > 1)


def _write_files(
    summaries: Sequence[Summary], content: Mapping[str, object], folder: Path, plot: Path | None
) -> list[Path]:
    """Write the sweep's table, points and charts, and return the files. Files of other sweeps stay."""
    from sdar_lm_eval.report.curve import write_chart

    table, points, chart = (folder / name.format(_suffix(folder, content["sweep"])) for name in (TABLE, POINTS, CHART))
    _write(points, json.dumps(content, indent=2, ensure_ascii=False))
    _write(table, "\n\n".join(_tables(summaries, markdown=True)))
    charts = [chart, *([plot] if plot is not None else [])]
    for each in charts:
        write_chart(each, summaries)
    return [table, points, *charts]


def _suffix(folder: Path, sweep: object) -> str:
    """Return what tells a sweep's files from those of other sweeps in the folder; the same sweep has the same files."""
    for number in itertools.count(1):
        suffix = f"-{number}" if number > 1 else ""
        points = folder / POINTS.format(suffix)
        if not points.exists():
            break
        with contextlib.suppress(OSError, ValueError, AttributeError):  # a damaged file may be any sweep's, so it stays
            if json.loads(points.read_text("utf-8")).get("sweep") == sweep:
                break
    return suffix


def _next_steps(planned: Plan, summaries: Sequence[Summary]) -> str:
    """Return the commands that show the sweep's runs."""
    runs = _as_arguments(planned)
    see = f"sdar_lm_eval report {runs} -o report.html"
    if any(len(each.points) > 1 for each in summaries):
        return f"Compare them: sdar_lm_eval compare {runs}; see them: {see}"
    return f"See it: {see}"  # one run, which `compare` refuses


def _as_arguments(planned: Plan) -> str:
    """Return the sweep's runs as arguments of `compare`; a pattern of the shell where the pattern finds these alone."""
    paths = planned.paths
    name = paths[0].name
    if len(paths) > 1 and {*planned.output.glob(f"*/{glob.escape(name)}")} == {*paths}:
        return f"{shlex.quote(str(planned.output))}/*/{shlex.quote(name)}"
    return " ".join(shlex.quote(str(path)) for path in paths)


def _listed(planned: Plan, as_json: bool) -> str:
    """Return the evaluations of a sweep as text or JSON."""
    if as_json:
        rows = [
            {"settings": each.settings, "seed": each.seed, "folder": str(each.folder), "finished": bool(each.results())}
            for each in planned.evaluations
        ]
        return json.dumps({"folder": str(planned.output), "copies": planned.copies, "evaluations": rows}, indent=2)
    lines = [f"  {each.title}" + (" (finished)" if each.results() else "") for each in planned.evaluations]
    return "\n".join([_counted(planned), *lines])


def _counted(planned: Plan) -> str:
    number, copies = len(planned.evaluations), planned.copies
    left_out = f"; {copies} left out as equal but for settings without effect" * bool(copies)
    return f"{number} evaluation{'s' * (number != 1)} in {planned.output}{left_out}"


def _write(file: Path, text: str) -> None:
    try:
        file.write_text(text + "\n", "utf-8")
    except OSError as error:
        raise UserError(
            f"{file} cannot be written: {error.strerror}. Free some space, and run the command again."
        ) from error


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
