"""Attention of tokens that branch off cached ones: many versions of a block over one stored prefix.

Generation gives each sequence one current block and writes its keys and values to pages (`attention.py`). Scoring has
hundreds of differently masked copies of every block of a text, all of which see the same clean tokens before it. Here a
row of the batch is such a text with Q new tokens: whole blocks of clean text whose KV is kept, or masked copies of
blocks side by side, whose KV nobody needs afterwards. The prefix is gathered once a row, not once a copy.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention


@dataclass(frozen=True)
class BranchBatch:
    """What the tokens of one forward see.

    Attributes:
        cache: keys and values of all layers, (layers, 2, T, KV heads, head size).
        prefix: KV slots of each row's stored tokens in order, (B, N) int64.
        bias: `sight`'s, (B, 1, group * Q, N + Q) in the model's dtype; made once for all layers.
        kv_slots: where the KV of each new token goes, (B, Q) int64 into T; None: nowhere.
    """

    cache: torch.Tensor
    prefix: torch.Tensor
    bias: torch.Tensor
    kv_slots: torch.Tensor | None

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """See `AttentionBatch.attend`. A token sees its part of the prefix, and the new tokens in sight."""
        keys, values = self.cache[layer]  # (T, KV heads, head size) each
        b, heads, q, size = query.shape
        kv_heads = key.shape[1]
        k = torch.cat([keys[self.prefix].transpose(1, 2), key], dim=2)  # (B, KV heads, N + Q, head size)
        v = torch.cat([values[self.prefix].transpose(1, 2), value], dim=2)
        # One attention a KV head with its whole group of query heads.
        grouped = query.reshape(b, kv_heads, (heads // kv_heads) * q, size)
        out = scaled_dot_product_attention(grouped, k, v, attn_mask=self.bias, scale=scaling)
        if self.kv_slots is not None:
            kv_slots = self.kv_slots.flatten()
            keys[kv_slots] = key.transpose(1, 2).flatten(0, 1)
            values[kv_slots] = value.transpose(1, 2).flatten(0, 1)
        return out.reshape(b, heads, q, size).transpose(1, 2)


def sight(
    visible: torch.Tensor, first: torch.Tensor, last: torch.Tensor, *, stored: int, group: int, dtype: torch.dtype
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
