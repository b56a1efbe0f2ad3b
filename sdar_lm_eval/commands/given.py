"""What options of this package's own commands have in common: pairs of name and value, lists of names, the engine."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence

from sdar_lm_eval.defaults import DEFAULT_CHECKPOINT
from sdar_lm_eval.engines.registry import ENGINES
from sdar_lm_eval.errors import UserError


def add_pairs(parser: argparse.ArgumentParser, option: str, meaning: str) -> None:
    """Declare an option whose words are each name=value,name=value or a JSON object; `meaning` is its help text."""
    parser.add_argument(option, nargs="+", action="extend", default=[], metavar="NAME=VALUE", help=meaning)


def pairs(option: str, words: Sequence[str]) -> dict[str, object]:
    """Return the settings that an option's words give: name -> value, parsed as lm_eval parses its own options.

    Raises:
        UserError: a word is neither name=value nor a JSON object.
    """
    found: dict[str, object] = {}
    for word in words:
        try:
            if word.lstrip().startswith("{"):
                found |= json.loads(word)
            elif "[" not in word and not all("=" in part for part in filter(None, word.split(","))):
                raise ValueError("a part has no =")
            else:
                found |= _reader()(word)
        except (ValueError, TypeError) as error:
            raise UserError(
                f"{option} {word}: cannot be read ({error}). Give name=value, several separated by commas, or JSON."
            ) from error
    return found


def names(text: str) -> list[str]:
    """Return the names in a text that separates names by commas, as an argument's type."""
    return [name for part in text.split(",") if (name := part.strip())]


def _reader() -> Callable[[str], dict[str, object]]:
    """lm_eval's parser of name=value,name=value; the parser's module depends on lm_eval's version."""
    try:
        from lm_eval._cli.utils import key_val_to_dict
    except ImportError:
        from lm_eval.utils import simple_parse_args_string

        return simple_parse_args_string
    reader: Callable[[str], dict[str, object]] = key_val_to_dict
    return reader


def add_engine(parser: argparse.ArgumentParser) -> None:
    """Declare the options that name an engine and the engine's model_args."""
    models = {spec.model: name for name, spec in ENGINES.items()}
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--engine", choices=list(ENGINES), default="native", help="default: native")
    which.add_argument(
        "--model",
        choices=list(models),
        help="the engine, by the name of lm_eval's model: " + ", ".join(models),
        metavar="MODEL",
    )
    add_pairs(
        parser, "--model_args", f"as lm_eval's: pretrained (default: {DEFAULT_CHECKPOINT}), device, dtype, seed, …"
    )


def engine_of(arguments: argparse.Namespace) -> str:
    """Return the name of the engine that the options of `add_engine` name."""
    if arguments.model is None:
        return str(arguments.engine)
    return next(name for name, spec in ENGINES.items() if spec.model == arguments.model)
