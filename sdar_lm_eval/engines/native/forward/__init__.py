"""Forwards of the model. `base.py` is the interface; `modules.py` and `fused.py` are its two implementations."""
