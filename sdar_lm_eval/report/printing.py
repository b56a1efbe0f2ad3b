"""Texts of others, such as answers and names of folders, as a terminal can print them without acting on them."""

from __future__ import annotations

import re

# C0 without tab and line break, DEL, C1; marks that reorder the text behind them; lone surrogates, which have no UTF-8.
_ACTING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Return a text with a visible character for each that a terminal acts on, that reorders, or that has no UTF-8.

    ESC becomes ␛, for example. The length stays.
    """
    return _ACTING.sub(lambda found: _visible(ord(found[0])), text)


def _visible(code: int) -> str:
    if code < 0x20:
        return chr(0x2400 + code)  # Unicode's pictures of control characters
    return "\u2421" if code == 0x7F else "\ufffd"
