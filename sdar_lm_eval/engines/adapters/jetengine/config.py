"""config.json as JetEngine reads it."""

from __future__ import annotations

from sdar_lm_eval.engines.adapters.config import BareConfig, plain_config, rope_theta
from sdar_lm_eval.families.base import Config


class SDARConfig(BareConfig):
    """SDAR. JetEngine takes no `rope_scaling` but None; transformers 5's own Qwen3Config always has one."""

    model_type = "sdar"
    rope_scaling = None


class SDARMoeConfig(SDARConfig):
    """SDAR MoE, likewise."""

    model_type = "sdar_moe"


def config_for_jetengine(config: Config, dtype: str) -> dict[str, object]:
    """config.json with the keys that JetEngine reads."""
    return plain_config(config, "rope_parameters") | {"rope_theta": rope_theta(config), "torch_dtype": dtype}
