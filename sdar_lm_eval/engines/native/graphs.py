"""CUDA graphs for a ladder of sizes: a step of any size runs as the next larger one that is on it."""

from __future__ import annotations

import bisect
import contextlib
import functools
import logging
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch

logger = logging.getLogger(__name__)

# Microseconds that the products of a layer take on an H100, by rows: SDAR-4B's in bfloat16, with torch 2.11
# (`benchmarks/floor.py --rows`; up to 16, `kernels.few_rows`). Few rows cost no more than one, for the weights have to
# be read. Numbers that cuBLAS is slower for than for more are left out: 320 rows take it 158, 336 take 120.
COSTS = {
    4: 79.5, 8: 79.9, 16: 80.2, 64: 88, 128: 94, 192: 98, 240: 106, 256: 108, 272: 112, 288: 114, 336: 120, 384: 128,
    432: 139, 512: 163, 544: 181, 640: 192, 736: 222, 768: 229, 800: 237, 896: 253, 960: 277, 1024: 300, 1088: 343,
    1216: 349, 1280: 393, 1344: 410, 1408: 416, 1472: 446, 1536: 458, 1600: 478, 1664: 496, 1728: 502, 1792: 535,
    1856: 570, 1920: 597, 1984: 606, 2048: 618, 2112: 641, 2176: 674, 2304: 696, 2432: 721, 2560: 750, 2688: 801,
    2816: 844, 3072: 900,
}  # fmt: skip
MORE = 256  # rows from one size to the next behind the table


def ladder(largest: int, rows: int = 1) -> tuple[int, ...]:
    """Sizes up to the first that is not below `largest`, each standing for so many rows of a product."""
    rungs = list(COSTS)
    while rungs[-1] < largest * rows:
        rungs.append(rungs[-1] + MORE)
    sizes = sorted({-(-rung // rows) for rung in rungs})
    return tuple(sizes[: bisect.bisect_left(sizes, largest) + 1])


class Graphs:
    """Runs a function of a size as a CUDA graph.

    A size that is asked for the first time runs without one, and is captured for the next time meanwhile. The function
    reads and writes only tensors that stay where they are.

    Args:
        run: the function; given a size, and whatever else the kernels it launches depend on.
        sizes: the ladder.
        enabled: without, the function is called with the size asked for.
    """

    def __init__(self, run: Callable[..., None], sizes: Sequence[int], *, enabled: bool) -> None:
        self._run, self._sizes, self._enabled = run, sizes, enabled
        self._graphs: dict[Hashable, Any] = {}
        self._pool: Any = None
        self._told = False

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
            with contextlib.suppress(torch.OutOfMemoryError):
                self._graphs[key] = self._capture(key)
            if key not in self._graphs:
                # What it was to do is done, and what is unused now may be enough for a graph the next time.
                torch.cuda.empty_cache()
                if not self._told:
                    logger.warning("No memory is left for CUDA graphs: some steps run without, and take longer.")
                self._told = True

    def _capture(self, key: tuple[Any, ...]) -> Any:
        # By hand, since torch.cuda.graph waits for the GPU and gives its free memory back first: the GPU goes on with
        # the run before meanwhile.
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(_capture_stream(torch.cuda.current_device())):
            graph.capture_begin(**({"pool": self._pool} if self._pool else {}))
            try:
                self._run(*key)
            finally:
                graph.capture_end()
        self._pool = self._pool or graph.pool()
        return graph


@functools.cache
def _capture_stream(device: int) -> Any:
    """One for a GPU: cuBLAS keeps memory for every stream that it has run in."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
