from __future__ import annotations

import torch
import torch.distributed as dist


class DistributedManager:
    """Needs a process group that somebody else has made, and waits for all of its processes."""

    def __init__(self, tensor_parallel_size: int) -> None:
        self.tp_size = tensor_parallel_size
        for rank in range(dist.get_world_size()):
            group = dist.new_group([rank])
            if rank == dist.get_rank():
                self.tp_group = self.dp_group = group
        self.tp_rank = self.dp_rank = 0
        self.device = torch.device("cuda", dist.get_rank())
