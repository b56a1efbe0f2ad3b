"""Accuracy of the demo checkpoint on its 200 problems, by strategy, steps and threshold, through the harness.

    python benchmarks/demo_accuracy.py [--plot docs/demo_accuracy.svg] [--device cpu]

A decoder that does something wrong shows here: the demo model is trained so that fewer steps and lower thresholds cost
accuracy. Greedy throughout. "Tokens per forward" counts commit forwards too. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path

import lm_eval
import torch

from sdar_lm_eval import SDARLM

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.99)
SETTINGS = [
    *({"remasking_strategy": "low_confidence_static", "denoising_steps": steps} for steps in (4, 2, 1)),
    *({"remasking_strategy": "sequential", "denoising_steps": steps} for steps in (4, 2)),
    *({"remasking_strategy": "random", "denoising_steps": steps} for steps in (4, 2)),
    *({"remasking_strategy": "low_confidence_dynamic", "confidence_threshold": t} for t in THRESHOLDS),
    *({"remasking_strategy": "entropy_bounded", "eb_threshold": t} for t in (0.1, 0.35, 1.0)),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)

    rows = []
    print("| strategy | setting | accuracy, % | tokens per forward |\n| --- | --- | ---: | ---: |")
    for settings in SETTINGS:
        model = SDARLM("demo", device=args.device, dtype=args.dtype)
        out = lm_eval.simple_evaluate(
            model=model, tasks=["gsm8k_sdar_demo"], gen_kwargs=dict(settings), limit=args.limit, bootstrap_iters=0
        )
        scores = out["results"]["gsm8k_sdar_demo"]
        count = out["n-samples"]["gsm8k_sdar_demo"]["effective"]
        accuracy = scores["exact_match,strict-match"]
        row = {
            **settings,
            "accuracy": accuracy,
            "stderr": (accuracy * (1 - accuracy) / (count - 1)) ** 0.5,
            "tokens_per_forward": model.counts.tokens_per_forward,
        }
        rows.append(row)
        name = ", ".join(f"{key}={value}" for key, value in settings.items() if key != "remasking_strategy")
        print(
            f"| {settings['remasking_strategy']} | {name} | {100 * accuracy:.1f} ± {100 * row['stderr']:.1f} | "
            f"{row['tokens_per_forward']:.2f} |",
            flush=True,
        )
    if args.plot:
        plot(rows, args.plot)
    print(json.dumps({"torch": torch.__version__, "device": str(model.device), "problems": count, "rows": rows}))


def plot(rows: list[dict], path: Path) -> None:
    """Accuracy against tokens per forward, a line a strategy."""
    import matplotlib as mpl
    import matplotlib.pyplot as plt

    mpl.rcParams["svg.hashsalt"] = "demo"
    figure, axes = plt.subplots(figsize=(6.4, 4))
    for strategy in dict.fromkeys(row["remasking_strategy"] for row in rows):
        points = sorted((r for r in rows if r["remasking_strategy"] == strategy), key=lambda r: r["tokens_per_forward"])
        axes.errorbar(
            [r["tokens_per_forward"] for r in points],
            [100 * r["accuracy"] for r in points],
            yerr=[100 * r["stderr"] for r in points],
            marker="o",
            markersize=4,
            capsize=2,
            label=strategy,
        )
    axes.set_xlabel("returned tokens per forward (commits counted)")
    axes.set_ylabel("accuracy on the demo problems, %")
    axes.set_ylim(0, 100)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
