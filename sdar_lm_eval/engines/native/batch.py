"""The state of the batch on the device: a slot for each running sequence.

A slot holds a sequence's current block, a mask of the block's masked positions, and the sequence's settings. A step of
the engine calls three methods:

    segments           chooses the blocks that go through the model (`layout.py`)
    masked_positions   chooses the positions that a token is drawn for (`layout.py`)
    advance            keeps some of the drawn tokens, by each sequence's strategy (`transition.py`)

The methods run on the device; the host reads a `StepOutcome` later. On a GPU `torch.compile` makes a few kernels of
each method, and a CUDA graph replays these kernels. So the methods have fixed shapes and never read a value on the
host.

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
class StepOutcome:
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

    Attributes:
        blocks: the current block of each slot.
        settings: the settings of each slot's sequence.
        room: the room of each slot in the step that runs; the methods of a step share it.
        seen: (N + 1, V) bool, tokens that a repetition penalty applies to; None where `penalized` is false.
        packed: the last step's outcome, see `unpack`.
        needs_entropy: whether a strategy reads the entropies of draws.
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

        self.blocks = Blocks(
            tokens=integers(rows, block, value=mask_token_id),
            masked=flags(rows, block),
            unmasked_at=integers(rows, block, value=-1),
            confidence=floats(rows, block, value=1),
            previous=integers(rows, block, value=mask_token_id),
            active=flags(rows),
            uncommitted=flags(rows),
            start=integers(rows),
            step=integers(rows),
            given=integers(rows),
            remaining=integers(rows),
        )
        self.settings = Settings(
            length=integers(rows),
            strategy=integers(rows),
            setting=floats(rows, value=0),
            quotas=integers(rows, block, value=1),
            stop_ids=integers(rows, max(stops, 1), value=NO_TOKEN),
            seed=integers(rows),
            greedy=~flags(rows),
            temperature=floats(rows, value=1),
            top_k=integers(rows),
            top_p=floats(rows, value=1),
            penalty=floats(rows, value=1),
        )
        self.room = Room(flags(rows), integers(rows), integers(rows))
        self.seen = flags(rows, vocabulary) if penalized else None
        self.packed = torch.zeros((3 * block + 6) * slots, dtype=torch.int32, device=device)

    # Changes by the host

    def begin(self, sequences: Sequence[SequenceState]) -> None:
        """Write sequences to their slots. The current block of a sequence is the one after its last full block."""
        slot = to_device(np.array([sequence.slot for sequence in sequences]), self._device)
        requests = [sequence.request for sequence in sequences]
        decodings = [request.decoding for request in requests]
        strategies, code = [STRATEGIES[decoding.remasking_strategy] for decoding in decodings], codes()
        given = np.array([len(sequence.tokens) - sequence.block_start for sequence in sequences])
        length = np.array([decoding.block_length for decoding in decodings])
        column, stops = np.arange(self.block), self.settings.stop_ids.shape[1]
        blocks: dict[str, ArrayLike] = {
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
        }
        settings: dict[str, ArrayLike] = {
            "length": length,
            "strategy": [code[strategy.name] for strategy in strategies],
            "setting": [
                getattr(d, s.setting) if s.setting else 0.0 for d, s in zip(decodings, strategies, strict=True)
            ],
            "quotas": _padded((decoding.quotas for decoding in decodings), self.block, 1),
            "stop_ids": _padded((sorted(request.stop_ids) for request in requests), stops, NO_TOKEN),
            "seed": np.array([request.seed & (2**64 - 1) for request in requests], dtype=np.uint64).astype(np.int64),
            "greedy": [decoding.greedy for decoding in decodings],
            "temperature": [1.0 if decoding.greedy else decoding.temperature for decoding in decodings],
            "top_k": [0 if decoding.greedy else min(decoding.top_k, self._vocabulary) for decoding in decodings],
            "top_p": [1.0 if decoding.greedy else decoding.top_p for decoding in decodings],
            "penalty": [decoding.repetition_penalty for decoding in decodings],
        }
        for fields, values in ((self.blocks, blocks), (self.settings, settings)):
            for name, value in values.items():
                field: torch.Tensor = getattr(fields, name)
                field[slot] = to_device(np.asarray(value), self._device).to(field.dtype)
        if self.seen is not None:
            for sequence in sequences:
                self.seen[sequence.slot] = False
                self.seen[sequence.slot, to_device(np.array(sequence.tokens), self._device)] = True

    def stop(self, slots: Sequence[int]) -> None:
        """Deactivate slots."""
        if slots:
            self.blocks.active[to_device(np.array(slots), self._device)] = False

    # A step

    def segments(self, count: int) -> Segments:
        """Choose the blocks of a forward, S = `count`; see `choose_segments`."""
        return choose_segments(self.blocks, self.settings, self.room, count)

    def masked_positions(self, count: int) -> Draws:
        """Choose the masked positions to draw tokens for, M = `count`; see `choose_draws`."""
        return choose_draws(self.blocks, self.settings, self.room, count)

    def advance(self, drawn: Drawn) -> None:
        """Keep the drawn tokens that each strategy selects. Begin the next block where the answer goes on.

        Writes the outcome to `packed`.

        Args:
            drawn: (M,), what was drawn for the positions of `masked_positions`.
        """
        masked = self.blocks.masked & self.room.fits[:, None]
        # The index of each masked position's draw, (N + 1, L)
        draw = (self.room.first_draw[:, None] + masked.cumsum(1) - 1).clamp(0, len(drawn.token) - 1)
        drawn = Drawn(drawn.token[draw], drawn.confidence[draw], drawn.entropy[draw])
        after, changes = self.transition(self.blocks, self.settings, self.room.fits, drawn)
        if self.seen is not None:
            # Column by column of the block: shapes must not depend on the number of kept tokens.
            for column in range(self.block):
                where = drawn.token[:, column : column + 1]
                self.seen.scatter_(1, where, self.seen.gather(1, where) | changes.kept[:, column : column + 1])
        self.packed.copy_(_packed(changes))
        self.blocks.write(after)


# To the host


def _packed(changes: Changes) -> torch.Tensor:
    """An outcome as one int32 tensor, without the padding slot: see `unpack`."""
    columns = (changes.took_part, changes.committed, changes.decided, changes.stuck, changes.goes_on, changes.masked)
    confidence = changes.confidence.view(torch.int32)
    parts = [changes.tokens.int(), changes.unmasked_at.int(), confidence, *(column.int() for column in columns)]
    return torch.cat([part[:-1].flatten() for part in parts])


def unpack(numbers: NDArray[np.int32], slots: int, block: int) -> StepOutcome:
    """Read an outcome of N slots and blocks of L positions from `BatchState.packed`; `numbers` has to stay as it is."""
    blocks = slots * block
    tokens, unmasked_at, confidence = numbers[: 3 * blocks].reshape(3, slots, block)
    columns = numbers[3 * blocks :].reshape(6, slots)
    took_part, committed, decided, stuck, goes_on = columns[:5].astype(np.bool_)
    confidences = confidence.view(np.float32)
    return StepOutcome(tokens, unmasked_at, confidences, took_part, committed, decided, stuck, goes_on, columns[5])


def _padded(lists: Iterable[Sequence[int]], width: int, padding: int) -> NDArray[np.int64]:
    """Lists of different lengths as one array (count, width), padded on the right."""
    lists = list(lists)
    rows = np.full((len(lists), width), padding, dtype=np.int64)
    for row, values in enumerate(lists):
        rows[row, : len(values)] = values
    return rows
