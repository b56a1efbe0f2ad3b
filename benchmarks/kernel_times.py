"""Which kernels the native engine chooses on this GPU, and how long the others take.

    python benchmarks/kernel_times.py --pretrained FOLDER --random-weights

The first tables have the times that chose the kernels of matrix products: microseconds of two layers without attention,
by number of rows. The chosen kernel's time is bold.

The last table is about attention, whose kernel and settings are chosen by rules, not by times. The table compares the
chosen kernel with all settings of a grid, and with the kernel for Hopper GPUs where it runs. The tokens are one block
of each sequence, as in a step. The GPU's cache has no room for the keys and values. The last line is JSON.
"""

from __future__ import annotations

import itertools
import json
from typing import Any

import torch
import triton
from common import folder, parser_of, positive_int
from floor import timed

from sdar_lm_eval import Checkpoint, make_engine
from sdar_lm_eval.engines.native.forward.decoder import FusedDecoder
from sdar_lm_eval.engines.native.forward.fused import LONGEST_PAIR
from sdar_lm_eval.engines.native.kernels import attention
from sdar_lm_eval.engines.native.kernels.gluon import hopper_attention

GRID = [(columns, warps) for columns in (32, 64, 128) for warps in (2, 4, 8)]
PAGE = 16
COLD_BYTES = 512 << 20  # together, keys and values that take turns have so many bytes at least


def main() -> None:
    parser = parser_of(__doc__, of_runs=False)
    parser.add_argument("--active", type=positive_int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--context", type=positive_int, nargs="+", default=[512, 2048])
    parser.add_argument("--block-length", type=positive_int, nargs="+", help="default: the checkpoint's")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no GPU here")
    with folder(parser, args) as pretrained, torch.no_grad():
        checkpoint = Checkpoint.open(pretrained)
        engine: Any = make_engine("native", checkpoint, device="cuda")
        products = show_products(engine.runner.forward.decoder)
        print("| block | sequences | context | chosen, us | fastest, us | the fastest | times the fastest |")
        print("| ---: | ---: | ---: | ---: | ---: | --- | ---: |")
        blocks = args.block_length or [checkpoint.block_length]
        rows = [
            show_attention(checkpoint.config, *each) for each in itertools.product(blocks, args.active, args.context)
        ]
    facts = {"pretrained": args.pretrained, "gpu": torch.cuda.get_device_name()}
    print(json.dumps({**facts, "products": products, "rows": rows}))


def show_products(decoder: FusedDecoder) -> dict[str, Any]:
    """Print the measured times of products, and return them: name of a product -> kernel -> rows -> seconds."""
    for name, choice in decoder.choices.items():
        if not choice.times:
            continue
        print(f"{name}, us\n\n| rows | {' | '.join(choice.times)} |\n| ---: |{' ---: |' * len(choice.times)}")
        for rows in sorted(set().union(*choice.times.values())):
            chosen = choice.kernel(rows).name
            cells = [
                ""
                if rows not in times
                else f"**{1e6 * times[rows]:.1f}**"
                if kernel == chosen
                else f"{1e6 * times[rows]:.1f}"
                for kernel, times in choice.times.items()
            ]
            print(f"| {rows:,} | {' | '.join(cells)} |")
        print(flush=True)
    return {name: choice.times for name, choice in decoder.choices.items() if choice.times}


def show_attention(config: dict[str, Any], block: int, active: int, context: int) -> dict[str, Any]:
    """Measure attention of one step, print the table's row, and return the row."""
    heads, kv_heads, size = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    own = -(-context // PAGE)
    copies = -(-COLD_BYTES // (4 * active * own * PAGE * kv_heads * size))
    shape = (active * own + 1, PAGE, kv_heads, size)
    caches = [[torch.randn(shape, device="cuda").bfloat16() for _ in range(2)] for _ in range(copies)]
    pages = (torch.randperm(active * own, device="cuda") + 1).view(active, own)
    number = torch.arange(active, device="cuda")
    query = torch.randn(active * block, heads, size, device="cuda").bfloat16()
    splits = attention.splits_of(attention.padded_context(context), active * kv_heads, attention.LONGEST_SPLIT)
    most = block * (1 + (2 * block <= LONGEST_PAIR))
    visible = torch.full((active * block,), context, device="cuda")
    tiles = attention.Tiles(number * block, torch.full_like(number, block), pages, number, visible, most, *splits)

    def microseconds(kernel: Any) -> float:
        def run() -> None:
            for keys, values in caches:
                kernel.attend(query, keys, values, tiles, size**-0.5)

        return 1e6 * timed(run, "cuda") / copies

    on_hopper = hopper_attention is not None and hopper_attention.runs(heads, caches[0][0][:1])
    suits = on_hopper and hopper_attention.suits(tiles, heads, kv_heads)
    chosen = microseconds(hopper_attention if suits else attention)
    times = {"the Hopper kernel": microseconds(hopper_attention)} if on_hopper else {}
    rules = attention.attention_settings
    for columns, warps in GRID:
        attention.attention_settings = lambda *_, setting=(columns, warps, 3): iter([setting])  # type: ignore[assignment, misc]
        try:
            times[f"{columns} columns, {warps} warps"] = microseconds(attention)
        except triton.OutOfResources:
            continue
        finally:
            attention.attention_settings = rules
    fastest = min(times, key=times.__getitem__)
    print(
        f"| {block} | {active} | {context:,} | {chosen:.1f} | {times[fastest]:.1f} | {fastest} | "
        f"{chosen / times[fastest]:.2f} |",
        flush=True,
    )
    return {"block": block, "active": active, "context": context, "chosen_us": chosen, "us": times}


if __name__ == "__main__":
    main()
