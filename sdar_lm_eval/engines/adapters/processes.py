"""Giving a GPU back: ending worker processes, and freeing memory."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import time
from collections.abc import Iterable, Iterator
from multiprocessing.process import BaseProcess

import torch


@contextlib.contextmanager
def processes_started() -> Iterator[list[BaseProcess]]:
    """A list that the processes started within this block are added to when the block ends, with an error or not."""
    others = multiprocessing.active_children()
    started: list[BaseProcess] = []
    try:
        yield started
    finally:
        started += [process for process in multiprocessing.active_children() if process not in others]


def end_processes(processes: Iterable[BaseProcess], patience: float) -> None:
    """Wait `patience` seconds, in all, for processes to end by themselves, then kill them: they hold a GPU's memory."""
    deadline = time.monotonic() + patience
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()


def return_memory() -> None:
    """Give a GPU's memory back that no tensor uses any more."""
    gc.collect()
    torch.cuda.empty_cache()
