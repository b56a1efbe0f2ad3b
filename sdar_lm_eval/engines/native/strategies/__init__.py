"""The remasking strategies, one file each. A file in this folder, but `base.py`, is a strategy.

No list names strategies. Standard library only: settings, Modal's flags and the documentation's tests read names
without importing torch.
"""

from __future__ import annotations

from sdar_lm_eval.discovery import modules_in
from sdar_lm_eval.engines.native.strategies.base import Strategy


def discover() -> dict[str, Strategy]:
    """Import the STRATEGY of each module of this package; name -> strategy, in alphabetical order of the modules."""
    found = [module.STRATEGY for module in modules_in(__name__, __path__)]
    return {strategy.name: strategy for strategy in found}


STRATEGIES = discover()
"""Name -> strategy."""


def full_name(name: str) -> str:
    """The full name of a short name; any other text unchanged."""
    return next((strategy.name for strategy in STRATEGIES.values() if strategy.short == name), name)


def spellings() -> str:
    """All names, each with its short name."""
    return ", ".join(f"{s.name} (or {s.short})" if s.short else s.name for s in STRATEGIES.values())


def codes() -> dict[str, int]:
    """Name -> number that stands for the strategy in tensors."""
    return {name: code for code, name in enumerate(STRATEGIES)}
