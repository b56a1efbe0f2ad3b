"""The engines, one file or folder each; all they share is `base.py`."""
