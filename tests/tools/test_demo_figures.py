from __future__ import annotations

from typing import Any

import pytest
from demo_figures import PAGES, ROW, figures_of, key_of, replaced

TEXT = """The table:

| strategy | setting | accuracy, % | tokens per forward |
| --- | --- | ---: | ---: |
| static | 4 steps a block | 94.0 ± 1.7 | 0.76 |
| static | 1 step a block | 24.0 ± 3.0 | 1.92 |
| dynamic | threshold 0.85 | 93.5 ± 1.7 | 1.43 |
| entropy_bounded | bound 1.0 | 92.5 ± 1.9 | 1.51 |

| `sequential` | | `steps=4` | 97.0 ± 1.2 | 0.79 |
| `low_confidence_dynamic` (default) | `dynamic` | `threshold=0.85` | 93.5 ± 1.7 | 1.43 |
| another | table | 1 | 2 |
"""


def point(strategy: str, accuracy: float, **settings: Any) -> dict[str, Any]:
    known = {"remasking_strategy": strategy, "block_length": 4, **settings}
    return {"settings": known, "accuracy": accuracy, "stderr": 1.25, "tokens_per_forward": 1.234}


POINTS = [
    point("low_confidence_dynamic", 93.0, confidence_threshold=0.85, denoising_steps=4),
    point("low_confidence_static", 95.0, denoising_steps=4),
    point("low_confidence_static", 20.5, denoising_steps=1),
    point("sequential", 96.0, denoising_steps=4),
    point("entropy_bounded", 92.5, eb_threshold=1.0),
]


def test_the_rows_get_the_sweep_s_figures() -> None:
    text, told = replaced(TEXT, POINTS)
    rows = [
        "| static | 4 steps a block | 95.0 ± 1.2 | 1.23 |",
        "| static | 1 step a block | 20.5 ± 1.2 | 1.23 |",
        "| dynamic | threshold 0.85 | 93.0 ± 1.2 | 1.23 |",
        "| entropy_bounded | bound 1.0 | 92.5 ± 1.2 | 1.23 |",
    ]
    of_readme = [
        "| `sequential` | | `steps=4` | 96.0 ± 1.2 | 1.23 |",
        "| `low_confidence_dynamic` (default) | `dynamic` | `threshold=0.85` | 93.0 ± 1.2 | 1.23 |",
    ]
    lines, before = text.splitlines(), TEXT.splitlines()
    assert lines[4:8] == rows and lines[9:11] == of_readme
    assert lines[:4] + lines[8:9] + lines[11:] == before[:4] + before[8:9] + before[11:]
    was = ["94.0, +1.0", "24.0, -3.5  CHECK", "93.5, -0.5", "92.5, +0.0", "97.0, -1.0", "93.5, -0.5"]
    assert told == [f"{row}  was {each}" for row, each in zip([*rows, *of_readme], was, strict=True)]


def test_a_sweep_that_lacks_a_row() -> None:
    with pytest.raises(SystemExit, match="no static, 1 step a block"):
        replaced(TEXT, [each for each in POINTS if each["accuracy"] != 20.5])


def test_the_tables_are_found() -> None:
    """docs/measurements.md has the 18 settings of its sweep; README.md has five of these rows, with equal figures."""
    of_page, of_readme = (list(ROW.finditer(page.read_text("utf-8"))) for page in PAGES)
    assert (len(of_page), len(of_readme)) == (18, 5)
    strategies = {"static": "low_confidence_static", "dynamic": "low_confidence_dynamic"}
    for row in of_page:
        number = next(word for word in row["setting"].split() if word[0].isdigit())
        dial = {"threshold": "confidence_threshold", "bound": "eb_threshold"}.get(row["setting"].split()[0])
        settings = {dial: float(number)} if dial else {"denoising_steps": int(number)}
        strategy = strategies.get(row["strategy"], row["strategy"])
        assert figures_of(point(strategy, 1.0, **settings))[0] == (row["strategy"], row["setting"])
    figures = {(row["strategy"], row["setting"]): row[0].removeprefix(row["row"]) for row in of_page}
    for row in of_readme:
        assert figures[key_of(row["full"], row["dial"], row["value"])] == row[0].removeprefix(row["row"])
