"""The paged KV cache: keys and values of all layers in pages, and the page table of the batch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from sdar_lm_eval.engines.native.pages import SCRATCH_PAGE
from sdar_lm_eval.engines.native.scheduler import SequenceState
from sdar_lm_eval.engines.native.transfer import to_device


class Addresses(NamedTuple):
    """Positions, KV slots and visible contexts of tokens; all of one shape, int64.

    Attributes:
        positions: positions of the tokens in their sequences.
        visible: leading tokens of its sequence that each token sees; 0 for padding.
        kv_slots: the KV slot of each token: page * page size + offset in the page. Padding goes to the scratch page.
    """

    positions: torch.Tensor
    visible: torch.Tensor
    kv_slots: torch.Tensor


class PagedCache:
    """Keys and values in pages, and the page table: a slot's row lists the pages of its sequence.

    Args:
        model: transformers' model; its config has the sizes of keys and values.
        page_size: tokens a page.

    Attributes:
        kv: (layers, 2, pages + 1, page size, KV heads, head size); page 0 is scratch. None: no memory is allocated.
        table: (N + 1, P) int64, the page table. The last row is for padding.
    """

    def __init__(self, model: PreTrainedModel, page_size: int) -> None:
        config = model.config
        self.page_size, self.kv_heads = page_size, int(config.num_key_value_heads)
        self._layers, self._page = config.num_hidden_layers, (page_size, self.kv_heads, config.head_dim)
        self._dtype: torch.dtype = model.dtype
        self._device: torch.device = model.device
        self.kv: torch.Tensor | None = None
        self._table: NDArray[np.int64] = np.zeros((1, 1), dtype=np.int64)  # the page table on the host
        self.table = torch.from_numpy(self._table)

    @property
    def bytes_per_page(self) -> int:
        """Bytes of one page over all layers."""
        return 2 * int(self._layers * np.prod(self._page) * self._dtype.itemsize)

    @property
    def num_pages(self) -> int:
        """Pages that the pool can allocate."""
        return 0 if self.kv is None else self.kv.shape[2] - 1

    def reserve(self, pages: int, slots: int, width: int) -> None:
        """Allocate memory for `pages` pages, and an empty page table of N = `slots` rows of P = `width` pages."""
        if self.kv is None or self.num_pages < pages:
            self.kv = None  # the old tensor is freed before the new one is allocated
            size = (self._layers, 2, pages + 1, *self._page)
            self.kv = torch.zeros(size, dtype=self._dtype, device=self._device)
        self._table = np.full((slots + 1, width), SCRATCH_PAGE)
        self.table = torch.from_numpy(self._table).to(self._device)

    def release(self) -> None:
        """Free the keys and values."""
        self.kv = None

    def clear(self, pages: Sequence[int] | None = None) -> None:
        """Set the keys and values of pages and of the scratch page to zero; None: of all pages."""
        assert self.kv is not None
        if pages is None:
            self.kv.zero_()
        else:
            self.kv[:, :, to_device(np.array([SCRATCH_PAGE, *pages]), self._device)] = 0

    def set_pages(self, sequences: Iterable[SequenceState]) -> None:
        """Write the pages of sequences to their slots' rows of the page table."""
        slots = []
        for sequence in sequences:
            self._table[sequence.slot, : len(sequence.pages)] = sequence.pages
            self._table[sequence.slot, len(sequence.pages) :] = SCRATCH_PAGE
            slots.append(sequence.slot)
        if slots:
            index = np.array(slots)
            self.table[to_device(index, self._device)] = to_device(self._table[index], self._device)

    def kv_slots(self, slot: NDArray[np.int64], position: NDArray[np.int64]) -> NDArray[np.int64]:
        """The KV slots of tokens, by slot and position, on the host."""
        return self._table[slot, position // self.page_size] * self.page_size + position % self.page_size

    def addresses(
        self, slot: torch.Tensor, start: torch.Tensor, count: torch.Tensor, length: torch.Tensor, offsets: torch.Tensor
    ) -> Addresses:
        """Addresses (B, Q) of B rows of consecutive tokens; the first `count` tokens of a row are real.

        Args:
            slot: (B,), the slot of each row's sequence.
            start: (B,), position of each row's first token.
            count: (B,), number of real tokens of each row.
            length: (B,), block lengths.
            offsets: (Q,), 0 to Q - 1.
        """
        real = offsets < count[:, None]
        positions = torch.where(real, start[:, None] + offsets, 0)
        visible = torch.where(real, (positions // length[:, None].clamp(min=1) + 1) * length[:, None], 0)
        page = self.table[slot].gather(1, positions // self.page_size)
        kv_slots = torch.where(real, page * self.page_size + positions % self.page_size, SCRATCH_PAGE)
        return Addresses(positions, visible, kv_slots)
