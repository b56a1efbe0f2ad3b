"""Finds the extensions in a package whose files no list names: each file is one extension."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable
from types import ModuleType


def modules_in(package: str, path: Iterable[str]) -> list[ModuleType]:
    """Import each module of a package but `base`, in alphabetical order.

    Args:
        package: the package's name.
        path: the package's `__path__`.
    """
    names = sorted(module.name for module in pkgutil.iter_modules(path) if module.name != "base")
    return [importlib.import_module(f"{package}.{name}") for name in names]
