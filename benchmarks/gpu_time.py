"""The GPU's time in a run of the native engine: by kernel, and in gaps between kernels.

    python benchmarks/gpu_time.py --pretrained FOLDER --random-weights --gsm8k FOLDER --active 256 --threshold 0

The script does one run like a row of `throughput.py` under torch's profiler, after two runs without the profiler. The
first of these captures CUDA graphs. Kernels of matrix products have many names; the table adds them up as "products".
The last line is JSON.
"""

from __future__ import annotations

import collections
import heapq
import json
from collections.abc import Iterable
from typing import Any

import torch
from common import folder, instance, load_questions, make_model, parser_of, positive_int, sampling
from throughput import front
from torch.profiler import ProfilerActivity, profile

PRODUCTS = ("nvjet", "gemm", "cutlass", "splitk", "few_rows", "gate_up", "down_kernel")
GAPS = (2, 20, 200)  # microseconds, by which gaps are told apart
LONGEST = 10  # gaps that are shown one by one


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--active", type=positive_int, default=256)
    parser.add_argument("--new-tokens", type=positive_int, default=64)
    parser.add_argument(
        "--prefix", type=positive_int, default=0, help="tokens in front of each question; default: none"
    )
    parser.add_argument("--strategy", default="low_confidence_dynamic")
    parser.add_argument("--threshold", type=float, default=0.9)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no GPU here")

    with folder(parser, args) as pretrained:
        lm = make_model("native", pretrained, args.model_args, args.active)
        questions = load_questions(args.gsm8k)
        settings = {
            "remasking_strategy": args.strategy,
            "confidence_threshold": args.threshold,
            **sampling(sample=True),
        }

        fronts = [front(questions, i, args.prefix, lm.tokenizer) for i in range(args.active)]

        def run() -> float:
            before = lm.counts.generation_seconds
            wanted = [
                instance(i, questions[i % len(questions)], args.new_tokens, settings, text)
                for i, text in enumerate(fronts)
            ]
            lm.generate_until(wanted, disable_tqdm=True)
            return float(lm.counts.generation_seconds - before)

        run()
        alone = run()
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            seconds = run()
        info = lm.get_model_info()["sdar_lm_eval"]
    events = [
        (event.start_ns(), event.start_ns() + event.duration_ns(), event.name())
        for event in profiled.profiler.kineto_results.events()
        if str(event.device_type()).endswith("CUDA")
    ]
    found = summary(events)
    print(f"{1000 * alone:,.1f} ms, {1000 * seconds:,.1f} under the profiler; {found['busy_ms']:,.1f} of them busy\n")
    print("| kernel | ms | times | us each |")
    print("| --- | ---: | ---: | ---: |")
    for name, (ms, times) in found["kernels"].items():
        print(f"| {name} | {ms:,.2f} | {times:,} | {1000 * ms / times:,.1f} |")
    for limit, ms in found["gaps_ms"].items():
        print(f"| gaps {limit} | {ms:,.2f} | | |")
    for gap in found["longest_gaps"]:
        between = " and ".join(_short(gap[side]) for side in ("behind", "before"))
        print(f"{gap['ms']:.2f} ms without a kernel, {gap['at_ms']:,.0f} ms after the first one, between {between}")
    asked = {name: value for name, value in vars(args).items() if name not in info}
    print(json.dumps({**info, **asked, "seconds": alone, "seconds_profiled": seconds, **found}))


def _short(name: str) -> str:
    return name.split("(")[0].split("<")[0]


def summary(events: Iterable[tuple[int, int, str]], most: int = 20) -> dict[str, Any]:
    """Sum up (start, end, name) in nanoseconds: time with a kernel running, time by kernel, time in gaps by length."""
    ordered = sorted(events)
    busy, until = 0, ordered[0][0]
    gaps: dict[str, int] = dict.fromkeys([*(f"up to {limit} us" for limit in GAPS), "longer"], 0)
    idle: list[tuple[int, int, str, str]] = []  # nanoseconds, from when on, behind what, before what
    last = ""
    took: collections.Counter[str] = collections.Counter()
    times: collections.Counter[str] = collections.Counter()
    for start, end, name in ordered:
        if start > until:
            place = sum(start - until > 1000 * limit for limit in GAPS)
            gaps[list(gaps)[place]] += start - until
            idle.append((start - until, until - ordered[0][0], last, name))
        busy += max(0, end - max(start, until))
        if end >= until:
            until, last = end, name
        kind = "products" if any(part in name.lower() for part in PRODUCTS) else _short(name)
        took[kind] += end - start
        times[kind] += 1
    return {
        "busy_ms": busy / 1e6,
        "kernels": {name: (ns / 1e6, times[name]) for name, ns in took.most_common(most)},
        "gaps_ms": {limit: ns / 1e6 for limit, ns in gaps.items()},
        "longest_gaps": [
            {"ms": ns / 1e6, "at_ms": begin / 1e6, "behind": behind, "before": before}
            for ns, begin, behind, before in heapq.nlargest(LONGEST, idle)
        ],
    }


if __name__ == "__main__":
    main()
