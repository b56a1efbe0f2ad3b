from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdar_lm_eval.decoding import DecodingConfig
from sdar_lm_eval.engines.native.pages import PagePool
from sdar_lm_eval.engines.native.scheduler import Scheduler, SequenceState
from sdar_lm_eval.engines.types import GenerationRequest


def sequence(index, prompt, new, block=4):
    """Make a sequence; `prompt` is its prompt tokens, or their number: then no other index has these tokens."""
    prompt = tuple(range(1000 * index, 1000 * index + prompt)) if isinstance(prompt, int) else prompt
    request = GenerationRequest(prompt, new, DecodingConfig(block_length=block))
    return SequenceState(index, request, list(request.prompt_ids))


class Player:
    """Plays the engine: runs the planned prefill, and denoises each block in two steps.

    Attributes:
        memory: KV slot -> all that the KV stored there depends on.
    """

    def __init__(self, scheduler):
        self.scheduler, self.memory, self.step = scheduler, {}, 0

    def play(self, plan):
        """Carry a plan out; return the indices of the sequences that finished."""
        finished = []
        for s, start, end in plan.prefill:
            self.check(s, start)
            self.store(s, start, end)
            self.scheduler.prefilled(s, end)
        for s in plan.starting:
            s.in_batch = True
        for s in [s for s in self.scheduler.running if s.in_batch]:
            start = s.block_start
            self.check(s, start)
            self.store(s, start, start + s.block_length, denoising=True)
            if self.step % 2:
                new = start + s.block_length - len(s.tokens)
                remaining = s.request.max_new_tokens - s.num_new_tokens
                s.decide([99] * min(new, remaining))
                self.store(s, start, s.block_start)
                if remaining <= new:
                    self.scheduler.finish(s)
                    finished.append(s.index)
        self.step += 1
        return finished

    def store(self, s, start, end, denoising=False):
        for position in range(start, end):
            self.memory[self.kv_slot(s, position)] = None if denoising else self.source(s, position)

    def check(self, s, end):
        """Assert that a block at `end` sees the KV that its own sequence would have stored before the block."""
        for position in range(end):
            assert self.memory.get(self.kv_slot(s, position)) == self.source(s, position)

    def kv_slot(self, s, position):
        return s.pages[position // self.scheduler.pool.page_size], position % self.scheduler.pool.page_size

    @staticmethod
    def source(s, position):
        return s.block_length, tuple(s.tokens[: (position // s.block_length + 1) * s.block_length])


def run(sequences, pool, max_active, chunk=64, shrinks=(), **options):
    """Play until all sequences are finished; memory runs out in each step of `shrinks`.

    Returns the indices of the finished sequences in order, the most sequences at once, the prefilled chunks, and the
    scheduler.
    """
    scheduler = Scheduler(sequences, pool, max_active, chunk, **options)
    player = Player(scheduler)
    finished, most, prefilled = [], 0, []
    while scheduler.unfinished:
        plan = scheduler.plan()
        assert plan.prefill or plan.starting or any(s.in_batch for s in scheduler.running)
        assert sum(end - start for _, start, end in plan.prefill) < chunk + max(s.block_length for s in sequences)
        for s, start, end in plan.prefill:
            assert start == s.cached
            assert (end - start) % s.block_length == 0
        for s in scheduler.running:
            assert len(s.pages) * pool.page_size >= min(s.block_start + 2 * s.block_length, s.longest)
        slots = [s.slot for s in scheduler.running]
        assert len(set(slots)) == len(slots) <= max_active
        assert min(slots) >= 0
        pool.check_integrity(s.pages for s in scheduler.running)
        most = max(most, len(slots))
        if player.step in shrinks and len(slots) > 1:
            scheduler.shrink()
            pool.check_integrity(s.pages for s in scheduler.running)
            player.step += 1
            continue
        prefilled += plan.prefill
        finished += player.play(plan)
        assert player.step < 100_000
    pool.check_integrity([])
    return finished, most, prefilled, scheduler


def test_a_finished_sequences_place_is_taken_at_once():
    sequences = [sequence(0, 8, 4), sequence(1, 8, 40), sequence(2, 8, 4)]
    scheduler = Scheduler(sequences, PagePool(100, 16), max_active=2, prefill_chunk=64)
    player = Player(scheduler)
    while sequences[0] in scheduler.running or player.step == 0:
        player.play(scheduler.plan())
    place = 0 if sequences[1].slot else 1
    assert scheduler.plan().starting == [sequences[2]]
    assert sequences[2].slot == place


def test_prefill_stops_at_the_last_full_block_and_runs_in_chunks():
    long = sequence(0, 71, 4)
    scheduler = Scheduler([long], PagePool(100, 16), 1, prefill_chunk=32)
    player, chunks = Player(scheduler), []
    for step in range(3):
        plan = scheduler.plan()
        chunks += [(start, end) for _, start, end in plan.prefill]
        # The block after the prompt can run in the same step as the last chunk, not before.
        assert plan.starting == ([long] if step == 2 else [])
        player.play(plan)
    assert chunks == [(0, 32), (32, 64), (64, 68)]


def test_a_block_longer_than_the_chunk_still_runs():
    finished, _, _, _ = run([sequence(0, 130, 64, block=64)], PagePool(20, 16), 1, chunk=32)
    assert finished == [0]


def test_preemption_takes_the_youngest_and_keeps_what_was_decided():
    old, young = sequence(0, 16, 64), sequence(1, 16, 64)
    pool = PagePool(6, 16)
    scheduler = Scheduler([old, young], pool, 2, 64)
    player = Player(scheduler)
    while not scheduler.preemptions:
        plan = scheduler.plan()
        if not scheduler.preemptions:
            player.play(plan)
    assert young.slot == -1
    assert young.pages == []
    assert young.cached == 0
    assert scheduler.waiting[0] is young
    assert len(young.tokens) > 16  # the answer's tokens so far
    assert not young.in_batch
    assert old in scheduler.running


@settings(max_examples=50)
@given(
    seed=st.integers(0, 10_000), pages=st.integers(9, 40), max_active=st.integers(1, 6), chunk=st.sampled_from([16, 64])
)
def test_everything_finishes_once_in_any_pool_that_holds_one(seed, pages, max_active, chunk):
    rng = random.Random(seed)
    sequences = [sequence(i, rng.randint(1, 64), rng.randint(1, 60), block=rng.choice([1, 4, 8, 16])) for i in range(8)]
    finished, most, _, _ = run(sequences, PagePool(pages, 16), max_active, chunk)
    assert sorted(finished) == list(range(8))
    assert all(s.num_new_tokens == s.request.max_new_tokens for s in sequences)
    assert most <= max_active


def test_shrinking_keeps_the_older_half():
    sequences = [sequence(i, 16, 32) for i in range(6)]
    scheduler = Scheduler(sequences, PagePool(100, 16), 5, 64)
    scheduler.plan()
    scheduler.shrink()
    assert scheduler.running == sequences[:2]
    assert list(scheduler.waiting) == sequences[2:]
    scheduler.plan()
    assert scheduler.running == sequences[:2] and scheduler.can_shrink
    scheduler.shrink()
    assert scheduler.running == sequences[:1] and not scheduler.can_shrink


def test_inserted_tokens_are_prefilled_from_the_last_decided_block_on():
    (one,) = sequences = [sequence(0, 6, 40)]
    scheduler = Scheduler(sequences, PagePool(100, 4), 1, 64)
    player = Player(scheduler)
    for _ in range(2):  # the steps of a block
        player.play(scheduler.plan())
    assert (len(one.tokens), one.lookahead_end, len(one.pages)) == (8, 16, 3)
    scheduler.insert(one, [7] * 6)
    plan = scheduler.plan()
    assert (plan.vacated, plan.prefill, plan.starting) == ([0], [(one, 4, 12)], [one])
    assert (one.lookahead_end, len(one.pages)) == (20, 5)


def test_no_preemption_where_pages_suffice():
    sequences = [sequence(i, 32, 32) for i in range(8)]
    _, most, _, scheduler = run(sequences, PagePool(8 * 4, 16), 8)
    assert most == 8
    assert scheduler.preemptions == 0


class TestSharedBeginnings:
    def test_many_prompts_prefill_it_once_and_store_it_once(self):
        common = tuple(range(160))
        sequences = [sequence(i, (*common, *[1000 + i] * 6), 8) for i in range(20)]
        pool = PagePool(10 + 20, 16)  # one of the prefix, and one for each sequence's own tokens
        finished, most, prefilled, scheduler = run(sequences, pool, 20)
        assert most == len(finished) == 20
        assert scheduler.preemptions == 0
        assert [(start, end) for s, start, end in prefilled if s.index == 0] == [(0, 64), (64, 128), (128, 164)]
        assert all((start, end) == (160, 164) for s, start, end in prefilled if s.index)
        assert scheduler.shared_prompt_tokens == 19 * 160

    def test_without_sharing_each_prefills_its_own(self):
        sequences = [sequence(i, tuple(range(64)), 8) for i in range(3)]
        _, _, prefilled, scheduler = run(sequences, PagePool(50, 16), 3, share_prefixes=False)
        assert sum(end - start for _, start, end in prefilled) == 3 * 64
        assert scheduler.shared_prompt_tokens == 0

    def test_nobody_reads_what_another_has_not_prefilled(self):
        """The second and third wait while the first is prefilled in chunks; the fourth shares nothing."""
        common = tuple(range(48))
        sequences = [sequence(0, common, 4), sequence(1, common, 4), sequence(2, (*common, *common), 4)]
        sequences.append(sequence(3, 8, 4))
        scheduler = Scheduler(sequences, PagePool(50, 16), 4, prefill_chunk=20)
        player, plans = Player(scheduler), []
        for _ in range(4):
            plan = scheduler.plan()
            plans.append(([(s.index, start, end) for s, start, end in plan.prefill], [s.index for s in plan.starting]))
            player.play(plan)
        assert plans == [
            ([(0, 0, 20)], []),
            ([(0, 20, 40)], []),
            ([(0, 40, 48), (3, 0, 8)], [0, 3]),
            ([(2, 48, 68)], [1]),  # the second has nothing to prefill
        ]

    def test_a_preempted_sequence_finds_its_own_again(self):
        old, young = sequence(0, 16, 64), sequence(1, 32, 64)
        pool = PagePool(7, 16)
        _, _, prefilled, scheduler = run([old, young], pool, 2)
        assert scheduler.preemptions == 1
        assert [start for s, start, _ in prefilled if s is young] == [0, 32]
        assert scheduler.shared_prompt_tokens == 32

    def test_a_sequence_preempted_in_its_prefill_leaves_no_unwritten_node(self):
        sequences = [sequence(i, tuple(range(64)), 4) for i in range(4)]
        scheduler = Scheduler(sequences, PagePool(50, 16), 4, prefill_chunk=20)
        player = Player(scheduler)
        player.play(scheduler.plan())
        for remaining in (2, 1):
            scheduler.shrink()
            assert len(scheduler.running) == remaining
            scheduler.pool.check_integrity(s.pages for s in scheduler.running)
        scheduler.preempt(scheduler.running[0])  # 20 of its 64 tokens are stored
        scheduler.pool.check_integrity([])
        assert len(scheduler.pool.match_prefix(tuple(range(64)), 4)) == 1
        while scheduler.unfinished:
            player.play(scheduler.plan())
        assert sum(s.num_new_tokens for s in sequences) == 16

    def test_idle_pages_of_a_matched_prefix_do_not_count_as_free(self):
        """Both free pages hold the second prompt's prefix, so no free page remains for its other tokens."""
        first, second, third = (sequence(i, tuple(range(32)), 4) for i in range(3))
        third.tokens = list(range(500, 516))
        third.request = GenerationRequest(tuple(third.tokens), 4, DecodingConfig(block_length=4))
        pool = PagePool(4, 16)
        scheduler = Scheduler([first], pool, 2, 64)
        player = Player(scheduler)
        while scheduler.unfinished:
            player.play(scheduler.plan())
        scheduler.waiting.extend([third, second])
        scheduler.plan()
        assert scheduler.running == [third]
        assert pool.free_pages == 2
        assert pool.idle(pool.match_prefix(second.request.prompt_ids, 4)) == 2

    def test_a_wait_that_has_no_end_is_noticed(self):
        sequences = [sequence(i, tuple(range(32)), 4) for i in range(2)]
        scheduler = Scheduler(sequences, PagePool(50, 16), 2, 16)
        Player(scheduler).play(scheduler.plan())
        scheduler.preempt(sequences[0])  # the scheduler itself never preempts the older one first
        scheduler.waiting.clear()
        with pytest.raises(AssertionError, match="no other is left to write what it waits for"):
            scheduler.plan()

    def test_a_write_to_what_others_read_is_noticed(self):
        sequences = [sequence(i, tuple(range(32)), 4) for i in range(2)]
        scheduler = Scheduler(sequences, PagePool(50, 16), 2, 64)
        Player(scheduler).play(scheduler.plan())
        sequences[1].cached = 16  # as if its shared prefix ended in the middle
        with pytest.raises(AssertionError, match="a page that other sequences read would be written"):
            scheduler.plan()

    @settings(max_examples=50)
    @given(
        seed=st.integers(0, 10_000),
        pages=st.integers(12, 40),
        max_active=st.integers(1, 8),
        chunk=st.sampled_from([8, 16, 64]),
        shrinks=st.sets(st.integers(0, 30), max_size=2),
    )
    def test_everything_finishes_and_reads_only_what_is_its_own(self, seed, pages, max_active, chunk, shrinks):
        rng = random.Random(seed)
        trunk = [rng.randrange(2) for _ in range(100)]
        prompts = [
            (*trunk[: rng.choice([0, 15, 16, 48, 96])], *[rng.randrange(2)] * rng.randint(1, 24)) for _ in range(12)
        ]
        blocks = [rng.choice([1, 3, 4, 4, 4, 16, 24, 32]) for _ in prompts]
        sequences = [
            sequence(i, prompt, rng.randint(1, 40), block)
            for i, (prompt, block) in enumerate(zip(prompts, blocks, strict=True))
        ]
        finished, _, _, _ = run(sequences, PagePool(pages, 16), max_active, chunk, shrinks=shrinks)
        assert sorted(finished) == list(range(12))
        assert all(s.num_new_tokens == s.request.max_new_tokens for s in sequences)


def test_what_a_discarded_sequence_stored_is_not_found_again():
    """The nodes below its own are evicted too; nodes that another sequence holds stay."""
    pool = PagePool(20, 16)
    texts = [tuple(range(64)), (*range(32), *range(900, 932)), (*range(16), *range(800, 816))]
    bad, other, third = (sequence(i, text, 100) for i, text in enumerate(texts))
    scheduler = Scheduler([bad, other, third], pool, 3, 1024)
    player = Player(scheduler)
    player.play(scheduler.plan())
    player.play(scheduler.plan())
    assert all(s.in_batch for s in (bad, other, third))
    scheduler.finish(other)  # its own node is idle, and its parent belongs to the bad sequence
    pages, shared = list(bad.pages), list(third.pages[:1])
    assert scheduler.discard(bad) == pages[1:]
    assert bad.slot == -1
    assert pool.match_prefix(texts[0], 4) == pool.match_prefix(texts[1], 4) == shared
    pool.check_integrity([third.pages])
    assert scheduler.plan().vacated  # the device runs the sequence until its slot is stopped
