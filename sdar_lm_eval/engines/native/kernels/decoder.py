"""Triton kernels for a forward of packed tokens: few-row products, norms, RoPE, paged attention, drawing tokens.

The batch of a forward is T packed tokens of any number of sequences. Attention works on tiles. A tile holds consecutive
tokens of one sequence: a block that is denoised, or some blocks of a prompt. One program takes a tile and one KV head
with all of its query heads, so keys and values are loaded once. Where tiles are few, a context is cut into splits,
with a program for each (`splits_of`). The splits, and the keys of one iteration, depend on the number of tiles unless
they are fixed (`Tiles.batch_invariant`): without that, 16-bit results are not batch-invariant.

Each kernel takes inputs of any float dtype and computes in float32. tests/engines/native/test_kernels.py compares each
kernel with PyTorch, on the CPU through Triton's interpreter. The reference of the whole forward is `attention.py` with
transformers' Qwen3.
"""

from __future__ import annotations

import functools
import math
import os
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

# Fuses a product and a sum into one instruction. Triton 3.9 warns that 3.10 does so only if this is set.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

SPLIT = 512  # fewest tokens of a context's split
# Most tokens of a split where sequences of all lengths run together: every step waits for the longest program.
LONGEST_SPLIT = 8192
FILLING = 2  # attention programs that a multiprocessor needs to be busy
WHOLE = 1 << 30  # tokens of a context's only split, whatever its length
FEW_ROWS = 16  # the fewest rows of Triton's matrix product
LOG2E = tl.constexpr(1.4426950408889634)


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


# Attention


@dataclass(frozen=True)
class Tiles:
    """The tiles of attention: consecutive tokens of one sequence each.

    Attributes:
        first: index of each tile's first token among the T tokens, (n,) int64.
        count: number of each tile's tokens, (n,) int64; 0 for padding.
        pages: the page table, (N, P) int64, contiguous; rows may be longer than the context.
        sequence: each tile's row of `pages`, (n,) int64.
        visible: leading tokens of its sequence that each token sees, (T,) int64; 0 for padding within a tile.
        tokens: most tokens of a tile.
        split: tokens of a context's split.
        splits: number of splits of the longest context.
        batch_invariant: whether 16-bit results have to be the same for any number of tiles.
    """

    first: torch.Tensor
    count: torch.Tensor
    pages: torch.Tensor
    sequence: torch.Tensor
    visible: torch.Tensor
    tokens: int
    split: int
    splits: int
    batch_invariant: bool = False


# A size of another divisibility would compile the kernel again. `split_size` is always a multiple of 16, and the kernel
# is faster where the compiler knows that.
@triton.jit(do_not_specialize=["width", "all_tokens"])
def attend_kernel(
    query, keys, values, firsts, counts, pages, width, sequence, visible, out, sums, scale, all_tokens, split_size,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, SIZE: tl.constexpr, PAGE: tl.constexpr, ROWS: tl.constexpr,
    FEWER: tl.constexpr, COLUMNS: tl.constexpr, PARTIAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program takes one KV head, one tile and one split of its context."""
    kv_head, tile, split = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    first, count = tl.load(firsts + tile), tl.load(counts + tile)
    own_pages = pages + tl.load(sequence + tile) * width
    if count > 0:
        if count * (HEADS // KV_HEADS) <= FEWER:
            _attend_rows(
                query, keys, values, first, count, own_pages, width, visible, out, sums, scale, all_tokens, kv_head,
                split, split_size, HEADS, KV_HEADS, SIZE, PAGE, FEWER, COLUMNS, PARTIAL, PRECISION,
            )  # fmt: skip
        elif FEWER < ROWS:
            _attend_rows(
                query, keys, values, first, count, own_pages, width, visible, out, sums, scale, all_tokens, kv_head,
                split, split_size, HEADS, KV_HEADS, SIZE, PAGE, ROWS, COLUMNS, PARTIAL, PRECISION,
            )  # fmt: skip


@triton.jit
def _attend_rows(
    query, keys, values, first, count, own_pages, width, visible, out, sums, scale, all_tokens, kv_head, split,
    split_size, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, SIZE: tl.constexpr, PAGE: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, PARTIAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    GROUP: tl.constexpr = HEADS // KV_HEADS
    begin = split * split_size
    row, size = tl.arange(0, ROWS), tl.arange(0, SIZE)
    token, head = row // GROUP, kv_head * GROUP + row % GROUP
    query_row = (first + token) * HEADS + head  # index of each row among T * HEADS
    column = begin + tl.arange(0, COLUMNS)
    # The load of `page`, and without splits that of `q`, does not depend on `sees`, so it does not wait for `sees`.
    page = tl.load(own_pages + column // PAGE, mask=column // PAGE < width, other=0)
    sees = tl.load(visible + first + token, mask=token < count, other=0).to(tl.int32)
    if not PARTIAL:
        q = tl.load(query + query_row[:, None] * SIZE + size, mask=(token < count)[:, None], other=0.0)
    else:
        q = tl.load(query + query_row[:, None] * SIZE + size, mask=(sees > begin)[:, None], other=0.0)
    real = sees > 0
    end = tl.minimum(tl.max(sees), begin + split_size)
    most = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, SIZE], tl.float32)
    masked_from = begin
    if ROWS >= 128:
        # Where computing takes the time, masks are left out as long as every row sees every column. Where reading
        # takes it, a second loop would fill its pipeline once more.
        least = tl.minimum(tl.min(tl.where(real, sees, end)), end)
        masked_from = begin + tl.maximum(least - begin, 0) // COLUMNS * COLUMNS
        for start in range(begin, masked_from, COLUMNS):
            most, total, acc, page = _attend_columns(
                q, keys, values, own_pages, page, sees, start, end, most, total, acc, scale, kv_head, KV_HEADS, SIZE,
                PAGE, COLUMNS, False, PRECISION,
            )  # fmt: skip
    for start in range(masked_from, end, COLUMNS):
        most, total, acc, page = _attend_columns(
            q, keys, values, own_pages, page, sees, start, end, most, total, acc, scale, kv_head, KV_HEADS, SIZE, PAGE,
            COLUMNS, True, PRECISION,
        )  # fmt: skip
    if not PARTIAL:
        result = acc / tl.where(total == 0, 1.0, total)[:, None]
        tl.store(out + query_row[:, None] * SIZE + size, result.to(out.dtype.element_ty), mask=real[:, None])
    else:
        part = split.to(tl.int64) * all_tokens * HEADS + query_row
        tl.store(out + part[:, None] * SIZE + size, acc, mask=real[:, None])
        tl.store(sums + part * 2, most, mask=real)
        tl.store(sums + part * 2 + 1, total, mask=real)


@triton.jit
def _attend_columns(
    q, keys, values, own_pages, page, sees, start, end, most, total, acc, scale, kv_head, KV_HEADS: tl.constexpr,
    SIZE: tl.constexpr, PAGE: tl.constexpr, COLUMNS: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attend to COLUMNS tokens from `start` on; `page` holds their pages. Returns the pages of the next ones, too."""
    column, size = start + tl.arange(0, COLUMNS), tl.arange(0, SIZE)
    inside = column < end
    source = ((page * PAGE + column % PAGE) * KV_HEADS + kv_head) * SIZE
    page = tl.load(own_pages + (column + COLUMNS) // PAGE, mask=column + COLUMNS < end, other=0)
    if MASKED:
        k = tl.load(keys + source[:, None] + size, mask=inside[:, None], other=0.0)
        v = tl.load(values + source[:, None] + size, mask=inside[:, None], other=0.0)
    else:
        k = tl.load(keys + source[:, None] + size)
        v = tl.load(values + source[:, None] + size)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if MASKED:
        scores = tl.where((column[None, :] < sees[:, None]) & inside[None, :], scores, -float("inf"))
    highest = tl.maximum(most, tl.max(scores, axis=1) * (scale * LOG2E))
    # A masked row may have seen no key yet.
    shift = tl.where(highest == -float("inf"), 0.0, highest) if MASKED else highest
    weights = tl.exp2(scores * (scale * LOG2E) - shift[:, None])
    rescale = tl.exp2(most - shift)
    total = total * rescale + tl.sum(weights, axis=1)
    acc = acc * rescale[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
    return highest, total, acc, page


@triton.jit(do_not_specialize=["rows", "splits"])
def combine_splits_kernel(parts, sums, out, rows, splits, SIZE: tl.constexpr):
    """A program combines the splits of one token and one head."""
    row, size = tl.program_id(0).to(tl.int64), tl.arange(0, SIZE)
    most = -float("inf")
    total = 0.0
    acc = tl.zeros([SIZE], tl.float32)
    for split in range(splits):
        part = split * rows + row
        own, own_total = tl.load(sums + part * 2), tl.load(sums + part * 2 + 1)
        highest = tl.maximum(most, own)
        shift = tl.where(highest == -float("inf"), 0.0, highest)
        rescale, weight = tl.exp2(most - shift), tl.exp2(own - shift)
        acc = acc * rescale + tl.load(parts + part * SIZE + size) * weight
        total = total * rescale + own_total * weight
        most = highest
    tl.store(out + row * SIZE + size, (acc / tl.where(total == 0, 1.0, total)).to(out.dtype.element_ty))


def padded_context(context: int) -> int:
    """A context's length rounded up to a power of two times `SPLIT`: each length has CUDA graphs of its own."""
    return SPLIT << (-(-context // SPLIT) - 1).bit_length()


@functools.cache
def multiprocessors() -> int:
    """Multiprocessors of the current GPU; those of an H100 where there is none."""
    return torch.cuda.get_device_properties().multi_processor_count if torch.cuda.is_available() else 132


def splits_of(context: int, programs: int, longest: int) -> tuple[int, int]:
    """How contexts are cut: tokens of a split, and number of splits.

    Splits give a GPU enough programs. But each split writes partial results, which another kernel reads, so splits are
    as long as the number of programs allows.

    Args:
        context: the longest context, of a length that `padded_context` returns.
        programs: programs of attention without splits.
        longest: most tokens of a split.
    """
    split = SPLIT
    while 2 * split <= min(context, longest) and programs * context >= FILLING * multiprocessors() * 2 * split:
        split *= 2
    return split, context // split


def attention_settings(rows: int, programs: int, itemsize: int) -> tuple[int, int, int]:
    """Column block, warps and stages, the fastest on an H200 in bfloat16; float32 needs more shared memory.

    Few rows leave the tensor cores idle, so reading sets the pace. Few warps then exchange less with each other. A few
    programs keep more bytes in flight with wide column blocks, of which a multiprocessor holds only one program.
    """
    if itemsize > 2:
        return 32, 2 if rows <= 32 else 4 if rows <= 64 else 8, 3
    if rows <= 32:
        return (32, 2, 3) if programs > 3 * multiprocessors() else (128, 4, 3)
    if rows <= 128:
        return (64, 4, 3) if rows <= 64 else (32, 4, 3)
    return (64, 8, 3)


def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, tiles: Tiles, scaling: float) -> torch.Tensor:
    """Attention of packed tokens over pages.

    Args:
        query: (T, heads, size).
        keys, values: (pages, page size, KV heads, size), of one layer.
        tiles: the tiles, and what their tokens see.
        scaling: factor on the scores.

    Returns:
        (T, heads, size); undefined for tokens outside of all tiles.
    """
    tokens, heads, size = query.shape
    page_size, kv_heads = keys.shape[1:3]
    assert tiles.pages.is_contiguous()
    rows = max(16, triton.next_power_of_2(tiles.tokens * (heads // kv_heads)))
    fewer = rows // 2 if 16 < rows <= 64 else rows  # rows of a half full tile: a block without its predecessor
    programs = WHOLE if tiles.batch_invariant else len(tiles.first) * kv_heads
    columns, warps, stages = attention_settings(rows, programs, query.dtype.itemsize)
    out = torch.empty_like(query)
    target, sums = out, out
    if tiles.splits > 1:
        target = torch.empty(tiles.splits, tokens, heads, size, dtype=torch.float32, device=query.device)
        sums = torch.empty(tiles.splits, tokens, heads, 2, dtype=torch.float32, device=query.device)
    attend_kernel[(kv_heads, len(tiles.first), tiles.splits)](
        query, keys, values, tiles.first, tiles.count, tiles.pages, tiles.pages.shape[1], tiles.sequence,
        tiles.visible, target, sums, scaling, tokens, tiles.split if tiles.splits > 1 else WHOLE, heads, kv_heads, size,
        page_size, rows, fewer, columns, tiles.splits > 1, "ieee" if query.dtype == torch.float32 else "tf32",
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    if tiles.splits > 1:
        combine_splits_kernel[(tokens * heads,)](target, sums, out, tokens * heads, tiles.splits, size, num_warps=1)
    return out


# Drawing tokens


@triton.jit
def summarize_logits_kernel(
    logits, temperature, parts, mask_token, vocabulary, chunks, BLOCK: tl.constexpr, ENTROPY: tl.constexpr
):
    """A program computes maximum, sum of exponentials and entropy term of one chunk of a row."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    x, inside, _ = _logits_of(logits, temperature, row, chunk, mask_token, vocabulary, BLOCK)
    most = tl.max(x)
    shift = tl.where(most == -float("inf"), 0.0, most)
    weights = tl.exp(x - shift)
    # The maximum may ignore NaN, but the sum does not: a row with NaN has a sum of NaN.
    part = parts + (row * chunks + chunk) * 3
    tl.store(part, most)
    tl.store(part + 1, tl.sum(weights))
    if ENTROPY:
        tl.store(part + 2, tl.sum(tl.where(inside & (weights > 0), weights * (x - shift), 0.0)))


@triton.jit
def _logits_of(logits, temperature, row, chunk, mask_token, vocabulary, BLOCK: tl.constexpr):
    column = chunk * BLOCK + tl.arange(0, BLOCK)
    inside = (column < vocabulary) & (column != mask_token)
    x = tl.load(logits + row * vocabulary + column, mask=inside, other=-float("inf")).to(tl.float32)
    return x / tl.load(temperature + row), inside, column


@triton.jit
def choose_token_kernel(
    logits, temperature, number, greedy, parts, token_out, confidence_out, entropy_out, mask_token, vocabulary,
    chunks, BLOCK: tl.constexpr, CHUNKS: tl.constexpr, ENTROPY: tl.constexpr,
):  # fmt: skip
    """A program draws one row's token from the summaries of the row's chunks."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.arange(0, CHUNKS)
    real_chunk = chunk < chunks
    part = parts + (row * chunks + chunk) * 3
    mosts = tl.load(part, mask=real_chunk, other=-float("inf"))
    most = tl.max(mosts)
    rescale = tl.where(real_chunk, tl.exp(mosts - most), 0.0)
    sums = tl.load(part + 1, mask=real_chunk, other=0.0) * rescale
    total = tl.sum(sums)
    if ENTROPY:
        # With p = exp(x - most) / total, the entropy is log(total) - sum p (x - most).
        slopes = tl.load(part + 2, mask=real_chunk, other=0.0) * rescale + sums * tl.where(
            rescale > 0, mosts - most, 0.0
        )
        tl.store(entropy_out + row, tl.log(total) - tl.sum(slopes) / total)
    if tl.load(greedy + row):
        best = tl.min(tl.where(real_chunk & (mosts == most), chunk, chunks - 1))
        x, inside, column = _logits_of(logits, temperature, row, best, mask_token, vocabulary, BLOCK)
        token = tl.min(tl.where(inside & (x == most), column, vocabulary - 1))
        tl.store(token_out + row, token.to(tl.int64))
        tl.store(confidence_out + row, 1.0 / total)
    else:
        # First the chunk in which the cumulative sum passes the target, then the token in this chunk. Where rounding
        # leaves the total below the target, the last chunk with a positive sum is taken.
        ends = tl.cumsum(sums)
        target = tl.load(number + row) * total
        last = tl.max(tl.where(sums > 0, chunk, 0))
        chosen = tl.minimum(tl.sum(((ends <= target) & real_chunk).to(tl.int32)), last)
        before = tl.sum(tl.where(chunk < chosen, sums, 0.0))
        x, inside, column = _logits_of(logits, temperature, row, chosen, mask_token, vocabulary, BLOCK)
        weights = tl.exp(x - most)
        within = before + tl.cumsum(weights)
        passed = tl.min(tl.where((within > target) & (weights > 0), column, vocabulary))
        fallback = tl.max(tl.where(weights > 0, column, 0))
        token = tl.where(passed < vocabulary, passed, fallback)
        tl.store(token_out + row, token.to(tl.int64))
        tl.store(confidence_out + row, tl.sum(tl.where(column == token, weights, 0.0)) / total)


def draw(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    number: torch.Tensor,
    greedy: torch.Tensor,
    mask_token: int,
    *,
    entropies: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw a token a row, never the mask token: the most probable one, or by inverting the cumulative distribution.

    The reference is `unmasking.draw_greedy`, and `draw_sampled` of softmax(logits / temperature). The kernels read the
    logits twice, without a copy in float32.

    Args:
        logits: (M, V).
        temperature: (M,), 1 for greedy rows.
        number: (M,) in [0, 1).
        greedy: (M,) bool.
        mask_token: the token that is left out of the distribution.
        entropies: whether to compute entropies.

    Returns:
        Tokens (M,) int64, their probabilities (M,) float32, and the distributions' entropies in nats (M,) float32, or
        zeros.
    """
    rows, vocabulary = logits.shape
    block = 4096 if vocabulary > 4096 else triton.next_power_of_2(vocabulary)
    chunks = triton.cdiv(vocabulary, block)
    parts = torch.empty(rows, chunks, 3, dtype=torch.float32, device=logits.device)
    token = torch.empty(rows, dtype=torch.int64, device=logits.device)
    confidence, entropy = (torch.zeros(rows, dtype=torch.float32, device=logits.device) for _ in range(2))
    summarize_logits_kernel[(rows, chunks)](
        logits, temperature, parts, mask_token, vocabulary, chunks, block, entropies
    )
    choose_token_kernel[(rows,)](
        logits, temperature, number, greedy, parts, token, confidence, entropy, mask_token, vocabulary, chunks, block,
        max(triton.next_power_of_2(chunks), 2), entropies,
    )  # fmt: skip
    return token, confidence, entropy
