"""Rules that are written so as to read a text once find what the released patterns find."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdar_lm_eval.tasks import first_option as module
from sdar_lm_eval.tasks.extraction import INVALID
from sdar_lm_eval.tasks.first_option import first_option

SENTENCES = ("答案是", "答案应该是", "答案为")
BOXED = ("correct answer is", "correct option is", "correct answer option is")


def pieces(*words: str) -> st.SearchStrategy[str]:
    return st.lists(st.sampled_from(words), max_size=12).map("".join)


@given(pieces(*SENTENCES, "。", " ", "\n", "\u3000", "x", "A", "是", "答案"))
def test_what_follows_the_words_up_to_the_stop(text: str) -> None:
    text = text.strip()
    for words in SENTENCES:
        found = re.search(rf"{words}\s?(\S+)(?:。|$)", text, re.DOTALL)
        assert module._sentence_behind(words, text) == ("" if found is None else found[1])


@given(
    pieces(*(f"The {words}" for words in BOXED), "the ", ":", " ", "boxed{A}", "boxed{B}", "boxed{AB}", "}", "\n", "x")
)
def test_the_first_box_behind_the_words(text: str) -> None:
    rules = [rule for rule in module._RULES if "boxed" in rule]
    for rule, words in zip(rules, ("correct answer is", "correct option is", "correct answer option is"), strict=True):
        found = re.search(rule.replace("@", "([AB])"), text, re.DOTALL)
        released = re.search(rf"[Tt]he {words}:?.*?boxed{{([AB])}}", text, re.DOTALL)
        assert (found and found[1]) == (released and released[1])


def test_white_space_around_a_response_does_not_count() -> None:
    assert first_option("  C is tempting, but it is B \n") == "B"


@pytest.mark.parametrize("words", [*SENTENCES, "是正确答案", *(f"The {words} " for words in BOXED)])
def test_a_text_in_a_loop_is_read_once(words: str) -> None:
    """The released patterns take minutes."""
    assert first_option(words * (100_000 // len(words)) + " x") == INVALID
