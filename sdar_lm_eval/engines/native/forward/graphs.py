"""CUDA graphs for a ladder of sizes: a step of any size is padded to the next size on the ladder."""

from __future__ import annotations

import bisect
import contextlib
import functools
import gc
import logging
import time
from collections.abc import Callable, Hashable, Iterator, Sequence

import torch

from sdar_lm_eval.engines.runs import is_out_of_memory

logger = logging.getLogger(__name__)

# Rows of matrix products that steps are padded to: of a forward, and of drawing, which runs the LM head. A few rows
# take as long as one, since reading the weights takes the time. A larger size is left out if an H100 needs as long for
# the next one (measured with SDAR-4B in bfloat16; benchmarks/LABBOOK.md has most of the times).
FORWARD = (
    4, 8, 16, 64, 128, 192, 240, 256, 288, 336, 384, 432, 512, 560, 640, 736, 768, 816, 896, 960, 1024, 1136, 1248,
    1264, 1280, 1312, 1328, 1360, 1392, 1536, 1616, 1648, 1712, 1776, 1888, 2016, 2048, 2096, 2304, 2432, 2560, 2816,
    3072,
)  # fmt: skip
DRAWING = (
    4, 8, 16, 64, 128, 192, 240, 272, 304, 336, 384, 432, 496, 528, 592, 624, 640, 672, 768, 800, 864, 912, 960, 1040,
    1088, 1200, 1264, 1344, 1456, 1536,
)  # fmt: skip
MORE = 256  # distances of the sizes above these are multiples of this
SPARSER = 16  # and at least this part of a size: what padding costs then is little beside what more graphs cost
# Rows of every matrix product where results have to be reproducible, but products are not batch-invariant: a product's
# rounding depends on its number of rows.
REPRODUCIBLE_ROWS = 512


def ladder(rungs: Sequence[int], largest: int, rows: int = 1) -> tuple[int, ...]:
    """Sizes up to the first that is at least `largest`, from rungs in rows; a size stands for `rows` rows.

    No size is 1: `torch.compile` takes a size of 1 for a constant, and would compile the step once more for it.
    """
    rungs = list(rungs)
    while rungs[-1] < largest * rows:
        rungs.append(rungs[-1] + MORE * max(rungs[-1] // (SPARSER * MORE), 1))
    sizes = sorted({max(-(-rung // rows), 2) for rung in rungs})
    return tuple(sizes[: bisect.bisect_left(sizes, largest) + 1])


def multiples(unit: int, largest: int) -> tuple[int, ...]:
    """Multiples of `unit`, up to the first that is at least `largest`."""
    return tuple(range(unit, largest + unit, unit))


def rounded_up(sizes: Sequence[int], size: int) -> int:
    """The smallest of these ascending sizes that is at least `size`."""
    return sizes[bisect.bisect_left(sizes, size)]


class Graphs:
    """Runs a function of a size as a CUDA graph.

    The first call for a size runs the function itself, and captures a graph for later calls. The function must read and
    write only tensors whose memory stays in place.

    Args:
        run: the function. Its arguments are a size, and all else that its kernels depend on.
        sizes: the ladder.
        enabled: whether to use graphs. If not, a call runs the function with the size asked for, unpadded.
    """

    def __init__(self, run: Callable[..., None], sizes: Sequence[int], *, enabled: bool) -> None:
        self.run, self.sizes, self._enabled = run, sizes, enabled
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._pool: torch.cuda._POOL_HANDLE | None = None
        self._warned = False

    def __call__(self, size: int, *others: Hashable) -> int:
        """Run the function for `size`, padded to the next size on the ladder; return the size that ran."""
        if not self._enabled:
            self.run(size, *others)
            return size
        size = rounded_up(self.sizes, size)
        key = (size, *others)
        if key in self._graphs:
            self._graphs[key].replay()
        else:
            self.run(*key)
            try:
                self._graphs[key] = self.capture(key)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
            if key not in self._graphs:
                # The function has run; only its graph is missing. The freed memory may suffice for the next capture.
                torch.cuda.empty_cache()
                if not self._warned:
                    logger.warning("No memory is left for CUDA graphs: some steps run without, and take longer.")
                self._warned = True
        return size

    def prepare(self, size: int, *others: Hashable, until: float) -> None:
        """Capture the graph of a size on the ladder, unless it exists or the clock (time.perf_counter) passes `until`.

        The function must change nothing: what it works on is padding.
        """
        if self._enabled and (size, *others) not in self._graphs and time.perf_counter() < until:
            self(size, *others)

    def capture(self, key: tuple[Hashable, ...]) -> torch.cuda.CUDAGraph:
        """Capture a graph of the function for a size and its other arguments."""
        # torch.cuda.graph would wait for the GPU and empty torch's cache first. Without it, the GPU keeps running the
        # earlier launches during the capture.
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(_capture_stream(torch.cuda.current_device())), _collector_disabled():
            # In the default mode, "global", a CUDA call of another thread would invalidate the capture.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                self.run(*key)
            finally:
                graph.capture_end()
        self._pool = self._pool or graph.pool()
        return graph


@contextlib.contextmanager
def _collector_disabled() -> Iterator[None]:
    """Disable Python's garbage collector.

    The collector may destroy the CUDA graphs of an earlier engine. The destruction would invalidate a capture.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@functools.cache
def _capture_stream(device: int) -> torch.cuda.Stream:
    """The one capture stream of a GPU: cuBLAS keeps memory for every stream that it has run in."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
