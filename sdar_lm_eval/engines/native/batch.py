"""The state of the batch on the device: a slot for each running sequence, and the transition of a step.

A slot holds a sequence's current block, a mask of the block's masked positions, and the sequence's settings. A step of
the engine calls three methods:

    segments           chooses the blocks that go through the model
    masked_positions   chooses the positions that a token is drawn for
    advance            keeps some of the drawn tokens, by each sequence's strategy

A block without masked positions is decided, and the next block begins. The last block of an answer is decided once no
position before the answer's end is masked. These transitions run on the device; the host reads an `Outcome` later.

The host chooses the sizes of a step: S segments and M draws. A forecast (`forecast.py`) of these sizes can be too low.
Slots are served in order, and a slot that does not fit waits for the next step.

A decided block goes through the model once more, because the keys and values of its final tokens have to be stored: the
block is committed. The forward that first denoises the next block also commits the decided block, as a segment of its
own. Attention reads keys and values after all of them are written, so the next block sees the committed one.

On a GPU `torch.compile` makes a few kernels of each method, and a CUDA graph replays these kernels. So the methods have
fixed shapes and never read a value on the host.

Shapes: N slots and one more for padding, L positions of a block, S segments, M draws.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from sdar_lm_eval.engines.native import unmasking
from sdar_lm_eval.engines.native.random_numbers import DRAW, ORDER, uniform
from sdar_lm_eval.engines.native.scheduler import SequenceState
from sdar_lm_eval.engines.native.strategies import STRATEGIES, codes
from sdar_lm_eval.engines.native.strategies.base import Candidates, Rule, Strategy
from sdar_lm_eval.engines.native.transfer import to_device

NO_TOKEN = -1


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
        self._orders = _codes_by_rule(strategies, lambda strategy: strategy.order)
        self._counts = _codes_by_rule(strategies, lambda strategy: strategy.count)
        self.offsets = torch.arange(block, device=device)

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
        # Between the methods of a step
        self.fits = flags(rows)  # whether the slot is active and fits into the step
        self.segment = integers(rows)  # index of the slot's current block among the segments
        self.first_draw = integers(rows)  # index of the slot's first masked position among the draws
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
        self.packed = torch.zeros((3 * block + 6) * slots, dtype=torch.int32, device=device)  # an outcome, see `unpack`

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

    def segments(self, count: int) -> Segments:
        """Choose the blocks of a forward, in order of slots. An uncommitted block precedes its successor.

        Args:
            count: S. Slots whose blocks do not fit are left out; segments without a block are padding.
        """
        ends = (self.active * (1 + self.uncommitted.long())).cumsum(0)
        self.fits.copy_(self.active & (ends <= count))
        self.segment.copy_(ends - 1)
        index = torch.arange(count, device=self._device)
        slot = self._owner(ends, index)
        commits = self.uncommitted[slot] & (index == ends[slot] - 2)
        real = slot != self.slots
        length = self.length[slot] * real
        start = self.start[slot] - torch.where(commits, length, 0)
        following = torch.where(commits, 2, (~self.uncommitted[slot]).long()) * real
        tokens = torch.where(commits[:, None], self.previous[slot], self.tokens[slot])
        return Segments(slot, start, length, following, tokens)

    def masked_positions(self, count: int) -> Draws:
        """Choose the masked positions to draw tokens for. A slot whose positions do not all fit waits.

        Args:
            count: M. Draws without a position are padding.
        """
        masked = self.masked & self.fits[:, None]
        wanted = masked.sum(1)
        ends = wanted.cumsum(0)
        self.fits &= ends <= count
        self.first_draw.copy_(ends - wanted)
        index = torch.arange(count, device=self._device)
        slot = self._owner(ends, index)
        number = index - self.first_draw[slot]  # index of the position among the slot's masked positions
        column = (masked.cumsum(1)[slot] <= number[:, None]).sum(1).clamp(max=self.block - 1)
        row = torch.where(slot == self.slots, 0, self.segment[slot] * self.block + column)
        draw = uniform(self.seed[slot], self.start[slot] + column, self.step[slot], DRAW)
        return Draws(slot, row, draw, self.temperature[slot], self.greedy[slot])

    def _owner(self, ends: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """The slot that owns each index: slot n owns ends[n - 1] <= index < ends[n]. N where the slot does not fit."""
        slot = (ends[:, None] <= index).sum(0).clamp(max=self.slots)
        return torch.where(self.fits[slot], slot, self.slots)

    def advance(self, token: torch.Tensor, confidence: torch.Tensor, entropy: torch.Tensor) -> None:
        """Keep the drawn tokens that each strategy selects. Begin the next block where the answer goes on.

        Writes the outcome to `packed`.

        Args:
            token, confidence, entropy: (M,), what was drawn for the positions of `masked_positions`.
        """
        took_part, committed = self.fits, self.fits & self.uncommitted
        masked = self.masked & took_part[:, None]
        # The index of each masked position's draw, (N + 1, L)
        draw = (self.first_draw[:, None] + masked.cumsum(1) - 1).clamp(0, len(token) - 1)
        drawn, sure = token[draw], confidence[draw]
        kept = self._kept(masked, sure, entropy[draw])

        tokens = torch.where(kept, drawn, self.tokens)
        unmasked_at = torch.where(kept, self.step[:, None], self.unmasked_at)
        confidences = torch.where(kept, sure, self.confidence)
        still_masked = self.masked & ~kept
        if self.seen is not None:
            # Column by column of the block: shapes must not depend on the number of kept tokens.
            for column in range(self.block):
                where = drawn[:, column : column + 1]
                self.seen.scatter_(1, where, self.seen.gather(1, where) | kept[:, column : column + 1])
        stuck = masked.any(dim=1) & ~kept.any(dim=1) | (kept & sure.isnan()).any(dim=1)
        # Positions after the answer's end need no token, so they may stay masked.
        fresh = (self.offsets >= self.given[:, None]) & (self.offsets < self.length[:, None])  # (N + 1, L)
        stops = (tokens[:, :, None] == self.stop_ids[:, None, :]).any(dim=-1) & fresh & ~still_masked
        stop = torch.where(stops, self.offsets, self.block).min(dim=1).values
        end = torch.minimum(stop, self.given + self.remaining)
        decided = took_part & ~(still_masked & (self.offsets < end[:, None])).any(dim=1)
        new = self.length - self.given
        goes_on = decided & (stop == self.block) & (new < self.remaining)
        num_masked = torch.where(decided, 0, still_masked.sum(dim=1))
        columns = (took_part, committed, decided, stuck, goes_on, num_masked)
        parts = [tokens.int(), unmasked_at.int(), confidences.view(torch.int32), *(column.int() for column in columns)]
        self.packed.copy_(torch.cat([part[:-1].flatten() for part in parts]))

        begins = goes_on[:, None]
        self.previous.copy_(torch.where(begins, tokens, self.previous))
        self.tokens.copy_(torch.where(begins, self.mask_token_id, tokens))
        self.masked.copy_(still_masked | (begins & (self.offsets < self.length[:, None])))
        self.unmasked_at.copy_(torch.where(begins, -1, unmasked_at))
        self.confidence.copy_(torch.where(begins, 1.0, confidences))
        self.active &= ~decided | goes_on
        self.uncommitted.copy_(torch.where(took_part, goes_on, self.uncommitted))
        self.start += torch.where(goes_on, self.length, 0)
        self.remaining -= torch.where(goes_on, new, 0)
        self.given.copy_(torch.where(goes_on, 0, self.given))
        # A strategy without a schedule may take as many steps as the block has tokens, so quotas are padded with 1.
        self.step.copy_(torch.where(goes_on, 0, (self.step + took_part).clamp(max=self.block - 1)))

    def _kept(self, masked: torch.Tensor, confidence: torch.Tensor, entropies: torch.Tensor) -> torch.Tensor:
        """The masked positions that keep their token, each row by its own strategy: (N + 1, L) bool."""

        def random() -> torch.Tensor:
            return uniform(self.seed[:, None], self.start[:, None] + self.offsets, self.step[:, None], ORDER)

        quota = self.quotas.gather(1, self.step[:, None]).squeeze(1)
        candidates = Candidates(masked, confidence, entropies, self.offsets, quota, self.setting, random)
        keys, count = self._by_strategy(self._orders, candidates), self._by_strategy(self._counts, candidates)
        return unmasking.select_first(keys, count, masked)

    def _by_strategy(self, rules: list[tuple[Rule, list[int]]], candidates: Candidates) -> torch.Tensor:
        """Each row's value by the rule of its own strategy: (N + 1, ...)."""
        (first, _), *others = rules
        chosen = first(candidates)
        for rule, strategy_codes in others:
            values = rule(candidates)
            for code in strategy_codes:
                here = (self.strategy == code).view(-1, *[1] * (values.dim() - 1))
                chosen = torch.where(here, values, chosen)
        return chosen

    # To the host

    def unpack(self, packed: torch.Tensor) -> Outcome:
        """Read an outcome from a copy of `packed` on the host."""
        blocks = self.slots * self.block
        array = packed.numpy().copy()  # a later step overwrites the buffer
        tokens, unmasked_at, confidence = array[: 3 * blocks].reshape(3, self.slots, self.block)
        columns = array[3 * blocks :].reshape(6, self.slots)
        took_part, committed, decided, stuck, goes_on = columns[:5].astype(np.bool_)
        confidences = confidence.view(np.float32)
        return Outcome(tokens, unmasked_at, confidences, took_part, committed, decided, stuck, goes_on, columns[5])


def _codes_by_rule(strategies: frozenset[str], rule_of: Callable[[Strategy], Rule]) -> list[tuple[Rule, list[int]]]:
    """Each rule with the codes of the strategies that have it; the rule of the most strategies first."""
    found: dict[Rule, list[int]] = {}
    for name in sorted(strategies):
        found.setdefault(rule_of(STRATEGIES[name]), []).append(codes()[name])
    return sorted(found.items(), key=lambda pair: -len(pair[1]))


def _padded(lists: Iterable[Sequence[int]], width: int, padding: int) -> NDArray[np.int64]:
    """Lists of different lengths as one array (count, width), padded on the right."""
    lists = list(lists)
    rows = np.full((len(lists), width), padding, dtype=np.int64)
    for row, values in enumerate(lists):
        rows[row, : len(values)] = values
    return rows
