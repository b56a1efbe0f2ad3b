"""low_confidence_dynamic: every position above a threshold; at least as many as the schedule says."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdar_lm_eval.engines.native.strategies.base import Candidates, Strategy

if TYPE_CHECKING:
    import torch


def above_threshold(candidates: Candidates) -> torch.Tensor:
    """Number (B,): how many confidences are strictly above the threshold, or the quota if the quota is larger."""
    above = candidates.masked & (candidates.confidence > candidates.setting[:, None])
    return above.sum(dim=-1).maximum(candidates.quota)


STRATEGY = Strategy(
    name="low_confidence_dynamic",
    short="dynamic",
    source="JetAstra/SDAR, generate.py (commit c2041a8)",
    setting="confidence_threshold",
    count=above_threshold,
)
