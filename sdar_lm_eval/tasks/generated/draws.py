"""Random choices that are the same in every process and version of Python.

Python promises this of `random.Random.random()` alone (docs.python.org/3/library/random.html, Notes on
Reproducibility): for a given seed, it yields the same numbers in all versions. Its other methods may change. So every
choice here is made of `random()`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

Item = TypeVar("Item")


class Draws:
    """Random choices from a seed, which is any text."""

    def __init__(self, seed: str) -> None:
        self._random = random.Random(seed).random  # a text seeds by its SHA-512, whatever PYTHONHASHSEED

    def below(self, count: int) -> int:
        """Return a number from 0 to `count` - 1."""
        return int(self._random() * count)

    def choice(self, items: Sequence[Item]) -> Item:
        """Return one of the items."""
        return items[self.below(len(items))]

    def sample(self, items: Sequence[Item], count: int) -> list[Item]:
        """Return `count` different items, in random order (Fisher and Yates)."""
        rest = list(items)
        return [rest.pop(self.below(len(rest))) for _ in range(count)]

    def shuffled(self, items: Sequence[Item]) -> list[Item]:
        """Return all items in random order."""
        return self.sample(items, len(items))
