"""Triton kernels: `decoder.py` for any GPU, `hopper.py` for Hopper GPUs. Needs triton."""
