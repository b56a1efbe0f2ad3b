"""Tokens per second of an engine against the number of active sequences.

    python benchmarks/throughput.py [--pretrained demo] [--device cpu] [--active 1 8 32] [--threshold 0.9]

Every prompt is a GSM8K-like question in the checkpoint's chat template and gets exactly --new-tokens new tokens
(nothing stops early), so that runs compare. Counted are returned tokens; the time includes prefill, not loading. The
first row is the floor of batching: one sequence at a time. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

import torch

from sdar_lm_eval import Checkpoint, DecodingConfig, GenerationRequest, make_engine
from sdar_lm_eval.demo import PROBLEMS
from sdar_lm_eval.demo.make import PROMPT


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", default="native")
    parser.add_argument("--pretrained", default="demo")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--active", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--prompts", type=int, default=64, help="prompts of the largest run; smaller ones take fewer")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--strategy", default="low_confidence_static")
    parser.add_argument("--threshold", type=float, default=0.9)
    args = parser.parse_args()

    checkpoint = Checkpoint.open(args.pretrained)
    questions = [json.loads(line) for line in PROBLEMS.read_text().splitlines()]
    prompts = [
        checkpoint.tokenizer.apply_chat_template(
            [{"role": "user", "content": PROMPT.format(**question)}], tokenize=False, add_generation_prompt=True
        )
        for question in questions
    ]
    decoding = DecodingConfig(
        block_length=checkpoint.block_length,
        remasking_strategy=args.strategy,
        confidence_threshold=args.threshold,
        temperature=0,
    )
    requests = [
        GenerationRequest(tuple(checkpoint.tokenizer.encode(text, add_special_tokens=False)), args.new_tokens, decoding)
        for text in prompts
    ]
    rows = []
    print("| active | tokens/s | times one | ms a step | peak memory, MiB |\n| ---: | ---: | ---: | ---: | ---: |")
    for active in args.active:
        engine = make_engine(args.engine, checkpoint, device=args.device, dtype=args.dtype, max_active=active)
        batch = [requests[i % len(requests)] for i in range(min(args.prompts, 4 * active))]
        list(engine.generate(batch[:active]))  # warm-up
        started = time.perf_counter()
        results = [result for _, result in engine.generate(batch)]
        seconds = time.perf_counter() - started
        tokens = sum(len(result.token_ids) for result in results)
        steps = sum(result.denoising_forwards + result.commit_forwards for result in results) / active
        rows.append(
            {
                "active": active,
                "tokens_per_second": round(tokens / seconds, 1),
                "ms_per_step": round(1000 * seconds / steps, 2),
                "peak_memory_bytes": engine.peak_memory_bytes(),
            }
        )
        row = rows[-1]
        ratio = row["tokens_per_second"] / rows[0]["tokens_per_second"]
        memory = row["peak_memory_bytes"] / 2**20
        print(f"| {active} | {row['tokens_per_second']:,.0f} | {ratio:.1f} | {row['ms_per_step']} | {memory:,.0f} |")
    settings = {name: value for name, value in vars(args).items() if name not in engine.info and name != "active"}
    print(json.dumps({**engine.info, "cpu": cpu_name(), "threads": torch.get_num_threads(), **settings, "rows": rows}))


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
