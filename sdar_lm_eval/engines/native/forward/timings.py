"""Measures how long functions take for numbers of rows. A machine measures a model once, and keeps the times in a file.

The time of a matrix product is a staircase in the number of rows. The stairs depend on the weights, the GPU and the
libraries, so no table of times holds for another machine or model.
"""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

from sdar_lm_eval.engines.native.forward.graphs import Graphs
from sdar_lm_eval.engines.runs import is_out_of_memory
from sdar_lm_eval.hashing import hex_digest
from sdar_lm_eval.user_cache import keep_cached, read_cached

logger = logging.getLogger(__name__)

ROUNDS = 9  # times that each function is measured for each number of rows


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

    def __call__(
        self, what: str, rows: Mapping[str, Sequence[int]], make: Callable[[], Callable[[str, int], None]]
    ) -> dict[str, dict[int, float]]:
        """The seconds of functions for each number of rows, or for more numbers; {} if a measurement lacks memory.

        Args:
            what: name of the functions in the log.
            rows: name of a function in the file -> numbers of rows.
            make: returns a runner, which takes a function's name and a number of rows. The kernels of the function must
                depend on nothing else. `make` is called only if the file lacks a time.
        """
        if any(not self._known.get(name, {}).keys() >= set(numbers) for name, numbers in rows.items()):
            started = time.perf_counter()
            try:
                # Times of different minutes are not comparable: what is asked for together is measured together.
                measured = self._measured(make(), rows)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                measured = {}
            # The error is gone here, and with it the tensors that its traceback held. The KV cache may need the memory.
            torch.cuda.empty_cache()
            if not measured:
                logger.info("No memory is left to measure %s, so default choices stand.", what)
                return {}
            self._known.update(measured)
            logger.info(
                "Measured %s in %.1f s, %d durations in all, for the cache file %s.",
                what, time.perf_counter() - started, sum(map(len, rows.values())), self._file,
            )  # fmt: skip
            keep_cached(self._file, self._known)
        return {name: self._known[name] for name in rows}

    def _measured(
        self, run: Callable[[str, int], None], rows: Mapping[str, Sequence[int]]
    ) -> dict[str, dict[int, float]]:
        """Measure median seconds. All numbers of rows take turns, so that the GPU's clock is the same for all."""
        # The largest comes first, so that the others reuse its memory. An out-of-memory error ends the measurement: a
        # call of `graphs` would go on without a graph, and the time would be that of another capture.
        order = sorted(((number, name) for name, numbers in rows.items() for number in numbers), reverse=True)
        graphs = Graphs(run, (), enabled=True)
        captured = {}
        for number, name in order:
            run(name, number)  # compiles kernels
            captured[name, number] = graphs.capture((name, number))
        events = [{key: (_event(), _event()) for key in captured} for _ in range(ROUNDS + 1)]
        for pairs in events:
            for key, (begin, end) in pairs.items():
                begin.record()
                captured[key].replay()
                end.record()
        torch.cuda.synchronize(self._device)

        def seconds(name: str, number: int) -> float:
            pairs = [of_round[name, number] for of_round in events[1:]]
            return statistics.median(float(begin.elapsed_time(end)) / 1000 for begin, end in pairs)

        return {name: {number: seconds(name, number) for number in numbers} for name, numbers in rows.items()}


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
