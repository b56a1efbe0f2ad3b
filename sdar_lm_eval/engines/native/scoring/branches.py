"""Attention of tokens that branch off cached ones: many versions of a block over one stored prefix.

Generation gives each sequence one current block and writes its keys and values to pages (`attention.py`). Scoring has
hundreds of differently masked copies of every block of a text, all of which see the same clean tokens before it. Here a
row of the batch is such a text with Q new tokens: whole blocks of clean text whose KV is kept, or masked copies of
blocks side by side, whose KV nobody needs afterwards. The prefix is gathered once a row, not once a copy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention


@dataclass(frozen=True)
class BranchBatch:
    """What the tokens of one forward see.

    Attributes:
        cache: keys and values of all layers, (layers, 2, T, KV heads, head size).
        prefix: places in the cache of each row's stored tokens in order, (B, N) int64.
        bias: `sight`'s, (B, 1, group * Q, N + Q) in the model's dtype; made once for all layers.
        places: where each new token's KV goes, (B, Q) int64 into T; None: nowhere.
    """

    cache: torch.Tensor
    prefix: torch.Tensor
    bias: torch.Tensor
    places: torch.Tensor | None


def sight(
    visible: torch.Tensor, first: torch.Tensor, last: torch.Tensor, stored: int, group: int, dtype: torch.dtype
) -> torch.Tensor:
    """What is added to attention scores: 0 for what a token sees, -inf for what it does not.

    Args:
        visible: leading tokens of its prefix that each new token sees, (B, Q) int64.
        first, last: of the row's new tokens it sees those from `first` up to and without `last`, (B, Q) int64; at least
            itself.
        stored: tokens of the prefixes, padding included: N.
        group: query heads a KV head.
        dtype: of the result.

    Returns:
        (B, 1, group * Q, N + Q).
    """
    device = visible.device
    prefix = torch.arange(stored, device=device) < visible[..., None]  # (B, Q, N)
    new = torch.arange(visible.shape[1], device=device)
    own = (new >= first[..., None]) & (new < last[..., None])  # (B, Q, Q)
    hidden = ~torch.cat([prefix, own], dim=-1)
    bias = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, -torch.inf)
    return bias.repeat(1, group, 1)[:, None]


def branch_attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, batch: BranchBatch
) -> torch.Tensor:
    """Attend to the visible prefix and to the new tokens in sight; keep the new KV where asked to.

    Args:
        module: the attention layer; its `layer_idx` names the cache's layer.
        query: (B, query heads, Q, head size).
        key, value: (B, KV heads, Q, head size) of the new tokens.
        scaling: factor on the scores.
        batch: what they see.

    Returns:
        (B, Q, query heads, head size).
    """
    keys, values = batch.cache[module.layer_idx]  # (T, KV heads, head size) each
    b, heads, q, size = query.shape
    kv_heads = key.shape[1]
    k = torch.cat([keys[batch.prefix].transpose(1, 2), key], dim=2)  # (B, KV heads, N + Q, head size)
    v = torch.cat([values[batch.prefix].transpose(1, 2), value], dim=2)
    # One attention a KV head with its whole group of query heads.
    grouped = query.reshape(b, kv_heads, (heads // kv_heads) * q, size)
    out = scaled_dot_product_attention(grouped, k, v, attn_mask=batch.bias, scale=scaling)
    if batch.places is not None:
        places = batch.places.flatten()
        keys[places] = key.transpose(1, 2).flatten(0, 1)
        values[places] = value.transpose(1, 2).flatten(0, 1)
    return out.reshape(b, heads, q, size).transpose(1, 2)
