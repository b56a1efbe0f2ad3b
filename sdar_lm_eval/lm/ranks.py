"""Data parallel runs: one process a GPU, started by `accelerate launch` or `torchrun`; lm_eval splits the documents.

The processes exchange only counts and finished answers, so they use gloo on the host, whatever the engine's device is.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from sdar_lm_eval.cores import own_cores
from sdar_lm_eval.errors import EngineError, OtherRankError, UserError
from sdar_lm_eval.files import shown

logger = logging.getLogger(__name__)

SAME_ON_ALL_RANKS = (
    "sdar_lm_eval.checkpoint", "sdar_lm_eval.settings", "sdar_lm_eval.spellings", "sdar_lm_eval.lm.jobs",
)  # fmt: skip
"""Loggers whose messages are the same on all ranks, so that rank 0 alone logs them."""

# All ranks must connect within PATIENCE_AT_START. After that, a rank waits for the slowest rank, however uneven the
# documents are. If a rank dies, the launcher ends the others.
PATIENCE_AT_START = datetime.timedelta(minutes=10)
PATIENCE = datetime.timedelta(days=7)

T = TypeVar("T")


class Ranks:
    """This process among the processes of the run; the only one where no launcher started several.

    Raises:
        EngineError: the other processes cannot be reached.
    """

    def __init__(self) -> None:
        self.rank = int(os.environ.get("RANK", 0))
        self.world_size = int(os.environ.get("WORLD_SIZE", 1))
        self.local_rank = int(os.environ.get("LOCAL_RANK", 0))
        self.one_machine = int(os.environ.get("LOCAL_WORLD_SIZE", self.world_size)) == self.world_size
        if self.world_size == 1:
            if "RANK" not in os.environ and "MASTER_ADDR" in os.environ and "ACCELERATE_USE_CPU" in os.environ:
                logger.warning(
                    "This is the only process: without several GPUs, `accelerate launch --num_processes N` starts one. "
                    "For N on the CPU, add --multi_gpu in the place of --cpu, or use `torchrun --nproc_per_node N`."
                )
            return
        if not dist.is_initialized():
            try:
                dist.init_process_group("gloo", timeout=PATIENCE_AT_START)
            except (ValueError, RuntimeError) as error:
                raise EngineError(
                    f"WORLD_SIZE is {self.world_size}, but the other processes cannot be reached ({error}). Start them "
                    "all with accelerate launch or torchrun, or unset WORLD_SIZE to run alone."
                ) from error
            atexit.register(dist.destroy_process_group)
        self._group = dist.new_group(backend="gloo", timeout=PATIENCE)

    def log_errors_only(self) -> None:
        """Have a rank above 0 log errors only, while the model opens as it does on rank 0."""
        if self.rank > 0:
            logging.getLogger("sdar_lm_eval").setLevel(logging.ERROR)

    def log_own_warnings(self) -> None:
        """Have a rank above 0 log warnings of what is not the same on all ranks, with the rank's number."""
        if self.rank == 0:
            return
        logging.getLogger("sdar_lm_eval").setLevel(logging.WARNING)
        for name in SAME_ON_ALL_RANKS:
            logging.getLogger(name).setLevel(logging.ERROR)

        def add_number(record: logging.LogRecord) -> bool:
            if record.name.startswith("sdar_lm_eval") and not hasattr(record, "rank"):
                record.rank = self.rank
                record.msg = f"rank {self.rank}: {record.msg}"
            return True

        for handler in (*logging.getLogger("lm_eval").handlers, *logging.getLogger().handlers):
            handler.addFilter(add_number)

    def device_of_rank(self, device: str) -> str:
        """Return the device that the user named; where the user named no GPU, one for each rank of a machine."""
        if self.world_size > 1 and device in ("auto", "cuda") and torch.cuda.is_available():
            return f"cuda:{self.local_rank % torch.cuda.device_count()}"
        return device

    def path_of_rank(self, path: Path) -> Path:
        """Return the path of a file that each rank writes: with the rank's number where there are several."""
        return path if self.world_size == 1 else Path(f"{path}.rank{self.rank}")

    def share_cpu(self) -> None:
        """Divide the CPU's cores among the ranks of this machine, unless the user set OMP_NUM_THREADS above 1.

        torchrun sets OMP_NUM_THREADS to 1 where the user did not. Undivided, each rank would use all cores.
        """
        if self.world_size > 1 and os.environ.get("OMP_NUM_THREADS", "1") == "1":
            torch.set_num_threads(own_cores())

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Concatenate each rank's tensor, on the tensor's device; a scalar counts as one element.

        Raises:
            OtherRankError: another process ended.
        """
        if self.world_size == 1:
            return tensor
        own = tensor.reshape(-1).cpu()
        parts = [torch.empty_like(own) for _ in range(self.world_size)]
        with self._exchange():
            dist.all_gather(parts, own, group=self._group)
        return torch.cat(parts).to(tensor.device)

    def gather_object(self, obj: T, dst: int = 0) -> list[T] | None:
        """Collect each rank's object on rank `dst`; None on the others.

        Raises:
            OtherRankError: another process ended.
        """
        if self.world_size == 1:
            return [obj]
        collected = [obj] * self.world_size if self.rank == dst else None  # gather_object replaces each
        with self._exchange():
            dist.gather_object(obj, collected, dst=dst, group=self._group)
        return collected

    def barrier(self) -> None:
        """Wait for all ranks.

        Raises:
            OtherRankError: another process ended.
        """
        if self.world_size > 1:
            with self._exchange():
                dist.barrier(group=self._group)

    def require_same(self, facts: Mapping[str, object]) -> None:
        """Raise on rank 0 if a rank has another value of a fact.

        Machines may have different files, versions and commands.

        Raises:
            UserError: a rank has another value.
            OtherRankError: another process ended.
        """
        for rank, theirs in enumerate(self.gather_object(facts) or []):
            others = [name for name in facts if name in theirs and theirs[name] != facts[name]]
            told = "; ".join(f"{name} is {shown(theirs[name])} there, {shown(facts[name])} here" for name in others)
            if told:
                raise UserError(
                    f"Rank {rank} would give other answers than rank 0: {told}. Give all machines the same checkpoint, "
                    "versions and command."
                )

    @contextlib.contextmanager
    def _exchange(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # gloo's, for a closed connection
            raise OtherRankError(
                f"Another process of the run ended, so rank {self.rank} ends too. The message of the other process, or "
                "the report of the launcher, says why. answers=FOLDER or --use_cache FILE keeps finished answers."
            ) from error
