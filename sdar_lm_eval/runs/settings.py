"""Checks the flags of a benchmark run, and translates them into a call of the harness.

The defaults are those of the original GSM8K benchmark, which differ from the harness's on purpose: temperature 1.0
samples (0.0 is greedy), at most 512 new tokens for GSM8K.
"""

from __future__ import annotations

import functools
import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict, cast

import sdar_lm_eval
from sdar_lm_eval.arguments import ModelArguments, arguments_of
from sdar_lm_eval.decoding import DecodingConfig, in_words
from sdar_lm_eval.engines.registry import ENGINES
from sdar_lm_eval.errors import UserError, did_you_mean
from sdar_lm_eval.hashing import digest_of_files, hex_digest
from sdar_lm_eval.revision import ANSWER_REVISION
from sdar_lm_eval.runs.grid import Combination, Setting, combinations, parts_of, without_copies
from sdar_lm_eval.settings import OF_THOUGHTS, read_generation, typed
from sdar_lm_eval.spellings import ALIASES

DEFAULT_TASK = "gsm8k_sdar"

SWEPT = ("block_length", "denoising_steps", "temperature", "remasking_strategy", "confidence_threshold")
"""Flags that take several values for a sweep (`grid.py`); a sweep varies the last one fastest."""

RUN_PROGRAMS = (
    "humaneval_sdar", "mbpp_sdar", "sdar_bench", "livecodebench_v5_sdar", "livecodebench_v5_sdar_s",
    "livecodebench_v6_sdar", "livecodebench_v6_sdar_s", "sdar_sci", "sdar_sci_s",
)  # fmt: skip
"""This package's tasks and groups that are scored by running programs that the model wrote."""

ENGINE_ARGUMENTS = ("dtype", "max_active", "max_length")
"""model_args of every engine that `--engine-args` takes, beside the engine's own."""

SEVERAL_GPUS = ("tensor_parallel_size", "data_parallel_size")
"""model_args that need several GPUs. A container has one."""

_PACKAGE = Path(sdar_lm_eval.__file__).parent


class HarnessCall(TypedDict):
    """Arguments of `lm_eval.simple_evaluate`."""

    model: str
    model_args: dict[str, Setting]
    tasks: list[str]
    gen_kwargs: dict[str, Setting]
    limit: int | None


@dataclass(frozen=True)
class RunSettings:
    """The settings of one evaluation.

    Attributes:
        model_name: hub id, or the name of a folder among the models.
        revision: branch, tag or commit of a hub id.
        engine: one of `ENGINES` (engines/registry.py).
        tasks: names of the harness's tasks.
        num_samples: number of documents of each task, from the first on; None: all documents.
        decoding: the decoding settings; temperature 0 is greedy.
        max_gen_length: limit of new tokens; None: each task's own limit.
        seed: seed of sampled answers.
        verbose: log each example.
        confirm_run_unsafe_code: the user agrees that programs of the model are run.
        thoughts: (name, value) of the model_args on thoughts (`OF_THOUGHTS` in settings.py).
        engine_args: (name, value) of the model_args that only say how the engine runs (`engine_arguments`).
    """

    model_name: str
    revision: str | None
    engine: str
    tasks: tuple[str, ...]
    num_samples: int | None
    decoding: DecodingConfig
    max_gen_length: int | None
    seed: int
    verbose: bool
    confirm_run_unsafe_code: bool = False
    thoughts: tuple[tuple[str, str], ...] = ()
    engine_args: tuple[tuple[str, Setting], ...] = ()

    @property
    def gen_kwargs(self) -> dict[str, Setting]:
        """The generation arguments of every request."""
        decoding = self.decoding
        settings: dict[str, Setting] = {
            "do_sample": decoding.temperature > 0,
            "temperature": decoding.temperature,
            "block_length": decoding.block_length,
            "denoising_steps": decoding.steps,
            "remasking_strategy": decoding.remasking_strategy,
            "confidence_threshold": decoding.confidence_threshold,
        }
        return settings | ({} if self.max_gen_length is None else {"max_gen_toks": self.max_gen_length})

    @property
    def name(self) -> str:
        """A short name for what is evaluated: tasks and number of documents."""
        tasks = "+".join(self.tasks)
        return tasks if self.num_samples is None else f"{tasks}-first-{self.num_samples}"

    @property
    def swept(self) -> dict[str, Setting]:
        """The settings that a sweep may vary."""
        return {name: getattr(self.decoding, "steps" if name == "denoising_steps" else name) for name in SWEPT}

    def harness_call(self, pretrained: str | None = None, **model_args: Setting | None) -> HarnessCall:
        """Return this run as arguments of `lm_eval.simple_evaluate`.

        Args:
            pretrained: where the model is; default: its name.
            model_args: further model_args; None leaves one out.
        """
        given: dict[str, Setting | None] = {
            "pretrained": pretrained or self.model_name,
            "revision": self.revision,
            "seed": self.seed,
            "verbose": self.verbose or None,
            **dict(self.thoughts),
            **dict(self.engine_args),
            **model_args,
        }
        return {
            "model": ENGINES[self.engine].model,
            "model_args": {name: value for name, value in given.items() if value is not None},
            "tasks": list(self.tasks),
            "gen_kwargs": self.gen_kwargs,
            "limit": self.num_samples,
        }

    def command_line(self) -> str:
        """Return the command by which a local user makes the same call."""
        call = self.harness_call()

        def pairs(settings: Mapping[str, Setting]) -> str:
            return ",".join(f"{name}={json.dumps(v) if isinstance(v, bool) else v}" for name, v in settings.items())

        words = ["lm_eval", "run", "--model", call["model"], "--model_args", pairs(call["model_args"])]
        words += ["--tasks", ",".join(self.tasks), "--gen_kwargs", pairs(call["gen_kwargs"])]
        words += [] if self.num_samples is None else ["--limit", str(self.num_samples)]
        words += ["--confirm_run_unsafe_code"] if self.confirm_run_unsafe_code else []
        return shlex.join(words)

    def folder(self, checkpoint: str, machine: Sequence[str]) -> str:
        """Return the name of the folder for the run's answers: the model's name, and a hash of what changes answers.

        The hash leaves out which documents are answered, and on how many machines: a run goes on from the answers of
        another that asked for fewer. It leaves out prompts too, which each answer's own key holds (`lm/store.py`).

        Args:
            checkpoint: the checkpoint's fingerprint.
            machine: the GPU and the pinned versions.
        """
        content = {
            "revision": ANSWER_REVISION,
            "checkpoint": checkpoint,
            "engine": self.engine,
            "machine": list(machine),
            "gen_kwargs": self.gen_kwargs,
            "seed": self.seed,
            **({"thoughts": dict(self.thoughts)} if self.thoughts else {}),
            **({"engine_args": dict(self.engine_args)} if self.engine_args else {}),
        }
        model = re.sub(r"[^A-Za-z0-9.-]+", "_", self.model_name).strip("_")
        return f"{model}-{self.engine}-{hex_digest(content, digits=12)}"


def runs_from_flags(
    *,
    model_name: str,
    num_samples: int | None,
    block_length: str,
    denoising_steps: str,
    temperature: str,
    remasking_strategy: str,
    confidence_threshold: str,
    max_gen_length: int | None,
    verbose: bool,
    engine: str,
    tasks: str,
    revision: str | None = None,
    seed: int = 0,
    confirm_run_unsafe_code: bool = False,
    thoughts: str = "",
    engine_args: str = "",
    short: Mapping[str, str | None] | None = None,
) -> list[RunSettings]:
    """Return the run that the flags ask for, or those of a sweep: all combinations of values, copies left out.

    Args:
        thoughts: model_args on thoughts, as name=value,name=value or JSON.
        engine_args: model_args of the engine, in the same forms.
        short: flags by their short names (`ALIASES` in spellings.py); they replace the flag of the full name.
        all others: the flags; see `RunSettings`.

    Raises:
        UserError: a value is unknown or out of range; says what is allowed.
    """
    if engine not in ENGINES:
        raise UserError(f"--engine {engine} is unknown; choose {', '.join(ENGINES)}.{did_you_mean(engine, ENGINES)}")
    if not model_name.strip():
        raise UserError("--model-name is empty. Give a hub id such as JetLM/SDAR-4B-Chat, or a folder's name.")
    numbers = (("--num-samples", num_samples, 1), ("--max-gen-length", max_gen_length, 1), ("--seed", seed, 0))
    for flag, number, least in numbers:
        if number is not None and number < least:
            raise UserError(f"{flag} {number} is out of range: it must be {least} or more.")
    names = _tasks_of(tasks, confirm_run_unsafe_code)
    texts = {
        "block_length": block_length,
        "denoising_steps": denoising_steps,
        "temperature": temperature,
        "remasking_strategy": remasking_strategy,
        "confidence_threshold": confidence_threshold,
    }
    texts |= {ALIASES.get(name, name): text for name, text in (short or {}).items() if text is not None}
    grid = combinations(texts, _flag)
    several = [name for name in SWEPT if len({combination[name] for combination in grid}) > 1]
    every = RunSettings(
        model_name=model_name,
        revision=revision or None,
        engine=engine,
        tasks=names,
        num_samples=num_samples,
        decoding=DecodingConfig(),
        max_gen_length=max_gen_length,
        seed=seed,
        verbose=verbose,
        confirm_run_unsafe_code=confirm_run_unsafe_code,
        thoughts=tuple(_named_values("--thoughts", thoughts, OF_THOUGHTS).items()),
        engine_args=_engine_args(engine_args, engine),
    )
    return without_copies([_run_of(every, combination, several) for combination in grid], lambda run: run.decoding)


def _tasks_of(tasks: str, confirm_run_unsafe_code: bool) -> tuple[str, ...]:
    """The tasks that --tasks names, each once.

    Raises:
        UserError: a name is empty, or a task runs programs and the user does not agree.
    """
    names = tuple(dict.fromkeys(parts_of("--tasks", tasks)))
    if not confirm_run_unsafe_code and (programs := [task for task in names if task in RUN_PROGRAMS]):
        raise UserError(
            f"--tasks {', '.join(programs)}: scored by running programs that the model writes. They run in a container "
            "without network, token and volumes; say --confirm-run-unsafe-code to agree. Nothing was run."
        )
    return names


def _run_of(every: RunSettings, combination: Combination, swept: Sequence[str]) -> RunSettings:
    """The run of a combination; `every` has the settings that all runs share.

    Raises:
        UserError: the model or the engine would refuse the combination.
    """
    try:
        run = replace(every, decoding=_decoding_of(combination, swept))
        read_generation(run.gen_kwargs, {})  # refuses what the model would
        _check_limits(run.engine, run.decoding)
    except UserError as error:
        if not swept:
            raise
        raise UserError(
            f"{error} The sweep asks for it at {in_words({name: combination[name] for name in swept})}. Nothing was "
            "run: leave that value out, or sweep in several commands."
        ) from error
    return run


def _decoding_of(combination: Combination, swept: Sequence[str]) -> DecodingConfig:
    """Return the settings of a combination; a swept setting that has no effect in it has its default."""
    settings: dict[str, Any] = dict(combination)  # DecodingConfig checks the values' types
    idle = DecodingConfig(**settings).idle.intersection(swept)
    return DecodingConfig(**{name: value for name, value in settings.items() if name not in idle})


def engine_arguments(engine: str) -> tuple[str, ...]:
    """Return the names of an engine's model_args on speed, memory and precision, for one GPU."""
    every = {*ModelArguments.__annotations__, *SEVERAL_GPUS}
    return (*ENGINE_ARGUMENTS, *(name for name in arguments_of(engine).__annotations__ if name not in every))


def _named_values(flag: str, text: str, known: Sequence[str]) -> dict[str, str]:
    """Read name=value,name=value or JSON; lm_eval, which has a parser, need not be installed beside Modal's client."""
    if text.lstrip().startswith("{"):
        try:
            given = {name: v if isinstance(v, str) else json.dumps(v) for name, v in json.loads(text).items()}
        except ValueError as error:
            raise UserError(f"{flag} {text} is no JSON: {error}. Give JSON, or name=value,name=value.") from error
    else:
        given = {name: value for name, _, value in (part.partition("=") for part in text.split(",") if part)}
    for name, value in given.items():
        if name not in known or not value:
            raise UserError(f"{flag} {text}: give name=value,name=value or JSON, with names out of {', '.join(known)}.")
    return given


def _engine_args(text: str, engine: str) -> tuple[tuple[str, Setting], ...]:
    """Read --engine-args. An engine refuses other types too, but on a GPU that is paid for by then."""
    given = _named_values("--engine-args", text, engine_arguments(engine))
    try:
        read = typed(given, arguments_of(engine))
    except UserError as error:
        raise UserError(f"--engine-args {text}: {error}") from error
    return tuple(cast("dict[str, Setting]", read).items())


def _flag(setting: str) -> str:
    return f"--{setting.replace('_', '-')}"


def _check_limits(engine: str, decoding: DecodingConfig) -> None:
    """Refuse what an engine does not take. Engines refuse it themselves, but on a GPU that is paid for by then."""
    if beyond := next(beyond_limits(engine, decoding), None):
        name, value, allowed = beyond
        raise UserError(
            f"{_flag(name)} {value} is not for --engine {engine}, which takes {', '.join(map(str, allowed))}. "
            "Choose one of these, or --engine native."
        )


def beyond_limits(engine: str, decoding: DecodingConfig) -> Iterator[tuple[str, Setting, Sequence[Setting]]]:
    """Yield (setting, value, allowed values) of settings that an engine does not take."""
    spec = ENGINES[engine]
    if spec.block_lengths is not None and decoding.block_length not in spec.block_lengths:
        yield "block_length", decoding.block_length, spec.block_lengths
    if spec.strategies is not None and decoding.remasking_strategy not in spec.strategies:
        yield "remasking_strategy", decoding.remasking_strategy, spec.strategies


@functools.cache
def scored_by() -> str:
    """Return a hash of this package's sources.

    A published result of other sources is scored again, since a task's filters or metrics may have changed. Its answers
    are kept.
    """
    return digest_of_files(_PACKAGE, lambda file: file.suffix in (".py", ".jsonl") or "yaml" in file.name)
