"""Chooses the sizes of CUDA graphs, so that padding costs little.

The time of a matrix product is a staircase in the number of rows: a product of fewer rows can take as long as a product
of more rows, or even longer. The stairs depend on the weights, the GPU and the libraries. So each machine measures the
times of a model once, and keeps the times in a file.

A GPU that multiplies for seconds reaches its power limit. Then each row of padding costs time, also on a stair where a
measurement of milliseconds shows no difference. So the cost of a size is its measured time multiplied by its rows.
"""

from __future__ import annotations

import bisect
import logging
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from sdar_lm_eval.engines.native.forward.graphs import Graphs
from sdar_lm_eval.engines.runs import is_out_of_memory
from sdar_lm_eval.hashing import hex_digest
from sdar_lm_eval.user_cache import keep_cached, read_cached

logger = logging.getLogger(__name__)

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
ROUNDS = 9  # times that each number of rows is measured


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


class Timings:
    """The seconds that functions take for numbers of rows, measured on the GPU and kept in a file.

    Args:
        about: all that the times depend on beside the GPU's name and torch's version.
        device: the GPU.
    """

    def __init__(self, about: Mapping[str, object], device: torch.device) -> None:
        self._device = device
        versions = {"gpu": torch.cuda.get_device_name(device), "torch": torch.__version__}
        self._file = f"times/{hex_digest({**versions, **about, 'measured by': Timings})}.json"
        self._known = _read(self._file)

    def __call__(self, name: str, most: int, make: Callable[[], Callable[[int], None]]) -> dict[int, float]:
        """The seconds of a function for each number of rows of `grid(most)`, or of a larger grid.

        Args:
            name: the function's name in the file.
            most: most rows that a time is needed for.
            make: makes the function; called only if the file lacks a time. The function takes a number of rows, on
                which alone the function's kernels depend.
        """
        if not self._known.get(name, {}).keys() >= set(grid(most)):
            started, rows = time.perf_counter(), grid(most)
            self._known[name] = dict(zip(rows, self._measured(make(), rows), strict=True))
            torch.cuda.empty_cache()  # the KV cache may need the memory
            logger.info(
                "Measured the time of %s for %d numbers of rows in %.1f s, for the cache file %s.",
                name, len(rows), time.perf_counter() - started, self._file,
            )  # fmt: skip
            keep_cached(self._file, self._known)
        return self._known[name]

    def _measured(self, run: Callable[[int], None], rows: Sequence[int]) -> list[float]:
        """Measure median seconds. The numbers of rows take turns, so that the GPU's clock is the same for all."""
        graphs = Graphs(run, rows, enabled=True)
        captured = {}
        # The largest comes first, so that the others reuse its memory. An out-of-memory error ends the measurement: a
        # call of `graphs` would go on without a graph, and the time would be that of another capture.
        for number in reversed(rows):
            run(number)  # compiles kernels
            captured[number] = graphs.capture((number,))
        events = [[(_event(), _event()) for _ in rows] for _ in range(ROUNDS + 1)]
        for pairs in events:
            for number, (begin, end) in zip(rows, pairs, strict=True):
                begin.record()
                captured[number].replay()
                end.record()
        torch.cuda.synchronize(self._device)
        rounds = [[begin.elapsed_time(end) / 1000 for begin, end in pairs] for pairs in events[1:]]
        return [statistics.median(times) for times in zip(*rounds, strict=True)]


def measured(most: int, rows: int, times: Callable[[int], Mapping[int, float]]) -> tuple[int, ...]:
    """Choose sizes up to `most` by measured times, or without times where memory does not suffice for a measurement.

    Args:
        most: the largest size.
        rows: rows of a size of 1.
        times: takes the most rows, at most MOST_MEASURED, and returns the seconds for each number of rows of a grid up
            to the most rows.
    """
    sizes = candidates(most, rows)
    seconds: Mapping[int, float] = {}
    try:
        seconds = times(min(sizes[-1] * rows, MOST_MEASURED))
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    if not seconds:
        torch.cuda.empty_cache()  # the error is gone here, and with it the tensors that its traceback held
        logger.info("No memory is left to measure times: the sizes of CUDA graphs are chosen without times.")
        return unmeasured(most, rows)
    known = sorted(seconds)

    def time_of(count: int) -> float:
        at = bisect.bisect_left(known, count)
        return seconds[known[at]] if at < len(known) else seconds[known[-1]] * count / known[-1]

    return chosen(sizes, [time_of(size * rows) for size in sizes], rows)


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _read(name: str) -> dict[str, dict[int, float]]:
    try:
        found = {
            function: {int(rows): float(seconds) for rows, seconds in times.items()}
            for function, times in read_cached(name).items()
        }
        if not all(0 < seconds < math.inf for times in found.values() for seconds in times.values()):
            raise ValueError("a time has to be above 0, and finite")
    except (ValueError, AttributeError, TypeError, OverflowError) as error:
        logger.info("The cache file %s has no times, so the times are measured again: %s", name, error)
        return {}
    return found
