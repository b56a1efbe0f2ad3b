"""Data parallel runs: one process a GPU, started by `accelerate launch` or `torchrun`; lm_eval splits the documents.

The processes exchange only counts and finished answers, so they talk over gloo on the host, whatever the engine's
device is.
"""

from __future__ import annotations

import atexit
import datetime
import logging
import os
from typing import Any

from sdar_lm_eval.errors import EngineError

logger = logging.getLogger(__name__)

# All ranks must be there within the first; after that a rank waits for the slowest one, however uneven the documents
# are. A rank that dies is the launcher's business.
PATIENCE_AT_START = datetime.timedelta(minutes=10)
PATIENCE = datetime.timedelta(days=7)


class Ranks:
    """This process among those of the run; alone where no launcher started several.

    Raises:
        EngineError: the other processes cannot be reached.
    """

    def __init__(self) -> None:
        self.rank = int(os.environ.get("RANK", 0))
        self.world_size = int(os.environ.get("WORLD_SIZE", 1))
        self.local_rank = int(os.environ.get("LOCAL_RANK", 0))
        if self.world_size == 1:
            if "RANK" not in os.environ and "MASTER_ADDR" in os.environ and "ACCELERATE_USE_CPU" in os.environ:
                logger.warning(
                    "This is the only process: without several GPUs, `accelerate launch --num_processes N` starts one. "
                    "For N on the CPU, add --multi_gpu in the place of --cpu, or use `torchrun --nproc_per_node N`."
                )
            return
        import torch.distributed as dist

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

    def share_cpu(self) -> None:
        """Divide the CPU's cores among the ranks of this machine, unless OMP_NUM_THREADS says more than 1.

        torchrun sets it to 1 where the user did not; without it, each rank would take all cores.
        """
        if self.world_size > 1 and os.environ.get("OMP_NUM_THREADS", "1") == "1":
            import torch

            ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", self.world_size))
            torch.set_num_threads(max(1, _cores() // ranks_here))

    def all_gather(self, tensor: Any) -> Any:
        """Concatenate each rank's tensor, on the device it came from; a scalar counts as one element."""
        if self.world_size == 1:
            return tensor
        import torch
        import torch.distributed as dist

        own = tensor.reshape(-1).cpu()
        parts = [torch.empty_like(own) for _ in range(self.world_size)]
        dist.all_gather(parts, own, group=self._group)
        return torch.cat(parts).to(tensor.device)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """Collect one object a rank on rank `dst`; None elsewhere."""
        if self.world_size == 1:
            return [obj]
        import torch.distributed as dist

        collected = [None] * self.world_size if self.rank == dst else None
        dist.gather_object(obj, collected, dst=dst, group=self._group)
        return collected

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            import torch.distributed as dist

            dist.barrier(group=self._group)


def _cores() -> int:
    """Those this process may use; macOS and Windows tell only how many there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
