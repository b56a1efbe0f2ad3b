"""Predicts the sizes of the next step while the host does not know the outcome of the steps in flight. No tensors.

The sizes of a step are chosen when the step is launched. A GPU that waits for the host between two steps idles, so the
host does not wait for the outcome of the steps in flight. The host keeps the last known state of each slot, and
predicts the effect of the steps in flight: each step unmasks its quota, and no answer meets a stop token. A wrong
prediction costs time only: a block that does not fit waits for the next step.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np

from sdar_lm_eval.engines.native.batch import Outcome
from sdar_lm_eval.engines.native.scheduler import SequenceState
from sdar_lm_eval.engines.native.strategies import STRATEGIES

# A forward of up to this many tokens takes about as long as one of a single token: reading the weights takes the time.
# A step always has room for this many.
FREE_ROWS = 128
SLACK_DECAY = 0.75  # of the moving average by which forecasts were too low


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
        self._expected: list[tuple[int, int]] = []  # sizes predicted for the steps in flight, without slack
        self._predicted = (0, 0)
        self._slack = np.zeros(2)

    def begin(self, sequences: Sequence[SequenceState]) -> None:
        """Sequences enter the batch. The current block of a sequence is the one after its last full block."""
        for sequence in sequences:
            self._entered[sequence.slot] = self._launched
            self._known.begin(sequence)

    def stop(self, slots: Sequence[int]) -> None:
        """Sequences leave the batch."""
        self._known.active[slots] = False

    def sizes(self) -> tuple[int, int]:
        """Segments and draws of the next step; (0, 0) where no slot is active."""
        segments, masked = self._predicted = self._predict()
        if segments and self._learned < self._launched:
            active = int(self._known.active.sum())
            wanted = np.array([segments, masked]) + np.ceil(self._slack).astype(int)
            # At least one slot has to fit, otherwise the batch would never advance.
            free = np.array([max(FREE_ROWS // self._block, 2), max(FREE_ROWS, self._block)])
            most = active * np.array([2, self._block])
            segments, masked = np.minimum(np.maximum(wanted, free), most).tolist()
        return segments, masked

    def launched(self) -> None:
        """A step of the last `sizes` is in flight."""
        self._expected.append(self._predicted)
        self._launched += 1

    def learn(self, outcome: Outcome) -> None:
        """Update the known state with the outcome of the oldest step in flight."""
        known = self._known
        current = outcome.took_part & known.active & (self._entered <= self._learned)
        known.advance(current, outcome.masked, outcome.goes_on)
        self._learned += 1
        self._expected.pop(0)
        if self._expected:
            present = known.active & (self._entered <= self._learned)
            missing = np.maximum(np.array(known.counts(present)) - self._expected[0], 0)
            self._slack = SLACK_DECAY * self._slack + (1 - SLACK_DECAY) * missing

    def _predict(self) -> tuple[int, int]:
        """The sizes of the next step, without slack."""
        slots = self._known
        if self._learned < self._launched:
            slots = copy.deepcopy(slots)
            for step in range(self._learned, self._launched):
                slots.advance_by_quota(slots.active & (self._entered <= step))
        return slots.counts(slots.active)


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

    def counts(self, slots: np.ndarray) -> tuple[int, int]:
        """Segments and masked positions of some slots."""
        return int((slots * (1 + self.uncommitted)).sum()), int(self.masked[slots].sum())

    def advance_by_quota(self, slots: np.ndarray) -> None:
        """Predict a step of some slots: each unmasks its quota, and no answer meets a stop token."""
        quota = self.quotas[np.arange(len(self.step)), self.step]
        self.advance(slots, np.maximum(self.masked - quota, 0), self.length - self.given < self.remaining)

    def advance(self, slots: np.ndarray, masked: np.ndarray, goes_on: np.ndarray) -> None:
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
