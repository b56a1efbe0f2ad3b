"""The native engine's loop: admit -> prefill -> denoise and commit -> yield."""

from __future__ import annotations

import gc
import importlib.util
import logging
import os
import time
from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from typing import Any

import torch

from sdar_lm_eval.checkpoint import DTYPES, Checkpoint
from sdar_lm_eval.engines.base import (
    GenerationRequest,
    GenerationResult,
    LikelihoodConfig,
    Results,
    ScoreRequest,
    ScoreResult,
    at_least_one,
    check_bool,
    check_rope,
    end_of_answer,
    not_finite,
)
from sdar_lm_eval.engines.native import attention
from sdar_lm_eval.engines.native.pages import PagePool
from sdar_lm_eval.engines.native.runner import MOST_UNDER_WAY, Runner, Shape
from sdar_lm_eval.engines.native.scheduler import Scheduler, Sequence
from sdar_lm_eval.engines.native.scoring import Limits, Scoring
from sdar_lm_eval.engines.native.state import Outcome
from sdar_lm_eval.engines.native.strategies import STRATEGIES
from sdar_lm_eval.engines.runs import (
    Closable,
    Failures,
    OneRun,
    environment,
    is_out_of_memory,
    peak_of_process,
    warm_up_requests,
)
from sdar_lm_eval.engines.types import EngineInfo
from sdar_lm_eval.errors import EngineError, UserError

logger = logging.getLogger(__name__)

PAGE_SIZE = 16
DEFAULT_ACTIVE = {"cpu": 32, "cuda": 256}
PREFILL_CHUNK = {"cpu": 1024, "cuda": 16384}
MEMORY_FRACTION = 0.85  # of the GPU memory that is free after the weights, for KV pages
CPU_CACHE_BYTES = 4 << 30


class NativeEngine(Closable):
    """SDAR on torch and transformers, with continuous batching over paged KV.

    Args:
        checkpoint: the opened checkpoint; its weights are loaded here.
        device: "cpu", "cuda", "cuda:1", ...; "auto" is the first GPU if there is one.
        dtype: "float32", "bfloat16" or "float16"; "auto" is float32 on the CPU and the checkpoint's own on a GPU.
        max_active: sequences running at once; None: 32 on the CPU, 256 on a GPU.
        kv_pages: most pages of 16 tokens for keys and values; None: what the requests need, within 85% of the GPU's
            free memory, or 4 GiB on the CPU.
        kernels: run a dense model with Triton kernels, on a GPU as CUDA graphs, in the place of transformers' modules;
            None: on GPUs of compute capability 8.0 and later, where triton is installed. True also refuses a remasking
            strategy that has no kernel; with None PyTorch runs its rule.
        reproducible: a generated answer is the same to the bit whatever runs beside it: matrix products in which a row
            does not depend on the others (in 16 bits on Hopper GPUs) or of a fixed size, padded (elsewhere), and
            requests with unlike settings one after the other. It takes kernels and a dense model.
        share_prefixes: prompts that begin alike share the KV of that beginning, which is computed once. Off: for
            comparison.

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
        self._warm_shape: Shape | None = None  # whose kernels are compiled
        self._device = resolve_device(device)
        self._dtype = _resolve_dtype(dtype, self._device, checkpoint)
        self._max_active = None if max_active is None else at_least_one("max_active", max_active)
        self._kv_pages = None if kv_pages is None else at_least_one("kv_pages", kv_pages)
        self._share_prefixes = check_bool("share_prefixes", share_prefixes)
        self._reproducible = check_bool("reproducible", reproducible)
        self._kernels_demanded = kernels is True
        self._kernels = _resolve_kernels(kernels, self._device)
        self._most_under_way = MOST_UNDER_WAY if self._device.type == "cuda" else 1
        self._preemptions = self._shared_prompt_tokens = 0
        model = checkpoint.load_model(dtype=self._dtype, device=self._device, attention=attention.NAME)
        self._model = model
        self._runner = Runner(
            model, checkpoint.mask_token_id, PAGE_SIZE, kernels=self._kernels, reproducible=self._reproducible
        )
        if self._reproducible and not self._runner.is_fused:
            raise UserError(
                "reproducible=true needs the kernels, which run dense models on GPUs: this is "
                f"{type(model).__name__} on {self._device} with kernels={str(self._kernels).lower()}."
            )
        if self._reproducible:
            logger.info(
                "reproducible=true: %s.",
                "matrix products of a fixed size, some of it padding"
                if self._runner.fixes_rows
                else "matrix products in which a row does not depend on the others",
            )

    @property
    def info(self) -> EngineInfo:
        """See `Engine.info`."""
        return EngineInfo(
            engine="native",
            device=str(self._device),
            dtype=str(self._dtype).removeprefix("torch."),
            max_active=self._max_active or DEFAULT_ACTIVE[self._device.type],
            extra={
                "kernels": self._kernels,
                "reproducible": self._reproducible,
                "preemptions": self._preemptions,
                "shared_prompt_tokens": self._shared_prompt_tokens,
            },
            environment=environment(self._device),
        )

    def peak_memory_bytes(self) -> int:
        """See `Engine.peak_memory_bytes`."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return peak_of_process()

    def _unload(self) -> None:
        """Free model, KV cache and graphs: nothing else refers to them but they to each other."""
        del self._model, self._runner
        self._warm_shape = None
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def prepare(self, requests: SequenceOf[GenerationRequest]) -> None:
        """See `Engine.prepare`: memory; on a GPU kernels and the first CUDA graphs, others are captured on the way."""
        with self._one_run():
            self._check_strategies(requests)
            groups = self._groups(requests)
            if len(groups) == 1:
                max_active, _ = self._allocate(_sequences(requests, groups[0]))
                if self._device.type == "cuda" and self._warm_shape is not self._runner.shape:
                    self._warm_up(requests, max_active)
                    self._warm_shape = self._runner.shape

    def _warm_up(self, requests: SequenceOf[GenerationRequest], max_active: int) -> None:
        """Run short requests, so that compiling and capturing does not count as generation."""
        counted = self._preemptions, self._shared_prompt_tokens
        short = warm_up_requests(requests, max_active)
        for _ in self._generate(_sequences(short, list(range(max_active))), []):
            pass
        self._preemptions, self._shared_prompt_tokens = counted

    def generate(self, requests: SequenceOf[GenerationRequest]) -> Results[GenerationResult]:
        """See `Engine.generate`. Requests are admitted in the order given."""
        with self._one_run():
            self._check_strategies(requests)
            failures = Failures()
            for together in self._groups(requests):
                yield from self._generate_group(requests, together, failures)
            failures.raise_if_any(len(requests))

    def _check_strategies(self, requests: SequenceOf[GenerationRequest]) -> None:
        """Refuse strategies without a kernel, where the user asked for kernels.

        Raises:
            UserError: there is one.
        """
        asked = {request.decoding.remasking_strategy for request in requests} if self._kernels_demanded else set()
        if without := sorted(name for name in asked if not STRATEGIES[name].has_kernel):
            implemented = ", ".join(name for name, strategy in STRATEGIES.items() if strategy.has_kernel)
            raise UserError(
                f"kernels=true: no kernel has remasking_strategy={' or '.join(without)}. Leave kernels out, so that "
                f"PyTorch runs its rule, or choose one of {implemented}."
            )

    def _generate_group(
        self, requests: SequenceOf[GenerationRequest], together: list[int], failures: Failures
    ) -> Iterator[tuple[int, GenerationResult]]:
        """Run requests together, then those alone whose logits were not numbers: their neighbours' KV may be why.

        What is masked is multiplied by zero, and zero times NaN is NaN: KV that is not numbers spreads by padding, and
        by pages that had another owner.
        """
        suspects: list[int] = []
        yield from self._generate(_sequences(requests, together), suspects)
        for index in suspects:
            self._runner.clear_pages()
            unanswered: list[int] = []
            yield from self._generate(_sequences(requests, [index]), unanswered)
            if unanswered:
                failures.add(index, not_finite(str(self._dtype)))

    def _groups(self, requests: SequenceOf[GenerationRequest]) -> list[list[int]]:
        """Indices of the requests that run together: those of like settings, where results are to be reproducible."""
        groups: dict[Any, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(request.decoding if self._reproducible else None, []).append(index)
        return list(groups.values())

    def _generate(self, sequences: list[Sequence], suspects: list[int]) -> Iterator[tuple[int, GenerationResult]]:
        """Run sequences; `suspects` gets the indices of those whose logits are not numbers."""
        max_active, pages = self._allocate(sequences)
        pool = PagePool(pages, PAGE_SIZE)
        scheduler = Scheduler(
            sequences, pool, max_active, PREFILL_CHUNK[self._device.type], share_prefixes=self._share_prefixes
        )
        yield from self._run(scheduler, suspects)
        pool.check_integrity([])
        self._shared_prompt_tokens += scheduler.shared_prompt_tokens
        if scheduler.preemptions:
            self._preemptions += scheduler.preemptions
            logger.info(
                "KV pages ran out: %d sequences were preempted and run again; answers are the same. "
                "A smaller max_active or a larger kv_pages avoids it.",
                scheduler.preemptions,
            )

    def _allocate(self, sequences: list[Sequence]) -> tuple[int, int]:
        """Have memory for these; returns how many run at once, and the number of KV pages.

        Raises:
            UserError: a block is too long for the kernels, or a request for the memory.
        """
        longest = max(sequence.block_length for sequence in sequences)
        if longest > self._runner.longest_block:
            raise UserError(
                f"block_length={longest}: the kernels take blocks of up to {self._runner.longest_block} tokens in "
                f"{str(self._dtype).removeprefix('torch.')}; run longer ones with kernels=false."
            )
        max_active = min(self._max_active or DEFAULT_ACTIVE[self._device.type], len(sequences))
        pages = self._pages_for(sequences, max_active)
        try:
            self._runner.allocate(pages, max_active, sequences)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise EngineError(self._out_of_memory(pages)) from error
        return max_active, pages

    def score(self, requests: SequenceOf[ScoreRequest], config: LikelihoodConfig) -> Results[ScoreResult]:
        """See `Scorer.score`. `max_active` bounds the requests of a batch, `kv_pages` its clean tokens."""
        with self._one_run():
            self._runner.release_cache()  # generation and scoring never run at once, and each may need all memory
            if self._device.type == "cuda":
                torch.cuda.empty_cache()  # so that what was given back counts as free
            pages = self._kv_pages or self._pages_in_memory()
            limits = Limits.on(self._device.type, pages * PAGE_SIZE, self._max_active)
            failures = Failures()
            try:
                scoring = Scoring(self._model, self._checkpoint.mask_token_id, limits)
                yield from scoring.run(requests, config, failures)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                raise EngineError(
                    f"out of memory on {self._device} while scoring. Finished scores are kept (--use_cache); run again "
                    "with max_active (requests at once) or kv_pages, or a smaller max_length."
                ) from error
            failures.raise_if_any(len(requests))

    def _run(self, scheduler: Scheduler, suspects: list[int]) -> Iterator[tuple[int, GenerationResult]]:
        """Step after step. On a GPU the next one is launched before the one under way is done.

        The device knows by itself which sequences are finished, but for stop strings: those take part in the step that
        is under way, which nobody reads.
        """
        under_way: deque[dict[int, tuple[Sequence, int]]] = deque()
        finished: list[tuple[int, GenerationResult]] = []  # given out once the GPU has something to do meanwhile
        while scheduler.unfinished:
            try:
                prepared = self._prepare_step(scheduler)
                launched = self._launch(scheduler)
            except BaseException as error:
                yield from finished
                finished = []
                if not is_out_of_memory(error):
                    raise
                self._make_room(scheduler, error)
                continue
            yield from finished
            finished = []
            if launched:
                under_way.append(launched)
            elif not under_way and scheduler.running and not prepared:
                raise EngineError(
                    f"the engine stands still with {len(scheduler.running)} unfinished sequences: this should never "
                    "happen. Finished answers are kept (--use_cache); run again with a smaller max_active."
                )
            if under_way and (not launched or len(under_way) == self._most_under_way):
                finished = self._settle(scheduler, self._runner.collect(), under_way.popleft(), suspects)
                if self._most_under_way == 1:  # nothing runs meanwhile
                    yield from finished
                    finished = []
        yield from finished

    def _make_room(self, scheduler: Scheduler, error: BaseException) -> None:
        """After an out-of-memory error: go on with half the sequences, and half the prompt tokens a step, for a while.

        Raises:
            EngineError: there is only one, and hardly a prompt's token a step.
        """
        running = len(scheduler.running)
        if not scheduler.can_shrink:
            raise EngineError(self._out_of_memory(self._runner.num_pages)) from error
        scheduler.shrink()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        try:
            # What a plan asked for may have been done in part.
            self._runner.run_only(scheduler.running)
        except Exception as again:
            if not is_out_of_memory(again):
                raise
            raise EngineError(self._out_of_memory(self._runner.num_pages)) from again
        logger.warning(
            "Out of memory on %s with %d sequences at once; %d go on, with half the prompt tokens a step. More are "
            "tried again later. Answers are the same.",
            self._device,
            running,
            len(scheduler.running),
        )

    def _out_of_memory(self, pages: int) -> str:
        return (
            f"out of memory on {self._device}, with {pages:,} KV pages of {PAGE_SIZE} tokens. Finished answers are "
            "kept (--use_cache); run again with a smaller max_active or kv_pages, or a smaller max_length."
        )

    def _prepare_step(self, scheduler: Scheduler) -> bool:
        """Admit, prefill, and put into the batch whatever there is room for; returns whether there was anything."""
        plan = scheduler.plan()
        self._runner.stop(plan.left)
        self._runner.set_pages(plan.paged)
        if plan.prefill:
            now = time.perf_counter()
            self._runner.prefill(plan.prefill)
            for sequence, _, end in plan.prefill:
                scheduler.prefilled(sequence, end)
                sequence.prefill_forwards += 1
                sequence.started = sequence.started or now
        self._runner.begin(plan.starting)
        for sequence in plan.starting:
            sequence.begun = True
            sequence.started = sequence.started or time.perf_counter()
        return bool(plan.prefill or plan.starting)

    def _launch(self, scheduler: Scheduler) -> dict[int, tuple[Sequence, int]]:
        """Start a step; returns who is in which slot meanwhile, if anything runs."""
        # With another step under way, it may begin the block after the one that the host knows of.
        blocks = self._most_under_way
        context = max((min(s.block_start + blocks * s.block_length, s.longest) for s in scheduler.running), default=0)
        if not scheduler.running or not self._runner.launch(context):
            return {}
        return {sequence.slot: (sequence, sequence.turn) for sequence in scheduler.running}

    def _settle(
        self,
        scheduler: Scheduler,
        outcome: Outcome,
        launched: dict[int, tuple[Sequence, int]],
        suspects: list[int],
    ) -> list[tuple[int, GenerationResult]]:
        """Take over what a step did; returns what finished. Sequences without numbers leave, and become suspects."""
        finished, any_stuck = [], outcome.stuck.any()
        for slot in outcome.took_part.nonzero()[0].tolist():
            sequence, turn = launched[slot]
            if sequence.turn != turn:
                continue  # it has left the slot since
            if any_stuck and outcome.stuck[slot]:
                suspects.append(sequence.index)
                self._runner.clear_pages(scheduler.discard(sequence))
                continue
            sequence.denoising_forwards += 1
            sequence.commit_forwards += int(outcome.committed[slot])
            if not outcome.decided[slot]:
                continue
            if reason := self._decide(sequence, outcome):
                scheduler.finish(sequence, device_knows=not sequence.request.stop_strings)
                finished.append((sequence.index, _result(sequence, reason)))
        return finished

    def _decide(self, sequence: Sequence, outcome: Outcome) -> str:
        """Take the new tokens of a decided block; return why the answer ends with it, or ""."""
        slot, first = sequence.slot, len(sequence.tokens) - sequence.block_start
        new = outcome.tokens[slot, first : sequence.block_length].tolist()
        earlier = sequence.tokens[len(sequence.request.prompt_ids) :]
        count, reason = end_of_answer(new, sequence.request, self._checkpoint.decode, earlier)
        sequence.decide(new[:count])
        if sequence.request.record_steps:
            sequence.unmasked_at += outcome.unmasked_at[slot, first : first + count].tolist()
            sequence.confidences += outcome.confidence[slot, first : first + count].tolist()
        return reason

    def _pages_for(self, sequences: list[Sequence], max_active: int) -> int:
        """How many KV pages to hold: those of the `max_active` longest requests, as far as memory allows."""
        needs = sorted((-(-sequence.longest // PAGE_SIZE) for sequence in sequences), reverse=True)
        wanted = sum(needs[:max_active])
        pages = min(wanted, self._kv_pages or self._pages_in_memory())
        if pages < wanted and self._kv_pages is None and self._device.type == "cuda":
            torch.cuda.empty_cache()  # what torch keeps, unused
            pages = min(wanted, self._pages_in_memory())
        if needs[0] > pages:
            mib = self._runner.bytes_per_page() / 2**20
            raise UserError(
                f"a request of {max(s.longest for s in sequences):,} tokens (prompt and answer) needs {needs[0]:,} KV "
                f"pages of {PAGE_SIZE} tokens, {needs[0] * mib:,.1f} MiB; there are {pages:,}, {pages * mib:,.1f} MiB. "
                f"Lower max_gen_toks or max_length, or give kv_pages={needs[0]} or more where there is memory for them."
            )
        return pages

    def _pages_in_memory(self) -> int:
        memory = CPU_CACHE_BYTES
        if self._device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self._device)
            cache = self._runner.cache
            memory = int(free * MEMORY_FRACTION) + (cache.nbytes if cache is not None else 0)
        return memory // self._runner.bytes_per_page()


def _sequences(requests: SequenceOf[GenerationRequest], together: list[int]) -> list[Sequence]:
    return [Sequence(i, requests[i], list(requests[i].prompt_ids)) for i in together]


def _result(sequence: Sequence, reason: str) -> GenerationResult:
    assert sequence.started is not None
    recorded = sequence.request.record_steps
    return GenerationResult(
        token_ids=tuple(sequence.tokens[len(sequence.request.prompt_ids) :]),
        finish_reason=reason,
        prefill_forwards=sequence.prefill_forwards,
        denoising_forwards=sequence.denoising_forwards,
        commit_forwards=sequence.commit_forwards,
        seconds=time.perf_counter() - sequence.started,
        unmasked_at=tuple(sequence.unmasked_at) if recorded else None,
        confidences=tuple(sequence.confidences) if recorded else None,
    )


def resolve_device(device: str) -> torch.device:
    """Turn a device's name into a torch device that is there.

    Raises:
        UserError: not a device's name, or a GPU that this machine does not have.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
        if resolved.type not in DEFAULT_ACTIVE:
            raise ValueError
    except (RuntimeError, ValueError):
        raise UserError(f"device={device!r} is unknown; choose cpu, cuda, cuda:N or auto.") from None
    if resolved.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (resolved.index or 0) >= count:
            raise UserError(f"device={device!r}: this machine has {count or 'no'} usable GPU(s); choose "
                            f"{', '.join(f'cuda:{i}' for i in range(count)) or 'cpu'} or auto.")  # fmt: skip
    return resolved


def _resolve_kernels(kernels: bool | None, device: torch.device) -> bool:
    installed = importlib.util.find_spec("triton") is not None
    if kernels is None:
        return installed and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    kernels = check_bool("kernels", kernels)
    if kernels and not installed:
        raise UserError("kernels=true needs triton, which is not installed: pip install triton")
    if kernels and device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise UserError(f"kernels=true needs a GPU, and the device is {device}; leave kernels out, or set it to false.")
    return kernels


def _resolve_dtype(dtype: str, device: torch.device, checkpoint: Checkpoint) -> torch.dtype:
    if dtype == "auto":
        own = checkpoint.config.get("torch_dtype") or checkpoint.config.get("dtype") or "bfloat16"
        dtype = "float32" if device.type == "cpu" else own
    dtype = dtype.removeprefix("torch.")
    if dtype not in DTYPES:
        raise UserError(f"dtype={dtype!r} is unknown; choose {', '.join(DTYPES)} or auto.")
    resolved: torch.dtype = getattr(torch, dtype)
    return resolved
