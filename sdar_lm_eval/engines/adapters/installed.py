"""Which version of a package is installed, and what is missing beside it."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from sdar_lm_eval.errors import EngineError


@dataclass(frozen=True)
class Installed:
    """An installed package: its version, and its commit where pip knows it."""

    version: str
    commit: str | None


def installed(package: str) -> Installed | None:
    """pip's record of a package; None where pip did not install it."""
    try:
        distribution = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return None
    origin = json.loads(distribution.read_text("direct_url.json") or "{}")
    return Installed(distribution.version, origin.get("vcs_info", {}).get("commit_id"))


def is_there(module: str) -> bool:
    """Whether a module can be found; it is not imported."""
    return importlib.util.find_spec(module) is not None


def check_nothing_is_missing(model: str, missing: Collection[str], install: str, note: str = "") -> None:
    """Refuse to go on without what an engine needs.

    Raises:
        EngineError: names all that is missing, and how to install it.
    """
    if missing:
        raise EngineError(f"--model {model} lacks {', '.join(missing)}.{note} {install}")


@contextlib.contextmanager
def import_errors(package: str, remedy: str) -> Iterator[None]:
    """Turn any error of an import into one that says what to do.

    Raises:
        EngineError: the import failed.
    """
    try:
        yield
    except Exception as error:
        raise EngineError(f"{package} cannot be imported: {type(error).__name__}: {error}. {remedy}") from error


def version_of(package: str) -> str | None:
    """Version of a package as pip recorded it, else as its imported module says; None where neither is there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        module = sys.modules.get(package.removesuffix("-python").replace("-", "_"))
        return getattr(module, "__version__", None)
