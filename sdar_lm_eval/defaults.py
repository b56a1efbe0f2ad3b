"""Defaults that more than one layer needs."""

DEFAULT_BLOCK_LENGTH = 4
"""Tokens that SDAR's first checkpoints denoise together; `generate.py`'s default too."""
DEFAULT_CHECKPOINT = "JetLM/SDAR-4B-Chat"
DEFAULT_SEED = 1234  # lm_eval's default for torch
