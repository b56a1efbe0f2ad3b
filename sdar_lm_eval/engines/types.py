"""What an engine says of itself; nothing here imports another module of the package."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

Self = TypeVar("Self")

Fact = str | int | float | bool | None


@dataclass(frozen=True)
class EngineInfo:
    """Facts on an engine: what the results file has of it.

    Attributes:
        engine: the engine's name.
        device: where it computes.
        dtype: of weights and activations, without "torch.".
        max_active: most sequences at once.
        engine_version, engine_commit: of the engine's package; None for the engine of this package, and for a commit
            that pip does not know.
        deviations: rules that differ from those of `DecodingConfig`, by setting; None where there are none.
        extra: options and counts that only this engine has.
        environment: versions of libraries, Python, the GPU's name.
    """

    engine: str
    device: str
    dtype: str
    max_active: int
    engine_version: str | None = None
    engine_commit: str | None = None
    deviations: Mapping[str, str] | None = None
    extra: Mapping[str, Fact] = field(default_factory=dict)
    environment: Mapping[str, str | None] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Fact | dict[str, str]]:
        """All facts by name in one mapping, as the results file has them."""
        package = {"engine_version": self.engine_version, "engine_commit": self.engine_commit}
        return {
            "engine": self.engine,
            **(package if self.engine_version is not None else {}),
            "device": self.device,
            "dtype": self.dtype,
            "max_active": self.max_active,
            **self.extra,
            **({} if self.deviations is None else {"deviations": dict(self.deviations)}),
            **self.environment,
        }
