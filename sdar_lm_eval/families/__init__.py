"""The model families, one file each. A file in this folder, but `base.py`, is a family.

No list names families. No file imports torch or transformers at its top: a checkpoint is described without these
packages.
"""

from __future__ import annotations

from sdar_lm_eval.discovery import modules_in
from sdar_lm_eval.families.base import Family


def discover() -> dict[str, Family]:
    """Import the FAMILIES of each module of this package; model_type of config.json -> family."""
    found = [module.FAMILIES for module in modules_in(__name__, __path__)]
    return {family.model_type: family for families in found for family in families}


FAMILIES = discover()
"""model_type of config.json -> family."""
