"""random: random positions, as many as the schedule says."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdar_lm_eval.engines.native.strategies.base import Candidates, Strategy

if TYPE_CHECKING:
    import torch


def random_order(candidates: Candidates) -> torch.Tensor:
    """Sort keys (B, L): random numbers."""
    return candidates.random()


STRATEGY = Strategy(
    name="random",
    source="ML-GSAI/LLaDA, generate.py: remasking='random'",
    order=random_order,
    is_random=True,
)
