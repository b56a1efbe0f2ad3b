"""Resolves the native engine's options: names of devices and dtypes to torch's objects."""

from __future__ import annotations

import importlib.util
import os

import torch

from sdar_lm_eval.checkpoint import DTYPES, Checkpoint
from sdar_lm_eval.checks import check_bool
from sdar_lm_eval.errors import UserError

DEVICE_TYPES = ("cpu", "cuda")


def resolve_device(device: str) -> torch.device:
    """Turn a device's name into a torch device of this machine.

    Raises:
        UserError: the name is unknown, or this machine has no such GPU.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
        if resolved.type not in DEVICE_TYPES:
            raise ValueError
    except (RuntimeError, ValueError):
        raise UserError(f"device={device!r} is unknown; choose cpu, cuda, cuda:N or auto.") from None
    if resolved.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (resolved.index or 0) >= count:
            raise UserError(f"device={device!r}: this machine has {count or 'no'} usable GPU(s); choose "
                            f"{', '.join(f'cuda:{i}' for i in range(count)) or 'cpu'} or auto.")  # fmt: skip
    return resolved


def resolve_kernels(kernels: bool | None, device: torch.device) -> bool:
    """Whether to use Triton kernels; None: on GPUs of compute capability 8.0 and later, where triton is installed.

    Raises:
        UserError: `kernels` is true, and triton or a GPU is missing.
    """
    installed = importlib.util.find_spec("triton") is not None
    if kernels is None:
        return installed and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    kernels = check_bool("kernels", kernels)
    if kernels and not installed:
        raise UserError("kernels=true needs triton, which is not installed: pip install triton")
    if kernels and device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise UserError(
            f"kernels=true needs a GPU, and the device is {device}; leave kernels out, or give kernels=false."
        )
    return kernels


def resolve_dtype(dtype: str, device: torch.device, checkpoint: Checkpoint) -> torch.dtype:
    """Turn a dtype's name into the dtype; "auto" is float32 on the CPU and the checkpoint's own on a GPU.

    Raises:
        UserError: the dtype is not one of `DTYPES`.
    """
    if dtype == "auto":
        own = checkpoint.config.get("torch_dtype") or checkpoint.config.get("dtype") or "bfloat16"
        dtype = "float32" if device.type == "cpu" else own
    dtype = dtype.removeprefix("torch.")
    if dtype not in DTYPES:
        raise UserError(f"dtype={dtype!r} is unknown; choose {', '.join(DTYPES)} or auto.")
    resolved: torch.dtype = getattr(torch, dtype)
    return resolved
