"""Scoring by the fused decoder and its kernels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from sdar_lm_eval.engines.native.forward.fused import FusedForward, flattened
from sdar_lm_eval.engines.native.kernels import attention
from sdar_lm_eval.engines.native.scoring.forwards import SCRATCH_SLOT, RowsForward
from sdar_lm_eval.engines.native.scoring.rows import ForwardRow, Integers
from sdar_lm_eval.engines.native.transfer import on_device, to_device


class FusedRows(RowsForward):
    """Runs the fused decoder on packed rows, without padding.

    The stored tokens of a row can lie in any KV slots, so a page of this KV cache has one token.

    Args:
        forward: the fused forward, whose decoder runs.
    """

    fused = True

    def __init__(self, forward: FusedForward) -> None:
        self._forward, self._decoder, self._weights = forward, forward.decoder, forward.weights
        self._device: torch.device = forward.weights.norm.device
        self._on_device = on_device(self._device)
        self.dtype, self.vocabulary = forward.weights.norm.dtype, len(forward.weights.head)

    def allocate(self, tokens: int) -> None:
        """See `RowsForward.allocate`."""
        self._page = 1, self._forward.kv_heads, self._weights.head_dim
        shape = (len(self._weights.layers), 2, tokens + 1, *self._page)
        self._cache = torch.zeros(shape, dtype=self.dtype, device=self._device)

    @torch.no_grad()
    def run(self, rows: Sequence[ForwardRow]) -> None:
        """See `RowsForward.run`."""
        size = np.array([len(row.tokens) for row in rows])
        self._first = size.cumsum() - size  # index of each row's first token
        tokens, positions, visible, last = (
            np.concatenate(arrays)
            for arrays in zip(*((row.tokens, row.positions, row.visible, row.last) for row in rows), strict=True)
        )
        seen, slots = [row.prefix for row in rows], [row.kv_slots for row in rows if row.kv_slots is not None]
        branches = None
        if slots:
            # A clean token sees leading tokens of its text: first the stored tokens, then new tokens of the row.
            seen = [np.concatenate(pair) for pair in zip(seen, slots, strict=True)]
            visible = visible + last
            kv_slots = np.concatenate(slots)
        else:
            kv_slots = np.arange(len(tokens))
            branches = self._branches(len(tokens), int(last[0]))  # the first copy ends where its block ends
        pages = np.full((len(rows), max(max(map(len, seen)), 1)), SCRATCH_SLOT)
        for row, own in zip(pages, seen, strict=True):
            row[: len(own)] = own
        most = self._forward.prefill_tile
        owner, number = flattened(-(-size // most))  # each tile's row, and its index within the row
        count = np.minimum(size[owner] - number * most, most)
        tiles = self._tiles(self._first[owner] + number * most, count, pages, owner, visible, most)
        self._decoder.reserve(int(positions.max()) + 1)
        put = self._to_device
        with self._on_device:
            self._results = self._decoder(put(tokens), put(positions), put(kv_slots), tiles, self._cache, branches)

    @torch.no_grad()
    def logits(self, row: Integers, column: Integers) -> torch.Tensor:
        """See `RowsForward.logits`."""
        at = self._to_device(self._first[row] + column)
        attended, residual = (result[at] for result in self._results)
        with self._on_device:
            return self._decoder.logits(self._decoder.finish(attended, residual))

    def _branches(self, tokens: int, length: int) -> attention.Branches:
        """Make a branch of each masked copy: `length` consecutive tokens of the rows."""
        keys, values = torch.empty(2, tokens, *self._page, dtype=self.dtype, device=self._device)
        number, lengths = np.arange(tokens // length), np.full(tokens // length, length)
        pages = np.arange(tokens).reshape(-1, length)
        tiles = self._tiles(number * length, lengths, pages, number, np.full(tokens, length), length)
        return attention.Branches(keys, values, tiles)

    def _tiles(
        self, first: Integers, count: Integers, pages: Integers, row: Integers, visible: Integers, most: int
    ) -> attention.Tiles:
        """Make tiles of at most `most` tokens. The rows of `pages` have KV slots; `row` is each tile's row there."""
        programs = len(first) * self._forward.kv_heads
        splits = attention.splits_of(attention.padded_context(pages.shape[1]), programs, attention.WHOLE)
        put = self._to_device
        return attention.Tiles(put(first), put(count), put(pages), put(row), put(visible), most, *splits)

    def _to_device(self, array: Integers) -> torch.Tensor:
        return to_device(array, self._device)
