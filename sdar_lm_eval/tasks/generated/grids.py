"""Puzzles on a grid of 4 x 4: Latin squares, of which any is right, and sudokus, which have one solution."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

from sdar_lm_eval.tasks.generated.draws import Draws
from sdar_lm_eval.tasks.generated.forms import Grid
from sdar_lm_eval.tasks.generated.kind import Answer, Case, Form, Kind, Size

SIDE, BOX = 4, 2
BLANK = "_"
DIGITS = ("1", "2", "3", "4")
GIVENS: Mapping[Size, int] = {"chat": 12, "demo": 10}
"""The numbers of cells that a sudoku shows."""

SYMBOLS: Mapping[Size, str] = {"chat": "ABCDEFGHJKLMNPQRSTUVWXYZ", "demo": "0123456789"}

_ROWS = [tuple(range(row * SIDE, (row + 1) * SIDE)) for row in range(SIDE)]
_COLUMNS = [tuple(range(column, SIDE * SIDE, SIDE)) for column in range(SIDE)]
_BOXES = [
    tuple((top + row) * SIDE + left + column for row in range(BOX) for column in range(BOX))
    for top in range(0, SIDE, BOX)
    for left in range(0, SIDE, BOX)
]


def solutions(cells: Answer, symbols: Answer, *, boxes: bool) -> Iterator[Answer]:
    """Yield each grid that completes the cells: every symbol once in each row and column, and box if `boxes`."""
    if BLANK not in cells:
        yield cells
        return
    place = cells.index(BLANK)
    units = [unit for unit in (*_ROWS, *_COLUMNS, *(_BOXES if boxes else ())) if place in unit]
    seen = {cells[other] for unit in units for other in unit}
    for symbol in symbols:
        if symbol not in seen:
            yield from solutions((*cells[:place], symbol, *cells[place + 1 :]), symbols, boxes=boxes)


SOLVED = tuple(solutions((BLANK,) * SIDE * SIDE, DIGITS, boxes=True))
"""The 288 solved sudokus."""

_SQUARES = tuple(solutions((BLANK,) * SIDE * SIDE, DIGITS, boxes=False))  # the 576 Latin squares


class _GridKind(Kind):
    def form(self, size: Size) -> Form:
        """Return CSV for chat models, rows of digits for the bundled checkpoint."""
        return Grid(SIDE, "," if size == "chat" else "")


class LatinSquare(_GridKind):
    """A grid that has each of four symbols once in every row and column."""

    def draw(self, draws: Draws, size: Size, number: int) -> Case:
        """Return four symbols, and a random square of them."""
        symbols = tuple(draws.sample(SYMBOLS[size], SIDE))
        square = tuple(symbols[DIGITS.index(digit)] for digit in draws.choice(_SQUARES))
        return Case(symbols, square, tuple(sorted(symbols)))

    def question(self, case: Case, size: Size) -> str:
        """Return what to fill in with which symbols."""
        if size == "demo":
            return f"Square: {''.join(case.given)}"
        return (
            f"Fill a grid of {SIDE} rows and {SIDE} columns with the symbols {', '.join(case.given)}. Each row and "
            "each column has every symbol exactly once. Any such grid is right. Answer with the grid only: a line for "
            "each row, with commas between the symbols."
        )

    def is_right(self, case: Case, answer: Answer) -> bool:
        """Return whether each row and each column has every symbol once."""
        if len(answer) != SIDE * SIDE:
            return False
        return all(sorted(answer[place] for place in unit) == sorted(case.given) for unit in (*_ROWS, *_COLUMNS))


class Sudoku(_GridKind):
    """A grid with blank cells, which can be filled in one way only."""

    def draw(self, draws: Draws, size: Size, number: int) -> Case:
        """Return a solved grid with some cells blank, so that no other grid completes the rest."""
        solved = draws.choice(SOLVED)
        while True:
            shown = set(draws.sample(range(SIDE * SIDE), GIVENS[size]))
            cells = tuple(cell if place in shown else BLANK for place, cell in enumerate(solved))
            if len(list(itertools.islice(solutions(cells, DIGITS, boxes=True), 2))) == 1:
                return Case(cells, solved, ("".join(solved),))

    def question(self, case: Case, size: Size) -> str:
        """Return the rules and the grid."""
        grid = self.form(size).write(case.given)
        if size == "demo":
            return f"Fill in:\n{grid}"
        return (
            f"Solve this sudoku. Each row, each column and each of the four {BOX} x {BOX} boxes has the numbers 1 to "
            f"{SIDE} exactly once, and {BLANK} is a blank cell.\n{grid}\n\nAnswer with the solved grid only, in the "
            "same form."
        )

    def is_right(self, case: Case, answer: Answer) -> bool:
        """Return whether an answer is the solution."""
        return answer == case.answer


GRIDS: Mapping[str, Kind] = {"latin_square": LatinSquare(), "sudoku": Sudoku()}
"""Name of the kind -> the kind."""
