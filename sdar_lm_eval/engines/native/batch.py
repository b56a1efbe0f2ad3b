"""The batch on the device: a slot for each running sequence, and the transition of a step.

A slot holds the block that is being denoised, which of its positions are masked, and the sequence's settings. A step of
the engine calls three methods:

    segments           chooses the blocks that go through the model
    masked_positions   chooses the positions that a token is drawn for
    advance            keeps some of the drawn tokens, by each sequence's strategy

A block without masked positions is decided, and the next block begins. The last block of an answer is decided once no
position before the answer's end is masked. All of this happens on the device; the host reads an `Outcome` afterwards.

The host chooses the sizes of a step: S segments and M draws. A forecast (`forecast.py`) can be too low. Slots are
served in order, and a slot that does not fit waits for the next step.

A decided block goes through the model once more, because the keys and values of its final tokens have to be stored: the
block is committed. The forward that first denoises the next block commits it, as a segment of its own. Attention reads
keys and values after all of them are written, so the next block sees the committed one.

On a GPU `torch.compile` makes a few kernels of each method, and a CUDA graph replays them. So the methods have fixed
shapes and never read a value on the host.

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
from sdar_lm_eval.engines.native.strategy import Candidates, Rule, Strategy
from sdar_lm_eval.engines.native.transfer import to_device

NO_TOKEN = -1


@dataclass(frozen=True)
class Outcome:
    """What a step did, on the host. Arrays have a row for each slot.

    Attributes:
        tokens: (N, L), the blocks after the step; a decided block as it was decided.
        unmasked_at: (N, L), the step that unmasked each token; -1 for tokens of the prompt.
        confidence: (N, L), the probability of each token at that step.
        took_part: (N,), slots that were denoised.
        committed: (N,), slots whose previous block was committed in the same forward.
        decided: (N,), blocks without masked tokens, or without any before the end of the answer: its first stop token,
            or its limit.
        stuck: (N,), slots whose logits are not numbers, so that nothing was unmasked.
        goes_on: (N,), slots that have begun the next block.
        masked: (N,), masked positions that the denoised block still has; 0 where it is decided.
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
        slot: the slot whose block it is; N for padding.
        start: position of the block's first token in the sequence.
        length: tokens of the block; 0 for padding.
        following: consecutive blocks of the same sequence from here on: 2 for a block that is committed, 1 for a block
            that stands alone, 0 for a block behind a committed one, and for padding.
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
        temperature: of the sequence; 1 where it is greedy.
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
        mask_token_id: stands at masked positions.
        strategies: names of the strategies that a sequence may have.
        penalized: whether a sequence may have a repetition penalty, which takes a table of N x V seen tokens.
        device: of all tensors.
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

        def whole(*shape: int, value: int = 0) -> torch.Tensor:
            return torch.full(shape, value, dtype=torch.int64, device=device)

        def real(*shape: int, value: float) -> torch.Tensor:
            return torch.full(shape, value, dtype=torch.float32, device=device)

        def flag(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.bool, device=device)

        # The block that is being denoised: (N + 1, L)
        self.tokens = whole(rows, block, value=mask_token_id)
        self.masked = flag(rows, block)
        self.unmasked_at = whole(rows, block, value=-1)
        self.confidence = real(rows, block, value=1)
        self.before = whole(rows, block, value=mask_token_id)  # the previous block, where it is uncommitted
        # (N + 1,)
        self.active = flag(rows)
        self.uncommitted = flag(rows)
        self.start = whole(rows)
        self.step = whole(rows)
        self.given = whole(rows)  # leading tokens of the block that belong to the prompt
        self.room = whole(rows)  # new tokens that the answer may still get
        # Between the methods of a step
        self.runs = flag(rows)  # whether the step has room for the slot
        self.segment = whole(rows)  # index of the slot's block among the segments
        self.first_draw = whole(rows)  # index of the slot's first masked position among the draws
        # Settings
        self.length = whole(rows)
        self.strategy = whole(rows)  # its code
        self.setting = real(rows, value=0)  # value of the strategy's setting
        self.quotas = whole(rows, block, value=1)  # of each step
        self.stop_ids = whole(rows, max(stops, 1), value=NO_TOKEN)
        self.seed = whole(rows)
        self.greedy = ~flag(rows)
        self.top_k = whole(rows)
        self.top_p = real(rows, value=1)
        self.temperature = real(rows, value=1)
        self.penalty = real(rows, value=1)
        self.seen = flag(rows, vocabulary) if penalized else None
        self.packed = torch.zeros((3 * block + 6) * slots, dtype=torch.int32, device=device)  # the outcome, see unpack

    # What the host changes

    def begin(self, sequences: Sequence[SequenceState]) -> None:
        """Write sequences to their slots, each at the block after its last full one."""
        slot = to_device(np.array([sequence.slot for sequence in sequences]), self._device)
        requests = [sequence.request for sequence in sequences]
        decodings = [request.decoding for request in requests]
        strategies, code = [STRATEGIES[decoding.remasking_strategy] for decoding in decodings], codes()
        given = np.array([len(sequence.tokens) - sequence.block_start for sequence in sequences])
        length = np.array([decoding.block_length for decoding in decodings])
        column = np.arange(self.block)
        values: dict[str, ArrayLike] = {
            "tokens": _rows((s.tokens[s.block_start :] for s in sequences), self.block, self.mask_token_id),
            "masked": (column >= given[:, None]) & (column < length[:, None]),
            "unmasked_at": np.full((len(sequences), self.block), -1),
            "confidence": np.ones((len(sequences), self.block)),
            "active": np.ones(len(sequences)),
            "uncommitted": np.zeros(len(sequences)),
            "start": [sequence.block_start for sequence in sequences],
            "step": np.zeros(len(sequences)),
            "given": given,
            "room": [sequence.request.max_new_tokens - sequence.num_new_tokens for sequence in sequences],
            "length": length,
            "strategy": [code[strategy.name] for strategy in strategies],
            "setting": [
                getattr(d, s.setting) if s.setting else 0.0 for d, s in zip(decodings, strategies, strict=True)
            ],
            "quotas": _rows((decoding.quotas for decoding in decodings), self.block, 1),
            "stop_ids": _rows((sorted(request.stop_ids) for request in requests), self.stop_ids.shape[1], NO_TOKEN),
            "seed": np.array([request.seed & (2**64 - 1) for request in requests], dtype=np.uint64).astype(np.int64),
            "greedy": [decoding.greedy for decoding in decodings],
            "top_k": [0 if decoding.greedy else min(decoding.top_k, self._vocabulary) for decoding in decodings],
            "top_p": [1.0 if decoding.greedy else decoding.top_p for decoding in decodings],
            "temperature": [1.0 if decoding.greedy else decoding.temperature for decoding in decodings],
            "penalty": [decoding.repetition_penalty for decoding in decodings],
        }
        for name, value in values.items():
            column_of_state: torch.Tensor = getattr(self, name)
            column_of_state[slot] = to_device(np.asarray(value), self._device).to(column_of_state.dtype)
        if self.seen is not None:
            for sequence in sequences:
                self.seen[sequence.slot] = False
                self.seen[sequence.slot, to_device(np.array(sequence.tokens), self._device)] = True

    def stop(self, slots: Sequence[int]) -> None:
        """Take slots out of the batch."""
        if slots:
            self.active[to_device(np.array(slots), self._device)] = False

    # A step

    def segments(self, count: int) -> Segments:
        """Choose the blocks of a forward, in order of slots; an uncommitted block stands before its successor.

        Args:
            count: S; the rest is padding. Blocks that do not fit are left out.
        """
        ends = (self.active * (1 + self.uncommitted.long())).cumsum(0)
        self.runs.copy_(self.active & (ends <= count))
        self.segment.copy_(ends - 1)
        index = torch.arange(count, device=self._device)
        slot = self._owner(ends, index)
        commits = self.uncommitted[slot] & (index == ends[slot] - 2)
        real = slot != self.slots
        length = self.length[slot] * real
        start = self.start[slot] - torch.where(commits, length, 0)
        following = torch.where(commits, 2, (~self.uncommitted[slot]).long()) * real
        tokens = torch.where(commits[:, None], self.before[slot], self.tokens[slot])
        return Segments(slot, start, length, following, tokens)

    def masked_positions(self, count: int) -> Draws:
        """Choose the masked positions to draw tokens for; a slot whose positions do not all fit waits.

        Args:
            count: M; the rest is padding.
        """
        masked = self.masked & self.runs[:, None]
        wanted = masked.sum(1)
        ends = wanted.cumsum(0)
        self.runs &= ends <= count
        self.first_draw.copy_(ends - wanted)
        index = torch.arange(count, device=self._device)
        slot = self._owner(ends, index)
        number = index - self.first_draw[slot]  # of the position among the slot's masked ones
        column = (masked.cumsum(1)[slot] <= number[:, None]).sum(1).clamp(max=self.block - 1)
        row = torch.where(slot == self.slots, 0, self.segment[slot] * self.block + column)
        draw = uniform(self.seed[slot], self.start[slot] + column, self.step[slot], DRAW)
        return Draws(slot, row, draw, self.temperature[slot], self.greedy[slot])

    def _owner(self, ends: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """The running slot that each index belongs to, where slots end at `ends` (N + 1,); N for others."""
        slot = (ends[:, None] <= index).sum(0).clamp(max=self.slots)
        return torch.where(self.runs[slot], slot, self.slots)

    def advance(self, token: torch.Tensor, confidence: torch.Tensor, entropy: torch.Tensor) -> None:
        """Keep the tokens that each strategy keeps; begin the next block where one is decided and its answer goes on.

        The outcome is left in `packed`.

        Args:
            token, confidence, entropy: (M,), drawn for the positions of `masked_positions`.
        """
        took_part, committed = self.runs, self.runs & self.uncommitted
        masked = self.masked & took_part[:, None]
        draw = (self.first_draw[:, None] + masked.cumsum(1) - 1).clamp(0, len(token) - 1)  # of each masked position
        drawn, sure = token[draw], confidence[draw]
        kept = self._kept(masked, sure, entropy[draw])

        tokens = torch.where(kept, drawn, self.tokens)
        unmasked_at = torch.where(kept, self.step[:, None], self.unmasked_at)
        confidences = torch.where(kept, sure, self.confidence)
        still = self.masked & ~kept
        if self.seen is not None:
            # Token by token of a block, so that shapes do not depend on how many are kept.
            for column in range(self.block):
                where = drawn[:, column : column + 1]
                self.seen.scatter_(1, where, self.seen.gather(1, where) | kept[:, column : column + 1])
        stuck = masked.any(dim=1) & ~kept.any(dim=1) | (kept & sure.isnan()).any(dim=1)
        # Positions behind the answer's end need no token.
        fresh = (self.offsets >= self.given[:, None]) & (self.offsets < self.length[:, None])  # (N + 1, L)
        stops = (tokens[:, :, None] == self.stop_ids[:, None, :]).any(dim=-1) & fresh & ~still
        stop = torch.where(stops, self.offsets, self.block).min(dim=1).values
        end = torch.minimum(stop, self.given + self.room)
        decided = took_part & ~(still & (self.offsets < end[:, None])).any(dim=1)
        new = self.length - self.given
        goes_on = decided & (stop == self.block) & (new < self.room)
        left = torch.where(decided, 0, still.sum(dim=1))
        columns = (took_part, committed, decided, stuck, goes_on, left)
        parts = [tokens.int(), unmasked_at.int(), confidences.view(torch.int32), *(column.int() for column in columns)]
        self.packed.copy_(torch.cat([part[:-1].flatten() for part in parts]))

        begins = goes_on[:, None]
        self.before.copy_(torch.where(begins, tokens, self.before))
        self.tokens.copy_(torch.where(begins, self.mask_token_id, tokens))
        self.masked.copy_(still | (begins & (self.offsets < self.length[:, None])))
        self.unmasked_at.copy_(torch.where(begins, -1, unmasked_at))
        self.confidence.copy_(torch.where(begins, 1.0, confidences))
        self.active &= ~decided | goes_on
        self.uncommitted.copy_(torch.where(took_part, goes_on, self.uncommitted))
        self.start += torch.where(goes_on, self.length, 0)
        self.room -= torch.where(goes_on, new, 0)
        self.given.copy_(torch.where(goes_on, 0, self.given))
        # Quotas are padded with 1: a strategy without a schedule may take as many steps as there are tokens.
        self.step.copy_(torch.where(goes_on, 0, (self.step + took_part).clamp(max=self.block - 1)))

    def _kept(self, masked: torch.Tensor, confidence: torch.Tensor, entropies: torch.Tensor) -> torch.Tensor:
        """Which of the masked positions keep their token, each row by its own strategy: (N + 1, L) bool."""

        def random() -> torch.Tensor:
            return uniform(self.seed[:, None], self.start[:, None] + self.offsets, self.step[:, None], ORDER)

        quota = self.quotas.gather(1, self.step[:, None]).squeeze(1)
        candidates = Candidates(masked, confidence, entropies, self.offsets, quota, self.setting, random)
        keys, count = self._by_strategy(self._orders, candidates), self._by_strategy(self._counts, candidates)
        return unmasking.select_first(keys, count, masked)

    def _by_strategy(self, rules: list[tuple[Rule, list[int]]], candidates: Candidates) -> torch.Tensor:
        """What the rules give, (N + 1, ...), each row by its own strategy's."""
        (first, _), *others = rules
        chosen = first(candidates)
        for rule, of in others:
            values = rule(candidates)
            for code in of:
                here = (self.strategy == code).view(-1, *[1] * (values.dim() - 1))
                chosen = torch.where(here, values, chosen)
        return chosen

    # To the host

    def unpack(self, packed: torch.Tensor) -> Outcome:
        """Read `packed`, copied to the host."""
        blocks = self.slots * self.block
        array = packed.numpy().copy()  # a later step overwrites the buffer
        tokens, unmasked_at, confidence = array[: 3 * blocks].reshape(3, self.slots, self.block)
        columns = array[3 * blocks :].reshape(6, self.slots)
        took_part, committed, decided, stuck, goes_on = columns[:5].astype(np.bool_)
        confidences = confidence.view(np.float32)
        return Outcome(tokens, unmasked_at, confidences, took_part, committed, decided, stuck, goes_on, columns[5])


def _codes_by_rule(strategies: frozenset[str], rule_of: Callable[[Strategy], Rule]) -> list[tuple[Rule, list[int]]]:
    """The rules of strategies, each with the codes of its strategies; the rule of most strategies first."""
    found: dict[Rule, list[int]] = {}
    for name in sorted(strategies):
        found.setdefault(rule_of(STRATEGIES[name]), []).append(codes()[name])
    return sorted(found.items(), key=lambda pair: -len(pair[1]))


def _rows(lists: Iterable[Sequence[int]], width: int, padding: int) -> NDArray[np.int64]:
    """Lists of different lengths as one array (count, width)."""
    lists = list(lists)
    rows = np.full((len(lists), width), padding, dtype=np.int64)
    for row, values in enumerate(lists):
        rows[row, : len(values)] = values
    return rows
