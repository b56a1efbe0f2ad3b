"""Several tasks' accuracies side by side."""

from __future__ import annotations

import dataclasses

from test_curve import POINTS

from sdar_lm_eval.report.by_task import by_task
from sdar_lm_eval.report.curve import Summary, summarized


def summaries() -> list[Summary]:
    worse = [dataclasses.replace(point, accuracy=point.accuracy / 2) for point in POINTS]
    named = (("copy", POINTS), ("shuffle", worse))
    return [summarized(task, "exact_match,strict-match", points) for task, points in named]


def test_the_columns_are_the_settings() -> None:
    settings, accuracies = by_task(summaries()).split("\n\n")
    assert [line.split() for line in settings.splitlines()] == [
        ["#", "strategy", "setting"],
        ["1", "low_confidence_static", "denoising_steps=4"],
        ["2", "low_confidence_static", "denoising_steps=1"],
        ["3", "low_confidence_dynamic", "confidence_threshold=0.5"],
        ["4", "low_confidence_dynamic", "confidence_threshold=0.9"],
        ["5", "sequential", "denoising_steps=2"],
    ]
    assert accuracies.splitlines() == [
        "accuracy, %           1           2           3           4     5",
        "copy         94.0 ± 1.5  24.0 ± 1.5  68.0 ± 1.5  93.5 ± 1.5  50.0",
        "shuffle      47.0 ± 1.5  12.0 ± 1.5  34.0 ± 1.5  46.8 ± 1.5  25.0",
    ]


def test_a_narrow_terminal() -> None:
    assert by_task(summaries(), width=40).split("\n\n")[-2:] == [
        "accuracy, %           3           4\ncopy         68.0 ± 1.5  93.5 ± 1.5\nshuffle      34.0 ± 1.5  46.8 ± 1.5",
        "accuracy, %     5\ncopy         50.0\nshuffle      25.0",
    ]
    assert by_task(summaries(), width=80) == by_task(summaries())


def test_markdown() -> None:
    rows = by_task(summaries(), markdown=True).splitlines()
    assert rows[:3] == [
        "| # | strategy | setting |",
        "| ---: | --- | --- |",
        "| 1 | low_confidence_static | denoising_steps=4 |",
    ]
    assert rows[-4:] == [
        "| accuracy, % | 1 | 2 | 3 | 4 | 5 |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| copy | 94.0 ± 1.5 | 24.0 ± 1.5 | 68.0 ± 1.5 | 93.5 ± 1.5 | 50.0 |",
        "| shuffle | 47.0 ± 1.5 | 12.0 ± 1.5 | 34.0 ± 1.5 | 46.8 ± 1.5 | 25.0 |",
    ]
