"""Triton kernels for a forward of packed tokens: norms, rotary positions, attention over pages, drawing tokens.

A forward's batch is T tokens in a row, of any number of sequences. Attention works on tiles, stretches of one
sequence's tokens: a block that is denoised, or some blocks of a prompt. One program takes a tile and one KV head with
all of its query heads, so that keys and values are loaded once. Contexts are cut into splits of `SPLIT` tokens, always
at the same places. How many columns of one are taken at once, and so how 16 bits round, depends on the number of tiles.

Each kernel computes in float32 from its inputs' dtype. tests/engines/native/test_kernels.py compares them with PyTorch,
on the CPU through Triton's interpreter; `attention.py` and transformers' Qwen3 are the reference of the whole.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

# A product and a sum are one instruction: Triton 3.9 warns that 3.10 does so only where it is asked to.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

SPLIT = 512  # tokens of context that one program attends to
MANY_PROGRAMS = 800  # of attention: more than six for each processor of an H100
FEW_ROWS = 16  # the least that a matrix product of Triton's takes
LOG2E = tl.constexpr(1.4426950408889634)


# Products of few rows


@triton.jit(do_not_specialize=["rows"])
def _few_rows(
    x, weight, out, rows, size, inputs, steps,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INPUTS: tl.constexpr, GATED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    split, row = tl.program_id(1), tl.arange(0, ROWS)
    k = split * steps * INPUTS + tl.arange(0, INPUTS)
    x += row[:, None] * inputs + k[None, :]
    weight += column[None, :].to(tl.int64) * inputs + k[:, None]
    there, inside = row[:, None] < rows, column[None, :] < size
    first, second = tl.zeros([ROWS, COLUMNS], tl.float32), tl.zeros([ROWS, COLUMNS], tl.float32)
    for _ in range(steps):
        some = tl.load(x, mask=there, other=0.0)
        first = tl.dot(some, tl.load(weight, mask=inside, other=0.0), first, input_precision=PRECISION)
        if GATED:
            ups = weight + size.to(tl.int64) * inputs
            second = tl.dot(some, tl.load(ups, mask=inside, other=0.0), second, input_precision=PRECISION)
        x += INPUTS
        weight += INPUTS
    if GATED:
        first *= tl.sigmoid(first) * second
    at = (split * rows + row[:, None]) * size + column[None, :]
    tl.store(out + at, first.to(out.dtype.element_ty), mask=there & inside)


def few_rows(x: torch.Tensor, weight: torch.Tensor, *, splits: int = 1, gated: bool = False) -> torch.Tensor:
    """x @ weight.T for up to `FEW_ROWS` rows, where the weights' way from memory is what takes the time.

    Args:
        x: (T, K).
        weight: (N, K), or (2 N, K) where gated; K is a multiple of 16 for each split.
        splits: parts of K, whose sums stay apart: enough programs to keep the memory busy where N is small.
        gated: silu(gate) * up of [gate, up], as `silu_mul` has it.

    Returns:
        (T, N); with splits (splits, T, N) float32, to be added up.
    """
    rows, inputs = x.shape
    assert rows <= FEW_ROWS and inputs % (16 * splits) == 0
    size = len(weight) // 2 if gated else len(weight)
    dtype = x.dtype if splits == 1 else torch.float32
    out = torch.empty(splits, rows, size, dtype=dtype, device=x.device)
    step = math.gcd(inputs // splits, 128)
    _few_rows[(triton.cdiv(size, 32), splits)](
        x, weight, out, rows, size, inputs, inputs // splits // step, FEW_ROWS, 32, step, gated,
        "ieee" if x.dtype == torch.float32 else "tf32", num_warps=4, num_stages=3 if gated or splits > 1 else 5,
    )  # fmt: skip
    return out if splits > 1 else out[0]


# Norms and activation


@triton.jit(do_not_specialize=["rows"])
def _add_norm(
    x, residual, weight, out, eps, rows, size, SPLITS: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
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

    Without a residual, x is it; x may come as the splits of a product, (splits, T, D) float32. The sum is rounded to
    the dtype before it is normed, as transformers does (which rounds x before that, too).
    """
    added = torch.empty_like(x) if residual is None else residual
    rows, size = added.shape
    out, splits = torch.empty_like(added), x.numel() // added.numel()
    _add_norm[(rows,)](
        x, added, weight, out, eps, rows, size, splits, residual is not None, triton.next_power_of_2(size),
        num_warps=4 if splits == 1 else 16,
    )  # fmt: skip
    return out, added


@triton.jit
def _silu_mul(x, out, size, BLOCK: tl.constexpr):
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
    _silu_mul[(len(x), triton.cdiv(size, block))](x, out, size, block)
    return out


# Queries, keys, values


@triton.jit
def _norm_rope_store(
    qkv, q_weight, k_weight, cos_sin, positions, places, q_out, keys, values, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, SIZE: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1) * GROUP  # of GROUP heads, all of one kind
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
        place = tl.load(places + token) * KV_HEADS
        if head < HEADS + KV_HEADS:
            target = keys + (place + head - HEADS) * SIZE
        else:
            target = values + (place + head - HEADS - KV_HEADS) * SIZE
    tl.store(target + inside, first.to(q_out.dtype.element_ty))
    tl.store(target + SIZE // 2 + inside, second.to(q_out.dtype.element_ty))


def norm_rope_store(
    qkv: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    places: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    """Norm queries and keys by head, turn them to their positions, and store keys and values in their pages.

    Args:
        qkv: (T, (heads + 2 KV heads) * size).
        q_weight, k_weight: (size,), of the norms.
        cos_sin: (positions, size) float32, cosines then sines.
        positions: (T,) int64.
        places: (T,) int64 into pages * page size.
        keys, values: (pages, page size, KV heads, size), of one layer; written to.
        eps: of the norms.

    Returns:
        The queries, (T, heads, size).
    """
    kv_heads, size = keys.shape[2:]
    heads = qkv.shape[1] // size - 2 * kv_heads
    out = torch.empty(len(qkv), heads, size, dtype=qkv.dtype, device=qkv.device)
    group = math.gcd(heads, kv_heads, 8)
    _norm_rope_store[(len(qkv), (heads + 2 * kv_heads) // group)](
        qkv, q_weight, k_weight, cos_sin, positions, places, out, keys, values, eps, heads, kv_heads, size, group,
        num_warps=4,
    )  # fmt: skip
    return out


# Attention


@dataclass(frozen=True)
class Tiles:
    """Stretches of one sequence's tokens each, for attention.

    Attributes:
        first: where each begins among the T tokens, (n,) int64.
        count: its tokens, (n,) int64; 0 for padding.
        pages: pages of sequences, (N, P) int64, contiguous; rows may be longer than the context.
        sequence: which row of `pages` each has, (n,) int64.
        visible: leading tokens of its sequence that each token sees, (T,) int64; 0 for padding within a tile.
        tokens: most tokens of a tile.
        splits: of the longest context.
        batch_invariant: whether results of 16 bits have to be the same for any number of tiles.
    """

    first: torch.Tensor
    count: torch.Tensor
    pages: torch.Tensor
    sequence: torch.Tensor
    visible: torch.Tensor
    tokens: int
    splits: int
    batch_invariant: bool = False


@triton.jit
def _attend(
    query, keys, values, first_, count_, pages, width, sequence, visible, out, sums, scale, all_tokens,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, SIZE: tl.constexpr, PAGE: tl.constexpr, ROWS: tl.constexpr,
    FEWER: tl.constexpr, COLUMNS: tl.constexpr, SPLIT_: tl.constexpr, SPLITS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    kv_head, tile, split = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    first, count = tl.load(first_ + tile), tl.load(count_ + tile)
    own_pages = pages + tl.load(sequence + tile) * width
    if count > 0:
        if count * (HEADS // KV_HEADS) <= FEWER:
            _attend_rows(
                query, keys, values, first, count, own_pages, width, visible, out, sums, scale, all_tokens, kv_head,
                split, HEADS, KV_HEADS, SIZE, PAGE, FEWER, COLUMNS, SPLIT_, SPLITS, PRECISION,
            )  # fmt: skip
        elif FEWER < ROWS:
            _attend_rows(
                query, keys, values, first, count, own_pages, width, visible, out, sums, scale, all_tokens, kv_head,
                split, HEADS, KV_HEADS, SIZE, PAGE, ROWS, COLUMNS, SPLIT_, SPLITS, PRECISION,
            )  # fmt: skip


@triton.jit
def _attend_rows(
    query, keys, values, first, count, own_pages, width, visible, out, sums, scale, all_tokens, kv_head, split,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, SIZE: tl.constexpr, PAGE: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, SPLIT_: tl.constexpr, SPLITS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    GROUP: tl.constexpr = HEADS // KV_HEADS
    begin = split * SPLIT_
    row, size = tl.arange(0, ROWS), tl.arange(0, SIZE)
    token, head = row // GROUP, kv_head * GROUP + row % GROUP
    place = (first + token) * HEADS + head  # of each row among T * HEADS
    column = begin + tl.arange(0, COLUMNS)
    # Pages and queries are loaded without waiting for what the tokens see.
    page = tl.load(own_pages + column // PAGE, mask=column // PAGE < width, other=0)
    sees = tl.load(visible + first + token, mask=token < count, other=0)
    if SPLITS == 1:
        q = tl.load(query + place[:, None] * SIZE + size, mask=(token < count)[:, None], other=0.0)
    else:
        q = tl.load(query + place[:, None] * SIZE + size, mask=(sees > begin)[:, None], other=0.0)
    real = sees > 0
    end = tl.minimum(tl.max(sees).to(tl.int32), begin + SPLIT_)
    most = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, SIZE], tl.float32)
    for start in range(begin, end, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = column < end
        source = ((page * PAGE + column % PAGE) * KV_HEADS + kv_head) * SIZE
        page = tl.load(own_pages + (column + COLUMNS) // PAGE, mask=column + COLUMNS < end, other=0)
        k = tl.load(keys + source[:, None] + size, mask=inside[:, None], other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
        scores = tl.where((column[None, :] < sees[:, None]) & inside[None, :], scores, -float("inf"))
        highest = tl.maximum(most, tl.max(scores, axis=1))
        shift = tl.where(highest == -float("inf"), 0.0, highest)  # nothing seen yet
        weights = tl.exp2(scores - shift[:, None])
        fade = tl.exp2(most - shift)
        total = total * fade + tl.sum(weights, axis=1)
        v = tl.load(values + source[:, None] + size, mask=inside[:, None], other=0.0)
        acc = acc * fade[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        most = highest
    if SPLITS == 1:
        result = acc / tl.where(total == 0, 1.0, total)[:, None]
        tl.store(out + place[:, None] * SIZE + size, result.to(out.dtype.element_ty), mask=real[:, None])
    else:
        part = split.to(tl.int64) * all_tokens * HEADS + place
        tl.store(out + part[:, None] * SIZE + size, acc, mask=real[:, None])
        tl.store(sums + part * 2, most, mask=real)
        tl.store(sums + part * 2 + 1, total, mask=real)


@triton.jit
def _combine(parts, sums, out, rows, SIZE: tl.constexpr, SPLITS: tl.constexpr):
    row, size = tl.program_id(0).to(tl.int64), tl.arange(0, SIZE)
    most = -float("inf")
    total = 0.0
    acc = tl.zeros([SIZE], tl.float32)
    for split in range(SPLITS):
        part = split * rows + row
        own, own_total = tl.load(sums + part * 2), tl.load(sums + part * 2 + 1)
        highest = tl.maximum(most, own)
        shift = tl.where(highest == -float("inf"), 0.0, highest)
        fade, weight = tl.exp2(most - shift), tl.exp2(own - shift)
        acc = acc * fade + tl.load(parts + part * SIZE + size) * weight
        total = total * fade + own_total * weight
        most = highest
    tl.store(out + row * SIZE + size, (acc / tl.where(total == 0, 1.0, total)).to(out.dtype.element_ty))


def _attention_settings(rows: int, programs: int, itemsize: int) -> tuple[int, int, int]:
    """Columns at once, warps and stages: measured on an H100 in bfloat16. Float32 has less room."""
    if itemsize > 2:
        return 32, 2 if rows <= 32 else 4 if rows <= 64 else 8, 3
    if rows <= 32:
        return (32, 4, 3) if programs > MANY_PROGRAMS else (128, 4, 2)
    return (64, 4, 3) if rows <= 64 else (32, 4 if rows <= 128 else 8, 3)


def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, tiles: Tiles, scaling: float) -> torch.Tensor:
    """Attention of packed tokens over pages.

    Args:
        query: (T, heads, size).
        keys, values: (pages, page size, KV heads, size), of one layer.
        tiles: which tokens belong together, and what they see.
        scaling: factor on the scores.

    Returns:
        (T, heads, size); of tokens in no tile, anything.
    """
    tokens, heads, size = query.shape
    page_size, kv_heads = keys.shape[1:3]
    assert tiles.pages.is_contiguous()
    rows = max(16, triton.next_power_of_2(tiles.tokens * (heads // kv_heads)))
    fewer = rows // 2 if 16 < rows <= 64 else rows  # of a tile that is half full: a block without the one before it
    programs = MANY_PROGRAMS + 1 if tiles.batch_invariant else len(tiles.first) * kv_heads
    columns, warps, stages = _attention_settings(rows, programs, query.dtype.itemsize)
    out = torch.empty_like(query)
    target, sums = out, out
    if tiles.splits > 1:
        target = torch.empty(tiles.splits, tokens, heads, size, dtype=torch.float32, device=query.device)
        sums = torch.empty(tiles.splits, tokens, heads, 2, dtype=torch.float32, device=query.device)
        sums.fill_(-torch.inf)  # of tokens in no tile
        sums[..., 1] = 0
    _attend[(kv_heads, len(tiles.first), tiles.splits)](
        query, keys, values, tiles.first, tiles.count, tiles.pages, tiles.pages.shape[1], tiles.sequence,
        tiles.visible, target, sums, scaling, tokens, heads, kv_heads, size, page_size, rows, fewer, columns, SPLIT,
        tiles.splits, "ieee" if query.dtype == torch.float32 else "tf32", num_warps=warps, num_stages=stages,
    )  # fmt: skip
    if tiles.splits > 1:
        _combine[(tokens * heads,)](target, sums, out, tokens * heads, size, tiles.splits, num_warps=1)
    return out


# Drawing tokens


@triton.jit
def _summarize(logits, temperature, parts, mask_token, vocabulary, chunks, BLOCK: tl.constexpr, ENTROPY: tl.constexpr):
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    x, inside, _ = _logits_of(logits, temperature, row, chunk, mask_token, vocabulary, BLOCK)
    most = tl.max(x)
    shift = tl.where(most == -float("inf"), 0.0, most)
    weights = tl.exp(x - shift)
    # NaN is not below itself: a row with one has it in its sum.
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
def _choose(
    logits, temperature, number, greedy, parts, token_out, confidence_out, entropy_out, mask_token, vocabulary,
    chunks, BLOCK: tl.constexpr, CHUNKS: tl.constexpr, ENTROPY: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.arange(0, CHUNKS)
    there = chunk < chunks
    part = parts + (row * chunks + chunk) * 3
    mosts = tl.load(part, mask=there, other=-float("inf"))
    most = tl.max(mosts)
    fade = tl.where(there, tl.exp(mosts - most), 0.0)
    sums = tl.load(part + 1, mask=there, other=0.0) * fade
    total = tl.sum(sums)
    if ENTROPY:
        # Of p = exp(x - most) / total it is log(total) - sum p (x - most).
        slopes = tl.load(part + 2, mask=there, other=0.0) * fade + sums * tl.where(fade > 0, mosts - most, 0.0)
        tl.store(entropy_out + row, tl.log(total) - tl.sum(slopes) / total)
    if tl.load(greedy + row):
        best = tl.min(tl.where(there & (mosts == most), chunk, chunks - 1))
        x, inside, column = _logits_of(logits, temperature, row, best, mask_token, vocabulary, BLOCK)
        token = tl.min(tl.where(inside & (x == most), column, vocabulary - 1))
        tl.store(token_out + row, token.to(tl.int64))
        tl.store(confidence_out + row, 1.0 / total)
    else:
        # The chunk in which the cumulative sum passes the target, then the place in it. The last chunk with anything in
        # it is taken where rounding leaves the sum below the target.
        ends = tl.cumsum(sums)
        target = tl.load(number + row) * total
        last = tl.max(tl.where(sums > 0, chunk, 0))
        chosen = tl.minimum(tl.sum(((ends <= target) & there).to(tl.int32)), last)
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

    The same as `unmasking.draw_greedy` and `draw_sampled` of softmax(logits / temperature), in two passes over the
    logits as they are, without a copy in float32.

    Args:
        logits: (M, V).
        temperature: (M,), 1 for greedy rows.
        number: (M,) in [0, 1).
        greedy: (M,) bool.
        mask_token: left out of the distribution.
        entropies: whether anybody wants them.

    Returns:
        Tokens (M,) int64, their probabilities, and the distribution's entropies in nats, or zeros, (M,) float32.
    """
    rows, vocabulary = logits.shape
    block = 4096 if vocabulary > 4096 else triton.next_power_of_2(vocabulary)
    chunks = triton.cdiv(vocabulary, block)
    parts = torch.empty(rows, chunks, 3, dtype=torch.float32, device=logits.device)
    token = torch.empty(rows, dtype=torch.int64, device=logits.device)
    confidence, entropy = (torch.zeros(rows, dtype=torch.float32, device=logits.device) for _ in range(2))
    _summarize[(rows, chunks)](logits, temperature, parts, mask_token, vocabulary, chunks, block, entropies)
    _choose[(rows,)](
        logits, temperature, number, greedy, parts, token, confidence, entropy, mask_token, vocabulary, chunks, block,
        max(triton.next_power_of_2(chunks), 2), entropies,
    )  # fmt: skip
    return token, confidence, entropy
