"""CUDA graphs for a ladder of sizes: a step of any size runs as the next larger one that is on it."""

from __future__ import annotations

import bisect
import contextlib
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch

# Rows of a matrix product that steps are padded to. Few rows cost no more than one, for the weights have to be read; of
# the others, those that cuBLAS is slow for on an H100 are left out: 320 rows of SDAR-4B take it 5.7 ms, 336 take 4.3.
LADDER = (1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 288, 336, 384, 512)
RUNG, LONG_RUNG = 64, 128  # from there on, and from 1,536 rows on


def ladder(largest: int, rows: int = 1) -> tuple[int, ...]:
    """Sizes from 1 up to the first that is not below `largest`, each standing for so many rows of a product."""
    rungs = list(LADDER)
    while rungs[-1] < largest * rows:
        rungs.append(rungs[-1] + (RUNG if rungs[-1] < 1536 else LONG_RUNG))
    sizes = sorted({-(-rung // rows) for rung in rungs})
    return tuple(sizes[: bisect.bisect_left(sizes, largest) + 1])


class Graphs:
    """Runs a function of a size as a CUDA graph.

    A size that is asked for the first time runs without one, and is captured for the next time. The function reads and
    writes only tensors that stay where they are.

    Args:
        run: the function; given a size, and whatever else the kernels it launches depend on.
        sizes: the ladder.
        enabled: without, the function is called with the size asked for.
    """

    def __init__(self, run: Callable[..., None], sizes: Sequence[int], *, enabled: bool) -> None:
        self._run, self._sizes, self._enabled = run, sizes, enabled
        self._graphs: dict[Hashable, Any] = {}
        self._pool: Any = None

    def __call__(self, size: int, *others: Hashable) -> None:
        """Run for at least `size`."""
        if not self._enabled:
            self._run(size, *others)
            return
        key = (self._sizes[bisect.bisect_left(self._sizes, size)], *others)
        if key in self._graphs:
            self._graphs[key].replay()
        else:
            self._run(*key)
            # What it did is done: where there is no memory for the graph, the next time runs without one too.
            with contextlib.suppress(torch.OutOfMemoryError):
                self._graphs[key] = self._capture(key)

    def _capture(self, key: tuple[Any, ...]) -> Any:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            self._run(*key)
        self._pool = self._pool or graph.pool()
        return graph
