"""LMDeploy's engine in memory: made for settings that hold for all that it runs, and ended."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import importlib
import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from types import ModuleType
from typing import Any

import torch

from sdar_lm_eval.checkpoint import Checkpoint
from sdar_lm_eval.engines.adapters.common import (
    Installed,
    check_lengths,
    check_mask_token,
    end_processes,
    free_memory,
    processes_started,
    register_configs,
)
from sdar_lm_eval.engines.adapters.lmdeploy.config import SDARConfig, SDARMoeConfig, config_for_lmdeploy
from sdar_lm_eval.engines.adapters.lmdeploy.hooks import Forwards, give_seeds, log_kept, register_model_types
from sdar_lm_eval.engines.adapters.lmdeploy.loop import LoopThread
from sdar_lm_eval.engines.base import DecodingConfig, GenerationRequest
from sdar_lm_eval.errors import EngineError

logger = logging.getLogger(__name__)

MAX_ACTIVE = 256  # unless the user says otherwise
PAGE_SIZE = 64  # tokens; whole blocks fill it
PREFILL_TOKENS = 8192  # LMDeploy's default; longer prompts go in chunks of it
# What sampling needs for each logit: the weights' dtype, a sorted copy, its indices, probabilities.
BYTES_PER_LOGIT = 24
LOGITS_SHARE = 0.1  # of a GPU's memory at most
PATIENCE = 60.0  # seconds for an engine to end


@dataclass(frozen=True)
class Setup:
    """What the adapter was opened with.

    Attributes:
        installed: the installed LMDeploy.
        checkpoint: the opened checkpoint.
        device: a GPU.
        dtype: "bfloat16" or "float16".
        max_active: most sequences at once, if the user says so.
        tensor_parallel_size: GPUs that share the weights.
        executor: who runs the model, see `executor_for`.
        cache_share: the part of the memory that the weights leave, for keys and values.
    """

    installed: Installed
    checkpoint: Checkpoint
    device: torch.device
    dtype: str
    max_active: int | None
    tensor_parallel_size: int
    executor: str
    cache_share: float


@dataclass(frozen=True)
class Fixed:
    """What is settled when the engine is made; settings without effect do not count."""

    block_length: int
    strategy: str
    steps: int
    threshold: float

    @classmethod
    def of(cls, decoding: DecodingConfig) -> Fixed:
        """What the engine has to be made for, to decode so."""
        dynamic = decoding.remasking_strategy == "low_confidence_dynamic"
        return cls(
            block_length=decoding.block_length,
            strategy=decoding.remasking_strategy,
            steps=decoding.block_length if dynamic else decoding.steps,
            threshold=decoding.confidence_threshold if dynamic else DecodingConfig.confidence_threshold,
        )


class Loaded:
    """LMDeploy's engine with the weights, in an event loop of its own.

    Args:
        setup: what the adapter was opened with.
        lmdeploy: its package.
        fixed: the settings that it is made for.
        active: most sequences at once.

    Attributes:
        engine: LMDeploy's.
        loop: where it lives; None once it is closed.
        forwards: counts of each request's.
        sessions: numbers for requests.

    Raises:
        EngineError: LMDeploy did not start, or took another mask token.
    """

    engine: Any
    forwards: Forwards

    def __init__(self, setup: Setup, lmdeploy: ModuleType, fixed: Fixed, active: int) -> None:
        self.setup, self.lmdeploy, self.fixed, self.active = setup, lmdeploy, fixed, active
        self.engine = None
        self.loop: LoopThread | None = None
        self.sessions = itertools.count(1)
        self._workers: list[BaseProcess] = []
        try:
            self._open()
        except (Exception, SystemExit) as error:  # it exits where it finds something wrong (check_env/base.py)
            self.close()
            raise EngineError(
                f"LMDeploy {setup.installed.version} did not start: {type(error).__name__}: {error}. If memory is "
                "short, lower max_active or cache_max_entry_count, or raise tensor_parallel_size."
            ) from error
        try:
            check_mask_token("LMDeploy", self.engine.model_config.dllm_mask_token, setup.checkpoint)
        except EngineError:
            self.close()
            raise

    def _open(self) -> None:
        setup, fixed = self.setup, self.fixed
        register_configs(SDARConfig, SDARMoeConfig)
        register_model_types()
        engine = importlib.import_module("lmdeploy.pytorch.engine")
        settings = self.lmdeploy.PytorchEngineConfig(
            dtype=setup.dtype,
            tp=setup.tensor_parallel_size,
            distributed_executor_backend=setup.executor,
            session_len=setup.checkpoint.max_length,
            max_batch_size=self.active,
            cache_max_entry_count=setup.cache_share,
            block_size=PAGE_SIZE,
            max_prefill_token_num=max(PREFILL_TOKENS, self.active * fixed.block_length),
            enable_metrics=False,
            dllm_block_length=fixed.block_length,
            dllm_unmasking_strategy=fixed.strategy,
            dllm_denoising_steps=fixed.steps,
            dllm_confidence_threshold=fixed.threshold,
        )
        torch.cuda.set_device(setup.device)
        with (
            setup.checkpoint.clean_folder(config_for_lmdeploy(setup.checkpoint, setup.dtype)) as folder,
            log_kept(),
            processes_started() as self._workers,
        ):
            self.engine = engine.Engine.from_pretrained(str(folder), engine_config=settings, trust_remote_code=False)
        give_seeds(self.engine, fixed.block_length)
        self.forwards = Forwards(self.engine)
        self.loop = loop = LoopThread(setup.device)
        loop.run(_call(self.engine.start_loop))
        atexit.register(self.close)

    @property
    def closed(self) -> bool:
        """Whether it has ended."""
        return self.loop is None

    def close(self) -> None:
        """End the engine and give its memory back, if that is not done yet."""
        atexit.unregister(self.close)
        engine, loop = self.engine, self.loop
        self.engine = self.loop = None
        if loop is not None:
            try:
                loop.run(_close(engine), PATIENCE)
            except Exception as error:
                logger.warning("LMDeploy did not end: %s: %s", type(error).__name__, error)
            loop.close()
        # An engine ends its workers itself, one that failed to start does not.
        end_processes(self._workers, PATIENCE if loop is not None else 0.0)
        self._workers = []
        del engine
        free_memory()

    @property
    def lost(self) -> bool:
        """Whether a worker process is gone: the engine would wait for its answer without end."""
        return not all(worker.is_alive() for worker in self._workers)

    def check_workers(self) -> None:
        """Look whether the worker processes are there.

        Raises:
            EngineError: one is gone.
        """
        if self.lost:
            end_processes(self._workers, 0.0)  # the others wait for it
            raise EngineError(
                "a worker process of LMDeploy ended; its messages or the system's log may say why. Finished answers "
                "are kept (--use_cache)."
            )

    def check_room(self, requests: Sequence[GenerationRequest]) -> None:
        """Refuse requests that are longer than there are pages for.

        Raises:
            UserError: there is one.
        """
        check_lengths(requests, int(self.engine.max_session_len), "LMDeploy has room for")

    def at_once(self, requests: Sequence[GenerationRequest]) -> int:
        """Sequences that run at once: as many as have pages to their end, so that none is evicted and run again."""
        config = self.engine.cache_config
        free = int(config.num_gpu_blocks) - 1  # one is LMDeploy's own
        largest = sorted((-(-request.longest // int(config.block_size)) + 2 for request in requests), reverse=True)
        fit = sum(total <= free for total in itertools.accumulate(largest))
        return max(1, min(self.active, len(requests), fit))


def wanted_active(setup: Setup, fixed: Fixed, number: int) -> int:
    """Sequences to make room for, of so many: a power of 2, or the most that there may be."""
    _, total = torch.cuda.mem_get_info(setup.device)
    logits = fixed.block_length * setup.checkpoint.config["vocab_size"] * BYTES_PER_LOGIT
    most = max(1, min(setup.max_active or MAX_ACTIVE, int(LOGITS_SHARE * total / logits)))
    return min(most, 1 << (number - 1).bit_length())


async def _call(function: Callable[[], object]) -> None:
    function()


async def _close(engine: Any) -> None:
    """End an engine in its own loop, and wait until its memory is free."""
    engine.close()
    with contextlib.suppress(asyncio.CancelledError):
        await engine.wait_tasks()
