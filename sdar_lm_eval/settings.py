"""Turns `--model_args` and a request's `gen_kwargs` into typed settings.

Precedence: gen_kwargs (a task's YAML, overridden by `--gen_kwargs`) > model_args > a task's published decoding >
checkpoint > default. Values come typed or as text. This module never changes the given mappings, because lm_eval passes
the same mappings to other models.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

from sdar_lm_eval.arguments import ChatMode, DecodingArguments, ModelArguments, arguments_of
from sdar_lm_eval.checks import at_least_one, check_bool, check_number, check_unicode, if_given, plain
from sdar_lm_eval.decoding import DECODING_SETTINGS, MAX_BLOCK_LENGTH, DecodingConfig, spelled
from sdar_lm_eval.defaults import DEFAULT_SEED
from sdar_lm_eval.engines.native.strategies import STRATEGIES
from sdar_lm_eval.engines.native.strategies.base import Strategy
from sdar_lm_eval.engines.types import LikelihoodConfig
from sdar_lm_eval.errors import UserError, did_you_mean
from sdar_lm_eval.files import expanded, plain_text, shown
from sdar_lm_eval.spellings import ALIASES, MAX_TOKENS_SPELLINGS, canonical, warn_once_of_two_spellings

logger = logging.getLogger(__name__)

DEFAULT_MAX_GEN_TOKS = 512
GENERATION_SETTINGS = (*DECODING_SETTINGS, *MAX_TOKENS_SPELLINGS, "until", "do_sample")
HINTS = {
    "seed": "The seed is the model's: --model_args seed=N, or the third of --seed.",
    "model": "The checkpoint is --model_args pretrained=…",
    "stop": "Stop strings are until.",
}
"""Name that is no setting of a request -> where it belongs."""
# Settings of other engines that stock tasks have, with the one value that has no effect.
NEUTRAL = {"num_beams": 1, "num_return_sequences": 1, "n": 1}
OF_THOUGHTS = (
    "think_end_token", "enable_thinking", "chat_template_args", "answer_prefix", "max_thinking_toks", "stop_repetition",
)  # fmt: skip
"""model_args that `lm/thoughts.py` reads."""
ANY_CHECKPOINT = {"block_length": MAX_BLOCK_LENGTH}
"""Base settings where the checkpoint's block length is not known."""
IGNORED = ("use_cache",)  # a setting of transformers that changes no answer


@dataclass(frozen=True)
class ModelSettings:
    """`--model_args`, read.

    Attributes:
        decoding: decoding settings that the user gave, by their full names; a request's override them.
        engine: options that only this engine takes.
        thoughts: the arguments on thoughts and answer prefixes that the user gave (`OF_THOUGHTS`).
        All others: see `ModelArguments`; None where the user gave none and there is no one default.
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
    record_steps: bool
    verbose: bool
    answers: Path | None
    likelihood: str
    mc_samples: int | None
    decoding: Mapping[str, object]
    engine: Mapping[str, object]
    thoughts: Mapping[str, object]

    @classmethod
    def read(cls, pretrained: str, given: Mapping[str, object], engine: str) -> ModelSettings:
        """Read model_args.

        Args:
            pretrained: the checkpoint, as the user gave it.
            given: all other arguments.
            engine: the engine's name in the registry.

        Raises:
            UserError: an unknown name, or a value out of range.
        """
        taken = arguments_of(engine)
        of_engine = _own_names(taken)
        check_names(given, "model_args", also=("pretrained", *_names(ModelArguments), *of_engine))
        known = _without_none(canonical(given))

        def whole_number(name: str) -> int | None:
            return to_whole(name, known[name]) if name in known else None

        if to_bool("trust_remote_code", known.get("trust_remote_code", False)):
            logger.info("trust_remote_code is not needed: no code of a checkpoint is ever run.")
        return cls(
            pretrained=plain_text(pretrained),
            revision=_text(known, "revision"),
            dtype=_text(known, "dtype") or "auto",
            device=_text(known, "device") or "auto",
            max_length=if_given(at_least_one, "max_length", whole_number("max_length")),
            max_active=whole_number("max_active") if "max_active" in known else _batch_size(known),
            seed=whole_number("seed"),
            chat_template=_chat_mode(known.get("chat_template", "auto")),
            trace=None if "trace" not in known else expanded(_path("trace", known["trace"])),
            record_steps=to_bool("record_steps", known.get("record_steps", True)),
            verbose=to_bool("verbose", known.get("verbose", False)),
            answers=None if "answers" not in known else _path("answers", known["answers"]),
            likelihood=plain_text(known.get("likelihood", "chain")),
            mc_samples=whole_number("mc_samples"),
            decoding=typed({name: known[name] for name in known if name in GENERATION_SETTINGS}, DecodingArguments),
            engine=typed({name: known[name] for name in known if name in of_engine}, taken),
            thoughts={name: known[name] for name in OF_THOUGHTS if name in known},
        )

    @property
    def limits_length(self) -> bool:
        """Whether the user gave a length of answers for tasks that have none."""
        return any(name in self.decoding for name in MAX_TOKENS_SPELLINGS)

    def seed_or(self, other: int | None) -> int:
        """The seed of sampled answers: the user's in model_args, else `other`, else the default."""
        return next(seed for seed in (self.seed, other, DEFAULT_SEED) if seed is not None)

    def likelihood_config(self, block_length: int) -> LikelihoodConfig:
        """How log-likelihoods are computed, in blocks of this length; warns of a setting without effect.

        Raises:
            UserError: a value is out of range.
        """
        samples = LikelihoodConfig.mc_samples if self.mc_samples is None else self.mc_samples
        config = LikelihoodConfig(method=self.likelihood, mc_samples=samples, block_length=block_length)
        if self.mc_samples is not None and config.method == "chain":
            logger.warning("mc_samples=%s has no effect: likelihood=chain samples nothing.", self.mc_samples)
        return config


def _names(of: type[object]) -> tuple[str, ...]:
    """The keys of a TypedDict and of its bases."""
    return tuple(of.__annotations__)


def _own_names(of: type[object]) -> tuple[str, ...]:
    """The keys of an engine's TypedDict that other engines lack."""
    return tuple(name for name in _names(of) if name not in _names(ModelArguments))


def _text(known: Mapping[str, object], name: str) -> str | None:
    if name not in known:
        return None
    text = "" if isinstance(known[name], bool) else plain_text(known[name])
    if not text.strip():
        raise UserError(f"{name}={shown(known[name])} names nothing. Give a name, or leave {name} out.")
    return text


def _path(name: str, value: object) -> Path:
    """Read a path; an empty one would be the current folder.

    Raises:
        UserError: the value is no path.
    """
    if not isinstance(value, (str, Path)) or not str(value).strip():
        raise UserError(f"{name}={shown(value)} is no path. Give one, or leave {name} out.")
    return Path(value)


def _chat_mode(value: object) -> ChatMode:
    # YAML and lm_eval's parser read `on` and `off` as booleans.
    value = plain(value)
    text = {True: "on", False: "off"}[value] if isinstance(value, bool) else value
    modes: tuple[ChatMode, ...] = get_args(ChatMode)
    for mode in modes:
        if text == mode:
            return mode
    raise UserError(f"chat_template={shown(value)} is unknown; choose {', '.join(modes)}.")


def _batch_size(known: Mapping[str, object]) -> int | None:
    """Number of sequences at once that the batch size asks for; None for 1, which lm_eval passes by default."""
    name, value = "batch_size", known.get("batch_size", 1)
    if isinstance(value, str) and value.startswith("auto"):
        name, value = "max_batch_size", known.get("max_batch_size")
        if value is None:
            return None
    number = at_least_one(name, to_whole(name, value))
    return None if name == "batch_size" and number == 1 else number


@dataclass(frozen=True)
class Generation:
    """The settings of one request.

    Attributes:
        decoding: the decoding settings; the temperature is 0 where the answer is greedy.
        max_gen_toks: most new tokens.
        until: texts that end the answer, none of them empty.
    """

    decoding: DecodingConfig
    max_gen_toks: int
    until: tuple[str, ...]

    @property
    def is_drawn(self) -> bool:
        """Whether the answer depends on the seed, so that repeats differ."""
        return not self.decoding.greedy or STRATEGIES[self.decoding.remasking_strategy].is_random

    def as_dict(self) -> dict[str, object]:
        """The settings by name, as plain values."""
        return self.decoding.as_dict() | {"max_gen_toks": self.max_gen_toks, "until": list(self.until)}


def read_generation(gen_kwargs: Mapping[str, object], base: Mapping[str, object]) -> Generation:
    """Merge a request's settings with the model's and validate them.

    Args:
        gen_kwargs: the request's settings, as lm_eval hands them over.
        base: settings of the checkpoint, the task's published decoding and model_args, by the same names.

    Raises:
        UserError: an unknown name, or a value out of range.
    """
    given, base = _read_gen_kwargs(gen_kwargs), _without_none(canonical(base))
    decoding = _decoding_of(base | given)
    if not _is_sampled(given, base):
        _warn_of_unused_temperature(given, base)
        decoding = dataclasses.replace(decoding, temperature=0.0)
    elif decoding.temperature == 0:
        logger.warning("do_sample=true with temperature=0 is greedy; add temperature=1.0 to sample.")
    until = given["until"] if "until" in given else base.get("until")
    return Generation(decoding, _max_tokens(given, base), to_texts(until))


def check_gen_kwargs(gen_kwargs: Mapping[str, object], base: Mapping[str, object] = ANY_CHECKPOINT) -> int:
    """Check a request's settings before anything runs; returns the most new tokens.

    Args:
        gen_kwargs: the request's settings.
        base: as for `read_generation`. By default, the settings are checked as far as they need no checkpoint.

    Raises:
        UserError: an unknown name, or a value out of range.
    """
    given, base = _read_gen_kwargs(gen_kwargs), _without_none(canonical(base))
    _decoding_of(base | given)
    to_texts(given.get("until"))
    return _max_tokens(given, base)


def read_published(metadata: object) -> dict[str, object]:
    """Read the decoding of a task's published protocol: `sdar_decoding` of the task's metadata, by full names.

    Raises:
        UserError: the decoding is no mapping, or has a name that is no decoding setting.
    """
    given = metadata.get("sdar_decoding") if isinstance(metadata, Mapping) else None
    published = {} if given is None else given
    if not isinstance(published, Mapping):
        raise UserError(
            f"metadata: sdar_decoding: {shown(given)} is no mapping. Give one, such as {{strategy: static}}."
        )
    known = (*DECODING_SETTINGS, *ALIASES)
    for name in published:
        if name not in known:
            raise UserError(
                f"metadata: sdar_decoding: {name!r} is no decoding setting.{did_you_mean(name, known)} "
                f"Known: {', '.join(known)}. Other settings are for generation_kwargs."
            )
    return typed(canonical(published), DecodingArguments)


def _read_gen_kwargs(gen_kwargs: Mapping[str, object]) -> dict[str, object]:
    check_names(gen_kwargs, "gen_kwargs")
    return typed(_without_none(canonical(gen_kwargs)), DecodingArguments)


def _decoding_of(settings: Mapping[str, object]) -> DecodingConfig:
    # DecodingConfig checks the values' types.
    own: dict[str, Any] = {name: value for name, value in settings.items() if name in DECODING_SETTINGS}
    if own.get("top_k") == -1:
        own["top_k"] = 0  # "off" in vLLM's spelling
    return DecodingConfig(**own)


def warn_of_idle_knobs(given: Mapping[str, object], decoding: DecodingConfig, why: str) -> None:
    """Warn of a given setting, other than its default, that the strategy does not read.

    Args:
        given: the settings of user and task.
        decoding: the request's settings.
        why: the end of the message's clause on the strategy.
    """
    default = DecodingConfig(block_length=decoding.block_length)
    for name in sorted(decoding.idle & given.keys()):
        value = getattr(decoding, name)
        readers = [each.name for each in STRATEGIES.values() if _reads(each, name)]
        if readers and value != getattr(default, name):  # greedy drawing, not the strategy, leaves out top_p
            warn_once_of_idle_knob(f"{name}={spelled(value)}", decoding.remasking_strategy, " or ".join(readers), why)


def _reads(strategy: Strategy, setting: str) -> bool:
    return strategy.setting == setting or (setting == "denoising_steps" and strategy.uses_schedule)


@functools.cache
def warn_once_of_idle_knob(setting: str, used: str, readers: str, why: str) -> None:
    """Warn, the first time, of a setting that the strategy `used` does not read, but `readers` do."""
    logger.warning("%s has no effect: %s%s; strategy=%s reads it.", setting, used, why, readers)


def check_names(settings: Mapping[str, object], source: str, also: tuple[str, ...] = ()) -> None:
    """Refuse unknown names.

    Raises:
        UserError: a name is unknown; the message suggests a close one and lists all known ones.
    """
    spellings = tuple(dict.fromkeys((*also, *GENERATION_SETTINGS, *ALIASES)))
    for name, value in settings.items():
        if name in IGNORED:
            continue
        if name in NEUTRAL:
            if value is not None and str(value) != str(NEUTRAL[name]):
                raise UserError(
                    f"{source}: {name}={shown(value)} is not supported, only {NEUTRAL[name]}; "
                    f"where a task asks for it, override it: --gen_kwargs {name}={NEUTRAL[name]}."
                )
        elif name not in spellings:
            if name in OF_THOUGHTS:
                hint = f" The model takes it, for all tasks: --model_args {name}={spelled(value)}."
            else:
                hint = f" {HINTS[name]}" if name in HINTS else did_you_mean(name, spellings)
            raise UserError(f"{source}: {name!r} is unknown.{hint} Known: {', '.join(spellings)}.")


def to_number(name: str, value: object) -> float:
    """Read a number, given as a value or as text.

    Raises:
        UserError: the value is not a finite number.
    """
    return check_number(name, _number_in(value), whole=False)


def to_whole(name: str, value: object) -> int:
    """Read a whole number, given as a value or as text.

    Raises:
        UserError: the value is not a whole number.
    """
    return int(check_number(name, _number_in(value), whole=True))


def _number_in(value: object) -> object:
    """The number that a text says; any other value, and other texts, as they are."""
    if isinstance(value, str):
        for kind in (int, float):
            with contextlib.suppress(ValueError):
                return kind(value)
    return value


def to_bool(name: str, value: object) -> bool:
    """Read true or false, given as a value or as text.

    Raises:
        UserError: the value is neither.
    """
    value = plain(value)
    if isinstance(value, int) and value in (0, 1):
        return bool(value)
    if isinstance(value, str) and value.strip().lower() in ("true", "false"):
        return value.strip().lower() == "true"
    return check_bool(name, value)


def to_texts(value: object) -> tuple[str, ...]:
    """Read `until`: a text, a list of texts, or None. Empty texts end nothing and are left out.

    Raises:
        UserError: the value is something else.
    """
    texts = () if value is None else (value,) if isinstance(value, str) else value
    if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
        raise UserError(f"until={shown(value)} is neither a text nor a list of texts. Give one of these.")
    for text in texts:
        check_unicode("until", text)
    return tuple(dict.fromkeys(text for text in texts if text))


def typed(settings: Mapping[str, object], names: type[object]) -> dict[str, object]:
    """Read values that may be text, by the types that a TypedDict gives to their names.

    Raises:
        UserError: a value is of another type.
    """
    readers: dict[object, Callable[[str, object], object]] = {int: to_whole, float: to_number, bool: to_bool}
    read = {name: readers[kind] for name, kind in get_type_hints(names).items() if kind in readers}
    return {name: read[name](name, value) if name in read else value for name, value in settings.items()}


def _without_none(settings: Mapping[str, object]) -> dict[str, object]:
    return {name: value for name, value in settings.items() if value is not None}


def _is_sampled(given: Mapping[str, object], base: Mapping[str, object]) -> bool:
    """The harness's rule: `do_sample` decides; without it, a temperature above 0 samples; without both, greedy."""
    for source in (given, base):
        if "do_sample" in source:
            return to_bool("do_sample", source["do_sample"])
        if "temperature" in source:
            return to_number("temperature", source["temperature"]) > 0
    return False


def _warn_of_unused_temperature(given: Mapping[str, object], base: Mapping[str, object]) -> None:
    if to_number("temperature", given.get("temperature", 0)) > 0:
        logger.warning(
            "do_sample=false is greedy, so temperature=%g has no effect; --gen_kwargs do_sample=true,temperature=%g "
            "samples.",
            given["temperature"],
            given["temperature"],
        )
    elif given and _is_sampled({}, base):
        logger.warning(
            "The task asks for greedy decoding, so the sampling in model_args has no effect; "
            "--gen_kwargs do_sample=true,temperature=1.0 overrides the task."
        )


def _max_tokens(given: Mapping[str, object], base: Mapping[str, object]) -> int:
    """Most new tokens: by the last spelling in gen_kwargs (see `canonical`), else in model_args, else the default."""
    for source in (given, base):
        names = [name for name in source if name in MAX_TOKENS_SPELLINGS]
        if not names:
            continue
        *unused, name = names
        if any(source[other] != source[name] for other in unused):
            warn_once_of_two_spellings(f"{name}={source[name]}", ", ".join(f"{n}={source[n]}" for n in unused))
        return at_least_one(name, to_whole(name, source[name]))
    return DEFAULT_MAX_GEN_TOKS
