"""CUDA graphs for a ladder of sizes: a step of any size runs as the next larger one that is on it."""

from __future__ import annotations

import bisect
import functools
import logging
from collections.abc import Callable, Hashable, Sequence

import torch

from sdar_lm_eval.engines.runs import is_out_of_memory

logger = logging.getLogger(__name__)

# Rows of a matrix product that steps are padded to: of a forward, and of drawing, which has the LM head in it. Few rows
# cost no more than one, for the weights have to be read; of the others, those that take as long on an H100 as more do
# are left out (SDAR-4B in bfloat16: benchmarks/NOTES.md has the times, most of them).
FORWARD = (
    4, 8, 16, 64, 128, 192, 240, 256, 288, 336, 384, 432, 512, 560, 640, 736, 768, 816, 896, 960, 1024, 1136, 1248,
    1264, 1280, 1312, 1328, 1360, 1392, 1536, 1616, 1648, 1712, 1776, 1888, 2016, 2048, 2096, 2304, 2432, 2560, 2816,
    3072,
)  # fmt: skip
DRAWING = (
    4, 8, 16, 64, 128, 192, 240, 272, 304, 336, 384, 432, 496, 528, 592, 624, 640, 672, 768, 800, 864, 912, 960, 1040,
    1088, 1200, 1264, 1344, 1456, 1536,
)  # fmt: skip
MORE = 256  # from there on
# Rows of every matrix product where results have to be reproducible, and a product's rounding depends on its rows.
REPRODUCIBLE_ROWS = 512


def ladder(rungs: Sequence[int], largest: int, rows: int = 1) -> tuple[int, ...]:
    """Sizes up to the first that is not below `largest`, each standing for so many rows of a product."""
    rungs = list(rungs)
    while rungs[-1] < largest * rows:
        rungs.append(rungs[-1] + MORE)
    sizes = sorted({-(-rung // rows) for rung in rungs})
    return tuple(sizes[: bisect.bisect_left(sizes, largest) + 1])


def multiples(unit: int, largest: int) -> tuple[int, ...]:
    """Multiples of `unit`, up to the first that is not below `largest`."""
    return tuple(range(unit, largest + unit, unit))


def rounded_up(sizes: Sequence[int], size: int) -> int:
    """The smallest of these ascending sizes that is not below `size`."""
    return sizes[bisect.bisect_left(sizes, size)]


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
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._pool: torch.cuda._POOL_HANDLE | None = None
        self._told = False

    def __call__(self, size: int, *others: Hashable) -> None:
        """Run for at least `size`."""
        if not self._enabled:
            self._run(size, *others)
            return
        key = (rounded_up(self._sizes, size), *others)
        if key in self._graphs:
            self._graphs[key].replay()
        else:
            self._run(*key)
            try:
                self._graphs[key] = self._capture(key)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
            if key not in self._graphs:
                # What it was to do is done, and what is unused now may be enough for a graph the next time.
                torch.cuda.empty_cache()
                if not self._told:
                    logger.warning("No memory is left for CUDA graphs: some steps run without, and take longer.")
                self._told = True

    def _capture(self, key: tuple[Hashable, ...]) -> torch.cuda.CUDAGraph:
        # By hand, since torch.cuda.graph waits for the GPU and gives its free memory back first: the GPU goes on with
        # the run before meanwhile.
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(_capture_stream(torch.cuda.current_device())):
            graph.capture_begin(pool=self._pool)
            try:
                self._run(*key)
            finally:
                graph.capture_end()
        self._pool = self._pool or graph.pool()
        return graph


@functools.cache
def _capture_stream(device: int) -> torch.cuda.Stream:
    """One for a GPU: cuBLAS keeps memory for every stream that it has run in."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
