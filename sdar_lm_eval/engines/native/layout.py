"""The layout of a step: which blocks go through the model, and which masked positions a token is drawn for.

The host chooses the sizes of a step: S segments and M draws. A forecast (`forecast.py`) of these sizes can be too low.
Blocks are served in order, and a block that does not fit waits for the next step.

A decided block goes through the model once more, because the keys and values of its final tokens have to be stored: the
block is committed. The forward that first denoises the next block also commits the decided block, as a segment of its
own. Attention reads keys and values after all of them are written, so the next block sees the committed one.

Shapes: N slots and one more for padding, R blocks of slots (block r is of slot r % (N + 1)), L positions of a block,
S segments, M draws.
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
        pages: the row of the page table that the block's keys and values are addressed by.
    """

    slot: torch.Tensor
    start: torch.Tensor
    length: torch.Tensor
    following: torch.Tensor
    tokens: torch.Tensor
    pages: torch.Tensor


class Draws(NamedTuple):
    """Masked positions that a token is drawn for; (M,) each. Padding belongs to slot N.

    Attributes:
        slot: the slot of the position.
        row: the position's row among the S * L hidden states of the forward.
        number: (M, K), random numbers in [0, 1): of the block's step, and of the K - 1 steps behind it.
        temperature: the sequence's temperature; 1 for a greedy sequence.
        greedy: whether the sequence takes the most probable token.
        guessed: (M, W), tokens that only a guess has kept: the sequence has not seen them yet. Padded with the mask
            token; W is 0 where none of the blocks is a guess.
    """

    slot: torch.Tensor
    row: torch.Tensor
    number: torch.Tensor
    temperature: torch.Tensor
    greedy: torch.Tensor
    guessed: torch.Tensor


class Room(NamedTuple):
    """The room that R blocks have in a step; (R,) each.

    Attributes:
        fits: whether the block is active and fits into the step.
        segment: index of the block among the segments.
        first_draw: index of the block's first masked position among the draws.
    """

    fits: torch.Tensor
    segment: torch.Tensor
    first_draw: torch.Tensor

    @classmethod
    def empty(cls, rows: int, device: torch.device) -> Room:
        """Room of R = `rows` blocks, none of which fits."""
        fits = torch.zeros(rows, dtype=torch.bool, device=device)
        return cls(fits, *(torch.zeros(rows, dtype=torch.int64, device=device) for _ in range(2)))


def choose_segments(
    blocks: Blocks, settings: Settings, room: Room, index: torch.Tensor, pages: torch.Tensor | None = None
) -> Segments:
    """Choose the blocks of a forward, in order. An uncommitted block precedes its successor. Writes to `room`.

    Args:
        blocks: R blocks; the last one is never active.
        settings: of N + 1 slots.
        room: of the R blocks.
        index: (S,), 0 to S - 1. Blocks that do not fit are left out; segments without a block are padding.
        pages: (R,), rows of the page table; None: the slots.
    """
    slots = len(settings.length)
    ends = (blocks.active * (1 + blocks.uncommitted.long())).cumsum(0)
    room.fits.copy_(blocks.active & (ends <= len(index)))
    room.segment.copy_(ends - 1)
    owner = _owner(ends, room.fits, index)
    slot = owner % slots
    commits = blocks.uncommitted[owner] & (index == ends[owner] - 2)
    real = owner != len(ends) - 1
    length = settings.length[slot] * real
    start = blocks.start[owner] - torch.where(commits, length, 0)
    following = torch.where(commits, 2, (~blocks.uncommitted[owner]).long()) * real
    tokens = torch.where(commits[:, None], blocks.previous[owner], blocks.tokens[owner])
    return Segments(slot, start, length, following, tokens, slot if pages is None else pages[owner])


def choose_draws(
    blocks: Blocks,
    settings: Settings,
    room: Room,
    index: torch.Tensor,
    numbers: int = 1,
    guessed: torch.Tensor | None = None,
) -> Draws:
    """Choose the masked positions to draw tokens for. A block whose positions do not all fit waits. Writes to `room`.

    Args:
        blocks: R blocks; the last one is never active.
        settings: of N + 1 slots.
        room: of the R blocks.
        index: (M,), 0 to M - 1. Draws without a position are padding.
        numbers: K, random numbers of a draw.
        guessed: (R, W), tokens that only a guess has kept; None: no block is a guess.
    """
    slots, block = len(settings.length), blocks.tokens.shape[1]
    masked = blocks.masked & room.fits[:, None]
    wanted = masked.sum(1)
    ends = wanted.cumsum(0)
    room.fits.logical_and_(ends <= len(index))
    room.first_draw.copy_(ends - wanted)
    owner = _owner(ends, room.fits, index)
    slot = owner % slots
    number = index - room.first_draw[owner]  # index of the position among the block's masked positions
    column = (masked.cumsum(1)[owner] <= number[:, None]).sum(1).clamp(max=block - 1)
    row = torch.where(owner == len(ends) - 1, 0, room.segment[owner] * block + column)
    step = (blocks.step[owner][:, None] + torch.arange(numbers, device=ends.device)).clamp(max=block - 1)
    drawn = uniform(settings.seed[slot][:, None], (blocks.start[owner] + column)[:, None], step, DRAW)
    unseen = step.new_empty(len(index), 0) if guessed is None else guessed[owner]
    return Draws(slot, row, drawn, settings.temperature[slot], settings.greedy[slot], unseen)


def _owner(ends: torch.Tensor, fits: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The block that owns each index: block r owns ends[r - 1] <= index < ends[r]. R - 1 where r does not fit."""
    owner = (ends[:, None] <= index).sum(0).clamp(max=len(ends) - 1)
    return torch.where(fits[owner], owner, len(ends) - 1)
