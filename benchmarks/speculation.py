"""What guesses of the next states cost and save: `--model sdar` with each `speculate`, by sequences and contexts.

    python benchmarks/speculation.py --active 1 16                                         # the bundled checkpoint
    python benchmarks/speculation.py --pretrained FOLDER --random-weights --gsm8k FOLDER --active 1 16 64 256 \
        --prefix 0 2000 8000 --new-tokens 64                                               # what a pass costs

A pass is a forward of the model for a sequence. Random weights show the cost of a pass, and a trained checkpoint shows
how many denoising steps a pass makes. The speed that a trained model would have follows: steps a pass divided by
milliseconds a pass. Each row runs `--runs` times behind `prepare`, and has the fastest run. The last line is JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import time
from typing import Any

from common import cpu_name, folder, instance, load_questions, make_model, positive_int, sampling
from throughput import cycled, front

DEPTHS = ("false", "1", "2", "3", "4", "auto")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained", default="demo")
    parser.add_argument("--random-weights", action="store_true", help="the folder needs no weights; they are drawn")
    parser.add_argument("--gsm8k", help="folder with GSM8K's test.jsonl; default: the demo problems")
    parser.add_argument("--active", type=positive_int, nargs="+", default=[1, 16])
    parser.add_argument("--prefix", type=int, nargs="+", default=[0], help="tokens in front of each question")
    parser.add_argument("--speculate", nargs="+", default=DEPTHS, choices=DEPTHS)
    parser.add_argument("--new-tokens", type=positive_int, default=64)
    parser.add_argument("--strategy", default="low_confidence_static")
    parser.add_argument("--sample", action="store_true", help="draw at temperature 1; default: greedy")
    parser.add_argument("--runs", type=positive_int, default=3)
    parser.add_argument("--model-args", default="", help="more of them: name=value,name=value")
    args = parser.parse_args()

    rows = []
    print("| speculate | active | prefix | tokens/s | times false | steps a pass | ms a pass | right guesses |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    with folder(parser, args) as pretrained:
        for speculate in args.speculate:
            lm = make_model("native", pretrained, f"speculate={speculate},{args.model_args}", max(args.active))
            for active, prefix in ((active, prefix) for prefix in args.prefix for active in args.active):
                own = measured(lm, args, active, prefix)
                rows.append({"speculate": speculate, "active": active, "prefix": prefix, **own})
                plain = next(row for row in rows if (row["active"], row["prefix"]) == (active, prefix))
                times = f"{own['tokens_per_second'] / plain['tokens_per_second']:.2f}"
                print(
                    f"| {speculate} | {active} | {prefix} | {own['tokens_per_second']:,.0f} "
                    f"| {times if plain['speculate'] == 'false' else ''} | {own['steps_per_pass']:.2f} "
                    f"| {own['ms_per_pass']:.2f} | {own['right']:.2f} |",
                    flush=True,
                )
            lm.close()
            del lm
            gc.collect()
    print(json.dumps({**vars(args), "cpu": cpu_name(), "rows": rows}))


def measured(lm: Any, args: argparse.Namespace, active: int, prefix: int) -> dict[str, float]:
    """The fastest run of so many sequences at once."""
    questions = load_questions(args.gsm8k)
    settings = {"remasking_strategy": args.strategy, "confidence_threshold": 0.9, **sampling(args.sample)}
    count = min(active, len(questions))
    made = [
        instance(i, questions[i], args.new_tokens, settings, front(questions, i, prefix, lm.tokenizer))
        for i in range(count)
    ]
    wanted = cycled(made, active, 0)
    lm.engine.prepare([job.request for job in lm.jobs.of(wanted, lm.evaluation.task_of, 0).jobs.values()])
    found = []
    for turn in range(args.runs):
        before = dataclasses.replace(lm.counts)
        started = time.perf_counter()
        lm.generate_until(cycled(made, active, turn), disable_tqdm=True)
        seconds = time.perf_counter() - started
        steps = lm.counts.denoising_forwards - before.denoising_forwards
        passes = lm.counts.passes - before.passes or steps
        guesses = lm.counts.guesses - before.guesses
        found.append(
            {
                "tokens_per_second": (lm.counts.new_tokens - before.new_tokens) / seconds,
                "steps_per_pass": steps / passes,
                "ms_per_pass": 1000 * seconds * active / passes,
                "right": (lm.counts.right_guesses - before.right_guesses) / guesses if guesses else 0.0,
            }
        )
    return max(found, key=lambda run: run["tokens_per_second"])


if __name__ == "__main__":
    main()
