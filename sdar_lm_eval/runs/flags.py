"""The flags of modal_runner.py: what each means, and reading those that are no setting of a run."""

from __future__ import annotations

import argparse
import inspect
import os
from collections.abc import Callable
from pathlib import Path

from sdar_lm_eval.engines.native.strategies import spellings
from sdar_lm_eval.engines.registry import ENGINES
from sdar_lm_eval.errors import UserError
from sdar_lm_eval.runs.settings import SWEPT

GPU = "H100!"  # an H100 and nothing else; plain "H100" may become an H200

FLAGS = {
    "model_name": "a hub id, or a folder on the volume sdar-models-cache",
    "num_samples": "the first N documents of each task; default: all",
    "block_length": "tokens that are denoised together",
    "denoising_steps": "denoising steps of a block",
    "temperature": "temperature of the distribution that tokens are drawn from; 0.0 is greedy",
    "remasking_strategy": f"which tokens a step keeps: {spellings()}; LMDeploy takes "
    f"{', '.join(ENGINES['lmdeploy'].strategies or ())}",
    "confidence_threshold": "low_confidence_dynamic keeps all tokens above this confidence",
    "max_gen_length": "most new tokens; default: the task's",
    "output_file": "JSON file with the results, on this machine; an older file is replaced",
    "verbose": "log each example: true or false",
    "engine": f"{', '.join(ENGINES)}; each has an image of its own",
    "tasks": "tasks that generate, separated by commas",
    "revision": "branch, tag or commit of a hub id; default: the newest",
    "seed": "seed of sampling",
    "shards": "containers with a GPU that share a run's documents",
    "gpu": f"GPU of a container; {GPU} is an H100 and nothing else",
    "timeout": "seconds for an attempt; a container has three attempts",
    "confirm_run_unsafe_code": "allow tasks that run the model's programs, in a container without network, token and "
    "volumes; without this flag, such tasks are refused",
    "thoughts": "model_args of thinking models: answer_prefix=<think>,max_thinking_toks=8192, or JSON",
    "engine_args": "model_args of the engine: max_active=128,dtype=float16, or JSON",
    "block": "short for --block-length",
    "steps": "short for --denoising-steps",
    "strategy": "short for --remasking-strategy",
    "threshold": "short for --confidence-threshold",
}
"""Flag -> what it means."""


def help_text(entrypoint: Callable[..., None]) -> str:
    """Return what `--help` prints: Modal's client lists an entrypoint's flags without their meaning.

    Args:
        entrypoint: the function whose parameters are the flags.
    """
    parser = argparse.ArgumentParser(
        usage="modal run modal_runner.py [--FLAG VALUE] …",
        description="Evaluate an SDAR model on a GPU of Modal. Defaults stand in parentheses.",
        epilog="* several values (0.8,0.9) or a range (0.5:0.9:0.1) make a sweep: all combinations.",
    )
    for name, parameter in inspect.signature(entrypoint).parameters.items():
        given, flag = parameter.default, f"--{name.replace('_', '-')}"
        text = FLAGS[name] + (f" ({given})" if given not in (None, "") else "") + (" *" if name in SWEPT else "")
        if given is False:
            parser.add_argument(flag, action="store_true", help=FLAGS[name])
        else:
            parser.add_argument(flag, metavar="VALUE", help=text)
    return parser.format_help()


def gpu_of(text: str) -> str:
    """Return the name of a GPU, spelled as Modal does.

    Raises:
        UserError: none is named, or several, of which an engine would use one. Modal checks the name itself.
    """
    name, _, count = text.strip().upper().partition(":")
    if not name:
        raise UserError(f"--gpu is empty. Name one: {GPU} (an H100 and nothing else), H100, H200, A100-80GB, …")
    if count not in ("", "1"):
        raise UserError(f"--gpu {text}: a container uses one GPU. Give --gpu {name}, and --shards N for N of them.")
    return name


def output_of(text: str) -> Path:
    """Return the path of the JSON file.

    Raises:
        UserError: the file cannot be written there; it is checked before anything is paid for.
    """
    output = Path(text).expanduser()
    folder = output.absolute().parent
    if not text.strip() or output.is_dir():
        raise UserError(f"--output-file {text!r} is no name of a file. Give one, such as gsm8k_results.json.")
    if not folder.is_dir():
        raise UserError(f"--output-file {text}: {folder} is no folder. Make it first.")
    if not os.access(output if output.exists() else folder, os.W_OK):
        raise UserError(f"--output-file {text} cannot be written: no permission. Name a file elsewhere.")
    return output
