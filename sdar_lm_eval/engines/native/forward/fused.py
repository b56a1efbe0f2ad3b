"""A forward by Triton kernels: packed tokens, no padding within a prompt, CUDA graphs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
import triton
from numpy.typing import NDArray

from sdar_lm_eval.engines.native.forward import graphs
from sdar_lm_eval.engines.native.forward.base import Forward
from sdar_lm_eval.engines.native.forward.cache import Addresses, PagedCache
from sdar_lm_eval.engines.native.forward.choices import Choice
from sdar_lm_eval.engines.native.forward.decoder import FusedDecoder
from sdar_lm_eval.engines.native.forward.sizes import grid, measured, unmeasured
from sdar_lm_eval.engines.native.forward.timings import Timings
from sdar_lm_eval.engines.native.kernels import attention, experts
from sdar_lm_eval.engines.native.kernels.gluon import hopper
from sdar_lm_eval.engines.native.kernels.gpu import multiprocessors, shared_memory
from sdar_lm_eval.engines.native.kernels.layers import few_rows
from sdar_lm_eval.engines.native.layout import Segments
from sdar_lm_eval.engines.native.scheduler import Chunk
from sdar_lm_eval.engines.native.transfer import to_device
from sdar_lm_eval.families.base import DecoderWeights, DenseMLP, Experts, LayerWeights

SPLITS_BUDGET_BYTES = 1 << 30  # most memory of attention's partial results in prefill, one for each split of a context
PREFILL_ROWS = 256  # queries of a prompt, of all heads of a KV head, that one program of attention takes
LONGEST_PAIR = 32  # tokens of a block and its predecessor, if they are one tile of attention


class FusedForward(Forward):
    """Runs the fused decoder.

    Args:
        weights: the model's weights.
        cache: the KV cache.
        reproducible: whether results have to be batch-invariant: the same to the bit whatever else is in the batch.

    Attributes:
        weights: the model's weights.
        decoder: the decoder that runs.
        kv_heads: KV heads of a layer.
        prefill_tile: tokens of a prompt that one program of attention takes.
    """

    captures = True

    def __init__(self, weights: DecoderWeights, cache: PagedCache, *, reproducible: bool) -> None:
        self.weights = weights
        self.decoder = FusedDecoder(weights, cache, batch_invariant=reproducible)
        self._cache, self._reproducible = cache, reproducible
        self.kv_heads = cache.kv_heads
        self._device, self._dtype = weights.norm.device, weights.norm.dtype
        # The rounding of a product that is not batch-invariant depends on its number of rows.
        self.fixed_rows = reproducible and not self.decoder.batch_invariant
        outputs = weights.layers[0].o.shape[1]  # heads * size
        self._widths = (outputs, len(weights.norm))
        # One program of the attention kernel holds a block's queries of all heads that share a KV head, in about half
        # of the shared memory.
        shared = outputs // self.kv_heads
        query_bytes = triton.next_power_of_2(shared_memory() // 2)
        self.longest_block = min(query_bytes // (shared * self._dtype.itemsize), 128)
        self.prefill_tile = max(min(PREFILL_ROWS * weights.head_dim // shared, self.longest_block // 2), 1)
        self._block = 1
        # Reproducible results need the same kernels in every process, and two processes may measure different times.
        if self._device.type == "cuda" and not reproducible:
            self.choose_kernels()

    @torch.no_grad()
    def choose_kernels(self) -> None:
        """Choose the fastest kernels of the decoder's products. Needs a GPU."""
        self.decoder.choose(self._timings, self._random_rows)

    def sizes(self, most: int, block: int) -> tuple[int, ...]:
        """See `Forward.sizes`."""
        if self.fixed_rows:
            return graphs.multiples(fixed_segments(block), most)
        return self._measured("the products of two layers", self.decoder.products, most, block)

    def draw_sizes(self, most: int, at_once: int) -> tuple[int, ...]:
        """See `Forward.draw_sizes`."""

        def draw(attended: torch.Tensor, residual: torch.Tensor) -> None:
            for begin in range(0, len(residual), at_once):
                part = slice(begin, begin + at_once)
                self.decoder.logits(self.decoder.finish(attended[part], residual[part].clone()))

        return self._measured(f"drawing, {at_once:,} rows at once", draw, most)

    def _measured(
        self, name: str, run: Callable[[torch.Tensor, torch.Tensor], None], most: int, rows: int = 1
    ) -> tuple[int, ...]:
        """Choose sizes by the measured time of `run`, which takes rows of attention's output and of the residual."""
        if self._device.type == "cpu":
            return unmeasured(most, rows)

        def times(largest: int) -> Mapping[int, float]:
            def make() -> Callable[[str, int], None]:
                attended, residual = self._random_rows(grid(largest)[-1])
                return lambda _, count: run(attended[:count], residual[:count])

            return self._timings(name, {name: grid(largest)}, make).get(name, {})

        with torch.no_grad():
            return measured(most, rows, times)

    def _random_rows(self, count: int) -> tuple[torch.Tensor, ...]:
        """So many rows of attention's output, and of the residual."""
        # torch's own generator belongs to the user: its state must not depend on a file of times.
        generator = torch.Generator(self._device).manual_seed(0)
        return tuple(
            torch.randn(count, width, generator=generator, device=self._device, dtype=self._dtype)
            for width in self._widths
        )

    @functools.cached_property
    def _timings(self) -> Timings:
        layers = self.weights.layers[0], self.weights.layers[-1]
        shapes = [list(weight.shape) for layer in layers for weight in _weights_of(layer)]
        code = [FusedForward, FusedDecoder, Choice, few_rows, experts.run, *([hopper.gated] if hopper else [])]
        about = {
            "shapes": [*shapes, list(self.weights.head.shape)], "dtype": str(self._dtype),
            "top_k": [layer.mlp.top_k if isinstance(layer.mlp, Experts) else None for layer in layers],
            "batch_invariant": self.decoder.batch_invariant, "code": code, "triton": triton.__version__,
        }  # fmt: skip
        return Timings(about, self._device)

    def reserve(self, segments: int, block: int, positions: int) -> None:
        """See `Forward.reserve`."""
        self._block = block
        # CUDA graphs need outputs that stay in place: `run` of any size writes to these, and `hidden` reads them.
        self._outputs = [
            torch.zeros(segments * block, size, dtype=self._dtype, device=self._device) for size in self._widths
        ]
        self._first = torch.arange(0, segments * block, block, device=self._device)
        self.decoder.reserve(positions)

    def compile(self, context: int) -> None:
        """See `Forward.compile`."""
        context = attention.padded_context(context)
        # A prompt that sees few tokens may have a kernel of its own. A long context has one split, or several splits if
        # a prefill has few tiles: these are two variants of the kernel.
        cuts = [(attention.SPLIT, 1)]
        if context > attention.SPLIT:
            cuts += [(context, 1), (context // 2, 2)]
        tokens = self._block if self._reproducible else self.prefill_tile
        # The kernel also depends on the number of tiles, here of tiles without tokens.
        few, many = 1, attention.MANY * multiprocessors() + 1
        zeros = torch.zeros(many, dtype=torch.int64, device=self._device)
        self.decoder.compile(
            attention.Tiles(
                zeros[:tiles], zeros[:tiles], zeros[None, :1], zeros[:tiles], zeros[:1], tokens, split, splits,
                batch_invariant=self._reproducible,
            )
            for split, splits in cuts
            for tiles in (few, many)
        )  # fmt: skip

    def context_key(self, context: int) -> int:
        """See `Forward.context_key`."""
        return attention.padded_context(context)

    def _splits(self, context: int, tiles: int, longest: int) -> tuple[int, int]:
        """Tokens of a split and number of splits; see `attention.splits_of`."""
        context = attention.padded_context(context)
        if self._reproducible:
            return attention.SPLIT, context // attention.SPLIT
        return attention.splits_of(context, tiles * self.kv_heads, longest)

    # Blocks

    def run(self, segments: Segments, addresses: Addresses, context: int) -> None:
        """See `Forward.run`."""
        block, count = self._block, len(segments.slot)
        # A block and its predecessor can be one tile of attention: then their keys and values are loaded only once.
        paired = 2 * block <= LONGEST_PAIR and not self._reproducible
        counts = segments.following * block if paired else segments.length
        tokens = segments.tokens.flatten()
        positions, visible, kv_slots = (column.flatten() for column in addresses)
        # Splitting is safe: a block to be committed precedes its successor, so its KV is written first.
        at_once = fixed_segments(block) if self.fixed_rows else count
        for begin in range(0, count, at_once):
            part, rows = slice(begin, begin + at_once), slice(begin * block, (begin + at_once) * block)
            tiles = attention.Tiles(
                self._first[: len(counts[part])], counts[part], self._cache.table, segments.slot[part], visible[rows],
                block * (1 + paired), *self._splits(context, len(counts[part]), attention.LONGEST_SPLIT),
                batch_invariant=self._reproducible,
            )  # fmt: skip
            outputs = self._run(tokens[rows], positions[rows], kv_slots[rows], tiles)
            for stored, output in zip(self._outputs, outputs, strict=True):
                stored[rows] = output

    def hidden(self, row: torch.Tensor) -> torch.Tensor:
        """See `Forward.hidden`."""
        attended, residual = (stored[row] for stored in self._outputs)
        return self.decoder.finish(attended, residual)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """See `Forward.logits`."""
        return self.decoder.logits(hidden)

    # Prompts

    def prefill(self, chunks: Sequence[Chunk]) -> None:
        """See `Forward.prefill`. All chunks are packed into one forward, or into several where memory is short."""
        if self.fixed_rows:
            rows = fixed_segments(self._block) * self._block
            for part in in_parts(chunks, rows):
                self._prefill(part, padded_to=rows)
            return
        heads, _ = self._widths
        context = max(chunk.end for chunk in chunks)
        tiles = sum(-(-chunk.size // self.prefill_tile) for chunk in chunks)
        _, splits = self._splits(context, tiles, attention.WHOLE)
        for part in in_parts(chunks, SPLITS_BUDGET_BYTES // (4 * heads * splits)):
            self._prefill(part, padded_to=0)

    def _prefill(self, chunks: Sequence[Chunk], padded_to: int) -> None:
        slot, length = np.array([(chunk.sequence.slot, chunk.sequence.block_length) for chunk in chunks]).T
        begin, end = np.array([(chunk.start, chunk.end) for chunk in chunks]).T
        size = end - begin
        token = np.concatenate([chunk.sequence.tokens[chunk.start : chunk.end] for chunk in chunks])
        owner, offset = flattened(size)
        position = begin[owner] + offset
        kv_slot = self._cache.kv_slots(slot[owner], position)
        visible = (position // length[owner] + 1) * length[owner]
        # Padding with zeros: the KV slot is in the scratch page, and a padding token sees no token.
        padding = ((0, 0), (0, max(padded_to - len(token), 0)))
        # Separate copies: Triton specialises on pointer alignment, and slices of one buffer would compile variants.
        tokens, positions, kv_slots, all_visible = (
            to_device(column, self._device) for column in np.pad([token, position, kv_slot, visible], padding)
        )
        # After a preemption, decided blocks are prefilled: reproducible results need the tiles that denoising had.
        tile_tokens = self._block if self._reproducible else self.prefill_tile
        owner, number = flattened(-(-size // tile_tokens))  # each tile's chunk, and its index within the chunk
        first = (size.cumsum() - size)[owner] + number * tile_tokens
        count = np.minimum(size[owner] - number * tile_tokens, tile_tokens)
        firsts, counts, slots = (to_device(column, self._device) for column in (first, count, slot[owner]))
        tiles = attention.Tiles(
            firsts, counts, self._cache.table, slots, all_visible, tile_tokens,
            *self._splits(int(end.max()), len(first), attention.WHOLE), batch_invariant=self._reproducible,
        )  # fmt: skip
        self._run(tokens, positions, kv_slots, tiles)

    def _run(
        self, tokens: torch.Tensor, positions: torch.Tensor, kv_slots: torch.Tensor, tiles: attention.Tiles
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert self._cache.kv is not None
        return self.decoder(tokens, positions, kv_slots, tiles, self._cache.kv)


def _weights_of(part: LayerWeights | DenseMLP | Experts) -> Iterator[torch.Tensor]:
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (DenseMLP, Experts)):
            yield from _weights_of(value)


def fixed_segments(block: int) -> int:
    """Segments of a forward whose products have a fixed number of rows."""
    return max(graphs.REPRODUCIBLE_ROWS // block, 1)


def in_parts(chunks: Sequence[Chunk], tokens: int) -> Iterator[list[Chunk]]:
    """Cut chunks between blocks into parts of at most `tokens` tokens, or of one block."""
    part: list[Chunk] = []
    room = tokens
    for sequence, start, end in chunks:
        begin, length = start, sequence.block_length
        while begin < end:
            blocks = max(room // length, 0 if part else 1)
            if blocks:
                stop = min(begin + blocks * length, end)
                part.append(Chunk(sequence, begin, stop))
                room -= stop - begin
                begin = stop
            if begin < end:
                yield part
                part, room = [], tokens
    if part:
        yield part


def flattened(counts: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Flatten ragged counts (n,): for every part its owner's index, and its index within that owner."""
    owner = np.repeat(np.arange(len(counts)), counts)
    return owner, np.arange(len(owner)) - (counts.cumsum() - counts)[owner]
