"""The registry of engines: names, arguments and capabilities.

A new engine is a file or folder, and an entry of `ENGINES`. The lm_eval models, the hook that registers them, settings,
Modal and benchmarks read this table. This module imports no third-party package.
"""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sdar_lm_eval.checks import check_arguments, checks_types
from sdar_lm_eval.errors import EngineError, UserError, did_you_mean

if TYPE_CHECKING:
    from sdar_lm_eval.checkpoint import Checkpoint
    from sdar_lm_eval.engines.types import Engine

POWERS_TO_64 = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class EngineSpec:
    """Facts about an engine that need no import of the engine.

    Attributes:
        name: the engine's name for `make_engine` and `--engine`.
        model: the lm_eval model's name for `lm_eval --model`.
        lm: the lm_eval model, "module:Class".
        target: the engine, "module:Class"; imported when the engine is opened.
        arguments: name of the TypedDict in `arguments.py` that has the engine's model_args.
        strategies: remasking strategies that any version of the engine has; None: all.
        block_lengths: block lengths that the engine supports; None: any.
        scores: whether the engine computes log-likelihoods.
        packages: packages that the engine runs on beside torch and transformers, by their names for pip.
        find: "module:function" of a function that looks for all that the engine needs. It imports no engine, and
            raises an EngineError that says what is missing and how to install it. None: the engine runs anywhere.
    """

    name: str
    model: str
    lm: str
    target: str
    arguments: str
    strategies: tuple[str, ...] | None = None
    block_lengths: tuple[int, ...] | None = None
    scores: bool = False
    packages: tuple[str, ...] = ()
    find: str | None = None


ENGINES = {
    spec.name: spec
    for spec in (
        EngineSpec(
            name="native",
            model="sdar",
            lm="sdar_lm_eval.lm.model:SDARLM",
            target="sdar_lm_eval.engines.native.engine:NativeEngine",
            arguments="NativeArguments",
            scores=True,
            packages=("triton",),
        ),
        EngineSpec(
            name="jetengine",
            model="sdar-jetengine",
            lm="sdar_lm_eval.lm.model:SDARJetEngineLM",
            target="sdar_lm_eval.engines.adapters.jetengine.engine:JetEngine",
            arguments="JetEngineArguments",
            block_lengths=POWERS_TO_64,  # its prefill attention supports no others
            packages=("jetengine", "flash-attn", "flashinfer-python", "liger-kernel"),
            find="sdar_lm_eval.engines.adapters.jetengine.versions:find_jetengine",
        ),
        EngineSpec(
            name="lmdeploy",
            model="sdar-lmdeploy",
            lm="sdar_lm_eval.lm.model:SDARLMDeployLM",
            target="sdar_lm_eval.engines.adapters.lmdeploy.engine:LMDeploy",
            arguments="LMDeployArguments",
            # lmdeploy/pytorch/config.py: UnmaskingStrategy
            strategies=("low_confidence_dynamic", "low_confidence_static", "sequential"),
            block_lengths=POWERS_TO_64,  # a page and a prefill chunk hold a whole number of such blocks
            packages=("lmdeploy", "triton"),
            find="sdar_lm_eval.engines.adapters.lmdeploy.versions:find_lmdeploy",
        ),
    )
}
"""Name -> engine."""

MODELS = {spec.model: spec.lm for spec in ENGINES.values()}
"""Name for `lm_eval --model` -> "module:Class"."""


@checks_types
def engine_named(name: str) -> EngineSpec:
    """Return an engine's facts.

    Raises:
        UserError: no engine has this name.
    """
    if name not in ENGINES:
        raise UserError(f"engine {name!r} is unknown; known: {', '.join(ENGINES)}.{did_you_mean(name, ENGINES)}")
    return ENGINES[name]


def why_not_here(spec: EngineSpec) -> str | None:
    """Return why an engine cannot run on this machine, and what to install; None where it can."""
    if spec.find is None:
        return None
    module, _, function = spec.find.partition(":")
    try:
        getattr(importlib.import_module(module), function)()
    except EngineError as error:
        return str(error)
    return None


def make_engine(name: str, checkpoint: Checkpoint, **options: object) -> Engine:
    """Open an engine by name. Imports no other engine.

    Args:
        name: one of `ENGINES`.
        checkpoint: the opened checkpoint.
        options: keyword arguments of the engine's class.

    Raises:
        UserError: no engine has this name, or an option is unknown, of another type or out of range.
        EngineError: a package that the engine needs is not installed.
    """
    module, _, engine_class = engine_named(name).target.partition(":")
    made_by = getattr(importlib.import_module(module), engine_class)
    try:
        inspect.signature(made_by).bind(checkpoint, **options)
    except TypeError as error:
        raise UserError(
            f"the {name} engine {error}. Known: {', '.join(inspect.signature(made_by).parameters)}."
        ) from None
    # Engines check their other options themselves.
    check_arguments(made_by, checkpoint, **{each: options[each] for each in ("device", "dtype") if each in options})
    engine: Engine = made_by(checkpoint, **options)
    return engine
