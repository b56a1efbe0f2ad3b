"""Predicts the sizes of the next step while the host does not know the outcome of the step in flight. No tensors.

The sizes of a step are chosen when the step is launched. A GPU that waits for the host between two steps idles, so the
host does not wait for the outcome of the step in flight. The host keeps the last known state of each slot, and predicts
the effect of the step in flight: each slot unmasks its quota, and recent steps tell how often a block is decided sooner
and how often an answer ends. A wrong prediction costs time only: a block that does not fit waits for a later step, for
at most `PATIENCE` + 1 steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdar_lm_eval.engines.native.batch import StepOutcome
from sdar_lm_eval.engines.native.scheduler import SequenceState
from sdar_lm_eval.engines.native.strategies import STRATEGIES

# A forward of up to this many tokens takes about as long as one of a single token: reading the weights takes the time.
# So a step has room for this many tokens, however few are expected.
FREE_ROWS = 128
# Unused room is computed for nothing. A block that waits costs less: other blocks run meanwhile. So a step has room for
# this many standard deviations less than the expected need.
CAUTION = 0.5
# Slots are served in order, so while forecasts are too low, the last slots wait. Once a block has waited for this many
# steps, the next step has room for all blocks, whatever the outcome of the step in flight.
PATIENCE = 8
DECAY = 0.9  # weight of a step among the recent steps, relative to the step after it


class Forecast:
    """The last known state of N slots, and the sizes of the next step that follow from it.

    Args:
        slots: N.
        block: L, the longest block length.
    """

    def __init__(self, slots: int, block: int) -> None:
        self._block = block
        self._known = _Slots(slots, block)
        self._launched = self._learned = 0  # numbers of steps
        self._entered = np.zeros(slots, dtype=np.int64)  # slot -> the first step that its sequence can take part in
        self._in_flight = (0, 0)  # sizes of the step that was launched last
        self._waited = np.zeros(slots, dtype=np.int64)  # slot -> steps that its block has not fitted into, in a row
        # Of the blocks that their quota alone would leave undecided: the share that a step decided. Last blocks of
        # answers have their own share: a last block may be decided while positions behind the length limit are masked.
        self._sooner, self._last_sooner = _Share(), _Share()
        # Of the positions that the quota alone would leave masked, in undecided blocks: the share that stayed masked.
        self._left = _Share()
        # Of the decided blocks that end before the length limit: the share that have a successor.
        self._going_on = _Share()

    def begin(self, sequences: Sequence[SequenceState]) -> None:
        """Sequences enter the batch. The current block of a sequence is the one after its last full block."""
        for sequence in sequences:
            self._entered[sequence.slot] = self._launched
            self._known.begin(sequence)

    def stop(self, slots: Sequence[int]) -> None:
        """Sequences leave the batch."""
        self._known.active[slots] = False

    def sizes(self) -> tuple[int, int]:
        """Segments and draws of the next step; (0, 0) where no slot is expected to be active."""
        if self._learned == self._launched:
            return self._known.counts()
        wanted = np.array(self._most() if (self._waited >= PATIENCE).any() else self._predicted())
        if not wanted[0]:
            return 0, 0
        # At least one slot has to fit, otherwise the batch would never advance.
        free = np.array([max(FREE_ROWS // self._block, 2), max(FREE_ROWS, self._block)])
        most = self._known.active.sum() * np.array([2, self._block])
        segments, draws = np.minimum(np.maximum(wanted, free), most).tolist()
        return segments, draws

    def launched(self, segments: int, draws: int) -> None:
        """Note that a step of these sizes is in flight. `learn` must get all earlier steps before the next `sizes`."""
        self._in_flight = segments, draws
        self._launched += 1

    def learn(self, outcome: StepOutcome) -> None:
        """Update the known state with the outcome of the oldest step in flight."""
        known = self._known
        present = known.active & (self._entered <= self._learned)
        current = outcome.took_part & present
        self._waited = np.where(present & ~current, self._waited + 1, 0)
        left, last, decided = known.left_by_quota(), known.last_block(), outcome.masked == 0
        for share, kind in ((self._sooner, ~last), (self._last_sooner, last)):
            share.learn(decided, kind & current & (left > 0))
        undecided = current & ~decided
        self._left.learn(outcome.masked * undecided, left * undecided)
        self._going_on.learn(outcome.goes_on, current & decided & ~last)
        known.advance(current, outcome.masked, outcome.goes_on)
        self._learned += 1

    def _running(self) -> NDArray[np.bool_]:
        """The slots that take part in the step in flight."""
        return self._known.fitting(self._known.active & (self._entered <= self._learned), *self._in_flight)

    def _most(self) -> tuple[int, int]:
        """The most segments and draws that the step after the one in flight can need."""
        known = self._known
        may_begin = self._running() & ~known.last_block()
        segments = np.where(may_begin, 2, 1 + known.uncommitted)
        draws = np.where(may_begin, known.length, known.masked)
        return int(segments[known.active].sum()), int(draws[known.active].sum())

    def _predicted(self) -> tuple[int, int]:
        """Segments and draws of the step after the one in flight: somewhat less than the expected values."""
        known = self._known
        runs = self._running()
        left, last = known.left_by_quota(), known.last_block()
        sooner = self._sooner(0)
        decided = np.where(left == 0, 1.0, np.where(last, self._last_sooner(sooner), sooner))
        going_on = decided * self._going_on(1) * ~last
        # A slot that runs has one block next if its block stays undecided, two if its answer goes on, otherwise none.
        segments = np.where(runs, 1 - decided + 2 * going_on, 1 + known.uncommitted) * known.active
        masked = np.where(runs, (1 - decided) * left * self._left(1) + going_on * known.length, known.masked)
        spread = runs * (1 - decided + 4 * going_on - segments**2)
        spread_of_masked = runs * going_on * (1 - going_on) * known.length**2
        return _rounded(segments, spread), _rounded(masked * known.active, spread_of_masked)


def _rounded(expected: NDArray[np.float64], variance: NDArray[np.float64]) -> int:
    """The sum of expected counts less `CAUTION` standard deviations, rounded up."""
    total = float(expected.sum()) - CAUTION * math.sqrt(max(float(variance.sum()), 0))
    return max(math.ceil(total - 1e-6), 0)  # sums that floating point leaves a little above an integer are integers


class _Share:
    """A share of the events of recent steps: the events of one kind, divided by all events."""

    def __init__(self) -> None:
        self._part = self._whole = 0.0

    def __call__(self, default: float) -> float:
        """The share; `default` before the first event."""
        return self._part / self._whole if self._whole else default

    def learn(self, part: NDArray[Any], whole: NDArray[Any]) -> None:
        """Count the events of a step.

        Args:
            part: (N,), each slot's events of the one kind; ignored where `whole` is 0.
            whole: (N,), all events of each slot.
        """
        self._part = DECAY * self._part + float((part * (whole > 0)).sum())
        self._whole = DECAY * self._whole + float(whole.sum())


class _Slots:
    """The part of `BatchState` that the sizes of a step depend on; (N,) each."""

    def __init__(self, slots: int, block: int) -> None:
        self.active, self.uncommitted = np.zeros((2, slots), dtype=bool)
        self.masked, self.length, self.given, self.remaining, self.step = np.zeros((5, slots), dtype=np.int64)
        self.quotas = np.ones((slots, block), dtype=np.int64)

    def begin(self, sequence: SequenceState) -> None:
        slot, decoding = sequence.slot, sequence.request.decoding
        self.active[slot], self.uncommitted[slot], self.step[slot] = True, False, 0
        self.length[slot] = decoding.block_length
        self.given[slot] = len(sequence.tokens) - sequence.block_start
        self.masked[slot] = self.length[slot] - self.given[slot]
        self.remaining[slot] = sequence.request.max_new_tokens - sequence.num_new_tokens
        self.quotas[slot] = 1
        if STRATEGIES[decoding.remasking_strategy].uses_schedule:
            self.quotas[slot, : len(decoding.quotas)] = decoding.quotas

    def counts(self) -> tuple[int, int]:
        """Segments and masked positions of the active slots."""
        return int((self.active * (1 + self.uncommitted)).sum()), int(self.masked[self.active].sum())

    def fitting(self, slots: NDArray[np.bool_], segments: int, draws: int) -> NDArray[np.bool_]:
        """The slots that fit into a step of these sizes; see `layout.py`."""
        fits: NDArray[np.bool_] = slots & ((slots * (1 + self.uncommitted)).cumsum() <= segments)
        fits &= (fits * self.masked).cumsum() <= draws
        return fits

    def left_by_quota(self) -> NDArray[np.int64]:
        """The most positions that a step leaves masked in each slot: those beyond the quota."""
        quota = self.quotas[np.arange(len(self.step)), self.step]
        left: NDArray[np.int64] = np.maximum(self.masked - quota, 0)
        return left

    def last_block(self) -> NDArray[np.bool_]:
        """Slots whose block reaches the answer's length limit."""
        last: NDArray[np.bool_] = self.length - self.given >= self.remaining
        return last

    def advance(self, slots: NDArray[np.bool_], masked: NDArray[np.int32], goes_on: NDArray[np.bool_]) -> None:
        """Advance some slots by a step.

        Args:
            slots: (N,) bool, the slots that were denoised.
            masked: (N,), positions of their blocks that are still masked.
            goes_on: (N,) bool, whether another block follows a block without masked positions.
        """
        decided = slots & (masked == 0)
        begun = decided & goes_on
        self.active &= ~decided | begun
        self.uncommitted = np.where(slots, begun, self.uncommitted)
        self.remaining -= np.where(begun, self.length - self.given, 0)
        self.given[begun] = 0
        self.step = np.where(begun, 0, np.where(slots, np.minimum(self.step + 1, self.quotas.shape[1] - 1), self.step))
        self.masked = np.where(begun, self.length, np.where(slots, masked, self.masked))
