"""CUDA graphs for a ladder of sizes: a step of any size runs as the next larger one that is on it."""

from __future__ import annotations

import bisect
import contextlib
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch

# Small sizes are cheap steps, in which padding would cost most; from 128 on it is at most an eighth.
LADDER = (1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 56, 64)


def ladder(largest: int) -> tuple[int, ...]:
    """Sizes from 1 up to the first that is not below `largest`."""
    sizes = list(LADDER)
    while sizes[-1] < largest:
        sizes.append(sizes[-1] + max(16, 2 ** (sizes[-1].bit_length() - 4)))
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
