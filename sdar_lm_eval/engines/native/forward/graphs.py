"""CUDA graphs of some sizes: a step of any size is padded to the next larger of these sizes."""

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

# Rows of every matrix product where results have to be reproducible, but products are not batch-invariant: a product's
# rounding depends on its number of rows.
REPRODUCIBLE_ROWS = 512


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
        sizes: the sizes of graphs, ascending.
        enabled: whether to use graphs. If not, a call runs the function with the size asked for, unpadded.
    """

    def __init__(self, run: Callable[..., None], sizes: Sequence[int], *, enabled: bool) -> None:
        self.run, self.sizes, self._enabled = run, sizes, enabled
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._pool: torch.cuda._POOL_HANDLE | None = None
        self._warned = False

    def __call__(self, size: int, *others: Hashable) -> int:
        """Run the function for `size`, padded to the next larger of the sizes; return the size that ran."""
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
        """Capture the graph of one of the sizes, unless it exists or the clock (time.perf_counter) passes `until`.

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
