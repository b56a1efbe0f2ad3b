"""The native engine: SDAR on torch and transformers alone, CPU and CUDA. `engine.py` is where a request enters."""
