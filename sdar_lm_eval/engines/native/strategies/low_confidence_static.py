"""low_confidence_static: the most confident positions, as many as the schedule says."""

from __future__ import annotations

from sdar_lm_eval.engines.native.strategies.base import Strategy

STRATEGY = Strategy(
    name="low_confidence_static",
    short="static",
    source="JetAstra/SDAR, generate.py (commit c2041a8)",
)
