"""Triton kernels for a layer of experts (MoE): routing, the order of its rows, and grouped products.

A router picks K of E experts for each of T tokens, so T * K rows go through experts. Four kernels run them:

    route     softmax of the router's logits, the K most probable experts and their weights; counts each expert's rows
    order     places the rows of an expert side by side, and cuts them into tiles
    gate_up   silu(gate) * up of each row, by its expert's weights
    down      each row's output times its weight

Nothing waits for the host and no shape depends on the routing, so a CUDA graph captures all of them. The grids have
programs for the most tiles that T * K rows can need; programs without a tile end at once. The order of rows within an
expert varies from run to run, since atomics decide it. Results do not vary: a row's sums depend on its own token and
weights, and on the sizes of a tile. The K outputs of a token are not added up here: `layers.add_norm` adds them.

The reference is transformers' Qwen3MoeSparseMoeBlock (models/qwen3_moe/modeling_qwen3_moe.py), whose rounding of logits
and weights these kernels follow. Sorting rows by expert, for products by tiles of one expert, is the way of vLLM's and
SGLang's fused_moe kernels (vllm/model_executor/layers/fused_moe).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from sdar_lm_eval.families.base import Experts

ROUTED = 4  # tokens of a program of `route`
PLACED = 32  # rows, and tiles, of a program of `order`


@dataclass(frozen=True)
class TileSettings:
    """Sizes of the grouped products' tiles.

    Attributes:
        rows: most rows of a tile.
        columns: columns of a tile of the gated product: so many of gate, and as many of up.
        down_columns: columns of a tile of the other product.
        inputs: inputs (of K) of a step.
        warps, stages: Triton's num_warps and num_stages.
    """

    rows: int
    columns: int
    down_columns: int
    inputs: int
    warps: int
    stages: int


# Where an expert has few rows, reading its weights takes the time: small tiles make programs enough, and each copies
# several steps ahead. Where an expert has many rows, multiplying takes the time: large tiles read operands less often.
# A tile that is larger than an expert's rows is multiplied in vain.
TILES = (
    TileSettings(16, 32, 64, 128, 4, 4),
    TileSettings(32, 64, 64, 128, 4, 3),
    TileSettings(64, 64, 128, 64, 4, 3),
    TileSettings(128, 128, 128, 64, 8, 3),
)
# Most rows of an expert, on average, for each of the tiles but the last, until times are known. Measured on an H200
# with 128 experts of 2,048 x 768.
ROWS_OF_TILES = (8, 24, 56)
FIXED_TILES = TILES[2]  # where a row's result may not depend on the number of rows
FLOAT32_TILES = TileSettings(16, 32, 32, 32, 4, 3)


@triton.jit(do_not_specialize=["tokens"])
def route_kernel(
    logits, visible, chosen, weights, totals, counts, tokens,
    EXPERTS: tl.constexpr, COLUMNS: tl.constexpr, TOP: tl.constexpr, NORMALIZED: tl.constexpr, MASKED: tl.constexpr,
    ROUTED: tl.constexpr,
):  # fmt: skip
    """A program routes ROUTED tokens."""
    token, expert = tl.program_id(0) * ROUTED + tl.arange(0, ROUTED), tl.arange(0, COLUMNS)
    real = token < tokens
    inside = real[:, None] & (expert < EXPERTS)[None, :]
    some = tl.load(logits + token[:, None] * EXPERTS + expert[None, :], mask=inside, other=-float("inf")).to(tl.float32)
    left = tl.where(inside, tl.exp(some - tl.max(some, axis=1)[:, None]), 0.0)
    total = tl.sum(left, axis=1)
    if NORMALIZED:
        total *= 0.0
    if MASKED:
        real = real & (tl.load(visible + token, mask=real, other=0) > 0)
    for i in tl.static_range(TOP):
        most = tl.max(left, axis=1)
        # Where logits are NaN, no expert is the best: the last one is taken, so that every row has an expert.
        best = tl.min(tl.where(left == most[:, None], expert[None, :], EXPERTS - 1), axis=1)
        left = tl.where(expert[None, :] == best[:, None], -1.0, left)
        if NORMALIZED:
            total += most
        tl.store(chosen + token * TOP + i, tl.where(real, best, -1), mask=token < tokens)
        tl.store(weights + token * TOP + i, most, mask=token < tokens)
        tl.atomic_add(counts + best, 1, mask=real)
    tl.store(totals + token, total, mask=token < tokens)


@triton.jit(do_not_specialize=["rows", "tiles"])
def order_kernel(
    chosen, counts, taken, order, table, rows, tiles,
    EXPERTS: tl.constexpr, COLUMNS: tl.constexpr, TILE: tl.constexpr, PLACED: tl.constexpr,
):  # fmt: skip
    """A program places PLACED rows, and describes PLACED tiles."""
    expert = tl.arange(0, COLUMNS)
    count = tl.load(counts + expert, mask=expert < EXPERTS, other=0)
    first = tl.cumsum(count) - count
    own = tl.program_id(0) * PLACED + tl.arange(0, PLACED)

    its = tl.load(chosen + own, mask=own < rows, other=-1)
    begin = tl.sum(tl.where(expert[None, :] == its[:, None], first[None, :], 0), axis=1)
    place = begin + tl.atomic_add(taken + its, 1, mask=its >= 0)
    tl.store(order + place, own, mask=its >= 0)

    needed = (count + TILE - 1) // TILE
    ends = tl.cumsum(needed)
    of_tile = tl.sum((ends[None, :] <= own[:, None]).to(tl.int32), axis=1)  # the tile's expert; COLUMNS: none
    is_its = expert[None, :] == of_tile[:, None]
    number = own - tl.sum(tl.where(is_its, (ends - needed)[None, :], 0), axis=1)
    row = tl.sum(tl.where(is_its, first[None, :], 0), axis=1) + number * TILE
    end = tl.sum(tl.where(is_its, (first + count)[None, :], 0), axis=1)
    tl.store(table + own * 4, of_tile, mask=own < tiles)
    tl.store(table + own * 4 + 1, row, mask=own < tiles)
    tl.store(table + own * 4 + 2, tl.where(of_tile < COLUMNS, tl.minimum(end, row + TILE), 0), mask=own < tiles)


@triton.jit
def gate_up_kernel(
    x, weight, out, order, table, inputs, size,
    TOP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INPUTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program computes COLUMNS columns of one tile."""
    table += tl.program_id(1) * 4
    expert, first, end = tl.load(table), tl.load(table + 1), tl.load(table + 2)
    if first < end:
        row, column, k = (
            first + tl.arange(0, ROWS),
            tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS),
            tl.arange(0, INPUTS),
        )
        inside, real = column < size, row < end
        token = tl.load(order + row, mask=real, other=0) // TOP
        source = x + token[:, None].to(tl.int64) * inputs + k[None, :]
        matrix = weight + expert.to(tl.int64) * 2 * size * inputs + column[None, :] * inputs + k[:, None]
        ups = matrix + size * inputs
        gate, up = tl.zeros([ROWS, COLUMNS], tl.float32), tl.zeros([ROWS, COLUMNS], tl.float32)
        for _ in range(0, inputs, INPUTS):
            some = tl.load(source, mask=real[:, None], other=0.0)
            gate = tl.dot(some, tl.load(matrix, mask=inside[None, :], other=0.0), gate, input_precision=PRECISION)
            up = tl.dot(some, tl.load(ups, mask=inside[None, :], other=0.0), up, input_precision=PRECISION)
            source += INPUTS
            matrix += INPUTS
            ups += INPUTS
        at = row[:, None].to(tl.int64) * size + column[None, :]
        gate *= tl.sigmoid(gate) * up
        tl.store(out + at, gate.to(out.dtype.element_ty), mask=real[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["tokens"])
def down_kernel(
    x, weight, weights, totals, out, order, table, inputs, size, tokens,
    TOP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INPUTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program computes COLUMNS columns of one tile."""
    table += tl.program_id(1) * 4
    expert, first, end = tl.load(table), tl.load(table + 1), tl.load(table + 2)
    if first < end:
        row, column, k = (
            first + tl.arange(0, ROWS),
            tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS),
            tl.arange(0, INPUTS),
        )
        inside, real = column < size, row < end
        source = x + row[:, None].to(tl.int64) * inputs + k[None, :]
        matrix = weight + expert.to(tl.int64) * size * inputs + column[None, :] * inputs + k[:, None]
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        for _ in range(0, inputs, INPUTS):
            some = tl.load(source, mask=real[:, None], other=0.0)
            total = tl.dot(some, tl.load(matrix, mask=inside[None, :], other=0.0), total, input_precision=PRECISION)
            source += INPUTS
            matrix += INPUTS
        pair = tl.load(order + row, mask=real, other=0)
        its = tl.load(weights + pair, mask=real, other=0.0) / tl.load(totals + pair // TOP, mask=real, other=1.0)
        total *= its.to(out.dtype.element_ty).to(tl.float32)[:, None]
        at = (pair % TOP * tokens + pair // TOP)[:, None].to(tl.int64) * size + column[None, :]
        tl.store(out + at, total.to(out.dtype.element_ty), mask=real[:, None] & inside[None, :])


def run(
    x: torch.Tensor,
    logits: torch.Tensor,
    experts: Experts,
    visible: torch.Tensor | None = None,
    *,
    tiles: TileSettings,
) -> torch.Tensor:
    """Run tokens through a layer of experts.

    Args:
        x: (T, D); D is a multiple of 16.
        logits: (T, E), x @ router.T.
        experts: the layer's weights; their width is a multiple of 16.
        visible: (T,), 0 for padding, which no expert runs: its outputs are undefined. None: no token is padding.
        tiles: sizes of the products' tiles. A row's result depends on them, and not on the number of rows.

    Returns:
        (K, T, D): each token's outputs of its K experts, times their weights. Their sum is the layer's output.
    """
    (tokens, inputs), (count, size) = x.shape, (len(experts.router), experts.down.shape[2])
    top, device = experts.top_k, x.device
    rows, precision = tokens * top, "ieee" if x.dtype == torch.float32 else "tf32"
    most_tiles = rows // tiles.rows + min(count, rows)  # the most that rows need, however they are routed
    columns = triton.next_power_of_2(count)

    chosen = torch.empty(tokens, top, dtype=torch.int32, device=device)
    weights = torch.empty(tokens, top, dtype=torch.float32, device=device)
    totals = torch.empty(tokens, dtype=torch.float32, device=device)
    counts, taken = torch.zeros(2, count, dtype=torch.int32, device=device)
    route_kernel[(triton.cdiv(tokens, ROUTED),)](
        logits, logits if visible is None else visible, chosen, weights, totals, counts, tokens, count, columns, top,
        experts.normalized, visible is not None, ROUTED, num_warps=1,
    )  # fmt: skip
    order = torch.empty(rows, dtype=torch.int32, device=device)
    table = torch.empty(most_tiles, 4, dtype=torch.int32, device=device)
    order_kernel[(triton.cdiv(max(rows, most_tiles), PLACED),)](
        chosen, counts, taken, order, table, rows, most_tiles, count, columns, tiles.rows, PLACED, num_warps=4
    )
    active = torch.empty(rows, size, dtype=x.dtype, device=device)
    gate_up_kernel[(triton.cdiv(size, tiles.columns), most_tiles)](
        x, experts.gate_up, active, order, table, inputs, size, top, tiles.rows, tiles.columns,
        math.gcd(inputs, tiles.inputs), precision, num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    out = torch.empty(top, tokens, inputs, dtype=x.dtype, device=device)
    columns = tiles.down_columns
    down_kernel[(triton.cdiv(inputs, columns), most_tiles)](
        active, experts.down, weights, totals, out, order, table, size, inputs, tokens, top, tiles.rows, columns,
        math.gcd(size, tiles.inputs), precision, num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return out
