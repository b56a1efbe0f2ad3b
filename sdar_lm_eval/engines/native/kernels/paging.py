"""A Triton kernel for the paged KV cache: copies keys and values between KV slots of all layers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

TOKENS, COLUMNS = 16, 256  # that a program copies


@triton.jit(do_not_specialize=["count"])
def copy_kv_kernel(kv, source, target, count, slots, size, TOKENS: tl.constexpr, COLUMNS: tl.constexpr):
    """A program copies some columns of some tokens in the keys or the values of one layer."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    to = tl.load(target + token, mask=token < count, other=0)
    if tl.max(to) > 0:
        base = kv + tl.program_id(1).to(tl.int64) * slots * size
        real = (to > 0)[:, None] & (column < size)[None, :]
        at = tl.load(source + token, mask=token < count, other=0)
        value = tl.load(base + at[:, None] * size + column[None, :], mask=real)
        tl.store(base + to[:, None] * size + column[None, :], value, mask=real)


def copy_kv(kv: torch.Tensor, source: torch.Tensor, target: torch.Tensor) -> None:
    """Copy keys and values of all layers from KV slots to others. A target of 0 is none.

    Args:
        kv: (layers, 2, pages, page size, KV heads, head size), contiguous.
        source, target: (n,) int64 into pages * page size; no slot is in both.
    """
    layers, both, pages, page_size, heads, head_size = kv.shape
    size, count = heads * head_size, len(source)
    assert kv.is_contiguous()
    grid = (triton.cdiv(count, TOKENS), layers * both, triton.cdiv(size, COLUMNS))
    copy_kv_kernel[grid](kv, source, target, count, pages * page_size, size, TOKENS, COLUMNS)
