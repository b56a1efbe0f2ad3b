"""Parts of a run that all engines share.

OneRun              refuses a run that begins during another, or on a closed engine
Closable            an engine's `close` and `with`
Failures            collects requests without an answer, for one error at the end of the run
Allowance           a limit that is lowered after an out-of-memory error, and raised again later
is_out_of_memory    whether an error says that memory ran out, on a GPU or on the CPU
warm_up_requests    short requests for which an engine compiles the kernels of the real requests
older_objects_frozen  keeps Python's collector from objects that are older than a run
peak_of_process     the most memory that this process has used
check_rope          refuses rotary frequencies that depend on the batch
check_tokens        refuses tokens that the checkpoint does not have
not_finite          why a request whose logits are not finite has no answer
environment         versions of the libraries that an engine uses
"""

from __future__ import annotations

import dataclasses
import gc
import importlib
import platform
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import transformers

from sdar_lm_eval.engines.types import GenerationRequest, Self
from sdar_lm_eval.errors import EngineError, UserError, listed

if TYPE_CHECKING:
    from sdar_lm_eval.checkpoint import Checkpoint

MOST_LISTED = 10  # requests that an error names
PATIENCE = 32  # full steps before the limit is raised; doubled by every cut


class OneRun:
    """Lets only one run at a time use an engine: two runs would write to the same state.

    A run holds the engine from the first `next` on its generator until the generator ends or is closed. Python closes a
    generator that has no references left.

    Args:
        engine: the engine's name, for the message.
    """

    def __init__(self, engine: str) -> None:
        self._engine = engine
        self._held = threading.Lock()  # no RLock: Python may close a generator, which releases the lock, in any thread
        self._closed = False
        self._unload: Callable[[], None] | None = None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Hold the engine.

        Raises:
            EngineError: another run holds the engine, or the engine is closed.
        """
        self._check_open()
        if not self._held.acquire(blocking=False):
            raise EngineError(
                f"the {self._engine} engine is in the middle of another run. Read the results of that run to the end, "
                "or close() its generator, before the next one begins; or open a second engine."
            )
        try:
            self._check_open()  # another thread may have closed the engine meanwhile
            yield
        finally:
            self._held.release()
            if self._closed:
                self._unload_once()

    def close(self, unload: Callable[[], None]) -> None:
        """Refuse further runs, and unload the engine once: now, or when the run that holds the engine ends."""
        if not self._closed:
            self._unload, self._closed = unload, True
        self._unload_once()

    def _check_open(self) -> None:
        if self._closed:
            raise EngineError(f"the {self._engine} engine is closed. Open another one.")

    def _unload_once(self) -> None:
        if self._held.acquire(blocking=False):
            try:
                unload, self._unload = self._unload, None
                if unload is not None:
                    unload()
            finally:
                self._held.release()


class Closable:
    """An engine that is open until `close` is called, or until a `with` block ends."""

    _one_run: OneRun

    def _unload(self) -> None:
        """Free all memory; `close` calls this once."""
        raise NotImplementedError

    def close(self) -> None:
        """See `Engine.close`."""
        self._one_run.close(self._unload)

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Failures:
    """Requests of a run that have no answer. The run answers all others; then one error names these requests."""

    def __init__(self) -> None:
        self._reasons: dict[str, list[int]] = {}

    def add(self, index: int, reason: str) -> None:
        """Add the request at this position, with the reason why it has no answer."""
        self._reasons.setdefault(reason, []).append(index)

    def raise_if_any(self, total: int) -> None:
        """Raise if any of the run's `total` requests has no answer.

        Raises:
            EngineError: some requests have no answer.
        """
        if not self._reasons:
            return
        failed = sum(map(len, self._reasons.values()))
        told = " ".join(
            f"Number {listed(sorted(indices), MOST_LISTED)}: {reason}" for reason, indices in self._reasons.items()
        )
        raise EngineError(
            f"{failed} of {total} requests have no answer; the other answers are kept (--use_cache). {told}"
        )


class Allowance:
    """A limit on the size of a step: cut when memory runs out, raised by a quarter after enough full steps.

    Each cut doubles the number of full steps before the next raise, so a limit that memory cannot hold is tried less
    and less often. The scheme follows congestion control in TCP (RFC 5681).

    Args:
        most: the initial limit, which is also the largest.

    Attributes:
        now: the current limit.
    """

    def __init__(self, most: int) -> None:
        self.now = self._most = most
        self._patience, self._full_steps = PATIENCE, 0

    def cut(self, to: int) -> None:
        """Lower the limit to this number, but not below 1."""
        self.now = max(to, 1)
        self._patience *= 2
        self._full_steps = 0

    def count_full_step(self) -> None:
        """Count a step that used the whole limit without an error."""
        if self.now == self._most:
            return
        self._full_steps += 1
        if self._full_steps >= self._patience:
            self._full_steps = 0
            self.now = min(self.now + max(self.now // 4, 1), self._most)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out.

    On a GPU, torch raises torch.OutOfMemoryError for its own allocations, and a RuntimeError for the driver's and
    cuBLAS's. On the CPU, torch raises a RuntimeError (c10/core/impl/alloc_cpu.cpp: "can't allocate memory", on Windows
    "not enough memory"), and numpy a MemoryError.
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    told = ("DefaultCPUAllocator: ", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDA out of memory")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in told)


def warm_up_requests(requests: Sequence[GenerationRequest], count: int) -> list[GenerationRequest]:
    """Short requests with the settings of the first of `requests`: answers of 1 to 3 blocks.

    The first has the longest of the prompts, so that kernels for its length are compiled too. The other prompts have
    two blocks. The first answer has three blocks, and of the others half have one and half have two: the batch shrinks
    in steps, and kernels are compiled for several batch sizes.

    Args:
        requests: at least one.
        count: number of requests to make.
    """
    length = requests[0].decoding.block_length
    longest = max(requests, key=lambda request: len(request.prompt_ids))
    most = max(request.longest for request in requests)  # the engine has memory for `requests` only

    def of(number: int) -> GenerationRequest:
        prompt = longest.prompt_ids if number == 0 else requests[0].prompt_ids[: 2 * length]
        blocks = 3 if number == 0 else 1 + number % 2
        new_tokens = min(length * blocks, most - len(prompt), longest.max_new_tokens if number == 0 else most)
        return dataclasses.replace(
            requests[0], prompt_ids=prompt, max_new_tokens=new_tokens, stop_strings=(), thinking=None, repetition=None
        )

    return [of(number) for number in range(count)]


@contextmanager
def older_objects_frozen() -> Iterator[None]:
    """Keep Python's collector from visiting objects that are older than this block, until the block ends.

    Compiling kernels leaves some hundred thousand objects. A full collection that visits them halts a run for half a
    second, several times. After the block the collector frees what nothing refers to, such as an engine in a cycle.
    Where a program has frozen objects itself, the block changes nothing: unfreezing would undo the program's choice.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def peak_of_process() -> int:
    """Most RAM that this process has used so far, in bytes."""
    try:
        import resource
    except ImportError:  # Windows
        psutil = importlib.import_module("psutil")  # a requirement of accelerate
        return int(psutil.Process().memory_info().peak_wset)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


def environment(device: torch.device, libraries: Mapping[str, str | None] | None = None) -> dict[str, str | None]:
    """Versions of torch, transformers, `libraries` (name -> version) and Python; on CUDA the GPU's name."""
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        **(libraries or {}),
        "python": platform.python_version(),
        **({"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}),
    }


def not_finite(dtype: str) -> str:
    """The reason why a request whose logits are not finite has no answer, and what to do."""
    return (
        f"the model's logits are not finite numbers (dtype {dtype.removeprefix('torch.')}). float16 overflows in some "
        "models: use dtype=bfloat16 or float32. Else the weights are bad."
    )


def check_tokens(texts: Iterable[tuple[int, ...]], checkpoint: Checkpoint) -> None:
    """Raise unless the checkpoint has all tokens of the texts. On a GPU, CUDA would fail until the process ends.

    Raises:
        UserError: a text has another token.
    """
    vocabulary = checkpoint.vocabulary
    for text in {id(text): text for text in texts}.values():  # requests can share a text, such as a long context
        for token in (min(text), max(text)):
            if not 0 <= token < vocabulary:
                raise UserError(f"a request has the token {token}: {checkpoint.name} has tokens 0 to {vocabulary - 1}.")


def check_rope(checkpoint: Checkpoint) -> None:
    """Refuse a rotary embedding whose frequencies depend on the longest sequence of a batch.

    With it, an answer would depend on the rest of the batch. Source: dynamic_rope_update in transformers'
    modeling_rope_utils.py, which recomputes the frequencies of "dynamic" types and of longrope. All other types have
    constant frequencies.

    Raises:
        UserError: the checkpoint has such a rotary embedding.
    """
    for key in ("rope_parameters", "rope_scaling"):
        rope = checkpoint.config.get(key)
        if not isinstance(rope, Mapping):
            continue
        kind = str(rope.get("rope_type", rope.get("type", "default")))
        if "dynamic" in kind or kind == "longrope":
            raise UserError(
                f"checkpoint {checkpoint.name!r} has rope_type={kind!r} in its config.json: its rotary frequencies "
                "depend on the longest sequence of a batch, so an answer would depend on the other requests. Choose "
                "a type with constant frequencies (default, linear, yarn, llama3)."
            )
