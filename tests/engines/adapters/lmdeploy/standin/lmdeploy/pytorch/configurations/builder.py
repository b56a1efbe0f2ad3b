from __future__ import annotations

from typing import Any


class AutoModelConfigBuilder:
    _sub_classes: list[Any] = []  # noqa: RUF012

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        AutoModelConfigBuilder._sub_classes.append(cls)

    @classmethod
    def condition(cls, hf_config: Any) -> bool:
        raise NotImplementedError

    @classmethod
    def build(cls, hf_config: Any, model_path: str | None = None, **settings: Any) -> Any:
        from .default import DefaultModelConfigBuilder

        others = (b for b in cls._sub_classes if b is not DefaultModelConfigBuilder and b.condition(hf_config))
        return next(others, DefaultModelConfigBuilder).build(hf_config, model_path, **settings)
