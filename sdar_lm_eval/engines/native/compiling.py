"""`torch.compile` for the transitions of the batch's state: some 200 operations become a few kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch.fx.experimental import _config as shapes

P = ParamSpec("P")
R = TypeVar("R")

# Most compiled versions of a function. torch compiles one for each layout of the batch; its own limit of 8 is too low.
MOST_VERSIONS = 64


def compiled(function: Callable[P, R], backend: str = "inductor") -> Callable[P, R]:
    """Compile a function as a whole, for any size. If torch cannot compile it, the call raises torch's error."""
    fast = torch.compile(function, dynamic=True, fullgraph=True, backend=backend)

    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        # Without the second setting, sizes that are equal in the first call would have to be equal in each.
        with (
            torch._dynamo.config.patch(cache_size_limit=MOST_VERSIONS),
            shapes.patch(use_duck_shape=False),  # type: ignore[attr-defined]
        ):
            return fast(*args, **kwargs)

    return run
