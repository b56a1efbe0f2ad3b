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
        kernels: whether to use Triton.

    Attributes:
        kv: (layers, 2, pages + 1, page size, KV heads, head size); page 0 is scratch, and the last pages are private
            ones of guesses. None: no memory is allocated.
        table: (N + 1 + guesses, P) int64, the page table. Row N is for padding. The rows behind it are for guesses; the
            host does not know them.
    """

    def __init__(self, model: PreTrainedModel, page_size: int, *, kernels: bool = False) -> None:
        config, self._kernels = model.config, kernels
        self.page_size, self.kv_heads = page_size, int(config.num_key_value_heads)
        self._layers, self._page = config.num_hidden_layers, (page_size, self.kv_heads, config.head_dim)
        self._dtype: torch.dtype = model.dtype
        self._device: torch.device = model.device
        self.kv: torch.Tensor | None = None
        self._guesses = self._private = 0  # guesses of a forward, and private pages of each
        self._table: NDArray[np.int64] = np.zeros((1, 1), dtype=np.int64)  # the page table on the host
        self.table = torch.from_numpy(self._table)

    @property
    def bytes_per_page(self) -> int:
        """Bytes of one page over all layers."""
        return 2 * int(self._layers * np.prod(self._page) * self._dtype.itemsize)

    @property
    def num_pages(self) -> int:
        """Pages that the pool can allocate."""
        return 0 if self.kv is None else self._first_private - 1

    @property
    def _first_private(self) -> int:
        assert self.kv is not None
        return self.kv.shape[2] - self._guesses * self._private

    def pages_of_a_guess(self, block: int) -> int:
        """Private pages of a guess: for two blocks of L tokens, from any position on."""
        return (self.page_size + 2 * block - 2) // self.page_size + 1

    def reserve(self, pages: int, slots: int, width: int, guesses: int = 0, private: int = 0) -> None:
        """Allocate memory for pages, and an empty page table.

        Args:
            pages: pages that the pool can allocate.
            slots: N.
            width: P, pages of the longest sequence.
            guesses: most guesses of a forward.
            private: pages of each guess.
        """
        self._guesses, self._private = guesses, private
        if self.kv is None or self.num_pages < pages:
            self.kv = None  # the old tensor is freed before the new one is allocated
            size = (self._layers, 2, pages + 1 + guesses * private, *self._page)
            self.kv = torch.zeros(size, dtype=self._dtype, device=self._device)
        self._table = np.full((slots + 1, width), SCRATCH_PAGE)
        self.table = torch.full((slots + 1 + guesses, width), SCRATCH_PAGE, dtype=torch.int64, device=self._device)

    def release(self) -> None:
        """Free the keys and values."""
        self.kv = None

    def clear(self, pages: Sequence[int] | None = None) -> None:
        """Set the keys and values of pages, of the scratch page and of private pages to zero; None: of all pages."""
        assert self.kv is not None
        if pages is None:
            self.kv.zero_()
        else:
            self.kv[:, :, to_device(np.array([SCRATCH_PAGE, *pages]), self._device)] = 0
            self.kv[:, :, self._first_private :] = 0

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
            slot: (B,), the row of the page table: the slot of each row's sequence, or the row of a guess.
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

    def lay_out_guesses(self, slot: torch.Tensor, start: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the page table's rows of guesses: a slot's pages, and private pages from the guess's block on.

        Args:
            slot: (guesses,), the slot of each guess; N for padding.
            start: (guesses,), position of the first token that the guess's segments write.

        Returns:
            The keys and values before this token that are in the same page, as arguments of `copy`.
        """
        first = start // self.page_size
        own = self._first_private + self._private * torch.arange(self._guesses, device=slot.device)
        number = torch.arange(self.table.shape[1], device=slot.device) - first[:, None]  # among the private pages
        shared = self.table[slot]
        pages = torch.where(number < self._private, own[:, None] + number, SCRATCH_PAGE)
        self.table[-self._guesses :] = torch.where(number < 0, shared, pages)
        offset = torch.arange(self.page_size, device=slot.device)
        copied = offset < (start % self.page_size)[:, None]
        real = shared.gather(1, first[:, None]) * self.page_size + offset
        return torch.where(copied, real, SCRATCH_PAGE), torch.where(
            copied, own[:, None] * self.page_size + offset, SCRATCH_PAGE
        )

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copy keys and values of all layers from KV slots to others; both (n, Q). A slot of the scratch page is none.

        The slots of `source` and `target` are disjoint.
        """
        assert self.kv is not None
        if self._kernels:
            from sdar_lm_eval.engines.native.kernels.paging import copy_kv

            copy_kv(self.kv, source.flatten(), target.flatten())
            return
        flat = self.kv.flatten(0, 1).flatten(1, 2)
        flat[:, target.flatten()] = flat[:, source.flatten()]
