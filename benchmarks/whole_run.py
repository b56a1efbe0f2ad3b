"""Times of a native engine's run, by part: start, prefill, generation after short and long contexts, all of GSM8K.

    python benchmarks/whole_run.py                                                 # the demo checkpoint
    python benchmarks/whole_run.py --pretrained FOLDER --random-weights --gsm8k FOLDER --sections prefill contexts

One process loads the weights once and runs the sections. `torchrun --nproc_per_node 2` runs the section gsm8k on two
GPUs, with an equal share of the questions in each process. `throughput.py` has the speed against the number of
sequences. Sections:

start     Seconds to the first token of a first request through the harness, by part. "Imports" counts from the start
          of the process (on Linux) to this script's first line of work: torch, transformers, lm_eval and this package.
          A reading of the weight files comes before the loading, and counts by itself; weights that --random-weights
          drew are in memory by then. The total does not contain the reading. Triton does not compile kernels again
          that its cache on disk has.
prefill   Prompt tokens per second: distinct prompts of random tokens, and one block of each answer in one step, whose
          time counts too. The next column has the speed of a chunk's matrix products alone (floor.py).
contexts  Tokens per second and milliseconds of a denoising step after prompts of a length, one token a step. The
          prompts are distinct: with shared prompts all sequences read the same few keys and values, from the GPU's L2
          cache. The time has no prefill in it. It begins with the answer to a short request, which the engine admits
          last, and ends with the answer to the last long request; the other long requests have enough new tokens to
          run throughout. The number of steps in this time is exact to one step. The step that denoises a block first
          also stores the keys and values of the block before.
gsm8k     All questions once through the harness, in the chat template, with exactly --answer-tokens new tokens each,
          two tokens a step. New questions take the slots that become free. There is no warm-up: the engine captures
          graphs on the way. Several processes begin together, and the slowest process's seconds count.

Prefill and contexts run twice, and the second run counts. The last line is JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from common import folder, instance, load_questions, make_model, parser_of, positive_int, sampling
from floor import Floor

from sdar_lm_eval import Checkpoint
from sdar_lm_eval.decoding import DecodingConfig
from sdar_lm_eval.engines.adapters.installed import version_of
from sdar_lm_eval.engines.native.engine import PREFILL_CHUNK
from sdar_lm_eval.engines.native.options import resolve_device
from sdar_lm_eval.engines.types import GenerationRequest
from sdar_lm_eval.report.machine import cpu_name

COUNTED = ("new_tokens", "denoising_forwards", "prompt_tokens")  # of `lm.counts`
SECTIONS = ("start", "prefill", "contexts", "gsm8k")
SIZES: dict[str, dict[str, Any]] = {
    "cpu": {
        "prefill": [100, 500, 2_000],
        "prefill_tokens": 8_000,
        "contexts": [100, 500, 1_000],
        "sequences": 8,
        "context_tokens": 8_000,
        "new_tokens": 64,
        "questions": 32,
        "answer_tokens": 64,
    },
    "cuda": {
        "prefill": [100, 500, 2_000, 8_000],
        "prefill_tokens": 96_000,
        "contexts": [100, 500, 1_000, 2_000, 4_000, 8_000],
        "sequences": 64,
        "context_tokens": 256_000,
        "new_tokens": 64,
        "questions": None,
        "answer_tokens": 512,
    },
}


def main() -> None:
    imports = seconds_of_process()
    parser = parser_of(__doc__)
    parser.add_argument("--sections", nargs="+", default=list(SECTIONS), choices=SECTIONS)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--active", type=positive_int, help="sequences at once; default: the engine's")
    parser.add_argument("--sample", action="store_true", help="draw at temperature 1; default: greedy")
    sizes = parser.add_argument_group("sizes", "defaults are small on the CPU")
    sizes.add_argument("--prefill", type=positive_int, nargs="+", help="tokens of a prompt")
    sizes.add_argument("--prefill-tokens", type=positive_int, help="tokens of all prompts of a row")
    sizes.add_argument("--contexts", type=positive_int, nargs="+", help="tokens of a prompt")
    sizes.add_argument("--sequences", type=positive_int, help="contexts: sequences at once")
    sizes.add_argument("--context-tokens", type=positive_int, help="contexts: most tokens of all prompts of a row")
    sizes.add_argument("--new-tokens", type=positive_int, help="contexts: of each answer")
    sizes.add_argument("--questions", type=positive_int, help="gsm8k: the first so many; default on GPUs: all")
    sizes.add_argument("--answer-tokens", type=positive_int, help="gsm8k: new tokens of each answer")
    args = parser.parse_args()
    if (processes := int(os.environ.get("WORLD_SIZE", 1))) > 1 and args.sections != ["gsm8k"]:
        parser.error(f"{processes} processes run --sections gsm8k alone")
    device = resolve_device(args.device)
    for name, size in SIZES[device.type].items():
        if getattr(args, name) is None:
            setattr(args, name, size)

    clock = Clock()
    torch.zeros(1, device=device)
    on_device = clock.lap()
    with folder(parser, args) as pretrained:
        checkpoint = Checkpoint.open(pretrained)
        clock.lap()  # weights have been drawn
        read = read_all(checkpoint.weight_files())
        reading = clock.lap()
        lm = make_model("native", pretrained, f"device={device},{args.model_args}".rstrip(","), args.active)
        loading = clock.lap()
        questions = load_questions(args.gsm8k)
        found: dict[str, Any] = {}
        if "start" in args.sections:
            parts = {"imports": imports, "device": on_device, "loading the weights": loading}
            found["start"] = start(lm, questions, args, parts, reading, read)
        if "prefill" in args.sections:
            found["prefill"] = list(prefill(lm, checkpoint, args, device))
        if "contexts" in args.sections:
            found["contexts"] = list(contexts(lm, args, device))
        if "gsm8k" in args.sections:
            found["gsm8k"] = whole_gsm8k(lm, questions, args)
        facts = {
            "triton": version_of("triton"),
            "cpu": cpu_name(),
            "threads": torch.get_num_threads(),
            "peak_memory_bytes": lm.engine.peak_memory_bytes(),
        }
        info = lm.get_model_info()["sdar_lm_eval"]
        asked = {name: value for name, value in vars(args).items() if name not in info}
        if lm.ranks.rank == 0:
            print(json.dumps({**info, **facts, **asked, "rows": found}))


def start(
    lm: Any, questions: Any, args: argparse.Namespace, parts: dict[str, float | None], reading: float, read: int
) -> dict[str, Any]:
    clock = Clock()
    for part in ("first token", "first token of a second request"):
        lm.generate_until([instance(0, questions[0], 1, sampling(sample=args.sample))], disable_tqdm=True)
        parts[part] = clock.lap()
    second = parts.pop("first token of a second request")
    assert second is not None
    total = sum(seconds or 0 for seconds in parts.values())
    print("| start | seconds |")
    print("| --- | ---: |")
    for part, seconds in parts.items():
        print(f"| {part} | {'' if seconds is None else f'{seconds:.2f}'} |")
    print(f"| **total** | {total:.2f} |")
    print(f"| besides: reading {read / 1e9:,.2f} GB of weights | {reading:.2f} |")
    print(f"| besides: first token of a second request | {second:.3f} |\n", flush=True)
    return {
        "seconds": {part: None if seconds is None else round(seconds, 3) for part, seconds in parts.items()},
        "total_seconds": round(total, 2),
        "reading_seconds": round(reading, 3),
        "bytes_read": read,
        "second_request_seconds": round(second, 4),
    }


def prefill(
    lm: Any, checkpoint: Checkpoint, args: argparse.Namespace, device: torch.device
) -> Iterator[dict[str, Any]]:
    chunk = PREFILL_CHUNK[device.type]
    products = None if checkpoint.is_moe else chunk / seconds_of_products(checkpoint, device, chunk)
    length = lm.checkpoint.block_length
    decoding = DecodingConfig(length, 1, "low_confidence_static", temperature=float(args.sample))
    rng = random.Random(0)
    print("| tokens a prompt | prompts | prompt tokens/s | seconds | products alone, tokens/s | of them |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: |")
    for tokens in args.prefill:
        size = max(tokens // length, 1) * length
        count = max(args.prefill_tokens // size, 1)
        seconds = 0.0
        for _ in range(2):
            requests = [GenerationRequest(random_tokens(lm, size, rng), 1, decoding) for _ in range(count)]
            clock = Clock()
            for _ in lm.engine.generate(requests):
                pass
            seconds = clock.lap()
        speed = count * size / seconds
        row = {"prompt_tokens": size, "prompts": count, "tokens_per_second": round(speed, 1), "seconds": seconds}
        compared = " | "
        if products is not None:
            row |= {"products_tokens_per_second": round(products, 1), "of_the_products": round(speed / products, 3)}
            compared = f"{products:,.0f} | {speed / products:.2f}"
        print(f"| {size:,} | {count:,} | {speed:,.0f} | {seconds:.2f} | {compared} |", flush=True)
        yield row
    print()


def contexts(lm: Any, args: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    length = lm.checkpoint.block_length
    decoding = DecodingConfig(length, length, "low_confidence_static", temperature=float(args.sample))
    rng = random.Random(0)
    most = min(args.sequences, lm.engine.info.max_active - 1)  # one place is the short request's
    print("| tokens before | sequences | tokens/s | ms a step | seconds |")
    print("| ---: | ---: | ---: | ---: | ---: |")
    for tokens in args.contexts:
        size = max(tokens // length, 1) * length
        count = min(most, max(args.context_tokens // size, 1))
        seconds, steps, made = 0.0, 0, 0.0
        for _ in range(2):
            requests = []
            for i in range(count):
                # A step decides a token at most, and prefills a chunk of the prompts that are not begun yet.
                ahead = -(-(count - 1 - i) * size // PREFILL_CHUNK[device.type]) + 2 * length if i < count - 1 else 0
                requests.append(GenerationRequest(random_tokens(lm, size, rng), args.new_tokens + ahead, decoding))
            requests.append(GenerationRequest(random_tokens(lm, length, rng), length, decoding))  # a block
            seconds, steps, made = generation_alone(lm, requests)
        row = {
            "prompt_tokens": size,
            "sequences": count,
            "tokens_per_second": round(count * made / seconds, 1),
            "ms_per_step": round(1000 * seconds / steps, 3),
            "seconds": round(seconds, 4),
            "steps": steps,
        }
        print(
            f"| {size:,} | {count} | {row['tokens_per_second']:,.0f} | {row['ms_per_step']:.2f} | {seconds:.2f} |",
            flush=True,
        )
        yield row
    print()


def generation_alone(lm: Any, requests: list[GenerationRequest]) -> tuple[float, int, float]:
    """Seconds, steps and new tokens of each sequence, from the last request's answer to that of the last but one."""
    preempted = lm.engine.info.extra["preemptions"]
    short, last = len(requests) - 1, len(requests) - 2
    results, times = {}, {}
    for index, result in lm.engine.generate(requests):
        results[index], times[index] = result, time.perf_counter()
    assert lm.engine.info.extra["preemptions"] == preempted, "KV pages ran out; give a smaller --context-tokens"
    assert next(iter(results)) == short, "a sequence ended before all had begun"
    running = range(last)
    assert all(times[i] >= times[last] - 1e-3 for i in running), "a sequence ended before the time was up"
    steps = results[last].denoising_forwards - results[short].denoising_forwards
    made = len(results[last].token_ids) * steps / results[last].denoising_forwards
    return times[last] - times[short], steps, made


def whole_gsm8k(lm: Any, questions: Any, args: argparse.Namespace) -> dict[str, Any]:
    settings = {
        "remasking_strategy": "low_confidence_static",
        "denoising_steps": max(lm.checkpoint.block_length // 2, 1),
        **sampling(sample=args.sample),
    }
    count = min(args.questions or len(questions), len(questions))
    instances = [instance(i, questions[i], args.answer_tokens, settings) for i in range(count)]
    before, ranks = dataclasses.replace(lm.counts), lm.ranks
    ranks.barrier()
    clock = Clock()
    lm.generate_until(instances[ranks.rank :: ranks.world_size], disable_tqdm=True)
    seconds = clock.lap()
    made = {name: getattr(lm.counts, name) - getattr(before, name) for name in COUNTED}
    of_ranks = ranks.gather_object((seconds, made))
    if of_ranks is None:
        return {}
    seconds = max(each for each, _ in of_ranks)
    tokens, steps, prompt_tokens = (sum(made[name] for _, made in of_ranks) for name in COUNTED)
    assert tokens == count * args.answer_tokens, "an answer ended early"
    row = {
        "questions": count,
        "processes": ranks.world_size,
        "active": min(lm.engine.info.max_active, -(-count // ranks.world_size)),
        "new_tokens": tokens,
        "prompt_tokens": prompt_tokens,
        "seconds": round(seconds, 2),
        "seconds_of_processes": [round(each, 2) for each, _ in of_ranks],
        "tokens_per_second": round(tokens / seconds, 1),
        "tokens_per_step": round(tokens / steps, 3),
    }
    print("| questions | processes | at once | new tokens each | a step | seconds | tokens/s |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    print(
        f"| {count:,} | {ranks.world_size} | {row['active']} | {args.answer_tokens} | {row['tokens_per_step']:.2f} | "
        f"{seconds:.1f} | {row['tokens_per_second']:,.0f} |\n",
        flush=True,
    )
    return row


class Clock:
    """Measures seconds since its start, or since its last lap."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        return seconds


def seconds_of_process() -> float | None:
    """Seconds since this process started; None where the system is not Linux."""
    if not sys.platform.startswith("linux"):
        return None
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])  # proc(5): starttime
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def read_all(paths: list[Path]) -> int:
    """Read files as fast as the disk gives them; return their number of bytes."""
    buffer, total = bytearray(1 << 24), 0
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                total += count
    return total


def seconds_of_products(checkpoint: Checkpoint, device: torch.device, rows: int) -> float:
    """Seconds of all layers' products over `rows` tokens. The products' weights do not stay in memory."""
    seconds, _ = Floor(checkpoint.config, device.type).seconds(rows)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return seconds


def random_tokens(lm: Any, count: int, rng: random.Random) -> tuple[int, ...]:
    """Draw tokens other than the mask."""
    drawn = rng.choices(range(lm.checkpoint.config["vocab_size"] - 1), k=count)
    return tuple(token + (token >= lm.checkpoint.mask_token_id) for token in drawn)


if __name__ == "__main__":
    main()
