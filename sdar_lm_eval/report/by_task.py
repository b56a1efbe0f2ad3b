"""Several tasks' accuracies side by side, a column for each setting: which tasks parallel decoding breaks."""

from __future__ import annotations

from collections.abc import Sequence

from sdar_lm_eval.report.curve import Summary
from sdar_lm_eval.report.points import settings_in_words
from sdar_lm_eval.report.text_table import as_markdown, fitted, with_error


def by_task(summaries: Sequence[Summary], markdown: bool = False, width: int | None = None) -> str:
    """Return the table, with the settings of its numbered columns above it.

    Args:
        summaries: summaries of tasks that were evaluated together. Each has a point for each setting, in the same
            order.
        markdown: whether the tables are Markdown; False: plain text in columns.
        width: of plain text, as for `fitted`.
    """
    points = summaries[0].points
    settings = [["#", "strategy", "setting"]]
    for number, (point, words) in enumerate(zip(points, settings_in_words(points), strict=True), 1):
        settings.append([str(number), point.strategy, words])
    accuracies = [["accuracy, %", *(number for number, *_ in settings[1:])]]
    for summary in summaries:
        accuracies.append([summary.task, *(with_error(point.accuracy, point.stderr) for point in summary.points)])
    tables = [
        as_markdown(rows, left) if markdown else fitted(rows, left, width, names=1)
        for rows, left in ((settings, {1, 2}), (accuracies, {0}))
    ]
    return "\n\n".join(map("\n".join, tables))
