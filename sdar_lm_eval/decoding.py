"""Decoding settings of a request.

This module holds no tensor and does not import torch.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass

from sdar_lm_eval.checks import check_number, check_range
from sdar_lm_eval.defaults import DEFAULT_BLOCK_LENGTH
from sdar_lm_eval.engines.native.strategies import STRATEGIES, spellings
from sdar_lm_eval.errors import UserError, did_you_mean
from sdar_lm_eval.files import shown

MAX_BLOCK_LENGTH = 1024


@dataclass(frozen=True)
class DecodingConfig:
    """The decoding settings of one request. Names follow `generate.py` of JetAstra/SDAR.

    Args:
        block_length: tokens denoised together.
        denoising_steps: number of steps in a block's schedule, which gives each step a quota of tokens to unmask.
            None: `block_length`.
        remasking_strategy: the rule by which a step chooses the positions that keep their token, one of `STRATEGIES`.
        confidence_threshold: low_confidence_dynamic keeps every token whose confidence is strictly above this value.
        eb_threshold: entropy_bounded keeps tokens while the sum of their entropies, in nats, is below this value.
        temperature: divides the logits before a token is drawn; 0 draws the most probable token (greedy).
            `DecodingConfig()` samples at 1.0. An evaluation is greedy unless a task or the user asks for sampling.
        top_k: draw only from the k most probable tokens; 0 is off.
        top_p: draw only from the smallest set of tokens whose probability exceeds p; 1 is off.
        repetition_penalty: as in transformers: divides positive logits of tokens in the prompt or the answer by this
            value, and multiplies negative logits by this value; 1 is off.

    Raises:
        UserError: a value is out of range.
    """

    block_length: int = DEFAULT_BLOCK_LENGTH
    denoising_steps: int | None = None
    remasking_strategy: str = "low_confidence_dynamic"
    confidence_threshold: float = 0.85
    eb_threshold: float = 0.35
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "remasking_strategy":
                if not isinstance(value, str) or value not in STRATEGIES:
                    raise UserError(
                        f"remasking_strategy={shown(value)} is unknown; choose one of {spellings()}."
                        + did_you_mean(str(value), [*STRATEGIES, *filter(None, (s.short for s in STRATEGIES.values()))])
                    )
            elif not (field.name == "denoising_steps" and value is None):
                whole = str(field.type).startswith("int")  # "int | None" too: annotations are text
                object.__setattr__(self, field.name, check_number(field.name, value, whole=whole))
        if self.denoising_steps is None:
            object.__setattr__(self, "denoising_steps", self.block_length)
        length, temperature = self.block_length, self.temperature
        # Engines divide and multiply logits in float32: these bounds of temperature and penalty keep logits finite.
        for name, allowed, what in (
            ("block_length", 1 <= length <= MAX_BLOCK_LENGTH, f"a whole number from 1 to {MAX_BLOCK_LENGTH}"),
            ("denoising_steps", 1 <= self.steps <= length, f"a whole number from 1 to block_length ({length})"),
            ("confidence_threshold", 0 <= self.confidence_threshold <= 1, "a probability from 0 to 1"),
            ("eb_threshold", 0 <= self.eb_threshold <= 1e6, "an entropy in nats, from 0 to 1,000,000"),
            ("temperature", temperature == 0 or 1e-4 <= temperature <= 1e4, "0 (greedy), or from 0.0001 to 10,000"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1 (off)"),
            ("repetition_penalty", 0.01 <= self.repetition_penalty <= 100, "from 0.01 to 100 (1 is off)"),
        ):
            check_range(f"{name}={getattr(self, name)}", allowed, what)

    @property
    def steps(self) -> int:
        """The number of steps in the schedule: `denoising_steps` with its default resolved."""
        return self.block_length if self.denoising_steps is None else self.denoising_steps

    @property
    def quotas(self) -> tuple[int, ...]:
        """Tokens to unmask in each step: block_length // steps, and one more in the first block_length % steps."""
        base, extra = divmod(self.block_length, self.steps)
        return tuple(base + (step < extra) for step in range(self.steps))

    @property
    def greedy(self) -> bool:
        """Whether each draw takes the most probable token."""
        return self.temperature == 0 or self.top_k == 1

    @property
    def idle(self) -> frozenset[str]:
        """The names of settings without effect: the strategy, or greedy drawing, does not read them."""
        strategy = STRATEGIES[self.remasking_strategy]
        idle = {other.setting for other in STRATEGIES.values() if other.setting not in (None, strategy.setting)}
        if not strategy.uses_schedule:
            idle.add("denoising_steps")
        if self.temperature == 0:
            idle |= {"top_k", "top_p"}
        elif self.top_k == 1:
            idle |= {"temperature", "top_p"}
        return frozenset(name for name in idle if name is not None)

    @property
    def effective(self) -> dict[str, str | int | float]:
        """The settings with an effect by name, as plain values."""
        return {name: value for name, value in self.as_dict().items() if name not in self.idle}

    def as_dict(self) -> dict[str, str | int | float]:
        """The settings by name, as plain values."""
        return dataclasses.asdict(self)


DECODING_SETTINGS = tuple(field.name for field in dataclasses.fields(DecodingConfig))


def in_words(settings: Mapping[str, object]) -> str:
    """Return settings as "remasking_strategy=sequential, denoising_steps=2"."""
    return ", ".join(f"{name}={spelled(value)}" for name, value in settings.items())


def spelled(value: object) -> str:
    """Return a setting's value as users write it: 1.0 is 1, None is none, lists and mappings are JSON."""
    if isinstance(value, float):
        return f"{value:.10g}"
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
