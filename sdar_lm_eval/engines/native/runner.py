"""Runs prefill and steps on the device. Owns the state of the batch, the CUDA graphs and the steps in flight."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from sdar_lm_eval.engines.native.batch import BatchState, StepOutcome, unpack
from sdar_lm_eval.engines.native.compiling import compiled
from sdar_lm_eval.engines.native.drawing import Drawing
from sdar_lm_eval.engines.native.forecast import Forecast
from sdar_lm_eval.engines.native.forward.base import Forward
from sdar_lm_eval.engines.native.forward.cache import Addresses, PagedCache
from sdar_lm_eval.engines.native.forward.graphs import Graphs, rounded_up
from sdar_lm_eval.engines.native.forward.modules import ModulesForward
from sdar_lm_eval.engines.native.layout import Segments
from sdar_lm_eval.engines.native.scheduler import Chunk, SequenceState
from sdar_lm_eval.engines.native.transfer import on_device
from sdar_lm_eval.errors import EngineError
from sdar_lm_eval.families.base import Family

logger = logging.getLogger(__name__)

FEWEST = 2  # of each size below: `torch.compile` takes a size of 1 for a constant, so 1 would be compiled by itself
MOST_IN_FLIGHT = 2  # steps that are launched and not collected


@dataclass(frozen=True)
class Shape:
    """The sizes of the tensors on the device, and the settings that their kernels support.

    Attributes:
        pages: pages of the KV cache, without the scratch page.
        width: pages of the longest sequence.
        slots: most sequences that run at once.
        block: the longest block length.
        stops: most stop tokens of a sequence.
        strategies: names of the requests' strategies.
        penalized: whether there are requests with a repetition penalty.
        greedy, sampled: whether there are greedy requests, and sampled ones.
        filtered: whether there are sampled requests with top-k or top-p.
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
    def of(cls, sequences: Sequence[SequenceState], pages: int, slots: int, page_size: int) -> Shape:
        """The shape that these sequences need."""
        decodings = {sequence.request.decoding for sequence in sequences}
        return cls(
            pages=pages,
            width=max(FEWEST, -(-max(sequence.longest for sequence in sequences) // page_size)),
            slots=max(slots, FEWEST),
            block=max(decoding.block_length for decoding in decodings),
            stops=max(FEWEST, *(len(sequence.request.stop_ids) for sequence in sequences)),
            strategies=frozenset(decoding.remasking_strategy for decoding in decodings),
            penalized=any(decoding.repetition_penalty != 1 for decoding in decodings),
            greedy=any(decoding.greedy for decoding in decodings),
            sampled=any(not decoding.greedy for decoding in decodings),
            filtered=any(not d.greedy and (d.top_k > 0 or d.top_p < 1) for d in decodings),
        )

    def grown_to(self, other: Shape) -> Shape:
        """The other shape with sizes at least as large as this one's. The block is a layout: it stays the other's."""
        sizes = {name: max(getattr(self, name), getattr(other, name)) for name in ("pages", "width", "slots", "stops")}
        return dataclasses.replace(other, **sizes)


class Runner:
    """Runs steps of one model over a paged KV cache.

    Args:
        model: transformers' model with the paged attention.
        family: the model's family; returns the weights of the fused forward.
        mask_token_id: the token that is never drawn.
        page_size: tokens a page.
        kernels: whether to use Triton: the fused forward where the model fits it, drawing by one kernel, and
            `torch.compile` for the batch's state.
        reproducible: whether results have to be batch-invariant: the same to the bit whatever else is in the batch.
            Needs the fused forward, and sequences that all have the same settings.

    Attributes:
        shape: the shape that memory is allocated for; None where no memory is allocated. Whenever the graphs are
            dropped, `shape` becomes a new object.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        family: Family,
        mask_token_id: int,
        page_size: int,
        *,
        kernels: bool,
        reproducible: bool = False,
    ) -> None:
        self._vocabulary, self._mask_token_id = int(model.config.vocab_size), mask_token_id
        self.device: torch.device = model.device
        self._on_device = on_device(self.device)
        self._kernels, self._reproducible = kernels, reproducible
        self._lay_out, self._masked_positions, self._advance = lay_out, BatchState.masked_positions, BatchState.advance
        if kernels and self.device.type == "cuda":
            self.compile()
        self.cache = PagedCache(model, page_size)
        self.forward = self._forward_of(model, family)
        self.shape: Shape | None = None

    def _forward_of(self, model: PreTrainedModel, family: Family) -> Forward:
        if self._kernels:
            from sdar_lm_eval.engines.native.forward.decoder import HEAD_DIMS
            from sdar_lm_eval.engines.native.forward.fused import FusedForward

            weights = family.fused(model) if model.config.head_dim in HEAD_DIMS else None
            if weights is not None:
                with self._on_device:
                    return FusedForward(weights, self.cache, reproducible=self._reproducible)
        return ModulesForward(model, self.cache)

    def compile(self, backend: str = "inductor") -> None:
        """Compile the transitions of the batch's state: see `compiling.py`."""
        self._lay_out = compiled(lay_out, backend)
        self._masked_positions = compiled(BatchState.masked_positions, backend)
        self._advance = compiled(BatchState.advance, backend)

    # Memory

    def allocate(self, pages: int, slots: int, sequences: Sequence[SequenceState]) -> None:
        """Allocate what one `generate` needs on the device. Tensors and graphs that are large enough are kept.

        Args:
            pages: pages that the pool can allocate; the scratch page comes on top.
            slots: N.
            sequences: all sequences that will run.
        """
        shape = Shape.of(sequences, pages, slots, self.cache.page_size)
        if self.shape is not None:
            shape = self.shape.grown_to(shape)
        if shape != self.shape:
            self._reserve(shape)
        self.batch.blocks.active.fill_(False)
        self._forecast = Forecast(self.batch.slots, self.batch.block)
        # For each step in flight: the host buffer of its outcome, and the event after which the copy is complete.
        self._in_flight: deque[tuple[torch.Tensor, torch.cuda.Event | None]] = deque()

    def _reserve(self, shape: Shape) -> None:
        self.shape = None
        self._forward_graphs = self._draw_graphs = None
        if self.cache.num_pages < shape.pages:
            self.cache.release()  # the choice of sizes may need memory
        self.batch = BatchState(
            shape.slots, shape.block, shape.stops, self._vocabulary, self._mask_token_id,
            strategies=shape.strategies, penalized=shape.penalized, device=self.device,
        )  # fmt: skip
        self._drawing = Drawing(
            self.forward, self.batch, self._vocabulary, greedy=shape.greedy, sampled=shape.sampled,
            filtered=shape.filtered, kernels=self._kernels, reproducible=self._reproducible,
        )  # fmt: skip
        if self._kernels and not self._drawing.by_kernel:
            logger.info(
                "With top_k, top_p or repetition_penalty PyTorch draws the tokens, without a CUDA graph: slower."
            )
        # A measurement of times needs memory, so the KV cache gets its memory later.
        with self._on_device:
            self._segment_sizes = self.forward.sizes(2 * shape.slots, shape.block)
            self._draw_sizes = self._drawing.sizes()
        self.cache.reserve(shape.pages, shape.slots, shape.width)
        self.forward.reserve(self._segment_sizes[-1], shape.block, shape.width * self.cache.page_size)
        on_gpu = self.device.type == "cuda"
        self._forward_graphs = Graphs(self._forward, self._segment_sizes, enabled=on_gpu and self.forward.captures)
        self._draw_graphs = Graphs(self._draw, self._draw_sizes, enabled=on_gpu and self._drawing.by_kernel)
        packed = self.batch.packed
        # One buffer for each step that can be in flight.
        self._host_buffers = itertools.cycle(
            [torch.empty_like(packed, device="cpu", pin_memory=on_gpu) for _ in range(MOST_IN_FLIGHT)]
        )
        self.shape = shape

    @torch.no_grad()
    def capture(self, shortest: int, longest: int, seconds: float) -> None:
        """Compile what is left to compile, and capture CUDA graphs of every size that steps can have.

        The sizes of full batches come first, then smaller and smaller ones.

        Args:
            shortest, longest: the least and the most tokens that a block can see, its own included.
            seconds: time after which no further graph is captured. A run captures what is missing.
        """
        assert self._forward_graphs is not None
        assert self._draw_graphs is not None
        contexts = sorted({self.forward.context_key(context) for context in (*range(shortest, longest, 256), longest)})
        with self._on_device:
            self.forward.compile(longest)
            until = time.perf_counter() + seconds
            for size in reversed(self._draw_sizes):
                self._draw_graphs.prepare(size, until=until)
            for context, size in itertools.product(contexts, reversed(self._segment_sizes)):
                self._forward_graphs.prepare(size, context, until=until)

    def out_of_memory(self, pages: int | None = None) -> EngineError:
        """The error of a run that lacks memory. `pages`: KV pages that the run asked for; None: the allocated pages."""
        pages = self.cache.num_pages if pages is None else pages
        return EngineError(
            f"out of memory on {self.device}, with {pages:,} KV pages of {self.cache.page_size} tokens. Finished "
            "answers are kept (--use_cache); run again with a smaller max_active or kv_pages, or a smaller max_length."
        )

    def release(self) -> None:
        """Free the KV cache and the graphs; the next `allocate` makes them again."""
        self.cache.release()
        self.shape = None
        self._forward_graphs = self._draw_graphs = None

    # Sequences enter and leave

    def set_pages(self, sequences: Iterable[SequenceState]) -> None:
        """Write the page table's rows of sequences that got new pages, or a slot."""
        self.cache.set_pages(sequences)

    def begin(self, sequences: Sequence[SequenceState]) -> None:
        """Put sequences into the batch; their prompts are prefilled."""
        if sequences:
            self.batch.begin(sequences)
            self._forecast.begin(sequences)

    def run_only(self, sequences: Sequence[SequenceState]) -> None:
        """Deactivate the slots of all other sequences, and write the pages of these once more."""
        stay = {sequence.slot for sequence in sequences if sequence.in_batch}
        self.stop([slot for slot in range(self.batch.slots) if slot not in stay])
        self.set_pages(sequences)

    def stop(self, slots: Sequence[int]) -> None:
        """Deactivate slots that the device still takes for active."""
        self.batch.stop(slots)
        self._forecast.stop(slots)

    @torch.no_grad()
    def prefill(self, chunks: Sequence[Chunk]) -> None:
        """Store keys and values of chunks."""
        with self._on_device:
            self.forward.prefill(chunks)

    # Steps

    @torch.no_grad()
    def launch(self, context: int) -> bool:
        """Launch a step: the current blocks go through the model once, and are unmasked. Does not wait for the step.

        With another step in flight, the sizes of the step are a forecast.

        Args:
            context: most tokens that any block of the step sees, its own included.

        Returns:
            Whether there was anything to run.
        """
        segments, draws = self._forecast.sizes()
        if not segments:
            return False
        assert self._forward_graphs is not None
        assert self._draw_graphs is not None
        assert len(self._in_flight) < MOST_IN_FLIGHT
        event = None
        with self._on_device:
            # `Graphs` rounds a size up only where graphs are captured; fixed rows need it everywhere.
            if self.forward.fixed_rows:
                segments = rounded_up(self._segment_sizes, segments)
            if self._drawing.fixed_rows:
                draws = rounded_up(self._draw_sizes, draws)
            segments = self._forward_graphs(segments, self.forward.context_key(context))
            draws = self._draw_graphs(draws)
            buffer = next(self._host_buffers)
            buffer.copy_(self.batch.packed, non_blocking=True)
            if self.device.type == "cuda":
                event = torch.cuda.Event()  # type: ignore[no-untyped-call]
                event.record()
        self._in_flight.append((buffer, event))
        self._forecast.launched(segments, draws)
        return True

    def collect(self) -> StepOutcome:
        """Wait for the oldest step in flight, and return its outcome."""
        buffer, event = self._in_flight.popleft()
        if event is not None:
            event.synchronize()
        # A later step overwrites the buffer.
        outcome = unpack(buffer.numpy().copy(), self.batch.slots, self.batch.block)
        self._forecast.learn(outcome)
        return outcome

    def _forward(self, count: int, context: int) -> None:
        """Run `count` segments through the model."""
        segments, addresses = self._lay_out(self.batch, self.cache, count)
        self.forward.run(segments, addresses, context)

    def _draw(self, count: int) -> None:
        """Draw tokens for `count` masked positions, and advance the batch."""
        self._advance(self.batch, self._drawing(self._masked_positions(self.batch, count)))


def lay_out(batch: BatchState, cache: PagedCache, count: int) -> tuple[Segments, Addresses]:
    """The segments of a step, and the addresses of their tokens."""
    segments = batch.segments(count)
    offsets = batch.transition.offsets
    addresses = cache.addresses(segments.slot, segments.start, segments.length, segments.length, offsets)
    return segments, addresses
