"""The forms of answers: lists, grids, sentences."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from sdar_lm_eval.tasks.generated.kind import Answer, Form

_AROUND = " \t\r\n\"'`*"  # quotes and markup around a part
_BULLET = re.compile(r"^\s*(?:[-*]|\d+[.)])\s+")


class JsonList(Form):
    """A JSON list of texts: `["Ada Smith", "Ben Young"]`."""

    def write(self, answer: Answer) -> str:
        """Return the list as JSON."""
        return json.dumps(list(answer), ensure_ascii=False)

    def strict(self, text: str) -> Answer | None:
        """Return the parts of a text that is a JSON list of texts; else None."""
        try:
            parts: object = json.loads(text)
        except (ValueError, RecursionError):
            return None
        if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
            return None
        return tuple(parts)

    def lenient(self, text: str) -> Answer | None:
        """Return the parts that commas separate behind the last `[`, up to the next `]`; None without any.

        A part loses the quotes and white space around it. Without a `[`, the last line is read.
        """
        return _parts(text, ",")


class SpacedLine(Form):
    """Single words that spaces separate: `Ada Ben Mia`."""

    def write(self, answer: Answer) -> str:
        """Return the words as one line."""
        return " ".join(answer)

    def strict(self, text: str) -> Answer | None:
        """Return the words of a text that is one line with single spaces between words; else None."""
        words = text.strip().split(" ")
        return tuple(words) if all(word and word == "".join(word.split()) for word in words) else None

    def lenient(self, text: str) -> Answer | None:
        """Return the words of a list in brackets, or of the last line, whatever separates them; None without any."""
        return _parts(text, r"[\s,;]")


def _parts(text: str, separator: str) -> Answer | None:
    lines = [line for line in text.split("\n") if line.strip()]
    found = text.rpartition("[")[2].partition("]")[0] if "[" in text else lines[-1] if lines else ""
    parts = (part.strip(_AROUND).removesuffix(".") for part in re.split(separator, found))
    return tuple(part for part in parts if part) or None


@dataclass(frozen=True)
class Grid(Form):
    """Rows of `side` cells, a line each.

    Attributes:
        side: the number of rows, and of cells in a row.
        separator: text between the cells of a row.
    """

    side: int
    separator: str

    def write(self, answer: Answer) -> str:
        """Return the rows, a line each."""
        rows = (answer[start : start + self.side] for start in range(0, len(answer), self.side))
        return "\n".join(self.separator.join(row) for row in rows)

    def strict(self, text: str) -> Answer | None:
        """Return the cells of a text that is `side` lines of `side` cells; else None."""
        rows = [line.split(self.separator) if self.separator else list(line) for line in text.strip().split("\n")]
        return self._cells(rows)

    def lenient(self, text: str) -> Answer | None:
        """Return the cells of the last `side` lines that have `side` cells, whatever separates them; else None.

        A cell is a run of letters, digits or `_`. Where each line is a single run, its characters are the cells.
        """
        runs = (re.findall(r"[^\W_]+|_", line) for line in text.split("\n"))
        rows = [list(row[0]) if len(row) == 1 else row for row in runs]
        return self._cells([row for row in rows if len(row) == self.side][-self.side :])

    def _cells(self, rows: list[list[str]]) -> Answer | None:
        if len(rows) != self.side or any(len(row) != self.side or not all(row) for row in rows):
            return None
        return tuple(cell for row in rows for cell in row)


class Sentence(Form):
    """One sentence: an answer of one part."""

    def write(self, answer: Answer) -> str:
        """Return the sentence."""
        return answer[0]

    def strict(self, text: str) -> Answer | None:
        """Return the text; None where it is blank."""
        return (text.strip(),) if text.strip() else None

    def lenient(self, text: str) -> Answer | None:
        """Return the last line, as a sentence that begins with a capital and ends in a full stop; None without any.

        The line loses a bullet, and the quotes and markup around the sentence.
        """
        lines = [line for line in text.split("\n") if line.strip(_AROUND)]
        if not lines:
            return None
        words = _BULLET.sub("", lines[-1]).strip(_AROUND).rstrip(".!" + _AROUND).split()
        sentence = " ".join(words)
        return (f"{sentence[:1].upper()}{sentence[1:]}.",) if sentence else None
