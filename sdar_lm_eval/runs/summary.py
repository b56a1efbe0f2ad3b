"""What a run of the benchmark prints: its configuration at the start, its result at the end, a sweep's table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from sdar_lm_eval.runs.settings import SWEPT, Run

Json = Mapping[str, Any]


def configuration(runs: Sequence[Run], machine: Mapping[str, Any]) -> str:
    """Return the summary of what is about to run; `machine` names where."""
    run = runs[0]
    varied = {name: list(dict.fromkeys(_value(run.swept[name]) for run in runs)) for name in SWEPT}
    varied["temperature"] = ["0 (greedy)" if value == "0" else value for value in varied["temperature"]]
    rows = {
        "model": run.model_name + (f" at {run.revision}" if run.revision else ""),
        "engine": run.engine,
        "tasks": ", ".join(run.tasks),
        "samples": "all" if run.num_samples is None else f"the first {run.num_samples:,}",
        **{name.replace("_", " "): ", ".join(values) for name, values in varied.items()},
        "max gen length": run.max_gen_length or "the task's",
        "seed": run.seed,
        "verbose": str(run.verbose).lower(),
        **({"programs": "run, as confirmed"} if run.confirm_run_unsafe_code else {}),
        **machine,
    }
    width = max(map(len, rows))
    lines = [f"  {name.ljust(width)}  {value}" for name, value in rows.items()]
    title = "Configuration" if len(runs) == 1 else f"Configuration: a sweep of {len(runs)} runs"
    return "\n".join([title, *lines, f"Each run is: {run.command_line()}" if len(runs) == 1 else ""]).rstrip()


def result(report: Json) -> str:
    """Return the end of a run, from its report.json."""
    performance = report["performance"]
    lines = ["=" * 80, "FINAL RESULTS", "=" * 80]
    if "results" in report:
        metrics = report["metrics"]
        lines.append(f"Accuracy: {metrics['percentage']} ({metrics['correct']}/{metrics['total']}){_error(metrics)}")
        for name, other in metrics["by_filter"].items():
            lines.append(f"  {name}: {other['percentage']} ({other['correct']}/{other['total']}){_error(other)}")
    else:
        for task, scores in report["metrics"].items():
            values = {
                n: v for n, v in scores.items() if "," in n and isinstance(v, (int, float)) and "_stderr" not in n
            }
            lines.append(f"{task}: " + ", ".join(f"{name} {value:.4g}" for name, value in values.items()))
    told = {  # null where nothing was computed
        "Average time a question: {:.2f} s": performance.get("seconds_per_question"),
        "Throughput: {:,.1f} returned tokens/s": performance["tokens_per_second"],
        "Tokens per forward: {:.2f}": performance["tokens_per_forward"],
        "Total time: {:.1f} s of generation": performance.get("total_seconds", performance.get("generation_seconds")),
    }
    lines += [text.format(number) for text, number in told.items() if number is not None]
    return "\n".join(lines)


def sweep_table(reports: Sequence[Json | None], runs: Sequence[Run]) -> str:
    """Return a sweep's table; a run that has no report is `failed`."""
    varied = _varied(runs) or list(SWEPT)
    rows = [[*varied, "accuracy, %", "tokens/s", "tokens/forward"]]
    for run, report in zip(runs, reports, strict=True):
        row = [_value(run.swept[name]) for name in varied]
        if report is None:
            rows.append([*row, "failed", "", ""])
            continue
        performance = report["performance"]
        speeds = (performance["tokens_per_second"], ",.1f"), (performance["tokens_per_forward"], ".2f")
        rows.append([*row, _accuracy(report), *("" if speed is None else f"{speed:{form}}" for speed, form in speeds)])
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    return "\n".join("  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in rows)


def told_apart(run: Run, runs: Sequence[Run]) -> str:
    """Return what a run of a sweep is told by, as " (temperature 0, …)"; "" where there is one run."""
    told = ", ".join(f"{name} {_value(run.swept[name])}" for name in _varied(runs))
    return f" ({told})" if told else ""


def sweep_json(reports: Sequence[Json | None], runs: Sequence[Run], folders: Sequence[str]) -> dict[str, Any]:
    """Return a sweep's one JSON: each run's settings, metrics and speed; its examples stay in its own folder."""
    return {
        "runs": [
            run.swept
            | {"folder": folder, "failed": report is None}
            | ({} if report is None else {name: report[name] for name in ("config", "metrics", "performance")})
            for run, report, folder in zip(runs, reports, folders, strict=True)
        ]
    }


def _varied(runs: Sequence[Run]) -> list[str]:
    return [name for name in SWEPT if len({run.swept[name] for run in runs}) > 1]


def _accuracy(report: Json) -> str:
    if "results" not in report:
        return "see JSON"
    metrics = report["metrics"]
    stderr = metrics["stderr"]
    return f"{100 * metrics['accuracy']:.1f}" + ("" if stderr is None else f" ± {100 * stderr:.1f}")


def _error(metrics: Json) -> str:
    stderr = metrics["stderr"]
    return "" if stderr is None or math.isnan(stderr) else f" ± {100 * stderr:.2f} points"


def _value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
