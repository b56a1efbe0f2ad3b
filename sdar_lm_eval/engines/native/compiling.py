"""`torch.compile` for what a step does to the batch's state: some 200 operations become a few kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

# Compiled versions of a function: one for each layout of the batch that its code depends on. torch's own limit is 8.
MOST_VERSIONS = 64


def compiled(function: Callable[P, R], backend: str = "inductor") -> Callable[P, R]:
    """The function, compiled as a whole for any size. A function that cannot be is an error, not a slower function."""
    fast = torch.compile(function, dynamic=True, fullgraph=True, backend=backend)

    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch._dynamo.config.patch(cache_size_limit=MOST_VERSIONS):
            return fast(*args, **kwargs)

    return run
