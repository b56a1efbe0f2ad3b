"""A forward by transformers' modules: for any model of a family, on any device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from sdar_lm_eval.decoding import MAX_BLOCK_LENGTH
from sdar_lm_eval.engines.native.forward.attention import PagedBatch, hidden_states
from sdar_lm_eval.engines.native.forward.base import Forward
from sdar_lm_eval.engines.native.forward.cache import Addresses, PagedCache
from sdar_lm_eval.engines.native.layout import Segments
from sdar_lm_eval.engines.native.scheduler import Chunk
from sdar_lm_eval.engines.native.transfer import to_device

# Most padding tokens of a prefill forward: about as many tokens as take the time of one forward more.
MOST_PADDING = {"cpu": 64, "cuda": 1024}


class ModulesForward(Forward):
    """Runs transformers' modules, whose attention is `attention.paged_attention`.

    Args:
        model: transformers' model with that attention.
        cache: where keys and values go.
    """

    longest_block = MAX_BLOCK_LENGTH

    def __init__(self, model: PreTrainedModel, cache: PagedCache) -> None:
        self._model, self._cache = model, cache
        self._device: torch.device = model.device
        self._hidden = torch.empty(0)

    def sizes(self, most: int, block: int) -> tuple[int, ...]:
        """See `Forward.sizes`. No graph is captured, so one size is enough."""
        return (most,)

    def reserve(self, segments: int, block: int, positions: int) -> None:
        """See `Forward.reserve`."""
        # A CUDA graph that draws tokens reads this tensor, so the tensor stays in place.
        size = (segments * block, self._model.config.hidden_size)
        self._hidden = torch.zeros(size, dtype=self._model.dtype, device=self._device)

    def context_key(self, context: int) -> int:
        """See `Forward.context_key`. The length is a whole number of pages."""
        return -(-context // self._cache.page_size) * self._cache.page_size

    def prefill(self, chunks: Sequence[Chunk]) -> None:
        """See `Forward.prefill`. The rows of a forward are chunks of similar lengths."""
        for rows in of_similar_length(chunks, MOST_PADDING[self._device.type]):
            tokens = np.zeros((len(rows), max(chunk.size for chunk in rows)), dtype=np.int64)
            for row, chunk in enumerate(rows):
                tokens[row, : chunk.size] = chunk.sequence.tokens[chunk.start : chunk.end]
            columns = [(c.sequence.slot, c.start, c.size, c.sequence.block_length) for c in rows]
            slot, start, count, length = to_device(np.array(columns).T, self._device)
            offsets = torch.arange(tokens.shape[1], device=self._device)
            addresses = self._cache.addresses(slot, start, count, length, offsets)
            self._run(slot, to_device(tokens, self._device), addresses, max(chunk.end for chunk in rows))

    def run(self, segments: Segments, addresses: Addresses, context: int) -> None:
        """See `Forward.run`."""
        hidden = self._run(segments.slot, segments.tokens, addresses, context).flatten(0, 1)
        self._hidden[: len(hidden)] = hidden

    def hidden(self, row: torch.Tensor) -> torch.Tensor:
        """See `Forward.hidden`."""
        return self._hidden[row]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """See `Forward.logits`."""
        logits: torch.Tensor = self._model.lm_head(hidden)
        return logits

    def _run(self, slot: torch.Tensor, tokens: torch.Tensor, addresses: Addresses, context: int) -> torch.Tensor:
        """Run B rows of Q tokens, a row of one slot's sequence each; return the last hidden states (B, Q, D)."""
        assert self._cache.kv is not None
        pages = self._cache.table[:, : -(-context // self._cache.page_size)][slot]  # (B, P)
        batch = PagedBatch(self._cache.kv, pages, addresses.kv_slots, addresses.visible.clamp(min=1))
        return hidden_states(self._model, tokens, addresses.positions, batch)


def of_similar_length(chunks: Sequence[Chunk], most_padding: int) -> Iterator[list[Chunk]]:
    """Group chunks so that padding each chunk to its group's longest takes at most `most_padding` tokens a group."""
    group: list[Chunk] = []
    longest = padding = 0
    for chunk in sorted(chunks, key=lambda chunk: -chunk.size):
        padding += longest - chunk.size
        if group and padding > most_padding:
            yield group
            group = []
        if not group:
            longest, padding = chunk.size, 0
        group.append(chunk)
    yield group
