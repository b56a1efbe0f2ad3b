"""config.json as LMDeploy reads it."""

from __future__ import annotations

from sdar_lm_eval.checkpoint import Checkpoint
from sdar_lm_eval.engines.adapters.config import BareConfig, plain_config, rope_theta
from sdar_lm_eval.engines.adapters.lmdeploy.hooks import MODEL_TYPES


class SDARConfig(BareConfig):
    """SDAR, under a model type for which LMDeploy has no rules of its own."""

    model_type = MODEL_TYPES["sdar"]


class SDARMoeConfig(SDARConfig):
    """SDAR MoE, likewise."""

    model_type = MODEL_TYPES["sdar_moe"]


def config_for_lmdeploy(checkpoint: Checkpoint, dtype: str) -> dict[str, object]:
    """config.json with every key that LMDeploy reads, so that no default of LMDeploy's counts.

    LMDeploy reads `rope_parameters` under transformers 4 too (nn/rotary_embedding.py: get_rope_parameters), and applies
    `sliding_window` whatever `use_sliding_window` says (models/sdar.py).
    """
    config = checkpoint.full_config()
    own = config.get("rope_parameters") or {}
    rope = {"rope_type": "default", **(config.get("rope_scaling") or {}), **own}
    rope["rope_theta"] = rope_theta(config)
    if "type" in rope:  # the older key of rope_type
        rope["rope_type"] = rope.pop("type")
    return {
        "bos_token_id": None,
        "eos_token_id": None,
        **plain_config(config, "rope_theta", "attn_implementation"),
        "architectures": ["SDARMoeForCausalLM" if checkpoint.is_moe else "SDARForCausalLM"],
        "mask_token_id": checkpoint.mask_token_id,
        "model_type": MODEL_TYPES[config["model_type"]],
        "pad_token_id": None,
        "rope_parameters": rope,
        "sliding_window": None,
        "torch_dtype": dtype,
        "use_sliding_window": False,
    }
