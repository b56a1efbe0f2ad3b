"""Attention over paged KV: one function, called by transformers' Qwen3 layers in the place of their own.

A forward's batch is B rows of Q query tokens, each row a stretch of one sequence. New keys and values are first written
to their pages; then every query sees the leading `visible` tokens of its sequence, which is all that "causal over
blocks, full inside a block" means: a token of block b sees (b + 1) * block_length tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sdar_lm_eval.engines.native.scoring.branches import BranchBatch, branch_attention

NAME = "sdar_paged"


@dataclass(frozen=True)
class PagedBatch:
    """Where the tokens of one forward stand.

    Attributes:
        cache: keys and values of all layers, (layers, 2, pages, page_size, KV heads, head size).
        pages: the pages of each row's sequence, (B, P) int64; P covers the longest `visible`.
        places: where each new token's KV goes, (B, Q) int64 into pages * page_size; padding goes to the scratch page.
        visible: leading tokens of its sequence that each query sees, (B, Q) int64, at least 1.
    """

    cache: torch.Tensor
    pages: torch.Tensor
    places: torch.Tensor
    visible: torch.Tensor


def paged_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    *,
    batch: PagedBatch | BranchBatch,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Write the new KV, then attend. The signature is that of transformers' attention interface.

    Args:
        module: the attention layer; its `layer_idx` names the cache's layer.
        query: (B, query heads, Q, head size).
        key, value: (B, KV heads, Q, head size) of the new tokens.
        attention_mask: unused; `batch.visible` says it all.
        scaling: factor on the scores.
        batch: where the tokens stand; a `BranchBatch` when texts are scored (`branches.py`).

    Returns:
        (B, Q, query heads, head size), and None for attention weights.
    """
    if isinstance(batch, BranchBatch):
        return branch_attention(module, query, key, value, scaling, batch), None
    keys, values = batch.cache[module.layer_idx]  # (pages, page_size, KV heads, head size) each
    places = batch.places.flatten()
    keys.flatten(0, 1)[places] = key.transpose(1, 2).flatten(0, 1)
    values.flatten(0, 1)[places] = value.transpose(1, 2).flatten(0, 1)
    return attend(query, keys, values, batch.pages, batch.visible, scaling), None


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    pages: torch.Tensor,
    visible: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """The PyTorch body: gather the pages, one masked attention a KV head with its whole group of query heads.

    Args:
        query: (B, query heads, Q, head size).
        keys, values: (pages, page_size, KV heads, head size).
        pages: (B, P) int64.
        visible: (B, Q) int64.
        scaling: factor on the scores.

    Returns:
        (B, Q, query heads, head size).
    """
    b, heads, q, size = query.shape
    kv_heads = keys.shape[2]
    k = keys[pages].flatten(1, 2).transpose(1, 2)  # (B, KV heads, context, head size)
    v = values[pages].flatten(1, 2).transpose(1, 2)
    context = torch.arange(k.shape[2], device=query.device)
    sees = (context < visible[..., None]).repeat(1, heads // kv_heads, 1)[:, None]  # (B, 1, group * Q, context)
    grouped = query.reshape(b, kv_heads, (heads // kv_heads) * q, size)
    out = scaled_dot_product_attention(grouped, k, v, attn_mask=sees, scale=scaling)
    return out.reshape(b, heads, q, size).transpose(1, 2)


ALL_ATTENTION_FUNCTIONS.register(NAME, paged_attention)
