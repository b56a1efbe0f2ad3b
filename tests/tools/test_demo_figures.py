from __future__ import annotations

from typing import Any

import pytest
from demo_figures import README, ROW, replaced, row_of

TEXT = """The table:

| strategy | setting | accuracy, % | tokens per forward |
| --- | --- | ---: | ---: |
| static | 4 steps a block | 94.0 ± 1.7 | 0.76 |
| static | 1 step a block | 24.0 ± 3.0 | 1.92 |
| dynamic | threshold 0.85 | 93.5 ± 1.7 | 1.43 |
| entropy_bounded | bound 1.0 | 92.5 ± 1.9 | 1.51 |

| another | table | 1 | 2 |
"""


def point(strategy: str, accuracy: float, **settings: Any) -> dict[str, Any]:
    known = {"remasking_strategy": strategy, "block_length": 4, **settings}
    return {"settings": known, "accuracy": accuracy, "stderr": 1.25, "tokens_per_forward": 1.234}


POINTS = [
    point("low_confidence_dynamic", 93.0, confidence_threshold=0.85, denoising_steps=4),
    point("low_confidence_static", 95.0, denoising_steps=4),
    point("low_confidence_static", 20.5, denoising_steps=1),
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
    assert text.splitlines()[4:8] == rows
    assert text.splitlines()[:4] + text.splitlines()[8:] == TEXT.splitlines()[:4] + TEXT.splitlines()[8:]
    assert told == [
        f"{row}  was {was}"
        for row, was in zip(rows, ["94.0, +1.0", "24.0, -3.5  CHECK", "93.5, -0.5", "92.5, +0.0"], strict=True)
    ]


def test_a_sweep_that_lacks_a_row() -> None:
    with pytest.raises(SystemExit, match="no static, 1 step a block"):
        replaced(TEXT, [each for each in POINTS if each["accuracy"] != 20.5])


def test_readme_s_table_is_found() -> None:
    """It has the 18 settings of its sweep, whose rows this command would write."""
    rows = [found[0] for found in ROW.finditer(README.read_text("utf-8"))]
    assert len(rows) == 18
    strategies = {"static": "low_confidence_static", "dynamic": "low_confidence_dynamic"}
    for row in rows:
        _, strategy, setting, *_ = row.split(" | ", 3)[0].split("| ") + row.split(" | ")[1:]
        number = float(next(word for word in setting.split() if word[0].isdigit()))
        dial = {"threshold": "confidence_threshold", "bound": "eb_threshold"}.get(setting.split()[0])
        settings = {dial: number} if dial else {"denoising_steps": int(number)}
        assert row_of(point(strategies.get(strategy, strategy), 1.0, **settings)).startswith(
            f"| {strategy} | {setting} |"
        )
