"""The kernels that are written in Gluon, which Triton has from version 3.6 on; None with an older Triton."""

from __future__ import annotations

from typing import Any

hopper: Any
hopper_attention: Any
try:
    from sdar_lm_eval.engines.native.kernels import hopper, hopper_attention
except (ImportError, AttributeError):
    hopper = hopper_attention = None
