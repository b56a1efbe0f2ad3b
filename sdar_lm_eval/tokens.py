"""Sequences of token ids."""

from __future__ import annotations

from collections.abc import Sequence

BYTES = 4
"""Most bytes of a character in UTF-8, and so most tokens of one."""


def first_difference(a: Sequence[int], b: Sequence[int]) -> int:
    """Return the index of the first token that differs; the shorter length where one sequence begins the other."""
    if a == b[: len(a)]:  # faster than a loop over the tokens
        return len(a)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
