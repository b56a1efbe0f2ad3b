"""Who runs next: admission, prefill in chunks, growth block by block, preemption. No tensors.

A sequence waits, is admitted (it gets a slot, and pages for its prompt and its first block), is prefilled up to its
last full block, and is then denoised block by block, each block taking pages as it needs them. When pages run out the
youngest running sequence gives all of its own back and waits again, at the front; its committed tokens are kept and
prefilled again, so that nothing but time is lost.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from sdar_lm_eval.engines.base import GenerationRequest
from sdar_lm_eval.engines.native.pages import PagePool


@dataclass(eq=False)
class Sequence:
    """A request on its way.

    Attributes:
        tokens: the prompt and the committed part of the answer.
        cached: leading tokens whose KV is in the pages; whole blocks.
        decided: the new tokens of the current block, once none is masked and the answer goes on; the next forward
            commits them, that is, stores their KV.
        slot: row of the batch state on the device; -1 while waiting.
    """

    index: int
    request: GenerationRequest
    tokens: list[int]
    cached: int = 0
    decided: list[int] = field(default_factory=list)
    slot: int = -1
    pages: list[int] = field(default_factory=list)
    prefill_forwards: int = 0
    denoising_forwards: int = 0
    commit_forwards: int = 0
    started: float | None = None
    unmasked_at: list[int] = field(default_factory=list)
    confidences: list[float] = field(default_factory=list)

    @property
    def block_length(self) -> int:
        """Tokens denoised together."""
        return self.request.decoding.block_length

    @property
    def block_start(self) -> int:
        """Where the block stands that is denoised next (or now): after the last full block of `tokens`."""
        return len(self.tokens) // self.block_length * self.block_length

    @property
    def num_new_tokens(self) -> int:
        """Committed tokens of the answer."""
        return len(self.tokens) - len(self.request.prompt_ids)

    def commit(self) -> None:
        """Make the decided tokens part of `tokens`, after the forward that stored their KV."""
        self._settle()
        self.cached = len(self.tokens)

    def forget_cache(self) -> None:
        """Give the KV up; what was decided stays decided, and is prefilled with the rest when its turn comes again."""
        self._settle()
        self.cached = 0

    def _settle(self) -> None:
        self.tokens += self.decided
        self.decided = []

    @property
    def in_prefill(self) -> bool:
        """Whether tokens before the current block still have no KV."""
        return self.cached < self.block_start

    @property
    def longest(self) -> int:
        """Tokens of the sequence if it runs to its limit, its last block whole."""
        end = len(self.request.prompt_ids) + self.request.max_new_tokens
        return -(-end // self.block_length) * self.block_length


@dataclass(frozen=True)
class Plan:
    """One step of the engine.

    Attributes:
        admitted: sequences that just got a slot.
        prefill: (sequence, start, end) chunks to run, whole blocks.
        blocks: sequences whose current block takes part in this step's forward.
    """

    admitted: list[Sequence]
    prefill: list[tuple[Sequence, int, int]]
    blocks: list[Sequence]


class Scheduler:
    """Plans each step over `max_active` slots and a pool of pages.

    Args:
        sequences: all there is to do, in order of admission.
        pool: the pages.
        max_active: slots, that is sequences running at once.
        prefill_chunk: about how many prompt tokens a step prefills: whole blocks, less than one block more.
    """

    def __init__(self, sequences: Iterable[Sequence], pool: PagePool, max_active: int, prefill_chunk: int) -> None:
        self.pool = pool
        self.waiting = deque(sequences)
        self.running: list[Sequence] = []  # in order of admission
        self.preemptions = 0
        self._free_slots = list(range(max_active - 1, -1, -1))
        self._prefill_chunk = prefill_chunk

    @property
    def unfinished(self) -> bool:
        """Whether anything waits or runs."""
        return bool(self.waiting or self.running)

    def plan(self) -> Plan:
        """Choose what the next step runs."""
        self._grow()
        admitted = self._admit()
        prefill, budget = [], self._prefill_chunk
        for sequence in self.running:
            if sequence.in_prefill and budget > 0:
                blocks = max(budget // sequence.block_length, 1)
                end = min(sequence.block_start, sequence.cached + blocks * sequence.block_length)
                prefill.append((sequence, sequence.cached, end))
                budget -= end - sequence.cached
        ends = {sequence.index: end for sequence, _, end in prefill}
        blocks_now = [s for s in self.running if ends.get(s.index, s.cached) >= s.block_start]
        return Plan(admitted, prefill, blocks_now)

    def finish(self, sequence: Sequence) -> None:
        """Free what a sequence held; its place is taken at the next step."""
        self.running.remove(sequence)
        self._vacate(sequence)

    def _grow(self) -> None:
        """Give every running sequence the pages of its current block, the oldest first."""
        for sequence in list(self.running):
            if sequence.slot < 0:
                continue  # preempted in this loop
            missing = self.pool.pages_for(sequence.block_start + sequence.block_length) - len(sequence.pages)
            while missing > self.pool.free_pages and sequence.slot >= 0:
                self._preempt(self.running[-1])
            if sequence.slot >= 0 and missing > 0:
                sequence.pages += self.pool.allocate(missing)

    def _admit(self) -> list[Sequence]:
        admitted = []
        while self.waiting and self._free_slots:
            sequence = self.waiting[0]
            needed = self.pool.pages_for(sequence.block_start + sequence.block_length)
            # One page is left for each running sequence, so that an admission does not force a preemption at once.
            if self.pool.free_pages < needed + len(self.running) and (self.running or self.pool.free_pages < needed):
                break
            self.waiting.popleft()
            sequence.slot = self._free_slots.pop()
            sequence.pages = self.pool.allocate(needed)
            self.running.append(sequence)
            admitted.append(sequence)
        return admitted

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._vacate(sequence)
        sequence.forget_cache()
        self.waiting.appendleft(sequence)
        self.preemptions += 1

    def _vacate(self, sequence: Sequence) -> None:
        self.pool.release(sequence.pages)
        self._free_slots.append(sequence.slot)
        sequence.pages, sequence.slot = [], -1
