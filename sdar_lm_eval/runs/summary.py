"""What a benchmark run prints: the configuration at the start, the result at the end, a sweep's table."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import TypedDict, final

from sdar_lm_eval.report.gsm8k_json import Benchmark, FilterMetrics
from sdar_lm_eval.report.text_table import aligned, with_error
from sdar_lm_eval.runs.grid import Setting
from sdar_lm_eval.runs.settings import SWEPT, RunSettings, scored_by


@final
class BenchmarkReport(Benchmark):
    """report.json of a run of one task of GSM8K."""

    scored_by: str


@final
class TasksReport(TypedDict):
    """report.json of other runs; their examples are in lm_eval's samples files.

    `metrics` are lm_eval's by task, `performance` is what the run counted (`report/counts.py`).
    """

    config: dict[str, object]
    metrics: dict[str, Mapping[str, object]]
    performance: Mapping[str, object]
    scored_by: str


Report = BenchmarkReport | TasksReport


def valid_report(content: bytes) -> Report | None:
    """Return the report in a report.json; None where the file is damaged, or of other sources of this package."""
    try:
        report = json.loads(content)
    except ValueError:
        return None
    return report if isinstance(report, dict) and report.get("scored_by") == scored_by() else None  # type: ignore[return-value]


def configuration(runs: Sequence[RunSettings], machine: Mapping[str, object]) -> str:
    """Return what is printed before runs begin; `machine` has further rows, on where they run."""
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
    lines = [f"  {line}" for line in aligned([(name, str(value)) for name, value in rows.items()], left={0, 1})]
    title = "Configuration" if len(runs) == 1 else f"Configuration: a sweep of {len(runs)} runs"
    return "\n".join([title, *lines, f"Each run is: {run.command_line()}" if len(runs) == 1 else ""]).rstrip()


def result(report: Report) -> str:
    """Return what is printed at the end of a run."""
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


def sweep_table(reports: Sequence[Report | None], runs: Sequence[RunSettings]) -> str:
    """Return a sweep's table; a run without a report is `failed`."""
    varied = _varied(runs) or list(SWEPT)
    rows = [[*varied, "accuracy, %", "tokens/s", "tokens per forward"]]
    for run, report in zip(runs, reports, strict=True):
        row = [_value(run.swept[name]) for name in varied]
        if report is None:
            rows.append([*row, "failed"])
            continue
        performance = report["performance"]
        speeds = (performance["tokens_per_second"], ",.1f"), (performance["tokens_per_forward"], ".2f")
        rows.append([*row, _accuracy(report), *("" if speed is None else f"{speed:{form}}" for speed, form in speeds)])
    return "\n".join(aligned(rows))


def sweep_label(run: RunSettings, runs: Sequence[RunSettings]) -> str:
    """Return the settings in which a run differs from others of its sweep: " (temperature 0, …)"; "" for a lone run."""
    told = ", ".join(f"{name} {_value(run.swept[name])}" for name in _varied(runs))
    return f" ({told})" if told else ""


def sweep_json(
    reports: Sequence[Report | None], runs: Sequence[RunSettings], folders: Sequence[str]
) -> dict[str, list[dict[str, object]]]:
    """Return a sweep's JSON: each run's settings, metrics and speed. The examples stay in the runs' own folders."""
    listed: list[dict[str, object]] = []
    for run, report, folder in zip(runs, reports, folders, strict=True):
        entry: dict[str, object] = {**run.swept, "folder": folder, "failed": report is None}
        if report is not None:
            entry |= {name: report[name] for name in ("config", "metrics", "performance")}
        listed.append(entry)
    return {"runs": listed}


def _varied(runs: Sequence[RunSettings]) -> list[str]:
    return [name for name in SWEPT if len({run.swept[name] for run in runs}) > 1]


def _accuracy(report: Report) -> str:
    if "results" not in report:
        return "see JSON"
    return with_error(report["metrics"]["accuracy"], report["metrics"]["stderr"], 100)


def _error(metrics: FilterMetrics) -> str:
    stderr = metrics["stderr"]
    return "" if stderr is None or math.isnan(stderr) else f" ± {100 * stderr:.2f} points"


def _value(value: Setting) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
