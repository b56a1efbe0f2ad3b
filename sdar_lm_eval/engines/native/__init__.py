"""The native engine: needs only torch and transformers, on the CPU or on CUDA. Requests enter in `engine.py`."""
