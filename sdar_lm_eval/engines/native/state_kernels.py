"""The three operations of `BatchState` as a Triton kernel each, where plain PyTorch launches some 200 small ones.

A program has one slot. It sums over the slots before it to know its offset: a few hundred numbers.
`state.py` is the reference: tests/engines/native/test_state_kernels.py steps both through the same batches. Not
implemented here: a repetition penalty, and strategies that are not in `IMPLEMENTED`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from sdar_lm_eval.engines.native import state as states
from sdar_lm_eval.engines.native.kernels import random_number
from sdar_lm_eval.engines.native.pages import SCRATCH_PAGE
from sdar_lm_eval.engines.native.random_numbers import DRAW, ORDER
from sdar_lm_eval.engines.native.strategies import codes

IMPLEMENTED = {
    "low_confidence_static": None,
    "low_confidence_dynamic": "DYNAMIC",
    "sequential": "SEQUENTIAL",
    "entropy_bounded": "ENTROPY",
    "random": "RANDOM",
}
"""Strategy -> parameter of `_advance` that takes its code, -1 where no sequence has it. None: what no parameter has."""


@dataclass(frozen=True)
class Blocks:
    """What a forward runs: S segments of L tokens.

    Attributes:
        slot: whose each segment is, (S,) int64; N for padding.
        count: tokens of the tile of attention that begins with each segment, (S,) int64.
        tokens, positions: (S * L,) int64.
        kv_slots: KV slot of each token, (S * L,) int64: page * page size + offset in the page.
        visible: leading tokens of its sequence that each token sees, (S * L,) int64; 0 for padding.
    """

    slot: torch.Tensor
    count: torch.Tensor
    tokens: torch.Tensor
    positions: torch.Tensor
    kv_slots: torch.Tensor
    visible: torch.Tensor


@dataclass(frozen=True)
class Drawing:
    """What tokens are drawn for; (M,) each. `row` counts the S * L hidden states, `draw` takes the others."""

    row: torch.Tensor
    temperature: torch.Tensor
    number: torch.Tensor
    greedy: torch.Tensor


@triton.jit
def _write_segment(
    segment, slot, start, length, count, source, table, table_stride,
    slot_out, count_out, tokens_out, positions_out, kv_slots_out, visible_out,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, PAGE: tl.constexpr, SCRATCH: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, WIDTH)
    inside, real = column < BLOCK, column < length
    position = tl.where(real, start + column, 0)
    page = tl.load(table + slot * table_stride + position // PAGE, mask=real, other=0)
    at = segment * BLOCK + column
    tl.store(slot_out + segment, slot)
    tl.store(count_out + segment, count)
    tl.store(tokens_out + at, tl.load(source + slot * BLOCK + column, mask=inside, other=0), mask=inside)
    tl.store(positions_out + at, position, mask=inside)
    tl.store(kv_slots_out + at, tl.where(real, page * PAGE + position % PAGE, SCRATCH), mask=inside)
    tl.store(visible_out + at, tl.where(real, start + length, 0), mask=inside)


@triton.jit(do_not_specialize=["slots", "size"])
def _lay_out(
    active, uncommitted, masked, start, length, tokens, before, table, table_stride, runs, wants, segment_of,
    slot_out, count_out, tokens_out, positions_out, kv_slots_out, visible_out, slots, size,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, SLOTS: tl.constexpr, PAGE: tl.constexpr, SCRATCH: tl.constexpr,
    PAIRED: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    other = tl.arange(0, SLOTS)
    there = other < slots
    # Segments of each slot: none, its block, or the block before it too.
    own = tl.load(active + other, mask=there, other=0).to(tl.int32)
    own *= 1 + tl.load(uncommitted + other, mask=there, other=0).to(tl.int32)
    if program < slots:
        slot = program
        mine = tl.sum(tl.where(other == slot, own, 0))
        first = tl.sum(tl.where(other < slot, own, 0))
        fits = (mine > 0) & (first + mine <= size)
        column = tl.arange(0, WIDTH)
        wanted = tl.load(masked + slot * BLOCK + column, mask=column < BLOCK, other=0).to(tl.int32)
        tl.store(runs + slot, fits)
        tl.store(wants + slot, tl.where(fits, tl.sum(wanted), 0))
        tl.store(segment_of + slot, first + mine - 1)
        if fits:
            begin, tokens_here = tl.load(start + slot), tl.load(length + slot)
            if mine == 2:
                count = 2 * BLOCK if PAIRED else tokens_here
                _write_segment(
                    first.to(tl.int64), slot, begin - tokens_here, tokens_here, count, before, table, table_stride,
                    slot_out, count_out, tokens_out, positions_out, kv_slots_out, visible_out,
                    BLOCK, WIDTH, PAGE, SCRATCH,
                )  # fmt: skip
            count = (2 - mine) * BLOCK if PAIRED else tokens_here
            _write_segment(
                (first + mine - 1).to(tl.int64), slot, begin, tokens_here, count, tokens, table, table_stride,
                slot_out, count_out, tokens_out, positions_out, kv_slots_out, visible_out,
                BLOCK, WIDTH, PAGE, SCRATCH,
            )  # fmt: skip
    else:
        segment = program - slots
        if segment >= tl.sum(tl.where(tl.cumsum(own) <= size, own, 0)):
            _write_segment(
                segment, slots.to(tl.int64), 0, 0, 0, tokens, table, table_stride,
                slot_out, count_out, tokens_out, positions_out, kv_slots_out, visible_out,
                BLOCK, WIDTH, PAGE, SCRATCH,
            )  # fmt: skip


def lay_out(state: states.BatchState, table: torch.Tensor, page_size: int, size: int, *, paired: bool) -> Blocks:
    """`BatchState.segments`, with positions and KV slots of its tokens.

    Args:
        state: of the batch; its `runs`, `wants` and `segment_of` are written.
        table: pages of each slot's sequence, (N + 1, P) int64.
        page_size: tokens a page.
        size: S.
        paired: whether a block and the one before it are one tile of attention.
    """
    device, block = table.device, state.block
    slot, count = torch.empty(2, size, dtype=torch.int64, device=device)
    tokens, positions, kv_slots, visible = torch.empty(4, size * block, dtype=torch.int64, device=device)
    _lay_out[(state.slots + size,)](
        state.active, state.uncommitted, state.masked, state.start, state.length, state.tokens, state.before, table,
        table.stride(0), state.runs, state.wants, state.segment_of, slot, count, tokens, positions, kv_slots, visible,
        state.slots, size, block, _width(block), _width(state.slots), page_size, SCRATCH_PAGE, paired, num_warps=1,
    )  # fmt: skip
    return Blocks(slot, count, tokens, positions, kv_slots, visible)


@triton.jit(do_not_specialize=["slots", "size"])
def _masked_positions(
    masked, runs, wants, segment_of, draw_of, start, step, seed, temperature, greedy,
    row_out, temperature_out, number_out, greedy_out, slots, size,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, SLOTS: tl.constexpr, PURPOSE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    other = tl.arange(0, SLOTS)
    wanted = tl.load(wants + other, mask=other < slots, other=0)
    if program < slots:
        slot = program
        mine = tl.sum(tl.where(other == slot, wanted, 0))
        first = tl.sum(tl.where(other < slot, wanted, 0))
        fits = (mine > 0) & (first + mine <= size)
        tl.store(runs + slot, fits)
        tl.store(draw_of + slot, first)
        column = tl.arange(0, WIDTH)
        # A scalar is no mask for the interpreter.
        here = (tl.load(masked + slot * BLOCK + column, mask=column < BLOCK, other=0).to(tl.int32) * fits) > 0
        at = first + tl.cumsum(here.to(tl.int32)) - 1
        tl.store(row_out + at, tl.load(segment_of + slot).to(tl.int64) * BLOCK + column, mask=here)
        tl.store(temperature_out + at, tl.load(temperature + slot), mask=here)
        tl.store(greedy_out + at, tl.load(greedy + slot), mask=here)
        position = tl.load(start + slot) + column
        number = random_number(tl.load(seed + slot), position, tl.load(step + slot), PURPOSE)
        tl.store(number_out + at, number, mask=here)
    else:
        draw = program - slots
        if draw >= tl.sum(tl.where(tl.cumsum(wanted) <= size, wanted, 0)):
            tl.store(row_out + draw, 0)
            tl.store(temperature_out + draw, 1.0)
            tl.store(greedy_out + draw, True)
            tl.store(number_out + draw, 0.0)


def masked_positions(state: states.BatchState, size: int) -> Drawing:
    """`BatchState.masked_positions`, with what to draw by.

    Args:
        state: of the batch, as `lay_out` left it; its `runs` and `draw_of` are written.
        size: M.
    """
    device = state.tokens.device
    row = torch.empty(size, dtype=torch.int64, device=device)
    temperature, number = torch.empty(2, size, dtype=torch.float32, device=device)
    greedy = torch.empty(size, dtype=torch.bool, device=device)
    _masked_positions[(state.slots + size,)](
        state.masked, state.runs, state.wants, state.segment_of, state.draw_of, state.start, state.step, state.seed,
        state.temperature, state.greedy, row, temperature, number, greedy, state.slots, size, state.block,
        _width(state.block), _width(state.slots), DRAW, num_warps=1,
    )  # fmt: skip
    return Drawing(row, temperature, number, greedy)


@triton.jit
def _rank(keys, column, SIZE: tl.constexpr):
    """Of each key, how many are below it, or equal and to its left. Which of them: (SIZE, SIZE), the others in rows."""
    other, this = tl.reshape(keys, (SIZE, 1)), tl.reshape(keys, (1, SIZE))
    left = tl.reshape(column, (SIZE, 1)) < tl.reshape(column, (1, SIZE))
    before = (other < this) | ((other == this) & left)
    return tl.sum(before.to(tl.int32), axis=0), before


@triton.jit(do_not_specialize=["slots", "stops"])
def _advance(
    runs, draw_of, drawn, drawn_confidence, drawn_entropy, tokens, masked, unmasked_at, confidence, before, active,
    uncommitted, start, step, given, room, length, strategy, quotas, stop_ids, seed, setting, packed,
    slots, stops, mask_token,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, PURPOSE: tl.constexpr, DYNAMIC: tl.constexpr, SEQUENTIAL: tl.constexpr,
    ENTROPY: tl.constexpr, RANDOM: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside = column < BLOCK
    at = slot * BLOCK + column
    # Flags are numbers: a scalar is no mask for the interpreter.
    took_part, was_uncommitted = tl.load(runs + slot).to(tl.int32), tl.load(uncommitted + slot).to(tl.int32)
    at_step, begin, tokens_here = tl.load(step + slot), tl.load(start + slot), tl.load(length + slot)
    all_masked = tl.load(masked + at, mask=inside, other=0).to(tl.int32)
    open_ = (all_masked * took_part) > 0
    draw = tl.load(draw_of + slot) + tl.cumsum(open_.to(tl.int32)) - 1
    token = tl.load(drawn + draw, mask=open_, other=0)
    sure = tl.load(drawn_confidence + draw, mask=open_, other=0.0)

    # Which are kept
    count = tl.load(quotas + slot * BLOCK + at_step).to(tl.int32)
    kind = tl.load(strategy + slot)
    keys = -sure
    if DYNAMIC >= 0:
        above = tl.sum((open_ & (sure > tl.load(setting + slot))).to(tl.int32))
        count = tl.where(kind == DYNAMIC, tl.maximum(above, count), count)
    if SEQUENTIAL >= 0:
        keys = tl.where(kind == SEQUENTIAL, column.to(tl.float32), keys)
    if ENTROPY >= 0:
        spread = tl.load(drawn_entropy + draw, mask=open_, other=float("inf"))
        _, less = _rank(spread, column, WIDTH)
        sums = spread + tl.sum(tl.where(less, tl.reshape(spread, (WIDTH, 1)), 0.0), axis=0)
        within = tl.sum((open_ & (sums < tl.load(setting + slot))).to(tl.int32))
        count = tl.where(kind == ENTROPY, tl.maximum(within, 1), count)
        keys = tl.where(kind == ENTROPY, spread, keys)
    if RANDOM >= 0:
        order = random_number(tl.load(seed + slot), begin + column, at_step, PURPOSE)
        keys = tl.where(kind == RANDOM, order, keys)
    rank, _ = _rank(tl.where(open_, keys, float("inf")), column, WIDTH)
    kept = open_ & (rank < count)

    token = tl.where(kept, token, tl.load(tokens + at, mask=inside, other=0))
    when = tl.where(kept, at_step, tl.load(unmasked_at + at, mask=inside, other=0))
    still = (all_masked > 0) & (kept == 0)
    is_no_number = kept & (sure != sure)
    sure = tl.where(kept, sure, tl.load(confidence + at, mask=inside, other=0.0))
    none_kept = (tl.sum(open_.to(tl.int32)) > 0) & (tl.sum(kept.to(tl.int32)) == 0)
    stuck = (none_kept | (tl.sum(is_no_number.to(tl.int32)) > 0)).to(tl.int32)

    # Whether the block is decided, as far as the answer goes, and whether that goes on
    first, most = tl.load(given + slot), tl.load(room + slot)
    fresh = (column >= first) & (column < tokens_here) & (still == 0)
    stop = BLOCK
    for i in range(stops):
        is_stop = fresh & (token == tl.load(stop_ids + slot * stops + i))
        stop = tl.minimum(stop, tl.min(tl.where(is_stop, column, BLOCK)))
    needed = still & (column < tl.minimum(stop, first + most))
    decided = took_part * (tl.sum(needed.to(tl.int32)) == 0).to(tl.int32)
    left = tl.sum(still.to(tl.int32)) * (decided == 0).to(tl.int32)
    new = tokens_here - first
    goes_on = decided * ((stop == BLOCK) & (new < most)).to(tl.int32)

    blocks = slots * BLOCK
    tl.store(packed + at, token.to(tl.int32), mask=inside)
    tl.store(packed + blocks + at, when.to(tl.int32), mask=inside)
    tl.store(packed + 2 * blocks + at, sure.to(tl.int32, bitcast=True), mask=inside)
    flags = packed + 3 * blocks + slot
    tl.store(flags, took_part)
    tl.store(flags + slots, took_part * was_uncommitted)
    tl.store(flags + 2 * slots, decided)
    tl.store(flags + 3 * slots, stuck)
    tl.store(flags + 4 * slots, goes_on)
    tl.store(flags + 5 * slots, left)

    if took_part > 0:
        begins = column < goes_on * BLOCK
        tl.store(before + at, token, mask=begins)
        tl.store(tokens + at, tl.where(begins, mask_token, token), mask=inside)
        tl.store(masked + at, still | (column < goes_on * tokens_here), mask=inside)
        tl.store(unmasked_at + at, tl.where(begins, -1, when), mask=inside)
        tl.store(confidence + at, tl.where(begins, 1.0, sure), mask=inside)
        tl.store(active + slot, (decided == 0) | (goes_on > 0))
        tl.store(uncommitted + slot, goes_on > 0)
        tl.store(step + slot, tl.where(goes_on > 0, 0, tl.minimum(at_step + 1, BLOCK - 1)))
        tl.store(start + slot, begin + goes_on * tokens_here)
        tl.store(room + slot, most - goes_on * new)
        tl.store(given + slot, tl.where(goes_on > 0, 0, first))


def advance(
    state: states.BatchState,
    token: torch.Tensor,
    confidence: torch.Tensor,
    entropy: torch.Tensor,
    packed: torch.Tensor,
) -> None:
    """`BatchState.advance`.

    Args:
        state: of the batch, as `masked_positions` left it.
        token, confidence, entropy: (M,), what was drawn.
        packed: the outcome is written to it; `BatchState.unpack` reads it.
    """
    if missing := sorted(state.strategies - IMPLEMENTED.keys()):
        raise NotImplementedError(f"the kernel does not implement {', '.join(missing)}")
    code = {name: number if name in state.strategies else -1 for name, number in codes().items()}
    branches = {branch: code[name] for name, branch in IMPLEMENTED.items() if branch}
    _advance[(state.slots,)](
        state.runs, state.draw_of, token, confidence, entropy, state.tokens, state.masked, state.unmasked_at,
        state.confidence, state.before, state.active, state.uncommitted, state.start, state.step, state.given,
        state.room, state.length, state.strategy, state.quotas, state.stop_ids, state.seed, state.setting,
        packed, state.slots, state.stop_ids.shape[1], state.mask_token_id, state.block, _width(state.block), ORDER,
        **branches, num_warps=1,
    )  # fmt: skip


def _width(size: int) -> Any:
    """A power of two that Triton's ranges take."""
    return max(triton.next_power_of_2(size), 2)
