"""Draws tokens, and selects the positions that keep them. Pure functions on tensors; `strategies/` has the rules.

Semantics follow `generate.py` of JetAstra/SDAR (commit c2041a8), with two differences. Masked positions are state here,
not "token == mask id", so a prompt may hold the mask token. A step never keeps more tokens than positions are masked;
generate.py overwrites tokens of the prompt in this case.

Shapes: B sequences, L positions a block, R rows of logits (masked positions only), V tokens.
"""

from __future__ import annotations

import torch

LOGITS_BUDGET_BYTES = 1 << 30  # most memory of the float32 logits that are in memory at once


def rows_at_once(vocabulary: int) -> int:
    """Number of rows of float32 logits to compute at once."""
    return max(1, LOGITS_BUDGET_BYTES // (4 * vocabulary))


def penalize_repetition(logits: torch.Tensor, seen: torch.Tensor, penalty: torch.Tensor) -> torch.Tensor:
    """Divide positive and multiply negative logits of seen tokens by the penalty.

    Source: transformers, RepetitionPenaltyLogitsProcessor. logits (R, V), seen (R, V) bool, penalty (R,).
    """
    factor = penalty[:, None]
    return torch.where(seen, torch.where(logits > 0, logits / factor, logits * factor), logits)


def draw_greedy(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The most probable token and its softmax probability at temperature 1. Of two equal tokens, the lower id is drawn.

    logits (R, V) float32; returns tokens (R,) int64 and confidences (R,) float32.
    """
    best, tokens = logits.max(dim=-1)
    return tokens, (best - logits.logsumexp(dim=-1)).exp()


def filtered_probabilities(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    *,
    any_filter: bool = True,
) -> torch.Tensor:
    """The distribution that tokens are drawn from: softmax(logits / T), filtered by top-k and then by top-p.

    top-k keeps every token that ties with the k-th one. top-p keeps a token if all more probable tokens together have a
    probability of at most p, renormalized after top-k. Source: generate.py, top_k_logits and top_p_logits.

    Args:
        logits: (R, V) float32.
        temperature: (R,), above 0.
        top_k: (R,) int64; 0 is off.
        top_p: (R,); 1 is off.
        any_filter: whether top-k or top-p may be on in any row. False skips the slow sort of the vocabulary.

    Returns:
        (R, V) float32, rows sum to 1.
    """
    logits = logits / temperature[:, None]
    if not any_filter:
        return logits.softmax(dim=-1)
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    vocabulary = logits.shape[-1]
    kth = ordered.gather(-1, (torch.where(top_k > 0, top_k, vocabulary).clamp(max=vocabulary) - 1)[:, None])
    ordered = ordered.masked_fill(ordered < kth, -torch.inf)
    probabilities = ordered.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    ordered = ordered.masked_fill((before > top_p[:, None]) & (top_p < 1)[:, None], -torch.inf)
    return torch.zeros_like(logits).scatter(-1, order, ordered.softmax(dim=-1))


def draw_sampled(probabilities: torch.Tensor, uniform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw a token a row by inverting the cumulative distribution in order of token ids.

    probabilities (R, V), uniform (R,) in [0, 1); returns tokens (R,) int64 and their probabilities (R,).
    """
    cumulative = probabilities.cumsum(dim=-1)
    total = cumulative[:, -1:]
    # The target is strictly below the total: the first cumulative value above it has a token of positive probability.
    target = torch.minimum(uniform[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    tokens = torch.searchsorted(cumulative, target, right=True).squeeze(-1)
    # A row of NaN yields an index past the vocabulary. Such a row gets token 0, and its confidence is NaN.
    tokens = tokens.masked_fill(tokens == probabilities.shape[-1], 0)
    return tokens, probabilities.gather(-1, tokens[:, None]).squeeze(-1)


def entropy(probabilities: torch.Tensor) -> torch.Tensor:
    """Entropy in nats of each row: (..., V) -> (...)."""
    summands: torch.Tensor = torch.special.entr(probabilities)
    return summands.sum(dim=-1)


def select_first(keys: torch.Tensor, count: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
    """Choose the `count` masked positions with the lowest keys. Of two equal keys, the left one comes first.

    keys and masked (B, L), count (B,); returns (B, L) bool, a subset of `masked`.
    """
    keys = keys.masked_fill(~masked, torch.inf)
    this, other = keys[:, :, None], keys[:, None, :]
    left = torch.ones_like(masked[0]).expand(keys.shape[-1], -1).tril(-1)  # (L, L): the other position is to the left
    rank = ((other < this) | ((other == this) & left)).sum(dim=-1)
    return (rank < count[:, None]) & masked
