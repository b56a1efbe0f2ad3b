"""A batch -> tensors -> logits -> drawn tokens. Owns the KV cache and the state of the batch, on the device.

The dense model on a GPU is run by `fused.py` and its tokens are drawn by `kernels.py`, as CUDA graphs; on the CPU, and
MoE, by transformers' modules with the attention of `attention.py`, and `unmasking.py`. Both fill the same cache.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sdar_lm_eval.engines.base import MAX_BLOCK_LENGTH
from sdar_lm_eval.engines.native import unmasking
from sdar_lm_eval.engines.native.attention import PagedBatch
from sdar_lm_eval.engines.native.forecast import Forecast
from sdar_lm_eval.engines.native.graphs import DRAWING, FORWARD, Graphs, ladder
from sdar_lm_eval.engines.native.pages import SCRATCH_PAGE
from sdar_lm_eval.engines.native.random_numbers import DRAW, uniform
from sdar_lm_eval.engines.native.scheduler import Sequence
from sdar_lm_eval.engines.native.state import BatchState, Outcome, Segments
from sdar_lm_eval.engines.native.strategies import STRATEGIES

logger = logging.getLogger(__name__)

# Rows of float32 logits worked on at once: bounds their memory at large vocabularies.
LOGITS_BUDGET_BYTES = 1 << 30
# Padding tokens of a prefill forward of rows: about what a forward more costs.
MOST_PADDING = {"cpu": 64, "cuda": 1024}
SPLITS_BUDGET_BYTES = 1 << 30  # of what attention to splits of a context leaves, in prefill
MOST_UNDER_WAY = 2  # steps, launched and not collected
QUERY_BYTES = 128 << 10
PREFILL_TILE = 32  # tokens of a prompt that one program of the attention kernel takes
# Tokens of every matrix product where results must not depend on what else runs, and its rounding on their number does.
REPRODUCIBLE_ROWS = 512


@dataclass(frozen=True)
class Shape:
    """What the tensors on the device are made for.

    Attributes:
        pages: of the KV cache, without the scratch page.
        width: pages of the longest sequence.
        slots: sequences at once.
        block: the longest block length.
        stops: most stop tokens of a sequence.
        strategies: of the requests.
        penalized, greedy, sampled, filtered: whether there are requests with a repetition penalty, that are greedy,
            drawn, or drawn with top-k or top-p.
    """

    pages: int
    width: int
    slots: int
    block: int
    stops: int
    strategies: frozenset[str]
    penalized: bool
    greedy: bool
    sampled: bool
    filtered: bool

    @classmethod
    def of(cls, sequences: SequenceOf[Sequence], pages: int, slots: int, page_size: int) -> Shape:
        """What these sequences need."""
        decodings = {sequence.request.decoding for sequence in sequences}
        return cls(
            pages=pages,
            width=-(-max(sequence.longest for sequence in sequences) // page_size),
            slots=slots,
            block=max(decoding.block_length for decoding in decodings),
            stops=max(len(sequence.request.stop_ids) for sequence in sequences),
            strategies=frozenset(decoding.remasking_strategy for decoding in decodings),
            penalized=any(decoding.repetition_penalty != 1 for decoding in decodings),
            greedy=any(decoding.greedy for decoding in decodings),
            sampled=any(not decoding.greedy for decoding in decodings),
            filtered=any(not d.greedy and (d.top_k > 0 or d.top_p < 1) for d in decodings),
        )

    def grown_to(self, other: Shape) -> Shape:
        """The other, with numbers that are no smaller than this one's, but for the block: it is the state's layout."""
        sizes = {name: max(getattr(self, name), getattr(other, name)) for name in ("pages", "width", "slots", "stops")}
        return dataclasses.replace(other, **sizes)


class Runner:
    """Runs forwards of one model over a paged KV cache.

    Args:
        model: transformers' Qwen3ForCausalLM or Qwen3MoeForCausalLM with the paged attention.
        mask_token_id: never drawn.
        page_size: tokens a page.
        kernels: whether to use Triton: the fused decoder, where the model is dense, and drawing in one pass.
        reproducible: whether a sequence's results are to be the same to the bit whatever runs beside it. It takes the
            fused decoder, and sequences that all have the same settings.
    """

    def __init__(
        self, model: Any, mask_token_id: int, page_size: int, *, kernels: bool, reproducible: bool = False
    ) -> None:
        self._model = model
        self._mask_token_id = mask_token_id
        self._page_size = page_size
        self._device = model.device
        self._vocabulary = model.config.vocab_size
        # Triton launches on the current device, whatever device its tensors are on.
        self._on_device: Any = torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext()
        self._uniform = uniform
        self._kernels: Any = None
        self._decoder: Any = None
        if kernels:
            from sdar_lm_eval.engines.native import fused, state_kernels
            from sdar_lm_eval.engines.native import kernels as triton_kernels

            self._kernels, self._uniform = triton_kernels, triton_kernels.uniform
            self._state_kernels: Any = state_kernels
            if fused.FusedDecoder.fits(model):
                with self._on_device:
                    self._decoder = fused.FusedDecoder(model, alone=reproducible)
        self._reproducible, self._together = reproducible, 1
        # Whether products are to have the same number of rows always.
        self._fixed_rows = reproducible and not getattr(self._decoder, "alone", False)
        self._shape: Shape | None = None
        self._forward_graphs: Graphs | None = None
        self._unmask_graphs: Graphs | None = None
        self.cache: torch.Tensor | None = None

    @property
    def is_fused(self) -> bool:
        """Whether the fused decoder runs the model."""
        return self._decoder is not None

    @property
    def fixes_rows(self) -> bool:
        """Whether reproducible results take products of a fixed number of rows."""
        return self._fixed_rows

    @property
    def longest_block(self) -> int:
        """Most tokens of a block: the attention kernel holds the queries of a block and a KV head at once."""
        if not self.is_fused:
            return MAX_BLOCK_LENGTH
        config = self._model.config
        group = config.num_attention_heads // config.num_key_value_heads
        return min(QUERY_BYTES // int(group * config.head_dim * self._model.dtype.itemsize), 128)

    def bytes_per_page(self) -> int:
        """Memory of one page over all layers, in bytes."""
        config = self._model.config
        per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        return int(per_token * self._page_size * self._model.dtype.itemsize)

    @property
    def shape(self) -> Shape | None:
        """What there is room for; another object where memory was made and graphs were dropped."""
        return self._shape

    @property
    def num_pages(self) -> int:
        """Pages of the KV cache that can be given out."""
        return 0 if self.cache is None else self.cache.shape[2] - 1

    def release_cache(self) -> None:
        """Give the memory of the KV cache and of the graphs back; the next `allocate` makes them again."""
        self.cache = self._shape = None
        self._forward_graphs = self._unmask_graphs = None

    def clear_pages(self, pages: SequenceOf[int] | None = None) -> None:
        """Set the KV of pages to zero, and that of the scratch page; None: of all."""
        assert self.cache is not None
        if pages is None:
            self.cache.zero_()
        else:
            self.cache[:, :, self.state.to_device(np.array([SCRATCH_PAGE, *pages]))] = 0

    def allocate(self, num_pages: int, max_active: int, sequences: SequenceOf[Sequence]) -> None:
        """Make what is needed on the device for one `generate`; what is there and large enough is kept.

        Args:
            num_pages: pages that can be given out; the scratch page comes on top.
            max_active: slots.
            sequences: all that will run.
        """
        shape = Shape.of(sequences, num_pages, max_active, self._page_size)
        if self._shape is not None:
            shape = self._shape.grown_to(shape)
        if shape != self._shape:
            self._make(shape)
        self.state.active.fill_(False)
        self._forecast = Forecast(self.state.slots, self.state.block)
        self._arrivals: deque[Any] = deque()  # of the steps under way: what they did, on the host, and the event of it

    def _make(self, shape: Shape) -> None:
        config, device = self._model.config, self._device
        self._shape = self._forward_graphs = self._unmask_graphs = None
        if self.cache is None or self.num_pages < shape.pages:
            self.cache = None  # freed before the new one is made
            page = (self._page_size, config.num_key_value_heads, config.head_dim)
            size = (config.num_hidden_layers, 2, shape.pages + 1, *page)
            self.cache = torch.zeros(size, dtype=self._model.dtype, device=device)
        self.state = BatchState(
            shape.slots, shape.block, shape.stops, self._vocabulary, self._mask_token_id,
            strategies=shape.strategies, penalized=shape.penalized, uniform=self._uniform, device=device,
        )  # fmt: skip
        # The pages of each slot's sequence, on the host and on the device: (N + 1, P).
        self._pages = np.full((shape.slots + 1, shape.width), SCRATCH_PAGE)
        self._table = torch.from_numpy(self._pages).to(device)
        draws = self._kernels is not None and not shape.filtered and not shape.penalized
        # PyTorch's sums over a row depend on the number of rows, too.
        self._fixed_draws = self._fixed_rows or (self._reproducible and not draws)
        segments, positions = ladder(FORWARD, 2 * shape.slots, shape.block), ladder(DRAWING, shape.slots * shape.block)
        if self._fixed_rows:
            self._together = max(REPRODUCIBLE_ROWS // shape.block, 1)
            segments = _multiples(self._together, 2 * shape.slots)
        if self._fixed_draws:
            positions = _multiples(REPRODUCIBLE_ROWS, shape.slots * shape.block)
        # What forwards give for each token, from which `_hidden` makes the hidden states that are drawn from.
        sizes = [config.hidden_size]
        if self._decoder is not None:
            sizes.insert(0, config.num_attention_heads * config.head_dim)
        rows = segments[-1] * shape.block
        self._outputs = [torch.zeros(rows, size, dtype=self._model.dtype, device=device) for size in sizes]
        self._packed = self.state.pack_nothing()
        # One for each step that can be under way.
        pinned = device.type == "cuda"
        on_host = [torch.empty_like(self._packed, device="cpu", pin_memory=pinned) for _ in range(MOST_UNDER_WAY)]
        self._on_host = itertools.cycle(on_host)
        if self._decoder is not None:
            self._decoder.reach(shape.width * self._page_size)
        if self._kernels is not None and not draws:
            logger.info(
                "With top_k, top_p or repetition_penalty PyTorch draws the tokens, without a CUDA graph: slower."
            )
        run, unmask = self._run_segments, self._unmask
        if draws and self._decoder is not None:
            if without := sorted(name for name in shape.strategies if not STRATEGIES[name].has_kernel):
                logger.info("%s: no kernel has this strategy, so PyTorch runs its rule: slower.", ", ".join(without))
            else:
                run, unmask = self._run_laid_out, self._unmask_by_kernels
                self._firsts = torch.arange(0, segments[-1] * shape.block, shape.block, device=device)
        self._draw_some = self._draw_in_one_pass if draws else self._draw_from_float32
        graphs = device.type == "cuda"
        self._forward_graphs = Graphs(run, segments, enabled=graphs and self._decoder is not None)
        self._unmask_graphs = Graphs(unmask, positions, enabled=graphs and draws)
        self._shape = shape

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
            self.state.begin(sequences)
            self._forecast.begin(sequences)

    def run_only(self, sequences: SequenceOf[Sequence]) -> None:
        """Take all but these out of the batch, and write their pages once more."""
        stay = {sequence.slot for sequence in sequences if sequence.begun}
        self.stop([slot for slot in range(self.state.slots) if slot not in stay])
        self.set_pages(sequences)

    def stop(self, slots: SequenceOf[int]) -> None:
        """Take slots out of the batch that the device does not know to be finished."""
        self.state.stop(slots)
        self._forecast.stop(slots)

    @torch.no_grad()
    def prefill(self, chunks: list[tuple[Sequence, int, int]]) -> None:
        """Store the KV of whole prompt blocks; each chunk is (sequence, start, end)."""
        with self._on_device:
            if self._decoder is None:
                for rows in _of_like_length(chunks, MOST_PADDING[self._device.type]):
                    self._prefill_rows(rows)
            else:
                self._prefill_packed(chunks)

    def _prefill_rows(self, chunks: list[tuple[Sequence, int, int]]) -> None:
        to_device = self.state.to_device
        longest = max(end - start for _, start, end in chunks)
        tokens = np.zeros((len(chunks), longest), dtype=np.int64)
        for row, (sequence, start, end) in enumerate(chunks):
            tokens[row, : end - start] = sequence.tokens[start:end]
        self._run_rows(
            to_device(np.array([sequence.slot for sequence, _, _ in chunks])),
            to_device(tokens),
            to_device(np.array([start for _, start, _ in chunks])),
            to_device(np.array([end - start for _, start, end in chunks])),
            to_device(np.array([sequence.block_length for sequence, _, _ in chunks])),
            context=max(end for _, _, end in chunks),
        )

    def _prefill_packed(self, chunks: list[tuple[Sequence, int, int]]) -> None:
        assert self._shape is not None
        block = self._shape.block
        # A sequence that is preempted has its answer prefilled, and that should give what its blocks gave.
        tile_tokens = block if self._reproducible else PREFILL_TILE
        if not self._fixed_rows:
            config = self._model.config
            a_token = 4 * config.num_attention_heads * config.head_dim * self._splits(max(end for _, _, end in chunks))
            for part in _in_parts(chunks, SPLITS_BUDGET_BYTES // a_token):
                self._prefill_together(part, tile_tokens, padding_to=0)
            return
        for part in _in_parts(chunks, self._together * block):
            self._prefill_together(part, tile_tokens, padding_to=self._together * block)

    def _prefill_together(self, chunks: list[tuple[Sequence, int, int]], tile_tokens: int, padding_to: int) -> None:
        """Run chunks as one row of tokens, padded to a number of them, with tiles of so many for attention."""
        page_size = self._page_size
        slot, length = np.array([(sequence.slot, sequence.block_length) for sequence, _, _ in chunks]).T
        begin, end = np.array([(begin, end) for _, begin, end in chunks]).T
        size = end - begin
        token = np.concatenate([sequence.tokens[begin:end] for sequence, begin, end in chunks])
        chunk, offset = _parts(size)
        position = begin[chunk] + offset
        kv_slot = self._pages[slot[chunk], position // page_size] * page_size + position % page_size
        visible = (position // length[chunk] + 1) * length[chunk]
        # The KV of padding goes to the scratch page, and it sees nothing.
        padding = ((0, 0), (0, max(padding_to - len(token), 0)))
        columns = np.pad([token, position, kv_slot, visible], padding)
        # Separate copies: Triton specialises on pointer alignment, and slices of one buffer would compile others.
        tokens, positions, kv_slots, all_visible = map(self.state.to_device, columns)

        of, number = _parts(-(-size // tile_tokens))  # whose each tile is, and which of its tiles
        first = (size.cumsum() - size)[of] + number * tile_tokens
        count = np.minimum(size[of] - number * tile_tokens, tile_tokens)
        firsts, counts, slots = map(self.state.to_device, (first, count, slot[of]))
        tiles = self._kernels.Tiles(
            firsts, counts, self._table, slots, all_visible, tile_tokens, self._splits(int(end.max())),
            alone=self._reproducible,
        )  # fmt: skip
        self._decoder(tokens, positions, kv_slots, tiles, self.cache)

    @torch.no_grad()
    def launch(self, context: int) -> bool:
        """Start a step: the batch's blocks go through the model once, and are unmasked. Does not wait for it.

        With another step under way, `MOST_UNDER_WAY` at most, it has room for what that one is expected to leave.

        Args:
            context: most tokens that any block of it sees, its own included.

        Returns:
            Whether there is anything to run.
        """
        segments, masked = self._forecast.sizes()
        if not segments:
            return False
        assert self._forward_graphs is not None
        assert self._unmask_graphs is not None
        assert len(self._arrivals) < MOST_UNDER_WAY
        event = None
        with self._on_device:
            # `Graphs` rounds sizes up only where they are captured.
            if self._fixed_rows:
                segments = _rounded_up(segments, self._together)
            if self._fixed_draws:
                masked = _rounded_up(masked, REPRODUCIBLE_ROWS)
            self._forward_graphs(segments, self._rounded(context))
            self._unmask_graphs(masked)
            arrival = next(self._on_host)
            arrival.copy_(self._packed, non_blocking=True)
            if self._device.type == "cuda":
                event = torch.cuda.Event()  # type: ignore[no-untyped-call]
                event.record()
        self._arrivals.append((arrival, event))
        self._forecast.launched()
        return True

    def collect(self) -> Outcome:
        """Wait for the oldest step under way, and return what it did."""
        arrival, event = self._arrivals.popleft()
        if event is not None:
            event.synchronize()
        outcome = self.state.unpack(arrival)
        self._forecast.learn(outcome)
        return outcome

    def _rounded(self, context: int) -> int:
        """The context as far as forwards depend on it: whole pages, or splits in powers of two."""
        if self._decoder is None:
            return -(-context // self._page_size) * self._page_size
        return self._splits(context) * int(self._kernels.SPLIT)

    def _splits(self, context: int) -> int:
        """Into how many parts attention splits a context: a power of two, for each is compiled and captured anew."""
        split: int = self._kernels.SPLIT
        return 1 << (-(-context // split) - 1).bit_length()

    def _run_segments(self, count: int, context: int) -> None:
        """Run the state's segments through the model, `count` with padding."""
        segments, begin = self.state.segments(count), 0
        # Splitting is safe: a block to be committed precedes its successor, so its KV is written first.
        for part in segments.split(self._together if self._fixed_rows else count):
            begin = self._store(begin, self._run_blocks(part, context))

    def _store(self, begin: int, outputs: SequenceOf[torch.Tensor]) -> int:
        """Keep what a forward gave, from row `begin` on; returns the next row."""
        end = begin + len(outputs[0])
        for stored, output in zip(self._outputs, outputs, strict=True):
            stored[begin:end] = output
        return end

    def _hidden(self, row: torch.Tensor) -> torch.Tensor:
        """The last hidden states (M, hidden size) of tokens, by their rows (M,) among those of the last step."""
        outputs = [stored[row] for stored in self._outputs]
        hidden: torch.Tensor = outputs[0] if self._decoder is None else self._decoder.finish(*outputs)
        return hidden

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(M, hidden size) -> (M, V)."""
        logits: torch.Tensor = self._model.lm_head(hidden) if self._decoder is None else self._decoder.logits(hidden)
        return logits

    def _run_blocks(self, segments: Segments, context: int) -> SequenceOf[torch.Tensor]:
        """One pass over S blocks; returns what it gives for S * L tokens."""
        if self._decoder is None:
            rows = self._run_rows(
                segments.slot, segments.tokens, segments.start, segments.length, segments.length, context
            )
            return [rows.flatten(0, 1)]
        block = self.state.block
        positions, visible, kv_slots = self._addresses(
            self._table[segments.slot], segments.start, segments.length, segments.length, self.state.offsets
        )
        first = torch.arange(0, visible.numel(), block, device=self._device)
        counts = segments.following * block if self._paired else segments.length
        tiles = self._tiles(first, counts, segments.slot, visible.flatten(), context)
        outputs: tuple[torch.Tensor, torch.Tensor] = self._decoder(
            segments.tokens.flatten(), positions.flatten(), kv_slots.flatten(), tiles, self.cache
        )
        return outputs

    @property
    def _paired(self) -> bool:
        """Whether a block and the one before it are one tile of attention, and load keys and values once."""
        return self.state.block <= PREFILL_TILE // 2 and not self._reproducible

    def _tiles(
        self, first: torch.Tensor, count: torch.Tensor, slot: torch.Tensor, visible: torch.Tensor, context: int
    ) -> Any:
        """Tiles of blocks."""
        tokens = self.state.block * (1 + self._paired)
        return self._kernels.Tiles(
            first, count, self._table, slot, visible, tokens, context // self._kernels.SPLIT, alone=self._reproducible
        )

    def _run_laid_out(self, count: int, context: int) -> None:
        """`_run_segments` by kernels."""
        block = self.state.block
        blocks = self._state_kernels.lay_out(self.state, self._table, self._page_size, count, paired=self._paired)
        together = self._together if self._fixed_rows else count
        for begin in range(0, count, together):
            segments = slice(begin, begin + together)
            tokens = slice(begin * block, (begin + together) * block)
            tiles = self._tiles(
                self._firsts[:together], blocks.count[segments], blocks.slot[segments], blocks.visible[tokens], context
            )
            outputs = self._decoder(
                blocks.tokens[tokens], blocks.positions[tokens], blocks.kv_slots[tokens], tiles, self.cache
            )
            self._store(begin * block, outputs)

    def _unmask_by_kernels(self, count: int) -> None:
        """`_unmask` by kernels."""
        drawing = self._state_kernels.masked_positions(self.state, count)

        def draw(some: slice) -> Any:
            return self._kernels.draw(
                self._logits(self._hidden(drawing.row[some])), drawing.temperature[some], drawing.number[some],
                drawing.greedy[some], self._mask_token_id, entropies=self.state.needs_entropy,
            )  # fmt: skip

        self._state_kernels.advance(self.state, *self._in_chunks(count, draw), self._packed)

    def _in_chunks(self, count: int, draw: Callable[[slice], Any]) -> Any:
        """Tokens, confidences, entropies of `count` masked positions, (M,) each; `draw` gives those of a slice."""
        begins = range(0, count, self._drawn_together)
        parts = [draw(slice(begin, begin + self._drawn_together)) for begin in begins]
        return parts[0] if len(parts) == 1 else [torch.cat(column) for column in zip(*parts, strict=True)]

    @property
    def _drawn_together(self) -> int:
        """Rows of logits worked on at once."""
        if self._fixed_draws:
            return REPRODUCIBLE_ROWS
        return max(1, LOGITS_BUDGET_BYTES // (4 * int(self._vocabulary)))

    def _run_rows(
        self,
        slot: torch.Tensor,
        tokens: torch.Tensor,
        start: torch.Tensor,
        count: torch.Tensor,
        length: torch.Tensor,
        context: int,
    ) -> torch.Tensor:
        """One pass of transformers' modules over rows of tokens (B, Q), the first `count` of each row being real.

        slot, start, count, length (block length) are (B,); `context` is the most tokens any row sees. Returns the last
        hidden states (B, Q, hidden size).
        """
        assert self.cache is not None
        table = self._table[:, : -(-context // self._page_size)][slot]  # (B, P)
        offsets = torch.arange(tokens.shape[1], device=self._device)
        positions, visible, kv_slots = self._addresses(table, start, count, length, offsets)
        hidden: torch.Tensor = self._model.model(
            input_ids=tokens,
            position_ids=positions,
            attention_mask=self._no_mask(tokens),
            batch=PagedBatch(self.cache, table, kv_slots, visible.clamp(min=1)),
            use_cache=False,
        ).last_hidden_state
        return hidden

    def _addresses(
        self,
        table: torch.Tensor,
        start: torch.Tensor,
        count: torch.Tensor,
        length: torch.Tensor,
        offsets: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of rows of tokens: their positions, how many tokens they see, their KV slots; (B, Q) each.

        Padding sees nothing.
        """
        real = offsets < count[:, None]
        positions = torch.where(real, start[:, None] + offsets, 0)
        visible = torch.where(real, (positions // length[:, None].clamp(min=1) + 1) * length[:, None], 0)
        page = table.gather(1, positions // self._page_size)
        kv_slots = torch.where(real, page * self._page_size + positions % self._page_size, SCRATCH_PAGE)
        return positions, visible, kv_slots

    def _no_mask(self, tokens: torch.Tensor) -> torch.Tensor:
        """A four-dimensional mask, which every transformers version hands through untouched; nobody reads it."""
        return torch.empty(len(tokens), 1, 1, 1, dtype=self._model.dtype, device=self._device)

    def _unmask(self, count: int) -> None:
        """Draw tokens for masked positions, `count` with padding, from the hidden states; advance the state."""
        index, row = self.state.masked_positions(count)
        token, confidence, entropy = self._in_chunks(
            count, lambda some: self._draw_some(index[some], self._hidden(row[some]))
        )
        self._packed.copy_(self.state.advance(index, token, confidence, entropy))

    def _numbers(self, index: torch.Tensor) -> torch.Tensor:
        """The random numbers to draw with, of masked positions (M,)."""
        state = self.state
        slot, column = index // state.block, index % state.block
        return self._uniform(state.seed[slot], state.start[slot] + column, state.step[slot], DRAW)

    def _draw_in_one_pass(
        self, index: torch.Tensor, hidden: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Tokens, confidences, entropies (M,), drawn for masked positions (M,) from their hidden states (M, D)."""
        slot = index // self.state.block
        drawn: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = self._kernels.draw(
            self._logits(hidden),
            self.state.temperature[slot],
            self._numbers(index),
            self.state.greedy[slot],
            self._mask_token_id,
            entropies=self.state.needs_entropy,
        )
        return drawn

    def _draw_from_float32(
        self, index: torch.Tensor, hidden: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The same for every setting, by plain PyTorch."""
        state, shape = self.state, self._shape
        assert shape is not None
        slot = index // state.block
        logits = self._logits(hidden).float()  # (M, V)
        logits[:, self._mask_token_id] = -torch.inf
        if state.seen is not None:
            logits = unmasking.penalize_repetition(logits, state.seen[slot], state.penalty[slot])
        if self._reproducible:
            logits = _aligned(logits)
        nothing = torch.zeros(len(index), device=self._device)
        results = []
        if shape.greedy:
            token, confidence = unmasking.draw_greedy(logits)
            entropy = unmasking.entropy(logits.softmax(-1)) if state.needs_entropy else nothing
            results.append((token, confidence, entropy))
        if shape.sampled:
            probabilities = unmasking.filtered_probabilities(
                logits, state.temperature[slot], state.top_k[slot], state.top_p[slot], any_filter=shape.filtered
            )
            token, confidence = unmasking.draw_sampled(probabilities, self._numbers(index))
            entropy = unmasking.entropy(probabilities) if state.needs_entropy else nothing
            results.append((token, confidence, entropy))
        if len(results) == 1:
            return results[0]
        greedy = state.greedy[slot]
        token, confidence, entropy = (torch.where(greedy, a, b) for a, b in zip(*results, strict=True))
        return token, confidence, entropy


def _aligned(logits: torch.Tensor) -> torch.Tensor:
    """Pad the vocabulary of (M, V) with -inf: PyTorch's reduction order depends on the alignment of a row."""
    return torch.nn.functional.pad(logits, (0, -logits.shape[1] % 4), value=-torch.inf)


def _of_like_length(
    chunks: list[tuple[Sequence, int, int]], most_padding: int
) -> Iterator[list[tuple[Sequence, int, int]]]:
    """Chunks, (sequence, start, end), in groups that take at most so many tokens of padding to their longest."""
    group: list[tuple[Sequence, int, int]] = []
    longest = padding = 0
    for chunk in sorted(chunks, key=lambda chunk: chunk[1] - chunk[2]):
        length = chunk[2] - chunk[1]
        padding += longest - length
        if group and padding > most_padding:
            yield group
            group = []
        if not group:
            longest, padding = length, 0
        group.append(chunk)
    yield group


def _in_parts(chunks: list[tuple[Sequence, int, int]], tokens: int) -> Iterator[list[tuple[Sequence, int, int]]]:
    """Chunks of prompts, cut between blocks into parts of at most so many tokens together, or of one block."""
    part: list[tuple[Sequence, int, int]] = []
    room = tokens
    for sequence, start, end in chunks:
        begin, length = start, sequence.block_length
        while begin < end:
            blocks = max(room // length, 0 if part else 1)
            if blocks:
                stop = min(begin + blocks * length, end)
                part.append((sequence, begin, stop))
                room -= stop - begin
                begin = stop
            if begin < end:
                yield part
                part, room = [], tokens
    if part:
        yield part


def _parts(counts: Any) -> tuple[Any, Any]:
    """Flatten ragged counts (n,): for every part its owner's index, and its index within that owner."""
    owner = np.repeat(np.arange(len(counts)), counts)
    return owner, np.arange(len(owner)) - (counts.cumsum() - counts)[owner]


def _rounded_up(count: int, unit: int) -> int:
    return -(-count // unit) * unit


def _multiples(unit: int, largest: int) -> tuple[int, ...]:
    """Of `unit`, up to the first that is not below `largest`."""
    return tuple(range(unit, largest + unit, unit))
