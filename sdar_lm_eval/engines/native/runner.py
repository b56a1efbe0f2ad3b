"""A batch -> tensors -> logits -> drawn tokens. Owns the KV cache and the state of the batch, on the device."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from typing import Any

import numpy as np
import torch

from sdar_lm_eval.engines.native import unmasking
from sdar_lm_eval.engines.native.attention import PagedBatch
from sdar_lm_eval.engines.native.pages import SCRATCH_PAGE
from sdar_lm_eval.engines.native.random_numbers import DRAW, uniform
from sdar_lm_eval.engines.native.scheduler import Sequence
from sdar_lm_eval.engines.native.state import BatchState, Outcome

# Rows of float32 logits worked on at once: bounds their memory at large vocabularies.
LOGITS_BUDGET_BYTES = 1 << 30


class Runner:
    """Runs forwards of one model over a paged KV cache.

    Args:
        model: transformers' Qwen3ForCausalLM or Qwen3MoeForCausalLM with the paged attention.
        mask_token_id: never drawn.
        page_size: tokens a page.
    """

    def __init__(self, model: Any, mask_token_id: int, page_size: int) -> None:
        self._model = model
        self._mask_token_id = mask_token_id
        self._page_size = page_size
        self._device = model.device
        self._vocabulary = model.config.vocab_size
        self.cache: torch.Tensor | None = None

    def bytes_per_page(self) -> int:
        """Memory of one page over all layers, in bytes."""
        config = self._model.config
        per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        return int(per_token * self._page_size * self._model.dtype.itemsize)

    @property
    def num_pages(self) -> int:
        """Pages of the KV cache that can be given out."""
        return 0 if self.cache is None else self.cache.shape[2] - 1

    def release_cache(self) -> None:
        """Give the KV cache's memory back; the next `allocate` makes another."""
        self.cache = None

    def allocate(self, num_pages: int, max_active: int, sequences: SequenceOf[Sequence]) -> None:
        """Make the KV cache and the batch state for one `generate`; a cache that is large enough is kept.

        Args:
            num_pages: pages that can be given out; the scratch page comes on top.
            max_active: slots.
            sequences: all that will run.
        """
        config, device = self._model.config, self._device
        if self.cache is None or self.cache.shape[2] < num_pages + 1:
            self.cache = None  # freed before the new one is made
            page = (self._page_size, config.num_key_value_heads, config.head_dim)
            shape = (config.num_hidden_layers, 2, num_pages + 1, *page)
            self.cache = torch.zeros(shape, dtype=self._model.dtype, device=device)
        requests = [sequence.request for sequence in sequences]
        self.state = BatchState(
            max_active,
            max(sequence.block_length for sequence in sequences),
            max(len(request.stop_ids) for request in requests),
            self._vocabulary,
            self._mask_token_id,
            penalized=any(request.decoding.repetition_penalty != 1 for request in requests),
            device=device,
        )
        # Which ways of drawing there are.
        decodings = {request.decoding for request in requests}
        self._greedy = any(decoding.greedy for decoding in decodings)
        self._sampled = any(not decoding.greedy for decoding in decodings)
        self._filtered = any(not d.greedy and (d.top_k > 0 or d.top_p < 1) for d in decodings)
        self._needs_entropy = any(d.remasking_strategy == "entropy_bounded" for d in decodings)
        # The pages of each slot's sequence, on the host and on the device: (N + 1, P).
        longest = max(sequence.longest for sequence in sequences)
        self._pages = np.full((max_active + 1, -(-longest // self._page_size)), SCRATCH_PAGE)
        self._table = torch.from_numpy(self._pages).to(device)
        # What the next step runs, as far as the host knows it.
        self._segments = self._masked = 0
        self._packed: torch.Tensor | None = None

    def set_pages(self, sequences: Iterable[Sequence]) -> None:
        """Write the pages of sequences that got new ones, or a slot."""
        slots = []
        for sequence in sequences:
            self._pages[sequence.slot, : len(sequence.pages)] = sequence.pages
            self._pages[sequence.slot, len(sequence.pages) :] = SCRATCH_PAGE
            slots.append(sequence.slot)
        if slots:
            index = np.array(slots)
            self._table[self.state.to_device(index)] = self.state.to_device(self._pages[index])

    def begin(self, sequences: SequenceOf[Sequence]) -> None:
        """Put sequences whose prompts are prefilled into the batch."""
        if sequences:
            self._masked += self.state.begin(sequences)
            self._segments += len(sequences)

    def stop(self, slots: SequenceOf[int]) -> None:
        """Take slots out of the batch that the device does not know to be finished."""
        self.state.stop(slots)

    @torch.no_grad()
    def prefill(self, chunks: list[tuple[Sequence, int, int]]) -> None:
        """Store the KV of whole prompt blocks; each chunk is (sequence, start, end)."""
        to_device = self.state.to_device
        longest = max(end - start for _, start, end in chunks)
        tokens = np.zeros((len(chunks), longest), dtype=np.int64)
        for row, (sequence, start, end) in enumerate(chunks):
            tokens[row, : end - start] = sequence.tokens[start:end]
        self._forward(
            to_device(np.array([sequence.slot for sequence, _, _ in chunks])),
            to_device(tokens),
            to_device(np.array([start for _, start, _ in chunks])),
            to_device(np.array([end - start for _, start, end in chunks])),
            to_device(np.array([sequence.block_length for sequence, _, _ in chunks])),
            context=max(end for _, _, end in chunks),
        )

    @torch.no_grad()
    def launch(self, context: int) -> bool:
        """Start a step: the batch's blocks go through the model once, and are unmasked. Does not wait for it.

        Args:
            context: most tokens that any block of it sees, its own included.

        Returns:
            Whether there is anything to run.
        """
        if not self._segments:
            return False
        segments = self.state.segments(self._segments)
        hidden = self._forward(
            segments.slot, segments.tokens, segments.start, segments.length, segments.length, context
        )
        place, row = self.state.masked_places(self._masked)
        drawn = self._draw(place, hidden.flatten(0, 1)[row])
        self._packed = self.state.advance(place, *drawn)
        self._segments = self._masked = 0
        return True

    def collect(self) -> Outcome:
        """Wait for the step that was launched last, and return what it did."""
        assert self._packed is not None
        outcome = self.state.unpack(self._packed.cpu())
        self._segments += outcome.segments
        self._masked += outcome.masked
        return outcome

    def _forward(
        self,
        slot: torch.Tensor,
        tokens: torch.Tensor,
        start: torch.Tensor,
        count: torch.Tensor,
        length: torch.Tensor,
        context: int,
    ) -> torch.Tensor:
        """One pass over rows of tokens (B, Q), of which the first `count` of each row are real.

        slot, start, count, length (block length) are (B,); `context` is the most tokens any row sees. Returns the last
        hidden states (B, Q, hidden size).
        """
        assert self.cache is not None
        table = self._table[:, : -(-context // self._page_size)][slot]  # (B, P)
        offsets = torch.arange(tokens.shape[1], device=self._device)
        real = offsets < count[:, None]  # (B, Q)
        positions = torch.where(real, start[:, None] + offsets, 0)
        visible = torch.where(real, (positions // length[:, None].clamp(min=1) + 1) * length[:, None], 1)
        page = table.gather(1, positions // self._page_size)
        places = torch.where(real, page * self._page_size + positions % self._page_size, SCRATCH_PAGE)
        hidden: torch.Tensor = self._model.model(
            input_ids=tokens,
            position_ids=positions,
            attention_mask=self._no_mask(tokens),
            batch=PagedBatch(self.cache, table, places, visible),
            use_cache=False,
        ).last_hidden_state
        return hidden

    def _no_mask(self, tokens: torch.Tensor) -> torch.Tensor:
        """A four-dimensional mask, which every transformers version hands through untouched; nobody reads it."""
        return torch.empty(len(tokens), 1, 1, 1, dtype=self._model.dtype, device=self._device)

    def _draw(self, place: torch.Tensor, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Draw a token for each place (M,) from its hidden state (M, D): tokens, confidences, entropies (M,)."""
        chunk = max(1, LOGITS_BUDGET_BYTES // (4 * self._vocabulary))
        splits = zip(torch.split(place, chunk), torch.split(hidden, chunk), strict=True)
        parts = [self._draw_some(*part) for part in splits]
        token, confidence, entropy = (torch.cat(column) for column in zip(*parts, strict=True))
        return token, confidence, entropy

    def _draw_some(self, place: torch.Tensor, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        state = self.state
        slot, column = place // state.block, place % state.block
        logits = self._model.lm_head(hidden).float()  # (M, V)
        logits[:, self._mask_token_id] = -torch.inf
        if state.seen is not None:
            logits = unmasking.penalize_repetition(logits, state.seen[slot], state.penalty[slot])
        nothing = torch.zeros(len(place), device=self._device)
        results = []
        if self._greedy:
            token, confidence = unmasking.draw_greedy(logits)
            results.append(
                (token, confidence, unmasking.entropy(logits.softmax(-1)) if self._needs_entropy else nothing)
            )
        if self._sampled:
            probabilities = unmasking.filtered_probabilities(
                logits, state.temperature[slot], state.top_k[slot], state.top_p[slot], any_filter=self._filtered
            )
            number = uniform(state.seed[slot], state.start[slot] + column, state.step[slot], DRAW)
            token, confidence = unmasking.draw_sampled(probabilities, number)
            results.append((token, confidence, unmasking.entropy(probabilities) if self._needs_entropy else nothing))
        if len(results) == 1:
            return results[0]
        greedy = state.greedy[slot]
        token, confidence, entropy = (torch.where(greedy, a, b) for a, b in zip(*results, strict=True))
        return token, confidence, entropy
