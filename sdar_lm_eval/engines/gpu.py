"""What the engines share that run on GPUs only, and in half precision: device, dtype, what they refuse alike."""

from __future__ import annotations

import contextlib
import importlib.metadata
import multiprocessing
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from sdar_lm_eval.checkpoint import Checkpoint
from sdar_lm_eval.engines.base import GenerationRequest
from sdar_lm_eval.errors import UserError

DTYPES = ("bfloat16", "float16")


def gpu_named(device: str, engine: str) -> torch.device:
    """Turn a device's name into a GPU that is there, with its number; "auto" and "cuda" are the current one.

    Raises:
        UserError: not a device's name, not a GPU, or one that this machine does not have.
    """
    try:
        resolved = torch.device("cuda" if device == "auto" else device)
    except RuntimeError as error:
        raise UserError(f"device={device!r} is unknown; choose cuda, cuda:N or auto.") from error
    if resolved.type != "cuda":
        raise UserError(f"device={device!r}: {engine} runs on a GPU only; choose cuda or cuda:N, or use --model sdar.")
    index = torch.cuda.current_device() if resolved.index is None else resolved.index
    if index >= torch.cuda.device_count():
        raise UserError(f"device={device!r}: this machine has {torch.cuda.device_count()} usable GPU(s).")
    return torch.device("cuda", index)


def check_tensor_parallel(size: int) -> None:
    """Refuse more GPUs for a model than this machine has.

    Raises:
        UserError: it has fewer.
    """
    if size > (gpus := torch.cuda.device_count()):
        raise UserError(f"tensor_parallel_size={size}: this machine has {gpus} usable GPU(s).")


def half_precision(dtype: str, checkpoint: Checkpoint, engine: str) -> str:
    """The name of a dtype of `DTYPES`; "auto" is the checkpoint's own where it is one of them, else bfloat16.

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


def check_lengths(requests: Iterable[GenerationRequest], limit: int, who: str) -> None:
    """Refuse requests that have no place; `who` ("checkpoint 'x' has") names whose limit it is.

    Raises:
        UserError: one is too long.
    """
    for request in requests:
        if request.longest > limit:
            raise UserError(
                f"a request of {len(request.prompt_ids):,} prompt and {request.max_new_tokens:,} new tokens needs "
                f"{request.longest:,} places in whole blocks; {who} {limit:,}. Lower max_gen_toks or max_length."
            )


def world_size() -> int:
    """Processes of a data parallel run; 1 where there is none."""
    import torch.distributed as dist

    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@contextlib.contextmanager
def processes_started() -> Iterator[list[BaseProcess]]:
    """A list that gets the processes that were started within, also where that ended with an error."""
    others = multiprocessing.active_children()
    started: list[BaseProcess] = []
    try:
        yield started
    finally:
        started += [process for process in multiprocessing.active_children() if process not in others]


def end_processes(processes: Iterable[BaseProcess], patience: float) -> None:
    """Wait so many seconds for processes to end by themselves, then kill them: they hold a GPU's memory."""
    deadline = time.monotonic() + patience
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()


def version_of(package: str) -> str | None:
    """Version of an installed package, or of its module where pip does not know it; None where neither is there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        module: Any = sys.modules.get(package.removesuffix("-python").replace("-", "_"))
        return getattr(module, "__version__", None)


def listed(values: Sequence[Any]) -> str:
    """Values as a message has them."""
    return ", ".join(map(str, values))
