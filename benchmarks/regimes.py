"""Tokens per second in each regime: mixtures of experts, large blocks, long answers, long prompts, first runs.

    python benchmarks/regimes.py --pretrained SDAR-4B-FOLDER --gsm8k FOLDER                       # native and LMDeploy
    python benchmarks/regimes.py --pretrained … --engines native --only moe blocks                # some of the table

The folder needs config.json and a tokenizer, no weights: they are drawn. A regime has a model (the folder's own shape,
or SDAR-30B-A3B's with 12 of its 48 layers), a block length, and a number of sequences at once. Each engine has a
process for each model and block length. Where there is a GPU for each engine, the engines run at the same time. A row
runs `--runs` times after `prepare`; a row that takes long runs once. The table shows the first run and the best later
run. The floor is the time that `floor.py` gives for the products, for reading keys and values, and for attention of
prompts. The script prints each row when it is measured, and a table that compares the engines at the end. The last line
is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sdar_lm_eval.engines.registry import ENGINES

EXPERTS = {
    "model_type": "sdar_moe", "architectures": ["SDARMoeForCausalLM"], "hidden_size": 2048, "num_attention_heads": 32,
    "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8,
    "moe_intermediate_size": 768, "intermediate_size": 6144, "decoder_sparse_step": 1, "mlp_only_layers": [],
    "norm_topk_prob": True, "output_router_logits": False, "router_aux_loss_coef": 0.001,
}  # fmt: skip
LONG_SECONDS = 20  # a row is not run again once it took so long
STATIC, AT_ONCE = 0.9, 0.0  # thresholds: random weights are never so sure, and always


@dataclass(frozen=True)
class Regime:
    """The work of a row.

    Attributes:
        name: the part of the table.
        model: "dense", the folder's own shape, or "moe".
        block: the block length.
        active: sequences at once, and prompts of a run unless `prompts` says more.
        new_tokens: tokens of an answer.
        threshold: confidence_threshold of low_confidence_dynamic.
        prefix: tokens in front of each question; `share` questions have the same.
        share: questions with the same prefix; 0: all.
        prompts: prompts of a run.
    """

    name: str
    model: str
    block: int
    active: int
    new_tokens: int
    threshold: float
    prefix: int = 0
    share: int = 0
    prompts: int = 0


REGIMES = [
    *[Regime("moe", "moe", 4, active, 64, STATIC) for active in (1, 16, 128, 256)],
    Regime("moe", "moe", 4, 128, 256, AT_ONCE),
    *[Regime("tuned", "dense", 4, n, 256, threshold) for threshold in (STATIC, AT_ONCE) for n in (1, 64, 256)],
    *[
        Regime("blocks", "dense", block, 64, tokens, threshold)
        for block in (8, 16, 32, 64)
        for threshold, tokens in ((STATIC, 256 if block < 32 else 64), (AT_ONCE, 256))
    ],
    *[Regime("blocks of 256 sequences", "dense", block, 256, 256, AT_ONCE) for block in (16, 64)],
    Regime("long answers", "dense", 4, 128, 2048, STATIC),
    Regime("long prompts", "dense", 4, 32, 512, STATIC, prefix=8000, share=1),
    Regime("prefill", "dense", 4, 32, 4, AT_ONCE, prefix=8000, share=1),
    Regime("5-shot", "dense", 4, 256, 8, AT_ONCE, prefix=900, share=50, prompts=1000),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained", required=True)
    parser.add_argument("--gsm8k", help="folder with GSM8K's test.jsonl; default: the demo problems")
    parser.add_argument("--engines", nargs="+", default=["native", "lmdeploy"], choices=ENGINES)
    parser.add_argument("--only", nargs="+", metavar="PART", choices=sorted({r.name for r in REGIMES}))
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--layers", type=int, default=12, help="layers of the mixture of experts")
    parser.add_argument("--weights", help="folder for the drawn weights, kept; default: a temporary one")
    parser.add_argument("--engine-seconds", type=float, default=300, help="most time of one process")
    parser.add_argument("--process", help=argparse.SUPPRESS)  # a JSON of what one process measures
    args = parser.parse_args()
    if args.process:
        measure(**json.loads(args.process))
        return

    if not (Path(args.pretrained) / "config.json").is_file():
        parser.error(f"--pretrained {args.pretrained} is no folder with a config.json; give SDAR-4B's, without weights")
    wanted = [regime for regime in REGIMES if not args.only or regime.name in args.only]
    models = sorted({(regime.model, regime.block) for regime in wanted}, reverse=True)
    with tempfile.TemporaryDirectory(prefix="regimes-") as temporary:
        folders = {model: drawn(args, *model, Path(args.weights or temporary)) for model in models}

        def rows_of(engine: str, gpu: str) -> list[dict[str, Any]]:
            parts = ((folders[model], [r for r in wanted if (r.model, r.block) == model]) for model in models)
            return [row for part in parts for row in in_process(args, engine, gpu, *part)]

        gpus = visible_gpus()
        at_once = len(gpus) >= len(args.engines)
        own = gpus if at_once else gpus[:1] * len(args.engines)
        with ThreadPoolExecutor(len(args.engines) if at_once else 1) as pool:
            rows = [row for part in pool.map(rows_of, args.engines, own) for row in part]
    print_comparison(args.engines, wanted, rows)
    print(json.dumps({"engines": args.engines, "rows": rows}))


def visible_gpus() -> list[str]:
    """Values of CUDA_VISIBLE_DEVICES that show one GPU each; one empty value where there is no GPU."""
    import torch

    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    return shown.split(",") if shown else [str(gpu) for gpu in range(torch.cuda.device_count())] or [""]


def drawn(args: argparse.Namespace, model: str, block: int, weights: Path) -> str:
    """The folder of a model with drawn weights and a block length. The weights are drawn once for each model."""
    from common import draw_weights

    whole, target = weights / model, weights / f"{model}-{block}"
    if not whole.exists():
        source = weights / f"{model}-config"
        source.mkdir(parents=True)
        for path in Path(args.pretrained).iterdir():
            if path.is_file() and ".safetensors" not in path.name:
                shutil.copyfile(path, source / path.name)
        if model == "moe":
            config = json.loads((source / "config.json").read_text())
            config.pop("auto_map", None)
            config |= EXPERTS | {"num_hidden_layers": args.layers}
            (source / "config.json").write_text(json.dumps(config))
        draw_weights(str(source), whole)
    if not target.exists():
        target.mkdir()
        for path in whole.iterdir():
            if path.name != "config.json":
                (target / path.name).symlink_to(path)
        config = json.loads((whole / "config.json").read_text())
        (target / "config.json").write_text(json.dumps(config | {"block_size": block}))
    return str(target)


def in_process(
    args: argparse.Namespace, engine: str, gpu: str, folder: str, regimes: list[Regime]
) -> Iterator[dict[str, Any]]:
    """Measure an engine's rows in a process of their own; rows that a process measured before it failed are kept."""
    asked = {
        "engine": engine, "folder": folder, "regimes": [asdict(regime) for regime in regimes],
        "gsm8k": args.gsm8k, "runs": args.runs,
    }  # fmt: skip
    command = [sys.executable, __file__, "--pretrained", folder, "--process", json.dumps(asked)]
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": gpu}
        )
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if line.startswith("{"):
                    row = json.loads(line)
                    print(f"{engine}: {told(row)}", flush=True)
                    yield row
                if time.perf_counter() - started > args.engine_seconds:
                    break
        finally:
            process.kill()
            if process.wait() > 0:
                errors.seek(0)
                print(f"{engine} failed: {errors.read()[-1500:]}", flush=True)


def told(row: dict[str, Any]) -> str:
    later = f", later {row['later']:,.0f}" if row["later"] else ""
    return (
        f"{row['name']}, blocks of {row['block']}, {row['active']} sequences, {row['new_tokens']} new tokens, "
        f"threshold {row['threshold']}: first run {row['first']:,.0f} tokens/s{later}; prompts {row['prompt']:,.0f} "
        f"tokens/s; prepared in {row['prepare_seconds']} s; {row['peak_memory_bytes'] / 2**30:.1f} GiB"
        + (f"; {row['of_the_floor']:.2f} of the floor" if row.get("of_the_floor") else "")
    )


def print_comparison(engines: list[str], regimes: list[Regime], rows: list[dict[str, Any]]) -> None:
    by = {(row["engine"], Regime(**{name: row[name] for name in asdict(regimes[0])})): row for row in rows}
    print(
        "\n| regime | block | active | new tokens | a step |"
        + "".join(f" {e}: first, later |" for e in engines)
        + " times |"
    )
    print("| --- | ---: | ---: | ---: | --- |" + " ---: |" * len(engines) + " ---: |")
    for regime in regimes:
        own = [by.get((engine, regime)) for engine in engines]
        best = [max(row["first"], row["later"] or 0) if row else 0 for row in own]
        cells = [f" {row['first']:,.0f}, {row['later'] or 0:,.0f} |" if row else " |" for row in own]
        times = f" {best[0] / best[-1]:.2f} |" if len(best) > 1 and best[-1] else " |"
        step = "a block" if regime.threshold == AT_ONCE else "one token"
        print(
            f"| {regime.name} | {regime.block} | {regime.active} | {regime.new_tokens} | {step} |"
            + "".join(cells)
            + times
        )


def measure(engine: str, folder: str, regimes: list[dict[str, Any]], gsm8k: str | None, runs: int) -> None:
    """Measure rows, and print each as JSON."""
    import torch
    from common import load_questions, make_model
    from floor import Floor

    wanted = [Regime(**regime) for regime in regimes]
    lm = make_model(engine, folder, "top_k=50" if engine == "lmdeploy" else "", max(r.active for r in wanted))
    questions = load_questions(gsm8k)
    on_gpu = torch.cuda.is_available()
    floor = Floor(lm.checkpoint.config, "cuda" if on_gpu else "cpu") if engine == "native" else None
    for regime in wanted:
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        print(
            json.dumps({"engine": engine, **asdict(regime), **rates_of(lm, regime, questions, runs, floor)}), flush=True
        )
    lm.close()


def rates_of(lm: Any, regime: Regime, questions: Any, runs: int, floor: Any) -> dict[str, Any]:
    """The rates of a regime's runs."""
    from throughput import cycled

    made = requests(lm, regime, questions)
    started = time.perf_counter()
    lm.engine.prepare([job.request for job in lm.jobs.of(made, lm.evaluation.task_of, 0).jobs.values()])
    row: dict[str, Any] = {"prepare_seconds": round(time.perf_counter() - started, 1)}
    rates, prompt_rates = [], []
    began = time.perf_counter()
    for turn in range(runs):
        if time.perf_counter() - began > LONG_SECONDS:
            break
        before = replace(lm.counts)
        started = time.perf_counter()
        lm.generate_until(cycled(made, len(made), turn), disable_tqdm=True)
        seconds = time.perf_counter() - started
        rates.append((lm.counts.new_tokens - before.new_tokens) / seconds)
        prompt_rates.append((lm.counts.prompt_tokens - before.prompt_tokens) / seconds)
    row |= {"first": rates[0], "later": max(rates[1:], default=None), "prompt": max(prompt_rates)}
    if floor is not None:
        count = lm.counts.requests - before.requests
        prompt = (lm.counts.prompt_tokens - before.prompt_tokens) / count
        denoising = (lm.counts.denoising_forwards - before.denoising_forwards) / count
        commit = (lm.counts.commit_forwards - before.commit_forwards) / count
        layers, head = floor.seconds(regime.active * regime.block)
        context = floor.seconds_of_context(regime.active * (prompt + regime.new_tokens / 2))
        # Prompts of a group share all but the question; a run begins without any stored.
        groups = -(-count // regime.share) if regime.share else 1
        stored = regime.prefix * (count - groups) / count if regime.share > 1 else 0
        seconds = count / regime.active * (denoising * (layers + head + context) + commit * layers)
        seconds += floor.seconds_of_prompts(count, prompt - stored, prompt)
        row["of_the_floor"] = max(rates) * seconds / (count * regime.new_tokens)
    return row | {"peak_memory_bytes": lm.counts.peak_memory_bytes}


def requests(lm: Any, regime: Regime, questions: Any) -> list[Any]:
    """The harness's requests of a regime. A text in front of a question consists of worked problems."""
    from common import instance, sampling
    from throughput import front

    settings = {
        "remasking_strategy": "low_confidence_dynamic", "confidence_threshold": regime.threshold,
        "block_length": regime.block, "denoising_steps": regime.block, **sampling(sample=True),
    }  # fmt: skip
    count = regime.prompts or regime.active
    fronts: dict[int, str] = {}
    made = []
    for number in range(count):
        group = number // (regime.share or count)
        if regime.prefix and group not in fronts:
            fronts[group] = front(questions, group, regime.prefix, lm.tokenizer)
        doc = questions[number % len(questions)]
        made.append(instance(number, doc, regime.new_tokens, settings, fronts.get(group, "")))
    return made


if __name__ == "__main__":
    main()
