"""How large the next step will be, before the host knows what the one under way does. No tensors.

A step's size has to be chosen when it is launched, and a GPU that waits for the host between two steps idles. So the
host keeps what it last heard of each slot, and reckons what the steps that are under way will do to it: each unmasks
its quota, and no answer meets a stop token. What it did not foresee costs time only: a block for which there is no room
waits for the next step.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np

from sdar_lm_eval.engines.native.batch import Outcome
from sdar_lm_eval.engines.native.scheduler import SequenceState
from sdar_lm_eval.engines.native.strategies import STRATEGIES

# Tokens of a forward that cost about what one does, since the weights have to be read: there is room for all.
FREE_ROWS = 128
MEMORY = 0.75  # of the mean by which forecasts were too low


class Forecast:
    """What is known of N slots, and what follows from it.

    Args:
        slots: N.
        block: L, the longest block length.
    """

    def __init__(self, slots: int, block: int) -> None:
        self._block = block
        self._known = _Slots(slots, block)
        self._launched = self._learned = 0  # steps
        self._entered = np.zeros(slots, dtype=np.int64)  # the first step that each slot's sequence can take part in
        self._expected: list[tuple[int, int]] = []  # of the steps under way, without slack
        self._next = (0, 0)
        self._slack = np.zeros(2)

    def begin(self, sequences: Sequence[SequenceState]) -> None:
        """Sequences enter, each at the block after its last full one."""
        for sequence in sequences:
            self._entered[sequence.slot] = self._launched
            self._known.begin(sequence)

    def stop(self, slots: Sequence[int]) -> None:
        """Sequences leave."""
        self._known.active[slots] = False

    def sizes(self) -> tuple[int, int]:
        """Blocks that the next step runs, and masked positions that it draws for; (0, 0) where nothing runs."""
        segments, masked = self._next = self._reckoned()
        if segments and self._learned < self._launched:
            active = int(self._known.active.sum())
            wanted = np.array([segments, masked]) + np.ceil(self._slack).astype(int)
            # One slot at least has to fit, or nothing would ever move.
            free = np.array([max(FREE_ROWS // self._block, 2), max(FREE_ROWS, self._block)])
            most = active * np.array([2, self._block])
            segments, masked = np.minimum(np.maximum(wanted, free), most).tolist()
        return segments, masked

    def launched(self) -> None:
        """A step of `sizes` is under way."""
        self._expected.append(self._next)
        self._launched += 1

    def learn(self, outcome: Outcome) -> None:
        """Take over what the oldest step under way did."""
        known = self._known
        mine = outcome.took_part & known.active & (self._entered <= self._learned)
        known.advance(mine, outcome.masked, outcome.goes_on)
        self._learned += 1
        self._expected.pop(0)
        if self._expected:
            there = known.active & (self._entered <= self._learned)
            missing = np.maximum(np.array(known.counts(there)) - self._expected[0], 0)
            self._slack = MEMORY * self._slack + (1 - MEMORY) * missing

    def _reckoned(self) -> tuple[int, int]:
        slots = self._known
        if self._learned < self._launched:
            slots = copy.deepcopy(slots)
            for step in range(self._learned, self._launched):
                slots.advance_by_quota(slots.active & (self._entered <= step))
        return slots.counts(slots.active)


class _Slots:
    """Of each slot: what `BatchState` has on the device, as far as sizes depend on it; (N,) each."""

    def __init__(self, slots: int, block: int) -> None:
        self.active, self.uncommitted = np.zeros((2, slots), dtype=bool)
        self.left, self.length, self.given, self.room, self.step = np.zeros((5, slots), dtype=np.int64)
        self.quotas = np.ones((slots, block), dtype=np.int64)

    def begin(self, sequence: SequenceState) -> None:
        slot, decoding = sequence.slot, sequence.request.decoding
        self.active[slot], self.uncommitted[slot], self.step[slot] = True, False, 0
        self.length[slot] = decoding.block_length
        self.given[slot] = len(sequence.tokens) - sequence.block_start
        self.left[slot] = self.length[slot] - self.given[slot]
        self.room[slot] = sequence.request.max_new_tokens - sequence.num_new_tokens
        self.quotas[slot] = 1
        if STRATEGIES[decoding.remasking_strategy].uses_schedule:
            self.quotas[slot, : len(decoding.quotas)] = decoding.quotas

    def counts(self, slots: np.ndarray) -> tuple[int, int]:
        """Blocks that run, and masked positions, of some slots."""
        return int((slots * (1 + self.uncommitted)).sum()), int(self.left[slots].sum())

    def advance_by_quota(self, slots: np.ndarray) -> None:
        quota = self.quotas[np.arange(len(self.step)), self.step]
        self.advance(slots, np.maximum(self.left - quota, 0), self.length - self.given < self.room)

    def advance(self, slots: np.ndarray, left: np.ndarray, goes_on: np.ndarray) -> None:
        """Some slots were denoised.

        Args:
            slots: (N,) bool, which.
            left: (N,), positions of their blocks that stay masked.
            goes_on: (N,) bool, whether another block follows one without any.
        """
        decided = slots & (left == 0)
        begun = decided & goes_on
        self.active &= ~decided | begun
        self.uncommitted = np.where(slots, begun, self.uncommitted)
        self.room -= np.where(begun, self.length - self.given, 0)
        self.given[begun] = 0
        self.step = np.where(begun, 0, np.where(slots, np.minimum(self.step + 1, self.quotas.shape[1] - 1), self.step))
        self.left = np.where(begun, self.length, np.where(slots, left, self.left))
