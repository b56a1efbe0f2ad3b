"""Paged attention of packed tokens by Triton, in tiles and splits.

A tile holds consecutive tokens of one sequence: a block that is denoised, or some blocks of a prompt. One program takes
a tile and one KV head with all of its query heads, so keys and values are loaded once. Where tiles are few, a context
is cut into splits, with a program for each (`splits_of`). The splits, and the keys of one iteration, depend on the
number of tiles unless they are fixed (`Tiles.batch_invariant`): without that, 16-bit results are not batch-invariant.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from sdar_lm_eval.engines.native.kernels.gpu import multiprocessors

SPLIT = 512  # fewest tokens of a context's split
# Most tokens of a split where sequences of all lengths run together: every step waits for the longest program.
LONGEST_SPLIT = 8192
FILLING = 2  # attention programs that a multiprocessor needs to be busy
MANY = 8  # attention programs of a multiprocessor, above which each needs few warps
WHOLE = 1 << 30  # tokens of a context's only split, whatever its length
LOG2E = tl.constexpr(1.4426950408889634)


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


@dataclass(frozen=True)
class Branches:
    """Masked copies of blocks, one a branch. A token sees all tokens of its branch, and leading tokens of the pages.

    Attributes:
        keys, values: (T, 1, KV heads, size), of one layer: every layer overwrites the keys and values of the last.
        tiles: a tile for each branch, over pages of one token, in one split.
    """

    keys: torch.Tensor
    values: torch.Tensor
    tiles: Tiles


# A size of another divisibility would compile the kernel again. `split_size` is always a multiple of 16, and the kernel
# is faster where the compiler knows that.
@triton.jit(do_not_specialize=["width", "all_tokens"])
def attend_kernel(
    query, keys, values, firsts, counts, pages, width, sequence, visible, out, sums, scale, all_tokens, split_size,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, SIZE: tl.constexpr, PAGE: tl.constexpr, ROWS: tl.constexpr,
    FEWER: tl.constexpr, COLUMNS: tl.constexpr, PARTIAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program takes one KV head, one tile and one split of its context."""
    kv_head, split = tl.program_id(0), tl.program_id(2)
    # A prompt's last tiles see most. They run first, so that no long program runs alone at the end.
    tile = (tl.num_programs(1) - 1 - tl.program_id(1)).to(tl.int64)
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
        # A token that sees nothing in this launch may see its branch, so the token's partial result is written too. The
        # loop without masks has added columns to the token's row. With a maximum of -inf, these columns weigh nothing.
        part = split.to(tl.int64) * all_tokens * HEADS + query_row
        tl.store(out + part[:, None] * SIZE + size, acc, mask=(token < count)[:, None])
        tl.store(sums + part * 2, tl.where(real, most, -float("inf")), mask=token < count)
        tl.store(sums + part * 2 + 1, tl.where(real, total, 0.0), mask=token < count)


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


def splits_of(context: int, programs: int, longest: int) -> tuple[int, int]:
    """The cuts of contexts: tokens of a split, and number of splits.

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


def attention_settings(rows: int, programs: int, itemsize: int) -> Iterator[tuple[int, int, int]]:
    """Column block, warps and stages: the fastest on an H200, then settings that need less and less shared memory.

    Few rows leave the tensor cores idle, so reading sets the pace. A few programs keep more bytes in flight with wide
    column blocks, of which a multiprocessor holds only one program. Many programs need few warps: more of these
    programs run at once, and each exchanges less between warps.

    Args:
        rows: query rows of a tile.
        programs: programs of the launch.
        itemsize: bytes of an element.
    """
    if itemsize > 2:
        columns, warps = 32, 2 if rows <= 32 else 4 if rows <= 64 else 8
    elif rows > 64:
        columns, warps = (32, 4) if rows <= 128 else (64, 8)
    elif programs > MANY * multiprocessors():
        columns, warps = 32, 2
    else:
        columns, warps = 128 if rows <= 32 and programs <= multiprocessors() else 64, 4
    yield columns, warps, 3
    while columns >= 16:
        yield columns, warps, 2
        columns //= 2


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
    out = torch.empty_like(query)
    if tiles.splits == 1:
        _launch(query, keys, values, tiles, scaling, out)
    else:
        parts, sums = partial_results(query, tiles.splits)
        _launch(query, keys, values, tiles, scaling, parts, sums)
        combine_splits(parts, sums, out)
    return out


def attend_branches(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, tiles: Tiles, branches: Branches, scaling: float
) -> torch.Tensor:
    """Attention of packed tokens over pages, and over their own branches.

    Args:
        query: (T, heads, size).
        keys, values: (pages, page size, KV heads, size), of one layer.
        tiles: the tiles over the pages; a token may see nothing of the pages.
        branches: each token belongs to one branch.
        scaling: factor on the scores.

    Returns:
        (T, heads, size).
    """
    assert branches.tiles.splits == 1
    # The branches' results are one more split.
    parts, sums = partial_results(query, tiles.splits + 1)
    _launch(query, keys, values, tiles, scaling, parts, sums)
    _launch(query, branches.keys, branches.values, branches.tiles, scaling, parts[-1], sums[-1])
    out = torch.empty_like(query)
    combine_splits(parts, sums, out)
    return out


def _launch(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tiles: Tiles,
    scaling: float,
    out: torch.Tensor,
    sums: torch.Tensor | None = None,
) -> None:
    """Launch the kernel, which writes results to `out`; with `sums`, partial results to both."""
    tokens, heads, size = query.shape
    page_size, kv_heads = keys.shape[1:3]
    assert tiles.pages.is_contiguous()
    rows = max(16, triton.next_power_of_2(tiles.tokens * (heads // kv_heads)))
    fewer = rows // 2 if 16 < rows <= 64 else rows  # rows of a half full tile: a block without its predecessor
    programs = WHOLE if tiles.batch_invariant else len(tiles.first) * kv_heads * tiles.splits
    for columns, warps, stages in attention_settings(rows, programs, query.dtype.itemsize):
        try:
            attend_kernel[(kv_heads, len(tiles.first), tiles.splits)](
                query, keys, values, tiles.first, tiles.count, tiles.pages, tiles.pages.shape[1], tiles.sequence,
                tiles.visible, out, out if sums is None else sums, scaling, tokens,
                tiles.split if tiles.splits > 1 else WHOLE, heads, kv_heads, size, page_size, rows, fewer, columns,
                sums is not None, "ieee" if query.dtype == torch.float32 else "tf32", num_warps=warps,
                num_stages=stages,
            )  # fmt: skip
            return
        except triton.OutOfResources as error:  # this GPU has less shared memory than an H200
            lacking = error
    raise lacking


def partial_results(query: torch.Tensor, splits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Allocate the partial results of splits, in float32.

    Returns:
        The weighted sums of values, (splits, T, heads, size), and the highest scores with the sums of weights,
        (splits, T, heads, 2).
    """
    parts = torch.empty(splits, *query.shape, dtype=torch.float32, device=query.device)
    return parts, parts.new_empty(*parts.shape[:-1], 2)


def combine_splits(parts: torch.Tensor, sums: torch.Tensor, out: torch.Tensor) -> None:
    """Combine the partial results of splits (see `partial_results`) into `out`, (T, heads, size)."""
    rows = out.shape[0] * out.shape[1]
    combine_splits_kernel[(rows,)](parts, sums, out, rows, len(parts), out.shape[2], num_warps=1)
