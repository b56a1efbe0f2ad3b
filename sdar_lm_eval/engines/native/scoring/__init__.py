"""Log-likelihoods on the device."""

from sdar_lm_eval.engines.native.scoring.scoring import Limits, Scoring

__all__ = ["Limits", "Scoring"]
