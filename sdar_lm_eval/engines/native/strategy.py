"""What a remasking strategy is: the rule by which a denoising step chooses the masked positions that keep their token.

Each step draws a token for every masked position of a block. A strategy orders these positions and says how many of
them, from the first on, keep their token; the others stay masked. Each strategy is one file in `strategies/`.

Names and settings are read where torch is not imported, so rules use methods of tensors only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Candidates:
    """What a step drew, and what a strategy may choose by. B sequences, L positions of a block.

    Attributes:
        masked: (B, L) bool, positions to choose from; the values of other positions mean nothing.
        confidence: (B, L) float32, probability of the drawn token.
        entropy: (B, L) float32, of the distribution, in nats; 0 unless the strategy needs entropies.
        offsets: (L,) int64, 0 to L - 1.
        quota: (B,) int64, tokens that the schedule unmasks in this step (`DecodingConfig.quotas`).
        setting: (B,) float32, value of the strategy's setting.
        random: gives (B, L) float32 in [0, 1), which depend on seed, position and step alone.
    """

    masked: torch.Tensor
    confidence: torch.Tensor
    entropy: torch.Tensor
    offsets: torch.Tensor
    quota: torch.Tensor
    setting: torch.Tensor
    random: Callable[[], torch.Tensor]


Rule = Callable[[Candidates], "torch.Tensor"]


def most_confident_first(candidates: Candidates) -> torch.Tensor:
    """Sort keys (B, L): the highest confidence is the lowest key."""
    return -candidates.confidence


def schedule(candidates: Candidates) -> torch.Tensor:
    """Number (B,): the schedule's quota of this step."""
    return candidates.quota


@dataclass(frozen=True)
class Strategy:
    """A strategy. `torch.compile` takes its rules for GPUs: fixed shapes, and no value that is read on the host.

    Attributes:
        name: value of `remasking_strategy`.
        source: where the algorithm is from.
        short: another spelling of the name.
        setting: the field of `DecodingConfig` that steers it.
        order: gives sort keys (B, L) float32; the lowest keys keep their tokens, the left one where two tie.
        count: gives how many positions keep their token, (B,) int64. At least 1, so that each step unmasks something;
            where it exceeds the masked positions, all of them keep their token.
        needs_entropy: whether a rule reads `Candidates.entropy`.
        uses_schedule: whether `count` is never below the quota. Others unmask at least one token a step.
        is_random: whether a rule reads `Candidates.random`: greedy answers then depend on the seed.
    """

    name: str
    source: str
    short: str | None = None
    setting: str | None = None
    order: Rule = most_confident_first
    count: Rule = schedule
    needs_entropy: bool = False
    uses_schedule: bool = True
    is_random: bool = False
