from __future__ import annotations

import jetengine_shared as shared
import torch


def top_k_top_p_sampling_from_probs(
    probs: torch.Tensor, top_k: int, top_p: float, generator: torch.Generator | None = None
) -> torch.Tensor:
    """flashinfer's; without a generator it makes a new one at each call."""
    allowed = shared.nucleus(shared.most_probable(probs, top_k or 1), top_p)
    return torch.multinomial(allowed, 1, generator=generator or torch.Generator().manual_seed(0)).squeeze(-1)
