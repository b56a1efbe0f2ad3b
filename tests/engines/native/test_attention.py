from __future__ import annotations

from types import SimpleNamespace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sdar_lm_eval.engines.native.forward.attention import PagedBatch, attend, paged_attention


def plain(query, keys, values, visible, scaling):
    """The reference: one query (heads, size), keys and values (context, KV heads, size)."""
    group = query.shape[0] // keys.shape[1]
    out = torch.empty_like(query)
    for head in range(query.shape[0]):
        k, v = keys[:visible, head // group], values[:visible, head // group]
        out[head] = (k @ query[head] * scaling).softmax(0) @ v
    return out


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 4),
    queries=st.integers(1, 5),
    group=st.sampled_from([1, 2, 4]),
    kv_heads=st.sampled_from([1, 2]),
    page_size=st.sampled_from([2, 4, 16]),
    seed=st.integers(0, 1000),
)
def test_attend_equals_attention_written_out(rows, queries, group, kv_heads, page_size, seed):
    torch.manual_seed(seed)
    width, size = 3, 8
    keys, values = torch.randn(2, rows * width + 1, page_size, kv_heads, size)
    keys[0] = values[0] = torch.nan  # the scratch page: a result that reads it is NaN
    pages = (torch.randperm(rows * width) + 1).view(rows, width)
    visible = torch.randint(1, width * page_size + 1, (rows, queries))
    query = torch.randn(rows, kv_heads * group, queries, size)
    out = attend(query, keys, values, pages, visible, 0.3)
    for row in range(rows):
        k, v = keys[pages[row]].flatten(0, 1), values[pages[row]].flatten(0, 1)
        for q in range(queries):
            expected = plain(query[row, :, q], k, v, int(visible[row, q]), 0.3)
            torch.testing.assert_close(out[row, q], expected, rtol=1e-4, atol=1e-5)


def test_new_tokens_are_written_before_they_are_seen():
    cache = torch.zeros(1, 2, 3, 2, 1, 4)  # one layer, pages 0..2 of 2 tokens, one head of 4
    key, value = torch.randn(2, 1, 1, 2, 4)
    batch = PagedBatch(cache, torch.tensor([[2, 1]]), torch.tensor([[5, 2]]), torch.tensor([[3, 3]]))
    out, _ = paged_attention(SimpleNamespace(layer_idx=0), torch.randn(1, 1, 2, 4), key, value, None, 1.0, batch=batch)
    assert torch.equal(cache[0, 0, 2, 1, 0], key[0, 0, 0])  # KV slot 5 = page 2, offset 1
    assert torch.equal(cache[0, 1, 1, 0, 0], value[0, 0, 1])  # KV slot 2 = page 1, offset 0
    assert cache[0, :, 0].eq(0).all()
    assert out.shape == (1, 2, 1, 4)
