"""Triton kernels of a decoder layer over packed tokens: products of few rows, norms, activation, RoPE.

The batch of a forward is T packed tokens of any number of sequences. Each kernel takes inputs of any float dtype and
computes in float32. tests/engines/native/test_kernels.py compares each kernel with PyTorch, on the CPU through Triton's
interpreter. The reference of the whole forward is `forward/attention.py` with transformers' Qwen3.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

FEW_ROWS = 16  # the fewest rows of Triton's matrix product


# Products of few rows


@triton.jit(do_not_specialize=["rows"])
def few_rows_kernel(
    x, weight, out, rows, size, inputs, steps,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INPUTS: tl.constexpr, GATED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program computes COLUMNS columns of all rows, over one split of K."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    split, row = tl.program_id(1), tl.arange(0, ROWS)
    k = split * steps * INPUTS + tl.arange(0, INPUTS)
    x += row[:, None] * inputs + k[None, :]
    weight += column[None, :].to(tl.int64) * inputs + k[:, None]
    real_row, inside = row[:, None] < rows, column[None, :] < size
    first, second = tl.zeros([ROWS, COLUMNS], tl.float32), tl.zeros([ROWS, COLUMNS], tl.float32)
    for _ in range(steps):
        some = tl.load(x, mask=real_row, other=0.0)
        first = tl.dot(some, tl.load(weight, mask=inside, other=0.0), first, input_precision=PRECISION)
        if GATED:
            ups = weight + size.to(tl.int64) * inputs
            second = tl.dot(some, tl.load(ups, mask=inside, other=0.0), second, input_precision=PRECISION)
        x += INPUTS
        weight += INPUTS
    if GATED:
        first *= tl.sigmoid(first) * second
    at = (split * rows + row[:, None]) * size + column[None, :]
    tl.store(out + at, first.to(out.dtype.element_ty), mask=real_row & inside)


def few_rows(x: torch.Tensor, weight: torch.Tensor, *, splits: int = 1, gated: bool = False) -> torch.Tensor:
    """x @ weight.T for up to `FEW_ROWS` rows, where reading the weights takes the time.

    Args:
        x: (T, K).
        weight: (N, K), or (2 N, K) where gated; K is a multiple of 16 * splits.
        splits: parts of K with a partial sum each. Where N is small, splits make enough programs to fill the GPU.
        gated: whether the result is silu(gate) * up of [gate, up], as in `silu_mul`.

    Returns:
        (T, N); with several splits, the partial sums (splits, T, N) float32.
    """
    rows, inputs = x.shape
    assert rows <= FEW_ROWS and inputs % (16 * splits) == 0
    size = len(weight) // 2 if gated else len(weight)
    dtype = x.dtype if splits == 1 else torch.float32
    out = torch.empty(splits, rows, size, dtype=dtype, device=x.device)
    step = math.gcd(inputs // splits, 128)
    few_rows_kernel[(triton.cdiv(size, 32), splits)](
        x, weight, out, rows, size, inputs, inputs // splits // step, FEW_ROWS, 32, step, gated,
        "ieee" if x.dtype == torch.float32 else "tf32", num_warps=4, num_stages=3 if gated or splits > 1 else 5,
    )  # fmt: skip
    return out if splits > 1 else out[0]


# Norms and activation


@triton.jit(do_not_specialize=["rows"])
def add_norm_kernel(
    x, residual, weight, out, eps, rows, size, SPLITS: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """A program adds and norms one row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < size
    value = tl.load(x + row * size + column, mask=inside, other=0.0).to(tl.float32)
    for split in tl.static_range(1, SPLITS):
        value += tl.load(x + (split * rows + row) * size + column, mask=inside, other=0.0)
    if ADD:
        value += tl.load(residual + row * size + column, mask=inside, other=0.0).to(tl.float32)
    value = value.to(residual.dtype.element_ty)
    tl.store(residual + row * size + column, value, mask=inside)
    value = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value) / size + eps)
    weights = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * size + column, (value * scale * weights).to(out.dtype.element_ty), mask=inside)


def add_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """RMSNorm of x + residual; x and residual (T, D) -> (normed, x + residual), both (T, D).

    Without a residual, the sum is x. x may be the partial sums of a product, (splits, T, D) float32. The sum is rounded
    to the dtype before the norm, as in transformers. transformers also rounds x before the sum.
    """
    added = torch.empty_like(x) if residual is None else residual
    rows, size = added.shape
    out, splits = torch.empty_like(added), x.numel() // added.numel()
    add_norm_kernel[(rows,)](
        x, added, weight, out, eps, rows, size, splits, residual is not None, triton.next_power_of_2(size),
        num_warps=4 if splits == 1 else 16,
    )  # fmt: skip
    return out, added


@triton.jit
def silu_mul_kernel(x, out, size, BLOCK: tl.constexpr):
    """A program computes BLOCK elements of one row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    gate = tl.load(x + row * 2 * size + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + row * 2 * size + size + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * size + column, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=inside)


def silu_mul(x: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of x = [gate, up], (T, 2 F) -> (T, F)."""
    size = x.shape[1] // 2
    out = torch.empty(len(x), size, dtype=x.dtype, device=x.device)
    block = min(1024, triton.next_power_of_2(size))
    silu_mul_kernel[(len(x), triton.cdiv(size, block))](x, out, size, block)
    return out


# Queries, keys, values


@triton.jit
def norm_rope_store_kernel(
    qkv, q_weight, k_weight, cos_sin, positions, kv_slots, q_out, keys, values, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, SIZE: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """A program takes GROUP heads of one token: all of them queries, keys or values."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1) * GROUP
    half = tl.arange(0, SIZE // 2)[None, :]
    inside = tl.arange(0, GROUP)[:, None] * SIZE + half
    source = qkv + (token * (HEADS + 2 * KV_HEADS) + head) * SIZE + inside
    first = tl.load(source).to(tl.float32)
    second = tl.load(source + SIZE // 2).to(tl.float32)
    if head < HEADS + KV_HEADS:
        scale = tl.rsqrt((tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)) / SIZE + eps)[:, None]
        weight = q_weight if head < HEADS else k_weight
        first *= scale * tl.load(weight + half).to(tl.float32)
        second *= scale * tl.load(weight + SIZE // 2 + half).to(tl.float32)
        position = tl.load(positions + token)
        cos = tl.load(cos_sin + position * SIZE + half)
        sin = tl.load(cos_sin + position * SIZE + SIZE // 2 + half)
        first, second = first * cos - second * sin, second * cos + first * sin
    if head < HEADS:
        target = q_out + (token * HEADS + head) * SIZE
    else:
        kv_row = tl.load(kv_slots + token) * KV_HEADS
        if head < HEADS + KV_HEADS:
            target = keys + (kv_row + head - HEADS) * SIZE
        else:
            target = values + (kv_row + head - HEADS - KV_HEADS) * SIZE
    tl.store(target + inside, first.to(q_out.dtype.element_ty))
    tl.store(target + SIZE // 2 + inside, second.to(q_out.dtype.element_ty))


def norm_rope_store(
    qkv: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    kv_slots: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    """Norm queries and keys by head, rotate them by their positions (RoPE), and store keys and values in pages.

    Args:
        qkv: (T, (heads + 2 KV heads) * size).
        q_weight, k_weight: (size,), weights of the norms.
        cos_sin: (positions, size) float32, cosines then sines.
        positions: (T,) int64.
        kv_slots: (T,) int64 into pages * page size.
        keys, values: (pages, page size, KV heads, size), of one layer; written to.
        eps: epsilon of the norms.

    Returns:
        The queries, (T, heads, size).
    """
    kv_heads, size = keys.shape[2:]
    heads = qkv.shape[1] // size - 2 * kv_heads
    out = torch.empty(len(qkv), heads, size, dtype=qkv.dtype, device=qkv.device)
    group = math.gcd(heads, kv_heads, 8)
    norm_rope_store_kernel[(len(qkv), (heads + 2 * kv_heads) // group)](
        qkv, q_weight, k_weight, cos_sin, positions, kv_slots, out, keys, values, eps, heads, kv_heads, size, group,
        num_warps=4,
    )  # fmt: skip
    return out
