"""Draws tokens from hidden states: by one kernel, or for the other settings by PyTorch in float32."""

from __future__ import annotations

from collections.abc import Callable

import torch

from sdar_lm_eval.engines.native import unmasking
from sdar_lm_eval.engines.native.batch import BatchState
from sdar_lm_eval.engines.native.forward import graphs
from sdar_lm_eval.engines.native.forward.base import Forward
from sdar_lm_eval.engines.native.layout import Draws
from sdar_lm_eval.engines.native.transition import Drawn


class Drawing:
    """Draws a token for each masked position, never the mask token.

    Args:
        forward: computes hidden states and logits.
        batch: holds the settings of each slot.
        vocabulary: V.
        greedy, sampled, filtered: whether there are requests of this kind; `filtered`: sampled with top-k or top-p.
        kernels: whether to use Triton kernels.
        reproducible: whether results have to be batch-invariant: the same to the bit for any other rows.

    Attributes:
        by_kernel: whether one kernel draws. The kernel has neither filters nor a penalty. CUDA graphs capture only the
            kernel, never PyTorch's operations.
        fixed_rows: whether the logits of every draw are computed for the same number of rows.
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
        # PyTorch's sum over a row depends on the number of rows.
        self.fixed_rows = forward.fixed_rows or (reproducible and not self.by_kernel)
        self._rows_at_once = graphs.REPRODUCIBLE_ROWS if self.fixed_rows else unmasking.rows_at_once(vocabulary)
        self._draw: Callable[[Draws, torch.Tensor], Drawn] = self._by_kernel if self.by_kernel else self._by_pytorch

    def sizes(self) -> tuple[int, ...]:
        """The sizes M that steps are padded to, ascending; the last suffices for the draws of all slots."""
        most = self._batch.slots * self._batch.block
        if self.fixed_rows:
            return graphs.multiples(graphs.REPRODUCIBLE_ROWS, most)
        return self._forward.draw_sizes(most, self._rows_at_once) if self.by_kernel else (most,)

    def __call__(self, draws: Draws) -> Drawn:
        """Draw for M positions, in parts where the logits of all would take too much memory."""
        parts = []
        for begin in range(0, len(draws.row), self._rows_at_once):
            part = Draws(*(column[begin : begin + self._rows_at_once] for column in draws))
            parts.append(self._draw(part, self._forward.logits(self._forward.hidden(part.row))))
        return parts[0] if len(parts) == 1 else Drawn(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def _by_kernel(self, draws: Draws, logits: torch.Tensor) -> Drawn:
        from sdar_lm_eval.engines.native.kernels import drawing as kernels

        drawn = kernels.draw(
            logits, draws.temperature, draws.number, draws.greedy, self._batch.mask_token_id,
            entropies=self._batch.needs_entropy,
        )  # fmt: skip
        return Drawn(*drawn)

    def _by_pytorch(self, draws: Draws, logits: torch.Tensor) -> Drawn:
        batch, slot, logits = self._batch, draws.slot, logits.float()
        logits[:, batch.mask_token_id] = -torch.inf
        if batch.seen is not None:
            logits = unmasking.penalize_repetition(logits, batch.seen[slot], batch.settings.penalty[slot])
        if self._reproducible:
            logits = _aligned(logits)
        nothing = torch.zeros(len(slot), device=logits.device)
        results = []
        if self._greedy:
            token, confidence = unmasking.draw_greedy(logits)
            entropy = unmasking.entropy(logits.softmax(-1)) if batch.needs_entropy else nothing
            results.append(Drawn(token, confidence, entropy))
        if self._sampled:
            probabilities = unmasking.filtered_probabilities(
                logits, draws.temperature, batch.settings.top_k[slot], batch.settings.top_p[slot],
                any_filter=self._filtered,
            )  # fmt: skip
            token, confidence = unmasking.draw_sampled(probabilities, draws.number)
            entropy = unmasking.entropy(probabilities) if batch.needs_entropy else nothing
            results.append(Drawn(token, confidence, entropy))
        if len(results) == 1:
            return results[0]
        return Drawn(*(torch.where(draws.greedy, a, b) for a, b in zip(*results, strict=True)))


def _aligned(logits: torch.Tensor) -> torch.Tensor:
    """Pad the vocabulary of (M, V) with -inf: PyTorch's reduction order depends on the alignment of a row."""
    return torch.nn.functional.pad(logits, (0, -logits.shape[1] % 4), value=-torch.inf)
