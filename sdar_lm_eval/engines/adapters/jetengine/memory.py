"""Memory that JetEngine takes for the requests that it will run; no tensors.

At its start JetEngine fills a given part of the GPU's memory: what the weights and a prefill leave of that part becomes
KV pages. Logits and CUDA graphs take memory beyond that part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sdar_lm_eval.engines.types import GenerationRequest
from sdar_lm_eval.families.base import Config

PAGE_SIZE = 256  # tokens; the smallest that JetEngine takes
CAPTURED: tuple[int, ...] = (1, 2, 4, 8, *range(16, 257, 16))  # sequences at once for which there is a CUDA graph
LARGEST_GAP = 15  # between two numbers of CAPTURED
PREFILL_TOKENS = 32768  # most prompt tokens that begin in one step, unless a single prompt is longer
# Sampling holds each logit in bf16, and in float32 several times over.
BYTES_PER_LOGIT = 30
LOGITS_SHARE = 0.25  # most of the GPU's memory that logits may take
GRAPH_BYTES = 2 << 30
# In tensor parallelism, one process sends the others all sequences of a step through shared memory of this size.
MESSAGE_BYTES = 1 << 20
SLACK_BYTES = 1 << 30
NCCL_BYTES = 1 << 30  # NCCL's buffers on each of several GPUs; NCCL takes them before JetEngine counts free memory


@dataclass(frozen=True)
class Size:
    """What JetEngine is made for.

    Attributes:
        block_length: tokens denoised together.
        max_active: most sequences at once.
        max_tokens: most tokens of a sequence, prompt and answer, in whole blocks.
        prefill_tokens: most prompt tokens that begin in one step.
        gpu_memory_utilization: the part of the GPU's memory that JetEngine fills.
    """

    block_length: int
    max_active: int
    max_tokens: int
    prefill_tokens: int
    gpu_memory_utilization: float

    def holds(self, other: Size) -> bool:
        """Whether requests of the other size fit this one too."""
        return (
            self.block_length == other.block_length
            and self.max_active >= other.max_active
            and self.max_tokens >= other.max_tokens
            and self.prefill_tokens >= other.prefill_tokens
        )


def size_for(
    requests: Sequence[GenerationRequest],
    config: Config,
    *,
    weight_bytes: int,
    free_bytes: int,
    total_bytes: int,
    max_active: int | None,
    tensor_parallel_size: int = 1,
    page_a_step: bool = False,
) -> Size:
    """The memory that requests of one block length need, or what there is of it.

    Args:
        requests: at least one.
        config: config.json with its defaults (`Checkpoint.full_config`).
        weight_bytes: at least the size of the weights on one GPU.
        free_bytes: the GPU's memory that is free now.
        total_bytes: all of the GPU's memory.
        max_active: most sequences at once; None: up to the largest CUDA graph.
        tensor_parallel_size: GPUs that share weights and pages.
        page_a_step: see `pages_of`.
    """
    block_length = requests[0].decoding.block_length
    logits = block_length * config["vocab_size"] * BYTES_PER_LOGIT  # of one sequence
    active = captured(min(len(requests), max_active or CAPTURED[-1], int(LOGITS_SHARE * total_bytes / logits)))
    tokens = sorted((request.longest for request in requests), reverse=True)
    prompts = sorted(map(prompt_tokens_of, requests), reverse=True)
    prefill_tokens = max(tokens[0], min(PREFILL_TOKENS, sum(prompts[:active])))
    heads = config["num_attention_heads"] + 2 * config["num_key_value_heads"]
    width = 4 * config["hidden_size"] + 3 * config["intermediate_size"] + 3 * heads * config["head_dim"]
    wanted = (
        total_bytes
        - free_bytes
        + weight_bytes
        + 3 * prefill_tokens * width  # 2 bytes each, and half as much again for what is not counted
        + (sum(sorted(pages_of(request, page_a_step) for request in requests)[-active:]) + LARGEST_GAP)
        * bytes_per_page(config, tensor_parallel_size)
        + SLACK_BYTES
        + NCCL_BYTES * (tensor_parallel_size > 1)
    )
    allowed = total_bytes - active * logits - GRAPH_BYTES
    return Size(
        block_length=block_length,
        max_active=active,
        max_tokens=tokens[0],
        prefill_tokens=prefill_tokens,
        gpu_memory_utilization=round(min(wanted, allowed) / total_bytes, 4),
    )


def prompt_tokens_of(request: GenerationRequest) -> int:
    """Most tokens that a part of a request begins with: its prompt, and the thought that a limit closes."""
    tokens, thinking = len(request.prompt_ids), request.thinking
    if thinking is None or thinking.max_tokens is None:
        return tokens
    return tokens + min(thinking.max_tokens + len(thinking.end_ids), request.max_new_tokens)


def pages_of(request: GenerationRequest, page_a_step: bool = False) -> int:
    """Most KV pages that a request takes.

    Args:
        request: the request.
        page_a_step: whether each step of a block that begins with a page takes another page, though one is enough
            (JetEngine 0.1.0: `Sequence.num_new_blocks_needed`).
    """
    tokens = request.longest
    pages = -(-tokens // PAGE_SIZE)
    if page_a_step:
        block_length = request.decoding.block_length
        prefilled = len(request.prompt_ids) // block_length * block_length
        beginnings = (tokens - 1) // PAGE_SIZE - (prefilled - 1) // PAGE_SIZE  # pages that begin with a denoised block
        pages += beginnings * request.decoding.steps  # `pages` already has the commit's
    return pages


def message_bytes(request: GenerationRequest) -> int:
    """Most bytes that a sequence takes in a step's message to the other processes: pickled token ids, pages, counts."""
    return 5 * (request.longest + pages_of(request, page_a_step=True)) + 300


def bytes_per_page(config: Config, tensor_parallel_size: int = 1) -> int:
    """Bytes of a page on one GPU: keys and values of all layers, 2 bytes each."""
    heads = int(config["num_key_value_heads"]) // tensor_parallel_size
    return 2 * 2 * int(config["num_hidden_layers"]) * PAGE_SIZE * heads * int(config["head_dim"])


def captured(number: int) -> int:
    """The largest number of sequences, up to the given one, that has a CUDA graph; at least 1."""
    return max(size for size in CAPTURED if size <= max(number, 1))
