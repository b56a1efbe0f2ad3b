"""The layout of a step: which blocks go through the model, and which masked positions a token is drawn for.

The host chooses the sizes of a step: S segments and M draws. A forecast (`forecast.py`) of these sizes can be too low.
Slots are served in order, and a slot that does not fit waits for a later step.

A decided block goes through the model once more, because the keys and values of its final tokens have to be stored: the
block is committed. The forward that first denoises the next block also commits the decided block, as a segment of its
own. Attention reads keys and values after all of them are written, so the next block sees the committed one.

Shapes: N slots and one more for padding, L positions of a block, S segments, M draws.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from sdar_lm_eval.engines.native.random_numbers import DRAW, uniform
from sdar_lm_eval.engines.native.transition import Blocks, Settings


class Segments(NamedTuple):
    """Blocks that go through the model in one forward; (S,) each.

    Attributes:
        slot: the slot that the block belongs to; N for padding.
        start: position of the block's first token in the sequence.
        length: tokens of the block; 0 for padding.
        following: number of consecutive segments of this sequence from this one on, where it is the sequence's first: 2
            for a block to be committed, 1 for a block without a predecessor to be committed. 0 for any other segment.
        tokens: (S, L).
    """

    slot: torch.Tensor
    start: torch.Tensor
    length: torch.Tensor
    following: torch.Tensor
    tokens: torch.Tensor


class Draws(NamedTuple):
    """Masked positions that a token is drawn for; (M,) each. Padding belongs to slot N.

    Attributes:
        slot: the slot of the position.
        row: the position's row among the S * L hidden states of the forward.
        number: a random number in [0, 1).
        temperature: the sequence's temperature; 1 for a greedy sequence.
        greedy: whether the sequence takes the most probable token.
    """

    slot: torch.Tensor
    row: torch.Tensor
    number: torch.Tensor
    temperature: torch.Tensor
    greedy: torch.Tensor


class Room(NamedTuple):
    """The room that each slot has in a step; (N + 1,) each.

    Attributes:
        fits: whether the slot is active and fits into the step.
        segment: index of the slot's current block among the segments.
        first_draw: index of the slot's first masked position among the draws.
    """

    fits: torch.Tensor
    segment: torch.Tensor
    first_draw: torch.Tensor


def choose_segments(blocks: Blocks, settings: Settings, room: Room, count: int) -> Segments:
    """Choose the blocks of a forward, in order of slots. An uncommitted block precedes its successor. Writes to `room`.

    Args:
        blocks: the current blocks.
        settings: the slots' settings.
        room: the step's room for each slot.
        count: S. Slots whose blocks do not fit are left out; segments without a block are padding.
    """
    ends = (blocks.active * (1 + blocks.uncommitted.long())).cumsum(0)
    room.fits.copy_(blocks.active & (ends <= count))
    room.segment.copy_(ends - 1)
    index = torch.arange(count, device=ends.device)
    slot = _owner(ends, room.fits, index)
    commits = blocks.uncommitted[slot] & (index == ends[slot] - 2)
    real = slot != len(ends) - 1
    length = settings.length[slot] * real
    start = blocks.start[slot] - torch.where(commits, length, 0)
    following = torch.where(commits, 2, (~blocks.uncommitted[slot]).long()) * real
    tokens = torch.where(commits[:, None], blocks.previous[slot], blocks.tokens[slot])
    return Segments(slot, start, length, following, tokens)


def choose_draws(blocks: Blocks, settings: Settings, room: Room, count: int) -> Draws:
    """Choose the masked positions to draw tokens for. A slot whose positions do not all fit waits. Writes to `room`.

    Args:
        blocks: the current blocks.
        settings: the slots' settings.
        room: the step's room for each slot, as `choose_segments` left it.
        count: M. Draws without a position are padding.
    """
    masked = blocks.masked & room.fits[:, None]
    wanted = masked.sum(1)
    ends = wanted.cumsum(0)
    room.fits.logical_and_(ends <= count)
    room.first_draw.copy_(ends - wanted)
    index = torch.arange(count, device=ends.device)
    slot = _owner(ends, room.fits, index)
    block = masked.shape[1]
    number = index - room.first_draw[slot]  # index of the position among the slot's masked positions
    column = (masked.cumsum(1)[slot] <= number[:, None]).sum(1).clamp(max=block - 1)
    row = torch.where(slot == len(ends) - 1, 0, room.segment[slot] * block + column)
    drawn = uniform(settings.seed[slot], blocks.start[slot] + column, blocks.step[slot], DRAW)
    return Draws(slot, row, drawn, settings.temperature[slot], settings.greedy[slot])


def _owner(ends: torch.Tensor, fits: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The slot that owns each index: slot n owns ends[n - 1] <= index < ends[n]. N where the slot does not fit."""
    slot = (ends[:, None] <= index).sum(0).clamp(max=len(ends) - 1)
    return torch.where(fits[slot], slot, len(ends) - 1)
