"""Chooses how many levels of guesses a step runs: as many as make the most denoising steps a second. No tensors.

Guesses cost time: a forward of more rows takes longer where products or keys and values bound it. Guesses save time
where they are right. Both depend on the model, the GPU, the contexts and the answers, so both are measured: each phase
of some forwards runs with one depth, and a forward's time and denoising steps count for this depth. Sequences come and
go, so numbers of active sequences between two powers of two have measurements of their own.

Measuring another depth than the best one costs time as well. A phase in `PERIOD` forwards is enough to see a change.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# Rows of a forward that take about as long as one: reading the weights takes the time. Guesses of larger batches are
# not measured: each guess makes at most one step, and costs as much as a step.
MOST_ROWS = 256
PHASE = 12  # forwards
UNMEASURED = 3  # first forwards of a phase: guesses are made one forward before they run, and one is in flight
PERIOD = 512  # forwards between two phases that measure another depth than the best one
DECAY = 0.8  # of the moving averages
MARGIN = 1.02  # how much faster guesses have to be measured than no guesses: measurements are noisy


@dataclass
class _Measured:
    """Moving averages of a depth's forwards: denoising steps of a sequence, and seconds."""

    steps: float
    seconds: float

    @property
    def rate(self) -> float:
        return self.steps / self.seconds


class Depths:
    """The measured depths of a batch.

    Args:
        levels: G, the most levels of guesses.
        block: L, tokens of a block.
    """

    def __init__(self, levels: int, block: int) -> None:
        self._levels, self._most_active = levels, MOST_ROWS // block
        self._measured: dict[int, dict[int, _Measured]] = defaultdict(dict)  # by the size of the batch, then by depth
        self._since: dict[int, int] = defaultdict(int)  # forwards since the last phase that measured another depth
        self._size = self._depth = self._number = self._probe = 0

    def next(self, active: int) -> tuple[int, bool]:
        """The depth of the next forward of `active` sequences, and whether the forward counts for its depth."""
        if active > self._most_active:
            self._size = self._number = 0
            return 0, False
        size = active.bit_length()
        if size != self._size or self._number == PHASE:
            self._depth, self._size, self._number = self._choose(size), size, 0
        self._number += 1
        self._since[size] += 1
        return self._depth, self._number > UNMEASURED

    def measured(self, active: int, depth: int, steps: float, seconds: float) -> None:
        """Take note of a forward that counts: its denoising steps of a sequence on average, and its time."""
        depths = self._measured[active.bit_length()]
        known = depths.get(depth)
        if known is None:
            depths[depth] = _Measured(steps, seconds)
        else:
            known.steps += (1 - DECAY) * (steps - known.steps)
            known.seconds += (1 - DECAY) * (seconds - known.seconds)

    def _choose(self, size: int) -> int:
        depths = self._measured[size]
        missing = [depth for depth in self._candidates(size) if depth not in depths]
        if missing:
            return missing[0]
        best = _best(depths)
        if self._since[size] < PERIOD:
            return best
        self._since[size] = 0
        self._probe += 1
        others = [depth for depth in range(self._levels + 1) if depth != best]
        return others[self._probe % len(others)]

    def _candidates(self, size: int) -> Sequence[int]:
        """The depths to measure before the best one is taken: all, or 0 and the best one of the nearest size."""
        whole = [other for other, depths in self._measured.items() if other != size and len(depths) > self._levels]
        if not whole:
            return range(self._levels + 1)
        return 0, _best(self._measured[min(whole, key=lambda other: abs(other - size))])


def _best(depths: Mapping[int, _Measured]) -> int:
    return max(depths, key=lambda depth: depths[depth].rate * (1 if depth else MARGIN))
