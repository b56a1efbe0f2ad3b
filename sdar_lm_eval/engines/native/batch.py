"""The state of the batch on the device: a slot for each running sequence.

A slot holds a sequence's current block, a mask of the block's masked positions, and the sequence's settings. A step of
the engine calls three methods:

    segments           chooses the blocks that go through the model (`layout.py`)
    masked_positions   chooses the positions that a token is drawn for (`layout.py`)
    advance            keeps some of the drawn tokens, by each sequence's strategy (`transition.py`)

The methods run on the device; the host reads an `Outcome` later. On a GPU `torch.compile` makes a few kernels of each
method, and a CUDA graph replays these kernels. So the methods have fixed shapes and never read a value on the host.

Shapes: N slots and one more for padding, L positions of a block, S segments, M draws.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from sdar_lm_eval.engines.native.layout import Draws, Room, Segments, choose_draws, choose_segments
from sdar_lm_eval.engines.native.scheduler import SequenceState
from sdar_lm_eval.engines.native.strategies import STRATEGIES, codes
from sdar_lm_eval.engines.native.transfer import to_device
from sdar_lm_eval.engines.native.transition import Blocks, Changes, Drawn, Settings, Transition

NO_TOKEN = -1


@dataclass(frozen=True)
class Guesses:
    """What is known of the guesses of one level, on the host; (N,) each.

    Attributes:
        ran: slots whose guess went through the model.
        segments: segments that the slot's guess for the next forward takes; 0 where there is none.
        draws: masked positions of this guess.
    """

    ran: NDArray[np.bool_]
    segments: NDArray[np.int32]
    draws: NDArray[np.int32]


@dataclass(frozen=True)
class Outcome:
    """The result of a step, on the host. Arrays have a row for each slot.

    Attributes:
        tokens: (N, L), the blocks after the step, before the next block begins.
        unmasked_at: (N, L), the step that unmasked each token; -1 for tokens of the prompt.
        confidence: (N, L), the probability of each token at that step.
        took_part: (N,), slots whose block was denoised.
        committed: (N,), slots whose previous block was committed in the same forward.
        decided: (N,), slots whose block has no masked position before the end of the answer: its first stop token, or
            its length limit.
        stuck: (N,), slots whose logits are not finite, so that no position was unmasked.
        goes_on: (N,), slots that have begun the next block.
        masked: (N,), number of positions of the block that are still masked; 0 where the block is decided.
        later: outcomes of the next steps, which ran in the same forward because their states were guessed.
        guesses: of each level of guesses; empty without speculation.
    """

    tokens: NDArray[np.int32]
    unmasked_at: NDArray[np.int32]
    confidence: NDArray[np.float32]
    took_part: NDArray[np.bool_]
    committed: NDArray[np.bool_]
    decided: NDArray[np.bool_]
    stuck: NDArray[np.bool_]
    goes_on: NDArray[np.bool_]
    masked: NDArray[np.int32]
    later: tuple[Outcome, ...] = ()
    guesses: tuple[Guesses, ...] = ()

    @property
    def steps_of_a_sequence(self) -> float:
        """Denoising steps of a sequence that took part, on average; 0 where none did."""
        ran, *more = (int(step.took_part.sum()) for step in (self, *self.later))
        return (ran + sum(more)) / max(ran, 1)


class BatchState:
    """The state of N slots, on a device.

    Args:
        slots: N.
        block: L, the longest block length.
        stops: most stop tokens of a sequence.
        vocabulary: V.
        mask_token_id: the token at masked positions.
        strategies: names of the strategies that sequences may have.
        penalized: whether sequences may have a repetition penalty, which needs a table of N x V seen tokens.
        device: the device of all tensors.
    """

    def __init__(
        self,
        slots: int,
        block: int,
        stops: int,
        vocabulary: int,
        mask_token_id: int,
        *,
        strategies: frozenset[str],
        penalized: bool,
        device: torch.device,
    ) -> None:
        rows = slots + 1
        self.slots, self.block, self._vocabulary = slots, block, vocabulary
        self.mask_token_id, self._device = mask_token_id, device
        self.needs_entropy = any(STRATEGIES[name].needs_entropy for name in strategies)
        self.transition = Transition(block, mask_token_id, strategies, device)

        def integers(*shape: int, value: int = 0) -> torch.Tensor:
            return torch.full(shape, value, dtype=torch.int64, device=device)

        def floats(*shape: int, value: float) -> torch.Tensor:
            return torch.full(shape, value, dtype=torch.float32, device=device)

        def flags(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.bool, device=device)

        # The current block: (N + 1, L)
        self.tokens = integers(rows, block, value=mask_token_id)
        self.masked = flags(rows, block)
        self.unmasked_at = integers(rows, block, value=-1)
        self.confidence = floats(rows, block, value=1)
        self.previous = integers(rows, block, value=mask_token_id)  # the block before, where it is uncommitted
        # (N + 1,)
        self.active = flags(rows)
        self.uncommitted = flags(rows)
        self.start = integers(rows)
        self.step = integers(rows)
        self.given = integers(rows)  # leading tokens of the block that belong to the prompt
        self.remaining = integers(rows)  # new tokens that the answer may still get, from this block on
        self.room = Room.empty(rows, device)  # between the methods of a step
        # Settings
        self.length = integers(rows)
        self.strategy = integers(rows)  # the strategy's code
        self.setting = floats(rows, value=0)  # the value of the strategy's setting
        self.quotas = integers(rows, block, value=1)  # (N + 1, steps)
        self.stop_ids = integers(rows, max(stops, 1), value=NO_TOKEN)
        self.seed = integers(rows)
        self.greedy = ~flags(rows)
        self.top_k = integers(rows)
        self.top_p = floats(rows, value=1)
        self.temperature = floats(rows, value=1)
        self.penalty = floats(rows, value=1)
        self.seen = flags(rows, vocabulary) if penalized else None
        self.packed = torch.zeros(packed_size(slots, block), dtype=torch.int32, device=device)  # an outcome

    # Changes by the host

    def begin(self, sequences: Sequence[SequenceState]) -> None:
        """Write sequences to their slots. The current block of a sequence is the one after its last full block."""
        slot = to_device(np.array([sequence.slot for sequence in sequences]), self._device)
        requests = [sequence.request for sequence in sequences]
        decodings = [request.decoding for request in requests]
        strategies, code = [STRATEGIES[decoding.remasking_strategy] for decoding in decodings], codes()
        given = np.array([len(sequence.tokens) - sequence.block_start for sequence in sequences])
        length = np.array([decoding.block_length for decoding in decodings])
        column = np.arange(self.block)
        values: dict[str, ArrayLike] = {
            "tokens": _padded((s.tokens[s.block_start :] for s in sequences), self.block, self.mask_token_id),
            "masked": (column >= given[:, None]) & (column < length[:, None]),
            "unmasked_at": np.full((len(sequences), self.block), -1),
            "confidence": np.ones((len(sequences), self.block)),
            "active": np.ones(len(sequences)),
            "uncommitted": np.zeros(len(sequences)),
            "start": [sequence.block_start for sequence in sequences],
            "step": np.zeros(len(sequences)),
            "given": given,
            "remaining": [sequence.request.max_new_tokens - sequence.num_new_tokens for sequence in sequences],
            "length": length,
            "strategy": [code[strategy.name] for strategy in strategies],
            "setting": [
                getattr(d, s.setting) if s.setting else 0.0 for d, s in zip(decodings, strategies, strict=True)
            ],
            "quotas": _padded((decoding.quotas for decoding in decodings), self.block, 1),
            "stop_ids": _padded((sorted(request.stop_ids) for request in requests), self.stop_ids.shape[1], NO_TOKEN),
            "seed": np.array([request.seed & (2**64 - 1) for request in requests], dtype=np.uint64).astype(np.int64),
            "greedy": [decoding.greedy for decoding in decodings],
            "top_k": [0 if decoding.greedy else min(decoding.top_k, self._vocabulary) for decoding in decodings],
            "top_p": [1.0 if decoding.greedy else decoding.top_p for decoding in decodings],
            "temperature": [1.0 if decoding.greedy else decoding.temperature for decoding in decodings],
            "penalty": [decoding.repetition_penalty for decoding in decodings],
        }
        for name, value in values.items():
            field: torch.Tensor = getattr(self, name)
            field[slot] = to_device(np.asarray(value), self._device).to(field.dtype)
        if self.seen is not None:
            for sequence in sequences:
                self.seen[sequence.slot] = False
                self.seen[sequence.slot, to_device(np.array(sequence.tokens), self._device)] = True

    def stop(self, slots: Sequence[int]) -> None:
        """Deactivate slots."""
        if slots:
            self.active[to_device(np.array(slots), self._device)] = False

    # A step

    @property
    def blocks(self) -> Blocks:
        """The current block of each slot."""
        return Blocks(
            self.tokens, self.masked, self.unmasked_at, self.confidence, self.previous, self.active, self.uncommitted,
            self.start, self.step, self.given, self.remaining,
        )  # fmt: skip

    @property
    def settings(self) -> Settings:
        """The settings of each slot's sequence that decide steps. `Drawing` reads the others."""
        return Settings(
            self.length, self.strategy, self.setting, self.quotas, self.stop_ids, self.seed, self.temperature,
            self.greedy,
        )  # fmt: skip

    def segments(self, count: int) -> Segments:
        """Choose the blocks of a forward, S = `count`; see `choose_segments`."""
        return choose_segments(self.blocks, self.settings, self.room, torch.arange(count, device=self._device))

    def masked_positions(self, count: int) -> Draws:
        """Choose the masked positions to draw tokens for, M = `count`; see `choose_draws`."""
        return choose_draws(self.blocks, self.settings, self.room, torch.arange(count, device=self._device))

    def advance(self, token: torch.Tensor, confidence: torch.Tensor, entropy: torch.Tensor) -> None:
        """Keep the drawn tokens that each strategy selects. Begin the next block where the answer goes on.

        Writes the outcome to `packed`.

        Args:
            token, confidence, entropy: (M,), what was drawn for the positions of `masked_positions`.
        """
        draw = draws_of(self.masked & self.room.fits[:, None], self.room.first_draw, len(token))
        drawn = Drawn(token[draw], confidence[draw], entropy[draw])
        after, changes = self.transition(self.blocks, self.settings, self.room.fits, drawn)
        self.see(drawn.token, changes.kept)
        self.packed.copy_(packed(changes, 1)[0])
        self.blocks.write(after)

    def see(self, token: torch.Tensor, kept: torch.Tensor) -> None:
        """Take note of the kept tokens, both (N + 1, L), where there are penalties."""
        if self.seen is not None:
            # Column by column of the block: shapes must not depend on the number of kept tokens.
            for column in range(self.block):
                where = token[:, column : column + 1]
                self.seen.scatter_(1, where, self.seen.gather(1, where) | kept[:, column : column + 1])


def draws_of(masked: torch.Tensor, first_draw: torch.Tensor, draws: int) -> torch.Tensor:
    """The index of each masked position's draw, (N + 1, L); undefined but valid for other positions.

    Args:
        masked: (N + 1, L) bool, positions that a token was drawn for.
        first_draw: (N + 1,), index of each block's first draw.
        draws: M.
    """
    return (first_draw[:, None] + masked.cumsum(1) - 1).clamp(0, draws - 1)


# To the host


def packed_size(slots: int, block: int) -> int:
    """Numbers of a packed outcome of N slots."""
    return (3 * block + 6) * slots


def packed(changes: Changes, levels: int) -> torch.Tensor:
    """The outcomes of steps in one tensor (levels, `packed_size`) int32, without the padding slots.

    Args:
        changes: what the steps did, levels * (N + 1) rows.
        levels: number of steps.
    """
    columns = (changes.took_part, changes.committed, changes.decided, changes.stuck, changes.goes_on, changes.masked)
    confidence = changes.confidence.view(torch.int32)
    parts = [changes.tokens.int(), changes.unmasked_at.int(), confidence, *(column.int() for column in columns)]
    return torch.cat([part.reshape(levels, -1, *part.shape[1:])[:, :-1].flatten(1) for part in parts], dim=1)


def unpack(numbers: NDArray[np.int32], slots: int, block: int) -> Outcome:
    """Read an outcome of N slots and blocks of L positions; `numbers` (`packed_size`,) has to stay as it is."""
    blocks = slots * block
    tokens, unmasked_at, confidence = numbers[: 3 * blocks].reshape(3, slots, block)
    columns = numbers[3 * blocks :].reshape(6, slots)
    took_part, committed, decided, stuck, goes_on = columns[:5].astype(np.bool_)
    confidences = confidence.view(np.float32)
    return Outcome(tokens, unmasked_at, confidences, took_part, committed, decided, stuck, goes_on, columns[5])


def _padded(lists: Iterable[Sequence[int]], width: int, padding: int) -> NDArray[np.int64]:
    """Lists of different lengths as one array (count, width), padded on the right."""
    lists = list(lists)
    rows = np.full((len(lists), width), padding, dtype=np.int64)
    for row, values in enumerate(lists):
        rows[row, : len(values)] = values
    return rows
