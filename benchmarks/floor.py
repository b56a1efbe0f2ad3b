"""Time of a model's matrix products alone, for one forward: the floor below an engine's time.

    python benchmarks/floor.py --pretrained FOLDER --active 1 64 256     # FOLDER needs no weights

For each number of active sequences, the table has the milliseconds of all layers' projections and of the LM head, over
one block of each sequence. It also has the tokens per second that follow: a block of L tokens takes L denoising
forwards (one token a step) or 1 (a block a step), and one more forward, without the LM head, to store the block's keys
and values. Attention, norms, drawing and Python count as nothing. An engine that draws at masked positions only, and
that shares forwards, needs a few percent less than this time. On a GPU the products run as a CUDA graph.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from common import positive_int
from torch.nn.functional import linear

from sdar_lm_eval import Checkpoint, UserError


class Floor:
    """Times a model's products, with random weights of its shape.

    No library's product of experts comes near a GPU's limit at all numbers of rows. So the experts' time is computed,
    not measured. Even routing hits a share of the experts. Their time is the longer of two: reading the hit experts'
    weights at the rate of a copy, and multiplying the rows at the rate of a large product.

    Args:
        config: the checkpoint's config.json.
        device: "cpu" (in float32) or "cuda" (in bfloat16).
    """

    def __init__(self, config: dict[str, Any], device: str) -> None:
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        hidden, size = config["hidden_size"], config["head_dim"]
        heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self._experts, self._top = config.get("num_experts", 0), config.get("num_experts_per_tok", 0)
        width = config["moe_intermediate_size"] if self._experts else config["intermediate_size"]
        each = (self._experts,) if self._experts else ()
        shapes = [
            ((heads + 2 * kv_heads) * size, hidden),
            (hidden, heads * size),
            (*each, 2 * width, hidden),
            (*each, hidden, width),
        ]

        def matrix(shape: tuple[int, ...]) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device).normal_(0, 0.02)

        self._layers = [[matrix(shape) for shape in shapes] for _ in range(config["num_hidden_layers"])]
        self._heads_size = heads * size
        self._bytes_per_token = 2 * kv_heads * size * len(self._layers) * dtype.itemsize
        self._head = matrix((config["vocab_size"], hidden))
        self._device = device

    @functools.cache  # noqa: B019  (one Floor lives as long as its process)
    def seconds(self, rows: int) -> tuple[float, float]:
        """Seconds of the layers' products and of the LM head's product, over `rows` tokens."""
        inputs = self._inputs(rows)
        plain = [matrix for layer in self._layers for matrix in layer if matrix.dim() == 2]

        def layers() -> None:
            for matrix in plain:
                linear(inputs[matrix.shape[1]], matrix)

        products = timed(layers, self._device) + self._seconds_of_experts(rows)
        return products, timed(lambda: linear(inputs[self._head.shape[1]], self._head), self._device)

    def seconds_of_context(self, tokens: float) -> float:
        """Seconds that a copy takes to move all layers' keys and values of `tokens` tokens."""
        return tokens * self._bytes_per_token / self._rates()[0]

    def seconds_of_prompts(self, count: int, tokens: float, context: float) -> float:
        """Seconds of a prefill: the layers' products, and attention at the rate of a large product.

        Args:
            count: number of prompts.
            tokens: number of tokens of each prompt that are not stored yet.
            context: number of tokens of each prompt.
        """
        seen = tokens * (context - tokens / 2)
        attention = 4 * self._heads_size * seen * len(self._layers) / self._rates()[1]
        rows = 8192 if self._device == "cuda" else 128
        return count * (tokens * self.seconds(rows)[0] / rows + attention)

    def _seconds_of_experts(self, rows: int) -> float:
        """Computed seconds of all layers' experts."""
        weights = [matrix for layer in self._layers for matrix in layer if matrix.dim() == 3]
        if not weights:
            return 0.0
        bytes_per_second, operations_per_second = self._rates()
        hit = 1 - (1 - self._top / self._experts) ** rows
        reading = hit * sum(matrix.nbytes for matrix in weights) / bytes_per_second
        operations = 2 * rows * self._top * sum(matrix[0].numel() for matrix in weights)
        return max(reading, operations / operations_per_second)

    @functools.cache  # noqa: B019  (one Floor lives as long as its process)
    def _rates(self) -> tuple[float, float]:
        """Bytes per second of a copy, and operations per second of a large product."""
        size = 8192 if self._device == "cuda" else 512
        square = torch.randn(size, size, device=self._device).to(self._head.dtype)
        source = self._layers[0][2]
        target = torch.empty_like(source)
        copying = timed(lambda: target.copy_(source), self._device)
        multiplying = timed(lambda: linear(square, square), self._device)
        return 2 * source.nbytes / copying, 2 * size**3 / multiplying

    def _inputs(self, rows: int) -> dict[int, torch.Tensor]:
        """Width -> `rows` random rows, for each width that a matrix takes."""
        widths = {matrix.shape[-1] for matrix in (*self._layers[0], self._head)}
        return {width: torch.randn(rows, width, device=self._device).to(self._head.dtype) for width in sorted(widths)}


def timed(run: Callable[[], Any], device: str, repeats: int = 11) -> float:
    """Median seconds of several runs; on a GPU, runs of a CUDA graph."""
    run()
    if device == "cpu":
        times = []
        for _ in range(3):
            started = time.perf_counter()
            run()
            times.append(time.perf_counter() - started)
        return statistics.median(times)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1000)
    return statistics.median(times)


def tokens_per_second(
    products: tuple[float, float], tokens: float, denoising_forwards: float, commit_forwards: float
) -> float:
    """Tokens per second where forwards take only the time of their products (`Floor.seconds`)."""
    layers, head = products
    return tokens / (denoising_forwards * (layers + head) + commit_forwards * layers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained", default="demo")
    parser.add_argument("--active", type=positive_int, nargs="+", default=[1, 4, 16, 32, 64, 128, 256])
    parser.add_argument("--block-length", type=positive_int, help="default: the checkpoint's")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    args = parser.parse_args()

    try:
        checkpoint = Checkpoint.open(args.pretrained)
    except UserError as error:
        parser.error(str(error))
    block = args.block_length or checkpoint.block_length
    floor = Floor(checkpoint.config, args.device)
    rows = []
    print("| active | layers, ms | LM head, ms | one token a step, tokens/s | a block a step, tokens/s |")
    print("| ---: | ---: | ---: | ---: | ---: |")
    for active in args.active:
        layers, head = products = floor.seconds(active * block)
        slow, fast = (tokens_per_second(products, active * block, steps, 1) for steps in (block, 1))
        rows.append({"active": active, "layers_ms": 1000 * layers, "head_ms": 1000 * head, "tokens": [slow, fast]})
        print(f"| {active} | {1000 * layers:.2f} | {1000 * head:.2f} | {slow:,.0f} | {fast:,.0f} |", flush=True)
    gpu = {"gpu": torch.cuda.get_device_name()} if args.device == "cuda" else {}
    print(json.dumps({"pretrained": args.pretrained, "torch": torch.__version__, **gpu, "block": block, "rows": rows}))


if __name__ == "__main__":
    main()
