"""Paged attention of packed tokens for Hopper GPUs, in tiles and splits; see `attention`.

`attention.attend_kernel` multiplies queries by keys, then takes exponentials, then multiplies by the values. This
kernel overlaps the steps, as algorithm 2 of FlashAttention-3 does (Shah et al., arXiv 2407.08608). While the tensor
cores multiply the weights of one step by the step's values, the other units compute the weights of the next step.

The kernel is written in Gluon; see `hopper`. A program takes one KV head, tokens of one tile with all query heads of
that KV head, and one split of the context. One producer warp copies pages to shared memory, several stages ahead. One
or two consumer warpgroups (four warps each) take 64 query rows each.

A stage has room for the keys and the values of COLUMNS tokens. The keys of a stage have two barriers, and so have the
values. `ready` completes when the bytes have arrived. `free` completes when all consumer warpgroups have read the
bytes.

Results are batch-invariant if the splits do not depend on the number of tiles: nothing else here depends on that
number.

There is no interpreter for Gluon. tests/engines/native/test_kernels_compile.py compiles the kernel everywhere;
tests/engines/native/test_hopper_attention.py compares it with PyTorch on Hopper GPUs.
"""

from __future__ import annotations

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from sdar_lm_eval.engines.native.kernels.attention import (
    LOG2E,
    SPLIT,
    WHOLE,
    Tiles,
    combine_splits,
    partial_results,
)
from sdar_lm_eval.engines.native.kernels.gpu import multiprocessors
from sdar_lm_eval.engines.native.kernels.hopper import is_hopper, load_tile, shared_layout, works

SIZES = (64, 128)  # head sizes
ROWS = 64  # query rows of a consumer warpgroup: the fewest that the instruction takes
# Number of consumer warpgroups -> tokens of a stage. Two programs of one consumer warpgroup fit a multiprocessor.
COLUMNS = {1: 64, 2: 128}
STAGES = 3  # stages of shared memory
REGISTERS = {1: 128, 2: 168}  # number of consumer warpgroups -> registers of a thread, on average
FEW = 3  # attention programs of a multiprocessor, up to which this kernel is faster than Triton's for few rows
CHANNELS = 64  # channels of a copy: 128 bytes, a row of shared memory without bank conflicts
# Triton 3.9 renames `_reinterpret`.
RENAMED = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))


@gluon.jit
def _slots(own_pages, column, end, no_slot, PAGES: gl.constexpr, PAGE: gl.constexpr):
    """The first KV slot of each of PAGES pages, from the page of `column` on; `no_slot` for pages behind `end`.

    `no_slot` lies outside of the cache, from where TMA copies zeros.
    """
    column += gl.arange(0, PAGES, layout=gl.BlockedLayout([1], [32], [1], [0])) * PAGE
    page = gl.load(own_pages + column // PAGE, mask=column < end, other=0).to(gl.int32)
    return gl.where(column < end, page * PAGE, no_slot)


@gluon.jit
def _copy_stage(source, slots, channel, pages, stage, ready, SIZE: gl.constexpr):
    """Start the copies of one stage's keys or values: `ready` completes when all bytes have arrived."""
    PAGES: gl.constexpr = slots.shape[0]
    PARTS: gl.constexpr = SIZE // pages.shape[2]
    mbarrier.expect(ready, PAGES * pages.shape[1] * SIZE * 2)
    number = gl.arange(0, PAGES, layout=slots.type.layout)
    for page in gl.static_range(PAGES):
        slot = gl.sum(gl.where(number == page, slots, 0), axis=0)
        for part in gl.static_range(PARTS):
            buffer = pages.index((stage * PARTS + part) * PAGES + page)
            load_tile(source, [slot, channel + part * pages.shape[2]], ready, buffer)


@gluon.jit
def _copy(keys, values, own_pages, no_slot, begin, end, kv_head, buffers, barriers):
    """The producer warp: it copies the keys and values of the split, stage after stage."""
    _, key_stages, _, key_pages, value_pages = buffers
    keys_ready, keys_free, values_ready, values_free = barriers
    STAGES: gl.constexpr = key_stages.shape[0]
    COLUMNS: gl.constexpr = key_stages.shape[1]
    SIZE: gl.constexpr = key_stages.shape[2]
    PAGE: gl.constexpr = key_pages.shape[1]
    PAGES: gl.constexpr = COLUMNS // PAGE
    slots = _slots(own_pages, begin, end, no_slot, PAGES, PAGE)
    for step in range(gl.cdiv(end - begin, COLUMNS)):
        # The next page table entries are loaded while this step waits for a free stage.
        next_slots = _slots(own_pages, begin + (step + 1) * COLUMNS, end, no_slot, PAGES, PAGE)
        stage, phase = step % STAGES, (step // STAGES & 1) ^ 1
        mbarrier.wait(keys_free.index(stage), phase)
        _copy_stage(keys, slots, kv_head * SIZE, key_pages, stage, keys_ready.index(stage), SIZE)
        mbarrier.wait(values_free.index(stage), phase)
        _copy_stage(values, slots, kv_head * SIZE, value_pages, stage, values_ready.index(stage), SIZE)
        slots = next_slots


@gluon.jit
def _softmax_step(scores, most, total, sees, start, least, scale):
    """The online softmax of one step.

    Args:
        scores: the scores of the step, (ROWS, COLUMNS).
        most: each row's highest scaled score of earlier steps.
        total: each row's sum of the weights of earlier steps.
        sees: number of leading tokens that each row sees.
        start: the first token of the step.
        least: the fewest tokens that a row sees.
        scale: factor on the scores: the scaling times log2(e), for `exp2`.

    Returns:
        The weights of the step, `most` and `total` with this step, and the factor that rescales earlier sums.
    """
    layout: gl.constexpr = scores.type.layout
    if start + scores.shape[1] > least:  # otherwise, every row sees every token of the step
        column = start + gl.arange(0, scores.shape[1], layout=gl.SliceLayout(0, layout))
        scores = gl.where(column[None, :] < sees[:, None], scores, -float("inf"))
    highest = gl.maximum(most, gl.max(scores, axis=1) * scale)
    shift = gl.where(highest == -float("inf"), 0.0, highest)  # a masked row may have seen no key yet
    weights = gl.exp2(scores * scale - shift[:, None])
    rescale = gl.exp2(most - shift)
    return weights, highest, total * rescale + gl.sum(weights, axis=1), rescale


@gluon.jit
def _before_wait(x):
    """Return `x`, which is never below 0, computed before the next wait.

    NVIDIA's assembler would move the computation of `x` behind the wait. The instruction `nanosleep` keeps the
    computation before the wait: whether `nanosleep` runs depends on `x`. It never runs, because `x` is not below 0.
    """
    assembly: gl.constexpr = "{.reg .pred p; setp.lt.f32 p, $1, 0f00000000; @p nanosleep.u32 1; mov.f32 $0, $1;}"
    return gl.inline_asm_elementwise(assembly, "=f,f", [x], dtype=gl.float32, is_pure=False, pack=1)


@gluon.jit
def _clear_rest_of_page(end, pages, stage, COLUMNS: gl.constexpr, SIZE: gl.constexpr):
    """Fill the rest of a context's last page with zeros, in shared memory.

    The rest of the page may hold infinities of another sequence, and 0 times infinity is NaN. Both consumer warpgroups
    write the same bytes.
    """
    PAGE: gl.constexpr = pages.shape[1]
    PARTS: gl.constexpr = SIZE // pages.shape[2]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    token = gl.arange(0, PAGE, layout=gl.SliceLayout(1, layout))[:, None]
    for part in gl.static_range(PARTS):
        page = pages.index((stage * PARTS + part) * (COLUMNS // PAGE) + end % COLUMNS // PAGE)
        page.store(gl.where(token < end % PAGE, page.load(layout), 0.0))
    fence_async_shared()


@gluon.jit
def _attend(
    work, target, buffers, barriers, HEADS: gl.constexpr, KV_HEADS: gl.constexpr, PARTIAL: gl.constexpr,
    CONSUMER: gl.constexpr,
):  # fmt: skip
    """A consumer warpgroup: the first or the second, by CONSUMER."""
    query, visible, first, count, begin, end, kv_head, scale = work
    out, sums, first_row = target
    queries, keys, values, _, value_pages = buffers
    keys_ready, keys_free, values_ready, values_free = barriers
    ROWS: gl.constexpr = queries.shape[1]
    SIZE: gl.constexpr = queries.shape[2]
    STAGES: gl.constexpr = keys.shape[0]
    COLUMNS: gl.constexpr = keys.shape[1]
    PAGE: gl.constexpr = value_pages.shape[1]
    GROUP: gl.constexpr = HEADS // KV_HEADS
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SIZE, 16])
    operand_layout: gl.constexpr = gl.DotOperandLayout(0, out_layout, 2)
    load_layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // SIZE, SIZE // 8], [4, 1], [1, 0])

    row, is_real, _ = _rows(first, count, kv_head, load_layout, ROWS, HEADS, GROUP, CONSUMER)
    own = queries.index(CONSUMER)
    own.store(gl.load(query + _offsets(row, load_layout, SIZE), mask=is_real[:, None], other=0.0))
    fence_async_shared()

    row, is_real, token = _rows(first, count, kv_head, score_layout, ROWS, HEADS, GROUP, CONSUMER)
    sees = gl.load(visible + token, mask=is_real, other=0).to(gl.int32)
    least = gl.min(sees, axis=0)
    most = gl.full([ROWS], -float("inf"), gl.float32, gl.SliceLayout(1, score_layout))
    total = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, score_layout))
    acc = gl.zeros([ROWS, SIZE], gl.float32, out_layout)
    zeros = gl.zeros([ROWS, COLUMNS], gl.float32, score_layout)  # the product needs an accumulator, but ignores it
    steps = gl.cdiv(end - begin, COLUMNS)
    if steps > 0:
        mbarrier.wait(keys_ready.index(0), 0)
        scores = warpgroup_mma(own, keys.index(0).permute([1, 0]), zeros, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(0, [scores])
        mbarrier.arrive(keys_free.index(0))
        weights, most, total, rescale = _softmax_step(scores, most, total, sees, begin, least, scale)
        rounded = gl.convert_layout(weights.to(queries.dtype), operand_layout)
        for step in range(1, steps):
            stage, previous = step % STAGES, (step - 1) % STAGES
            mbarrier.wait(keys_ready.index(stage), step // STAGES & 1)
            scores = warpgroup_mma(own, keys.index(stage).permute([1, 0]), zeros, use_acc=False, is_async=True)
            mbarrier.wait(values_ready.index(previous), (step - 1) // STAGES & 1)
            acc = warpgroup_mma(rounded, values.index(previous), acc, is_async=True)
            scores = warpgroup_mma_wait(1, [scores])  # the product with the values continues
            mbarrier.arrive(keys_free.index(stage))
            start = begin + step * COLUMNS
            weights, most, total, rescale = _softmax_step(scores, most, total, sees, start, least, scale)
            next_rounded = gl.convert_layout(weights.to(queries.dtype), operand_layout)
            total = _before_wait(total)
            acc, rounded, next_rounded = warpgroup_mma_wait(0, [acc, rounded, next_rounded])
            mbarrier.arrive(values_free.index(previous))
            acc *= gl.convert_layout(rescale, gl.SliceLayout(1, out_layout))[:, None]
            rounded = next_rounded
        last = (steps - 1) % STAGES
        mbarrier.wait(values_ready.index(last), (steps - 1) // STAGES & 1)
        if end % PAGE > 0:
            _clear_rest_of_page(end, value_pages, last, COLUMNS, SIZE)
        acc = warpgroup_mma(rounded, values.index(last), acc, is_async=True)
        acc, rounded = warpgroup_mma_wait(0, [acc, rounded])
    if PARTIAL:
        gl.store(sums + (first_row + row) * 2, most, mask=is_real)
        gl.store(sums + (first_row + row) * 2 + 1, total, mask=is_real)
        row, is_real, _ = _rows(first, count, kv_head, out_layout, ROWS, HEADS, GROUP, CONSUMER)
        gl.store(out + _offsets(first_row + row, out_layout, SIZE), acc, mask=is_real[:, None])
    else:
        total = gl.convert_layout(gl.where(total == 0, 1.0, total), gl.SliceLayout(1, out_layout))
        row, is_real, _ = _rows(first, count, kv_head, out_layout, ROWS, HEADS, GROUP, CONSUMER)
        result = (acc / total[:, None]).to(out.dtype.element_ty)
        gl.store(out + _offsets(row, out_layout, SIZE), result, mask=is_real[:, None])


@gluon.jit
def _rows(
    first, count, kv_head, layout: gl.constexpr,
    ROWS: gl.constexpr, HEADS: gl.constexpr, GROUP: gl.constexpr, CONSUMER: gl.constexpr,
):  # fmt: skip
    """The query rows of a consumer warpgroup.

    Returns:
        Each row's index among T * HEADS, whether the row is a row of the tile, and the row's token.
    """
    row = CONSUMER * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    token = first + row // GROUP
    return token * HEADS + kv_head * GROUP + row % GROUP, row // GROUP < count, token


@gluon.jit
def _offsets(row, layout: gl.constexpr, SIZE: gl.constexpr):
    """The offsets of all elements of query rows."""
    return row[:, None] * SIZE + gl.arange(0, SIZE, layout=gl.SliceLayout(0, layout))[None, :]


@gluon.jit
def _by_copies(stages, PAGE: gl.constexpr, CHANNELS: gl.constexpr):
    """A view of the stages by copies, (copies, PAGE, CHANNELS).

    Within a stage, the first CHANNELS channels of all tokens precede the other channels of all tokens.
    """
    COPIES: gl.constexpr = stages.shape[0] * stages.shape[1] * stages.shape[2] // (PAGE * CHANNELS)
    if RENAMED:
        return stages.reinterpret(stages.dtype, [COPIES, PAGE, CHANNELS], stages.type.layout)
    else:  # noqa: RET505  (the compiler reads both branches otherwise)
        return stages._reinterpret(stages.dtype, [COPIES, PAGE, CHANNELS], stages.type.layout)


@gluon.jit(do_not_specialize=["width", "no_slot", "all_tokens", "split_size"])
def attend_hopper_kernel(
    query, keys, values, firsts, counts, pages, width, sequence, visible, out, sums, scale, no_slot, all_tokens,
    split_size, HEADS: gl.constexpr, KV_HEADS: gl.constexpr, SIZE: gl.constexpr, ROWS: gl.constexpr,
    COLUMNS: gl.constexpr, STAGES: gl.constexpr, CONSUMERS: gl.constexpr, PARTIAL: gl.constexpr,
):  # fmt: skip
    """A program takes one KV head, one split, and as many tokens of a tile as its consumer warpgroups have rows for."""
    PAGE: gl.constexpr = keys.block_shape[0]
    CHANNELS: gl.constexpr = keys.block_shape[1]
    TOKENS: gl.constexpr = CONSUMERS * ROWS // (HEADS // KV_HEADS)
    kv_head, split = gl.program_id(0) % KV_HEADS, gl.program_id(2)
    # The last tokens of a prompt see most. Their programs run first, so that no long program runs alone at the end.
    part = (gl.num_programs(0) - 1 - gl.program_id(0)) // KV_HEADS
    tile = gl.num_programs(1) - 1 - gl.program_id(1)
    first = gl.load(firsts + tile) + part * TOKENS
    count = gl.minimum(gl.load(counts + tile) - part * TOKENS, TOKENS).to(gl.int32)
    own_pages = pages + gl.load(sequence + tile) * width
    begin = split * split_size
    end = gl.load(visible + first + count - 1, mask=count > 0, other=0).to(gl.int32)  # the last token sees most
    end = gl.minimum(end, begin + split_size)

    layout: gl.constexpr = keys.layout
    queries = gl.allocate_shared_memory(keys.dtype, [CONSUMERS, ROWS, SIZE], layout)
    key_stages = gl.allocate_shared_memory(keys.dtype, [STAGES, COLUMNS, SIZE], layout)
    value_stages = gl.allocate_shared_memory(keys.dtype, [STAGES, COLUMNS, SIZE], layout)
    key_pages = _by_copies(key_stages, PAGE, CHANNELS)
    value_pages = _by_copies(value_stages, PAGE, CHANNELS)
    keys_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    keys_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    values_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    values_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(keys_ready.index(stage), count=1)
        mbarrier.init(keys_free.index(stage), count=CONSUMERS)
        mbarrier.init(values_ready.index(stage), count=1)
        mbarrier.init(values_free.index(stage), count=CONSUMERS)
    buffers = (queries, key_stages, value_stages, key_pages, value_pages)
    barriers = (keys_ready, keys_free, values_ready, values_free)
    work = (query, visible, first, count, begin, end, kv_head, scale * LOG2E)
    target = (out, sums, split.to(gl.int64) * all_tokens * HEADS)
    producer = (keys, values, own_pages, no_slot, begin, end, kv_head, buffers, barriers)
    # The two lists have the number of warps, and the registers of a thread, of each function but the first. The first
    # function has four warps.
    if CONSUMERS == 1:
        gl.warp_specialize(
            [(_attend, (work, target, buffers, barriers, HEADS, KV_HEADS, PARTIAL, 0)), (_copy, producer)],
            [1],
            [40],  # the first function gets the rest of 2 * 128, which is 216
        )
    else:
        gl.warp_specialize(
            [
                (_attend, (work, target, buffers, barriers, HEADS, KV_HEADS, PARTIAL, 0)),
                (_attend, (work, target, buffers, barriers, HEADS, KV_HEADS, PARTIAL, 1)),
                (_copy, producer),
            ],
            [4, 1],
            [232, 40],  # the first function gets the rest of 3 * 168, which is 232
        )


def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, tiles: Tiles, scaling: float) -> torch.Tensor:
    """Attention of packed tokens over pages; see `attention.attend`.

    Args:
        query: (T, heads, size), of 16 bits; size is one of SIZES.
        keys, values: (pages, page size, KV heads, size), of one layer; see `runs` for the page size.
        tiles: the tiles. In a tile, a token sees at least the tokens that the previous token sees.
        scaling: factor on the scores, above 0.

    Returns:
        (T, heads, size); undefined for tokens outside of all tiles.
    """
    tokens, heads, size = query.shape
    pages, page_size, kv_heads = keys.shape[:3]
    out = torch.empty_like(query)
    sources = [
        TensorDescriptor.from_tensor(
            x.view(pages * page_size, kv_heads * size), [page_size, CHANNELS], shared_layout(2)
        )
        for x in (keys, values)
    ]
    group = heads // kv_heads
    consumers = 1 if tiles.tokens * group <= ROWS else 2
    parts = triton.cdiv(tiles.tokens, consumers * ROWS // group)
    target, sums = out, out
    if tiles.splits > 1:
        target, sums = partial_results(query, tiles.splits)
    attend_hopper_kernel[(kv_heads * parts, len(tiles.first), tiles.splits)](
        query, *sources, tiles.first, tiles.count, tiles.pages, tiles.pages.shape[1], tiles.sequence, tiles.visible,
        target, sums, scaling, pages * page_size, tokens, tiles.split if tiles.splits > 1 else WHOLE, heads, kv_heads,
        size, ROWS, COLUMNS[consumers], STAGES, consumers, tiles.splits > 1, num_warps=4, maxnreg=REGISTERS[consumers],
    )  # fmt: skip
    if tiles.splits > 1:
        combine_splits(target, sums, out)
    return out


def suits(tiles: Tiles, heads: int, kv_heads: int) -> bool:
    """Whether this kernel should take the tiles. On an H200, Triton's kernel is faster for the others.

    If results have to be batch-invariant, the choice must not depend on other tiles, so this kernel takes all tiles.

    Args:
        tiles: the tiles.
        heads, kv_heads: numbers of heads.
    """
    rows, programs = tiles.tokens * heads // kv_heads, len(tiles.first) * kv_heads * tiles.splits
    is_long = tiles.split * tiles.splits > SPLIT
    return tiles.batch_invariant or is_long or rows > 128 or (rows > 32 and programs <= FEW * multiprocessors())


def runs(heads: int, cache: torch.Tensor) -> bool:
    """Try whether the kernel runs here.

    The kernel needs a Hopper GPU, 16 bits, a head size of SIZES, pages of 8, 16, 32 or 64 tokens, and at most ROWS
    query heads for each KV head.

    Args:
        heads: query heads.
        cache: keys or values of one layer, (pages, page size, KV heads, size).
    """
    _, page_size, kv_heads, size = cache.shape
    if not is_hopper(cache.device) or cache.dtype.itemsize != 2 or size not in SIZES or heads // kv_heads > ROWS:
        return False
    if page_size % 8 or min(COLUMNS.values()) % page_size:
        return False

    def run() -> None:
        one = torch.ones(1, dtype=torch.int64, device=cache.device)
        for tokens in (1, 2 * ROWS):  # one and two consumer warpgroups
            tiles = Tiles(one - 1, one, (one - 1)[None], one - 1, one, tokens, SPLIT, 1)
            attend(cache.new_zeros(1, heads, size), cache, cache, tiles, 1.0)

    return works(run, cache.device, "Hopper attention kernel", "Triton's kernel")
