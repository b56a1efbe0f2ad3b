"""What JetEngine needs beside its public arguments: for each version, and for the process that it runs in.

make_ready_…            prepares JetEngine's modules, before its LLM is made
draw_greedily_…         makes a scheduler draw the most probable tokens
sampling_params_…       settings of `SamplingParams` that only this version has, or reads in its own way
torch_defaults_kept     undoes what JetEngine does to torch's defaults
prints_to_log           sends what JetEngine prints to the log
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import io
import logging
from collections.abc import Iterator

import torch

from sdar_lm_eval.engines.adapters.jetengine import api
from sdar_lm_eval.engines.adapters.jetengine.flash_attention import ensure_right_attention
from sdar_lm_eval.engines.types import GenerationRequest
from sdar_lm_eval.families.base import Config

logger = logging.getLogger(__name__)


def tail_of(request: GenerationRequest) -> tuple[int, ...]:
    """The prompt's tokens after its last full block."""
    length = request.decoding.block_length
    return request.prompt_ids[len(request.prompt_ids) // length * length :]


# 0.2.0


def make_ready_020(
    device: torch.device, generator: torch.Generator, config: Config, block_length: int, dtype: torch.dtype
) -> bool:
    """Give 0.2.0 a process group, a random number generator and a flash-attn that is right.

    Returns:
        Whether flash-attn may split a context among thread blocks.
    """
    _give_process_group(device)
    _give_generator(generator)
    return ensure_right_attention(config, block_length, dtype, device)


def _give_process_group(device: torch.device) -> None:
    """Have 0.2.0 run in a process group of this process alone.

    JetEngine's own DistributedManager takes its group from accelerate. Without a launcher, accelerate has no group.
    With a launcher, DistributedManager makes groups together with all other processes, some of which may have no
    request left and never join: it would wait for ever. Each process of ours holds the whole model, so its own group is
    enough.
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

    api.engine_module().DistributedManager = OneProcess


def _give_generator(generator: torch.Generator) -> None:
    """Have 0.2.0 draw tokens from this generator.

    Without a generator, flashinfer makes a new one at each call (0.5.3, sampling.py: get_seed_and_offset): a row of the
    batch would draw by the same random number at every step, whatever the seed.
    """
    scheduler = api.scheduler_module()
    draw = scheduler.top_k_top_p_sampling_from_probs
    scheduler.top_k_top_p_sampling_from_probs = functools.partial(getattr(draw, "func", draw), generator=generator)


def draw_greedily_020(scheduler: api.Scheduler) -> None:
    """Leave the scheduler as it is: in 0.2.0 top_k=1 is greedy."""


def sampling_params_020(request: GenerationRequest, stop_ids: frozenset[int]) -> dict[str, object]:
    """Settings of 0.2.0 alone.

    entropy_bounded has no schedule, but 0.2.0 ends a block after `denoising_steps` steps under it too, with masks left.
    As many steps as the block has tokens always suffice.
    """
    decoding = request.decoding
    params: dict[str, object] = {"eb_threshold": decoding.eb_threshold}
    if decoding.remasking_strategy == "entropy_bounded":
        params["denoising_steps"] = decoding.block_length
    return params


# 0.1.0


def make_ready_010(
    device: torch.device, generator: torch.Generator, config: Config, block_length: int, dtype: torch.dtype
) -> bool:
    """Leave 0.1.0 as it is; return that flash-attn may split a context, since nothing forbids it."""
    return True


def draw_greedily_010(scheduler: api.Scheduler) -> None:
    """Replace the functions by which 0.1.0 makes weights of logits: its own top_k=1 makes every confidence 1."""
    scheduler.sample_pipe = scheduler.sample_pipe_topk0 = _greedy_weights


def _greedy_weights(logits: torch.Tensor, **_: object) -> torch.Tensor:
    """Weights (N, V) from logits (N, V): the most probable token has its probability, all others have 0.

    0.1.0 draws by these weights and takes the drawn token's weight for its confidence. So decoding is greedy, and
    confidences are probabilities at temperature 1.
    """
    probability, token = logits.float().softmax(-1).max(-1, keepdim=True)
    return torch.zeros_like(logits, dtype=torch.float32).scatter_(-1, token, probability)


def sampling_params_010(request: GenerationRequest, stop_ids: frozenset[int]) -> dict[str, object]:
    """Settings of 0.1.0 alone.

    0.1.0 looks for stop tokens in the whole first block, the prompt's last tokens included, and would end the answer at
    once. Where these tokens hold a stop token, the sequence runs to its limit, and the adapter cuts the answer.
    """
    return {} if stop_ids.isdisjoint(tail_of(request)) else {"ignore_eos": True}


# The process


@contextlib.contextmanager
def torch_defaults_kept() -> Iterator[None]:
    """Undo JetEngine's changes of torch's defaults: a default device, even the CPU, slows every call of torch down."""
    dtype = torch.get_default_dtype()
    try:
        yield
    finally:
        unset_default_device()
        torch.set_default_dtype(dtype)


def unset_default_device() -> None:
    """Return torch to the state in which nobody has set a default device."""
    torch.set_default_device(None)
    # torch 2.6 keeps a context that is None, and get_default_device(), which transformers calls, then raises.
    context = getattr(torch, "_GLOBAL_DEVICE_CONTEXT", None)
    if context is not None and getattr(context, "device_context", ...) is None:
        del context.device_context


class _Log(io.TextIOBase):
    def write(self, text: str) -> int:
        for line in text.splitlines():
            if line.strip():
                logger.debug("JetEngine: %s", line.strip())
        return len(text)


@contextlib.contextmanager
def prints_to_log() -> Iterator[None]:
    """Send what JetEngine prints to the log, at level DEBUG: lm_eval's own output stays as it is."""
    with contextlib.redirect_stdout(_Log()):
        yield
