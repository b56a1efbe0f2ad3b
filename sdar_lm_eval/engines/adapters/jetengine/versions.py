"""The two versions of JetEngine that are in use: which one is installed, and how they differ.

    0.2.0   the main branch of github.com/Labman42/JetEngine
    0.1.0   the submodule of SDAR's own repository (github.com/JetAstra/SDAR)

Neither is on PyPI: `jetengine` on PyPI is a library for MongoDB. Nothing here imports JetEngine.
"""

from __future__ import annotations

import importlib.util
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from sdar_lm_eval.engines.adapters.installed import check_nothing_is_missing, installed, is_there
from sdar_lm_eval.engines.adapters.jetengine import api, hooks
from sdar_lm_eval.engines.types import GenerationRequest
from sdar_lm_eval.errors import EngineError
from sdar_lm_eval.families.base import Config

logger = logging.getLogger(__name__)


class MakeReady(Protocol):
    """`make_ready_…` of hooks.py."""

    def __call__(
        self,
        device: torch.device,
        generator: torch.Generator,
        config: Config,
        block_length: int,
        dtype: torch.dtype,
    ) -> bool:
        """Prepare JetEngine's modules before its LLM is made; return whether flash-attn may split a context."""


@dataclass(frozen=True)
class Dialect:
    """All that is particular to a version of JetEngine: a new version is a new row of `DIALECTS`.

    Attributes:
        version: the version that pip records.
        commit: the commit of Labman42/JetEngine for which the row was written.
        file: of JetEngine's package, missing in the rows below; tells versions apart where nothing records a version.
        strategies: its remasking strategies.
        modules: the modules that it imports, each with the name of the package to install.
        mixture_of_experts: whether it runs SDAR MoE.
        tensor_parallel: whether several GPUs can share the weights.
        any_gpu: whether it runs on another GPU than the first.
        several_processes: whether it runs in several processes of a data parallel run.
        graphs: whether it has CUDA graphs.
        page_a_step: whether it takes more KV pages than it needs; see `pages_of`.
        returns_prompt: whether outputs begin with the prompt.
        prefills_beside: whether one step prefills some sequences and denoises the others; else a step does either.
        queues: attributes of the scheduler, to one of which `add_request` appends the new sequence.
        make_ready, draw_greedily, sampling_params: see hooks.py.
        deviations: rules that differ from those of `DecodingConfig`, by setting.
    """

    version: str
    commit: str
    file: str
    strategies: tuple[str, ...]
    modules: Mapping[str, str]
    mixture_of_experts: bool
    tensor_parallel: bool
    any_gpu: bool
    several_processes: bool
    graphs: bool
    page_a_step: bool
    returns_prompt: bool
    prefills_beside: bool
    queues: tuple[str, ...]
    make_ready: MakeReady
    draw_greedily: Callable[[api.Scheduler], None]
    sampling_params: Callable[[GenerationRequest, frozenset[int]], dict[str, object]]
    deviations: Mapping[str, str]


_SAMPLING = "drawn from one generator for all requests with like settings: beside other requests, other draws"
_MODULES = {"flashinfer": "flashinfer-python", "liger_kernel": "liger-kernel", "xxhash": "xxhash"}
DIALECTS = {
    "0.2.0": Dialect(
        version="0.2.0",
        commit="11563d141ff7a7d76e64bac6e4143dbc93efb5d5",
        file="engine/distributed_manager.py",
        strategies=("low_confidence_dynamic", "low_confidence_static", "sequential", "entropy_bounded", "random"),
        modules={**_MODULES, "flash_attn": "flash-attn", "accelerate": "accelerate"},
        mixture_of_experts=False,
        tensor_parallel=False,
        any_gpu=True,
        several_processes=True,
        graphs=True,
        page_a_step=False,
        returns_prompt=True,
        prefills_beside=True,
        queues=("running", "waiting_prefill"),
        make_ready=hooks.make_ready_020,
        draw_greedily=hooks.draw_greedily_020,
        sampling_params=hooks.sampling_params_020,
        deviations={
            "low_confidence_dynamic": "fewer tokens above the threshold than the step's quota: the leftmost masked "
            "tokens are unmasked, not the most confident ones",
            "confidence": "a token's probability, and the entropy, before top_k and top_p",
            "sampling": _SAMPLING,
            "random": "not seeded for each request",
            "greedy": "among tokens of equal logits the choice is random",
            "mask_token": "can be drawn; it is left out of the answer and counted as mask_tokens_drawn",
        },
    ),
    "0.1.0": Dialect(
        version="0.1.0",
        commit="0ddc55ad3fb712b6374515b78d656f420e1a7243",
        file="engine/llm_engine.py",
        strategies=("low_confidence_dynamic", "low_confidence_static", "sequential"),
        modules=_MODULES,
        mixture_of_experts=True,
        tensor_parallel=True,
        any_gpu=False,
        several_processes=False,
        graphs=False,
        page_a_step=True,
        returns_prompt=False,
        prefills_beside=False,
        queues=("running",),
        make_ready=hooks.make_ready_010,
        draw_greedily=hooks.draw_greedily_010,
        sampling_params=hooks.sampling_params_010,
        deviations={
            "sampling": _SAMPLING,
            "mask_token": "can be drawn; it is left out of the answer and counted as mask_tokens_drawn",
        },
    ),
}
PINNED = DIALECTS["0.2.0"].commit
INSTALL = (
    'Install with: pip install --no-build-isolation "sdar-lm-eval[jetengine]" && pip install --no-deps '
    f'"jetengine @ git+https://github.com/Labman42/JetEngine@{PINNED}". Or use --model sdar, which runs anywhere.'
)


def version_with(ability: str) -> str:
    """The newest version whose field of this name is true."""
    return next(version for version, dialect in DIALECTS.items() if getattr(dialect, ability))


def find_jetengine() -> tuple[Dialect, str | None]:
    """Find which JetEngine is installed, without importing it.

    Returns:
        (its dialect, its commit where pip knows it).

    Raises:
        EngineError: JetEngine is missing, is PyPI's library of that name, has an unknown version, or lacks something
            that it imports.
    """
    spec = importlib.util.find_spec("jetengine")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []
    missing, note = [], ""
    dialect = DIALECTS["0.2.0"]
    commit = None
    folder = next((folder for folder in folders if (folder / "engine" / "llm_engine.py").is_file()), None)
    if folder is None:
        missing.append("JetEngine")
        if spec is not None and spec.origin is not None:  # a package, not a mere folder
            note = " The installed `jetengine` is PyPI's library for MongoDB: uninstall it."
    else:
        version, commit = _version_of(folder)
        if version not in DIALECTS:
            known = " and ".join(f"{known} (commit {d.commit[:7]})" for known, d in DIALECTS.items())
            raise EngineError(f"JetEngine {version} is installed; known are {known}. {INSTALL}")
        dialect = DIALECTS[version]
        if commit is not None and commit != dialect.commit:
            logger.warning(
                "JetEngine is at commit %s; this adapter was written for %s.", commit[:7], dialect.commit[:7]
            )
    missing += [name for module, name in dialect.modules.items() if not is_there(module)]
    if not torch.cuda.is_available():
        missing.append("a CUDA GPU")
    check_nothing_is_missing("sdar-jetengine", missing, INSTALL, note)
    return dialect, commit


def _version_of(folder: Path) -> tuple[str, str | None]:
    """Version and commit: from what pip recorded, else from the checkout's pyproject.toml, else by `Dialect.file`."""
    if found := installed("jetengine"):
        return found.version, found.commit
    project = folder.parent / "pyproject.toml"
    if project.is_file() and (
        match := re.search(r'^name = "jetengine"\nversion = "(.+)"$', project.read_text(), re.MULTILINE)
    ):
        return match[1], None
    return next(version for version, dialect in DIALECTS.items() if (folder / dialect.file).is_file()), None
