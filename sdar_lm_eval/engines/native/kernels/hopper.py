"""Matrix products for Hopper GPUs: an MLP's gate and up projections with the activation, and plain products.

An H100 that multiplies matrices runs at its power limit, so moving fewer bytes makes it faster. The gated product keeps
the sums of gate and up in registers: it writes half of what cuBLAS would write, and no kernel reads these sums again.
Plain products are as fast as cuBLAS's or slower. But they are batch-invariant, as `reproducible=true` requires: a row's
result depends neither on the other rows nor on their number.

The kernel is written in Gluon, the language below Triton (triton.experimental, from Triton 3.6 on). A program stays on
its multiprocessor and works through the tiles that `schedule` assigns to it. One producer warp copies the operands to
shared memory, several steps ahead; it fills the part of a tile outside of a matrix with zeros. Two consumer groups of
four warps multiply 64 rows each by the same columns. While one group stores its results, the other goes on. A stage has
two barriers: `ready` waits for the bytes of a step, `free` for both groups to finish with them. The weights have their
own dimension for gate and up, so a tile at the end of gate does not reach into up.

There is no interpreter for Gluon. tests/engines/native/test_kernels_compile.py compiles the kernel everywhere;
tests/engines/native/test_hopper_kernels.py compares it with PyTorch on Hopper GPUs.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
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

from sdar_lm_eval.engines.native.kernels.gpu import multiprocessors

logger = logging.getLogger(__name__)

STRIP = 64  # rows of a consumer group, the fewest of the instruction
COLUMNS = 256  # columns of a tile, the most of the instruction; of the gated product, half are gate's and half up's
INPUTS = 64  # inputs (of K) of a step: 128 bytes, a row of shared memory without bank conflicts
STAGES = 4  # steps that are copied ahead
GROUP = 16  # pairs of strips that go through all columns together: their inputs stay in the L2 cache

# Triton 3.8 renames both.
load_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
store_tile = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global


@gluon.jit
def _copy(x, weight, buffers, barriers, work, turns, inputs):
    """The producer warp."""
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
def _multiply(out, buffers, barriers, work, turns, inputs, CONSUMER: gl.constexpr):
    """A consumer group of four warps: the first or the second."""
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
    result = results.index(CONSUMER)
    row, strips, column = gl.load(work), gl.load(work + 1), gl.load(work + 2)
    for _ in range(turns):
        work += gl.num_programs(0) * 4
        next_row, next_strips, next_column = gl.load(work), gl.load(work + 1), gl.load(work + 2)
        if strips > CONSUMER:
            total = gl.zeros([STRIP, COLUMNS], gl.float32, layout)
            for k in range(0, inputs, INPUTS):
                stage = step % STAGES
                mbarrier.wait(ready.index(stage), step // STAGES & 1)
                transposed = weights.index(stage).reshape([COLUMNS, INPUTS]).permute([1, 0])
                total = warpgroup_mma(rows.index(2 * stage + CONSUMER), transposed, total, use_acc=k > 0, is_async=True)
                # The product of the previous step is complete, so its stage is free.
                total = warpgroup_mma_wait(1, [total])
                mbarrier.arrive(free.index((step + STAGES - 1) % STAGES), pred=k > 0)
                step += 1
            total = warpgroup_mma_wait(0, [total])
            mbarrier.arrive(free.index((step + STAGES - 1) % STAGES))
            # Each thread holds the same columns of both halves, so the split moves nothing between threads.
            first, second = total.reshape([STRIP, 2, COLUMNS // 2]).permute(0, 2, 1).split()
            if GATED:
                _store(first * second / (1.0 + gl.exp(-first)), row + CONSUMER * STRIP, column, result, out)
            else:
                _store(first, row + CONSUMER * STRIP, column, result, out)
                _store(second, row + CONSUMER * STRIP, column + COLUMNS // 2, result, out)
        elif strips > 0:
            for _k in range(0, inputs, INPUTS):
                mbarrier.wait(ready.index(step % STAGES), step // STAGES & 1)
                mbarrier.arrive(free.index(step % STAGES))
                step += 1
        row, strips, column = next_row, next_strips, next_column
    tma.store_wait(0)


@gluon.jit
def _store(x, row, column, buffer, out):
    tma.store_wait(0)  # the previous store has read the buffer
    buffer.store(x.to(buffer.dtype))
    fence_async_shared()
    store_tile(out, [row, column], buffer)


@gluon.jit(do_not_specialize=["turns"])
def product_kernel(x, weight, out, work, turns, inputs, STAGES: gl.constexpr):
    """A program computes its tiles of `work`, one tile a turn."""
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
        [4, 1],  # warps of the second and the third function
        [240, 24],  # registers of their threads; the first function gets the rest of 3 * 168, which is 240
    )


def gated(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """silu(x @ gate.T) * (x @ up.T), rounded to 16 bits once.

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
    work = work_table(-(-rows // STRIP), -(-size // columns), columns, x.device)
    product_kernel[(work.shape[1],)](
        TensorDescriptor.from_tensor(x, [STRIP, INPUTS], shared_layout(2)),
        TensorDescriptor.from_tensor(weight, [parts, columns, INPUTS], shared_layout(3)),
        TensorDescriptor.from_tensor(out, [STRIP, COLUMNS // 2], shared_layout(2)),
        work, len(work) - 1, inputs, STAGES, num_warps=4, maxnreg=168,
    )  # fmt: skip
    return out


def shared_layout(rank: int) -> Any:
    """The layout of 16-bit tiles in shared memory, as TMA writes it: rows of 128 bytes."""
    return gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=rank)


def run_for(*weights: torch.Tensor) -> bool:
    """Try whether the kernel runs here: `gated` for one weight (2 F, K), `product` for several weights (N, K).

    The kernel needs a Hopper GPU, 16-bit weights, and sizes F, K and N that are multiples of 8.
    """
    run, parts = (gated, 2) if len(weights) == 1 else (product, 1)
    first, device = weights[0], weights[0].device
    if not is_hopper(device):
        return False
    if any(w.dtype.itemsize != 2 or len(w) % (8 * parts) or w.shape[1] % 8 for w in weights):
        return False
    return works(lambda: run(first.new_zeros(1, first.shape[1]), first), device, "kernel for Hopper GPUs", "cuBLAS")


def works(run: Callable[[], object], device: torch.device, kernel: str, other: str) -> bool:
    """Try a kernel on a GPU. If the kernel does not run, a warning says which `other` one takes its place."""
    try:
        run()
        torch.cuda.synchronize(device)
    except Exception as error:  # Gluon is experimental and may raise anything
        logger.warning("The %s does not run here, and %s takes its place: %s", kernel, other, error)
        return False
    return True


# Distribution of tiles over programs


def schedule(strips: int, columns: int, programs: int) -> list[list[tuple[int, int, int]]]:
    """The tiles of each program, in order: (first strip, strips, column), where strips is 1 or 2.

    Tiles of two strips are assigned to the programs in turn. If the last round would leave half of the programs idle,
    its tiles are halved.
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
def work_table(strips: int, tiles: int, columns: int, device: torch.device) -> torch.Tensor:
    """`schedule` as the kernel reads it: (turns + 1, programs, 4) int32: first row, strips, first column, 0.

    A tile of 0 strips is no tile.

    Args:
        strips: number of strips of the result's rows.
        tiles: number of tiles side by side in the result's columns.
        columns: columns of a tile.
        device: device of the table.
    """
    own = schedule(strips, tiles, multiprocessors())
    work = np.zeros((max(map(len, own)) + 1, len(own), 4), np.int32)
    for program, program_tiles in enumerate(own):
        work[: len(program_tiles), program, :3] = np.array(program_tiles).reshape(-1, 3) * [STRIP, 1, columns]
    return torch.from_numpy(work).to(device)


def is_hopper(device: torch.device) -> bool:
    """Whether a device is a Hopper GPU."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)
