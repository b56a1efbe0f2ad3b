"""Steps on the device: prompts in, blocks denoised, outcomes back. Owns the batch's state and the steps in flight."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from sdar_lm_eval.engines.native.batch import BatchState, Outcome, Segments
from sdar_lm_eval.engines.native.compiling import compiled
from sdar_lm_eval.engines.native.drawing import Drawing
from sdar_lm_eval.engines.native.forecast import Forecast
from sdar_lm_eval.engines.native.forward.base import Forward
from sdar_lm_eval.engines.native.forward.cache import Addresses, PagedCache
from sdar_lm_eval.engines.native.forward.graphs import Graphs, rounded_up
from sdar_lm_eval.engines.native.forward.modules import ModulesForward
from sdar_lm_eval.engines.native.scheduler import Chunk, SequenceState
from sdar_lm_eval.errors import EngineError
from sdar_lm_eval.family import Family

logger = logging.getLogger(__name__)

MOST_IN_FLIGHT = 2  # steps that are launched and not collected


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
    def of(cls, sequences: Sequence[SequenceState], pages: int, slots: int, page_size: int) -> Shape:
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
        """The other shape, with sizes no smaller than this one's. The block stays the other's: it is a layout."""
        sizes = {name: max(getattr(self, name), getattr(other, name)) for name in ("pages", "width", "slots", "stops")}
        return dataclasses.replace(other, **sizes)


class Runner:
    """Runs steps of one model over a paged KV cache.

    Args:
        model: transformers' model with the paged attention.
        family: the model's; says which weights the fused forward takes.
        mask_token_id: never drawn.
        page_size: tokens a page.
        kernels: whether to use Triton: the fused forward where the model is dense, drawing by one kernel, and
            `torch.compile` for the batch's state.
        reproducible: whether a sequence's results have to be the same to the bit whatever runs beside it. The fused
            forward can do so, for sequences that all have the same settings.
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
        on_gpu = self.device.type == "cuda"
        # Triton launches on the current device, whatever device its tensors are on.
        self._on_device: AbstractContextManager[object] = nullcontext()
        if on_gpu:
            self._on_device = torch.cuda.device(self.device)
        self._kernels, self._reproducible = kernels, reproducible
        self._lay_out, self._masked_positions, self._advance = lay_out, BatchState.masked_positions, BatchState.advance
        if kernels and on_gpu:
            self.compile()
        self.cache = PagedCache(model, page_size)
        self.forward = self._make_forward(model, family)
        self.shape: Shape | None = None  # what there is room for; another object where graphs were dropped

    def _make_forward(self, model: PreTrainedModel, family: Family) -> Forward:
        if self._kernels:
            from sdar_lm_eval.engines.native.forward.decoder import HEAD_DIMS
            from sdar_lm_eval.engines.native.forward.fused import FusedForward

            weights = family.fused(model) if model.config.head_dim in HEAD_DIMS else None
            if weights is not None:
                with self._on_device:
                    return FusedForward(weights, self.cache, reproducible=self._reproducible)
        return ModulesForward(model, self.cache)

    def compile(self, backend: str = "inductor") -> None:
        """Compile what a step does beside the model: see `compiling.py`."""
        self._lay_out = compiled(lay_out, backend)
        self._masked_positions = compiled(BatchState.masked_positions, backend)
        self._advance = compiled(BatchState.advance, backend)

    # Memory

    def allocate(self, pages: int, slots: int, sequences: Sequence[SequenceState]) -> None:
        """Make what one `generate` needs on the device; what is there and large enough is kept.

        Args:
            pages: that can be given out; the scratch page comes on top.
            slots: N.
            sequences: all that will run.
        """
        shape = Shape.of(sequences, pages, slots, self.cache.page_size)
        if self.shape is not None:
            shape = self.shape.grown_to(shape)
        if shape != self.shape:
            self._make(shape)
        self.batch.active.fill_(False)
        self._forecast = Forecast(self.batch.slots, self.batch.block)
        # Of the steps in flight: what they did, on the host, and the event after which it is there.
        self._arrivals: deque[tuple[torch.Tensor, torch.cuda.Event | None]] = deque()

    def _make(self, shape: Shape) -> None:
        self.shape = None
        self._forward_graphs = self._draw_graphs = None
        self.cache.reserve(shape.pages, shape.slots, shape.width)
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
        self._segments = self.forward.sizes(shape.slots, shape.block)
        self._draws = self._drawing.sizes()
        self.forward.reserve(self._segments[-1], shape.block, shape.width * self.cache.page_size)
        on_gpu = self.device.type == "cuda"
        self._forward_graphs = Graphs(self._forward, self._segments, enabled=on_gpu and self.forward.captures)
        self._draw_graphs = Graphs(self._draw, self._draws, enabled=on_gpu and self._drawing.by_kernel)
        packed = self.batch.packed
        # One for each step that can be in flight.
        self._on_host = itertools.cycle(
            [torch.empty_like(packed, device="cpu", pin_memory=on_gpu) for _ in range(MOST_IN_FLIGHT)]
        )
        self.shape = shape

    def out_of_memory(self, pages: int | None = None) -> EngineError:
        """The error of a run that memory does not suffice for; `pages` were asked for, or are there."""
        pages = self.cache.num_pages if pages is None else pages
        return EngineError(
            f"out of memory on {self.device}, with {pages:,} KV pages of {self.cache.page_size} tokens. Finished "
            "answers are kept (--use_cache); run again with a smaller max_active or kv_pages, or a smaller max_length."
        )

    def release(self) -> None:
        """Give the memory of the KV cache and of the graphs back; the next `allocate` makes them again."""
        self.cache.release()
        self.shape = None
        self._forward_graphs = self._draw_graphs = None

    # Sequences come and go

    def set_pages(self, sequences: Iterable[SequenceState]) -> None:
        """Write the pages of sequences that got new ones, or a slot."""
        self.cache.set_pages(sequences)

    def begin(self, sequences: Sequence[SequenceState]) -> None:
        """Put sequences whose prompts are prefilled into the batch."""
        if sequences:
            self.batch.begin(sequences)
            self._forecast.begin(sequences)

    def run_only(self, sequences: Sequence[SequenceState]) -> None:
        """Take all but these out of the batch, and write their pages once more."""
        stay = {sequence.slot for sequence in sequences if sequence.begun}
        self.stop([slot for slot in range(self.batch.slots) if slot not in stay])
        self.set_pages(sequences)

    def stop(self, slots: Sequence[int]) -> None:
        """Take slots out of the batch that the device does not know to be finished."""
        self.batch.stop(slots)
        self._forecast.stop(slots)

    @torch.no_grad()
    def prefill(self, chunks: Sequence[Chunk]) -> None:
        """Store keys and values of whole prompt blocks."""
        with self._on_device:
            self.forward.prefill(chunks)

    # Steps

    @torch.no_grad()
    def launch(self, context: int) -> bool:
        """Start a step: the batch's blocks go through the model once, and are unmasked. Does not wait for the step.

        With another step in flight, the step has room for what the other one is expected to leave.

        Args:
            context: most tokens that any block of it sees, its own included.

        Returns:
            Whether there is anything to run.
        """
        segments, draws = self._forecast.sizes()
        if not segments:
            return False
        assert self._forward_graphs is not None
        assert self._draw_graphs is not None
        assert len(self._arrivals) < MOST_IN_FLIGHT
        event = None
        with self._on_device:
            # `Graphs` rounds sizes up only where they are captured.
            if self.forward.fixed_rows:
                segments = rounded_up(self._segments, segments)
            if self._drawing.fixed_rows:
                draws = rounded_up(self._draws, draws)
            self._forward_graphs(segments, self.forward.context_key(context))
            self._draw_graphs(draws)
            arrival = next(self._on_host)
            arrival.copy_(self.batch.packed, non_blocking=True)
            if self.device.type == "cuda":
                event = torch.cuda.Event()  # type: ignore[no-untyped-call]
                event.record()
        self._arrivals.append((arrival, event))
        self._forecast.launched()
        return True

    def collect(self) -> Outcome:
        """Wait for the oldest step in flight, and return what it did."""
        arrival, event = self._arrivals.popleft()
        if event is not None:
            event.synchronize()
        outcome = self.batch.unpack(arrival)
        self._forecast.learn(outcome)
        return outcome

    def _forward(self, count: int, context: int) -> None:
        """Run `count` segments through the model."""
        segments, addresses = self._lay_out(self.batch, self.cache, count)
        self.forward.run(segments, addresses, context)

    def _draw(self, count: int) -> None:
        """Draw tokens for `count` masked positions, and advance the batch."""
        token, confidence, entropy = self._drawing(self._masked_positions(self.batch, count))
        self._advance(self.batch, token, confidence, entropy)


def lay_out(batch: BatchState, cache: PagedCache, count: int) -> tuple[Segments, Addresses]:
    """The blocks of a step, and where their tokens stand."""
    segments = batch.segments(count)
    addresses = cache.addresses(segments.slot, segments.start, segments.length, segments.length, batch.offsets)
    return segments, addresses
