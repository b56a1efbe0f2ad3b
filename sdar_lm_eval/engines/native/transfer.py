"""Copies arrays from the host to the device, and selects the device."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

Scalar = TypeVar("Scalar", bound=np.generic)


def to_device(array: NDArray[Scalar], device: torch.device) -> torch.Tensor:
    """Copy an array to the device. A copy to a GPU is asynchronous: the host does not wait for it."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Make a GPU the current one. Triton launches on the current GPU, even if the tensors are on another one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
