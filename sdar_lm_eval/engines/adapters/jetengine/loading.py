"""JetEngine's LLM in memory: made with room for the requests to come, and ended."""

from __future__ import annotations

import atexit
import dataclasses
import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess

import torch

from sdar_lm_eval.checkpoint import Checkpoint
from sdar_lm_eval.engines.adapters.config import check_same_mask_token, register_configs
from sdar_lm_eval.engines.adapters.jetengine import api
from sdar_lm_eval.engines.adapters.jetengine.config import SDARConfig, SDARMoeConfig, config_for_jetengine
from sdar_lm_eval.engines.adapters.jetengine.hooks import prints_to_log, torch_defaults_kept
from sdar_lm_eval.engines.adapters.jetengine.memory import (
    MESSAGE_BYTES,
    PAGE_SIZE,
    Size,
    bytes_per_page,
    captured,
    message_bytes,
    pages_of,
    size_for,
)
from sdar_lm_eval.engines.adapters.jetengine.versions import Dialect
from sdar_lm_eval.engines.adapters.processes import end_processes, processes_started, return_memory
from sdar_lm_eval.engines.runs import is_out_of_memory
from sdar_lm_eval.engines.types import GenerationRequest
from sdar_lm_eval.errors import EngineError, SDARError, UserError
from sdar_lm_eval.families.base import Config

logger = logging.getLogger(__name__)

PATIENCE = 60.0  # seconds for worker processes to end
SPARE_BYTES = 256 << 20  # by which free memory may differ among GPUs that share a model


@dataclass(frozen=True)
class Setup:
    """What the adapter was opened with.

    Attributes:
        dialect: the installed JetEngine.
        checkpoint: the opened checkpoint.
        config: the checkpoint's config.json with defaults.
        device: a GPU.
        dtype: "bfloat16" or "float16".
        max_active: most sequences at once; None: the user gave no number.
        gpu_memory_utilization: the part of the GPU's memory to fill; None: the user gave none.
        tensor_parallel_size: GPUs that share the weights.
        graphs: whether steps run as CUDA graphs.
    """

    dialect: Dialect
    checkpoint: Checkpoint
    config: Config
    device: torch.device
    dtype: str
    max_active: int | None
    gpu_memory_utilization: float | None
    tensor_parallel_size: int
    graphs: bool


class Loaded:
    """JetEngine's LLM with the weights, and all the memory that it will ever take.

    Args:
        setup: the settings that opened the adapter.
        jetengine: the package.
        generator: the generator from which version 0.2.0 draws tokens.
        size: the limits for which JetEngine is made.

    Attributes:
        llm: JetEngine's LLM, until it is closed.
        closed: whether it has ended.
        workers: JetEngine's worker processes.
        may_split: whether flash-attn may split a context among thread blocks.

    Raises:
        UserError: the memory does not hold the model.
        EngineError: JetEngine did not start, or took another mask token.
    """

    llm: api.Engine

    def __init__(self, setup: Setup, jetengine: api.Package, generator: torch.Generator, size: Size) -> None:
        self.setup, self.jetengine, self.generator, self.size = setup, jetengine, generator, size
        self.closed, self.may_split = True, True
        self.workers: list[BaseProcess] = []
        used = used_bytes(setup)
        try:
            with processes_started() as self.workers:
                self.llm = self._open()
            self.closed = False
        except SDARError:
            raise
        except AssertionError as error:  # JetEngine asserts that a page is left
            raise UserError(self._does_not_fit("no memory is left for keys and values")) from error
        except Exception as error:
            if is_out_of_memory(error):
                raise UserError(self._does_not_fit(str(error))) from error
            message = f"JetEngine {setup.dialect.version} did not start: {type(error).__name__}: {error}"
            if "address already in use" in message and not setup.dialect.several_processes:
                message += ". One run of it fits a machine at a time, since all take the same port: wait for the other."
            raise EngineError(message) from error
        finally:
            if self.closed:
                end_processes(self.workers, 0.0)
        if setup.tensor_parallel_size > 1:
            # Each process makes as many pages as its own GPU has room for, but this process hands out page numbers for
            # all of them: the GPU with the least free memory decides.
            difference = max(used) - used[0] + SPARE_BYTES
            pages = -(-difference // bytes_per_page(setup.config, setup.tensor_parallel_size))
            self.llm.config.num_kvcache_blocks = max(self.pages - pages, 0)
        try:
            check_same_mask_token("JetEngine", self.llm.config.mask_token_id, setup.checkpoint)
        except EngineError:
            self.close()
            raise
        # JetEngine drops all of a prompt up to a pad token (0.2.0), and stops at the end-of-text token unasked (0.1.0),
        # unless its tokenizer has neither.
        self.llm.tokenizer.pad_token = self.llm.tokenizer.eos_token = None

    @property
    def pages(self) -> int:
        """Number of KV pages."""
        return self.llm.config.num_kvcache_blocks

    @property
    def max_active(self) -> int:
        """Most sequences that run at once."""
        return self.size.max_active

    def close(self) -> None:
        """End JetEngine and give its memory back."""
        atexit.unregister(self.llm.exit)
        if all(worker.is_alive() for worker in self.workers):
            self.llm.exit()
        end_processes(self.workers, PATIENCE)
        del self.llm
        self.closed = True
        return_memory()

    def kill(self) -> None:
        """End JetEngine after this process failed in a step: its worker processes wait for this process for ever."""
        end_processes(self.workers, 0.0)
        self.close()

    def _open(self) -> api.Engine:
        setup, size = self.setup, self.size
        register_configs(SDARConfig, SDARMoeConfig)
        options = {
            "block_length": size.block_length,
            "dtype": setup.dtype,
            "enforce_eager": not setup.graphs,
            "gpu_memory_utilization": size.gpu_memory_utilization,
            "kvcache_block_size": PAGE_SIZE,
            "mask_token_id": setup.checkpoint.mask_token_id,
            "max_model_len": size.max_tokens,
            "max_num_batched_tokens": size.prefill_tokens,
            "max_num_seqs": size.max_active,
            "tensor_parallel_size": setup.tensor_parallel_size,
        }
        # 0.1.0 reads the mask token from the tokenizer, 0.2.0 from the options.
        mask_token = setup.checkpoint.tokenizer.convert_ids_to_tokens(setup.checkpoint.mask_token_id)
        config = config_for_jetengine(setup.config, setup.dtype)
        with (
            setup.checkpoint.clean_folder(config, {"mask_token": mask_token}) as folder,
            torch_defaults_kept(),
            prints_to_log(),
        ):
            torch.cuda.set_device(setup.device)
            self.may_split = setup.dialect.make_ready(
                setup.device, self.generator, setup.config, size.block_length, getattr(torch, setup.dtype)
            )
            return self.jetengine.LLM(str(folder), **options)

    def _does_not_fit(self, reason: str) -> str:
        size = self.size
        free, total = torch.cuda.mem_get_info(self.setup.device)
        return (
            f"checkpoint {self.setup.checkpoint.name!r} with {size.max_active} sequences of up to "
            f"{size.max_tokens:,} tokens does not fit into {total / 2**30:.1f} GiB of GPU memory, "
            f"{free / 2**30:.1f} GiB of which are free ({reason}). JetEngine was to fill "
            f"{total * size.gpu_memory_utilization / 2**30:.1f} GiB, what other programs take included "
            f"(gpu_memory_utilization={size.gpu_memory_utilization}): set it higher, or lower max_active, max_gen_toks "
            "or max_length."
        )

    def _pages_of(self, request: GenerationRequest) -> int:
        return pages_of(request, self.setup.dialect.page_a_step)

    def check_room(self, requests: Sequence[GenerationRequest]) -> None:
        """Refuse requests that need more KV pages than there are.

        Raises:
            UserError: some request needs more.
        """
        longest = max(requests, key=self._pages_of)
        if (needed := self._pages_of(longest)) > self.pages:
            mib = bytes_per_page(self.setup.config, self.setup.tensor_parallel_size) / 2**20
            raise UserError(
                f"a request of {longest.longest:,} tokens (prompt and answer) needs {needed} KV pages of "
                f"{PAGE_SIZE} tokens, {needed * mib:,.0f} MiB; JetEngine has {self.pages}, {self.pages * mib:,.0f} "
                f"MiB, at gpu_memory_utilization={self.size.gpu_memory_utilization}. Raise "
                "gpu_memory_utilization, or lower max_gen_toks or max_length."
            )

    def at_once(self, requests: Sequence[GenerationRequest]) -> int:
        """How many of the requests can run at once, whichever they are."""
        most = self.size.max_active
        needs = sorted(map(self._pages_of, requests), reverse=True)
        fitting = sum(sum_ <= self.pages for sum_ in itertools.accumulate(needs))
        if self.setup.tensor_parallel_size > 1:
            sizes = sorted(map(message_bytes, requests), reverse=True)
            fitting = min(fitting, sum(sum_ <= MESSAGE_BYTES for sum_ in itertools.accumulate(sizes)))
        active = captured(min(fitting, most))
        if fitting < min(most, len(requests)):
            logger.warning(
                "%d sequences at once in the place of %d: JetEngine has %d KV pages of %d tokens.",
                active, most, self.pages, PAGE_SIZE,
            )  # fmt: skip
        return active


def used_bytes(setup: Setup) -> list[int]:
    """Memory in use on each GPU that is to share the model."""
    gpus = range(setup.tensor_parallel_size) if setup.tensor_parallel_size > 1 else [setup.device]
    return [total - free for free, total in map(torch.cuda.mem_get_info, gpus)]


def wanted_size(setup: Setup, requests: Sequence[GenerationRequest]) -> Size:
    """What JetEngine has to be made for to run these requests, which have one block length."""
    total = torch.cuda.mem_get_info(setup.device)[1]
    size = size_for(
        requests,
        setup.config,
        weight_bytes=sum(path.stat().st_size for path in setup.checkpoint.weight_files()),
        free_bytes=total - max(used_bytes(setup)),
        total_bytes=total,
        max_active=setup.max_active,
        tensor_parallel_size=setup.tensor_parallel_size,
        page_a_step=setup.dialect.page_a_step,
    )
    if setup.gpu_memory_utilization is not None:
        size = dataclasses.replace(size, gpu_memory_utilization=setup.gpu_memory_utilization)
    return size
