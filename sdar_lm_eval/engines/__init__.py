"""The engines: `native` is our own, `adapters` drive others. All keep to the protocol of `types.py`."""
