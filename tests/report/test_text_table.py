from __future__ import annotations

import math

from sdar_lm_eval.report.text_table import aligned, as_markdown, fitted, score, with_error


def test_columns_are_aligned() -> None:
    assert aligned([["task", "score", ""], ["gsm8k", "9.5", "good"], ["a", "10.0"]], left={0, 2}) == [
        "task   score",
        "gsm8k    9.5  good",
        "a       10.0",
    ]


def test_a_table_fits_into_a_terminal() -> None:
    rows = [["task", "shots", "score", "verdict"], ["gsm8k", "0", "9.5", "good"], ["a", "0", "10.0", ""]]
    assert fitted(rows, {0, 3}, 28, names=1) == aligned(rows, left={0, 3})
    # A column with one value is above the table, and what stands at the left still does.
    assert fitted(rows, {0, 3}, 20, names=1) == [
        "shots  0", "", "task   score", "gsm8k    9.5", "a       10.0", "", "task   verdict", "gsm8k  good", "a",
    ]  # fmt: skip


def test_a_value_and_its_standard_error() -> None:
    assert with_error(0.85, 0.0098, 100) == "85.0 ± 1.0"
    assert with_error(math.nan, None, 100) == score(math.nan, None, share=False) == "–"
    assert with_error(-0.0003, None, 100, "+") == with_error(0.0, None, sign="+") == "0.0"
    assert with_error(4.86, 1.3, sign="+") == "+4.9 ± 1.3" and with_error(-4.86, None, sign="+") == "-4.9"


def test_a_score_is_in_per_cent_only_if_it_is_a_share() -> None:
    assert score(0.85, 0.0098, share=True) == "85.0 ± 1.0" and score(0.05, None, share=True, sign="+") == "+5.0"
    assert score(12.3456, 0.567, share=False) == "12.35 ± 0.57" and score(-2.5, None, share=False, sign="+") == "-2.5"


def test_nothing_in_a_cell_acts_as_markdown() -> None:
    rows = [["task", "score"], ["a|b_c _d_ *e* <f> [g] `h`", "0.76 *"]]
    assert as_markdown(rows, left={0}) == [
        "| task | score |",
        "| --- | ---: |",
        r"| a\|b_c \_d\_ \*e\* \<f\> \[g\] \`h\` | 0.76 * |",
    ]
