"""Attention for scoring by transformers' modules: many masked copies of a block attend to one stored prefix.

Generation has one current block a sequence, and writes the block's keys and values to pages (`attention.py`). Scoring
has hundreds of differently masked copies of every block of a text. All copies of a block see the same clean tokens
before the block. Here a row of the batch is a prefix and Q new tokens. The new tokens are whole blocks of clean text,
whose KV is stored, or masked copies of blocks side by side, whose KV is not needed afterwards. The prefix is gathered
once a row, not once a copy.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sdar_lm_eval.engines.native.forward.attention import grouped_attention


@dataclass(frozen=True)
class BranchBatch:
    """The batch of one forward of scoring.

    Attributes:
        cache: keys and values of all layers, (layers, 2, T, KV heads, head size).
        prefix: KV slots of each row's stored tokens in order, (B, N) int64.
        bias: `attention_bias` of the rows, (B, 1, group * Q, N + Q) in the model's dtype; the same for all layers.
        kv_slots: the KV slot of each new token, (B, Q) int64 into T; None: the KV is not stored.
    """

    cache: torch.Tensor
    prefix: torch.Tensor
    bias: torch.Tensor
    kv_slots: torch.Tensor | None

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """See `AttentionBatch.attend`. `bias` masks the stored and the new tokens that a token does not see."""
        keys, values = self.cache[layer]  # (T, KV heads, head size) each
        k = torch.cat([keys[self.prefix].transpose(1, 2), key], dim=2)  # (B, KV heads, N + Q, head size)
        v = torch.cat([values[self.prefix].transpose(1, 2), value], dim=2)
        out = grouped_attention(query, k, v, self.bias, scaling)
        if self.kv_slots is not None:
            kv_slots = self.kv_slots.flatten()
            keys[kv_slots] = key.transpose(1, 2).flatten(0, 1)
            values[kv_slots] = value.transpose(1, 2).flatten(0, 1)
        return out


def attention_bias(
    visible: torch.Tensor, first: torch.Tensor, last: torch.Tensor, *, stored: int, group: int, dtype: torch.dtype
) -> torch.Tensor:
    """The bias of attention scores: 0 for a token that a query sees, -inf for one that it does not see.

    Args:
        visible: leading tokens of its row's prefix that each new token sees, (B, Q) int64.
        first, last: each new token sees the row's new tokens first <= index < last, (B, Q) int64; one is itself.
        stored: N, tokens of a prefix, padding included.
        group: query heads a KV head.
        dtype: dtype of the result.

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
