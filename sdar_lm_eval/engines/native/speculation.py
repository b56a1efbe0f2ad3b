"""Lossless speculation: one forward runs the blocks of the batch and guesses of their next states.

A step draws a token for every masked position, and the strategy keeps some of them. The random numbers of the next
steps are known. So the step's logits give guesses of the next states: the states that the block would pass through if
the logits did not change. The next forward runs the true block and the guessed ones, as segments of their own. Then the
walk follows the truth: if a guess equals the state that came about, the guess's draws are the next step's draws.
Otherwise the guess is discarded. So tokens, steps and confidences are those of decoding without guesses.

The guess of a decided block is the pair of this block and the next one: the decided block is committed, and the next
block is all masked. No guess follows the pair, because the pair's second block has no logits yet.

Guesses must not overwrite the keys and values of true blocks. So a guess has a row of the page table of its own, whose
pages are the slot's pages before the block, and private ones from there on (`PagedCache.lay_out_guesses`).

Lossless speculation for other diffusion models: SSD (arXiv 2510.04147).

Shapes: N slots and one more for padding, G levels of guesses, L positions of a block, M draws of K = G + 1 tokens each.
Level g holds the guesses of the states after g more steps; level 0 is the truth. R = (G + 1) * (N + 1) blocks of all
levels, level after level.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from sdar_lm_eval.engines.native.batch import BatchState, Guesses, Outcome, draws_of, packed, packed_size, unpack
from sdar_lm_eval.engines.native.compiling import compiled_rows
from sdar_lm_eval.engines.native.forward.cache import Addresses, PagedCache
from sdar_lm_eval.engines.native.layout import Draws, Room, Segments, choose_draws, choose_segments
from sdar_lm_eval.engines.native.transfer import to_device
from sdar_lm_eval.engines.native.transition import Blocks, Changes, Drawn, Settings

MOST_GUESSES = 256  # of a forward: each has private pages, and speculation pays for few sequences only


class Speculation:
    """The guesses of a batch.

    Args:
        batch: the state of the batch.
        most: G.
        device: the device of all tensors.
    """

    def __init__(self, batch: BatchState, most: int, device: torch.device) -> None:
        self.batch, self.most = batch, most
        self.most_guesses = most_guesses(batch.slots, most)
        self.depth = torch.tensor(most, device=device)  # levels that the next forward runs, at most G
        self.guesses = Blocks(*(torch.zeros(most, *f.shape, dtype=f.dtype, device=device) for f in batch.blocks))
        # Of the last forward
        rows = (batch.slots + 1) * (most + 1)
        self.room = Room.empty(rows, device)
        self.pages = torch.zeros(rows, dtype=torch.int64, device=device)  # each block's row of the page table
        # For each level the outcome of its step, and `Guesses`
        width = packed_size(batch.slots, batch.block) + 3 * batch.slots
        self.packed = torch.zeros(most + 1, width, dtype=torch.int32, device=device)

    def forget(self, slots: Sequence[int]) -> None:
        """Discard the guesses of slots."""
        self.guesses.active[:, to_device(np.array(slots), self.packed.device)] = False

    def unpack(self, rows: NDArray[np.int32]) -> Outcome:
        """Read the outcomes of all levels from a copy of `packed` on the host, which has to stay as it is."""
        slots, block = self.batch.slots, self.batch.block
        size = packed_size(slots, block)
        first, *later = (unpack(row[:size], slots, block) for row in rows)
        guesses = []
        for row in rows[1:]:
            ran, segments, draws = row[size:].reshape(3, slots)
            guesses.append(Guesses(ran.astype(np.bool_), segments, draws))
        return dataclasses.replace(first, later=tuple(later), guesses=tuple(guesses))


def most_guesses(slots: int, most: int) -> int:
    """The most guesses of a forward, for N slots and G levels."""
    return min(slots * most, MOST_GUESSES)


# A step: four functions, each compiled on a GPU


class Advanced(NamedTuple):
    """What a step makes of the batch, before anything is written.

    Attributes:
        blocks: the true states after the walk, N + 1 rows.
        guesses: of the next states, G levels.
        packed: the outcomes of all levels, and `Guesses`.
        token, kept: (R, L), what was drawn, and the positions that keep it.
        source, target: the keys and values of blocks that right guesses committed: `PagedCache.copy`'s arguments.
    """

    blocks: Blocks
    guesses: Blocks
    packed: torch.Tensor
    token: torch.Tensor
    kept: torch.Tensor
    source: torch.Tensor
    target: torch.Tensor


def lay_out_guesses(
    speculation: Speculation, cache: PagedCache, numbers: torch.Tensor
) -> tuple[Segments, Addresses, torch.Tensor, torch.Tensor]:
    """The segments of a step with guesses, and the addresses of their tokens.

    Args:
        speculation: the guesses, and the batch.
        cache: the KV cache.
        numbers: (S,), 0 to S - 1.

    Returns:
        S segments, their addresses, and the keys and values to copy first: `PagedCache.copy`'s arguments.
    """
    batch, rows = speculation.batch, speculation.batch.slots + 1
    blocks = _all_levels(speculation)
    index = torch.arange(len(blocks.active), device=blocks.active.device)
    level, slot = index // rows, index % rows
    guessed = blocks.active & (level > 0) & (level <= speculation.depth) & batch.active[slot]
    ends = guessed.cumsum(0)
    guessed &= ends <= speculation.most_guesses
    pages = torch.where(guessed, rows + ends - 1, slot)
    speculation.pages.copy_(pages)
    active = torch.where(level == 0, blocks.active, guessed)
    segments = choose_segments(blocks._replace(active=active), batch.settings, speculation.room, numbers, pages)

    # The guesses in order. The pages of each are its own from its first segment's block on.
    owner = (ends[:, None] <= torch.arange(speculation.most_guesses, device=ends.device)).sum(0)
    real, owner = owner < len(ends), owner.clamp(max=len(ends) - 1)
    first = blocks.start[owner] - torch.where(blocks.uncommitted[owner], batch.length[slot[owner]], 0)
    source, target = cache.lay_out_guesses(
        torch.where(real, slot[owner], batch.slots), torch.where(real, first, 0)
    )  # fmt: skip
    offsets = batch.transition.offsets
    addresses = cache.addresses(segments.pages, segments.start, segments.length, segments.length, offsets)
    return segments, addresses, source, target


def masked_positions(speculation: Speculation, numbers: torch.Tensor) -> Draws:
    """Choose the masked positions to draw tokens for; `numbers` (M,) are 0 to M - 1. See `choose_draws`."""
    batch, blocks = speculation.batch, _all_levels(speculation)
    guessed = None
    if batch.seen is not None:
        before = torch.where(blocks.uncommitted[:, None], blocks.previous, batch.mask_token_id)
        guessed = torch.cat([blocks.tokens, before], dim=1)
    return choose_draws(blocks, batch.settings, speculation.room, numbers, speculation.most + 1, guessed)


def advance(
    speculation: Speculation, cache: PagedCache, token: torch.Tensor, confidence: torch.Tensor, entropy: torch.Tensor
) -> Advanced:
    """Walk along the guesses that were right, and guess the next states. Writes nothing.

    Args:
        speculation: the guesses, and the batch.
        cache: the KV cache.
        token, confidence: (M, K), what was drawn for the positions of `masked_positions`.
        entropy: (M,).
    """
    batch, levels, rows = speculation.batch, speculation.most + 1, speculation.batch.slots + 1
    room, blocks = speculation.room, _all_levels(speculation)
    draw = draws_of(blocks.masked & room.fits[:, None], room.first_draw, len(token))  # (R, L)
    settings = Settings(*(torch.cat([field] * levels) for field in batch.settings))
    drawn = Drawn(token[:, 0][draw], confidence[:, 0][draw], entropy[draw])
    # The step of each level, as if its guesses were right
    after, changes = batch.transition(blocks, settings, room.fits, drawn)
    follows = torch.cat([room.fits[:rows], room.fits[rows:] & _leads_to(after, changes, blocks, rows)])
    took_part = follows.view(levels, rows).long().cumprod(0).bool()
    last = (took_part.sum(0) - 1).clamp(min=0)  # (N + 1,), the level that the walk comes to
    confidences, of_blocks = _confidences(batch, changes, drawn, took_part)
    changes = _of_walk(changes, took_part)._replace(confidence=confidences)
    # torch 2.11 cannot compile a function that returns what `_replace` made, so `_replace` comes first.
    after = Blocks(*(_at(field, last) for field in after._replace(confidence=of_blocks)))

    sound = took_part[0] & ~_at(changes.stuck, last)
    guesses, sizes = _guess(speculation, after, sound, token, confidence, entropy, _at(draw, last))
    ran = room.fits.view(levels, rows)[:, :-1].int()
    outcomes = torch.cat([packed(changes, levels), ran, sizes], dim=1)
    committed = _committed(speculation, cache, changes.committed, blocks.start)
    return Advanced(after, guesses, outcomes, drawn.token, changes.kept, *committed)


def write(speculation: Speculation, advanced: Advanced) -> None:
    """Write what a step makes of the batch, and its outcomes to `packed`.

    All that needs much memory is done before: a step that runs out of memory leaves the batch as it was.
    """
    _see(speculation.batch, advanced.token, advanced.kept, speculation.most + 1)
    speculation.guesses.write(advanced.guesses)
    speculation.packed.copy_(advanced.packed)
    speculation.batch.blocks.write(advanced.blocks)


def _all_levels(speculation: Speculation) -> Blocks:
    """The blocks of all levels, R rows."""
    both = zip(speculation.batch.blocks, speculation.guesses, strict=True)
    return Blocks(*(torch.cat([truth, guesses.flatten(0, 1)]) for truth, guesses in both))


def _at(fields: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
    """Each slot's row at its level (N + 1,): (R, ...) -> (N + 1, ...)."""
    return fields[level * len(level) + torch.arange(len(level), device=level.device)]


def _leads_to(after: Blocks, changes: Changes, blocks: Blocks, rows: int) -> torch.Tensor:
    """Whether each level's step leads to the guess of the next level, G * (N + 1) rows.

    A pair's first block counts as well: its tokens are committed.
    """
    truth, guess = (Blocks(*(f[part] for f in b)) for b, part in ((after, slice(-rows)), (blocks, slice(rows, None))))
    tokens = (truth.tokens == guess.tokens) & (truth.masked == guess.masked)
    before = (truth.previous == guess.previous) | ~truth.uncommitted[:, None]
    same = (tokens & before).all(dim=1) & (truth.start == guess.start) & (truth.uncommitted == guess.uncommitted)
    return same & truth.active & ~changes.stuck[:-rows]


def _of_walk(changes: Changes, took_part: torch.Tensor) -> Changes:
    """The changes of the slots that took part, (G + 1, N + 1) bool."""
    mine = took_part.flatten()
    flags = {name: getattr(changes, name) & mine for name in ("took_part", "committed", "decided", "stuck", "goes_on")}
    return changes._replace(**flags, kept=changes.kept & mine[:, None])


def _confidences(
    batch: BatchState, changes: Changes, drawn: Drawn, took_part: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The confidences after each level's step, and those of the blocks behind that step; (R, L) both.

    A token's confidence is that of the true state that it was drawn for, never that of the guess.
    """
    levels, rows = took_part.shape
    now, after, of_blocks = batch.confidence, [], []
    for level in range(levels):
        here = slice(level * rows, (level + 1) * rows)
        kept = changes.kept[here] & took_part[level][:, None]
        after.append(torch.where(kept, drawn.confidence[here], now))
        now = torch.where((changes.goes_on[here] & took_part[level])[:, None], 1.0, after[-1])
        of_blocks.append(now)
    return torch.cat(after), torch.cat(of_blocks)


def _guess(
    speculation: Speculation,
    truth: Blocks,
    wanted: torch.Tensor,
    token: torch.Tensor,
    confidence: torch.Tensor,
    entropy: torch.Tensor,
    draw: torch.Tensor,
) -> tuple[Blocks, torch.Tensor]:
    """Guess the states behind the true ones.

    Args:
        speculation: the guesses, and the batch.
        truth: the true states.
        wanted: (N + 1,) bool, slots with finite logits.
        token, confidence, entropy: see `advance`.
        draw: (N + 1, L), index of the draw of each position, among those of the last true state that ran.

    Returns:
        The guesses of G levels (G, N + 1, ...), and `Guesses.segments` and `Guesses.draws` (G + 1, 2 N) int32.
    """
    batch, blocks, found = speculation.batch, truth, []
    sizes = [torch.zeros(2 * batch.slots, dtype=torch.int32, device=draw.device)]
    entropies = entropy[draw]
    for step in range(1, speculation.most + 1):
        # No guess follows a pair: its second block has no logits yet.
        wanted = wanted & blocks.active & ~blocks.uncommitted
        drawn = Drawn(token[:, step][draw], confidence[:, step][draw], entropies)
        blocks, changes = batch.transition(blocks, batch.settings, wanted, drawn)
        wanted = wanted & blocks.active & ~changes.stuck
        blocks = blocks._replace(active=wanted)
        found.append(blocks)
        segments, draws = wanted * (1 + blocks.uncommitted.int()), (blocks.masked & wanted[:, None]).sum(dim=1)
        sizes.append(torch.cat([segments[:-1], draws[:-1].int()]))
    return Blocks(*(torch.stack(fields) for fields in zip(*found, strict=True))), torch.stack(sizes)


def _see(batch: BatchState, token: torch.Tensor, kept: torch.Tensor, levels: int) -> None:
    """Take note of the kept tokens (R, L) of all levels."""
    for level in range(levels):
        here = slice(level * (batch.slots + 1), (level + 1) * (batch.slots + 1))
        batch.see(token[here], kept[here])


def _committed(
    speculation: Speculation, cache: PagedCache, committed: torch.Tensor, start: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the blocks that guesses committed have their keys and values, and where these belong.

    Args:
        speculation: the guesses, and the batch.
        cache: the KV cache.
        committed: (R,) bool, blocks whose predecessor was committed; level 0 wrote to the right place.
        start: (R,), position of each block's first token.
    """
    batch, rows = speculation.batch, speculation.batch.slots + 1
    levels = committed.view(-1, rows)[1:]
    level = levels.int().argmax(0) + 1  # a slot has one such level at most
    length = torch.where(levels.any(0), batch.length, 0)
    slot, offsets = torch.arange(rows, device=length.device), batch.transition.offsets
    first = torch.where(length > 0, _at(start, level) - length, 0)
    private = torch.where(length > 0, _at(speculation.pages, level), batch.slots)
    source = cache.addresses(private, first, length, length, offsets)
    target = cache.addresses(slot, first, length, length, offsets)
    return source.kv_slots, target.kv_slots


class Functions(NamedTuple):
    """The parts of a step, plain or compiled."""

    lay_out_guesses: Callable[
        [Speculation, PagedCache, torch.Tensor], tuple[Segments, Addresses, torch.Tensor, torch.Tensor]
    ] = lay_out_guesses
    masked_positions: Callable[[Speculation, torch.Tensor], Draws] = masked_positions
    advance: Callable[[Speculation, PagedCache, torch.Tensor, torch.Tensor, torch.Tensor], Advanced] = advance
    write: Callable[[Speculation, Advanced], None] = write

    def compiled(self, backend: str) -> Functions:
        """Each part compiled for one layout of the batch. With layouts of any size, torch would compile for minutes."""
        first = compiled_rows(self.lay_out_guesses, backend), compiled_rows(self.masked_positions, backend)
        return Functions(*first, compiled_rows(self.advance, backend), compiled_rows(self.write, backend))
