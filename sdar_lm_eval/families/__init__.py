"""The model families, one file each: a file in this folder is a family, and is listed nowhere else.

torch and transformers are not imported: a checkpoint says what it is without them.
"""

from __future__ import annotations

import importlib
import pkgutil

from sdar_lm_eval.family import Family


def discover() -> dict[str, Family]:
    """The FAMILIES of each module of this package, by the `model_type` of config.json."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    found = [importlib.import_module(f"{__name__}.{name}").FAMILIES for name in names]
    return {family.model_type: family for families in found for family in families}


FAMILIES = discover()
"""model_type of config.json -> family."""
