"""Tables as plain text and as Markdown, and the text of a score."""

from __future__ import annotations

import math
import re
import shutil
import sys
from collections.abc import Collection, Sequence

NONE = "–"
"""The text in the place of a value that a run lacks."""


def aligned(rows: Sequence[Sequence[str]], left: Collection[int] = ()) -> list[str]:
    """Return a line for each row, its cells in columns two spaces apart.

    Args:
        rows: the first is the head; rows may have fewer cells than others.
        left: columns whose cells begin at the left; the others end at the right.
    """
    width = max(map(len, rows))
    filled = [[*row, *[""] * (width - len(row))] for row in rows]
    sizes = [max(map(len, cells)) for cells in zip(*filled, strict=True)]
    return [
        "  ".join(
            cell.ljust(size) if column in left else cell.rjust(size)
            for column, (cell, size) in enumerate(zip(row, sizes, strict=True))
        ).rstrip()
        for row in filled
    ]


def fitted(
    rows: Sequence[Sequence[str]], left: Collection[int], width: int | None, names: int | None = None
) -> list[str]:
    """Return the lines of a table, made to fit into a terminal's columns.

    If the table is wider than `width`, columns with one value become lines above the table, and the other columns are
    split into several tables, each of which repeats the names. Rows with the same names have no table of names alone.

    Args:
        rows: as for `aligned`, all with as many cells.
        left: as for `aligned`.
        width: the terminal's columns; None: no limit.
        names: number of columns, from the first on, that hold the names of rows; default: those in `left`.
    """
    lines = aligned(rows, left)
    if width is None or max(map(len, lines)) <= width:
        return lines
    columns = transposed(rows)
    number = len(left) if names is None else names
    same = [column[:2] for column in columns if len(set(column[1:])) == 1]
    others = [place for place, column in enumerate(columns) if len(set(column[1:])) > 1]
    keys = [place for place in others if place < number]
    blocks = [keys]
    for place in others[len(keys) :]:
        wider = [*blocks[-1], place]
        fits = sum(max(map(len, columns[each])) + 2 for each in wider) - 2 <= width
        blocks[-1:] = [wider] if fits or blocks[-1] == keys else [blocks[-1], [*keys, place]]
    parts = [aligned([each for each in same if each[1]], left=(0, 1))] if any(each[1] for each in same) else []
    for block in blocks:
        if block != keys:
            at_left = {at for at, place in enumerate(block) if place in left}
            parts.append(aligned(transposed([columns[place] for place in block]), at_left))
    return "\n\n".join("\n".join(part) for part in parts).splitlines()


def transposed(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    """Return a table's columns as rows."""
    return [list(column) for column in zip(*rows, strict=True)]


def columns_of_terminal() -> int | None:
    """Return how many columns the terminal has that gets the standard output; None where a file gets it."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def as_markdown(rows: Sequence[Sequence[str]], left: Collection[int] = ()) -> list[str]:
    """Return the lines of a Markdown table; the arguments are those of `aligned`, and all rows have as many cells."""
    head, *body = [" | ".join(map(escaped, row)) for row in rows]
    rule = " | ".join("---" if column in left else "---:" for column in range(len(rows[0])))
    return [f"| {line} |" for line in (head, rule, *body)]


def escaped(text: str) -> str:
    """Return a text with Markdown's special characters escaped; a * between spaces, and a _ within a word, are none."""
    return re.sub(r"([\\|`<>\[\]]|\*(?=\S)|(?<=\S)\*|(?<!\w)_|_(?!\w))", r"\\\1", text)


def score(value: float, stderr: float | None, *, share: bool, sign: str = "") -> str:
    """Return a score, and its standard error where that is known: in per cent if it is a share, else with 4 digits.

    Args:
        value: the score; NaN if the run did not score.
        stderr: the score's standard error.
        share: whether the score is a share, 0 to 1.
        sign: "+" for a sign before positive scores too.
    """
    if share or math.isnan(value):
        return with_error(value, stderr, 100, sign)
    return f"{value:{sign}.4g}" + ("" if stderr is None else f" ± {stderr:.2g}")


def with_error(value: float, stderr: float | None, scale: float = 1.0, sign: str = "") -> str:
    """Return a value, and its standard error where that is known, as "85.0 ± 1.0".

    Args:
        value: multiplied by `scale`, as is its error; NaN if the run did not score.
        stderr: the value's standard error.
        scale: 100 for per cent of a share.
        sign: "+" for a sign before positive values too; what rounds to 0 has no sign.
    """
    if math.isnan(value):
        return NONE
    shown = round(scale * value, 1) + 0.0  # never -0.0
    return f"{shown:{sign if shown else ''}.1f}" + ("" if stderr is None else f" ± {scale * stderr:.1f}")
