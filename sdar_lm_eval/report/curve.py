"""Accuracy against speed: the table, the chart and the JSON of operating points.

matplotlib draws the chart, and writes SVG, PNG and PDF files of one figure without a browser. The same figure gives the
same file, byte for byte. altair would need a JavaScript engine to write these files.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from sdar_lm_eval.errors import UserError
from sdar_lm_eval.report.aup import DRAWS, TOLERANCE, CurveValue, Interval, value_of, values_of
from sdar_lm_eval.report.pairing import documents_in_words
from sdar_lm_eval.report.points import Curve, Point, Speed, curves_of, pareto_front, settings_in_words
from sdar_lm_eval.report.statistics import FloatArray
from sdar_lm_eval.report.text_table import as_markdown, fitted, with_error

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".svg", ".png", ".pdf")
"""File name endings of the formats in which a chart can be written."""

# Colours that are readable on white and on black, and distinguishable with colour vision deficiencies. Source: M. Okabe
# and K. Ito, Color Universal Design, without their black and yellow.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
MARKERS = "osD^vP*X"
INK = "#123457"  # a colour that no curve has; `chart_svg` replaces it by currentColor


def by_forward(point: Point) -> float | None:
    """Return the point's tokens per forward; None where it is unknown."""
    return point.tokens_per_forward


def by_second(point: Point) -> float | None:
    """Return the point's tokens per second; None where it is unknown."""
    return point.tokens_per_second


AXES: Mapping[str, Speed] = {"tokens per forward": by_forward, "tokens/s": by_second}
"""Title of a panel's x axis -> its speed."""


@dataclass(frozen=True)
class Summary:
    """The points of a task, with their Pareto fronts and the AUP of their curves.

    Attributes:
        task: the task's name.
        metric: "metric,filter" that counts as the accuracy.
        points: the points.
        fronts: title of a speed's axis -> the points on the Pareto front by this speed (`pareto_front`).
        values: first the AUP of the Pareto front by tokens per forward, then the AUP of each curve.
        y_max: the accuracy that AUP is relative to, in per cent.
    """

    task: str
    metric: str
    points: tuple[Point, ...]
    fronts: Mapping[str, tuple[Point, ...]]
    values: tuple[CurveValue, ...]
    y_max: float

    def as_dict(self) -> dict[str, object]:
        """Return the summary as values that JSON has."""
        told = settings_in_words(self.points)
        return {
            "task": self.task,
            "metric": self.metric,
            "y_max": self.y_max,
            "points": [
                {
                    **point.as_dict(),
                    "varied": words,
                    "on_front": {title: point in front for title, front in self.fronts.items()},
                }
                for point, words in zip(self.points, told, strict=True)
            ],
            "aup": [value.as_dict() for value in self.values],
        }


def summarized(
    task: str,
    metric: str,
    points: Sequence[Point],
    y_max: float | None = None,
    scores: Sequence[FloatArray] = (),
) -> Summary:
    """Return the summary of a task's points.

    Args:
        task: the task's name.
        metric: "metric,filter" that counts as the accuracy.
        points: the points.
        y_max: the best accuracy of all models and methods that are compared, in per cent; None: the best of the points.
        scores: for each point, its scores as `values_of` takes them; empty: AUP has no intervals.
    """
    known = (point.accuracy for point in points if math.isfinite(point.accuracy))
    best = max(known, default=0.0) if y_max is None else y_max
    fronts = {title: tuple(pareto_front(points, speed)) for title, speed in AXES.items()}
    # The scores chose the front, so they cannot say how far chance moves its AUP.
    front = value_of(Curve("Pareto front", fronts["tokens per forward"]), best)
    of_points = {id(point): each for point, each in zip(points, scores, strict=True)} if scores else {}
    values = (front, *values_of(curves_of(points), best, of_points))
    return Summary(task, metric, tuple(points), fronts, values, best)


def table(summary: Summary, markdown: bool = False, width: int | None = None) -> str:
    """Return a summary as a table, with notes below.

    Args:
        summary: the summary.
        markdown: whether the table is Markdown; False: plain text in columns.
        width: of plain text, as for `fitted`.
    """
    rows = [["strategy", "setting", "accuracy, %", *AXES]]
    for point, words in zip(summary.points, settings_in_words(summary.points), strict=True):
        speeds = []
        for (title, speed), form in zip(AXES.items(), (_form(summary), ",.0f"), strict=True):
            value = speed(point)
            star = " *" if point in summary.fronts[title] else ""
            speeds.append("unknown" if value is None else f"{value:{form}}{star}")
        rows.append([point.strategy, words, with_error(point.accuracy, point.stderr), *speeds])
    lower = not _higher_is_better(summary.points)
    notes = [
        "tokens/s: one measurement of each setting, over all tasks. Other work on the machine lowers tokens/s.",
        f"Accuracy: {summary.metric}{' (lower is better)' * lower}{_of_documents(summary.points)} ± one standard "
        "error. * marks the Pareto front: faster points are less accurate.",
        "AUP: none, because AUP needs a metric of which higher values are better."
        if lower
        else f"AUP: accuracy under parallelism (d3LLM), relative to {summary.y_max:.1f}%. Points whose accuracy is "
        f"more than {TOLERANCE:g} percentage points below that of their curve's slowest point are left out.",
    ]
    if any(value.interval is not None for value in summary.values):
        notes.append(
            f"95% intervals of AUP and of its differences: {DRAWS:,} draws of documents, the same documents for all "
            "curves. Tokens per forward count as exact. The Pareto front has no interval, because "
            "the scores chose its points."
        )
        if any(value.aup is not None and value.interval is None for value in summary.values[1:]):
            notes.append("A curve has no interval where each of its points has the same score in all documents.")
    if len(summary.points) > 1:
        notes.append(
            "The best of several settings looks better than it is. sdar_lm_eval compare tests differences of accuracy."
        )
    repeats = max((point.repeats for point in summary.points), default=1)
    if repeats > 1:
        notes.append(f"Up to {repeats} answers to each document; standard errors are clustered by document.")
    notes += dict.fromkeys(f"Unknown speed: {point.note}." for point in summary.points if point.note)
    if not markdown:  # room for the star of a speed on the front keeps the digits of a column below each other
        rows = [[*row[:3], *(cell if cell.endswith("*") else f"{cell}  " for cell in row[3:])] for row in rows]
    tables = _grid(rows, {0, 1}, markdown, width), _grid(_aup_rows(summary.values), {0}, markdown, width)
    return "\n\n".join([*tables, ("\n\n" if markdown else "\n").join(notes)])


def _aup_rows(values: Sequence[CurveValue]) -> list[list[str]]:
    """A head and a row for each curve; columns of intervals only where some curve has an interval."""
    first, *others = [value.name for value in values if value.interval is not None] or [""]
    rows = [["curve", "AUP", *["95% interval"] * bool(first), *[f"minus {first}"] * bool(others), "points"]]
    for its in values:
        cells = [its.name, "none" if its.aup is None else f"{its.aup:.1f}"]
        if first:
            cells.append(_span(its.interval))
        if others:
            cells.append("" if its.ahead is None else f"{its.ahead:+.1f} ({_span(its.ahead_interval, '+')})")
        rows.append([*cells, f"{its.points}, {its.left_out} left out" if its.left_out else f"{its.points}"])
    return rows


def _span(interval: Interval | None, sign: str = "") -> str:
    return "" if interval is None else f"{interval[0]:{sign}.1f} to {interval[1]:{sign}.1f}"


def _form(summary: Summary) -> str:
    """The format of tokens per forward: two to four decimals, as many as tell the points on the front apart."""
    speeds = {point.tokens_per_forward for point in summary.fronts["tokens per forward"]}
    forms = (".2f", ".3f", ".4f")
    return next((form for form in forms if len({f"{speed:{form}}" for speed in speeds}) == len(speeds)), forms[-1])


def _higher_is_better(points: Sequence[Point]) -> bool:
    return all(point.higher_is_better for point in points)


def _of_documents(points: Sequence[Point]) -> str:
    numbers = sorted({point.documents for point in points if point.documents is not None})
    fewer = [f"{number:,}" for number in numbers[:-1]]
    return f" of {' or '.join([*fewer, documents_in_words(numbers[-1])])}" if numbers else ""


def _grid(rows: Sequence[Sequence[str]], left: set[int], markdown: bool, width: int | None) -> str:
    return "\n".join(as_markdown(rows, left) if markdown else fitted(rows, left, width))


def check_suffix(file: Path) -> None:
    """Check the ending of a chart's file name.

    Raises:
        UserError: the ending is none of `SUFFIXES`.
    """
    if file.suffix.lower() not in SUFFIXES:
        raise UserError(f"{file}: a chart's file ends in {', '.join(SUFFIXES)}. Give such a name.")


def write_chart(file: Path, summaries: Sequence[Summary]) -> None:
    """Write the chart of some tasks in the format of the file name's ending. The same points give the same file.

    Raises:
        UserError: the ending is none of `SUFFIXES`, or the file cannot be written.
    """
    check_suffix(file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("wb") as out:
            _draw({summary.task: summary.points for summary in summaries}, out, file.suffix.lower()[1:])
    except OSError as error:
        raise UserError(f"{file} cannot be written: {error.strerror}. Name a file elsewhere.") from error


def chart_svg(points: Sequence[Point]) -> str:
    """Return the chart of a task's points as an SVG element for a page.

    The chart has no background, and its text and axes have the page's colour (`currentColor`), so the chart is readable
    in light and in dark. Text stays text, in a sans-serif font.
    """
    buffer = io.BytesIO()
    _draw({"": points}, buffer, "svg", ink=INK)
    svg = buffer.getvalue().decode("utf-8")
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"(font: [\d.]+px|font-family:) [^;\"]*", r"\1 sans-serif", svg)
    # A page with two charts would hold each id twice, so ids that nothing refers to are removed.
    used = set(re.findall(r"#([\w.-]+)", svg))
    svg = re.sub(r' id="([^"]+)"', lambda found: found[0] if found[1] in used else "", svg)
    described = f'role="img" aria-label="Accuracy against {" and against ".join(AXES)}"'
    return svg.replace("<svg", f'<svg {described} style="stroke-linejoin: round; stroke-linecap: butt"', 1)


def _draw(tasks: Mapping[str, Sequence[Point]], file: IO[bytes], suffix: str, ink: str | None = None) -> None:
    """Draw a row of panels for each task.

    Args:
        tasks: title of a row -> its points.
        file: the chart is written to it.
        suffix: the format: "svg", "png" or "pdf".
        ink: the colour of text and axes, without a background; None: black on white.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {"svg.hashsalt": "sdar_lm_eval", "font.size": 9, "axes.spines.top": False}
    style |= {"axes.spines.right": False, "legend.frameon": False, "axes.grid": True, "grid.alpha": 0.25}
    style |= {"text.parse_math": False}  # a $ in a model's name does not begin a formula
    if ink is not None:
        names = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color")
        style |= {**dict.fromkeys(names, ink), "svg.fonttype": "none"}
    with mpl.rc_context(style):
        figure = Figure(figsize=(9, 0.6 + 3.4 * max(1, len(tasks))), layout="constrained")
        grid = figure.subplots(max(1, len(tasks)), len(AXES), squeeze=False, sharey="row")
        styles: dict[str, tuple[str, str]] = {}
        for row, (title, points) in zip(grid, tasks.items(), strict=True):
            for axes, (name, speed) in zip(row, AXES.items(), strict=True):
                _panel(axes, points, speed, styles, ink or "black")
                axes.set_xlabel(name)
            row[0].set_ylabel(f"{'accuracy' if _higher_is_better(points) else 'lower is better'} ± standard error, %")
            if len(tasks) > 1:
                row[0].set_title(title, loc="left")
        _legend(figure, styles, ink or "black")
        # A date in the file would make the files of equal figures differ.
        dated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(suffix)
        figure.savefig(file, format=suffix, transparent=ink is not None, metadata=dated, dpi=150)


def _panel(axes: Axes, points: Sequence[Point], speed: Speed, styles: dict[str, tuple[str, str]], ink: str) -> None:
    """Draw a line for each curve, and the Pareto front."""
    for curve in curves_of(points):
        index = len(styles)
        colour, marker = styles.setdefault(curve.name, (COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]))
        known = [(fast, point) for point in curve.points if (fast := speed(point)) is not None]
        known.sort(key=lambda pair: pair[0])
        axes.errorbar(
            [fast for fast, _ in known],
            [point.accuracy for _, point in known],
            yerr=[point.stderr or 0.0 for _, point in known],
            color=colour,
            marker=marker,
            markersize=4,
            linewidth=1.2,
            elinewidth=0.8,
            capsize=2,
        )
    front = pareto_front(points, speed)
    axes.plot(
        [speed(point) or 0.0 for point in front], [point.accuracy for point in front],
        linestyle=(0, (1, 2)), color=ink, marker="o", markersize=9, markerfacecolor="none", linewidth=0.8, zorder=1,
    )  # fmt: skip
    if not front:
        axes.text(0.5, 0.5, "unknown", transform=axes.transAxes, ha="center")


def _legend(figure: Figure, styles: Mapping[str, tuple[str, str]], ink: str) -> None:
    """Name the curves and the Pareto front below the panels."""
    from matplotlib.lines import Line2D

    lines = [
        Line2D([], [], color=colour, marker=marker, markersize=4, linewidth=1.2, label=name)
        for name, (colour, marker) in styles.items()
    ]
    lines.append(
        Line2D(
            [], [], color=ink, linestyle=(0, (1, 2)), marker="o", markersize=9, markerfacecolor="none", linewidth=0.8,
            label="Pareto front: faster points are less accurate",
        )
    )  # fmt: skip
    figure.legend(handles=lines, loc="outside lower center", ncols=3, fontsize=8)
