"""entropy_bounded: the positions of the lowest entropies, as many as have a sum below a bound."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from sdar_lm_eval.engines.native.strategies.base import Candidates, Strategy

if TYPE_CHECKING:
    import torch


def lowest_entropy_first(candidates: Candidates) -> torch.Tensor:
    """Sort keys (B, L): the entropy."""
    return candidates.entropy


def within_bound(candidates: Candidates) -> torch.Tensor:
    """Number (B,): how many of the lowest entropies have a sum strictly below the bound; at least 1."""
    sums = candidates.entropy.masked_fill(~candidates.masked, math.inf).sort(dim=-1).values.cumsum(dim=-1)
    return (sums < candidates.setting[:, None]).sum(dim=-1).clamp(min=1)


STRATEGY = Strategy(
    name="entropy_bounded",
    short="entropy",
    # generate.py computes one entropy for the whole block, and stops with an error. Here each position has its own.
    source="JetAstra/SDAR, generate.py (commit c2041a8)",
    setting="eb_threshold",
    order=lowest_entropy_first,
    count=within_bound,
    needs_entropy=True,
    uses_schedule=False,
)
