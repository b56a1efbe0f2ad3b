"""config.json as another package's engine reads it: without the checkpoint's code."""

from __future__ import annotations

from transformers import AutoConfig, PretrainedConfig

from sdar_lm_eval.checkpoint import Checkpoint
from sdar_lm_eval.errors import EngineError
from sdar_lm_eval.families.base import Config

HEAD_DIMS = (16, 32, 64, 128, 256)


class BareConfig(PretrainedConfig):  # type: ignore[misc]
    """config.json with its keys as attributes, and none of the checkpoint's code.

    Adapters subclass it at the top level of a module: engines pickle the config for their worker processes.
    """


def register_configs(*classes: type[BareConfig]) -> None:
    """Have transformers' AutoConfig open the model types of these classes with them."""
    for config_class in classes:
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)


def plain_config(config: Config, *left_out: str) -> dict[str, object]:
    """config.json without the keys `left_out`, and without code, dtype, quantization and RoPE scaling.

    Adapters write dtype and RoPE anew: versions of transformers keep them under different keys.
    """
    left_out += ("auto_map", "dtype", "quantization_config", "rope_scaling")
    return {key: value for key, value in config.items() if key not in left_out}


def rope_theta(config: Config) -> float:
    """The rotary base, under transformers 5's key or transformers 4's."""
    own: Config = config.get("rope_parameters") or {}
    base: float = own.get("rope_theta", config.get("rope_theta", 10000.0))
    return base


def check_same_mask_token(engine: str, taken: int, checkpoint: Checkpoint) -> None:
    """Compare the mask token that an engine took with the checkpoint's.

    Raises:
        EngineError: they differ: answers would be noise.
    """
    if taken != checkpoint.mask_token_id:
        raise EngineError(f"{engine} takes {taken} for the mask token, not {checkpoint.mask_token_id}.")
