"""The product of an MLP's gate and up projections with its activation, in one kernel for Hopper GPUs.

An H100 that multiplies matrices draws all the power it is allowed, so what counts is how much is moved about. Here gate
and up never leave the registers that they were added up in: half of what cuBLAS would write is written, and nothing is
read again.

The kernel is written in Gluon, the language below Triton (triton.experimental, from Triton 3.6 on). A program stays on
its processor and works through the tiles that `schedule` gives it. One warp copies what is multiplied to shared memory,
some steps ahead; two groups of four warps multiply 64 rows each by the same columns, and while one writes its results
the other goes on. A row's results do not depend on the other rows, nor on their number.

There is no interpreter for Gluon: the kernel is compiled in tests/engines/native/test_kernels_compile.py and compared
with PyTorch on GPUs only, by tests/engines/native/test_hopper_kernels.py.
"""

from __future__ import annotations

import functools
import heapq
import logging
from collections.abc import Callable

import numpy as np
import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

logger = logging.getLogger(__name__)

FEWEST_ROWS = 336  # below, cuBLAS and `kernels.silu_mul` are quicker: weights have to be read, and tiles are half empty
STRIP = 64  # rows of a group of warps, the least that the instruction takes
COLUMNS = 128  # of gate and of up in a tile, 256 together: the most that the instruction takes
INPUTS = 64  # of K a step: 128 bytes, what a row of shared memory holds without conflicts
STAGES = 4  # steps that are copied ahead
GROUP = 16  # pairs of strips that go through all columns together: their inputs stay in the L2 cache
BEHIND = 12  # columns by which odd strips come after the others, to fill gaps; their weights are still in the cache
ODD = 0.6  # of the time of a pair of strips that an odd one takes
FEW_STRIPS = 64  # up to here an odd strip is worth a tile of its own

# Triton 3.8 has new names for them.
load_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
store_tile = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global


@gluon.jit
def _copy(x, weight, buffers, barriers, work, turns, inputs):
    """The warp that copies."""
    rows, weights, _ = buffers
    ready, free = barriers
    STAGES: gl.constexpr = weights.shape[0]
    STRIP: gl.constexpr = rows.shape[1]
    INPUTS: gl.constexpr = rows.shape[2]
    strip: gl.constexpr = 2 * STRIP * INPUTS
    both: gl.constexpr = 4 * weights.shape[2] * INPUTS
    step = 0
    row, strips, column = gl.load(work), gl.load(work + 1), gl.load(work + 2)
    for _ in range(turns):
        work += gl.num_programs(0) * 4
        next_row, next_strips, next_column = gl.load(work), gl.load(work + 1), gl.load(work + 2)
        if strips > 0:
            for k in range(0, inputs, INPUTS):
                stage = step % STAGES
                mbarrier.wait(free.index(stage), (step // STAGES & 1) ^ 1)
                bar = ready.index(stage)
                mbarrier.expect(bar, strip + both, pred=strips == 1)
                mbarrier.expect(bar, 2 * strip + both, pred=strips == 2)
                load_tile(x, [row, k], bar, rows.index(2 * stage))
                load_tile(x, [row + STRIP, k], bar, rows.index(2 * stage + 1), pred=strips == 2)
                load_tile(weight, [0, column, k], bar, weights.index(stage))
                step += 1
        row, strips, column = next_row, next_strips, next_column


@gluon.jit
def _multiply(out, buffers, barriers, work, turns, inputs, WHICH: gl.constexpr):
    """One of the two groups of warps that multiply."""
    rows, weights, results = buffers
    ready, free = barriers
    STAGES: gl.constexpr = weights.shape[0]
    STRIP: gl.constexpr = rows.shape[1]
    INPUTS: gl.constexpr = rows.shape[2]
    COLUMNS: gl.constexpr = weights.shape[2]
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 2 * COLUMNS, 16]
    )
    step = 0
    result = results.index(WHICH)
    row, strips, column = gl.load(work), gl.load(work + 1), gl.load(work + 2)
    for _ in range(turns):
        work += gl.num_programs(0) * 4
        next_row, next_strips, next_column = gl.load(work), gl.load(work + 1), gl.load(work + 2)
        if strips > WHICH:
            total = gl.zeros([STRIP, 2 * COLUMNS], gl.float32, layout)
            for k in range(0, inputs, INPUTS):
                stage = step % STAGES
                mbarrier.wait(ready.index(stage), step // STAGES & 1)
                transposed = weights.index(stage).reshape([2 * COLUMNS, INPUTS]).permute([1, 0])
                total = warpgroup_mma(rows.index(2 * stage + WHICH), transposed, total, use_acc=k > 0, is_async=True)
                total = warpgroup_mma_wait(1, [total])  # the step before is done with its stage
                mbarrier.arrive(free.index((step + STAGES - 1) % STAGES), pred=k > 0)
                step += 1
            total = warpgroup_mma_wait(0, [total])
            mbarrier.arrive(free.index((step + STAGES - 1) % STAGES))
            # A thread has gate and up of the same columns.
            gate, up = total.reshape([STRIP, 2, COLUMNS]).permute(0, 2, 1).split()
            activated = gate * up / (1.0 + gl.exp(-gate))
            tma.store_wait(0)  # the tile before has left shared memory
            result.store(activated.to(result.dtype))
            fence_async_shared()
            store_tile(out, [row + WHICH * STRIP, column], result)
        elif strips > 0:
            for _k in range(0, inputs, INPUTS):
                mbarrier.wait(ready.index(step % STAGES), step // STAGES & 1)
                mbarrier.arrive(free.index(step % STAGES))
                step += 1
        row, strips, column = next_row, next_strips, next_column
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["turns"])
def _gated(x, weight, out, work, turns, inputs, STAGES: gl.constexpr):
    STRIP: gl.constexpr = x.block_shape[0]
    INPUTS: gl.constexpr = x.block_shape[1]
    COLUMNS: gl.constexpr = weight.block_shape[1]
    rows = gl.allocate_shared_memory(x.dtype, [2 * STAGES, STRIP, INPUTS], x.layout)
    weights = gl.allocate_shared_memory(x.dtype, [STAGES, 2, COLUMNS, INPUTS], weight.layout)
    results = gl.allocate_shared_memory(x.dtype, [2, STRIP, COLUMNS], out.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(free.index(stage), count=2)
    buffers, barriers = (rows, weights, results), (ready, free)
    work += gl.program_id(0) * 4
    gl.warp_specialize(
        [
            (_multiply, (out, buffers, barriers, work, turns, inputs, 0)),
            (_multiply, (out, buffers, barriers, work, turns, inputs, 1)),
            (_copy, (x, weight, buffers, barriers, work, turns, inputs)),
        ],
        [4, 1],  # warps of the second and of the third
        [240, 24],  # registers of their threads; the first has what is left of 3 * 168, 240
    )


def gated(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """silu(x @ gate.T) * (x @ up.T), rounded once.

    Args:
        x: (T, K), bfloat16 or float16; K is a multiple of 8.
        weight: gate and up, (2 F, K), of the same dtype; F is a multiple of 8.

    Returns:
        (T, F).
    """
    rows, inputs = x.shape
    size = len(weight) // 2
    assert x.is_contiguous() and weight.is_contiguous() and inputs % 8 == 0 and size % 8 == 0
    out = torch.empty(rows, size, dtype=x.dtype, device=x.device)
    programs = _processors(x.device)
    work = _work(-(-rows // STRIP), -(-size // COLUMNS), programs, x.device)
    plain, stacked = (gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=rank) for rank in (2, 3))
    _gated[(programs,)](
        TensorDescriptor.from_tensor(x, [STRIP, INPUTS], plain),
        TensorDescriptor.from_tensor(weight.view(2, size, inputs), [2, COLUMNS, INPUTS], stacked),
        TensorDescriptor.from_tensor(out, [STRIP, COLUMNS], plain),
        work, len(work) - 1, inputs, STAGES, num_warps=4, maxnreg=168,
    )  # fmt: skip
    return out


def gated_for(weight: torch.Tensor) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None:
    """`gated` if it runs for such weights, (2 F, K): on Hopper GPUs in 16 bits; tries it."""
    size, inputs = weight.shape
    if not _is_hopper(weight.device) or weight.dtype.itemsize != 2 or size % 16 or inputs % 8:
        return None
    try:
        gated(weight.new_zeros(1, inputs), weight)
    except Exception as error:  # of an interface that is experimental, anything; cuBLAS does without
        logger.warning("The kernel for Hopper GPUs does not run here, and cuBLAS takes its place (slower): %s", error)
        return None
    return gated


# Who works on what


def schedule(strips: int, columns: int, programs: int) -> list[list[tuple[int, int, int]]]:
    """The tiles of each program, in turn: (first strip, strips, column), strips being 1 or 2.

    A tile goes to whoever is done first. Where the last ones would leave half of the programs idle, they are halved.
    """
    pairs, odd = divmod(strips, 2)
    if strips > FEW_STRIPS:
        pairs, odd = pairs + odd, 0
    groups = (range(begin, min(begin + GROUP, pairs)) for begin in range(0, pairs, GROUP))
    tiles = [(2 * pair, 2, column) for group in groups for column in range(columns) for pair in group]
    if odd:
        last = pairs % GROUP or min(GROUP, pairs)  # pairs of the last group
        begin = len(tiles) - last * columns
        for column in reversed(range(columns)):
            tiles.insert(begin + last * min(column + BEHIND, columns), (2 * pairs, 1, column))
    elif 0 < 2 * (rest := len(tiles) % programs) <= programs:
        tiles, halved = tiles[:-rest], tiles[-rest:]
        tiles += [(strip + half, 1, column) for strip, _, column in halved for half in range(2)]
    done_at = [(0.0, program) for program in range(programs)]
    own: list[list[tuple[int, int, int]]] = [[] for _ in range(programs)]
    for tile in tiles:
        time, program = heapq.heappop(done_at)
        own[program].append(tile)
        heapq.heappush(done_at, (time + (1 if tile[1] == 2 else ODD), program))
    return own


@functools.cache
def _work(strips: int, columns: int, programs: int, device: torch.device) -> torch.Tensor:
    """`schedule` for the kernel: (turns + 1, programs, 4) int32 of first row, strips, first column; zeros are none."""
    own = schedule(strips, columns, programs)
    work = np.zeros((max(map(len, own)) + 1, programs, 4), np.int32)
    for program, tiles in enumerate(own):
        if tiles:
            work[: len(tiles), program, :3] = np.array(tiles) * [STRIP, 1, COLUMNS]
    return torch.from_numpy(work).to(device)


def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


@functools.cache
def _processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
