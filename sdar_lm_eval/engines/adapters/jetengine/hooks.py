"""What JetEngine has to be told beside its public arguments: by version, and for the process that it runs in.

make_ready_…            before its LLM is made
draw_greedily_…         a scheduler whose draws are the most probable tokens
sampling_params_…       settings of `SamplingParams` that only this version has, or reads in its own way
torch_defaults_kept, prints_to_log
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import io
import logging
from collections.abc import Iterator
from typing import Any

import torch

from sdar_lm_eval.engines.adapters.common import Config
from sdar_lm_eval.engines.adapters.jetengine.flash_attention import ensure_right_attention
from sdar_lm_eval.engines.base import GenerationRequest

logger = logging.getLogger(__name__)


def tail_of(request: GenerationRequest) -> tuple[int, ...]:
    """The prompt's tokens behind its last full block."""
    length = request.decoding.block_length
    return request.prompt_ids[len(request.prompt_ids) // length * length :]


# 0.2.0


def make_ready_020(
    device: torch.device, generator: torch.Generator, config: Config, block_length: int, dtype: torch.dtype
) -> bool:
    """Give 0.2.0 its process group, its random numbers and a right flash-attn.

    Returns:
        Whether flash-attn may split a context among thread blocks.
    """
    _give_process_group(device)
    _give_generator(generator)
    return ensure_right_attention(config, block_length, dtype, device)


def _give_process_group(device: torch.device) -> None:
    """Have 0.2.0 take this process for the whole of its world.

    Its DistributedManager asks accelerate, which knows of no group where no launcher made one; and where a launcher
    did, it makes groups together with all other processes, at a time when some may have nothing left to do. Each of our
    processes holds the whole model, so a group of its own is all it needs.
    """
    dist = importlib.import_module("torch.distributed")
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        atexit.register(dist.destroy_process_group)
    group = dist.new_group([dist.get_rank()], backend="gloo", use_local_synchronization=True)

    class OneProcess:
        def __init__(self, tensor_parallel_size: int) -> None:
            assert tensor_parallel_size == 1
            self.device = device
            self.tp_size = self.dp_size = 1
            self.tp_rank = self.dp_rank = 0
            self.tp_group = self.dp_group = group

    llm_engine: Any = importlib.import_module("jetengine.engine.llm_engine")
    llm_engine.DistributedManager = OneProcess


def _give_generator(generator: torch.Generator) -> None:
    """Have 0.2.0 draw tokens from this generator.

    flashinfer (0.5.3, sampling.py: get_seed_and_offset) begins a new one at each call where it is given none: at every
    step a row of the batch would draw by the same random number, whatever the seed.
    """
    scheduler: Any = importlib.import_module("jetengine.engine.scheduler")
    draw = scheduler.top_k_top_p_sampling_from_probs
    scheduler.top_k_top_p_sampling_from_probs = functools.partial(getattr(draw, "func", draw), generator=generator)


def draw_greedily_020(scheduler: object) -> None:
    """Nothing is to be done: top_k=1 is greedy."""


def sampling_params_020(request: GenerationRequest, stop_ids: frozenset[int]) -> dict[str, object]:
    """entropy_bounded has no schedule in 0.2.0, but stops after so many steps: a block's length is enough of them."""
    decoding = request.decoding
    params: dict[str, object] = {"eb_threshold": decoding.eb_threshold}
    if decoding.remasking_strategy == "entropy_bounded":
        params["denoising_steps"] = decoding.block_length
    return params


# 0.1.0


def make_ready_010(
    device: torch.device, generator: torch.Generator, config: Config, block_length: int, dtype: torch.dtype
) -> bool:
    """Nothing is to be done; returns that flash-attn may split a context, for nothing keeps it from that."""
    return True


def draw_greedily_010(scheduler: Any) -> None:
    """Replace how 0.1.0 makes weights of logits: its top_k=1 makes every token's confidence 1."""
    scheduler.sample_pipe = scheduler.sample_pipe_topk0 = _greedy_weights


def _greedy_weights(logits: torch.Tensor, **_: object) -> torch.Tensor:
    """Weights (N, V) from logits (N, V), all of it on the most probable token, and as much as its probability is.

    0.1.0 draws by these weights and takes the drawn one for the confidence, so this is greedy decoding with the
    probability at temperature 1.
    """
    probability, token = logits.float().softmax(-1).max(-1, keepdim=True)
    return torch.zeros_like(logits, dtype=torch.float32).scatter_(-1, token, probability)


def sampling_params_010(request: GenerationRequest, stop_ids: frozenset[int]) -> dict[str, object]:
    """0.1.0 takes stop tokens at the end of the prompt for the answer's: better it goes on to the limit."""
    return {} if stop_ids.isdisjoint(tail_of(request)) else {"ignore_eos": True}


# The process


@contextlib.contextmanager
def torch_defaults_kept() -> Iterator[None]:
    """Undo what JetEngine does to torch's defaults: a default device, even the CPU, slows down every call of torch."""
    dtype = torch.get_default_dtype()
    try:
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(dtype)


class _Log(io.TextIOBase):
    def write(self, text: str) -> int:
        for line in text.splitlines():
            if line.strip():
                logger.debug("JetEngine: %s", line.strip())
        return len(text)


@contextlib.contextmanager
def prints_to_log() -> Iterator[None]:
    """What JetEngine prints goes to the log (level DEBUG): lm_eval's own output stays what it is."""
    with contextlib.redirect_stdout(_Log()):
        yield
