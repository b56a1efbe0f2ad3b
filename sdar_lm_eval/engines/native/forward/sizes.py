"""Chooses the sizes of CUDA graphs, so that padding costs little.

The time of a matrix product is a staircase in the number of rows: a product of fewer rows can take as long as a product
of more rows, or even longer. So sizes are chosen by times that the machine has measured; see `timings`.

A GPU that multiplies for seconds reaches its power limit. Then each row of padding costs time, also on a stair where a
measurement of milliseconds shows no difference. So the cost of a size is its measured time multiplied by its rows.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping, Sequence

import numpy as np

FEW = (4, 8)  # the fewest rows that are measured
STEPS = ((1536, 16), (3072, 64), (6144, 128), (12288, 256), (1 << 30, 512))  # (most rows, distance between two sizes)
# Up to so many rows, reading the weights takes most of the time. Then padding costs no power.
FLAT = 256
# Most cost of a chosen size, relative to the cheapest size that is large enough. Most steps have a full batch, so full
# batches have the lower limit.
MOST_COST = 1.03
MOST_COST_OF_FEW = 1.1
# Most rows that are measured. More rows count as proportionally longer: for many rows, a stair is a small share of the
# time, while a measurement of 65,536 rows would take minutes.
MOST_MEASURED = 4096


def grid(most: int) -> tuple[int, ...]:
    """Numbers of rows that are measured, ascending: `FEW`, and others up to the first that is at least `most`."""
    found = [*FEW]
    for end, step in STEPS:
        while found[-1] < min(end, most):
            found.append(found[-1] // step * step + step)
    return tuple(found)


def candidates(most: int, rows: int = 1) -> tuple[int, ...]:
    """Sizes that `chosen` can choose from, ascending, up to `most`, or to 2. A size stands for `rows` rows.

    No size is 1: `torch.compile` takes a size of 1 for a constant, and would compile the step once more for it.
    """
    largest = max(most, 2)
    return tuple(sorted({min(max(-(-number // rows), 2), largest) for number in grid(largest * rows)}))


def chosen(sizes: Sequence[int], seconds: Sequence[float], rows: int = 1) -> tuple[int, ...]:
    """Choose few sizes, so that padding costs little whatever size a step needs.

    Args:
        sizes: the sizes to choose from, ascending. The last size is always chosen. A step that needs at least half of
            the last size counts as a full batch.
        seconds: the time of each size.
        rows: rows of a size of 1.
    """
    numbers = np.array(sizes)
    costs = np.array(seconds) * np.maximum(numbers * rows, FLAT)
    cheapest = np.minimum.accumulate(costs[::-1])[::-1]  # of the sizes from each size on
    limits = cheapest * np.where(2 * numbers >= numbers[-1], MOST_COST, MOST_COST_OF_FEW)
    found, need = [], 0
    while need < len(sizes):
        # A size also serves the needs between: of these, the first full batch has a lower limit.
        last = need + int(np.flatnonzero(costs[need:] <= np.minimum.accumulate(limits[need:]))[-1])
        found.append(sizes[last])
        need = last + 1
    return tuple(found)


def unmeasured(most: int, rows: int = 1) -> tuple[int, ...]:
    """Choose sizes up to `most` without measured times: 16 rows take no time, and more rows have stairs of 64 rows."""
    sizes = candidates(most, rows)
    stairs = [0 if size * rows <= 16 else -(-size * rows // 64) for size in sizes]
    return chosen(sizes, stairs, rows)


def measured(most: int, rows: int, times: Callable[[int], Mapping[int, float]]) -> tuple[int, ...]:
    """Choose sizes up to `most` by measured times, or without times where there are none.

    Args:
        most: the largest size.
        rows: rows of a size of 1.
        times: takes the most rows, at most MOST_MEASURED, and returns the seconds for each number of rows of a grid up
            to the most rows, or {}.
    """
    sizes = candidates(most, rows)
    seconds = times(min(sizes[-1] * rows, MOST_MEASURED))
    if not seconds:
        return unmeasured(most, rows)
    known = sorted(seconds)

    def time_of(count: int) -> float:
        at = bisect.bisect_left(known, count)
        return seconds[known[at]] if at < len(known) else seconds[known[-1]] * count / known[-1]

    return chosen(sizes, [time_of(size * rows) for size in sizes], rows)
