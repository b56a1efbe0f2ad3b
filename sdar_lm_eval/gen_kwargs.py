"""Reads a harness request's `gen_kwargs`, on top of the settings given by `--model_args`.

Precedence: gen_kwargs (a task's YAML, overridden by `--gen_kwargs`) > model_args > checkpoint > default. Values come
typed or as text. Nothing is popped or changed: the harness hashes the same dict for its cache.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sdar_lm_eval.engines.base import DECODING_SETTINGS, DecodingConfig, check_bool, to_number
from sdar_lm_eval.errors import UserError, did_you_mean

logger = logging.getLogger(__name__)

DEFAULT_MAX_GEN_TOKS = 512
MAX_TOKENS_SPELLINGS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
GENERATION_SETTINGS = (*DECODING_SETTINGS, *MAX_TOKENS_SPELLINGS, "until", "do_sample")
ALIASES = {
    "strategy": "remasking_strategy",
    "threshold": "confidence_threshold",
    "steps": "denoising_steps",
    "block": "block_length",
    "block_size": "block_length",
}
"""Short name -> setting."""
STRATEGY_ALIASES = {
    "dynamic": "low_confidence_dynamic",
    "static": "low_confidence_static",
    "entropy": "entropy_bounded",
}
"""Short name -> value of remasking_strategy."""
HINTS = {"seed": "The seed is the model's: --model_args seed=N, or the third of --seed."}
"""Names that are no settings of a request, and where they belong."""
# Settings of other engines that harness tasks carry, with the one value that asks for nothing.
NEUTRAL = {"num_beams": 1, "num_return_sequences": 1, "n": 1}
IGNORED = ("use_cache",)  # of transformers; it changes no answer


@dataclass(frozen=True)
class Generation:
    """What one request asks for.

    Attributes:
        decoding: how to denoise; temperature 0 where the answer is to be greedy.
        max_gen_toks: most new tokens.
        until: texts that end the answer, none of them empty.
    """

    decoding: DecodingConfig
    max_gen_toks: int
    until: tuple[str, ...]

    @property
    def is_drawn(self) -> bool:
        """Whether the seed has a say, so that repeats differ."""
        return not self.decoding.greedy or self.decoding.remasking_strategy == "random"

    def as_dict(self) -> dict[str, Any]:
        """The settings by name, as plain values."""
        return self.decoding.as_dict() | {"max_gen_toks": self.max_gen_toks, "until": list(self.until)}


def read_generation(gen_kwargs: Mapping[str, Any], base: Mapping[str, Any]) -> Generation:
    """Merge a request's settings with the model's and validate them.

    Args:
        gen_kwargs: as they arrive with the request.
        base: settings of model_args and the checkpoint, by the same names.

    Raises:
        UserError: an unknown name, or a value out of range.
    """
    check_names(gen_kwargs, "gen_kwargs")
    given, base = _without_none(canonical(gen_kwargs)), _without_none(canonical(base))
    settings = {name: value for name, value in (base | given).items() if name in DECODING_SETTINGS}
    if to_number("top_k", settings.get("top_k", 0), whole=True) == -1:
        settings["top_k"] = 0  # "off" in vLLM's spelling
    decoding = DecodingConfig(**settings)
    if not _is_sampled(given, base):
        _warn_of_unused_temperature(given, base)
        decoding = dataclasses.replace(decoding, temperature=0.0)
    elif decoding.temperature == 0:
        logger.warning("do_sample=true with temperature=0 is greedy; add temperature=1.0 to sample.")
    until = given["until"] if "until" in given else base.get("until")
    return Generation(decoding, _max_tokens(given, base), to_texts(until))


def canonical(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings by their full names; of two spellings the later one holds.

    `--gen_kwargs` is merged into a task's settings by `update`, so what the user says stands behind the task's.
    """
    full: dict[str, Any] = {}
    for name, value in settings.items():
        setting = ALIASES.get(name, name)
        if setting == "remasking_strategy":
            value = STRATEGY_ALIASES.get(value, value) if isinstance(value, str) else value
        full.pop(setting, None)
        full[setting] = value
        _say_alias(f"{name}={settings[name]}", f"{setting}={value}")
    return full


@functools.cache
def _say_alias(given: str, full: str) -> None:
    if given != full:
        logger.info("%s is read as %s.", given, full)


def check_names(settings: Mapping[str, Any], source: str, also: tuple[str, ...] = ()) -> None:
    """Refuse unknown names.

    Raises:
        UserError: names one, suggests another, lists the known ones.
    """
    known = (*also, *GENERATION_SETTINGS)
    for name, value in settings.items():
        if name in IGNORED:
            continue
        if name in NEUTRAL:
            if value is not None and str(value) != str(NEUTRAL[name]):
                raise UserError(
                    f"{source}: {name}={value!r} is not supported, only {NEUTRAL[name]}; "
                    f"where a task asks for it, override it: --gen_kwargs {name}={NEUTRAL[name]}."
                )
        elif name not in known and name not in ALIASES:
            hint = f" {HINTS[name]}" if name in HINTS else did_you_mean(name, (*known, *ALIASES))
            raise UserError(f"{source}: {name!r} is unknown.{hint} Known: {', '.join(known)}.")


def to_bool(name: str, value: Any) -> bool:
    """Read true or false, given as a value or as text.

    Raises:
        UserError: neither.
    """
    if isinstance(value, (bool, int)) and value in (0, 1):
        return bool(value)
    if isinstance(value, str) and value.strip().lower() in ("true", "false"):
        return value.strip().lower() == "true"
    return check_bool(name, value)


def to_texts(value: Any) -> tuple[str, ...]:
    """Read `until`: a text, several, or none; empty ones end nothing and are left out.

    Raises:
        UserError: something other than text.
    """
    texts = () if value is None else (value,) if isinstance(value, str) else value
    if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
        raise UserError(f"until={value!r} is neither a text nor a list of texts.")
    return tuple(dict.fromkeys(text for text in texts if text))


def _without_none(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value is not None}


def _is_sampled(given: Mapping[str, Any], base: Mapping[str, Any]) -> bool:
    """The harness's rule: `do_sample` decides; where it is not given, a temperature above 0 samples; else greedy."""
    for source in (given, base):
        if "do_sample" in source:
            return to_bool("do_sample", source["do_sample"])
        if "temperature" in source:
            return to_number("temperature", source["temperature"], whole=False) > 0
    return False


def _warn_of_unused_temperature(given: Mapping[str, Any], base: Mapping[str, Any]) -> None:
    if to_number("temperature", given.get("temperature", 0), whole=False) > 0:
        logger.warning("do_sample=false: greedy; temperature=%s has no effect.", given["temperature"])
    elif given and _is_sampled({}, base):
        logger.warning(
            "The task asks for greedy decoding, so the sampling in model_args has no effect; "
            "--gen_kwargs do_sample=true,temperature=1.0 overrides the task."
        )


def _max_tokens(given: Mapping[str, Any], base: Mapping[str, Any]) -> int:
    """Reconcile the spellings: in gen_kwargs the last one given holds.

    `--gen_kwargs` is merged into a task's dict by `update`, so a new spelling from there stands behind the task's own.
    """
    for source in (given, base):
        names = [name for name in source if name in MAX_TOKENS_SPELLINGS]
        if not names:
            continue
        *unused, name = names
        if any(source[other] != source[name] for other in unused):
            logger.info("%s=%s holds, not %s.", name, source[name], ", ".join(f"{n}={source[n]}" for n in unused))
        number = int(to_number(name, source[name], whole=True))
        if number < 1:
            raise UserError(f"{name}={number} is out of range: it must be 1 or more.")
        return number
    return DEFAULT_MAX_GEN_TOKS
