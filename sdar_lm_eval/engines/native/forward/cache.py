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
    """Where tokens stand, and what they see; all of one shape, int64.

    Attributes:
        positions: of the tokens in their sequences.
        visible: leading tokens of its sequence that each token sees; 0 for padding.
        kv_slots: where keys and values of each token go, page * page size + offset in the page; padding goes to the
            scratch page.
    """

    positions: torch.Tensor
    visible: torch.Tensor
    kv_slots: torch.Tensor


class PagedCache:
    """Keys and values in pages; a slot's row of the page table names the pages of its sequence.

    Args:
        model: transformers' model; its config says how large keys and values are.
        page_size: tokens a page.

    Attributes:
        kv: (layers, 2, pages + 1, page size, KV heads, head size); page 0 is scratch. None: no memory is held.
        table: (N + 1, P) int64, the pages of each slot's sequence, and of padding.
    """

    def __init__(self, model: PreTrainedModel, page_size: int) -> None:
        config = model.config
        self.page_size, self.kv_heads = page_size, int(config.num_key_value_heads)
        self._layers, self._page = config.num_hidden_layers, (page_size, self.kv_heads, config.head_dim)
        self._dtype: torch.dtype = model.dtype
        self._device: torch.device = model.device
        self.kv: torch.Tensor | None = None
        self._pages: NDArray[np.int64] = np.zeros((1, 1), dtype=np.int64)  # the table, on the host
        self.table = torch.from_numpy(self._pages)

    @property
    def bytes_per_page(self) -> int:
        """Memory of one page over all layers."""
        return 2 * int(self._layers * np.prod(self._page) * self._dtype.itemsize)

    @property
    def num_pages(self) -> int:
        """Pages that can be given out."""
        return 0 if self.kv is None else self.kv.shape[2] - 1

    def reserve(self, pages: int, slots: int, width: int) -> None:
        """Have memory for so many pages, and an empty table of N slots with P = `width` pages each."""
        if self.kv is None or self.num_pages < pages:
            self.kv = None  # freed before the new one is made
            size = (self._layers, 2, pages + 1, *self._page)
            self.kv = torch.zeros(size, dtype=self._dtype, device=self._device)
        self._pages = np.full((slots + 1, width), SCRATCH_PAGE)
        self.table = torch.from_numpy(self._pages).to(self._device)

    def release(self) -> None:
        """Give the memory of keys and values back."""
        self.kv = None

    def clear(self, pages: Sequence[int] | None = None) -> None:
        """Set the keys and values of pages to zero, and those of the scratch page; None: of all pages."""
        assert self.kv is not None
        if pages is None:
            self.kv.zero_()
        else:
            self.kv[:, :, to_device(np.array([SCRATCH_PAGE, *pages]), self._device)] = 0

    def set_pages(self, sequences: Iterable[SequenceState]) -> None:
        """Write the pages of sequences to their slots' rows of the table."""
        slots = []
        for sequence in sequences:
            self._pages[sequence.slot, : len(sequence.pages)] = sequence.pages
            self._pages[sequence.slot, len(sequence.pages) :] = SCRATCH_PAGE
            slots.append(sequence.slot)
        if slots:
            index = np.array(slots)
            self.table[to_device(index, self._device)] = to_device(self._pages[index], self._device)

    def kv_slots(self, slot: NDArray[np.int64], position: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where keys and values go of tokens at these positions of these slots' sequences, on the host."""
        return self._pages[slot, position // self.page_size] * self.page_size + position % self.page_size

    def addresses(
        self, slot: torch.Tensor, start: torch.Tensor, count: torch.Tensor, length: torch.Tensor, offsets: torch.Tensor
    ) -> Addresses:
        """Addresses (B, Q) of B rows of consecutive tokens; the first `count` tokens of a row are real.

        Args:
            slot, start, count: (B,), whose tokens these are, where the first one stands, and how many are real.
            length: (B,), block lengths.
            offsets: (Q,), 0 to Q - 1.
        """
        real = offsets < count[:, None]
        positions = torch.where(real, start[:, None] + offsets, 0)
        visible = torch.where(real, (positions // length[:, None].clamp(min=1) + 1) * length[:, None], 0)
        page = self.table[slot].gather(1, positions // self.page_size)
        kv_slots = torch.where(real, page * self.page_size + positions % self.page_size, SCRATCH_PAGE)
        return Addresses(positions, visible, kv_slots)
