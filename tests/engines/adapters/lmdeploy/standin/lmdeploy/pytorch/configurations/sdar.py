from __future__ import annotations

from typing import Any

from .builder import AutoModelConfigBuilder
from .default import DefaultModelConfigBuilder


class SDARModelConfigBuilder(AutoModelConfigBuilder):
    @classmethod
    def condition(cls, hf_config: Any) -> bool:
        return hf_config.model_type in ("sdar", "sdar_moe")

    @classmethod
    def build(cls, hf_config: Any, model_path: str | None = None, **settings: Any) -> Any:
        config = DefaultModelConfigBuilder.build(hf_config, model_path, **settings)
        config.dllm_mask_token = 151669
        config.model_paradigm = "dllm"
        return config
