"""The model families, one file each. A file in this folder, but `base.py`, is a family; no other list
names it.

No file imports torch or transformers at its top: a checkpoint is described without these packages.
"""

from __future__ import annotations

import importlib
import pkgutil

from sdar_lm_eval.families.base import Family


def discover() -> dict[str, Family]:
    """Import the FAMILIES of each module of this package; model_type of config.json -> family."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name != "base")
    found = [importlib.import_module(f"{__name__}.{name}").FAMILIES for name in names]
    return {family.model_type: family for families in found for family in families}


FAMILIES = discover()
"""model_type of config.json -> family."""
