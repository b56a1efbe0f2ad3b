"""The batch on the device: a row ("slot") for each running sequence, and how a step changes it.

A slot holds the block that is being denoised, which of its positions are masked, and the sequence's settings. A step of
the engine calls three methods: `segments` chooses the blocks that go through the model, `masked_positions` chooses the
positions that a token is drawn for, and `advance` keeps some of these tokens by each sequence's strategy. A block
without masked positions is decided, and the next block begins; an answer's last block is decided once no position
before the answer's end is masked. All of this happens on the device, and the host reads an `Outcome` afterwards.

The host chooses how many blocks and masked positions a step has room for, which may be too few (`forecast.py`): slots
are served in order, and a slot that does not fit waits for the next step.

A decided block has to go through the model once more, so that the keys and values of its final tokens are stored (it is
"committed"). That happens beside the first denoising of the next block, as a segment of its own: attention reads keys
and values after all of them are written, so the next block sees the committed one.

Shapes: N slots and one more for padding, L positions of a block, S segments, M masked positions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sdar_lm_eval.engines.native import unmasking
from sdar_lm_eval.engines.native.random_numbers import ORDER
from sdar_lm_eval.engines.native.scheduler import Sequence
from sdar_lm_eval.engines.native.strategies import STRATEGIES, codes
from sdar_lm_eval.engines.native.strategy import Candidates, Rule, Strategy

NO_TOKEN = -1


@dataclass(frozen=True)
class Outcome:
    """What a step did, on the host. Arrays have a row for each slot.

    Attributes:
        tokens: (N, L) int32, the blocks after the step; a decided one as it was decided.
        unmasked_at: (N, L) int32, the step that unmasked each token; -1 for given ones.
        confidence: (N, L) float32 at that step.
        took_part: (N,) bool, slots that were denoised.
        committed: (N,) bool, slots whose block before was committed beside.
        decided: (N,) bool, blocks without masked tokens, or without any before the end of the answer: its first stop
            token, or its limit.
        stuck: (N,) bool, slots in which nothing was unmasked: their logits are no numbers.
        goes_on: (N,) bool, slots that have begun the next block.
        left: (N,) int32, positions of the denoised block that are still masked; 0 where it is decided.
    """

    tokens: Any
    unmasked_at: Any
    confidence: Any
    took_part: Any
    committed: Any
    decided: Any
    stuck: Any
    goes_on: Any
    left: Any


@dataclass(frozen=True)
class Segments:
    """Blocks that go through the model in one forward; (S,) each.

    Attributes:
        slot: whose block it is; N for padding.
        start: position of its first token in the sequence.
        length: its tokens; 0 for padding.
        following: blocks of one sequence from here on, itself included: 2 at one to be committed, 1 at one that stands
            alone, 0 at one that follows another, and for padding.
        tokens: (S, L).
    """

    slot: torch.Tensor
    start: torch.Tensor
    length: torch.Tensor
    following: torch.Tensor
    tokens: torch.Tensor

    def split(self, count: int) -> list[Segments]:
        """The same in parts of `count` blocks."""
        columns = (getattr(self, field.name).split(count) for field in dataclasses.fields(self))
        return [Segments(*part) for part in zip(*columns, strict=True)]


class BatchState:
    """The state of N slots, on a device.

    Args:
        slots: N.
        block: L, the longest block length.
        stops: most stop tokens of a sequence.
        vocabulary: V.
        mask_token_id: fills masked positions.
        strategies: names of those that a sequence may have.
        penalized: whether a sequence may have a repetition penalty: its table of seen tokens is N x V.
        uniform: `random_numbers.uniform`, or what computes the same.
        device: torch device.
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
        uniform: Callable[..., torch.Tensor],
        device: Any,
    ) -> None:
        whole: dict[str, Any] = {"dtype": torch.int64, "device": device}
        real: dict[str, Any] = {"dtype": torch.float32, "device": device}
        flag: dict[str, Any] = {"dtype": torch.bool, "device": device}
        rows = slots + 1
        self.slots, self.block = slots, block
        self._vocabulary, self.mask_token_id, self._device = vocabulary, mask_token_id, device
        self.strategies, self._uniform = strategies, uniform
        self.needs_entropy = any(STRATEGIES[name].needs_entropy for name in strategies)
        self._orders = self._codes_by_rule(lambda strategy: strategy.order)
        self._counts = self._codes_by_rule(lambda strategy: strategy.count)
        self.offsets = torch.arange(block, device=device)
        # The block that is being denoised: (N + 1, L)
        self.tokens = torch.full((rows, block), mask_token_id, **whole)
        self.masked = torch.zeros(rows, block, **flag)
        self.unmasked_at = torch.full((rows, block), -1, **whole)
        self.confidence = torch.ones(rows, block, **real)
        self.before = torch.full((rows, block), mask_token_id, **whole)  # the block before, where it is uncommitted
        # (N + 1,)
        self.active = torch.zeros(rows, **flag)
        self.runs = torch.zeros(rows, **flag)  # whether the step under way has room for it
        # Between the kernels of a step: a slot's masked positions that take part, the index of its block among the
        # segments, and the index of its first masked position among the draws.
        self.wants, self.segment_of, self.draw_of = torch.zeros(3, slots, dtype=torch.int32, device=device)
        self.uncommitted = torch.zeros(rows, **flag)
        self.start = torch.zeros(rows, **whole)
        self.step = torch.zeros(rows, **whole)
        self.given = torch.zeros(rows, **whole)  # leading tokens of the block that are the prompt's
        self.room = torch.zeros(rows, **whole)  # new tokens that the answer may still get
        # Settings
        self.length = torch.zeros(rows, **whole)
        self.strategy = torch.zeros(rows, **whole)  # its code
        self.setting = torch.zeros(rows, **real)  # value of the strategy's setting
        self.quotas = torch.ones(rows, block, **whole)  # of each step
        self.stop_ids = torch.full((rows, max(stops, 1)), NO_TOKEN, **whole)
        self.seed = torch.zeros(rows, **whole)
        self.greedy = torch.ones(rows, **flag)
        self.top_k = torch.zeros(rows, **whole)
        self.top_p = torch.ones(rows, **real)
        self.temperature = torch.ones(rows, **real)
        self.penalty = torch.ones(rows, **real)
        self.seen = torch.zeros(rows, vocabulary, **flag) if penalized else None

    # What the host changes

    def begin(self, sequences: SequenceOf[Sequence]) -> None:
        """Write sequences to their slots, each at the block after its last full one."""
        slot = self.to_device(np.array([sequence.slot for sequence in sequences]))
        requests = [sequence.request for sequence in sequences]
        decodings = [request.decoding for request in requests]
        strategies, code = [STRATEGIES[decoding.remasking_strategy] for decoding in decodings], codes()
        given = np.array([len(sequence.tokens) - sequence.block_start for sequence in sequences])
        length = np.array([decoding.block_length for decoding in decodings])
        masked = (np.arange(self.block) >= given[:, None]) & (np.arange(self.block) < length[:, None])
        self._write(
            slot,
            tokens=_rows((s.tokens[s.block_start :] for s in sequences), self.block, self.mask_token_id),
            masked=masked,
            unmasked_at=np.full(masked.shape, -1),
            confidence=np.ones(masked.shape, dtype=np.float32),
            active=np.ones(len(slot), dtype=bool),
            uncommitted=np.zeros(len(slot), dtype=bool),
            start=[sequence.block_start for sequence in sequences],
            step=np.zeros(len(slot), dtype=np.int64),
            given=given,
            room=[sequence.request.max_new_tokens - sequence.num_new_tokens for sequence in sequences],
            length=length,
            strategy=[code[strategy.name] for strategy in strategies],
            setting=[getattr(d, s.setting) if s.setting else 0.0 for d, s in zip(decodings, strategies, strict=True)],
            quotas=_rows((decoding.quotas for decoding in decodings), self.block, 1),
            stop_ids=_rows((sorted(request.stop_ids) for request in requests), self.stop_ids.shape[1], NO_TOKEN),
            seed=np.array([request.seed & (2**64 - 1) for request in requests], dtype=np.uint64).astype(np.int64),
            greedy=[decoding.greedy for decoding in decodings],
            top_k=[0 if decoding.greedy else min(decoding.top_k, self._vocabulary) for decoding in decodings],
            top_p=[1.0 if decoding.greedy else decoding.top_p for decoding in decodings],
            temperature=[1.0 if decoding.greedy else decoding.temperature for decoding in decodings],
            penalty=[decoding.repetition_penalty for decoding in decodings],
        )
        if self.seen is not None:
            for sequence in sequences:
                self.seen[sequence.slot] = False
                self.seen[sequence.slot, self.to_device(np.array(sequence.tokens))] = True

    def stop(self, slots: SequenceOf[int]) -> None:
        """Take slots out of the batch."""
        if slots:
            self.active[self.to_device(np.array(slots))] = False

    # A step

    def segments(self, count: int) -> Segments:
        """The blocks that a forward runs: in order of slots, each with its predecessor in front if that is uncommitted.

        Args:
            count: S; the rest is padding. What there is no room for is left out.
        """
        self.runs.copy_(self.active & (self._blocks(self.active).sum(1).cumsum(0) <= count))
        row = _compact(self._blocks(self.runs).flatten(), count, padding=2 * self.slots)
        slot, commits = row // 2, row % 2 == 0
        real = slot != self.slots
        length = self.length[slot] * real
        start = self.start[slot] - torch.where(commits, length, 0)
        following = torch.where(commits, 2, (~self.uncommitted[slot]).long()) * real
        tokens = torch.where(commits[:, None], self.before[slot], self.tokens[slot])
        return Segments(slot, start, length, following, tokens)

    def masked_positions(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The masked positions to draw tokens for, M = `count`; padding is the padding slot's first position.

        A slot whose masked positions do not all fit takes no part in the step.

        Returns:
            (slot * L + position in the block, row of the flattened (S * L) hidden states of `segments`).
        """
        segment = (self._blocks(self.runs).flatten().cumsum(0)[1::2] - 1).clamp(min=0)
        self.runs &= (self.masked & self.runs[:, None]).sum(1).cumsum(0) <= count
        index = _compact((self.masked & self.runs[:, None]).flatten(), count, padding=self.slots * self.block)
        return index, segment[index // self.block] * self.block + index % self.block

    def _blocks(self, slots: torch.Tensor) -> torch.Tensor:
        """(N + 1, 2) bool: of some slots, whether the block before is run, and the block itself."""
        return torch.stack([slots & self.uncommitted, slots], dim=1)

    def advance(
        self, index: torch.Tensor, token: torch.Tensor, confidence: torch.Tensor, entropy: torch.Tensor
    ) -> torch.Tensor:
        """Keep the tokens that each strategy keeps; begin the next block where one is decided and the answer goes on.

        Args:
            index: (M,), from `masked_positions`.
            token, confidence, entropy: (M,), drawn for these positions.

        Returns:
            The outcome, packed for its way to the host; `unpack` makes an `Outcome` of it.
        """
        shape = self.tokens.shape
        drawn = torch.zeros(shape.numel(), dtype=torch.int64, device=self._device).scatter_(0, index, token)
        sure = torch.zeros(shape.numel(), device=self._device).scatter_(0, index, confidence).view(shape)
        spread = torch.zeros(shape.numel(), device=self._device).scatter_(0, index, entropy).view(shape)
        drawn = drawn.view(shape)
        took_part, committed = self.runs, self.runs & self.uncommitted
        masked = self.masked & took_part[:, None]
        kept = self._kept(masked, sure, spread)

        self.tokens.copy_(torch.where(kept, drawn, self.tokens))
        self.unmasked_at.copy_(torch.where(kept, self.step[:, None], self.unmasked_at))
        self.confidence.copy_(torch.where(kept, sure, self.confidence))
        self.masked &= ~kept
        if self.seen is not None:
            # Token by token of a block, so that shapes do not depend on how many are kept.
            for column in range(self.block):
                where = drawn[:, column : column + 1]
                self.seen.scatter_(1, where, self.seen.gather(1, where) | kept[:, column : column + 1])
        stuck = masked.any(dim=1) & ~kept.any(dim=1) | (kept & sure.isnan()).any(dim=1)
        # Positions behind the answer's end need no token.
        fresh = (self.offsets >= self.given[:, None]) & (self.offsets < self.length[:, None])  # (N + 1, L)
        stops = (self.tokens[:, :, None] == self.stop_ids[:, None, :]).any(dim=-1) & fresh & ~self.masked
        stop = torch.where(stops, self.offsets, self.block).min(dim=1).values
        end = torch.minimum(stop, self.given + self.room)
        decided = took_part & ~(self.masked & (self.offsets < end[:, None])).any(dim=1)
        new = self.length - self.given
        goes_on = decided & (stop == self.block) & (new < self.room)
        left = torch.where(decided, 0, self.masked.sum(dim=1))
        outcome = self._pack(took_part, committed, decided, stuck, goes_on, left)
        self.active &= ~decided | goes_on
        self.before.copy_(torch.where(goes_on[:, None], self.tokens, self.before))
        self.uncommitted.copy_(torch.where(took_part, goes_on, self.uncommitted))
        self.start += torch.where(goes_on, self.length, 0)
        self.room -= torch.where(goes_on, new, 0)
        self.given.masked_fill_(goes_on, 0)
        # Quotas are padded with 1: a strategy without a schedule may take as many steps as there are tokens.
        self.step.copy_(torch.where(goes_on, 0, (self.step + took_part).clamp(max=self.block - 1)))
        self.tokens.masked_fill_(goes_on[:, None], self.mask_token_id)
        self.masked |= goes_on[:, None] & (self.offsets < self.length[:, None])
        self.unmasked_at.masked_fill_(goes_on[:, None], -1)
        self.confidence.masked_fill_(goes_on[:, None], 1.0)
        return outcome

    def _kept(self, masked: torch.Tensor, confidence: torch.Tensor, entropies: torch.Tensor) -> torch.Tensor:
        """Which of the masked positions keep their token, each row by its own strategy: (N + 1, L) bool."""

        def random() -> torch.Tensor:
            return self._uniform(self.seed[:, None], self.start[:, None] + self.offsets, self.step[:, None], ORDER)

        quota = self.quotas.gather(1, self.step[:, None]).squeeze(1)
        candidates = Candidates(masked, confidence, entropies, self.offsets, quota, self.setting, random)
        keys, count = self._by_strategy(self._orders, candidates), self._by_strategy(self._counts, candidates)
        return unmasking.select_first(keys, count, masked)

    def _codes_by_rule(self, rule_of: Callable[[Strategy], Rule]) -> list[tuple[Rule, list[int]]]:
        """The rules of the batch's strategies, and the codes of each one's; the rule of most strategies first."""
        found: dict[Rule, list[int]] = {}
        for name in sorted(self.strategies):
            found.setdefault(rule_of(STRATEGIES[name]), []).append(codes()[name])
        return sorted(found.items(), key=lambda pair: -len(pair[1]))

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

    def _pack(self, *columns: torch.Tensor) -> torch.Tensor:
        """Blocks and columns (N + 1,) as one int32 tensor, the padding slot left out."""
        parts = [self.tokens.int(), self.unmasked_at.int(), self.confidence.view(torch.int32)]
        return torch.cat([part[:-1].flatten() for part in (*parts, *(column.int() for column in columns))])

    def pack_nothing(self) -> torch.Tensor:
        """A tensor with room for what `advance` returns."""
        return torch.zeros((3 * self.block + 6) * self.slots, dtype=torch.int32, device=self._device)

    def unpack(self, packed: torch.Tensor) -> Outcome:
        """What `advance` returned, on the host."""
        blocks = self.slots * self.block
        array = packed.numpy().copy()  # a later step overwrites the buffer
        tokens, unmasked_at, confidence = array[: 3 * blocks].reshape(3, self.slots, self.block)
        columns = array[3 * blocks :].reshape(6, self.slots)
        took_part, committed, decided, stuck, goes_on = columns[:5].astype(bool)
        confidence = confidence.view(np.float32)
        return Outcome(tokens, unmasked_at, confidence, took_part, committed, decided, stuck, goes_on, left=columns[5])

    def to_device(self, array: Any) -> torch.Tensor:
        """A host array on the device, without waiting for it."""
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        return (tensor.pin_memory() if self._device.type == "cuda" else tensor).to(self._device, non_blocking=True)

    def _write(self, slot: torch.Tensor, **columns: Any) -> None:
        for name, values in columns.items():
            state: torch.Tensor = getattr(self, name)
            state[slot] = self.to_device(np.asarray(values)).to(state.dtype)


def _rows(lists: Iterable[SequenceOf[int]], width: int, padding: int) -> Any:
    """Lists of different lengths as one array (count, width)."""
    lists = list(lists)
    rows = np.full((len(lists), width), padding, dtype=np.int64)
    for row, values in enumerate(lists):
        rows[row, : len(values)] = values
    return rows


def _compact(wanted: torch.Tensor, count: int, padding: int) -> torch.Tensor:
    """The indices where `wanted` (K,) is true, in order, then padding: (count,) int64. At most `count` are true."""
    target = torch.where(wanted, wanted.cumsum(0) - 1, count)
    indices = torch.full((count + 1,), padding, dtype=torch.int64, device=wanted.device)
    return indices.scatter_(0, target, torch.arange(len(wanted), device=wanted.device))[:count]
