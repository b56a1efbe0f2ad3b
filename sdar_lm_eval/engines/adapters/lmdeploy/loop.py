"""An asyncio event loop in a thread of its own, for LMDeploy's engine."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


class _DaemonThreads(ThreadPoolExecutor):
    """Runs each call in a daemon thread, which Python does not wait for when it ends.

    LMDeploy always has a call that waits for its worker processes. Python waits for the threads of a usual executor
    before it calls the functions that end these processes (`atexit`), and so would wait for ever.
    """

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(fn(*args, **kwargs))
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=run, name="lmdeploy-wait", daemon=True).start()
        return future


class LoopThread:
    """Runs coroutines for other threads; the engine works on while these threads are busy with its answers.

    Args:
        device: the GPU that becomes current in the thread; torch has a current GPU for each thread.
    """

    def __init__(self, device: torch.device) -> None:
        self._loop = asyncio.new_event_loop()
        self._loop.set_default_executor(_DaemonThreads())
        self._device = device
        self._thread = threading.Thread(target=self._run, name="lmdeploy", daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[object, object, T], timeout: float | None = None) -> T:
        """Wait for a coroutine's result.

        Raises:
            TimeoutError: the coroutine took longer than `timeout` seconds.
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
