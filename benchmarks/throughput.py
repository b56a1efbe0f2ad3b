"""Tokens per second against the number of active sequences, from the harness's request to the text.

    python benchmarks/throughput.py                                                # the demo checkpoint, native engine
    python benchmarks/throughput.py --engine jetengine --pretrained FOLDER --random-weights --gsm8k FOLDER \\
        --active 128 256 --new-tokens 256 --strategy low_confidence_dynamic --threshold 0.9 --sample

`--active N` sequences run at once, and each gets exactly `--new-tokens` new tokens (nothing stops early), so that runs
compare. A run is one `generate_until` of the registered model, with chat template, tokenizing and detokenizing, without
loading. Only returned tokens count. With random weights no confidence comes near 0.9, so threshold 0.9 unmasks one
token a step, and threshold 0 a block a step. A step is a forward of a sequence; two blocks of a sequence that share a
forward count as two steps.

`--shared-prefix N` puts the same N tokens in front of each question, as few-shot tasks do. A run with `--model-args
share_prefixes=false` shows the speed without the sharing.

On several GPUs, each with a copy of the model, start the script by `torchrun --nproc_per_node 2` or `accelerate launch
--multi_gpu`. `--active` and `--prompts` then count for each process, and the processes take questions in turn. All
processes begin a row together, and a row has all processes' tokens over the slowest process's time. Compare one process
at `--active 256` with two processes at 256 each (twice the work) and at 128 each (the same work). With `--model-args
tensor_parallel_size=2` one process's GPUs share one copy. The last line is JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import time
from typing import Any

import torch
from common import folder, instance, load_questions, make_model, parser_of, positive_int, sampling
from floor import Floor, tokens_per_second
from lm_eval.api.instance import Instance

from sdar_lm_eval import Checkpoint
from sdar_lm_eval.engines.registry import ENGINES
from sdar_lm_eval.report.counts import Counts
from sdar_lm_eval.report.machine import cpu_name

WARM_UP = 32  # new tokens of a row's run that does not count: kernels are compiled in it, and CUDA graphs captured


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--engine", default="native", choices=ENGINES)
    parser.add_argument("--active", type=positive_int, nargs="+", default=[1, 4, 16, 32, 64])
    parser.add_argument("--prompts", type=positive_int, default=64, help="least prompts of a row, --active a round")
    parser.add_argument("--new-tokens", type=positive_int, default=64)
    parser.add_argument("--shared-prefix", type=int, default=0, help="tokens in front of each question, the same ones")
    parser.add_argument("--strategy", default="low_confidence_static")
    parser.add_argument("--threshold", type=float, default=0.9)
    parser.add_argument("--sample", action="store_true", help="draw at temperature 1; default: greedy")
    parser.add_argument("--floor", action="store_true", help="beside what the matrix products alone allow (floor.py)")
    args = parser.parse_args()

    with folder(parser, args) as pretrained:
        floors = time_products(args, pretrained) if args.floor else {}
        lm = make_model(args.engine, pretrained, args.model_args, max(args.active))
        questions = load_questions(args.gsm8k)
        front = examples(questions, args.shared_prefix, lm.tokenizer) if args.shared_prefix else ""
        settings = {
            "remasking_strategy": args.strategy,
            "confidence_threshold": args.threshold,
            **sampling(sample=args.sample),
        }

        ranks = lm.ranks

        def of(new_tokens: int) -> list[Instance]:
            made = [instance(i, doc, new_tokens, settings, front) for i, doc in enumerate(questions)]
            return made[ranks.rank :: ranks.world_size]

        instances, warm_up = of(args.new_tokens), of(min(WARM_UP, args.new_tokens))
        largest = cycled(instances, max(args.active), 0)
        lm.engine.prepare([job.request for job in lm.jobs.of(largest, lm.evaluation.task_of, 0).jobs.values()])

        rows = []
        say = print if ranks.rank == 0 else lambda *_, **__: None
        say("| active | tokens/s | times first | ms a step | peak memory, MiB |" + " of the floor |" * args.floor)
        say("| ---: | ---: | ---: | ---: | ---: |" + " ---: |" * args.floor)
        for active in args.active:
            lm.generate_until(cycled(warm_up, active, 0), disable_tqdm=True)
            ranks.barrier()
            before = dataclasses.replace(lm.counts)
            started = time.perf_counter()
            for turn in range(-(-args.prompts // active)):
                lm.generate_until(cycled(instances, active, turn), disable_tqdm=True)
            seconds = time.perf_counter() - started
            own = row(active, before, lm.counts, seconds, args.new_tokens, floors.get(active))
            of_ranks = ranks.gather_object(own)
            if of_ranks is None:
                continue
            rows.append(together(of_ranks))
            say(
                f"| {active} | {rows[-1]['tokens_per_second']:,.0f} "
                f"| {rows[-1]['tokens_per_second'] / rows[0]['tokens_per_second']:.1f} | {rows[-1]['ms_per_step']} "
                f"| {rows[-1]['peak_memory_bytes'] / 2**20:,.0f} |"
                + (f" {rows[-1]['of_the_floor']:.2f} |" if args.floor else ""),
                flush=True,
            )
    info = lm.get_model_info()["sdar_lm_eval"]
    asked = {name: value for name, value in vars(args).items() if name not in info and name != "active"}
    machine = {"processes": ranks.world_size, "cpu": cpu_name(), "threads": torch.get_num_threads()}
    say(json.dumps({**info, **machine, **asked, "rows": rows}))


def examples(docs: Any, tokens: int, tokenizer: Any) -> str:
    """The text of worked problems, the last problem first, cut to `tokens` tokens."""
    ids: list[int] = []
    for doc in itertools.cycle(list(docs)[::-1]):
        if len(ids) >= tokens:
            return str(tokenizer.decode(ids[:tokens]))
        ids += tokenizer.encode(f"{doc['question']}\n{doc['answer']}\n\n", add_special_tokens=False)
    raise ValueError("no problems")


def front(questions: Any, number: int, tokens: int, tokenizer: Any) -> str:
    """The text of worked problems, cut to `tokens` tokens. Each number has other problems."""
    begin = 31 * number
    own = [questions[(begin + i) % len(questions)] for i in range(len(questions))]
    return examples(own, tokens, tokenizer) if tokens else ""


def cycled(instances: list[Instance], count: int, turn: int) -> list[Instance]:
    """`count` instances for a turn; after the last instance the first one follows."""
    wanted = [instances[(turn * count + i) % len(instances)] for i in range(count)]
    return [dataclasses.replace(wanted[i]) for i in range(count)]  # the same one twice would be answered once


def time_products(args: argparse.Namespace, pretrained: str) -> dict[int, tuple[float, float]]:
    checkpoint = Checkpoint.open(pretrained)
    floor = Floor(checkpoint.config, "cuda" if torch.cuda.is_available() else "cpu")
    return {active: floor.seconds(active * checkpoint.block_length) for active in args.active}


def row(
    active: int, before: Counts, after: Counts, seconds: float, new_tokens: int, products: tuple[float, float] | None
) -> dict[str, Any]:
    tokens = after.new_tokens - before.new_tokens
    assert tokens == (after.requests - before.requests) * new_tokens, "an answer ended early"
    denoising = (after.denoising_forwards - before.denoising_forwards) / active
    commit = (after.commit_forwards - before.commit_forwards) / active
    found = {
        "active": active,
        "tokens": tokens,
        "tokens_per_second": round(tokens / seconds, 1),
        "seconds": round(seconds, 3),
        "ms_per_step": round(1000 * seconds / (denoising + commit), 2),
        "peak_memory_bytes": after.peak_memory_bytes,
    }
    if products is not None:
        floor = tokens_per_second(products, tokens, denoising, commit)
        found |= {"floor_tokens_per_second": round(floor, 1), "of_the_floor": round(tokens / seconds / floor, 3)}
    return found


def together(of_ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """One row for all processes. Facts of a single process are those of the slowest process."""
    slowest = max(of_ranks, key=lambda found: found["seconds"])
    tokens = sum(found["tokens"] for found in of_ranks)
    return slowest | {
        "tokens": tokens,
        "tokens_per_second": round(tokens / slowest["seconds"], 1),
        "seconds_of_processes": [found["seconds"] for found in of_ranks],
        "peak_memory_bytes": max(found["peak_memory_bytes"] for found in of_ranks),
    }


if __name__ == "__main__":
    main()
