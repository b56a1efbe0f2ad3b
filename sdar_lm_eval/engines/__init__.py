"""The engines: `native` is our own, `adapters` drive others; all of them keep to `base.py`, and share `runs.py`."""
