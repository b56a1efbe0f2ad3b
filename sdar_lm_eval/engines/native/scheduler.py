"""Who runs next: admission, prefill in chunks, growth block by block, preemption. No tensors.

A sequence waits, is admitted (it gets a slot, and pages for its prompt and its first blocks), is prefilled up to its
last full block, and is then denoised block by block, with pages for its current block and the next. When pages run out
the youngest running sequence gives all of its own back and waits again, at the front; its decided tokens are kept and
prefilled again, so that nothing but time is lost.

A prompt that begins as another one did shares the pages of that beginning (`pages.py`) and is prefilled from there on,
as soon as the other one has prefilled it. The other one is older, so that it never leaves before it has.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from sdar_lm_eval.engines.native.pages import PagePool
from sdar_lm_eval.engines.runs import Allowance
from sdar_lm_eval.engines.types import GenerationRequest

LEAST_PREFILL = 64  # tokens a step; with fewer it is not the prefill that takes the memory


@dataclass(eq=False)
class SequenceState:
    """A request on its way.

    Attributes:
        tokens: the prompt and the decided part of the answer.
        cached: leading tokens whose KV is in the pages, or will be after the next forward, or is stored by the sequence
            whose pages these are; whole blocks.
        slot: row of the batch state on the device; -1 while waiting.
        begun: whether it takes part in the steps; before that, its prompt is prefilled.
        turn: goes up when the sequence leaves its slot, so that what the device still does there is known to be old.
    """

    index: int
    request: GenerationRequest
    tokens: list[int]
    cached: int = 0
    slot: int = -1
    begun: bool = False
    turn: int = 0
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
        """Decided tokens of the answer."""
        return len(self.tokens) - len(self.request.prompt_ids)

    def decide(self, new: list[int]) -> None:
        """Take the new tokens of a block, the last of them ending it; its KV is stored by the next forward."""
        self.tokens += new
        self.cached = len(self.tokens)

    @property
    def in_prefill(self) -> bool:
        """Whether tokens before the current block still have no KV."""
        return self.cached < self.block_start

    @property
    def longest(self) -> int:
        """Tokens of the sequence if it runs to its limit, its last block whole."""
        return self.request.longest

    @property
    def reach(self) -> int:
        """Tokens that must have pages: up to the block after the current one, which the device may begin by itself."""
        return min(self.block_start + 2 * self.block_length, self.longest)


class Chunk(NamedTuple):
    """Whole blocks of a prompt: the tokens of a sequence from `start` up to, without, `end`."""

    sequence: SequenceState
    start: int
    end: int

    @property
    def size(self) -> int:
        """Tokens of the chunk."""
        return self.end - self.start


@dataclass(frozen=True)
class Plan:
    """What the engine does between two steps.

    Attributes:
        vacated: slots whose sequences were preempted or are finished, and that the device still takes for active.
        paged: sequences whose pages changed.
        prefill: chunks of prompts to run.
        starting: sequences whose prompts are prefilled after that: their first block takes part in the next step.
    """

    vacated: list[int]
    paged: list[SequenceState]
    prefill: list[Chunk]
    starting: list[SequenceState]


class Scheduler:
    """Plans each step over `max_active` slots and a pool of pages.

    Args:
        sequences: all there is to do, in order of admission.
        pool: the pages.
        max_active: slots, that is sequences running at once.
        prefill_chunk: about how many prompt tokens a step prefills: whole blocks, less than one block more.
        share_prefixes: whether prompts that begin alike share pages.
    """

    def __init__(
        self,
        sequences: Iterable[SequenceState],
        pool: PagePool,
        max_active: int,
        prefill_chunk: int,
        *,
        share_prefixes: bool = True,
    ) -> None:
        self.pool = pool
        self.waiting = deque(sequences)
        self.running: list[SequenceState] = []  # in order of admission
        self.preemptions = 0
        self.shared_prompt_tokens = 0  # that were not prefilled: their KV was there, or on its way
        self._share_prefixes = share_prefixes
        self._free_slots = list(range(max_active - 1, -1, -1))
        self._prefill_chunk = Allowance(prefill_chunk)
        self._most = Allowance(max_active)
        self._vacated: list[int] = []  # slots for the next plan to name

    @property
    def unfinished(self) -> bool:
        """Whether anything waits or runs."""
        return bool(self.waiting or self.running)

    def plan(self) -> Plan:
        """Choose what happens before the next step; the one before it went through."""
        if self.waiting and len(self.running) >= self._most.now:
            self._most.count_full_step()
            self._prefill_chunk.count_full_step()
        preempted, paged = self._grow()
        vacated, self._vacated = [*self._vacated, *preempted], []
        paged += self._admit()
        entering = [sequence for sequence in self.running if not sequence.begun]
        ready = list(filter(self._beginning_is_written, entering))
        assert ready[:1] == entering[:1], "the oldest waits, so that nobody is left to write what it waits for"
        prefill, budget = [], self._prefill_chunk.now
        for sequence in ready:
            if sequence.in_prefill and budget > 0:
                blocks = max(budget // sequence.block_length, 1)
                end = min(sequence.block_start, sequence.cached + blocks * sequence.block_length)
                prefill.append(Chunk(sequence, sequence.cached, end))
                budget -= end - sequence.cached
        ends = {sequence.index: end for sequence, _, end in prefill}
        starting = [s for s in ready if ends.get(s.index, s.cached) >= s.block_start]
        written = [(s.pages, start, end) for s, start, end in prefill]
        written += [(s.pages, s.block_start, s.reach) for s in starting]
        for pages, start, end in written:
            touched = pages[start // self.pool.page_size : self.pool.pages_for(end)]
            assert all(map(self.pool.may_write, touched)), "a page that others read would be written"
        return Plan(vacated, paged, prefill, starting)

    def prefilled(self, sequence: SequenceState, end: int) -> None:
        """Take note that the KV of a sequence's tokens up to `end` is stored."""
        sequence.cached = end
        self.pool.written(sequence.pages[: end // self.pool.page_size])

    def finish(self, sequence: SequenceState, *, device_knows: bool = True) -> None:
        """Free what a sequence held; its place is taken at the next plan."""
        if not device_knows:
            self._vacated.append(sequence.slot)
        self.running.remove(sequence)
        self._vacate(sequence)

    def discard(self, sequence: SequenceState) -> list[int]:
        """Take out a sequence whose KV is not numbers; returns the pages that nobody holds any more."""
        self._vacated.append(sequence.slot)
        self.running.remove(sequence)
        pages = sequence.pages
        self._vacate(sequence)
        self.pool.forget_idle()
        return [page for page in pages if self.pool.idle([page])]

    @property
    def can_shrink(self) -> bool:
        """Whether `shrink` makes a difference."""
        return len(self.running) > 1 or self._prefill_chunk.now > LEAST_PREFILL

    def shrink(self) -> None:
        """Run half as many sequences, with half the prefill a step; both grow again while memory lasts.

        The younger half of the running ones leaves; one stays.
        """
        self._most.cut(len(self.running) // 2)
        self._prefill_chunk.cut(self._prefill_chunk.now // 2)
        for sequence in reversed(self.running[self._most.now :]):
            self._preempt(sequence)

    def _grow(self) -> tuple[list[int], list[SequenceState]]:
        """Give every running sequence the pages it lacks, the oldest first; returns who left, and who got some."""
        preempted, grown = [], []
        for sequence in list(self.running):
            if sequence.slot < 0:
                continue  # preempted in this loop
            missing = self.pool.pages_for(sequence.reach) - len(sequence.pages)
            while missing > self.pool.free_pages and sequence.slot >= 0:
                preempted.append(self.running[-1].slot)
                self._preempt(self.running[-1])
            if sequence.slot >= 0 and missing > 0:
                sequence.pages += self.pool.allocate(missing)
                grown.append(sequence)
        return preempted, [sequence for sequence in grown if sequence.slot >= 0]

    def _admit(self) -> list[SequenceState]:
        admitted: list[SequenceState] = []
        if not self.waiting or len(self.running) >= self._most.now:
            return admitted
        # One page is left for each running sequence that will need more, so that an admission does not force a
        # preemption at once.
        growing = sum(map(self._grows, self.running))
        while self.waiting and len(self.running) < self._most.now:
            sequence = self.waiting[0]
            prompt, length = sequence.request.prompt_ids, sequence.block_length
            shared = self.pool.find(prompt, length)
            own = self.pool.pages_for(sequence.reach) - len(shared)
            needed = own + self.pool.idle(shared)
            if self.pool.free_pages < needed + growing and (self.running or self.pool.free_pages < needed):
                break
            self.waiting.popleft()
            sequence.slot = self._free_slots.pop()
            self.pool.hold(shared)
            sequence.pages = shared + self.pool.allocate(own)
            sequence.cached = len(shared) * self.pool.page_size
            self.shared_prompt_tokens += sequence.cached
            if self._share_prefixes:
                self.pool.announce(prompt, length, sequence.pages)
            growing += self._grows(sequence)
            self.running.append(sequence)
            admitted.append(sequence)
        return admitted

    def _beginning_is_written(self, sequence: SequenceState) -> bool:
        """Whether nobody else still has to store KV that a sequence shares. It is stored in order: the last tells."""
        whole = sequence.cached // self.pool.page_size
        return whole == 0 or self.pool.is_written(sequence.pages[whole - 1])

    def _grows(self, sequence: SequenceState) -> bool:
        """Whether a sequence will need more pages than it has."""
        return len(sequence.pages) < self.pool.pages_for(sequence.longest)

    def _preempt(self, sequence: SequenceState) -> None:
        self.running.remove(sequence)
        self._vacate(sequence)
        sequence.cached = 0
        self.waiting.appendleft(sequence)
        self.preemptions += 1

    def _vacate(self, sequence: SequenceState) -> None:
        self.pool.release(sequence.pages)
        self._free_slots.append(sequence.slot)
        sequence.pages, sequence.slot, sequence.begun = [], -1, False
        sequence.turn += 1
