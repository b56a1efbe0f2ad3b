"""JSON objects of results files and samples files, whose values are checked when they are read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sdar_lm_eval.errors import UserError
from sdar_lm_eval.files import shown


@dataclass(frozen=True)
class Fields:
    """A JSON object of a results file or a samples file. Every value is checked when it is read.

    `text`, `number` and `whole` return None where the key is missing or its value is null. They raise `UserError` where
    the value has another type.

    Attributes:
        content: key -> value, unchecked.
        file: the file that holds the object, for messages.
        place: the keys that lead to the object, each with a dot behind it, for messages.
    """

    content: Mapping[str, object]
    file: Path
    place: str = ""

    def part(self, key: str) -> Fields:
        """Return the object under a key. A key that is missing, or whose value is no object, is a `UserError`."""
        value = self.content.get(key)
        if not isinstance(value, dict):
            raise self.malformed(key, "an object")
        return Fields(value, self.file, f"{self.place}{key}.")

    def part_or_empty(self, key: str) -> Fields:
        """Return the object under a key; an empty one where the key is missing or its value is null or empty."""
        return self.part(key) if self.content.get(key) else Fields({}, self.file, f"{self.place}{key}.")

    def text(self, key: str) -> str | None:
        """Return the string under a key."""
        value = self.content.get(key)
        if value is not None and not isinstance(value, str):
            raise self.malformed(key, "a string")
        return value

    def number(self, key: str) -> float | None:
        """Return the number under a key."""
        value = self.content.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise self.malformed(key, "a number")
        return value

    def whole(self, key: str) -> int | None:
        """Return the whole number under a key."""
        value = self.content.get(key)
        if isinstance(value, bool) or not isinstance(value, (int, type(None))):
            raise self.malformed(key, "a whole number")
        return value

    def malformed(self, key: str, expected: str) -> UserError:
        """Return the error for a key whose value is not what was expected."""
        found = f"is {shown(self.content[key])}, not {expected}" if key in self.content else "is missing"
        return UserError(
            f"{self.file} is not as lm_eval writes it ({self.place}{key} {found}). Evaluate again, or name the folders "
            "of other runs."
        )
