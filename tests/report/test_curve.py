"""The table and the chart of points."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from sdar_lm_eval.errors import UserError
from sdar_lm_eval.report.aup import aup
from sdar_lm_eval.report.curve import Summary, chart_svg, summarized, table, write_chart
from sdar_lm_eval.report.points import Point

SVG = "{http://www.w3.org/2000/svg}"


def point(strategy: str, dial: tuple[str, float], accuracy: float, forward: float, second: float | None) -> Point:
    settings = {"remasking_strategy": strategy, dial[0]: dial[1], "block_length": 4}
    return Point(f"{strategy} {dial[1]}", "demo", settings, accuracy, 1.5, forward, second, 200, 1, "")


POINTS = [
    point("low_confidence_static", ("denoising_steps", 4), 94.0, 0.76, 810.0),
    point("low_confidence_static", ("denoising_steps", 1), 24.0, 1.92, 1900.0),
    point("low_confidence_dynamic", ("confidence_threshold", 0.5), 68.0, 1.5, 1600.0),
    point("low_confidence_dynamic", ("confidence_threshold", 0.9), 93.5, 1.4, 800.0),
    dataclasses.replace(
        point("sequential", ("denoising_steps", 2), 50.0, 1.3, None), note="some answers came from a store", stderr=None
    ),
]


def summary(y_max: float | None = None) -> Summary:
    return summarized("demo_task", "exact_match,strict-match", POINTS, y_max)


def test_the_table() -> None:
    lines = table(summary()).splitlines()
    assert [line.split() for line in lines[:6]] == [
        ["strategy", "setting", "accuracy,", "%", "tokens", "per", "forward", "tokens/s"],
        ["low_confidence_static", "denoising_steps=4", "94.0", "±", "1.5", "0.76", "*", "810", "*"],
        ["low_confidence_static", "denoising_steps=1", "24.0", "±", "1.5", "1.92", "*", "1,900", "*"],
        ["low_confidence_dynamic", "confidence_threshold=0.5", "68.0", "±", "1.5", "1.50", "*", "1,600", "*"],
        ["low_confidence_dynamic", "confidence_threshold=0.9", "93.5", "±", "1.5", "1.40", "*", "800"],
        ["sequential", "denoising_steps=2", "50.0", "1.30", "unknown"],
    ]
    assert len({line.index("*") for line in lines[1:5]}) == 1  # stars stand below each other
    front = aup([(0.76, 94.0), (1.4, 93.5)], 94.0)
    assert lines[8].split() == ["Pareto", "front", f"{front:.1f}", "2,", "2", "left", "out"]
    assert f"relative to {94.0:.1f}%" in table(summary()) and "Unknown speed: some answers came" in lines[-1]
    assert "relative to 97.0%" in table(summary(97.0))
    few = [dataclasses.replace(each, documents=number) for each, number in zip(POINTS, (1, 1, 2), strict=False)]
    assert "of 1 document ±" in table(summarized("t", "m", few[:2]))
    assert "of 1 or 2 documents ±" in table(summarized("t", "m", few))
    assert "The best of several settings looks better than it is." in table(summary())


def test_rounding_hides_no_difference_of_speed_on_the_front() -> None:
    near = [
        dataclasses.replace(POINTS[0], tokens_per_forward=speed, accuracy=a)
        for speed, a in ((1.4473, 95), (1.4479, 92))
    ]
    lines = table(summarized("demo_task", "exact_match,strict-match", near)).splitlines()
    assert " 1.447 *" in lines[1] and " 1.448 *" in lines[2]


def test_a_metric_of_which_lower_is_better() -> None:
    points = [dataclasses.replace(each, higher_is_better=False) for each in POINTS]
    found = summarized("demo_task", "errors,none", points)
    front = found.fronts["tokens per forward"]
    assert [(each.strategy, each.accuracy) for each in front] == [("low_confidence_static", 24.0)]
    text = table(found)
    assert "AUP: none, because AUP needs a metric of which higher values are better." in text
    assert "Accuracy: errors,none (lower is better) of 200 documents ±" in text and "relative to" not in text
    texts = texts_of(ElementTree.fromstring(chart_svg(points)))
    assert "lower is better ± standard error, %" in texts


def test_the_table_as_markdown() -> None:
    rows = [line for line in table(summary(), markdown=True).splitlines() if line.startswith("|")]
    assert rows[0] == "| strategy | setting | accuracy, % | tokens per forward | tokens/s |"
    assert rows[1] == "| --- | --- | ---: | ---: | ---: |"
    assert rows[2] == "| low_confidence_static | denoising_steps=4 | 94.0 ± 1.5 | 0.76 * | 810 * |"
    assert len({row.count("|") for row in rows[:7]}) == 1


def test_the_json() -> None:
    content = summary(97.0).as_dict()
    points = content["points"]
    assert isinstance(points, list) and content["y_max"] == 97.0
    assert points[3]["on_front"] == {"tokens per forward": True, "tokens/s": False}
    assert (points[0]["varied"], points[0]["accuracy"], points[0]["stderr"]) == ("denoising_steps=4", 94.0, 1.5)
    values = content["aup"]
    assert isinstance(values, list)
    assert [value["curve"] for value in values] == [
        "Pareto front", "low_confidence_static", "low_confidence_dynamic", "sequential"
    ]  # fmt: skip
    assert values[2] == {
        "curve": "low_confidence_dynamic", "aup": aup([(1.4, 93.5)], 97.0), "points": 1, "left_out": 1,
        "interval": None, "ahead": None, "ahead_interval": None,
    }  # fmt: skip


def test_the_same_points_are_the_same_file(tmp_path: Path) -> None:
    files = [tmp_path / "a" / "one.svg", tmp_path / "two.svg"]
    for file in files:
        write_chart(file, [summary()])
    first, second = (file.read_bytes() for file in files)
    assert first == second and b"<dc:date>" not in first
    write_chart(tmp_path / "chart.png", [summary(), summary()])
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")
    write_chart(tmp_path / "chart.pdf", [summary()])
    write_chart(tmp_path / "again.pdf", [summary()])
    assert (tmp_path / "chart.pdf").read_bytes() == (tmp_path / "again.pdf").read_bytes()


def test_where_no_chart_can_be_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"chart\.jpeg: a chart's file ends in \.svg, \.png, \.pdf"):
        write_chart(tmp_path / "chart.jpeg", [summary()])
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_chart(tmp_path / "file" / "chart.svg", [summary()])


def texts_of(svg: ElementTree.Element) -> list[str]:
    return ["".join(text.itertext()) for text in svg.iter(f"{SVG}text")]


def test_the_chart_of_a_page() -> None:
    text = chart_svg(POINTS)
    svg = ElementTree.fromstring(text)
    assert svg.tag == f"{SVG}svg" and text == chart_svg(POINTS)
    told = texts_of(svg)
    expected = [
        "accuracy ± standard error, %",
        "tokens per forward",
        "tokens/s",
        "low_confidence_static",
        "low_confidence_dynamic",
    ]
    assert set(expected) <= set(told)
    styles = [part.get("style") or "" for part in svg.iter()]
    assert all("fill: currentColor" in (part.get("style") or "") for part in svg.iter(f"{SVG}text"))
    # No background: whatever is filled with a fixed colour is a marker, and neither white nor black is there.
    assert not any(re.search(r"(fill|stroke): (#ffffff|#000000|white|black)", style) for style in styles)
    assert svg.find(f".//{SVG}style") is None and "DejaVu" not in text and "metadata" not in text
    ids = [part.get("id") for part in svg.iter() if part.get("id")]
    assert len(ids) == len(set(ids)) and all(f"#{each}" in text for each in ids)


def test_lines_error_bars_and_the_front(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is drawn, by matplotlib's own record of it."""
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (drawn.append(self), save(self, *a, **k)))
    chart_svg(POINTS)
    forward, second = drawn[0].axes
    assert (forward.get_xlabel(), second.get_xlabel()) == ("tokens per forward", "tokens/s")
    static, dynamic, sequential = forward.containers
    assert list(static[0].get_xdata()) == [0.76, 1.92] and list(static[0].get_ydata()) == [94.0, 24.0]
    assert list(dynamic[0].get_xdata()) == [1.4, 1.5]  # the slowest first
    assert [list(map(float, bar[:, 1])) for bar in static[2][0].get_segments()] == [[92.5, 95.5], [22.5, 25.5]]
    front = [line for line in forward.lines if line.get_markerfacecolor() == "none"]
    assert [list(line.get_xdata()) for line in front] == [[0.76, 1.4, 1.5, 1.92]]
    assert list(second.containers[2][0].get_xdata()) == []  # its speed is unknown
    assert sequential[0].get_color() not in (static[0].get_color(), dynamic[0].get_color())


def test_points_without_any_speed_are_a_chart_that_says_so() -> None:
    unknown = [dataclasses.replace(each, tokens_per_second=None) for each in POINTS]
    assert "unknown" in texts_of(ElementTree.fromstring(chart_svg(unknown)))
    assert "unknown" in texts_of(ElementTree.fromstring(chart_svg([])))
