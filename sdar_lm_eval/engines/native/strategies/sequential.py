"""sequential: the leftmost positions, as many as the schedule says."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdar_lm_eval.engines.native.strategies.base import Candidates, Strategy

if TYPE_CHECKING:
    import torch


def leftmost_first(candidates: Candidates) -> torch.Tensor:
    """Sort keys (B, L): the position in the block."""
    return candidates.offsets.float().expand_as(candidates.confidence)


STRATEGY = Strategy(
    name="sequential",
    source="JetAstra/SDAR, generate.py (commit c2041a8)",
    order=leftmost_first,
)
