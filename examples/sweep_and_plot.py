"""Evaluate several confidence thresholds, and plot accuracy against speed.

    python examples/sweep_and_plot.py
    python examples/sweep_and_plot.py --pretrained JetLM/SDAR-4B-Chat --task gsm8k_sdar --limit 200

`sdar_lm_eval sweep` does the work, and draws a chart by itself. This script reads the points that the sweep prints, for
a chart of one's own. The same command again computes only what is missing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd


def sweep(arguments: argparse.Namespace) -> pd.DataFrame:
    """Run the sweep, and return a row for each threshold, then for the baseline of one token a step."""
    command = [sys.executable, "-m", "sdar_lm_eval", "sweep", "--model_args", f"pretrained={arguments.pretrained}"]
    command += ["--tasks", arguments.task, "--limit", str(arguments.limit), "--output_path", str(arguments.output)]
    grids = ["--strategy", "dynamic", "--threshold", arguments.thresholds, "--and", "--strategy", "static"]
    done = subprocess.run([*command, *grids, "--steps", "4", "--json"], check=True, stdout=subprocess.PIPE, text=True)
    (task,) = json.loads(done.stdout)["tasks"]
    points = pd.DataFrame(task["points"])
    return points.join(pd.json_normalize(points.pop("settings").tolist()))


def plot(points: pd.DataFrame, file: Path) -> None:
    """Draw accuracy against tokens per forward, with standard errors; a point's label is its threshold."""
    figure, axes = plt.subplots(figsize=(6, 4))
    for strategy, curve in points.groupby("remasking_strategy"):
        axes.errorbar(curve.tokens_per_forward, curve.accuracy, curve.stderr, marker="o", capsize=3, label=strategy)
    for point in points.dropna(subset="confidence_threshold").itertuples():
        axes.annotate(f" {point.confidence_threshold:g}", (point.tokens_per_forward, point.accuracy))
    axes.set(xlabel="tokens per forward", ylabel="accuracy (%)")
    axes.legend()
    figure.savefig(file, bbox_inches="tight")


def main() -> None:
    """Sweep, print the points, plot them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained", default="demo", help="a checkpoint: a folder, a name on the Hub, or demo")
    parser.add_argument("--task", default="gsm8k_sdar_demo")
    parser.add_argument("--limit", type=int, default=40, help="evaluate the first N documents")
    parser.add_argument("--thresholds", default="0.5,0.7,0.9", help="confidence thresholds, or a range: 0.5:0.9:0.1")
    parser.add_argument("--output", type=Path, default=Path("thresholds"), help="the sweep's folder")
    parser.add_argument("--plot", type=Path, default=Path("thresholds.png"), help="the chart: .png, .svg or .pdf")
    arguments = parser.parse_args()
    points = sweep(arguments)
    columns = ["remasking_strategy", "confidence_threshold", "accuracy", "stderr", "tokens_per_forward"]
    print(points[columns].round(2).to_string(index=False))
    plot(points, arguments.plot)
    print(f"chart: {arguments.plot}")


if __name__ == "__main__":
    main()
