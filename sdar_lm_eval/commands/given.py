"""Reads what `--model_args` and `--gen_kwargs` have on this package's own commands."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import cast

from sdar_lm_eval.defaults import DEFAULT_CHECKPOINT
from sdar_lm_eval.engines.registry import ENGINES
from sdar_lm_eval.errors import UserError


def add_pairs(parser: argparse.ArgumentParser, option: str, meaning: str) -> None:
    """Declare an option that takes settings: name=value,name=value, several of these, or a JSON object."""
    parser.add_argument(option, nargs="+", action="extend", default=[], metavar="NAME=VALUE", help=meaning)


def pairs(option: str, words: Sequence[str]) -> dict[str, object]:
    """Return the settings that an option's words give, as lm_eval reads them.

    Raises:
        UserError: a word is neither name=value nor a JSON object.
    """
    from lm_eval.utils import simple_parse_args_string

    found: dict[str, object] = {}
    for word in words:
        if word.lstrip().startswith("{"):
            try:
                found |= cast("dict[str, object]", json.loads(word))
            except ValueError as error:
                raise UserError(f"{option} {word}: no valid JSON ({error}).") from error
            continue
        for part in filter(None, word.split(",")):
            if not part.partition("=")[0].strip() or "=" not in part:
                raise UserError(f"{option} {part!r}: give name=value, several separated by commas.")
        found |= simple_parse_args_string(word)
    return found


def add_engine(parser: argparse.ArgumentParser) -> None:
    """Declare the options that name an engine, and what it is loaded with."""
    models = {spec.model: name for name, spec in ENGINES.items()}
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--engine", choices=list(ENGINES), default="native", help="default: native")
    which.add_argument(
        "--model", choices=list(models), help="the same by the model's name: " + ", ".join(models), metavar="MODEL"
    )
    add_pairs(
        parser, "--model_args", f"as lm_eval's: pretrained (default: {DEFAULT_CHECKPOINT}), device, dtype, seed, …"
    )


def engine_of(arguments: argparse.Namespace) -> str:
    """Return the name of the engine that the options of `add_engine` name."""
    if arguments.model is None:
        return str(arguments.engine)
    return next(name for name, spec in ENGINES.items() if spec.model == arguments.model)
