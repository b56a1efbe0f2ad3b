"""Copies arrays from the host to the device."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

Scalar = TypeVar("Scalar", bound=np.generic)


def to_device(array: NDArray[Scalar], device: torch.device) -> torch.Tensor:
    """Copy an array to the device. A copy to a GPU is asynchronous: the host does not wait for it."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)
