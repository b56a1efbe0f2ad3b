"""Time and tokens of log-likelihoods, against one plain causal forward over the same texts.

    python benchmarks/likelihood.py [--pretrained demo] [--device cpu] [--methods chain nelbo] [--block-length 4]
    python benchmarks/likelihood.py --pretrained FOLDER --random-weights     # FOLDER needs no weights; they are drawn

Four kinds of request, of random tokens:
- `rolling`: texts behind one token (perplexity)
- `endings`: four longer continuations of a context, as in HellaSwag
- `letters`: four continuations of one token behind a long context, as in MMLU
- `few-shot`: as `letters`, but all contexts begin with the same examples

"plain" runs each context + continuation once through the same weights under a causal mask, batched by length, with the
LM head on the continuation only: an autoregressive model's score costs as much where contexts are not shared. "tokens
run" counts the tokens that went through the layers; "of plain" is a method's time over the time of "plain". The last
line is JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from typing import Any

import torch
from common import folder, parser_of

from sdar_lm_eval import Checkpoint, make_engine
from sdar_lm_eval.engines.native.scoring.batches import Limits
from sdar_lm_eval.engines.types import LikelihoodConfig, ScoreRequest
from sdar_lm_eval.report.machine import cpu_name

KINDS = ["rolling", "endings", "letters", "few-shot"]


def requests_of(kind: str, checkpoint: Checkpoint, args: argparse.Namespace) -> list[ScoreRequest]:
    rng = random.Random(args.seed)
    allowed = [t for t in range(checkpoint.config["vocab_size"]) if t != checkpoint.mask_token_id]

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(rng.choices(allowed, k=count))

    if kind == "rolling":
        return [ScoreRequest(tokens(1), tokens(args.length - 1)) for _ in range(args.texts)]
    context, ending = (args.length // 8, args.length // 32) if kind == "endings" else (args.length // 2, 1)
    questions = [tokens(rng.randint(context // 2, context)) for _ in range(args.texts * 8)]
    if kind == "few-shot":
        examples = tokens(args.length)
        questions = [examples + question[: args.length // 8] for question in questions]
    return [ScoreRequest(question, tokens(ending)) for question in questions for _ in range(4)]


@torch.no_grad()
def plain(model: Any, requests: list[ScoreRequest], tokens_a_forward: int) -> int:
    """Score under a causal mask; return the number of tokens that went through the layers, without padding."""
    texts = sorted(requests, key=lambda r: -len(r.context_ids) - len(r.continuation_ids))
    longest = [len(r.context_ids) + len(r.continuation_ids) for r in texts]
    start = 0
    while start < len(texts):
        part = texts[start : start + max(1, tokens_a_forward // longest[start])]
        ids = torch.zeros(len(part), longest[start], dtype=torch.int64)
        where, targets = [], []
        for row, request in enumerate(part):
            ids[row, : longest[start + row]] = torch.tensor(request.context_ids + request.continuation_ids)
            first = len(request.context_ids) - 1
            where += [(row, first + j) for j in range(len(request.continuation_ids))]
            targets += request.continuation_ids
        hidden = model.model(input_ids=ids.to(model.device), use_cache=False).last_hidden_state
        row, column = torch.tensor(where).to(model.device).unbind(1)
        scores = []
        for at in range(0, len(targets), 1024):
            logits = model.lm_head(hidden[row[at : at + 1024], column[at : at + 1024]]).float()
            target = torch.tensor(targets[at : at + 1024]).to(model.device)
            scores.append(logits.log_softmax(-1).gather(1, target[:, None]))
        torch.cat(scores).cpu()
        start += len(part)
    return sum(longest)


def fastest_of(run: Callable[[], Any], repeats: int) -> tuple[Any, float]:
    """Return the result and the least time of several runs; a first run does not count."""
    result, times = run(), []
    for _ in range(repeats):
        started = time.perf_counter()
        result = run()
        times.append(time.perf_counter() - started)
    return result, min(times)


def main() -> None:
    parser = parser_of(__doc__, of_runs=False)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--no-kernels", action="store_true", help="run transformers' modules also on a GPU")
    parser.add_argument("--block-length", type=int, help="default: the checkpoint's")
    parser.add_argument("--methods", nargs="+", default=["chain", "nelbo"])
    parser.add_argument("--mc-samples", type=int, default=256)
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--length", type=int, default=512, help="tokens of a rolling text; the others follow from it")
    parser.add_argument("--texts", type=int, default=8, help="rolling texts; questions are 8 times as many")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    with folder(parser, args) as pretrained:
        checkpoint = Checkpoint.open(pretrained)
        engine: Any = make_engine(
            "native", checkpoint, device=args.device, dtype=args.dtype, kernels=False if args.no_kernels else None
        )
    model = engine.model
    attention = model.config._attn_implementation
    length = args.block_length or checkpoint.block_length
    tokens_a_forward = Limits.on(model.device.type, cache_tokens=1, requests=None).forward_tokens
    rows: list[dict[str, Any]] = []
    print("| requests | method | scored tokens/s | seconds | of plain | tokens run | of plain |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for kind in args.kinds:
        requests = requests_of(kind, checkpoint, args)
        scored = sum(len(r.continuation_ids) for r in requests)
        model.config._attn_implementation = "sdpa"
        run, seconds = fastest_of(lambda requests=requests: plain(model, requests, tokens_a_forward), args.repeats)
        model.config._attn_implementation = attention
        found = [("plain", run, seconds)]
        for method in args.methods:
            config = LikelihoodConfig(method, args.mc_samples, length)
            results, seconds = fastest_of(
                lambda requests=requests, config=config: [r for _, r in engine.score(requests, config)], args.repeats
            )
            found.append((method, sum(r.clean_tokens + r.noised_tokens for r in results), seconds))
        for method, run, seconds in found:
            row = {
                "requests": kind,
                "method": method,
                "scored_tokens": scored,
                "tokens_per_second": round(scored / seconds, 1),
                "seconds": round(seconds, 4),
                "time_of_plain": round(seconds / found[0][2], 2),
                "tokens_run": run,
                "tokens_of_plain": round(run / found[0][1], 2),
            }
            rows.append(row)
            print(
                f"| {kind} | {method} | {row['tokens_per_second']:,.0f} | {seconds:.3f} | {row['time_of_plain']} | "
                f"{run:,} | {row['tokens_of_plain']} |",
                flush=True,
            )
    info = engine.info.as_dict()
    settings = {name: value for name, value in vars(args).items() if name not in info} | {"block_length": length}
    facts = {"peak_memory_bytes": engine.peak_memory_bytes(), "threads": torch.get_num_threads()}
    print(json.dumps({**info, "cpu": cpu_name(), **facts, **settings, "rows": rows}))


if __name__ == "__main__":
    main()
