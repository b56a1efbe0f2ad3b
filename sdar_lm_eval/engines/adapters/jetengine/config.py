"""config.json as JetEngine reads it."""

from __future__ import annotations

from sdar_lm_eval.engines.adapters.common import BareConfig, Config, plain_config, rope_theta


class SDARConfig(BareConfig):
    """SDAR. transformers' Qwen3Config says `rope_scaling` in another way from version 5 on, which JetEngine refuses."""

    model_type = "sdar"
    rope_scaling = None


class SDARMoeConfig(SDARConfig):
    """The same for SDAR MoE."""

    model_type = "sdar_moe"


def config_for_jetengine(config: Config, dtype: str) -> dict[str, object]:
    """config.json with what JetEngine reads, where it looks for it."""
    return plain_config(config, "rope_parameters") | {"rope_theta": rope_theta(config), "torch_dtype": dtype}
