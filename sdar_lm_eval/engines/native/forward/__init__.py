"""Tokens through the model. `base.py` says what a forward is; `modules.py` and `fused.py` are the two ways."""
