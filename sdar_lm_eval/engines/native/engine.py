"""The native engine: options, memory, requests and results. `loop.py` runs the steps, `scoring/` computes scores."""

from __future__ import annotations

import gc
import logging
from collections import deque
from collections.abc import Iterator, Sequence

import torch

from sdar_lm_eval.checkpoint import Checkpoint
from sdar_lm_eval.checks import at_least_one, check_bool, if_given
from sdar_lm_eval.decoding import DecodingConfig
from sdar_lm_eval.engines.native.forward import attention
from sdar_lm_eval.engines.native.loop import Finished, Loop
from sdar_lm_eval.engines.native.options import resolve_device, resolve_dtype, resolve_kernels
from sdar_lm_eval.engines.native.pages import PagePool
from sdar_lm_eval.engines.native.runner import MOST_IN_FLIGHT, Runner, Shape
from sdar_lm_eval.engines.native.scheduler import Scheduler, SequenceState
from sdar_lm_eval.engines.native.scoring.batches import Limits
from sdar_lm_eval.engines.native.scoring.scoring import Scoring, rows_forward
from sdar_lm_eval.engines.runs import (
    Closable,
    Failures,
    OneRun,
    check_rope,
    check_tokens,
    environment,
    is_out_of_memory,
    not_finite,
    older_objects_frozen,
    peak_of_process,
    warm_up_requests,
)
from sdar_lm_eval.engines.types import (
    EngineInfo,
    GenerationRequest,
    GenerationResult,
    LikelihoodConfig,
    Results,
    ScoreRequest,
    ScoreResult,
    Watch,
)
from sdar_lm_eval.errors import EngineError, UserError

logger = logging.getLogger(__name__)

PAGE_SIZE = 16
DEFAULT_ACTIVE = {"cpu": 32, "cuda": 256}
PREFILL_CHUNK = {"cpu": 1024, "cuda": 16384}
MEMORY_FRACTION = 0.85  # share of the GPU memory that is free after loading the weights: for KV pages
CPU_CACHE_BYTES = 4 << 30
CAPTURE_SECONDS = 8.0  # most time that `prepare` captures CUDA graphs


class NativeEngine(Closable):
    """SDAR on torch and transformers, with continuous batching over paged KV.

    Args:
        checkpoint: the opened checkpoint; this class loads its weights.
        device: "cpu", "cuda", "cuda:1", ...; "auto" is the first GPU if there is one.
        dtype: "float32", "bfloat16" or "float16"; "auto" is float32 on the CPU and the checkpoint's own on a GPU.
        max_active: most sequences that run at once; None: 32 on the CPU, 256 on a GPU.
        kv_pages: most pages of 16 tokens for keys and values; None: what the requests need, within 85% of the GPU's
            free memory, or 4 GiB on the CPU.
        kernels: whether to run the model with Triton kernels, on a GPU as CUDA graphs, instead of transformers'
            modules; None: on GPUs of compute capability 8.0 and later, where triton is installed.
        reproducible: whether a generated answer is the same to the bit whatever else is in the batch. Products are
            batch-invariant (in 16 bits on Hopper GPUs), or padded to a fixed size (elsewhere). Requests with
            different settings run one after the other. Needs kernels.
        share_prefixes: whether prompts with a common prefix share the prefix's KV, which is computed once. False is
            for comparison.

    Attributes:
        device: the device that the engine computes on.
        model: transformers' model.
        runner: runs the steps.
        steps_in_flight: most steps that are launched before the oldest one's outcome is collected.

    Raises:
        UserError: no such device or dtype, the weights do not fit their config, or its RoPE depends on the batch.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        device: str = "auto",
        dtype: str = "auto",
        max_active: int | None = None,
        kv_pages: int | None = None,
        kernels: bool | None = None,
        reproducible: bool = False,
        share_prefixes: bool = True,
    ) -> None:
        check_rope(checkpoint)
        self._checkpoint = checkpoint
        self._one_run = OneRun("native")
        self._warm_shape: Shape | None = None  # the shape that kernels are compiled for
        self.device = resolve_device(device)
        self._dtype = resolve_dtype(dtype, self.device, checkpoint)
        self._max_active = if_given(at_least_one, "max_active", max_active)
        self._kv_pages = if_given(at_least_one, "kv_pages", kv_pages)
        self._share_prefixes = check_bool("share_prefixes", share_prefixes)
        self._reproducible = check_bool("reproducible", reproducible)
        self._kernels = resolve_kernels(kernels, self.device)
        self.steps_in_flight = MOST_IN_FLIGHT if self.device.type == "cuda" else 1
        self._preemptions = self._shared_prompt_tokens = 0
        self.model = checkpoint.load_model(dtype=self._dtype, device=self.device, attention=attention.NAME)
        self.runner = Runner(
            self.model, checkpoint.family, checkpoint.mask_token_id, PAGE_SIZE, kernels=self._kernels,
            reproducible=self._reproducible,
        )  # fmt: skip
        if self._reproducible and not self.runner.forward.captures:
            raise UserError(
                "reproducible=true needs the kernels, which run on GPUs: this is "
                f"{type(self.model).__name__} on {self.device} with kernels={str(self._kernels).lower()}."
            )
        if self._reproducible:
            logger.info(
                "reproducible=true: %s.",
                "matrix products of a fixed size, some of it padding"
                if self.runner.forward.fixed_rows
                else "matrix products in which a row does not depend on the others",
            )

    @property
    def info(self) -> EngineInfo:
        """See `Engine.info`."""
        return EngineInfo(
            engine="native",
            device=str(self.device),
            dtype=str(self._dtype).removeprefix("torch."),
            max_active=self._max_active or DEFAULT_ACTIVE[self.device.type],
            answer_options={"reproducible": self._reproducible},
            extra={
                "kernels": self._kernels,
                "preemptions": self._preemptions,
                "shared_prompt_tokens": self._shared_prompt_tokens,
            },
            counted=("preemptions", "shared_prompt_tokens"),
            environment=environment(self.device),
        )

    def peak_memory_bytes(self) -> int:
        """See `Engine.peak_memory_bytes`."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return peak_of_process()

    def _unload(self) -> None:
        """Free model, KV cache and graphs. These refer to each other in cycles, so the collector has to run."""
        del self.model, self.runner
        self._warm_shape = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def prepare(self, requests: Sequence[GenerationRequest]) -> None:
        """See `Engine.prepare`: allocates memory; on a GPU measures times, compiles kernels and captures CUDA graphs.

        A size whose graph is not captured here gets one when it first occurs.
        """
        with self._one_run():
            check_tokens((request.prompt_ids for request in requests), self._checkpoint)
            groups = self._groups(requests)
            if len(groups) == 1:
                sequences = _sequences(requests, groups[0])
                max_active, _ = self._allocate(sequences)
                if self.device.type == "cuda" and self._warm_shape is not self.runner.shape:
                    self._warm_up(requests, max_active)
                    shortest = min(len(sequence.tokens) for sequence in sequences)
                    self.runner.capture(shortest, max(sequence.longest for sequence in sequences), CAPTURE_SECONDS)
                    self._warm_shape = self.runner.shape

    def _warm_up(self, requests: Sequence[GenerationRequest], max_active: int) -> None:
        """Run short requests, so that compiling and capturing does not count as generation time."""
        counted = self._preemptions, self._shared_prompt_tokens
        short = warm_up_requests(requests, max_active)
        deque(self._generate(_sequences(short, list(range(max_active))), []), maxlen=0)
        self._preemptions, self._shared_prompt_tokens = counted

    def generate(self, requests: Sequence[GenerationRequest]) -> Results[GenerationResult]:
        """See `Engine.generate`. Requests are admitted in the order given."""
        return self.generate_watched(requests, None)

    def generate_watched(self, requests: Sequence[GenerationRequest], watch: Watch | None) -> Results[GenerationResult]:
        """See `Watchable.generate_watched`. On a GPU a step is shown while the next one runs."""
        with self._one_run(), older_objects_frozen():
            check_tokens((request.prompt_ids for request in requests), self._checkpoint)
            failures = Failures()
            for together in self._groups(requests):
                yield from self._generate_group(requests, together, failures, watch)
            failures.raise_if_any(len(requests))

    def _generate_group(
        self, requests: Sequence[GenerationRequest], together: list[int], failures: Failures, watch: Watch | None
    ) -> Iterator[Finished]:
        """Run requests together. Run each request whose logits are not finite once more, without the others.

        Another sequence's KV may be the reason: masked KV is multiplied by zero, and zero times NaN is NaN. So NaN
        spreads through padding, and through pages that another sequence held before.
        """
        suspects: list[int] = []
        yield from self._generate(_sequences(requests, together), suspects, watch)
        for index in suspects:
            self.runner.cache.clear()
            unanswered: list[int] = []
            yield from self._generate(_sequences(requests, [index]), unanswered, watch)
            if unanswered:
                failures.add(index, not_finite(str(self._dtype)))

    def _groups(self, requests: Sequence[GenerationRequest]) -> list[list[int]]:
        """Indices of the requests that run together: all of them, or those of equal settings where `reproducible`."""
        groups: dict[DecodingConfig | None, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(request.decoding if self._reproducible else None, []).append(index)
        return list(groups.values())

    def _generate(
        self, sequences: list[SequenceState], suspects: list[int], watch: Watch | None = None
    ) -> Iterator[Finished]:
        """Run sequences; `suspects` gets the indices of those whose logits are not finite."""
        max_active, pages = self._allocate(sequences)
        pool = PagePool(pages, PAGE_SIZE)
        scheduler = Scheduler(
            sequences, pool, max_active, PREFILL_CHUNK[self.device.type], share_prefixes=self._share_prefixes
        )
        loop = Loop(scheduler, self.runner, self._checkpoint.decode, self.steps_in_flight, watch)
        yield from loop.run()
        suspects += loop.suspects
        pool.check_integrity([])
        self._shared_prompt_tokens += scheduler.shared_prompt_tokens
        if scheduler.preemptions:
            self._preemptions += scheduler.preemptions
            logger.info(
                "KV pages ran out: %d sequences were preempted and run again; answers are the same. "
                "A smaller max_active or a larger kv_pages avoids preemptions.",
                scheduler.preemptions,
            )

    def _allocate(self, sequences: list[SequenceState]) -> tuple[int, int]:
        """Allocate memory for sequences; return how many run at once, and the number of KV pages.

        Raises:
            UserError: a block is too long for the kernels, or a request is too long for the memory.
        """
        longest = max(sequence.block_length for sequence in sequences)
        if longest > (most := self.runner.forward.longest_block):
            raise UserError(
                f"block_length={longest}: the kernels take blocks of up to {most} tokens in "
                f"{str(self._dtype).removeprefix('torch.')}; run longer ones with kernels=false."
            )
        max_active = min(self._max_active or DEFAULT_ACTIVE[self.device.type], len(sequences))
        pages = self._pages_for(sequences, max_active)
        try:
            self.runner.allocate(pages, max_active, sequences)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise self.runner.out_of_memory(pages) from error
        return max_active, pages

    def score(self, requests: Sequence[ScoreRequest], config: LikelihoodConfig) -> Results[ScoreResult]:
        """See `Scorer.score`. `max_active` bounds the requests of a batch, `kv_pages` its clean tokens."""
        with self._one_run():
            texts = (text for request in requests for text in (request.context_ids, request.continuation_ids))
            check_tokens(texts, self._checkpoint)
            self.runner.release()  # scoring may need all memory, and generation does not run meanwhile
            if self.device.type == "cuda":
                torch.cuda.empty_cache()  # so that the released memory counts as free
            pages = self._kv_pages or self._pages_in_memory()
            forward = rows_forward(self.model, self.runner.forward, config.block_length)
            limits = Limits.on(self.device.type, pages * PAGE_SIZE, self._max_active, fused=forward.fused)
            failures = Failures()
            try:
                scoring = Scoring(forward, self._checkpoint.mask_token_id, limits)
                yield from scoring.run(requests, config, failures)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                raise EngineError(
                    f"out of memory on {self.device} while scoring. Finished scores are kept (--use_cache); run again "
                    "with max_active (requests at once) or kv_pages, or a smaller max_length."
                ) from error
            failures.raise_if_any(len(requests))

    def _pages_for(self, sequences: list[SequenceState], max_active: int) -> int:
        """Number of KV pages to allocate: those of the `max_active` longest requests, as far as memory allows."""
        needs = sorted((-(-sequence.longest // PAGE_SIZE) for sequence in sequences), reverse=True)
        wanted = sum(needs[:max_active])
        pages = min(wanted, self._kv_pages or self._pages_in_memory())
        if pages < wanted and self._kv_pages is None and self.device.type == "cuda":
            torch.cuda.empty_cache()  # so that torch's unused memory counts as free
            pages = min(wanted, self._pages_in_memory())
        if needs[0] > pages:
            mib = self.runner.cache.bytes_per_page / 2**20
            raise UserError(
                f"a request of {max(s.longest for s in sequences):,} tokens (prompt and answer) needs {needs[0]:,} KV "
                f"pages of {PAGE_SIZE} tokens, {needs[0] * mib:,.1f} MiB; there are {pages:,}, {pages * mib:,.1f} MiB. "
                f"Lower max_gen_toks or max_length, or give kv_pages={needs[0]} or more if the memory suffices."
            )
        return pages

    def _pages_in_memory(self) -> int:
        memory = CPU_CACHE_BYTES
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            held = self.runner.cache.kv
            memory = int(free * MEMORY_FRACTION) + (held.nbytes if held is not None else 0)
        return memory // self.runner.cache.bytes_per_page


def _sequences(requests: Sequence[GenerationRequest], together: list[int]) -> list[SequenceState]:
    return [SequenceState(i, requests[i], list(requests[i].prompt_ids)) for i in together]
