"""Reads what users write: `--model_args`, and a request's `gen_kwargs` on top of them. It returns typed settings.

Precedence: gen_kwargs (a task's YAML, overridden by `--gen_kwargs`) > model_args > a task's published decoding >
checkpoint > default. Values come typed or as text. Nothing is popped or changed: other models get the same dict.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict, get_args, overload

from sdar_lm_eval.engines.base import DECODING_SETTINGS, DecodingConfig, check_bool, to_number
from sdar_lm_eval.engines.native.strategies import STRATEGIES, full_name
from sdar_lm_eval.engines.registry import ENGINES
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
HINTS = {"seed": "The seed is the model's: --model_args seed=N, or the third of --seed."}
"""Names that are no settings of a request, and where they belong."""
# Settings of other engines that harness tasks carry, with the one value that asks for nothing.
NEUTRAL = {"num_beams": 1, "num_return_sequences": 1, "n": 1}
IGNORED = ("use_cache",)  # of transformers; it changes no answer


ChatMode = Literal["auto", "on", "off"]


class DecodingArguments(TypedDict, total=False):
    """Decoding settings among model_args and gen_kwargs; see `DecodingConfig`."""

    block_length: int
    denoising_steps: int
    remasking_strategy: str
    confidence_threshold: float
    eb_threshold: float
    temperature: float
    top_k: int
    top_p: float
    repetition_penalty: float
    do_sample: bool
    max_gen_toks: int
    until: str | list[str]


class ModelArguments(DecodingArguments, total=False):
    """What `--model_args` takes for each engine; `SDARLM` says what each means."""

    revision: str
    dtype: str
    device: str
    max_length: int
    max_active: int
    seed: int
    chat_template: ChatMode
    trace: str | Path
    verbose: bool
    answers: str | Path
    likelihood: Literal["chain", "nelbo"]
    mc_samples: int
    batch_size: int | str
    max_batch_size: int
    trust_remote_code: bool


class NativeArguments(ModelArguments, total=False):
    """What `--model sdar` takes."""

    kv_pages: int
    kernels: bool
    reproducible: bool
    share_prefixes: bool


class JetEngineArguments(ModelArguments, total=False):
    """What `--model sdar-jetengine` takes."""

    gpu_memory_utilization: float
    tensor_parallel_size: int
    enforce_eager: bool


class LMDeployArguments(ModelArguments, total=False):
    """What `--model sdar-lmdeploy` takes."""

    tensor_parallel_size: int
    data_parallel_size: int
    cache_max_entry_count: float


@dataclass(frozen=True)
class ModelSettings:
    """`--model_args`, read.

    Attributes:
        decoding: decoding settings that the user gave, by their full names; each request's are read on top of them.
        engine: what the engine alone takes.
        All others: see `SDARLM`; None where the user said nothing and there is no one default.
    """

    pretrained: str
    revision: str | None
    dtype: str
    device: str
    max_length: int | None
    max_active: int | None
    seed: int | None
    chat_template: ChatMode
    trace: Path | None
    verbose: bool
    answers: Path | None
    likelihood: str
    mc_samples: int | None
    decoding: Mapping[str, object]
    engine: Mapping[str, object]

    @classmethod
    def read(cls, pretrained: str, given: Mapping[str, object], engine: str) -> ModelSettings:
        """Read model_args.

        Args:
            pretrained: as given.
            given: all others.
            engine: its name in the registry.

        Raises:
            UserError: an unknown name, or a value out of range.
        """
        of_engine = _own_names(globals()[ENGINES[engine].arguments])
        check_names(given, "model_args", also=("pretrained", *_names(ModelArguments), *of_engine))
        known = {name: value for name, value in canonical(given).items() if value is not None}

        def whole(name: str) -> int | None:
            return int(to_number(name, known[name], whole=True)) if name in known else None

        if to_bool("trust_remote_code", known.get("trust_remote_code", False)):
            logger.info("trust_remote_code is not needed: no code of a checkpoint is ever run.")
        return cls(
            pretrained=str(pretrained),
            revision=_text(known, "revision"),
            dtype=_text(known, "dtype") or "auto",
            device=_text(known, "device") or "auto",
            max_length=whole("max_length"),
            max_active=whole("max_active") if "max_active" in known else _batch_size(known),
            seed=whole("seed"),
            chat_template=_chat_mode(known.get("chat_template", "auto")),
            trace=None if "trace" not in known else Path(str(known["trace"])),
            verbose=to_bool("verbose", known.get("verbose", False)),
            answers=None if "answers" not in known else Path(str(known["answers"])),
            likelihood=str(known.get("likelihood", "chain")),
            mc_samples=whole("mc_samples"),
            decoding={name: value for name, value in known.items() if name in GENERATION_SETTINGS},
            engine={name: value for name, value in known.items() if name in of_engine},
        )

    @property
    def limits_length(self) -> bool:
        """Whether the user says how long answers are where a task does not."""
        return any(name in self.decoding for name in MAX_TOKENS_SPELLINGS)


def _names(arguments: type[object]) -> tuple[str, ...]:
    """Names of a TypedDict, those of its bases included."""
    return tuple(arguments.__annotations__)


def _own_names(arguments: type[object]) -> tuple[str, ...]:
    """What an engine takes beside what all take."""
    return tuple(name for name in _names(arguments) if name not in _names(ModelArguments))


def _text(known: Mapping[str, object], name: str) -> str | None:
    return str(known[name]) if name in known else None


def _chat_mode(value: object) -> ChatMode:
    # `on` and `off` may have become booleans on their way.
    text = {True: "on", False: "off"}[value] if isinstance(value, bool) else value
    modes: tuple[ChatMode, ...] = get_args(ChatMode)
    for mode in modes:
        if text == mode:
            return mode
    raise UserError(f"chat_template={value!r} is unknown; choose {', '.join(modes)}.")


def _batch_size(known: Mapping[str, object]) -> int | None:
    """Sequences at once by a batch size that somebody asked for; the harness passes 1 where nobody did."""
    name, value = "batch_size", known.get("batch_size", 1)
    if isinstance(value, str) and value.startswith("auto"):
        name, value = "max_batch_size", known.get("max_batch_size")
        if value is None:
            return None
    number = int(to_number(name, value, whole=True))
    if number < 1:
        raise UserError(f"{name}={number} is out of range: it must be 1 or more.")
    return None if name == "batch_size" and number == 1 else number


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
        return not self.decoding.greedy or STRATEGIES[self.decoding.remasking_strategy].is_random

    def as_dict(self) -> dict[str, object]:
        """The settings by name, as plain values."""
        return self.decoding.as_dict() | {"max_gen_toks": self.max_gen_toks, "until": list(self.until)}


def read_generation(gen_kwargs: Mapping[str, object], base: Mapping[str, object]) -> Generation:
    """Merge a request's settings with the model's and validate them.

    Args:
        gen_kwargs: as they arrive with the request.
        base: settings of model_args and the checkpoint, by the same names.

    Raises:
        UserError: an unknown name, or a value out of range.
    """
    check_names(gen_kwargs, "gen_kwargs")
    given, base = _without_none(canonical(gen_kwargs)), _without_none(canonical(base))
    # DecodingConfig checks the values' types.
    settings: dict[str, Any] = {name: value for name, value in (base | given).items() if name in DECODING_SETTINGS}
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


@overload
def canonical(settings: Mapping[str, str]) -> Mapping[str, str]: ...
@overload
def canonical(settings: Mapping[str, object]) -> Mapping[str, object]: ...
def canonical(settings: Mapping[str, object]) -> Mapping[str, object]:
    """Return settings by their full names; of two spellings the later one holds.

    `--gen_kwargs` is merged into a task's settings by `update`, so what the user says stands behind the task's.
    """
    full: dict[str, object] = {}
    for name, value in settings.items():
        setting = ALIASES.get(name, name)
        if setting == "remasking_strategy":
            value = full_name(value) if isinstance(value, str) else value
        full.pop(setting, None)
        full[setting] = value
        _say_alias(f"{name}={settings[name]}", f"{setting}={value}")
    return full


def warn_of_idle_knobs(given: Mapping[str, object], decoding: DecodingConfig, why: str) -> None:
    """Warn of a setting other than its default, from user or task, that the strategy does not read."""
    for name, strategy in ((s.setting, s.name) for s in STRATEGIES.values() if s.setting):
        value = getattr(decoding, name)
        if name in given and value != getattr(DecodingConfig, name) and decoding.remasking_strategy != strategy:
            _say_idle(f"{name}={value}", decoding.remasking_strategy, strategy, why)


@functools.cache
def _say_idle(setting: str, used: str, reader: str, why: str) -> None:
    logger.warning("%s has no effect: %s%s; strategy=%s reads it.", setting, used, why, reader)


@functools.cache
def _say_alias(given: str, full: str) -> None:
    if given != full:
        logger.info("%s is read as %s.", given, full)


def check_names(settings: Mapping[str, object], source: str, also: tuple[str, ...] = ()) -> None:
    """Refuse unknown names.

    Raises:
        UserError: names one, suggests another, lists the known ones.
    """
    known = tuple(dict.fromkeys((*also, *GENERATION_SETTINGS)))
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


def to_bool(name: str, value: object) -> bool:
    """Read true or false, given as a value or as text.

    Raises:
        UserError: neither.
    """
    if isinstance(value, (bool, int)) and value in (0, 1):
        return bool(value)
    if isinstance(value, str) and value.strip().lower() in ("true", "false"):
        return value.strip().lower() == "true"
    return check_bool(name, value)


def to_texts(value: object) -> tuple[str, ...]:
    """Read `until`: a text, several, or none; empty ones end nothing and are left out.

    Raises:
        UserError: something other than text.
    """
    texts = () if value is None else (value,) if isinstance(value, str) else value
    if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
        raise UserError(f"until={value!r} is neither a text nor a list of texts.")
    return tuple(dict.fromkeys(text for text in texts if text))


def _without_none(settings: Mapping[str, object]) -> dict[str, object]:
    return {name: value for name, value in settings.items() if value is not None}


def _is_sampled(given: Mapping[str, object], base: Mapping[str, object]) -> bool:
    """The harness's rule: `do_sample` decides; where it is not given, a temperature above 0 samples; else greedy."""
    for source in (given, base):
        if "do_sample" in source:
            return to_bool("do_sample", source["do_sample"])
        if "temperature" in source:
            return to_number("temperature", source["temperature"], whole=False) > 0
    return False


def _warn_of_unused_temperature(given: Mapping[str, object], base: Mapping[str, object]) -> None:
    if to_number("temperature", given.get("temperature", 0), whole=False) > 0:
        logger.warning("do_sample=false: greedy; temperature=%s has no effect.", given["temperature"])
    elif given and _is_sampled({}, base):
        logger.warning(
            "The task asks for greedy decoding, so the sampling in model_args has no effect; "
            "--gen_kwargs do_sample=true,temperature=1.0 overrides the task."
        )


def _max_tokens(given: Mapping[str, object], base: Mapping[str, object]) -> int:
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
