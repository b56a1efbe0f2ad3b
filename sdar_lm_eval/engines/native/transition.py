"""The transition of blocks by a denoising step: drawn tokens are kept, a block is decided, the next block begins.

A block without masked positions is decided, and the next block begins. The last block of an answer is decided once no
position before the answer's end is masked.

The functions have fixed shapes and never read a value on the host: `torch.compile` and CUDA graphs need both.

Shapes: N slots and one more for padding, L positions of a block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from sdar_lm_eval.engines.native import unmasking
from sdar_lm_eval.engines.native.random_numbers import ORDER, uniform
from sdar_lm_eval.engines.native.strategies import STRATEGIES, codes
from sdar_lm_eval.engines.native.strategies.base import Candidates, Rule, Strategy


class Blocks(NamedTuple):
    """The current block of each slot.

    Attributes:
        tokens: (N + 1, L), with the mask token at masked positions.
        masked: (N + 1, L) bool.
        unmasked_at: (N + 1, L), the step that unmasked each token; -1 for tokens of the prompt.
        confidence: (N + 1, L), the probability of each token at that step.
        previous: (N + 1, L), tokens of the block before, where it is uncommitted.
        active: (N + 1,) bool, slots whose answer goes on.
        uncommitted: (N + 1,) bool, slots whose block before has no stored keys and values.
        start: (N + 1,), position of the block's first token in the sequence.
        step: (N + 1,), denoising step in the block.
        given: (N + 1,), leading tokens of the block that belong to the prompt.
        remaining: (N + 1,), new tokens that the answer may still get, from this block on.
    """

    tokens: torch.Tensor
    masked: torch.Tensor
    unmasked_at: torch.Tensor
    confidence: torch.Tensor
    previous: torch.Tensor
    active: torch.Tensor
    uncommitted: torch.Tensor
    start: torch.Tensor
    step: torch.Tensor
    given: torch.Tensor
    remaining: torch.Tensor

    def write(self, new: Blocks) -> None:
        """Copy other blocks into these tensors, which stay in place."""
        for target, value in zip(self, new, strict=True):
            target.copy_(value)


class Settings(NamedTuple):
    """Settings of each slot's sequence, (N + 1,) each.

    Attributes:
        length: tokens of a block.
        strategy: the strategy's code.
        setting: the value of the strategy's setting.
        quotas: (N + 1, L), tokens that each step of the schedule unmasks.
        stop_ids: (N + 1, stops), padded with a number that is no token.
        seed: seed of the sequence's draws.
        greedy: whether the sequence takes the most probable token.
        temperature: 1 for a greedy sequence.
        top_k: 0 where off.
        top_p: 1 where off.
        penalty: the repetition penalty; 1 where off.
    """

    length: torch.Tensor
    strategy: torch.Tensor
    setting: torch.Tensor
    quotas: torch.Tensor
    stop_ids: torch.Tensor
    seed: torch.Tensor
    greedy: torch.Tensor
    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    penalty: torch.Tensor


class Drawn(NamedTuple):
    """What was drawn for some positions, a value each.

    Attributes:
        token: the drawn tokens.
        confidence: the probabilities of the tokens.
        entropy: the entropies of the distributions, in nats; 0 where no strategy reads them.
    """

    token: torch.Tensor
    confidence: torch.Tensor
    entropy: torch.Tensor


class Changes(NamedTuple):
    """What a step did to the blocks: the attributes of `batch.StepOutcome` on the device, N + 1 rows each.

    Attributes:
        kept: (N + 1, L) bool, the positions that this step unmasked.
    """

    tokens: torch.Tensor
    unmasked_at: torch.Tensor
    confidence: torch.Tensor
    took_part: torch.Tensor
    committed: torch.Tensor
    decided: torch.Tensor
    stuck: torch.Tensor
    goes_on: torch.Tensor
    masked: torch.Tensor
    kept: torch.Tensor


class Transition:
    """The transition of blocks by a step.

    Args:
        block: L, the longest block length.
        mask_token_id: the token at masked positions.
        strategies: names of the strategies that sequences may have.
        device: the device of all tensors.
    """

    def __init__(self, block: int, mask_token_id: int, strategies: frozenset[str], device: torch.device) -> None:
        self._mask_token_id = mask_token_id
        self._orders = _codes_by_rule(strategies, lambda strategy: strategy.order)
        self._counts = _codes_by_rule(strategies, lambda strategy: strategy.count)
        self.offsets = torch.arange(block, device=device)

    def __call__(
        self, blocks: Blocks, settings: Settings, took_part: torch.Tensor, drawn: Drawn
    ) -> tuple[Blocks, Changes]:
        """Keep the drawn tokens that each strategy selects. Begin the next block where the answer goes on.

        Args:
            blocks: the blocks before the step.
            settings: the slots' settings.
            took_part: (N + 1,) bool, the slots that are denoised. Other slots stay as they are.
            drawn: (N + 1, L), the tokens of masked positions; the values of other positions are undefined.
        """
        block, length = len(self.offsets), settings.length
        masked = blocks.masked & took_part[:, None]
        kept = self._kept(masked, blocks, settings, drawn)
        tokens = torch.where(kept, drawn.token, blocks.tokens)
        unmasked_at = torch.where(kept, blocks.step[:, None], blocks.unmasked_at)
        confidence = torch.where(kept, drawn.confidence, blocks.confidence)
        still_masked = blocks.masked & ~kept
        stuck = masked.any(dim=1) & ~kept.any(dim=1) | (kept & drawn.confidence.isnan()).any(dim=1)
        # Positions after the answer's end need no token, so they may stay masked.
        fresh = (self.offsets >= blocks.given[:, None]) & (self.offsets < length[:, None])  # (N + 1, L)
        stops = (tokens[:, :, None] == settings.stop_ids[:, None, :]).any(dim=-1) & fresh & ~still_masked
        stop = torch.where(stops, self.offsets, block).min(dim=1).values
        end = torch.minimum(stop, blocks.given + blocks.remaining)
        decided = took_part & ~(still_masked & (self.offsets < end[:, None])).any(dim=1)
        new = length - blocks.given
        goes_on = decided & (stop == block) & (new < blocks.remaining)
        begins = goes_on[:, None]
        after = Blocks(
            tokens=torch.where(begins, self._mask_token_id, tokens),
            masked=still_masked | (begins & (self.offsets < length[:, None])),
            unmasked_at=torch.where(begins, -1, unmasked_at),
            confidence=torch.where(begins, 1.0, confidence),
            previous=torch.where(begins, tokens, blocks.previous),
            active=blocks.active & (~decided | goes_on),
            uncommitted=torch.where(took_part, goes_on, blocks.uncommitted),
            start=blocks.start + torch.where(goes_on, length, 0),
            # A strategy without a schedule may take as many steps as the block has tokens: quotas are padded with 1.
            step=torch.where(goes_on, 0, (blocks.step + took_part).clamp(max=block - 1)),
            given=torch.where(goes_on, 0, blocks.given),
            remaining=blocks.remaining - torch.where(goes_on, new, 0),
        )
        committed = took_part & blocks.uncommitted
        num_masked = torch.where(decided, 0, still_masked.sum(dim=1))
        flags = (took_part, committed, decided, stuck, goes_on)
        return after, Changes(tokens, unmasked_at, confidence, *flags, num_masked, kept)

    def _kept(self, masked: torch.Tensor, blocks: Blocks, settings: Settings, drawn: Drawn) -> torch.Tensor:
        """The masked positions that keep their token, each row by its own strategy: (N + 1, L) bool."""

        def random() -> torch.Tensor:
            position = blocks.start[:, None] + self.offsets
            return uniform(settings.seed[:, None], position, blocks.step[:, None], ORDER)

        quota = settings.quotas.gather(1, blocks.step[:, None]).squeeze(1)
        candidates = Candidates(
            masked, drawn.confidence, drawn.entropy, self.offsets, quota, settings.setting, random
        )  # fmt: skip
        keys = _by_strategy(self._orders, settings.strategy, candidates)
        count = _by_strategy(self._counts, settings.strategy, candidates)
        return unmasking.select_first(keys, count, masked)


def _by_strategy(rules: list[tuple[Rule, list[int]]], strategy: torch.Tensor, candidates: Candidates) -> torch.Tensor:
    """Each row's value by the rule of its own strategy: (N + 1, ...)."""
    (first, _), *others = rules
    chosen = first(candidates)
    for rule, strategy_codes in others:
        values = rule(candidates)
        for code in strategy_codes:
            here = (strategy == code).view(-1, *[1] * (values.dim() - 1))
            chosen = torch.where(here, values, chosen)
    return chosen


def _codes_by_rule(strategies: frozenset[str], rule_of: Callable[[Strategy], Rule]) -> list[tuple[Rule, list[int]]]:
    """Each rule with the codes of the strategies that have it; the rule of the most strategies first."""
    found: dict[Rule, list[int]] = {}
    for name in sorted(strategies):
        found.setdefault(rule_of(STRATEGIES[name]), []).append(codes()[name])
    return sorted(found.items(), key=lambda pair: -len(pair[1]))
