"""The interface of a forward: runs chunks and segments through the model, and returns hidden states and logits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch

from sdar_lm_eval.engines.native.forward.cache import Addresses
from sdar_lm_eval.engines.native.forward.sizes import unmeasured
from sdar_lm_eval.engines.native.layout import Segments
from sdar_lm_eval.engines.native.scheduler import Chunk


class Forward(ABC):
    """One way to run the model over a paged KV cache.

    Attributes:
        longest_block: most tokens of a block.
        fixed_rows: whether every matrix product has the same number of rows. Where products are not batch-invariant,
            reproducible results need it.
        captures: whether a CUDA graph can capture `run`, `hidden` and `logits`.
    """

    longest_block: int
    fixed_rows = False
    captures = False

    @abstractmethod
    def sizes(self, most: int, block: int) -> tuple[int, ...]:
        """The numbers of segments that CUDA graphs are captured for, ascending; the last is `most` or more.

        Args:
            most: most segments of a forward.
            block: L, tokens of a segment.
        """

    def draw_sizes(self, most: int, at_once: int) -> tuple[int, ...]:
        """The numbers of draws that CUDA graphs are captured for, ascending; the last is `most` or more.

        Args:
            most: most draws of a step.
            at_once: most rows of logits that are computed at once.
        """
        return unmeasured(most)

    @abstractmethod
    def reserve(self, segments: int, block: int, positions: int) -> None:
        """Allocate memory for forwards of up to `segments` blocks of `block` tokens, at positions below `positions`."""

    @abstractmethod
    def context_key(self, context: int) -> int:
        """Round a context up to one of the few lengths that a forward's kernels exist for. `run` takes this length.

        Args:
            context: most tokens that any token of the forward sees.
        """

    def compile(self, context: int) -> None:  # noqa: B027  (a forward without such kernels does nothing)
        """Compile the variants of kernels that only some forwards need, so that no run waits for the compiler.

        Args:
            context: most tokens that any token of a forward sees.
        """

    @abstractmethod
    def prefill(self, chunks: Sequence[Chunk]) -> None:
        """Store keys and values of chunks."""

    @abstractmethod
    def run(self, segments: Segments, addresses: Addresses, context: int) -> None:
        """Run the tokens of S segments, and store their keys and values. `hidden` then reads the results."""

    @abstractmethod
    def hidden(self, row: torch.Tensor) -> torch.Tensor:
        """The last hidden states (M, D) of tokens of the last `run`, by their rows (M,) among S * L."""

    @abstractmethod
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (M, V) of last hidden states (M, D)."""
