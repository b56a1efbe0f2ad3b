"""The scheduler: admission, chunked prefill, page allocation block by block, preemption. No tensors.

A sequence waits until it is admitted: it gets a slot, and pages for its prompt and its first blocks. Its prompt is
prefilled up to the last full block. Its blocks are then denoised one after the other, with pages for the current block
and the next one. When the pages run out, the youngest running sequence is preempted: it releases its pages and waits at
the front of the queue. A preempted sequence keeps its decided tokens and prefills them again, so only time is lost.
A sequence whose thought is closed gets tokens that no step drew (`insert`), and begins again behind them.

A prompt whose prefix is cached shares the pages of this prefix (`pages.py`), and is prefilled from the prefix's end on.
If an older sequence is still prefilling the prefix, the younger one waits for it. The wait ends: only the youngest
sequence is preempted, so the older one stays until it has stored the prefix.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from sdar_lm_eval.engines.native.pages import PagePool
from sdar_lm_eval.engines.runs import Allowance
from sdar_lm_eval.engines.types import GenerationRequest

LEAST_PREFILL = 64  # tokens a step; a smaller prefill takes too little memory for a cut to help


@dataclass(eq=False)
class SequenceState:
    """The state of a request's sequence on the host.

    Attributes:
        index: position of the request among all requests.
        tokens: the prompt and the decided part of the answer.
        cached: leading tokens that this sequence does not have to prefill: their KV is stored, or is stored by the next
            forward or by an older sequence that shares the pages. Whole blocks.
        slot: row of the batch state on the device; -1 while waiting.
        in_batch: whether the batch on the device holds the sequence; before that, its prompt is prefilled.
        epoch: number of times that the sequence left its slot, or the batch on the device. The result of a step that
            was launched in an earlier epoch is discarded.
        pages: KV pages that the sequence holds, in order.
        started_at: `time.perf_counter()` at the first forward; None before it.
        forced_tokens: decided tokens that no step drew.
        steps_before: denoising steps of the current block before the sequence entered the batch again within it.
    """

    index: int
    request: GenerationRequest
    tokens: list[int]
    cached: int = 0
    slot: int = -1
    in_batch: bool = False
    epoch: int = 0
    pages: list[int] = field(default_factory=list)
    prefill_forwards: int = 0
    denoising_forwards: int = 0
    commit_forwards: int = 0
    started_at: float | None = None
    unmasked_at: list[int] = field(default_factory=list)
    confidences: list[float] = field(default_factory=list)
    forced_tokens: int = 0
    steps_before: int = 0

    @property
    def block_length(self) -> int:
        """Tokens denoised together."""
        return self.request.decoding.block_length

    @property
    def block_start(self) -> int:
        """Position of the current block: after the last full block of `tokens`."""
        return len(self.tokens) // self.block_length * self.block_length

    @property
    def num_new_tokens(self) -> int:
        """Decided tokens of the answer."""
        return len(self.tokens) - len(self.request.prompt_ids)

    def decide(self, new: list[int]) -> None:
        """Append the new tokens of a decided block, up to the block's end. The next forward stores the block's KV."""
        self.tokens += new
        self.cached = len(self.tokens)

    @property
    def in_prefill(self) -> bool:
        """Whether tokens before the current block still have to be prefilled."""
        return self.cached < self.block_start

    @property
    def longest(self) -> int:
        """Tokens of the sequence at its length limit, rounded up to whole blocks."""
        return self.request.longest

    @property
    def lookahead_end(self) -> int:
        """Position up to which the sequence needs pages: the end of the next block, which the device may begin."""
        return min(self.block_start + 2 * self.block_length, self.longest)


class Chunk(NamedTuple):
    """Whole blocks to prefill: the tokens of a sequence at positions start <= position < end."""

    sequence: SequenceState
    start: int
    end: int

    @property
    def size(self) -> int:
        """Tokens of the chunk."""
        return self.end - self.start


@dataclass(frozen=True)
class StepPlan:
    """What the engine does between two steps, in this order.

    Attributes:
        vacated: slots without a sequence that the device still takes for active.
        paged: sequences whose pages changed.
        prefill: chunks to run.
        starting: sequences to put into the batch: their prefill is complete once these chunks have run.
    """

    vacated: list[int]
    paged: list[SequenceState]
    prefill: list[Chunk]
    starting: list[SequenceState]


class Scheduler:
    """Plans each step over `max_active` slots and a pool of pages.

    Args:
        sequences: the sequences to run, in order of admission.
        pool: the KV pages.
        max_active: number of slots: most sequences that run at once.
        prefill_chunk: prompt tokens that a step prefills, rounded to whole blocks: less than one block more.
        share_prefixes: whether prompts with a common prefix share pages.

    Attributes:
        preemptions: number of preemptions of sequences.
        shared_prompt_tokens: prompt tokens that were not prefilled, since an older sequence stores their KV.
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
        self.shared_prompt_tokens = 0
        self._share_prefixes = share_prefixes
        self._free_slots = list(range(max_active - 1, -1, -1))
        self._prefill_limit = Allowance(prefill_chunk)
        self._active_limit = Allowance(max_active)
        self._vacated: list[int] = []  # slots that the next plan reports

    @property
    def unfinished(self) -> bool:
        """Whether anything waits or runs."""
        return bool(self.waiting or self.running)

    def plan(self) -> StepPlan:
        """Plan what happens before the next step. Calling it means that the plan before was carried out."""
        if self.waiting and len(self.running) >= self._active_limit.now:
            self._active_limit.count_full_step()
            self._prefill_limit.count_full_step()
        preempted, paged = self._grow()
        vacated, self._vacated = [*self._vacated, *preempted], []
        paged += self._admit()
        entering = [sequence for sequence in self.running if not sequence.in_batch]
        ready = list(filter(self._shared_prefix_is_written, entering))
        assert ready[:1] == entering[:1], "the oldest sequence waits, and no other is left to write what it waits for"
        prefill, budget = [], self._prefill_limit.now
        for sequence in ready:
            if sequence.in_prefill and budget > 0:
                blocks = max(budget // sequence.block_length, 1)
                end = min(sequence.block_start, sequence.cached + blocks * sequence.block_length)
                prefill.append(Chunk(sequence, sequence.cached, end))
                budget -= end - sequence.cached
        ends = {sequence.index: end for sequence, _, end in prefill}
        starting = [s for s in ready if ends.get(s.index, s.cached) >= s.block_start]
        written = [(s.pages, start, end) for s, start, end in prefill]
        written += [(s.pages, s.block_start, s.lookahead_end) for s in starting]
        for pages, start, end in written:
            touched = pages[start // self.pool.page_size : self.pool.pages_for(end)]
            assert all(map(self.pool.may_write, touched)), "a page that other sequences read would be written"
        return StepPlan(vacated, paged, prefill, starting)

    def prefilled(self, sequence: SequenceState, end: int) -> None:
        """Take note that the KV of a sequence's tokens up to `end` is stored."""
        sequence.cached = end
        self.pool.written(sequence.pages[: end // self.pool.page_size])

    def finish(self, sequence: SequenceState, *, device_knows: bool = True) -> None:
        """Free the slot and the pages of a finished sequence. The next plan may give them to others.

        Args:
            sequence: a running sequence.
            device_knows: whether the device ended the sequence by itself.
        """
        if not device_knows:
            self._vacated.append(sequence.slot)
        self.running.remove(sequence)
        self._free(sequence)

    def insert(self, sequence: SequenceState, tokens: list[int]) -> None:
        """Append tokens that no step drew. The sequence keeps slot and pages, and enters the batch again behind them.

        The sequence's last block has just been decided, so the KV of all blocks before it is stored. KV that a step in
        flight stores for the sequence is overwritten: it is of this block or later ones.

        Args:
            sequence: a running sequence, whose last decided tokens may end within a block.
            tokens: at least one.
        """
        last = len(sequence.tokens) - 1
        sequence.cached = last // sequence.block_length * sequence.block_length
        sequence.tokens += tokens
        sequence.in_batch = False
        sequence.epoch += 1
        self._vacated.append(sequence.slot)

    def discard(self, sequence: SequenceState) -> list[int]:
        """Remove a sequence whose KV is not finite; return the pages that no sequence holds any more.

        All idle nodes of the prefix cache are evicted: some of them may hold KV that is not finite.
        """
        self._vacated.append(sequence.slot)
        self.running.remove(sequence)
        pages = sequence.pages
        self._free(sequence)
        self.pool.evict_idle()
        return [page for page in pages if self.pool.idle([page])]

    @property
    def can_shrink(self) -> bool:
        """Whether `shrink` would lower a limit."""
        return len(self.running) > 1 or self._prefill_limit.now > LEAST_PREFILL

    def shrink(self) -> None:
        """Halve the number of running sequences and the prefill of a step; both limits grow again later.

        The younger half of the running sequences is preempted; at least one sequence stays.
        """
        self._active_limit.cut(len(self.running) // 2)
        self._prefill_limit.cut(self._prefill_limit.now // 2)
        for sequence in reversed(self.running[self._active_limit.now :]):
            self.preempt(sequence)

    def _grow(self) -> tuple[list[int], list[SequenceState]]:
        """Give each running sequence the pages it lacks, the oldest first.

        Returns:
            The slots of preempted sequences, and the sequences that got pages.
        """
        preempted, grown = [], []
        for sequence in list(self.running):
            if sequence.slot < 0:
                continue  # preempted in this loop
            missing = self.pool.pages_for(sequence.lookahead_end) - len(sequence.pages)
            while missing > self.pool.free_pages and sequence.slot >= 0:
                preempted.append(self.running[-1].slot)
                self.preempt(self.running[-1])
            if sequence.slot >= 0 and missing > 0:
                sequence.pages += self.pool.allocate(missing)
                grown.append(sequence)
        return preempted, [sequence for sequence in grown if sequence.slot >= 0]

    def _admit(self) -> list[SequenceState]:
        admitted: list[SequenceState] = []
        if not self.waiting or len(self.running) >= self._active_limit.now:
            return admitted
        # An admission that takes the last pages would force a preemption soon: one page stays free for each running
        # sequence that will need more.
        growing = sum(map(self._will_grow, self.running))
        while self.waiting and len(self.running) < self._active_limit.now:
            sequence = self.waiting[0]
            prompt, length = sequence.request.prompt_ids, sequence.block_length
            shared = self.pool.match_prefix(prompt, length)
            unshared = self.pool.pages_for(sequence.lookahead_end) - len(shared)
            needed = unshared + self.pool.idle(shared)
            if self.pool.free_pages < needed + growing and (self.running or self.pool.free_pages < needed):
                break
            self.waiting.popleft()
            sequence.slot = self._free_slots.pop()
            self.pool.hold(shared)
            sequence.pages = shared + self.pool.allocate(unshared)
            sequence.cached = len(shared) * self.pool.page_size
            self.shared_prompt_tokens += sequence.cached
            if self._share_prefixes:
                self.pool.insert_prefix(prompt, length, sequence.pages)
            growing += self._will_grow(sequence)
            self.running.append(sequence)
            admitted.append(sequence)
        return admitted

    def _shared_prefix_is_written(self, sequence: SequenceState) -> bool:
        """Whether all KV that a sequence shares is stored. KV is stored in order, so the last page decides."""
        count = sequence.cached // self.pool.page_size
        return count == 0 or self.pool.is_written(sequence.pages[count - 1])

    def _will_grow(self, sequence: SequenceState) -> bool:
        """Whether a sequence may need more pages than it has."""
        return len(sequence.pages) < self.pool.pages_for(sequence.longest)

    def preempt(self, sequence: SequenceState) -> None:
        """Take a running sequence's slot and pages; the sequence waits at the front, with its decided tokens."""
        self.running.remove(sequence)
        self._free(sequence)
        sequence.cached = 0
        self.waiting.appendleft(sequence)
        self.preemptions += 1

    def _free(self, sequence: SequenceState) -> None:
        self.pool.release(sequence.pages)
        self._free_slots.append(sequence.slot)
        sequence.pages, sequence.slot, sequence.in_batch = [], -1, False
        sequence.epoch += 1
