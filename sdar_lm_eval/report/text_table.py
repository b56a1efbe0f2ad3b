"""Tables as plain text."""

from __future__ import annotations

from collections.abc import Collection, Sequence


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
