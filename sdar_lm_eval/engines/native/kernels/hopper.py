"""Matrix products for Hopper GPUs: of an MLP's gate and up projections with the activation, and plain ones.

An H100 that multiplies matrices draws all the power it is allowed, so what counts is how much is moved about. Gate and
up never leave the registers that they were added up in: half of what cuBLAS would write is written, and nothing is read
again. Plain products are about as quick as cuBLAS's, often slower; but a row's results do not depend on the other rows,
nor on their number, which is what `reproducible=true` is about.

The kernel is written in Gluon, the language below Triton (triton.experimental, from Triton 3.6 on). A program stays on
its processor and works through the tiles that `schedule` gives it. One warp copies what is multiplied to shared memory,
some steps ahead, zeros for what lies outside; two groups of four warps multiply 64 rows each by the same columns, and
while one writes its results, none outside, the other goes on. Of the barriers of a stage, `ready` waits for the bytes
of a step, `free` for both groups to be done with them. Weights have a dimension for gate and up, so that a tile that
ends outside of gate does not reach into up.

There is no interpreter for Gluon: the kernel is compiled in tests/engines/native/test_kernels_compile.py and compared
with PyTorch on GPUs only, by tests/engines/native/test_hopper_kernels.py.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

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

# Of gate and up; below, cuBLAS and `kernels.silu_mul` are quicker: weights have to be read, and tiles are half empty.
FEWEST_ROWS = 336
STRIP = 64  # rows of a group of warps, the least that the instruction takes
COLUMNS = 256  # of a tile, the most that the instruction takes; half are gate's and half up's where it has both
INPUTS = 64  # of K a step: 128 bytes, what a row of shared memory holds without conflicts
STAGES = 4  # steps that are copied ahead
GROUP = 16  # pairs of strips that go through all columns together: their inputs stay in the L2 cache

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
    all_columns: gl.constexpr = 2 * weights.shape[1] * weights.shape[2] * INPUTS
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
                mbarrier.expect(bar, strip + all_columns, pred=strips == 1)
                mbarrier.expect(bar, 2 * strip + all_columns, pred=strips == 2)
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
    GATED: gl.constexpr = weights.shape[1] == 2
    COLUMNS: gl.constexpr = weights.shape[1] * weights.shape[2]
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, COLUMNS, 16]
    )
    step = 0
    result = results.index(WHICH)
    row, strips, column = gl.load(work), gl.load(work + 1), gl.load(work + 2)
    for _ in range(turns):
        work += gl.num_programs(0) * 4
        next_row, next_strips, next_column = gl.load(work), gl.load(work + 1), gl.load(work + 2)
        if strips > WHICH:
            total = gl.zeros([STRIP, COLUMNS], gl.float32, layout)
            for k in range(0, inputs, INPUTS):
                stage = step % STAGES
                mbarrier.wait(ready.index(stage), step // STAGES & 1)
                transposed = weights.index(stage).reshape([COLUMNS, INPUTS]).permute([1, 0])
                total = warpgroup_mma(rows.index(2 * stage + WHICH), transposed, total, use_acc=k > 0, is_async=True)
                total = warpgroup_mma_wait(1, [total])  # the step before is done with its stage
                mbarrier.arrive(free.index((step + STAGES - 1) % STAGES), pred=k > 0)
                step += 1
            total = warpgroup_mma_wait(0, [total])
            mbarrier.arrive(free.index((step + STAGES - 1) % STAGES))
            # A thread has the same columns of both halves.
            first, second = total.reshape([STRIP, 2, COLUMNS // 2]).permute(0, 2, 1).split()
            if GATED:
                _store(first * second / (1.0 + gl.exp(-first)), row + WHICH * STRIP, column, result, out)
            else:
                _store(first, row + WHICH * STRIP, column, result, out)
                _store(second, row + WHICH * STRIP, column + COLUMNS // 2, result, out)
        elif strips > 0:
            for _k in range(0, inputs, INPUTS):
                mbarrier.wait(ready.index(step % STAGES), step // STAGES & 1)
                mbarrier.arrive(free.index(step % STAGES))
                step += 1
        row, strips, column = next_row, next_strips, next_column
    tma.store_wait(0)


@gluon.jit
def _store(x, row, column, buffer, out):
    tma.store_wait(0)  # what was there has left shared memory
    buffer.store(x.to(buffer.dtype))
    fence_async_shared()
    store_tile(out, [row, column], buffer)


@gluon.jit(do_not_specialize=["turns"])
def _product(x, weight, out, work, turns, inputs, STAGES: gl.constexpr):
    STRIP: gl.constexpr = x.block_shape[0]
    INPUTS: gl.constexpr = x.block_shape[1]
    PARTS: gl.constexpr = weight.block_shape[0]
    COLUMNS: gl.constexpr = weight.block_shape[1]
    rows = gl.allocate_shared_memory(x.dtype, [2 * STAGES, STRIP, INPUTS], x.layout)
    weights = gl.allocate_shared_memory(x.dtype, [STAGES, PARTS, COLUMNS, INPUTS], weight.layout)
    results = gl.allocate_shared_memory(x.dtype, [2, STRIP, out.block_shape[1]], out.layout)
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
    return _run(x, weight.view(2, -1, weight.shape[1]))


def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x @ weight.T; (T, K), (N, K) -> (T, N), in 16 bits. K and N are multiples of 8."""
    return _run(x, weight.view(1, -1, weight.shape[1]))


def _run(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    (rows, inputs), (parts, size, _) = x.shape, weight.shape
    out = torch.empty(rows, size, dtype=x.dtype, device=x.device)
    columns = COLUMNS // parts
    work = _work(-(-rows // STRIP), -(-size // columns), columns, x.device)
    _product[(work.shape[1],)](
        TensorDescriptor.from_tensor(x, [STRIP, INPUTS], _layout(2)),
        TensorDescriptor.from_tensor(weight, [parts, columns, INPUTS], _layout(3)),
        TensorDescriptor.from_tensor(out, [STRIP, COLUMNS // 2], _layout(2)),
        work, len(work) - 1, inputs, STAGES, num_warps=4, maxnreg=168,
    )  # fmt: skip
    return out


def _layout(rank: int) -> Any:
    return gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=rank)


def run_for(*weights: torch.Tensor) -> bool:
    """Whether the kernel runs here: `gated` for one weight, (2 F, K), `product` for several, (N, K). Tries it.

    It does on Hopper GPUs, in 16 bits, for sizes that are multiples of 8 (F, K, N).
    """
    run, parts = (gated, 2) if len(weights) == 1 else (product, 1)
    first, device = weights[0], weights[0].device
    if not _is_hopper(device):
        return False
    if any(w.dtype.itemsize != 2 or len(w) % (8 * parts) or w.shape[1] % 8 for w in weights):
        return False
    try:
        run(first.new_zeros(1, first.shape[1]), first)
        torch.cuda.synchronize(device)
    except Exception as error:  # of an interface that is experimental, anything; cuBLAS does without
        logger.warning("The kernel for Hopper GPUs does not run here, and cuBLAS takes its place: %s", error)
        return False
    return True


# Who works on what


def schedule(strips: int, columns: int, programs: int) -> list[list[tuple[int, int, int]]]:
    """The tiles of each program, in turn: (first strip, strips, column), strips being 1 or 2.

    Pairs of strips are dealt out in turn. Where the last ones would leave half of the programs idle, they are halved.
    """
    pairs = range(0, strips, 2)
    groups = (pairs[begin : begin + GROUP] for begin in range(0, len(pairs), GROUP))
    tiles = [(strip, 2, column) for group in groups for column in range(columns) for strip in group]
    rest = len(tiles) % programs
    if 0 < 2 * rest <= programs:
        tiles, last = tiles[:-rest], tiles[-rest:]
        tiles += [(strip + half, 1, column) for strip, _, column in last for half in range(2) if strip + half < strips]
    return [tiles[program::programs] for program in range(programs)]


@functools.cache
def _work(strips: int, tiles: int, columns: int, device: torch.device) -> torch.Tensor:
    """`schedule` for the kernel: (turns + 1, programs, 4) int32 of first row, strips, first column; zeros are none.

    `tiles` is how many there are beside each other, each of so many columns.
    """
    own = schedule(strips, tiles, _processors(device))
    work = np.zeros((max(map(len, own)) + 1, len(own), 4), np.int32)
    for program, of_program in enumerate(own):
        work[: len(of_program), program, :3] = np.array(of_program).reshape(-1, 3) * [STRIP, 1, columns]
    return torch.from_numpy(work).to(device)


def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


@functools.cache
def _processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
