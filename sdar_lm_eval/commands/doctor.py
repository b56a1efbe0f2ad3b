"""Lists this machine's versions and devices, the engines that can run here, and what every other engine lacks.

With --run, doctor gives the demo's problems to each engine that can run here, and compares the greedy answers with
those of the native engine in float32 on the CPU. For each answer that differs, doctor says whether rounding explains
the difference. Doctor counts differences under the strategy low_confidence_dynamic, but does not judge these
differences. The exit code of --run is 1 if rounding does not explain a difference, if an engine stops, or if no engine
can run.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.console import Console

from sdar_lm_eval.commands.given import add_pairs, pairs
from sdar_lm_eval.engines.registry import ENGINES
from sdar_lm_eval.errors import EngineError, UserError
from sdar_lm_eval.report.text_table import aligned

if TYPE_CHECKING:
    from sdar_lm_eval.report.machine import EngineStatus
    from sdar_lm_eval.trial import Trial

EXAMPLE = "sdar_lm_eval doctor --run --limit 50"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.add_argument(
        "--run", action="store_true", help="compare the answers of each engine that can run here to the demo's problems"
    )
    parser.add_argument(
        "--engine", action="append", choices=list(ENGINES), help="only this engine; may be repeated; default: all"
    )
    parser.add_argument(
        "--limit", type=int, default=200, metavar="N", help="use the first N problems; default: all 200"
    )
    parser.add_argument(
        "--pretrained", default="demo", help="the checkpoint that the engines load; default: the bundled demo"
    )
    add_pairs(
        parser,
        "--model_args",
        "model_args of the engines: dtype=float32, kernels=false, device=cuda:1, … (needs --run)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> str | None:
    """Print the versions, devices, engines and trials. Return None.

    Raises:
        UserError: an argument is out of range, or is no argument of the engines.
        EngineError: an engine stopped, rounding does not explain an engine's answers, or none of the engines can run.
    """
    model_args = pairs("--model_args", arguments.model_args)
    if arguments.limit < 1:
        raise UserError(f"--limit {arguments.limit} must be 1 or more.")
    if model_args and not arguments.run:
        raise UserError("--model_args needs --run: without --run, doctor loads no engine.")
    names = list(dict.fromkeys(arguments.engine or ENGINES))
    from sdar_lm_eval.report.machine import devices, engine_statuses, no_gpu, versions

    with Console(stderr=True).status("looking for devices and engines"):
        found_versions, found_devices, found = versions(), devices(), engine_statuses(names)
    trials: list[Trial] = []
    if not arguments.json:
        rows = [[name, version or "not installed"] for name, version in found_versions.items()]
        parts = [aligned(rows, left=(0, 1)), [*map(str, found_devices), *filter(None, [no_gpu()])], map(str, found)]
        print("\n\n".join(map("\n".join, parts)), flush=True)
    if arguments.run:
        for trial in _trials(arguments, model_args, found):
            trials.append(trial)
            if not arguments.json:
                _print_trial(trial)
    if arguments.json:
        facts = {
            "versions": found_versions,
            "devices": [dataclasses.asdict(device) for device in found_devices],
            "engines": [{"runs": each.lacks is None, **dataclasses.asdict(each)} for each in found],
            "trials": [trial.as_dict() for trial in trials],
        }
        print(json.dumps(facts, indent=2, ensure_ascii=False))
    elif trials and all(trial.passed for trial in trials):
        absent = [each.name for each in found if each.lacks is not None]
        tried = ", ".join(trial.engine for trial in trials if not trial.is_reference)
        print(
            f"\nTo be trusted on this machine: {tried}."
            + (f" Not tried, since they cannot run here: {', '.join(absent)}." if absent else "")
        )
    failed = [trial.engine + " (the reference)" * trial.is_reference for trial in trials if not trial.passed]
    if failed:
        raise EngineError(f"these engines are not to be trusted on this machine: {', '.join(failed)}.")
    if arguments.run and not any(each.lacks is None for each in found):
        raise EngineError("none of these engines can run here.")
    return None


def _trials(
    arguments: argparse.Namespace, model_args: dict[str, object], found: Sequence[EngineStatus]
) -> Iterator[Trial]:
    """Yield the reference's trial, then that of each engine that can run here; nothing where no engine can."""
    from sdar_lm_eval.trial import Trials

    pretrained = str(model_args.pop("pretrained", arguments.pretrained))
    able = [each.name for each in found if each.lacks is None]
    if not able:
        return
    asked = Trials(pretrained, model_args, able, arguments.limit)
    status = Console(stderr=True).status
    with status("the native engine answers in float32 on the CPU"):
        trial = asked.reference()
    yield trial
    for name in able:
        with status(f"{name} answers"):
            trial = asked.trial(name)
        yield trial


def _print_trial(trial: Trial) -> None:
    title = "reference: " * trial.is_reference + trial.verdict()
    rows = [
        [
            f"  {each.strategy}",
            f"{each.answers - len(each.divergences)} of {each.answers} equal",
            "" if each.is_judged else "not judged: one step may unmask several tokens",
            f"{each.tokens_per_second:,.0f} tokens/s",
        ]
        for each in trial.strategies
    ]
    print("\n" + "\n".join([title, *(aligned(rows, left=(0, 2)) if rows else [])]), flush=True)
