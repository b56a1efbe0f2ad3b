"""How much memory JetEngine is to take: numbers alone."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdar_lm_eval import DecodingConfig, GenerationRequest
from sdar_lm_eval.engines.adapters.jetengine import memory
from sdar_lm_eval.engines.adapters.jetengine.memory import CAPTURED, captured, message_bytes, pages_of, size_for

GIB = 1 << 30
SDAR_4B = {
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_hidden_layers": 36,
    "head_dim": 128,
}


def request(prompt: int, new: int, block_length: int = 4, steps: int | None = None) -> GenerationRequest:
    return GenerationRequest((1,) * prompt, new, DecodingConfig(block_length, steps))


def size(requests, *, free=79 * GIB, total=80 * GIB, max_active=None, **settings):
    return size_for(
        requests, SDAR_4B, weight_bytes=8 * GIB, free_bytes=free, total_bytes=total, max_active=max_active, **settings
    )


REQUESTS = st.lists(st.builds(request, st.integers(1, 5000), st.integers(1, 3000)), min_size=1, max_size=30)


@given(REQUESTS, st.integers(24, 80), st.floats(0.5, 1), st.sampled_from([None, 1, 3, 64, 400]), st.integers(1, 12))
def test_never_more_than_there_is(requests, total, free, max_active, times):
    """Beside what JetEngine fills, there is room for the logits."""
    made = size(requests * times, free=int(free * total * GIB), total=total * GIB, max_active=max_active)
    logits = made.max_active * made.block_length * SDAR_4B["vocab_size"] * memory.BYTES_PER_LOGIT
    assert made.gpu_memory_utilization * total * GIB + logits <= total * GIB * 1.0001
    assert logits <= total * GIB * memory.LOGITS_SHARE or made.max_active == 1
    assert made.max_active in CAPTURED
    assert made.max_active <= len(requests) * times
    assert made.max_active <= (max_active or 256)
    assert made.max_tokens == max(request.longest for request in requests)
    # JetEngine asserts the first; the second bounds the memory of its warm-up.
    assert made.prefill_tokens >= made.max_tokens
    assert made.prefill_tokens <= max(made.max_tokens, memory.PREFILL_TOKENS)


@given(REQUESTS, REQUESTS)
def test_more_requests_need_no_less(some, others):
    less, more = size(some), size(some + others)
    assert more.holds(less)
    assert more.gpu_memory_utilization >= less.gpu_memory_utilization or more.max_active > less.max_active


@given(REQUESTS)
def test_the_pages_of_all_that_run_are_in_it(requests):
    """JetEngine fills room for pages, weights, prefill and what other programs use, unless memory is short."""
    made = size(requests)
    longest = sorted(map(pages_of, requests))[-made.max_active :]
    pages = sum(longest) * memory.bytes_per_page(SDAR_4B)
    allowed = 80 * GIB - made.max_active * 4 * SDAR_4B["vocab_size"] * memory.BYTES_PER_LOGIT - memory.GRAPH_BYTES
    filled = made.gpu_memory_utilization * 80 * GIB
    assert filled >= 0.999 * min(allowed, GIB + 8 * GIB + pages + 2 * made.prefill_tokens * 2 * SDAR_4B["hidden_size"])


def test_a_gpu_that_others_use():
    alone, shared = (size([request(100, 100)] * 16, free=free * GIB) for free in (80, 50))
    assert shared.gpu_memory_utilization - alone.gpu_memory_utilization == pytest.approx(30 / 80, abs=1e-3)


def test_two_gpus_need_room_to_talk():
    one, two = (size([request(4, 4)], tensor_parallel_size=n).gpu_memory_utilization for n in (1, 2))
    pages = (1 + memory.LARGEST_GAP) * memory.bytes_per_page(SDAR_4B, 2)  # the other GPU has half of them
    assert (two - one) * 80 * GIB == pytest.approx(memory.NCCL_BYTES - pages, rel=0.02)


def test_two_gpus_share_the_pages():
    one, two = (size([request(2000, 2000)] * 64, tensor_parallel_size=n) for n in (1, 2))
    assert memory.bytes_per_page(SDAR_4B) == 2 * memory.bytes_per_page(SDAR_4B, 2) == 2 * 36 * 256 * 8 * 128 * 2
    assert two.gpu_memory_utilization < one.gpu_memory_utilization


@pytest.mark.parametrize(
    ("number", "graph"),
    [(0, 1), (1, 1), (2, 2), (3, 2), (7, 4), (8, 8), (15, 8), (16, 16), (31, 16), (33, 32), (256, 256), (999, 256)],
)
def test_numbers_that_have_a_graph(number, graph):
    assert captured(number) == graph


def test_tokens_are_counted_in_whole_blocks():
    assert [request(5, 6, n).longest for n in (1, 4, 8)] == [11, 12, 16]
    assert [pages_of(request(prompt, 6, 8)) for prompt in (1, 250, 251, 506, 507)] == [1, 1, 2, 2, 3]


@pytest.mark.parametrize(
    ("prompt", "new", "steps", "pages"),
    [
        (100, 100, 4, 1),
        (250, 12, 4, 2 + 4),  # a block begins at 256
        (250, 12, 2, 2 + 2),
        (256, 4, 4, 2 + 4),
        (250, 4, 4, 1),
        (3, 4, 4, 1 + 4),  # no full block to prefill: the first block begins at 0
        (250, 600, 4, 4 + 3 * 4),
        (600, 100, 4, 3),
    ],
)
def test_010_takes_a_page_at_each_step_of_a_block_that_begins_a_page(prompt, new, steps, pages):
    of_request = request(prompt, new, 4, steps)
    assert pages_of(of_request, page_a_step=True) == pages
    assert pages_of(of_request) <= pages


@pytest.mark.parametrize(
    "change", [{"block_length": 8}, {"max_active": 17}, {"max_tokens": 101}, {"prefill_tokens": 9}]
)
def test_which_sizes_fit_another(change):
    there = memory.Size(4, 16, 100, 8, 0.5)
    assert there.holds(there)
    assert there.holds(memory.Size(4, 8, 50, 4, 0.9))
    assert not there.holds(memory.Size(**(vars(there) | change)))


def test_a_message_holds_what_is_said_of_a_sequence():
    """The tuple that 0.1.0's Sequence.__getstate__ returns, with the largest numbers that can occur."""
    state = (10**6, "status", [151_000] * 2000, 2000, 2000, 2000, [70_000] * 8, [151_669] * 4, 4)
    assert len(pickle.dumps(state)) < message_bytes(request(1000, 1000))
