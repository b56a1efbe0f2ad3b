"""A hook of mkdocs (mkdocs.yml) that makes pages from the package: tables of settings, and the tasks' page.

<!-- table: NAME -->    in a page: becomes the table of `TABLES`
tasks.md                is sdar_lm_eval/tasks/README.md, with links as the site needs them
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Iterable
from importlib.metadata import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args, get_origin, get_type_hints

from sdar_lm_eval import arguments
from sdar_lm_eval.decoding import DecodingConfig
from sdar_lm_eval.engines.registry import ENGINES
from sdar_lm_eval.settings import ALIASES, DEFAULT_MAX_GEN_TOKS

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

ROOT = Path(__file__).parents[1]
TASKS = ROOT / "sdar_lm_eval" / "tasks" / "README.md"
TABLE = re.compile(r"^<!-- table: (\w+) -->$", re.MULTILINE)
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
    described = arguments.descriptions(DecodingConfig) | arguments.descriptions(arguments.DecodingArguments)
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
    """A page with its tables.

    Raises:
        KeyError: no table has the name.
    """
    return TABLE.sub(lambda found: TABLES[found[1]](), markdown)


def tasks_page(repository: str | None) -> str:
    """The tasks' page, with links that hold on the site.

    Args:
        repository: address of the repository's files, to which links to code lead; None: such links become text.
    """

    def link(found: re.Match[str]) -> str:
        text, target = found[1], found[2]
        if target.startswith(("#", "http")):
            return found[0]
        path, _, anchor = target.partition("#")
        file = (TASKS.parent / path).resolve().relative_to(ROOT)
        if file.parts[0] == "docs":
            return f"[{text}]({'/'.join(file.parts[1:])}{'#' + anchor if anchor else ''})"
        return f"[{text}]({repository}{file})" if repository else text

    return re.sub(r"\[([^]]+)\]\(([^)\s]+)\)", link, TASKS.read_text("utf-8"))


def on_page_markdown(markdown: str, **_: object) -> str:
    """Put tables into a page."""
    return with_tables(markdown)


def repository() -> str | None:
    """Address of the repository in the package's metadata; None if there is none yet."""
    named = dict(entry.split(", ", 1) for entry in metadata("sdar-lm-eval").get_all("Project-URL") or [])
    address = named.get("Repository", "")
    return None if not address or ".invalid" in address else address.rstrip("/")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Link the site to the repository."""
    config.repo_url = repository()
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the tasks' page."""
    from mkdocs.structure.files import File

    code = config.repo_url and f"{config.repo_url}/blob/main/"
    files.append(File.generated(config, "tasks.md", content=tasks_page(code)))
    return files
