from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from sdar_lm_eval.engines.base import DecodingConfig, GenerationRequest
from sdar_lm_eval.engines.native.pages import PagePool
from sdar_lm_eval.engines.native.scheduler import Scheduler, Sequence


def sequence(index, prompt, new, block=4):
    request = GenerationRequest(tuple(range(prompt)), new, DecodingConfig(block_length=block))
    return Sequence(index, request, list(request.prompt_ids))


def advance(plan, scheduler, step):
    """Play the engine: prefill happens, and a block takes two steps."""
    finished = []
    for s, _, end in plan.prefill:
        s.cached = end
    for s in plan.starting:
        s.begun = True
    for s in list(scheduler.running):
        if s.begun and step % 2:
            new = s.block_start + s.block_length - len(s.tokens)
            room = s.request.max_new_tokens - s.num_new_tokens
            s.decide([99] * min(new, room))
            if room <= new:
                scheduler.finish(s)
                finished.append(s.index)
    return finished


def run(sequences, pool, max_active, chunk=64):
    scheduler = Scheduler(sequences, pool, max_active, chunk)
    finished, most, step = [], 0, 0
    while scheduler.unfinished:
        plan = scheduler.plan()
        assert plan.prefill or any(s.begun for s in [*scheduler.running, *plan.starting]) or plan.starting
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
        finished += advance(plan, scheduler, step)
        step += 1
        assert step < 100_000
    pool.check_integrity([])
    return finished, most, scheduler


def test_a_finished_sequences_place_is_taken_at_once():
    sequences = [sequence(0, 8, 4), sequence(1, 8, 40), sequence(2, 8, 4)]
    scheduler = Scheduler(sequences, PagePool(100, 16), max_active=2, prefill_chunk=64)
    step = 0
    while sequences[0] in scheduler.running or step == 0:
        plan = scheduler.plan()
        advance(plan, scheduler, step)
        step += 1
    place = 0 if sequences[1].slot else 1
    assert scheduler.plan().starting == [sequences[2]]
    assert sequences[2].slot == place


def test_prefill_stops_at_the_last_full_block_and_runs_in_chunks():
    long = sequence(0, 71, 4)
    scheduler = Scheduler([long], PagePool(100, 16), 1, prefill_chunk=32)
    chunks = []
    for step in range(3):
        plan = scheduler.plan()
        chunks += [(start, end) for _, start, end in plan.prefill]
        # The block after the prompt can run in the same step as the last chunk, not before.
        assert plan.starting == ([long] if step == 2 else [])
        advance(plan, scheduler, 0)
    assert chunks == [(0, 32), (32, 64), (64, 68)]


def test_a_block_longer_than_the_chunk_still_runs():
    finished, _, _ = run([sequence(0, 130, 64, block=64)], PagePool(20, 16), 1, chunk=32)
    assert finished == [0]


def test_preemption_takes_the_youngest_and_keeps_what_was_decided():
    old, young = sequence(0, 16, 64), sequence(1, 16, 64)
    pool = PagePool(6, 16)
    scheduler = Scheduler([old, young], pool, 2, 64)
    step = 0
    while not scheduler.preemptions:
        plan = scheduler.plan()
        if not scheduler.preemptions:
            advance(plan, scheduler, step)
            step += 1
    assert young.slot == -1
    assert young.pages == []
    assert young.cached == 0
    assert scheduler.waiting[0] is young
    assert len(young.tokens) > 16  # its answer so far
    assert not young.begun
    assert old in scheduler.running


@given(
    seed=st.integers(0, 10_000), pages=st.integers(9, 40), max_active=st.integers(1, 6), chunk=st.sampled_from([16, 64])
)
def test_everything_finishes_once_in_any_pool_that_holds_one(seed, pages, max_active, chunk):
    rng = random.Random(seed)
    sequences = [sequence(i, rng.randint(1, 64), rng.randint(1, 60), block=rng.choice([1, 4, 8, 16])) for i in range(8)]
    finished, most, _ = run(sequences, PagePool(pages, 16), max_active, chunk)
    assert sorted(finished) == list(range(8))
    assert all(s.num_new_tokens == s.request.max_new_tokens for s in sequences)
    assert most <= max_active


def test_shrinking_keeps_the_older_half():
    sequences = [sequence(i, 16, 32) for i in range(6)]
    scheduler = Scheduler(sequences, PagePool(100, 16), 5, 64)
    scheduler.plan()
    slots = [s.slot for s in sequences]
    assert scheduler.shrink() == slots[2:5]
    assert scheduler.running == sequences[:2]
    assert list(scheduler.waiting) == sequences[2:]
    scheduler.plan()
    assert scheduler.running == sequences[:2]
    slot = sequences[1].slot
    assert scheduler.shrink() == [slot]
    assert scheduler.running == sequences[:1]


def test_no_preemption_where_pages_suffice():
    sequences = [sequence(i, 32, 32) for i in range(8)]
    _, most, scheduler = run(sequences, PagePool(8 * 4, 16), 8)
    assert most == 8
    assert scheduler.preemptions == 0
