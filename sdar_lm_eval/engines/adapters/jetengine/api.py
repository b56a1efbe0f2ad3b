"""All that the adapter uses of JetEngine, as types; "0.1.0" and "0.2.0" mark what only that version has.

Nothing here imports JetEngine before a function is called.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Protocol, cast

import torch


class Config(Protocol):
    """JetEngine's settings, and what it found out at its start."""

    mask_token_id: int
    num_kvcache_blocks: int


class Tokenizer(Protocol):
    """What JetEngine reads of transformers' tokenizer on the way of a request."""

    pad_token: str | None
    eos_token: str | None


class Numbered(Protocol):
    """A sequence under way, `Sequence` of JetEngine."""

    seq_id: int


class Scheduler(Protocol):
    """JetEngine's choice of the sequences that run. A new scheduler, of the same class, holds no sequence."""

    running: Sequence[Numbered]
    waiting_prefill: Sequence[Numbered]  # 0.2.0
    consistent_sampling_params: bool  # 0.2.0: all sequences have the settings of the first
    sample_pipe: Callable[..., torch.Tensor]  # 0.1.0: weights that a token is drawn by, from logits
    sample_pipe_topk0: Callable[..., torch.Tensor]  # 0.1.0: the same where topk is 0

    def __init__(self, config: Config) -> None: ...


class Engine(Protocol):
    """JetEngine's `LLM`: the engine, with the weights in memory."""

    config: Config
    scheduler: Scheduler
    tokenizer: Tokenizer

    def add_request(self, prompt: list[int], params: object) -> None:
        """Add a sequence to the scheduler; it gets the next number."""

    def step(self) -> tuple[Sequence[tuple[int, list[int]]], int]:
        """Run one step; return what finished, (number, tokens, in 0.2.0 more), and how many tokens were unmasked."""

    def exit(self) -> None:
        """End worker processes and drop the weights; JetEngine also calls this when Python ends."""


class Package(Protocol):
    """The module `jetengine`."""

    LLM: Callable[..., Engine]
    SamplingParams: Callable[..., object]


class EngineModule(Protocol):
    """The module `jetengine.engine.llm_engine`."""

    DistributedManager: Callable[[int], object]  # 0.2.0


class SchedulerModule(Protocol):
    """The module `jetengine.engine.scheduler`."""

    top_k_top_p_sampling_from_probs: Callable[..., torch.Tensor]  # 0.2.0; flashinfer's


class AttentionModule(Protocol):
    """The module `jetengine.layers.attention`."""

    flash_attn_with_kvcache: Callable[..., torch.Tensor]  # flash-attn's


def package() -> Package:
    """Import JetEngine."""
    return cast(Package, importlib.import_module("jetengine"))


def engine_module() -> EngineModule:
    """Import the module in which `LLM` looks up the names of `EngineModule`."""
    return cast(EngineModule, importlib.import_module("jetengine.engine.llm_engine"))


def scheduler_module() -> SchedulerModule:
    """Import the module in which the scheduler looks up flashinfer's sampling."""
    return cast(SchedulerModule, importlib.import_module("jetengine.engine.scheduler"))


def attention_module() -> AttentionModule:
    """Import the module in which JetEngine's layers look up flash-attn."""
    return cast(AttentionModule, importlib.import_module("jetengine.layers.attention"))
