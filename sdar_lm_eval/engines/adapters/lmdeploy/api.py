"""All that the adapter uses of LMDeploy, as types; files are named as in versions.py.

Nothing here imports LMDeploy before a function is called.
"""

from __future__ import annotations

import enum
import importlib
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Protocol, cast

import torch

# A request, from outside


class GenerationConfig(Protocol):
    """A request's settings (lmdeploy/messages.py, one folder up)."""

    temperature: float


class EngineOutput(Protocol):
    """New tokens of a request (lmdeploy/messages.py, one folder up)."""

    status: enum.Enum
    token_ids: list[int]


class Instance(Protocol):
    """A worker for one request at a time (engine/engine_instance.py)."""

    def async_stream_infer(
        self, session_id: int, input_ids: list[int], *, gen_config: GenerationConfig
    ) -> AsyncGenerator[EngineOutput, None]:
        """Run a request; yield its new tokens a block at a time."""

    async def async_cancel(self, session_id: int) -> None:
        """End a request that is under way."""


# A request, inside the engine


class SamplingParam(Protocol):
    """How a request's tokens are drawn (messages.py)."""

    random_seed: int


class Request(Protocol):
    """A request under way (messages.py: SchedulerSequence)."""

    session_id: int
    status: enum.Enum
    sampling_param: SamplingParam
    num_valid_ids: int  # tokens of prompt and answer, without masks


class SamplingInputs(Protocol):
    """How the tokens of B requests' blocks of L tokens are drawn, a row for each token (engine/logits_process.py)."""

    random_seeds: torch.Tensor | None  # (B * L,); None where all requests are greedy
    random_offsets: torch.Tensor  # (B * L,)


class SamplingStrategy(Protocol):
    """Makes sampling inputs (strategies/dllm/sampling.py)."""

    make_sampling_inputs: Callable[[Sequence[Request]], SamplingInputs]


class ExtraOutputs(Protocol):
    """What a forward returns under block diffusion beside tokens."""

    dllm_mask: torch.Tensor  # (B * L,), the state of each token (consts.py)


class BatchedOutputs(Protocol):
    """What a forward returns."""

    extra_outputs: ExtraOutputs


class ModelInputs(Protocol):
    """What went into a forward."""

    is_decoding: bool


class UpdateRunning(Protocol):
    """Adds what a forward returned to its requests."""

    def __call__(
        self,
        running: Sequence[Request],
        batched_outputs: BatchedOutputs,
        model_inputs: ModelInputs | None,
        **others: object,
    ) -> None:
        """Update the requests of a forward."""


class SeqStrategy(Protocol):
    """Keeps requests (strategies/dllm/sequence.py)."""

    update_running: UpdateRunning


# The engine


class ModelConfig(Protocol):
    """What LMDeploy makes of config.json (config.py)."""

    dllm_mask_token: int
    model_paradigm: str


class CacheConfig(Protocol):
    """The KV pages (config.py)."""

    num_gpu_blocks: int
    block_size: int  # tokens of a page


class Engine(Protocol):
    """The engine, with the weights in memory (engine/engine.py)."""

    model_config: ModelConfig
    cache_config: CacheConfig
    max_session_len: int
    sampling_strategy: SamplingStrategy
    seq_strategy: SeqStrategy

    def create_instance(self) -> Instance:
        """A worker for requests."""

    def start_loop(self) -> object:
        """Begin to work, in the event loop that runs this."""

    def close(self) -> None:
        """Stop working; called in the same event loop."""

    async def wait_tasks(self) -> None:
        """Wait until the engine has stopped, and its memory is free."""


class HFConfig(Protocol):
    """config.json, as transformers opened it."""

    model_type: str
    mask_token_id: int


class Builder(Protocol):
    """Makes a `ModelConfig` (configurations/builder.py, configurations/default.py)."""

    def build(self, hf_config: HFConfig, model_path: str | None, **settings: object) -> ModelConfig:
        """The model's config."""


# The modules


class EngineClass(Protocol):
    """The class `Engine`."""

    def from_pretrained(self, path: str, *, engine_config: object, trust_remote_code: bool) -> Engine:
        """Load a checkpoint's folder."""


class Package(Protocol):
    """The module `lmdeploy`."""

    PytorchEngineConfig: Callable[..., object]
    GenerationConfig: Callable[..., GenerationConfig]


class EngineModule(Protocol):
    """The module `lmdeploy.pytorch.engine`."""

    Engine: EngineClass


class Envs(Protocol):
    """The module `lmdeploy.pytorch.envs`."""

    enable_check_env: bool


def package() -> Package:
    """Import LMDeploy."""
    return cast(Package, importlib.import_module("lmdeploy"))


def engine_module() -> EngineModule:
    """Import the engine."""
    return cast(EngineModule, importlib.import_module("lmdeploy.pytorch.engine"))


def envs_module() -> Envs:
    """Import the settings that LMDeploy reads from environment variables."""
    return cast(Envs, importlib.import_module("lmdeploy.pytorch.envs"))


def default_builder() -> Builder:
    """Import the builder of models that LMDeploy has no rules of its own for."""
    module = importlib.import_module("lmdeploy.pytorch.configurations.default")
    return cast(Builder, module.DefaultModelConfigBuilder)
