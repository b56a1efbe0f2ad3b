"""Texts as a terminal can print them."""

from __future__ import annotations

import pytest

from sdar_lm_eval.report.printing import printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred\x1b]0;title\x07", "␛[31mred␛]0;title␇"),
        ("a\rb\x08\x7f", "a␍b␈␡"),
        ("\x9b31m", "\ufffd31m"),  # CSI in one character
        ("\u202eabc\u202c", "\ufffdabc\ufffd"),
        ("\ud83d", "\ufffd"),
        ("tab\tand\nline: 你好 שלום 👩\u200d🔬", "tab\tand\nline: 你好 שלום 👩\u200d🔬"),
    ],
)
def test_what_a_terminal_would_act_on_is_visible(text: str, shown: str) -> None:
    assert printable(text) == shown and len(shown) == len(text)
