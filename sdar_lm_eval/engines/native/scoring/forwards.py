"""Forwards of scoring: rows of new tokens behind stored tokens -> logits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from sdar_lm_eval.engines.native.forward.attention import hidden_states
from sdar_lm_eval.engines.native.scoring.branches import BranchBatch, attention_bias
from sdar_lm_eval.engines.native.scoring.rows import ForwardRow, Integers
from sdar_lm_eval.engines.native.transfer import to_device

SCRATCH_SLOT = 0  # the KV slot that padding reads and writes


class RowsForward(ABC):
    """One way to run rows of scoring. The KV slots of clean tokens begin at 1; slot 0 is for padding.

    Attributes:
        dtype: the model's dtype.
        vocabulary: V.
        fused: whether kernels run the rows; rows of different lengths then need no padding.
    """

    dtype: torch.dtype
    vocabulary: int
    fused = False
    _cache: torch.Tensor

    @abstractmethod
    def allocate(self, tokens: int) -> None:
        """Allocate the KV cache for so many clean tokens."""

    def clear(self) -> None:
        """Set all keys and values to zero."""
        self._cache.zero_()

    @abstractmethod
    def run(self, rows: Sequence[ForwardRow]) -> None:
        """Run rows of one kind: rows of clean tokens, whose keys and values are stored, or rows of masked copies."""

    @abstractmethod
    def logits(self, row: Integers, column: Integers) -> torch.Tensor:
        """Logits (R, V) of tokens of the last `run`: each token's row, and its index in the row, (R,) each."""


class ModulesRows(RowsForward):
    """Runs transformers' modules on rows that are padded to the longest row.

    Args:
        model: transformers' model with the paged attention.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._device: torch.device = model.device
        self.dtype, self.vocabulary = model.dtype, model.config.vocab_size

    def allocate(self, tokens: int) -> None:
        """See `RowsForward.allocate`."""
        config = self._model.config
        shape = (config.num_hidden_layers, 2, tokens + 1, config.num_key_value_heads, config.head_dim)
        self._cache = torch.zeros(shape, dtype=self.dtype, device=self._device)

    @torch.no_grad()
    def run(self, rows: Sequence[ForwardRow]) -> None:
        """See `RowsForward.run`."""
        stored, new = (max(sizes) for sizes in zip(*(row.size for row in rows), strict=True))
        b, config = len(rows), self._model.config
        stored += -(stored + new) % 8  # CUDA kernels copy a bias with unaligned rows in every layer
        prefix = np.full((b, stored), SCRATCH_SLOT)
        # A padding token sees only itself.
        tokens, positions, visible = np.zeros((3, b, new), dtype=np.int64)
        first = np.tile(np.arange(new), (b, 1))
        last = first + 1
        kv_slots = np.full((b, new), SCRATCH_SLOT)
        for i, row in enumerate(rows):
            n, q = row.size
            prefix[i, :n] = row.prefix
            tokens[i, :q], positions[i, :q], visible[i, :q] = row.tokens, row.positions, row.visible
            first[i, :q], last[i, :q] = row.first, row.last
            if row.kv_slots is not None:
                kv_slots[i, :q] = row.kv_slots
        group = config.num_attention_heads // config.num_key_value_heads
        sees = (to_device(array, self._device) for array in (visible, first, last))
        bias = attention_bias(*sees, stored=stored, group=group, dtype=self.dtype)
        batch = BranchBatch(
            self._cache,
            prefix=to_device(prefix, self._device),
            bias=bias,
            kv_slots=None if rows[0].kv_slots is None else to_device(kv_slots, self._device),
        )
        where = to_device(positions, self._device)
        self._hidden = hidden_states(self._model, to_device(tokens, self._device), where, batch)

    @torch.no_grad()
    def logits(self, row: Integers, column: Integers) -> torch.Tensor:
        """See `RowsForward.logits`."""
        at = to_device(row, self._device), to_device(column, self._device)
        logits: torch.Tensor = self._model.lm_head(self._hidden[at])
        return logits
