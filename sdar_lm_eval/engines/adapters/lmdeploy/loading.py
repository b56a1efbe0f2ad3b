"""LMDeploy's engine in memory: made for decoding settings that hold for all requests that it runs, and ended."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess

import torch

from sdar_lm_eval.checkpoint import Checkpoint
from sdar_lm_eval.decoding import DecodingConfig
from sdar_lm_eval.engines.adapters.config import check_same_mask_token, register_configs
from sdar_lm_eval.engines.adapters.installed import Installed
from sdar_lm_eval.engines.adapters.lmdeploy import api
from sdar_lm_eval.engines.adapters.lmdeploy.config import SDARConfig, SDARMoeConfig, config_for_lmdeploy
from sdar_lm_eval.engines.adapters.lmdeploy.hooks import Forwards, give_seeds, log_kept, register_model_types
from sdar_lm_eval.engines.adapters.lmdeploy.loop import LoopThread
from sdar_lm_eval.engines.adapters.processes import end_processes, processes_started, return_memory
from sdar_lm_eval.engines.adapters.requests import check_lengths
from sdar_lm_eval.engines.types import GenerationRequest
from sdar_lm_eval.errors import EngineError

logger = logging.getLogger(__name__)

MAX_ACTIVE = 256  # unless the user gives another number
PAGE_SIZE = 64  # tokens, a multiple of each block length
PREFILL_TOKENS = 8192  # LMDeploy's default; longer prompts are prefilled in chunks of this size
# Sampling holds each logit in the weights' dtype, a sorted copy, the copy's indices, and probabilities.
BYTES_PER_LOGIT = 24
LOGITS_SHARE = 0.1  # most of a GPU's memory that logits may take
PATIENCE = 60.0  # seconds for an engine to end


@dataclass(frozen=True)
class Setup:
    """What the adapter was opened with.

    Attributes:
        installed: the installed LMDeploy.
        checkpoint: the opened checkpoint.
        device: a GPU.
        dtype: "bfloat16" or "float16".
        max_active: most sequences at once; None: the user gave no number.
        tensor_parallel_size: GPUs that share the weights.
        executor: see `executor_for`.
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
    """Decoding settings that the engine is made for; a setting without effect has a fixed value."""

    block_length: int
    strategy: str
    steps: int
    threshold: float

    @classmethod
    def of(cls, decoding: DecodingConfig) -> Fixed:
        """What the engine has to be made for to decode with this configuration."""
        dynamic = decoding.remasking_strategy == "low_confidence_dynamic"
        return cls(
            block_length=decoding.block_length,
            strategy=decoding.remasking_strategy,
            steps=decoding.block_length if dynamic else decoding.steps,
            threshold=decoding.confidence_threshold if dynamic else DecodingConfig.confidence_threshold,
        )


@dataclass(frozen=True)
class Size:
    """What the engine is made for.

    Attributes:
        fixed: the decoding settings of all requests that the engine runs.
        max_active: most sequences at once.
    """

    fixed: Fixed
    max_active: int


class Loaded:
    """LMDeploy's engine with the weights, in an event loop of its own.

    Args:
        setup: the settings that opened the adapter.
        lmdeploy: the package.
        size: the limits for which the engine is made.

    Attributes:
        engine: LMDeploy's, until it is closed.
        loop: the event loop that the engine runs in; None once it is closed.
        forwards: counts of each request's forwards.
        sessions: numbers for requests.

    Raises:
        EngineError: LMDeploy did not start, or took another mask token.
    """

    engine: api.Engine
    forwards: Forwards

    def __init__(self, setup: Setup, lmdeploy: api.Package, size: Size) -> None:
        self.setup, self.lmdeploy, self.size = setup, lmdeploy, size
        self.loop: LoopThread | None = None
        self.sessions = itertools.count(1)
        self._workers: list[BaseProcess] = []
        try:
            self._open()
        except (Exception, SystemExit) as error:  # check_env/base.py calls sys.exit
            self.close()
            raise EngineError(
                f"LMDeploy {setup.installed.version} did not start: {type(error).__name__}: {error}. If memory is "
                "short, lower max_active or cache_max_entry_count, or raise tensor_parallel_size."
            ) from error
        try:
            check_same_mask_token("LMDeploy", self.engine.model_config.dllm_mask_token, setup.checkpoint)
        except EngineError:
            self.close()
            raise

    def _open(self) -> None:
        setup, fixed = self.setup, self.size.fixed
        register_configs(SDARConfig, SDARMoeConfig)
        register_model_types()
        settings = self.lmdeploy.PytorchEngineConfig(
            dtype=setup.dtype,
            tp=setup.tensor_parallel_size,
            distributed_executor_backend=setup.executor,
            session_len=setup.checkpoint.max_length,
            max_batch_size=self.max_active,
            cache_max_entry_count=setup.cache_share,
            block_size=PAGE_SIZE,
            max_prefill_token_num=max(PREFILL_TOKENS, self.max_active * fixed.block_length),
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
            self.engine = api.engine_module().Engine.from_pretrained(
                str(folder), engine_config=settings, trust_remote_code=False
            )
        give_seeds(self.engine, fixed.block_length)
        self.forwards = Forwards(self.engine)
        self.loop = loop = LoopThread(setup.device)
        loop.run(_call(self.engine.start_loop))
        atexit.register(self.close)

    @property
    def max_active(self) -> int:
        """Most sequences that run at once."""
        return self.size.max_active

    @property
    def closed(self) -> bool:
        """Whether the engine has ended."""
        return self.loop is None

    def close(self) -> None:
        """End the engine and give its memory back; a second call does nothing."""
        atexit.unregister(self.close)
        loop, self.loop = self.loop, None
        if loop is not None:
            try:
                loop.run(_close(self.engine), PATIENCE)
            except Exception as error:
                logger.warning("LMDeploy did not end: %s: %s", type(error).__name__, error)
            loop.close()
        # An engine ends its worker processes itself; an engine that failed to start does not.
        end_processes(self._workers, PATIENCE if loop is not None else 0.0)
        self._workers = []
        with contextlib.suppress(AttributeError):  # there is none if the start failed
            del self.engine
        return_memory()

    @property
    def lost(self) -> bool:
        """Whether a worker process has ended: the engine would wait for its answer for ever."""
        return not all(worker.is_alive() for worker in self._workers)

    def check_workers(self) -> None:
        """Check that all worker processes run.

        Raises:
            EngineError: one has ended.
        """
        if self.lost:
            end_processes(self._workers, 0.0)  # the other processes wait for the lost one
            raise EngineError(
                "a worker process of LMDeploy ended; its messages or the system's log may say why. Finished answers "
                "are kept (--use_cache)."
            )

    def check_room(self, requests: Sequence[GenerationRequest]) -> None:
        """Refuse requests that are longer than there are pages for.

        Raises:
            UserError: some request is.
        """
        check_lengths(requests, self.engine.max_session_len, "LMDeploy has room for")

    def at_once(self, requests: Sequence[GenerationRequest]) -> int:
        """How many of the requests run at once: so many that all have pages to their end, and none is evicted."""
        config = self.engine.cache_config
        free = config.num_gpu_blocks - 1  # LMDeploy keeps one page for itself
        largest = sorted((-(-request.longest // config.block_size) + 2 for request in requests), reverse=True)
        fit = sum(total <= free for total in itertools.accumulate(largest))
        return max(1, min(self.max_active, len(requests), fit))


def wanted_active(setup: Setup, fixed: Fixed, number: int) -> int:
    """How many sequences at once to make the engine for, of `number` requests: a power of 2, or the most possible."""
    _, total = torch.cuda.mem_get_info(setup.device)
    logits = fixed.block_length * setup.checkpoint.vocabulary * BYTES_PER_LOGIT
    most = max(1, min(setup.max_active or MAX_ACTIVE, int(LOGITS_SHARE * total / logits)))
    return min(most, 1 << (number - 1).bit_length())


async def _call(function: Callable[[], object]) -> None:
    function()


async def _close(engine: api.Engine) -> None:
    """End an engine, in its own event loop, and wait until its memory is free."""
    engine.close()
    with contextlib.suppress(asyncio.CancelledError):
        await engine.wait_tasks()
