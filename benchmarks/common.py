"""What the benchmarks share: arguments, a checkpoint with random weights, a model without stop tokens, questions."""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from safetensors.torch import save_file

from sdar_lm_eval import Checkpoint, UserError, autoload
from sdar_lm_eval.demo import PROMPT
from sdar_lm_eval.engines.registry import ENGINES
from sdar_lm_eval.tasks import gsm8k


def parser_of(description: str | None, *, of_runs: bool = True) -> argparse.ArgumentParser:
    """A parser of the arguments that benchmarks share; `of_runs`: also those on the questions and the model."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained", default="demo")
    parser.add_argument("--random-weights", action="store_true", help="the folder needs no weights; they are drawn")
    if of_runs:
        parser.add_argument("--gsm8k", help="folder with GSM8K's test.jsonl; default: the demo problems")
        parser.add_argument("--model-args", default="", help="more of them: name=value,name=value")
    return parser


def positive_int(text: str) -> int:
    """Read an argument: a whole number from 1 on."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return value


@contextlib.contextmanager
def folder(parser: argparse.ArgumentParser, args: argparse.Namespace) -> Iterator[str]:
    """The folder of the checkpoint that --pretrained and --random-weights ask for.

    A UserError in the body ends the program with the error's text.
    """
    made = with_random_weights(args.pretrained) if args.random_weights else contextlib.nullcontext(args.pretrained)
    try:
        with made as pretrained:
            yield pretrained
    except UserError as error:
        parser.error(str(error))


@contextlib.contextmanager
def with_random_weights(folder: str) -> Iterator[str]:
    """A temporary copy of a checkpoint's folder with drawn weights.

    The temporary folder's file system needs room for the weights.
    """
    with tempfile.TemporaryDirectory(prefix="random-weights-") as copy:
        draw_weights(folder, Path(copy))
        yield copy


def draw_weights(folder: str, copy: Path) -> None:
    """Fill `copy` with a checkpoint's folder, its weights drawn from N(0, 0.02²), norms 1, in its own dtype.

    The folder needs config.json and a tokenizer.
    """
    checkpoint = Checkpoint.open(folder)
    dtype = getattr(torch, checkpoint.config.get("torch_dtype") or "bfloat16")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    weights = {
        name: (
            torch.ones(shape, dtype=dtype)
            if "norm" in name
            else torch.empty(shape, dtype=dtype, device=device).normal_(0, 0.02).cpu()
        )
        for name, shape in checkpoint.weight_shapes().items()
    }
    copy.mkdir(exist_ok=True)
    for path in checkpoint.folder.iterdir():
        if path.is_file() and not path.name.endswith((".safetensors", ".safetensors.index.json", ".py")):
            shutil.copyfile(path, copy / path.name)
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"block_size": checkpoint.block_length}))


def make_model(engine: str, pretrained: str, model_args: str = "", max_active: int | None = None) -> Any:
    """Make the model that `lm_eval --model` makes, without stop tokens."""
    from lm_eval.api.registry import get_model

    autoload.install()
    settings = [f"pretrained={pretrained}", f"max_active={max_active}" if max_active else "", model_args]
    lm: Any = get_model(ENGINES[engine].model).create_from_arg_string(",".join(filter(None, settings)))
    lm.jobs.stop_ids = ()
    return lm


def load_questions(gsm8k_dir: str | None) -> Any:
    """Load GSM8K's test set from a folder; without a folder, the demo problems."""
    return gsm8k.load(gsm8k_dir=gsm8k_dir)["test"] if gsm8k_dir else gsm8k.load_demo()["test"]


def instance(number: int, doc: dict[str, Any], new_tokens: int, settings: dict[str, Any], front: str = "") -> Instance:
    """A request for exactly `new_tokens` new tokens; its prompt is the text `front`, then the question."""
    settings = {"max_gen_toks": new_tokens, "until": [], **settings}
    return Instance("generate_until", doc, (front + PROMPT.format(**doc), settings), 0, metadata=("gsm8k", number, 1))


def sampling(*, sample: bool) -> dict[str, Any]:
    """Settings that draw tokens at temperature 1, or that take the most probable token."""
    return {"do_sample": True, "temperature": 1.0} if sample else {"do_sample": False}
