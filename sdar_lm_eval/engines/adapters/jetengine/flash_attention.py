"""Whether the installed flash-attn computes what JetEngine 0.2.0 asks of it.

When few sequences run, flash-attn splits a context among several thread blocks and combines their results. Some builds
of flash-attn get splits wrong for some head sizes, without an error: answers are then nonsense.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import torch

from sdar_lm_eval.engines.adapters.jetengine import api
from sdar_lm_eval.engines.adapters.jetengine.memory import PAGE_SIZE
from sdar_lm_eval.errors import EngineError
from sdar_lm_eval.families.base import Config

logger = logging.getLogger(__name__)

TOLERANCE = 0.03  # for averages of standard normal values in bf16 or fp16; a wrong result is off by 0.3 and more


def ensure_right_attention(config: Config, block_length: int, dtype: torch.dtype, device: torch.device | str) -> bool:
    """Try flash-attn on the checkpoint's shapes; if only its splits are wrong, have JetEngine call it without splits.

    Args:
        config: config.json.
        block_length: query tokens of a sequence.
        dtype: the model's.
        device: the GPU to try on.

    Returns:
        Whether flash-attn may split a context.

    Raises:
        EngineError: flash-attn is wrong without splits too.
    """
    module = api.attention_module()
    attend = module.flash_attn_with_kvcache
    if _is_right(attend, config, block_length, dtype, device):
        return not isinstance(attend, functools.partial)  # a partial is what an earlier call left here
    unsplit = functools.partial(attend, num_splits=1)
    if not _is_right(unsplit, config, block_length, dtype, device):
        raise EngineError(
            f"the installed flash-attn computes wrong attention for heads of {config['head_dim']} dimensions in "
            f"{dtype}. Install another build of it, or use --model sdar."
        )
    logger.warning(
        "The installed flash-attn is wrong where it splits a context among thread blocks, for heads of %d dimensions. "
        "JetEngine runs it without splitting, so answers are right.",
        config["head_dim"],
    )
    module.flash_attn_with_kvcache = unsplit
    return False


@torch.inference_mode()
def _is_right(
    attend: Callable[..., torch.Tensor],
    config: Config,
    block_length: int,
    dtype: torch.dtype,
    device: torch.device | str,
) -> bool:
    """Compare flash-attn with plain attention: one sequence's block over a page and a half of context."""
    heads, kv_heads, size = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    context = PAGE_SIZE * 3 // 2
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    query = normal(1, block_length, heads, size)
    new_keys, new_values = normal(1, block_length, kv_heads, size), normal(1, block_length, kv_heads, size)
    key_pages, value_pages = normal(4, PAGE_SIZE, kv_heads, size), normal(4, PAGE_SIZE, kv_heads, size)
    # Pages 2 and 1. As in JetEngine's CUDA graphs, the table is wider than the sequence: -1 stands for no page.
    table = torch.tensor([[2, 1, *[-1] * 8]], dtype=torch.int32, device=device)

    def gathered(pages: torch.Tensor, new: torch.Tensor) -> torch.Tensor:  # (heads, context + block, size)
        tokens = torch.cat([pages[2], pages[1]])[:context]
        return torch.cat([tokens, new[0]]).float().repeat_interleave(heads // kv_heads, dim=1).transpose(0, 1)

    keys, values = gathered(key_pages, new_keys), gathered(value_pages, new_values)
    scores = query[0].float().transpose(0, 1) @ keys.transpose(1, 2) / size**0.5
    expected = (scores.softmax(-1) @ values).transpose(0, 1)  # (block, heads, size)
    out = attend(
        query,
        k_cache=key_pages,
        v_cache=value_pages,
        k=new_keys,
        v=new_values,
        cache_seqlens=torch.tensor([context], dtype=torch.int32, device=device),
        block_table=table,
        causal=False,
    )
    return bool((out[0].float() - expected).abs().max() < TOLERANCE)
