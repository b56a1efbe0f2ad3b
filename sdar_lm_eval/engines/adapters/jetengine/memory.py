"""How much memory JetEngine is to take, from the requests that it will run; no tensors.

JetEngine fills a given part of the GPU's memory once: what the weights and a prefill leave of it becomes KV pages. The
logits that it samples from, and its CUDA graphs, come on top.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sdar_lm_eval.engines.adapters.common import Config
from sdar_lm_eval.engines.base import GenerationRequest

PAGE_SIZE = 256  # tokens; the smallest that JetEngine takes
CAPTURED: tuple[int, ...] = (1, 2, 4, 8, *range(16, 257, 16))  # sequences at once for which 0.2.0 has a CUDA graph
LARGEST_GAP = 15  # between two of them
PREFILL_TOKENS = 32768  # of the prompts that begin in one step, unless a single one is longer
# What sampling needs for each logit: bf16, then float32 several times over.
BYTES_PER_LOGIT = 30
LOGITS_SHARE = 0.25  # of the GPU's memory at most
GRAPH_BYTES = 2 << 30
# Through so much memory 0.1.0 hands its other processes, for tensor parallelism, all sequences of a step.
MESSAGE_BYTES = 1 << 20
SLACK_BYTES = 1 << 30
NCCL_BYTES = 1 << 30  # its buffers on each of several GPUs; they are there before JetEngine looks at what is left


@dataclass(frozen=True)
class Size:
    """What JetEngine is made for.

    Attributes:
        block_length: tokens denoised together.
        max_active: sequences at once.
        max_tokens: the longest one's tokens, in whole blocks.
        prefill_tokens: most prompt tokens that begin in one step.
        gpu_memory_utilization: the part of the GPU's memory that it fills.
    """

    block_length: int
    max_active: int
    max_tokens: int
    prefill_tokens: int
    gpu_memory_utilization: float

    def holds(self, other: Size) -> bool:
        """Whether requests of the other size run here too."""
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
    """The memory that requests of one block length need, as far as there is any.

    Args:
        requests: at least one.
        config: config.json with its defaults (`Checkpoint.full_config`).
        weight_bytes: size of the weights on one GPU, or more.
        free_bytes: the GPU's memory that nobody uses now.
        total_bytes: all of it.
        max_active: most sequences at once; None: up to the largest CUDA graph.
        tensor_parallel_size: GPUs that share weights and pages.
        page_a_step: see `pages_of`.
    """
    block_length = requests[0].decoding.block_length
    logits = block_length * config["vocab_size"] * BYTES_PER_LOGIT  # of one sequence
    active = captured(min(len(requests), max_active or CAPTURED[-1], int(LOGITS_SHARE * total_bytes / logits)))
    tokens = sorted((request.longest for request in requests), reverse=True)
    prompts = sorted((len(request.prompt_ids) for request in requests), reverse=True)
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


def pages_of(request: GenerationRequest, page_a_step: bool = False) -> int:
    """Most KV pages that the request takes.

    Args:
        request: its tokens count, and its steps.
        page_a_step: where a block begins with a page, each of its steps takes one more, as in JetEngine 0.1.0
            (`Sequence.num_new_blocks_needed`), though one is enough.
    """
    tokens = request.longest
    pages = -(-tokens // PAGE_SIZE)
    if page_a_step:
        block_length = request.decoding.block_length
        prefilled = len(request.prompt_ids) // block_length * block_length
        beginnings = (tokens - 1) // PAGE_SIZE - (prefilled - 1) // PAGE_SIZE  # pages that begin with a denoised block
        pages += beginnings * request.decoding.steps  # and one step that commits the block
    return pages


def message_bytes(request: GenerationRequest) -> int:
    """Most bytes that a sequence takes in 0.1.0's message to its other processes: pickled token ids, pages, counts."""
    return 5 * (request.longest + pages_of(request, page_a_step=True)) + 300


def bytes_per_page(config: Config, tensor_parallel_size: int = 1) -> int:
    """Bytes of a page on one GPU: keys and values of all layers, 2 bytes each."""
    heads = int(config["num_key_value_heads"]) // tensor_parallel_size
    return 2 * 2 * int(config["num_hidden_layers"]) * PAGE_SIZE * heads * int(config["head_dim"])


def captured(number: int) -> int:
    """The largest number of sequences that has a CUDA graph, up to the given one; at least 1."""
    return max(size for size in CAPTURED if size <= max(number, 1))
