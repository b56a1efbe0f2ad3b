from __future__ import annotations

from sdar_lm_eval.report.text_table import aligned, with_error


def test_columns_are_aligned() -> None:
    assert aligned([["task", "score", ""], ["gsm8k", "9.5", "good"], ["a", "10.0"]], left={0, 2}) == [
        "task   score",
        "gsm8k    9.5  good",
        "a       10.0",
    ]


def test_a_value_and_its_standard_error() -> None:
    assert with_error(0.85, 0.0098, 100) == "85.0 ± 1.0"
    assert with_error(4.86, 1.3, sign="+") == "+4.9 ± 1.3" and with_error(-4.86, None, sign="+") == "-4.9"
