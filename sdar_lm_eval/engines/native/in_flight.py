"""Steps in flight: launched on the device, and not collected by the host. Copies their outcomes to the host."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

MOST_IN_FLIGHT = 2  # steps that are launched and not collected


class Step(NamedTuple):
    """What the host knows of a step when it is launched.

    Attributes:
        depth: levels of guesses.
        active: active slots.
        counts: whether the step's time is to be measured.
    """

    depth: int
    active: int
    counts: bool


class Collected(NamedTuple):
    """A step that is done.

    Attributes:
        step: what was known of the step.
        numbers: its packed outcome.
        seconds: time from the end of the step before; None where it is unknown, or does not count.
    """

    step: Step
    numbers: NDArray[np.int32]
    seconds: float | None


class InFlight:
    """The steps in flight of one device, the oldest first.

    Args:
        packed: packed outcomes on the device: without guesses, and with guesses where there are some.
        timed: whether to measure times; only on a GPU.
    """

    def __init__(self, packed: Sequence[torch.Tensor], *, timed: bool) -> None:
        self._packed, self._on_gpu = packed, packed[0].device.type == "cuda"
        self._timed = timed and self._on_gpu
        # For each step that can be in flight, a buffer of each kind.
        self._buffers = itertools.cycle(
            [
                [torch.empty_like(p, device="cpu", pin_memory=self._on_gpu) for p in packed]
                for _ in range(MOST_IN_FLIGHT)
            ]
        )
        self.clear()

    def clear(self) -> None:
        """Forget all steps."""
        self._steps: deque[tuple[Step, torch.Tensor, torch.cuda.Event | None]] = deque()
        self._last: torch.cuda.Event | None = None  # the end of the last collected step

    def launched(self, step: Step) -> None:
        """Copy the outcome of a step to the host, once the step is done."""
        assert len(self._steps) < MOST_IN_FLIGHT
        guesses, event = step.depth > 0, None
        buffer = next(self._buffers)[guesses]
        buffer.copy_(self._packed[guesses], non_blocking=True)
        if self._on_gpu:
            event = torch.cuda.Event(enable_timing=self._timed)  # type: ignore[no-untyped-call]
            event.record()
        self._steps.append((step, buffer, event))

    def collect(self) -> Collected:
        """Wait for the oldest step."""
        step, buffer, event = self._steps.popleft()
        before, self._last, seconds = self._last, event, None
        if event is not None:
            event.synchronize()
            if self._timed and step.counts and before is not None:
                seconds = before.elapsed_time(event) / 1000
        numbers: NDArray[np.int32] = buffer.numpy().copy()  # a later step overwrites the buffer
        return Collected(step, numbers, seconds)
