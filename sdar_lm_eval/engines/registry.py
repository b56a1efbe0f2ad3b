"""The registry of engines: names, arguments and capabilities.

A new engine is a file or folder, and an entry of `ENGINES`. The lm_eval models, the hook that registers them, settings,
Modal and benchmarks read this table. This module imports no third-party package.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sdar_lm_eval.errors import UserError, did_you_mean

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
    """

    name: str
    model: str
    lm: str
    target: str
    arguments: str
    strategies: tuple[str, ...] | None = None
    block_lengths: tuple[int, ...] | None = None
    scores: bool = False


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
        ),
        EngineSpec(
            name="jetengine",
            model="sdar-jetengine",
            lm="sdar_lm_eval.lm.model:SDARJetEngineLM",
            target="sdar_lm_eval.engines.adapters.jetengine.engine:JetEngine",
            arguments="JetEngineArguments",
            block_lengths=POWERS_TO_64,  # its prefill attention supports no others
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
        ),
    )
}
"""Name -> engine."""

MODELS = {spec.model: spec.lm for spec in ENGINES.values()}
"""Name for `lm_eval --model` -> "module:Class"."""


def engine_named(name: str) -> EngineSpec:
    """Return an engine's facts.

    Raises:
        UserError: no engine has this name.
    """
    if name not in ENGINES:
        raise UserError(f"engine {name!r} is unknown; known: {', '.join(ENGINES)}.{did_you_mean(name, ENGINES)}")
    return ENGINES[name]


def make_engine(name: str, checkpoint: Checkpoint, **options: object) -> Engine:
    """Open an engine by name. Imports no other engine.

    Args:
        name: one of `ENGINES`.
        checkpoint: the opened checkpoint.
        options: keyword arguments of the engine's class.

    Raises:
        UserError: no engine has this name, or an option is out of range.
        EngineError: a package that the engine needs is not installed.
    """
    module, _, engine_class = engine_named(name).target.partition(":")
    engine: Engine = getattr(importlib.import_module(module), engine_class)(checkpoint, **options)
    return engine
