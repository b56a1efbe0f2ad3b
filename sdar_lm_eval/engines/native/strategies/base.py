"""A remasking strategy: the rule by which a denoising step chooses the masked positions that keep their token.

Each step draws a token for every masked position of a block. A strategy orders these positions and chooses a number n.
The first n positions keep their token; the others stay masked. Each strategy is one file in `strategies/`.

Settings and documentation read the strategies' names without importing torch. So rules only call methods of tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Candidates:
    """What a step drew: the input of a strategy's rules. B sequences, L positions of a block.

    Attributes:
        masked: (B, L) bool, positions to choose from. The values of other positions are undefined.
        confidence: (B, L) float32, probability of the drawn token.
        entropy: (B, L) float32, of the distribution, in nats; 0 unless the strategy needs entropies.
        offsets: (L,) int64, 0 to L - 1.
        quota: (B,) int64, tokens that the schedule unmasks in this step (`DecodingConfig.quotas`).
        setting: (B,) float32, value of the strategy's setting.
        random: returns (B, L) float32 in [0, 1) that depend on seed, position and step only.
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
    """Sort keys (B, L): the highest confidence has the lowest key."""
    return -candidates.confidence


def schedule(candidates: Candidates) -> torch.Tensor:
    """Number (B,): the schedule's quota of this step."""
    return candidates.quota


@dataclass(frozen=True)
class Strategy:
    """A remasking strategy.

    `torch.compile` compiles the rules for GPUs, so a rule has fixed shapes and reads no value on the host.

    Attributes:
        name: value of `remasking_strategy`.
        source: where the algorithm is from.
        short: another spelling of the name.
        setting: the field of `DecodingConfig` that the strategy's rules read.
        order: returns sort keys (B, L) float32. The positions of the lowest keys keep their tokens; of two equal keys,
            the left one comes first.
        count: returns how many positions keep their token, (B,) int64. At least 1, so that each step unmasks some
            position. A count above the number of masked positions means all of them.
        needs_entropy: whether a rule reads `Candidates.entropy`.
        uses_schedule: whether `count` is never below the quota.
        is_random: whether a rule reads `Candidates.random`. Greedy answers of such a strategy depend on the seed.
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
