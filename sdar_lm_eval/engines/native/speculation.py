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

Shapes: N slots and one more for padding, G levels of guesses, L positions of a block, K = G + 1 draws of a position.
Level g holds the guess of the state after g more steps; level 0 is the truth.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from sdar_lm_eval.engines.native.batch import BatchState, Guesses, Outcome, draws_of, packed, packed_size, unpack
from sdar_lm_eval.engines.native.compiling import compiled
from sdar_lm_eval.engines.native.forward.cache import Addresses, PagedCache
from sdar_lm_eval.engines.native.layout import Draws, Room, Segments, choose_draws, choose_segments
from sdar_lm_eval.engines.native.transfer import to_device
from sdar_lm_eval.engines.native.transition import Blocks, Drawn

MOST_GUESSES = 256  # of a forward: each has private pages, and speculation pays for few sequences only
ALIGNED = 4  # int32 numbers of 16 bytes: kernels are compiled anew for tensors that begin elsewhere


class Level(NamedTuple):
    """The tensors of one level, each with memory of its own.

    Attributes:
        room: the room of the level's N + 1 blocks in the last forward.
        pages: (N + 1,), the row of the page table of each guess in the last forward; of level 0, the slots.
        outcome: the packed outcome of the level's step, and behind it which slots took part in the forward.
        sizes: (2 N,) int32, `Guesses.segments` and `Guesses.draws`.
    """

    room: Room
    pages: torch.Tensor
    outcome: torch.Tensor
    sizes: torch.Tensor


class Walk(NamedTuple):
    """Where the walk has come to.

    Attributes:
        took_part: (N + 1,) bool, slots that the last level's step advanced.
        sound: (N + 1,) bool, slots that this forward advanced, with finite logits.
        token, confidence: K times (N + 1, L), what the last true state's logits drew: for its own step, and for the
            K - 1 steps behind it.
        entropy: (N + 1, L), of this state's distributions.
        commits: (N + 1,), the row of the page table that has the slot's committed block; N where none is to be copied.
        commit_start: (N + 1,), position of this block's first token.
    """

    took_part: torch.Tensor
    sound: torch.Tensor
    token: tuple[torch.Tensor, ...]
    confidence: tuple[torch.Tensor, ...]
    entropy: torch.Tensor
    commits: torch.Tensor
    commit_start: torch.Tensor


class Speculation:
    """The guesses of a batch.

    Args:
        batch: the state of the batch.
        most: G.
        device: the device of all tensors.
    """

    def __init__(self, batch: BatchState, most: int, device: torch.device) -> None:
        self.batch, self.most = batch, most
        rows, slots = batch.slots + 1, batch.slots
        self.most_guesses = most_guesses(slots, most)
        self.depth = torch.tensor(most, device=device)  # levels that the next forward runs, at most G
        self.guesses = [Blocks(*(torch.zeros_like(field) for field in batch.blocks)) for _ in range(most)]
        self.room = Room.empty(rows * (most + 1), device)  # of all levels
        self.pages = torch.zeros(rows * (most + 1), dtype=torch.int64, device=device)  # the same as `Level.pages`
        self._outcome_size = packed_size(slots, batch.block) + slots
        begin = -(-self._outcome_size // ALIGNED) * ALIGNED
        width = begin + -(-2 * slots // ALIGNED) * ALIGNED
        self._sizes = slice(begin, begin + 2 * slots)
        self.packed = torch.zeros(most + 1, width, dtype=torch.int32, device=device)
        self.levels = [
            Level(
                Room.empty(rows, device), torch.zeros(rows, dtype=torch.int64, device=device),
                self.packed[level, : self._outcome_size], self.packed[level, self._sizes],
            )
            for level in range(most + 1)
        ]  # fmt: skip

    def forget(self, slots: Sequence[int]) -> None:
        """Discard the guesses of slots."""
        index = to_device(np.array(slots), self.packed.device)
        for guess in self.guesses:
            guess.active[index] = False

    def unpack(self, rows: NDArray[np.int32]) -> Outcome:
        """Read the outcomes of all levels from a copy of `packed` on the host, which has to stay as it is."""
        slots, block = self.batch.slots, self.batch.block
        size = packed_size(slots, block)
        first, *later = (unpack(row[:size], slots, block) for row in rows)
        guesses = (
            Guesses(row[size : size + slots].astype(np.bool_), *row[self._sizes].reshape(2, slots)) for row in rows[1:]
        )
        return dataclasses.replace(first, later=tuple(later), guesses=tuple(guesses))


def most_guesses(slots: int, most: int) -> int:
    """The most guesses of a forward, for N slots and G levels."""
    return min(slots * most, MOST_GUESSES) if most else 0


# A step. `torch.compile` compiles each function once for all levels.


def lay_out_guesses(
    speculation: Speculation, cache: PagedCache, count: int
) -> tuple[Segments, Addresses, torch.Tensor, torch.Tensor]:
    """The segments of a step with guesses, and the addresses of their tokens.

    Returns:
        S = `count` segments, their addresses, and the keys and values to copy first: `PagedCache.copy`'s arguments.
    """
    batch, rows = speculation.batch, speculation.batch.slots + 1
    blocks = _all_levels(speculation)
    level = torch.arange(len(blocks.active), device=blocks.active.device) // rows
    guessed = blocks.active & (level > 0) & (level <= speculation.depth) & batch.active.repeat(speculation.most + 1)
    number = guessed.cumsum(0) - 1
    guessed &= number < speculation.most_guesses
    active = torch.where(level == 0, blocks.active, guessed)
    slot = torch.arange(len(active), device=active.device) % rows
    pages = torch.where(guessed, rows + number, slot)
    speculation.pages.copy_(pages)
    segments = choose_segments(blocks._replace(active=active), batch.settings, speculation.room, count, pages)

    # The guesses in order, and where the pages of each are its own: from its first segment's block on.
    index = torch.arange(speculation.most_guesses, device=active.device)
    owner = (guessed.cumsum(0)[:, None] <= index).sum(0).clamp(max=len(active) - 1)
    first = blocks.start[owner] - torch.where(blocks.uncommitted[owner], batch.length[owner % rows], 0)
    real = owner < len(active) - 1
    source, target = cache.lay_out_guesses(torch.where(real, owner % rows, batch.slots), torch.where(real, first, 0))
    addresses = cache.addresses(
        segments.pages, segments.start, segments.length, segments.length, batch.transition.offsets
    )
    return segments, addresses, source, target


def masked_positions(speculation: Speculation, count: int) -> Draws:
    """Choose the masked positions to draw tokens for, M = `count`; see `choose_draws`."""
    batch, rows = speculation.batch, speculation.batch.slots + 1
    blocks = _all_levels(speculation)
    guessed = None
    if batch.seen is not None:
        before = torch.where(blocks.uncommitted[:, None], blocks.previous, batch.mask_token_id)
        guessed = torch.cat([blocks.tokens, before], dim=1)
    draws = choose_draws(blocks, batch.settings, speculation.room, count, speculation.most + 1, guessed)
    for number, level in enumerate(speculation.levels):
        here = slice(number * rows, (number + 1) * rows)
        for part, whole in zip((*level.room, level.pages), (*speculation.room, speculation.pages), strict=True):
            part.copy_(whole[here])
    return draws


def _all_levels(speculation: Speculation) -> Blocks:
    """The blocks of all levels, (G + 1) * (N + 1) rows."""
    levels = zip(speculation.batch.blocks, *speculation.guesses, strict=True)
    return Blocks(*(torch.cat(fields) for fields in levels))


def walk(
    batch: BatchState, level: Level, guess: Blocks | None, before: Walk | None, drawn: tuple[torch.Tensor, ...]
) -> Walk:
    """Advance the slots whose true state is a level's state. Writes the level's outcome.

    Args:
        batch: the state of the batch.
        level: the level.
        guess: the level's guesses; None: level 0.
        before: where the walk has come to by the levels before; None: level 0.
        drawn: tokens (M, K), confidences (M, K) and entropies (M,) of all draws.
    """
    truth, took_part = batch.blocks, level.room.fits
    if guess is not None and before is not None:
        took_part = took_part & before.took_part & before.sound & truth.active & _same(truth, guess)
    token, confidence, entropy = drawn
    draw = draws_of(truth.masked & took_part[:, None], level.room.first_draw, len(token))
    tokens, confidences = (tuple(column[draw] for column in each.unbind(1)) for each in (token, confidence))
    entropies = entropy[draw]
    previous_start = truth.start - batch.length
    changes = batch.step_by(took_part, Drawn(tokens[0], confidences[0], entropies))
    level.outcome.copy_(torch.cat([packed(changes), level.room.fits[:-1].int()]))
    sound = took_part & ~changes.stuck
    if before is None:
        nothing = torch.full_like(previous_start, batch.slots)
        return Walk(took_part, sound, tokens, confidences, entropies, nothing, torch.zeros_like(nothing))
    here = took_part[:, None]
    return Walk(
        took_part,
        torch.where(took_part, sound, before.sound),
        tuple(torch.where(here, new, old) for new, old in zip(tokens, before.token, strict=True)),
        tuple(torch.where(here, new, old) for new, old in zip(confidences, before.confidence, strict=True)),
        torch.where(here, entropies, before.entropy),
        torch.where(changes.committed, level.pages, before.commits),
        torch.where(changes.committed, previous_start, before.commit_start),
    )


def _same(truth: Blocks, guess: Blocks) -> torch.Tensor:
    """Whether a guess is the true state, (N + 1,) bool. A pair's first block counts: its tokens are committed."""
    tokens = (truth.tokens == guess.tokens) & (truth.masked == guess.masked)
    before = (truth.previous == guess.previous) | ~truth.uncommitted[:, None]
    return (
        (tokens & before).all(dim=1) & (truth.start == guess.start) & (truth.uncommitted == guess.uncommitted)
    )  # fmt: skip


def guess_next(
    batch: BatchState, blocks: Blocks, wanted: torch.Tensor, drawn: Drawn, target: Blocks, level: Level
) -> torch.Tensor:
    """Guess the states after one more step. Writes them to `target`, and the level's `sizes`.

    Args:
        batch: the state of the batch.
        blocks: the true states, or the guesses of the level before.
        wanted: (N + 1,) bool, slots with a state to guess from, and draws for its masked positions.
        drawn: what the true state's logits drew with the random numbers of this step.
        target: the level's guesses.
        level: the level.

    Returns:
        (N + 1,) bool, slots with a guess.
    """
    wanted = wanted & blocks.active & ~blocks.uncommitted
    after, changes = batch.transition(blocks, batch.settings, wanted, drawn)
    found = wanted & after.active & ~changes.stuck
    target.write(after._replace(active=found))
    segments, draws = found * (1 + after.uncommitted.int()), (after.masked & found[:, None]).sum(dim=1)
    level.sizes.copy_(torch.cat([segments[:-1].int(), draws[:-1].int()]))
    return found


def committed_by_walk(batch: BatchState, cache: PagedCache, end: Walk) -> tuple[torch.Tensor, torch.Tensor]:
    """The keys and values of blocks that guesses committed: `PagedCache.copy`'s arguments."""
    length = torch.where(end.commits == batch.slots, 0, batch.length)
    slot = torch.arange(batch.slots + 1, device=length.device)
    offsets = batch.transition.offsets
    source = cache.addresses(end.commits, end.commit_start, length, length, offsets)
    target = cache.addresses(slot, end.commit_start, length, length, offsets)
    return source.kv_slots, target.kv_slots


class Functions(NamedTuple):
    """The parts of a step, plain or compiled."""

    lay_out_guesses: Callable[
        [Speculation, PagedCache, int], tuple[Segments, Addresses, torch.Tensor, torch.Tensor]
    ] = lay_out_guesses
    masked_positions: Callable[[Speculation, int], Draws] = masked_positions
    walk: Callable[[BatchState, Level, Blocks | None, Walk | None, tuple[torch.Tensor, ...]], Walk] = walk
    guess_next: Callable[[BatchState, Blocks, torch.Tensor, Drawn, Blocks, Level], torch.Tensor] = guess_next
    committed_by_walk: Callable[[BatchState, PagedCache, Walk], tuple[torch.Tensor, torch.Tensor]] = committed_by_walk

    def compiled(self, backend: str) -> Functions:
        """Each part compiled: see `compiling.py`."""
        return Functions(
            compiled(self.lay_out_guesses, backend), compiled(self.masked_positions, backend),
            compiled(self.walk, backend), compiled(self.guess_next, backend), compiled(self.committed_by_walk, backend),
        )  # fmt: skip


def advance(speculation: Speculation, cache: PagedCache, functions: Functions, drawn: tuple[torch.Tensor, ...]) -> None:
    """Walk along the guesses that were right, and guess the next states. Writes the outcomes to `packed`.

    Args:
        speculation: the guesses, and the batch.
        cache: the KV cache. Blocks that guesses committed move to the pages of their slots.
        functions: the parts of a step.
        drawn: tokens (M, K), confidences (M, K) and entropies (M,) for the positions of `masked_positions`.
    """
    batch, levels = speculation.batch, speculation.levels
    end = functions.walk(batch, levels[0], None, None, drawn)
    for level, guess in zip(levels[1:], speculation.guesses, strict=True):
        end = functions.walk(batch, level, guess, end, drawn)
    cache.copy(*functions.committed_by_walk(batch, cache, end))
    blocks, wanted = batch.blocks, end.sound
    for number, guess in enumerate(speculation.guesses, start=1):
        next_drawn = Drawn(end.token[number], end.confidence[number], end.entropy)
        wanted = functions.guess_next(batch, blocks, wanted, next_drawn, guess, levels[number])
        blocks = guess
