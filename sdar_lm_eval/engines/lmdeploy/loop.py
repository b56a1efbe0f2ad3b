"""An asyncio event loop in a thread of its own, where LMDeploy's engine lives."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

import torch

T = TypeVar("T")


class LoopThread:
    """Runs coroutines for other threads; the engine goes on working while they are busy with its answers.

    Args:
        device: the thread's current GPU, which torch keeps for each thread.
    """

    def __init__(self, device: torch.device) -> None:
        self._loop = asyncio.new_event_loop()
        self._device = device
        self._thread = threading.Thread(target=self._run, name="lmdeploy", daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, T], timeout: float | None = None) -> T:
        """Wait for a coroutine's result.

        Raises:
            TimeoutError: it took longer than `timeout` seconds.
        """
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(timeout)

    def close(self) -> None:
        """Stop the thread."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)

    def _run(self) -> None:
        torch.cuda.set_device(self._device)
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
        self._loop.close()
