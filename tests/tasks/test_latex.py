"""The rules on LaTeX that several scorers share."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdar_lm_eval.tasks.latex import (
    bare_value,
    braced_fractions,
    closing_brace,
    last,
    remove,
    sub,
    through,
    unbraced,
    up_to,
    without_commas,
)


@pytest.mark.parametrize(
    ("text", "index"),
    [("2}", 1), ("2}+{3}", 1), ("{2}+{3}}x", 7), ("}{", 0), ("", None), ("2", None), ("{2}", None), ("{{2}", None)],
)
def test_the_brace_that_closes_one_before_the_text(text: str, index: int | None) -> None:
    assert closing_brace(text) == index


@pytest.mark.parametrize(
    ("text", "braced"),
    [
        ("\\frac12", "\\frac{1}{2}"),
        ("x+\\frac1{72}y", "x+\\frac{1}{72}y"),
        ("\\frac{1}2\\frac34", "\\frac{1}2\\frac{3}{4}"),
        ("\\frac12\\frac3", "\\frac12\\frac3"),
        ("\\frac", "\\frac"),
        ("1/2", "1/2"),
    ],
)
def test_both_parts_of_a_fraction_get_braces(text: str, braced: str) -> None:
    assert braced_fractions(text) == braced


@pytest.mark.parametrize(
    ("text", "value"),
    [("x=5", "5"), (".5", "0.5"), ("ab=.5", ".5"), ("abc=5", "abc=5"), ("x=y=5", "x=y=5"), ("=5", "5"), ("", "")],
)
def test_a_short_name_in_front_of_a_value_is_left_out(text: str, value: str) -> None:
    assert bare_value(text) == value


def test_steps_run_in_their_order() -> None:
    assert through([*remove("a", "bc"), last(r"=(\d+)"), without_commas], "babc =1 =2") == "2"
    assert [without_commas(text) for text in ("1,234", "x,y", "1,5.0")] == ["1234", "x,y", "1,5.0"]


PIECES = ("\\text{", "\\text{(", ")}", "}", "{", "(", "a", "\n", "\\boxed{")


@given(st.lists(st.sampled_from(PIECES), max_size=10).map("".join))
def test_a_bound_changes_no_match(text: str) -> None:
    assert unbraced("text")(text) == re.sub(r"\\text\{(.*?)\}", r"\1", text)
    for end, pattern in ((")}", r"\\text\{\((.*?)\)\}"), ("}", r"\\boxed\{(.*)\}")):
        assert up_to(end, sub(pattern, r"<\1>"))(text) == re.sub(pattern, r"<\1>", text)
    assert last(r"oxed\{(.*?)\}", end="}")(text) == last(r"oxed\{(.*?)\}")(text)
