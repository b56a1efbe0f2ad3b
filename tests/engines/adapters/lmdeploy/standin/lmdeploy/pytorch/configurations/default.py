from __future__ import annotations

import types
from typing import Any

from .builder import AutoModelConfigBuilder


class DefaultModelConfigBuilder(AutoModelConfigBuilder):
    @classmethod
    def condition(cls, hf_config: Any) -> bool:
        return True

    @classmethod
    def build(cls, hf_config: Any, model_path: str | None = None, **settings: Any) -> Any:
        return types.SimpleNamespace(
            bos_token_id=hf_config.bos_token_id,
            eos_token_id=hf_config.eos_token_id,
            hf_config=hf_config,
            dllm_mask_token=0,
            model_paradigm="ar",
        )
