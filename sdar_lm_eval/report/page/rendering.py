"""Renders the HTML page of runs from its template, styles and scripts."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2
from markupsafe import Markup

from sdar_lm_eval.errors import UserError, did_you_mean
from sdar_lm_eval.report.page import overview
from sdar_lm_eval.report.page.data import Documents, collect
from sdar_lm_eval.report.page.embedding import allowed_in_html, embedded, policy
from sdar_lm_eval.report.runs import SEEDS, Run
from sdar_lm_eval.report.text_table import NONE

FOLDER = Path(__file__).parent
SCRIPTS = ("documents.js", "denoising.js", "page.js")

CHUNK = 16
"""Number of documents whose details are deflated together. Prompts of a task begin alike, so they deflate well."""


def page_of(runs: Sequence[Run], tasks: Sequence[str] = (), title: str | None = None) -> str:
    """Return the HTML text of the page.

    Args:
        runs: the runs; each other run is compared with the first.
        tasks: names of tasks; empty: all tasks of the runs.
        title: the page's title; None: the models and tasks.

    Raises:
        UserError: no run has one of `tasks`, or a file of a run cannot be read or is not as lm_eval writes it.
    """
    chosen = _chosen_tasks(runs, tasks)
    having = [run for run in runs if any(task in run.of_tasks for task in chosen)]
    documents = collect(having, chosen)
    differing, common = overview.settings_rows(having, chosen)
    points = [(task, overview.speeds_of(having, task)) for task in chosen]
    charts = overview.charts_of(points)
    comparisons = overview.pairs_of(having, chosen, documents)
    views = [
        {"number": number, "key": overview.key_of(number), "name": name, "folder": run.label}
        for number, (run, name) in enumerate(zip(having, _names(having, differing), strict=True))
    ]
    sections = {
        "runs": "Runs",
        "scores": "Scores",
        **({"comparison": "Comparison"} if comparisons else {}),
        **({"charts": "Accuracy and speed"} if charts else {}),
        "documents": "Documents",
    }
    script = "".join((FOLDER / name).read_text("utf-8") for name in SCRIPTS)
    style = (FOLDER / "page.css").read_text("utf-8")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER), autoescape=True, undefined=jinja2.StrictUndefined
    )
    return allowed_in_html(
        environment.get_template("template.html").render(
            policy=policy(script, style),
            title=title or _title(having, chosen),
            facts=_facts(having, chosen, len(documents.rows)),
            sections=list(sections.items()),
            runs=views,
            settings={"differing": differing, "common": common},
            scores=overview.score_rows(having, points, documents),
            comparisons=comparisons,
            charts=[(task, Markup(svg)) for task, svg in charts],
            parts=_parts(documents, views),
            chunk=CHUNK,
            script=Markup(script),
            style=Markup(style),
        )
    )


def _chosen_tasks(runs: Sequence[Run], tasks: Sequence[str]) -> list[str]:
    """The tasks of the page, in the order of the runs' tasks."""
    known = list(dict.fromkeys(task for run in runs for task in run.tasks))
    for task in tasks:
        if task not in known:
            raise UserError(
                f"--tasks {task}: no run has it; the runs have {', '.join(known)}.{did_you_mean(task, known)}"
            )
    return [task for task in known if not tasks or task in tasks]


def _parts(documents: Documents, views: Sequence[Mapping[str, object]]) -> dict[str, str]:
    """Name -> the embedded data that the page's scripts read."""
    chunks = [documents.details[start : start + CHUNK] for start in range(0, len(documents.details), CHUNK)]
    return {
        **{name: embedded(value) for name, value in documents.parts.items()},
        "runs": embedded([{"key": view["key"], "name": view["name"]} for view in views]),
        **{f"details-{number}": embedded(chunk) for number, chunk in enumerate(chunks)},
    }


def _names(runs: Sequence[Run], differing: Sequence[overview.SettingRow]) -> list[str]:
    """The name of each run in the opened document: the settings that differ, else its folder."""
    found = []
    for number, run in enumerate(runs):
        parts = [
            f"{row.name}={row.of_runs[number]}"
            for row in differing
            if row.of_runs[number] != NONE and row.name not in SEEDS
        ]
        found.append(", ".join(dict.fromkeys(parts)) if 0 < len(parts) <= 3 else run.path.name)
    return found


def _title(runs: Sequence[Run], tasks: Sequence[str]) -> str:
    models = list(dict.fromkeys(str(run.results_of(run.tasks[0]).model or run.path.name) for run in runs))
    of_models = " and ".join(Path(model).name for model in models) if len(models) < 4 else f"{len(models)} models"
    return f"{of_models} on {', '.join(tasks) if len(tasks) < 4 else f'{len(tasks)} tasks'}"


def _facts(runs: Sequence[Run], tasks: Sequence[str], documents: int) -> list[str]:
    counted = [(len(runs), "run"), (len(tasks), "task"), (documents, "document")]
    dates = [results.date for run in runs for results in run.results]
    days = list(dict.fromkeys(filter(None, (_day(min(dates)), _day(max(dates))))))
    facts = [f"{number:,} {word}{'' if number == 1 else 's'}" for number, word in counted]
    return [*facts, f"evaluated {' to '.join(days)}"] if days else facts


def _day(seconds: float) -> str | None:
    """The day (UTC) of a time in seconds since 1970; None for a time outside the calendar."""
    try:
        return datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc).strftime("%Y-%m-%d")
    except (OverflowError, ValueError, OSError):
        return None
