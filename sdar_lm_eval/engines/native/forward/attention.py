"""Attention over paged KV: one function that transformers' Qwen3 layers call in the place of their own.

A forward's batch is B rows of Q query tokens; a row holds consecutive tokens of one sequence. New keys and values are
written to their pages first. Then every query sees the leading `visible` tokens of its sequence. This visibility is
the block-causal mask: a token of block b sees (b + 1) * block_length tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "sdar_paged"


class AttentionBatch(Protocol):
    """The batch of one forward: holds the cache and the addresses of the tokens, and attends."""

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """Attend to cached and new tokens, and store the new KV.

        Args:
            layer: index of the layer in the cache.
            query: (B, query heads, Q, head size).
            key, value: (B, KV heads, Q, head size) of the new tokens.
            scaling: factor on the scores.

        Returns:
            (B, Q, query heads, head size).
        """


class AttentionLayer(Protocol):
    """The attribute of transformers' attention layers that is read here."""

    layer_idx: int


@dataclass(frozen=True)
class PagedBatch:
    """A batch of sequences whose KV is paged.

    Attributes:
        cache: keys and values of all layers, (layers, 2, pages, page_size, KV heads, head size).
        pages: the pages of each row's sequence, (B, P) int64; P covers the longest `visible`.
        kv_slots: the KV slot of each new token, (B, Q) int64 into pages * page_size. Padding goes to the scratch page.
        visible: leading tokens of its sequence that each query sees, (B, Q) int64, at least 1.
    """

    cache: torch.Tensor
    pages: torch.Tensor
    kv_slots: torch.Tensor
    visible: torch.Tensor

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """See `AttentionBatch.attend`."""
        keys, values = self.cache[layer]  # (pages, page_size, KV heads, head size) each
        kv_slots = self.kv_slots.flatten()
        keys.flatten(0, 1)[kv_slots] = key.transpose(1, 2).flatten(0, 1)
        values.flatten(0, 1)[kv_slots] = value.transpose(1, 2).flatten(0, 1)
        return attend(query, keys, values, self.pages, self.visible, scaling)


def paged_attention(
    module: AttentionLayer,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    *,
    batch: AttentionBatch,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Transformers' attention interface; the mask is unused, since the batch knows what each token sees.

    Returns:
        (B, Q, query heads, head size), and None for attention weights.
    """
    return batch.attend(module.layer_idx, query, key, value, scaling), None


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    pages: torch.Tensor,
    visible: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """Attention in PyTorch: gather the pages, then one masked attention a KV head with its group of query heads.

    Args:
        query: (B, query heads, Q, head size).
        keys, values: (pages, page_size, KV heads, head size).
        pages: (B, P) int64.
        visible: (B, Q) int64.
        scaling: factor on the scores.

    Returns:
        (B, Q, query heads, head size).
    """
    group = query.shape[1] // keys.shape[2]
    k = keys[pages].flatten(1, 2).transpose(1, 2)  # (B, KV heads, context, head size)
    v = values[pages].flatten(1, 2).transpose(1, 2)
    context = torch.arange(k.shape[2], device=query.device)
    sees = (context < visible[..., None]).repeat(1, group, 1)[:, None]  # (B, 1, group * Q, context)
    return grouped_attention(query, k, v, sees, scaling)


def grouped_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scaling: float
) -> torch.Tensor:
    """One attention a KV head, with its group of query heads.

    Args:
        query: (B, query heads, Q, head size).
        key, value: (B, KV heads, K, head size).
        mask: (B, 1, group * Q, K), bool or added to the scores.
        scaling: factor on the scores.

    Returns:
        (B, Q, query heads, head size).
    """
    b, heads, q, size = query.shape
    kv_heads = key.shape[1]
    grouped = query.reshape(b, kv_heads, (heads // kv_heads) * q, size)
    out = scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scaling)
    return out.reshape(b, heads, q, size).transpose(1, 2)


def hidden_states(
    model: PreTrainedModel, tokens: torch.Tensor, positions: torch.Tensor, batch: AttentionBatch
) -> torch.Tensor:
    """Run tokens through transformers' modules, with a batch that attends.

    Args:
        model: transformers' model with the attention of this module.
        tokens, positions: (B, Q) int64.
        batch: the tokens' batch.

    Returns:
        The last hidden states, (B, Q, hidden size).
    """
    # A mask stops transformers from building one. All versions pass a 4-d mask on, and no attention reads it.
    mask = torch.empty(len(tokens), 1, 1, 1, dtype=model.dtype, device=tokens.device)
    hidden: torch.Tensor = model.model(
        input_ids=tokens, position_ids=positions, attention_mask=mask, batch=batch, use_cache=False
    ).last_hidden_state
    return hidden


ALL_ATTENTION_FUNCTIONS.register(NAME, paged_attention)
