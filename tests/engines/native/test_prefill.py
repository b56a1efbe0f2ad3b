from __future__ import annotations

import itertools
from types import SimpleNamespace

from hypothesis import given
from hypothesis import strategies as st

from sdar_lm_eval.engines.native.forward.fused import in_parts
from sdar_lm_eval.engines.native.forward.modules import of_similar_length
from sdar_lm_eval.engines.native.scheduler import Chunk


def lengths(*wanted, most_padding):
    chunks = [Chunk(None, 100, 100 + length) for length in wanted]
    return [[end - start for _, start, end in group] for group in of_similar_length(chunks, most_padding)]


def test_short_chunks_are_not_padded_to_long_ones():
    assert lengths(8, 2000, 12, 8, 1990, most_padding=64) == [[2000, 1990], [12, 8, 8]]
    assert lengths(8, 60, 40, most_padding=64) == [[60, 40], [8]]
    assert lengths(8, 60, 40, most_padding=72) == [[60, 40, 8]]


@given(st.lists(st.integers(1, 300), min_size=1), st.integers(0, 300))
def test_every_chunk_once_and_no_more_padding_than_allowed(wanted, most_padding):
    groups = lengths(*wanted, most_padding=most_padding)
    assert sorted(itertools.chain.from_iterable(groups)) == sorted(wanted)
    assert all(len(group) * max(group) - sum(group) <= most_padding for group in groups)
    assert all(groups)


@given(st.lists(st.tuples(st.integers(1, 20), st.sampled_from([1, 3, 4, 8])), min_size=1), st.integers(0, 40))
def test_parts_are_cut_between_blocks(wanted, most):
    chunks = [Chunk(SimpleNamespace(block_length=length), length, length * (1 + blocks)) for blocks, length in wanted]
    parts = list(in_parts(chunks, most))
    for part in parts:
        assert part
        assert all((end - start) % s.block_length == 0 and end > start for s, start, end in part)
        together = sum(end - start for _, start, end in part)
        assert together <= most or (len(part) == 1 and together == part[0][0].block_length)
    for sequence, start, end in chunks:
        own = [(a, b) for part in parts for s, a, b in part if s is sequence]
        assert (own[0][0], own[-1][1]) == (start, end)
        assert all(a[1] == b[0] for a, b in itertools.pairwise(own))
