"""A batch -> tensors -> logits -> unmasked tokens. Owns everything that lives on the device.

The state of the batch is a row ("slot") a running sequence: its current block, what of it is masked, its settings.
The host writes to it when a sequence is admitted or begins a block, and reads it back once a step.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sdar_lm_eval.engines.base import STRATEGIES
from sdar_lm_eval.engines.native import unmasking
from sdar_lm_eval.engines.native.attention import PagedBatch
from sdar_lm_eval.engines.native.pages import SCRATCH_PAGE
from sdar_lm_eval.engines.native.random_numbers import DRAW, ORDER, uniform
from sdar_lm_eval.engines.native.scheduler import Sequence
from sdar_lm_eval.errors import EngineError

DYNAMIC, STATIC, SEQUENTIAL, ENTROPY, RANDOM = range(len(STRATEGIES))  # positions in STRATEGIES

# Rows of float32 logits worked on at once: bounds their memory at large vocabularies.
LOGITS_BUDGET_BYTES = 1 << 30


@dataclass
class Blocks:
    """The current blocks of some slots, on the host after a step. Rows are in the order of the slots asked for.

    Attributes:
        tokens: (n, L) int32; where masked, the mask token.
        masked: (n, L) bool.
        unmasked_at: (n, L) int32, the step that unmasked each token; -1 for given ones.
        confidence: (n, L) float32 at that step.
    """

    tokens: Any
    masked: Any
    unmasked_at: Any
    confidence: Any


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

    def release_cache(self) -> None:
        """Give the KV cache's memory back; the next `allocate` makes another."""
        self.cache = None

    def allocate(self, num_pages: int, max_active: int, max_block: int, penalized: bool) -> None:
        """Make the KV cache and the batch state for one `generate`; a cache that is large enough is kept.

        Args:
            num_pages: pages that can be given out; the scratch page comes on top.
            max_active: slots.
            max_block: longest block length among the requests.
            penalized: whether any request has a repetition penalty (its table of seen tokens is slots x vocabulary).
        """
        config, device = self._model.config, self._device
        if self.cache is None or self.cache.shape[2] < num_pages + 1:
            self.cache = None  # freed before the new one is made
            page = (self._page_size, config.num_key_value_heads, config.head_dim)
            shape = (config.num_hidden_layers, 2, num_pages + 1, *page)
            self.cache = torch.zeros(shape, dtype=self._model.dtype, device=device)
        whole: dict[str, Any] = {"dtype": torch.int64, "device": device}
        real: dict[str, Any] = {"dtype": torch.float32, "device": device}
        self._offsets = torch.arange(max_block, device=device)
        # The current block: (slots, L)
        self._tokens = torch.zeros(max_active, max_block, **whole)
        self._masked = torch.zeros(max_active, max_block, dtype=torch.bool, device=device)
        self._unmasked_at = torch.full((max_active, max_block), -1, **whole)
        self._confidence = torch.zeros(max_active, max_block, **real)
        self._start = torch.zeros(max_active, **whole)
        self._step = torch.zeros(max_active, **whole)
        # Settings: (slots,), and the quota of each step (slots, L)
        self._length = torch.ones(max_active, **whole)
        self._strategy = torch.zeros(max_active, **whole)
        self._quotas = torch.zeros(max_active, max_block, **whole)
        self._threshold = torch.zeros(max_active, **real)
        self._entropy_bound = torch.zeros(max_active, **real)
        self._temperature = torch.ones(max_active, **real)
        self._top_k = torch.zeros(max_active, **whole)
        self._top_p = torch.ones(max_active, **real)
        self._penalty = torch.ones(max_active, **real)
        self._seed = torch.zeros(max_active, **whole)
        self._seen = torch.zeros(max_active, self._vocabulary, dtype=torch.bool, device=device) if penalized else None
        # What the host knows of the state without asking: where logits are needed, and which way to draw.
        self._host_masked = np.zeros((max_active, max_block), dtype=bool)
        self._host_greedy = np.zeros(max_active, dtype=bool)
        self._host_needs_entropy = np.zeros(max_active, dtype=bool)

    def admit(self, sequences: Iterable[Sequence]) -> None:
        """Write the settings of newly admitted sequences to their slots."""
        for sequence in sequences:
            slot, decoding = sequence.slot, sequence.request.decoding
            self._length[slot] = decoding.block_length
            self._strategy[slot] = STRATEGIES.index(decoding.remasking_strategy)
            self._quotas[slot, : decoding.steps] = torch.tensor(decoding.quotas, device=self._device)
            self._quotas[slot, decoding.steps :] = 1
            self._threshold[slot] = decoding.confidence_threshold
            self._entropy_bound[slot] = decoding.eb_threshold
            self._temperature[slot] = 1.0 if decoding.greedy else decoding.temperature
            self._top_k[slot] = 0 if decoding.greedy else min(decoding.top_k, self._vocabulary)
            self._top_p[slot] = 1.0 if decoding.greedy else decoding.top_p
            self._penalty[slot] = decoding.repetition_penalty
            self._seed[slot] = int(np.uint64(sequence.request.seed & (2**64 - 1)).astype(np.int64))
            self._host_greedy[slot] = decoding.greedy
            self._host_needs_entropy[slot] = decoding.remasking_strategy == "entropy_bounded"
            if self._seen is not None:
                self._seen[slot] = False
                self._seen[slot, torch.tensor(sequence.tokens, device=self._device)] = True

    def begin_blocks(self, sequences: Iterable[Sequence]) -> None:
        """Set slots to their sequence's next block: tokens beyond the last full block given, the rest masked."""
        sequences = list(sequences)
        if not sequences:
            return
        slots = np.array([sequence.slot for sequence in sequences])
        tokens = np.full((len(slots), self._tokens.shape[1]), self._mask_token_id)
        masked = np.zeros(tokens.shape, dtype=bool)
        for row, sequence in enumerate(sequences):
            given = sequence.tokens[sequence.block_start :]
            tokens[row, : len(given)] = given
            masked[row, len(given) : sequence.block_length] = True
        self._host_masked[slots] = masked
        index = self._to_device(slots)
        self._tokens[index] = self._to_device(tokens)
        self._masked[index] = self._to_device(masked)
        self._unmasked_at[index] = -1
        self._confidence[index] = 1.0
        self._start[index] = self._to_device(np.array([sequence.block_start for sequence in sequences]))
        self._step[index] = 0

    @torch.no_grad()
    def prefill(self, chunks: list[tuple[Sequence, int, int]]) -> None:
        """Store the KV of whole prompt blocks; each chunk is (sequence, start, end)."""
        longest = max(end - start for _, start, end in chunks)
        tokens = np.zeros((len(chunks), longest), dtype=np.int64)
        for row, (sequence, start, end) in enumerate(chunks):
            tokens[row, : end - start] = sequence.tokens[start:end]
        starts = self._to_device(np.array([start for _, start, _ in chunks]))
        counts = self._to_device(np.array([end - start for _, start, end in chunks]))
        lengths = self._to_device(np.array([sequence.block_length for sequence, _, _ in chunks]))
        offsets = torch.arange(longest, device=self._device)
        self._forward([s for s, _, _ in chunks], self._to_device(tokens), starts, counts, lengths, offsets,
                      context=max(end for _, _, end in chunks))  # fmt: skip

    @torch.no_grad()
    def step(self, sequences: list[Sequence]) -> Blocks:
        """Run the current blocks of some sequences through the model once, and unmask where something is masked.

        A block without masked tokens is committed: its KV, written by this forward, stands. The KV that denoising
        forwards write to the same places is overwritten by the next forward of the block.

        Raises:
            EngineError: the model's logits are not finite numbers.
        """
        slots = np.array([sequence.slot for sequence in sequences])
        index = self._to_device(slots)
        length = self._length[index]
        context = max(sequence.block_start + sequence.block_length for sequence in sequences)
        hidden = self._forward(
            sequences, self._tokens[index], self._start[index], length, length, self._offsets, context
        )
        rows, columns = np.nonzero(self._host_masked[slots])
        if len(rows):
            self._unmask(index, slots, rows, columns, hidden)
        # One copy brings all of it to the host.
        packed = torch.stack(
            [
                self._tokens[index].int(),
                self._masked[index].int(),
                self._unmasked_at[index].int(),
                self._confidence[index].view(torch.int32),
            ]
        ).cpu()
        blocks = Blocks(
            packed[0].numpy(), packed[1].numpy().astype(bool), packed[2].numpy(), packed[3].view(torch.float32).numpy()
        )
        before = self._host_masked[slots]
        stuck = before.any(axis=1) & (before.sum(axis=1) == blocks.masked.sum(axis=1))
        if stuck.any() or np.isnan(blocks.confidence).any():
            raise EngineError(
                f"the model's logits are not finite numbers (dtype {str(self._model.dtype).removeprefix('torch.')}). "
                "float16 overflows in some models: use dtype=bfloat16 or float32. Else the weights are bad."
            )
        self._host_masked[slots] = blocks.masked
        return blocks

    def _forward(
        self,
        sequences: list[Sequence],
        tokens: torch.Tensor,
        start: torch.Tensor,
        count: torch.Tensor,
        length: torch.Tensor,
        offsets: torch.Tensor,
        context: int,
    ) -> torch.Tensor:
        """One pass over rows of tokens (B, Q), of which the first `count` of each row are real.

        start, count, length (block length) are (B,), offsets (Q,); `context` is the most tokens any row sees. Returns
        the last hidden states (B, Q, hidden size).
        """
        assert self.cache is not None
        width = -(-context // self._page_size)
        pages = np.full((len(sequences), width), SCRATCH_PAGE)
        for row, sequence in enumerate(sequences):
            owned = sequence.pages[:width]
            pages[row, : len(owned)] = owned
        table = self._to_device(pages)  # (B, width)
        real = offsets < count[:, None]  # (B, Q)
        positions = torch.where(real, start[:, None] + offsets, 0)
        visible = torch.where(real, (positions // length[:, None] + 1) * length[:, None], 1)
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

    def _unmask(self, index: torch.Tensor, slots: Any, rows: Any, columns: Any, hidden: torch.Tensor) -> None:
        """Draw at every masked position of the blocks, keep what each strategy keeps, write it to the state."""
        shape = (len(slots), hidden.shape[1])
        drawn = torch.zeros(shape, dtype=torch.int64, device=self._device)
        confidence = torch.zeros(shape, device=self._device)
        entropies = torch.zeros(shape, device=self._device)
        chunk = max(1, LOGITS_BUDGET_BYTES // (4 * self._vocabulary))
        for greedy in (True, False):
            of_kind = np.flatnonzero(self._host_greedy[slots][rows] == greedy)
            for part in np.split(of_kind, range(chunk, len(of_kind), chunk)):
                if len(part):
                    row, column = self._to_device(rows[part]), self._to_device(columns[part])
                    needs_entropy = bool(self._host_needs_entropy[slots[rows[part]]].any())
                    token, probability, spread = self._draw(
                        index[row], column, hidden[row, column], greedy, needs_entropy
                    )
                    drawn[row, column], confidence[row, column] = token, probability
                    entropies[row, column] = spread

        masked, step = self._masked[index], self._step[index]
        strategy, quota = self._strategy[index], self._quotas[index].gather(1, step[:, None]).squeeze(1)
        keys, count = unmasking.by_confidence(confidence), quota
        dynamic = unmasking.count_above_threshold(confidence, masked, self._threshold[index], quota)
        count = torch.where(strategy == DYNAMIC, dynamic, count)
        keys = torch.where((strategy == SEQUENTIAL)[:, None], unmasking.by_position(confidence), keys)
        bounded = unmasking.count_within_entropy(entropies, masked, self._entropy_bound[index])
        count = torch.where(strategy == ENTROPY, bounded, count)
        keys = torch.where((strategy == ENTROPY)[:, None], entropies, keys)
        position = self._start[index][:, None] + self._offsets
        order = uniform(self._seed[index][:, None], position, step[:, None].expand_as(position), ORDER)
        keys = torch.where((strategy == RANDOM)[:, None], order, keys)
        kept = unmasking.select_first(keys, count, masked)

        self._tokens[index] = torch.where(kept, drawn, self._tokens[index])
        self._masked[index] = masked & ~kept
        self._unmasked_at[index] = torch.where(kept, step[:, None], self._unmasked_at[index])
        self._confidence[index] = torch.where(kept, confidence, self._confidence[index])
        # A quota exists for every step of the longest schedule; entropy_bounded may need as many as there are tokens.
        self._step[index] = (step + 1).clamp(max=self._quotas.shape[1] - 1)
        if self._seen is not None:
            which, where = kept.nonzero(as_tuple=True)
            self._seen[index[which], drawn[which, where]] = True

    def _draw(
        self, slot: torch.Tensor, column: torch.Tensor, hidden: torch.Tensor, greedy: bool, needs_entropy: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | float]:
        """Draw a token for R positions: slot and column (R,), hidden (R, D) -> tokens, confidences, entropies (R,)."""
        logits = self._model.lm_head(hidden).float()  # (R, V)
        logits[:, self._mask_token_id] = -torch.inf
        if self._seen is not None:
            logits = unmasking.penalize_repetition(logits, self._seen[slot], self._penalty[slot])
        if greedy:
            token, confidence = unmasking.draw_greedy(logits)
            return token, confidence, unmasking.entropy(logits.softmax(dim=-1)) if needs_entropy else 0.0
        probabilities = unmasking.filtered_probabilities(
            logits, self._temperature[slot], self._top_k[slot], self._top_p[slot]
        )
        number = uniform(self._seed[slot], self._start[slot] + column, self._step[slot], DRAW)
        token, confidence = unmasking.draw_sampled(probabilities, number)
        return token, confidence, unmasking.entropy(probabilities) if needs_entropy else 0.0

    def _to_device(self, array: Any) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device, non_blocking=True)
