"""Properties of the current GPU that kernels are sized by. Where there is no GPU, they are an H100's."""

from __future__ import annotations

import functools

import torch
import triton


def multiprocessors() -> int:
    """Number of streaming multiprocessors."""
    return _properties(torch.cuda.current_device())["multiprocessor_count"] if torch.cuda.is_available() else 132


def shared_memory() -> int:
    """Most bytes of shared memory that a program can have."""
    return _properties(torch.cuda.current_device())["max_shared_mem"] if torch.cuda.is_available() else 227 << 10


@functools.cache
def _properties(device: int) -> dict[str, int]:
    found: dict[str, int] = triton.runtime.driver.active.utils.get_device_properties(device)
    return found
