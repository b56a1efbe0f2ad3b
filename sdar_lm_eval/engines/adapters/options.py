"""Options that all adapters take: a GPU, half precision, a share of memory, several GPUs."""

from __future__ import annotations

import torch

from sdar_lm_eval.checkpoint import Checkpoint
from sdar_lm_eval.checks import check_number, check_range
from sdar_lm_eval.engines.adapters.requests import listed
from sdar_lm_eval.errors import UserError

DTYPES = ("bfloat16", "float16")


def gpu_named(device: str, engine: str) -> torch.device:
    """Turn a device's name into a GPU of this machine, with its number; "auto" and "cuda" are the current GPU.

    Raises:
        UserError: the name is unknown, names no GPU, or names a GPU that this machine does not have.
    """
    try:
        resolved = torch.device("cuda" if device == "auto" else device)
    except RuntimeError as error:
        raise UserError(f"device={device!r} is unknown; choose cuda, cuda:N or auto.") from error
    if resolved.type != "cuda":
        raise UserError(f"device={device!r}: {engine} runs on a GPU only; choose cuda or cuda:N, or use --model sdar.")
    index = torch.cuda.current_device() if resolved.index is None else resolved.index
    if index >= (gpus := torch.cuda.device_count()):
        known = ", ".join(f"cuda:{each}" for each in range(gpus))
        raise UserError(f"device={device!r}: this machine has {gpus} usable GPU(s); choose {known} or auto.")
    return torch.device("cuda", index)


def to_share(name: str, value: float) -> float:
    """Read a fraction, given as a number or as text.

    Raises:
        UserError: the value is not between 0 and 1, both excluded.
    """
    share = check_number(name, value, whole=False)
    check_range(f"{name}={value}", 0 < share < 1, "above 0 and below 1")
    return share


def check_tensor_parallel(size: int) -> None:
    """Refuse to share a model among more GPUs than this machine has.

    Raises:
        UserError: the machine has fewer.
    """
    if size > (gpus := torch.cuda.device_count()):
        raise UserError(f"tensor_parallel_size={size}: this machine has {gpus} usable GPU(s). Give at most {gpus}.")


def half_precision(dtype: str, checkpoint: Checkpoint, engine: str) -> str:
    """The name of a dtype of `DTYPES`; "auto" is the checkpoint's own dtype if `DTYPES` has it, else bfloat16.

    Raises:
        UserError: another dtype.
    """
    dtype = dtype.removeprefix("torch.")
    own = str(checkpoint.config.get("torch_dtype") or checkpoint.config.get("dtype"))
    if dtype == "auto":
        return own if own in DTYPES else "bfloat16"
    if dtype not in DTYPES:
        raise UserError(f"dtype={dtype!r}: {engine} takes {listed(DTYPES)} or auto; for others use --model sdar.")
    return dtype


def world_size() -> int:
    """Number of processes of a data parallel run; 1 without data parallelism."""
    import torch.distributed as dist

    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
