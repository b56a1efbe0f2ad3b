"""From hidden states to drawn tokens: by one kernel, or by PyTorch in float32 for every setting."""

from __future__ import annotations

from collections.abc import Callable

import torch

from sdar_lm_eval.engines.native import unmasking
from sdar_lm_eval.engines.native.batch import BatchState, Draws
from sdar_lm_eval.engines.native.forward import graphs
from sdar_lm_eval.engines.native.forward.base import Forward

LOGITS_BUDGET_BYTES = 1 << 30  # of float32 logits at once: bounds their memory at large vocabularies

Drawn = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Tokens, their probabilities, and the entropies of their distributions in nats, (M,) each."""


class Drawing:
    """Draws a token for each masked position, never the mask token.

    Args:
        forward: gives hidden states and logits.
        batch: the settings of each slot.
        vocabulary: V.
        greedy, sampled, filtered: whether there are requests that are greedy, drawn, or drawn with top-k or top-p.
        kernels: whether Triton is there.
        reproducible: whether results have to be the same to the bit whatever else is drawn.

    Attributes:
        by_kernel: whether one kernel draws, which no filter and no penalty allows. A CUDA graph captures it alone.
        fixed_rows: whether every draw has the same number of rows.
    """

    def __init__(
        self,
        forward: Forward,
        batch: BatchState,
        vocabulary: int,
        *,
        greedy: bool,
        sampled: bool,
        filtered: bool,
        kernels: bool,
        reproducible: bool,
    ) -> None:
        self._forward, self._batch = forward, batch
        self._greedy, self._sampled, self._filtered = greedy, sampled, filtered
        self._reproducible = reproducible
        self.by_kernel = kernels and not filtered and batch.seen is None
        # PyTorch's sums over a row depend on the number of rows, too.
        self.fixed_rows = forward.fixed_rows or (reproducible and not self.by_kernel)
        self._together = max(1, LOGITS_BUDGET_BYTES // (4 * vocabulary))
        if self.fixed_rows:
            self._together = graphs.REPRODUCIBLE_ROWS
        self._draw: Callable[[Draws, torch.Tensor], Drawn] = self._by_kernel if self.by_kernel else self._by_pytorch

    def sizes(self) -> tuple[int, ...]:
        """The numbers of draws that CUDA graphs are captured for, ascending, up to what all slots can need."""
        most = self._batch.slots * self._batch.block
        if self.fixed_rows:
            return graphs.multiples(graphs.REPRODUCIBLE_ROWS, most)
        return graphs.ladder(graphs.DRAWING, most)

    def __call__(self, draws: Draws) -> Drawn:
        """Draw for M positions, some of them at a time where their logits are large."""
        parts = []
        for begin in range(0, len(draws.row), self._together):
            some = Draws(*(column[begin : begin + self._together] for column in draws))
            parts.append(self._draw(some, self._forward.logits(self._forward.hidden(some.row))))
        if len(parts) == 1:
            return parts[0]
        token, confidence, entropy = (torch.cat(column) for column in zip(*parts, strict=True))
        return token, confidence, entropy

    def _by_kernel(self, draws: Draws, logits: torch.Tensor) -> Drawn:
        from sdar_lm_eval.engines.native.kernels import decoder as kernels

        return kernels.draw(
            logits, draws.temperature, draws.number, draws.greedy, self._batch.mask_token_id,
            entropies=self._batch.needs_entropy,
        )  # fmt: skip

    def _by_pytorch(self, draws: Draws, logits: torch.Tensor) -> Drawn:
        batch, slot, logits = self._batch, draws.slot, logits.float()
        logits[:, batch.mask_token_id] = -torch.inf
        if batch.seen is not None:
            logits = unmasking.penalize_repetition(logits, batch.seen[slot], batch.penalty[slot])
        if self._reproducible:
            logits = _aligned(logits)
        nothing = torch.zeros(len(slot), device=logits.device)
        results = []
        if self._greedy:
            token, confidence = unmasking.draw_greedy(logits)
            entropy = unmasking.entropy(logits.softmax(-1)) if batch.needs_entropy else nothing
            results.append((token, confidence, entropy))
        if self._sampled:
            probabilities = unmasking.filtered_probabilities(
                logits, draws.temperature, batch.top_k[slot], batch.top_p[slot], any_filter=self._filtered
            )
            token, confidence = unmasking.draw_sampled(probabilities, draws.number)
            entropy = unmasking.entropy(probabilities) if batch.needs_entropy else nothing
            results.append((token, confidence, entropy))
        if len(results) == 1:
            return results[0]
        token, confidence, entropy = (torch.where(draws.greedy, a, b) for a, b in zip(*results, strict=True))
        return token, confidence, entropy


def _aligned(logits: torch.Tensor) -> torch.Tensor:
    """Pad the vocabulary of (M, V) with -inf: PyTorch's reduction order depends on the alignment of a row."""
    return torch.nn.functional.pad(logits, (0, -logits.shape[1] % 4), value=-torch.inf)
