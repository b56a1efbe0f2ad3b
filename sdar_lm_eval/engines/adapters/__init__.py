"""Engines of others behind the protocol of `engines/base.py`; what they share is in `common.py`."""
