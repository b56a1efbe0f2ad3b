"""No circle of imports: neither at the top of a module, nor in a function, nor for types alone."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from support import ROOT

PACKAGE = ROOT / "sdar_lm_eval"
# What fills a package's lazy names, which nothing inside the package imports from it.
LAZY = {"sdar_lm_eval"}


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path, known: set[str]) -> Iterator[str]:
    """The package's modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            found = name if name in known else name.rpartition(".")[0]
            if found in known:
                yield found


def graph(folder: Path = PACKAGE) -> dict[str, set[str]]:
    files = {module_of(path): path for path in sorted(folder.rglob("*.py"))}
    return {name: set(imported(path, set(files))) - LAZY - {name} for name, path in files.items()}


def test_nothing_imports_what_imports_it() -> None:
    try:
        TopologicalSorter(graph()).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(reversed(error.args[1])))


def test_every_kind_of_import_is_seen() -> None:
    """A function's, one for types, and one of a module by its package."""
    seen = graph()
    assert "sdar_lm_eval.engines.native.kernels.drawing" in seen["sdar_lm_eval.engines.native.drawing"]
    assert "sdar_lm_eval.checkpoint" in seen["sdar_lm_eval.engines.registry"]
    assert "sdar_lm_eval.engines.native.forward.graphs" in seen["sdar_lm_eval.engines.native.drawing"]
