"""Data parallel runs: one process a GPU, started by `accelerate launch` or `torchrun`; lm_eval splits the documents.

The processes exchange only counts and finished answers, so they talk over gloo on the host, whatever the engine's
device is.
"""

from __future__ import annotations

import atexit
import datetime
import os
from typing import Any

# A rank waits for the slowest one, however uneven the documents are; a rank that dies is the launcher's business.
PATIENCE = datetime.timedelta(days=7)


class Ranks:
    """This process among those of the run; alone where no launcher started several."""

    def __init__(self) -> None:
        self.rank = int(os.environ.get("RANK", 0))
        self.world_size = int(os.environ.get("WORLD_SIZE", 1))
        self.local_rank = int(os.environ.get("LOCAL_RANK", 0))
        if self.world_size == 1:
            return
        import torch.distributed as dist

        if not dist.is_initialized():
            dist.init_process_group("gloo", timeout=PATIENCE)
            atexit.register(dist.destroy_process_group)
        self._group = dist.new_group(backend="gloo", timeout=PATIENCE)

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
