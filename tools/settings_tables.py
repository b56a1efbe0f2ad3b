"""Writes the tables of docs/settings.md from the package's docstrings, types and defaults.

    python tools/settings_tables.py

A table follows its marker: <!-- table: NAME -->, where NAME is one of `TABLES`.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

from sdar_lm_eval import arguments
from sdar_lm_eval.decoding import DecodingConfig
from sdar_lm_eval.engines.registry import ENGINES
from sdar_lm_eval.settings import DEFAULT_MAX_GEN_TOKS
from sdar_lm_eval.spellings import ALIASES

PAGE = Path(__file__).parents[1] / "docs" / "settings.md"
TABLE = re.compile(r"^<!-- table: (\w+) -->\n\n(?:(?:\|.*\n)+\n)?", re.MULTILINE)
DEFAULTS = {
    field.name: field.default for field in dataclasses.fields(DecodingConfig) if field.default is not None
} | {
    "block_length": "the checkpoint's",
    "denoising_steps": "block_length",
    "temperature": "greedy",
    "do_sample": "whether temperature is above 0",
    "max_gen_toks": DEFAULT_MAX_GEN_TOKS,
    "until": "none",
}  # fmt: skip
"""Decoding setting -> its default in an evaluation."""


def rows(lines: Iterable[tuple[object, ...]], *titles: str) -> str:
    """A table of Markdown."""
    cells = [[str(cell).replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in [list(titles), ["---"] * len(titles), *cells])


def names(setting: str) -> str:
    """A setting's name and its short names, as code."""
    return ", ".join(f"`{name}`" for name in (setting, *(short for short, full in ALIASES.items() if full == setting)))


def kind(annotation: object) -> str:
    """A type, as users write it."""
    if get_origin(annotation) is Literal:
        parts = [str(value) for value in get_args(annotation)]
    else:
        parts = re.sub(r"\b(typing|pathlib|collections\.abc)\.", "", inspect.formatannotation(annotation)).split(" | ")
    return " or ".join(f"`{part}`" for part in parts)


def decoding() -> str:
    """The decoding settings."""
    described = arguments.decoding_descriptions()
    types = get_type_hints(arguments.DecodingArguments)
    lines = [(names(name), kind(types[name]), DEFAULTS.get(name, ""), described[name]) for name in types]
    return rows(lines, "setting", "type", "default", "meaning")


def own(of: type[object]) -> str:
    """The keys of a TypedDict that its bases lack."""
    described, types = arguments.descriptions(of), get_type_hints(of)
    return rows([(f"`{name}`", kind(types[name]), described[name]) for name in of.__annotations__ if name in described],
                "setting", "type", "meaning")  # fmt: skip


TABLES: dict[str, Callable[[], str]] = {
    "aliases": lambda: rows([(f"`{short}`", f"`{full}`") for short, full in ALIASES.items()], "short name", "setting"),
    "decoding": decoding,
    "model": lambda: own(arguments.ModelArguments),
    **{name: (lambda spec=spec: own(getattr(arguments, spec.arguments))) for name, spec in ENGINES.items()},
}


def with_tables(markdown: str) -> str:
    """A page with its tables as they have to be.

    Raises:
        KeyError: no table has the name.
    """
    return TABLE.sub(lambda found: f"<!-- table: {found[1]} -->\n\n{TABLES[found[1]]()}\n\n", markdown)


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text("utf-8")), "utf-8")
