from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from sdar_lm_eval.engines.native.runner import _of_like_length


def lengths(*wanted, most_padding):
    chunks = [(None, 100, 100 + length) for length in wanted]
    return [[end - start for _, start, end in group] for group in _of_like_length(chunks, most_padding)]


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
