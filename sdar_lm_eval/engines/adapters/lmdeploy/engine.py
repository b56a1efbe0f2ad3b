"""SDAR through LMDeploy's PyTorch engine (github.com/InternLM/lmdeploy): several GPUs, and mixtures of experts.

LMDeploy's `pipeline` takes text, and adds stop tokens of its own. What lies below it takes and gives tokens; it is what
LMDeploy's own benchmarks use: `Engine`, an instance of it for each request that is under way, and `async_stream_infer`,
which yields a block at a time. The engine lives in an event loop of its own (loop.py).

How blocks are denoised is settled when the engine is made. So requests run in groups of like settings; for another
strategy, threshold, number of steps or block length it is made anew. Within a group, those that run together have the
same temperature, top_k, top_p and stop tokens: LMDeploy mixes these up among the requests of a batch
(strategies/dllm/sampling.py and model_agent.py; see `_together`).

Where a rule is LMDeploy's, the file below lmdeploy/pytorch that has it is named; requirements.py says which versions
were read.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import contextlib
import importlib
import importlib.metadata
import itertools
import logging
import platform
import queue
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from typing import Any

import torch
import transformers

from sdar_lm_eval.checkpoint import Checkpoint
from sdar_lm_eval.engines.adapters.common import (
    HEAD_DIMS,
    BareConfig,
    Decodes,
    Draw,
    NoAnswerError,
    answer_end,
    check_lengths,
    check_mask_token,
    check_requests,
    check_tensor_parallel,
    end_processes,
    free_memory,
    gpu_named,
    grouped,
    half_precision,
    listed,
    plain_config,
    processes_started,
    register_configs,
    rope_theta,
    stop_ids_of,
    to_share,
    version_of,
    world_size,
)
from sdar_lm_eval.engines.adapters.lmdeploy.hooks import (
    MODEL_TYPES,
    Forwards,
    give_seeds,
    import_lmdeploy,
    log_kept,
    register_model_types,
)
from sdar_lm_eval.engines.adapters.lmdeploy.loop import LoopThread
from sdar_lm_eval.engines.adapters.lmdeploy.requirements import DEVIATIONS, STRATEGIES, executor_for, find_lmdeploy
from sdar_lm_eval.engines.base import (
    DecodingConfig,
    GenerationRequest,
    GenerationResult,
    Results,
    at_least_one,
    check_rope,
    end_of_answer,
)
from sdar_lm_eval.engines.runs import Failures, OneRun, warm_up_requests
from sdar_lm_eval.errors import EngineError, UserError

logger = logging.getLogger(__name__)

_Result = tuple[int, GenerationResult]  # position of the request, what it got

MAX_ACTIVE = 256  # unless the user says otherwise
PAGE_SIZE = 64  # tokens; whole blocks fill it
PREFILL_TOKENS = 8192  # LMDeploy's default; longer prompts go in chunks of it
# What sampling needs for each logit: the weights' dtype, a sorted copy, its indices, probabilities.
BYTES_PER_LOGIT = 24
LOGITS_SHARE = 0.1  # of a GPU's memory at most
# What LMDeploy says of one request and not of itself (lmdeploy/messages.py, one folder up: ResponseType).
OF_ONE_REQUEST = ("INPUT_LENGTH_ERROR", "SESSION_REPEAT", "SESSION_NOT_EXIST", "CANCEL")
PATIENCE = 60.0  # seconds for requests or an engine to end
WATCH = 5.0  # seconds between looks at the worker processes, while there is no result


class SDARConfig(BareConfig):
    """SDAR, under a model type that LMDeploy has no rules of its own for."""

    model_type = MODEL_TYPES["sdar"]


class SDARMoeConfig(SDARConfig):
    """The same for SDAR MoE."""

    model_type = MODEL_TYPES["sdar_moe"]


DECODES = Decodes(
    engine="LMDeploy",
    strategies=STRATEGIES,
    block_lengths="with LMDeploy it can be",
    # strategies/ar/sampling.py: _gather_generated_ids
    repetition_penalty="LMDeploy counts the answer's tokens alone, not the prompt's, and mixes up the values of "
    "requests that run together",
)


@dataclass(frozen=True)
class _Fixed:
    """What is settled when the engine is made."""

    block_length: int
    strategy: str
    steps: int
    threshold: float


class LMDeploy:
    """SDAR on LMDeploy.

    The weights are loaded when the first requests are there.

    Args:
        checkpoint: the opened checkpoint.
        device: "cuda", "cuda:1", ... or "auto".
        dtype: "bfloat16" or "float16"; "auto" is the checkpoint's own where it is one of them, else bfloat16.
        max_active: sequences running at once; None: as many as fit, up to 256.
        tensor_parallel_size: GPUs of this machine that share the weights.
        data_parallel_size: copies of the model, each with a part of the documents. They are the processes that
            `accelerate launch` starts, so this can only say how many there are.
        cache_max_entry_count: the part of the memory that the weights leave, for keys and values.

    Raises:
        UserError: LMDeploy cannot run this checkpoint, or not with these options; says what can.
        EngineError: LMDeploy, something that it needs, or a GPU is missing.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        device: str = "auto",
        dtype: str = "auto",
        max_active: int | None = None,
        tensor_parallel_size: int = 1,
        data_parallel_size: int = 1,
        cache_max_entry_count: float = 0.8,
    ) -> None:
        self._checkpoint = checkpoint
        self._tensor_parallel_size = at_least_one("tensor_parallel_size", tensor_parallel_size)
        self._installed = find_lmdeploy()
        self._executor = executor_for(self._tensor_parallel_size)
        self._max_active = None if max_active is None else at_least_one("max_active", max_active)
        self._cache_share = to_share("cache_max_entry_count", cache_max_entry_count)
        self._device = gpu_named(device, "LMDeploy")
        self._dtype = half_precision(dtype, checkpoint, "LMDeploy")
        self._check_gpus(device, at_least_one("data_parallel_size", data_parallel_size))
        self._check_checkpoint()
        try:
            self._lmdeploy = import_lmdeploy()
        except Exception as error:
            raise EngineError(
                f"LMDeploy {self._installed.version} cannot be imported: {type(error).__name__}: {error}. Install what "
                'it lacks, with pip install "sdar-lm-eval[lmdeploy]", or use --model sdar.'
            ) from error
        self._one_run = OneRun("LMDeploy")
        self._engine: Any = None
        self._warm: set[Any] = set()  # settings whose kernels are compiled
        self._loop: LoopThread | None = None
        self._workers: list[BaseProcess] = []
        self._fixed: _Fixed | None = None
        self._active = 0  # most sequences that the engine is made for
        self._sessions = itertools.count(1)
        self._loads = 0

    # What it says of itself

    @property
    def info(self) -> Mapping[str, Any]:
        """See `Engine.info`."""
        return {
            "engine": "lmdeploy",
            "engine_version": self._installed.version,
            "engine_commit": self._installed.commit,
            "device": str(self._device),
            "dtype": self._dtype,
            "max_active": self._active or self._max_active or MAX_ACTIVE,
            "tensor_parallel_size": self._tensor_parallel_size,
            "executor": self._executor,
            "data_parallel_size": world_size(),
            "cache_max_entry_count": self._cache_share,
            "loads": self._loads,
            "deviations": dict(DEVIATIONS),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            **{name: version_of(name) for name in ("triton", *(["ray"] if self._executor == "ray" else []))},
            "python": platform.python_version(),
            "gpu": torch.cuda.get_device_name(self._device),
        }

    def peak_memory_bytes(self) -> int:
        """See `Engine.peak_memory_bytes`; with several GPUs, what is in use on the first one (others allocate it)."""
        if self._tensor_parallel_size > 1:
            free, total = torch.cuda.mem_get_info(self._device)
            return total - free
        return torch.cuda.max_memory_allocated(self._device)

    # What it refuses

    def _check_gpus(self, device: str, data_parallel_size: int) -> None:
        """Refuse a number of GPUs that there is not, or that LMDeploy would share out wrongly."""
        ranks, tensor_parallel = world_size(), self._tensor_parallel_size
        if data_parallel_size not in (1, ranks):
            raise UserError(
                f"data_parallel_size={data_parallel_size}, but {ranks} process(es) run. Give each copy of the model a "
                f"process: accelerate launch --multi_gpu --num_processes {data_parallel_size} -m lm_eval …"
            )
        if tensor_parallel == 1:
            return
        if ranks > 1:
            raise UserError(
                f"tensor_parallel_size={tensor_parallel} in {ranks} processes: each would take the same GPUs. Use one "
                "process, or tensor_parallel_size=1."
            )
        check_tensor_parallel(tensor_parallel)
        if device not in ("auto", "cuda"):
            raise UserError(
                f"device={device!r} with tensor_parallel_size={tensor_parallel}: LMDeploy takes the first GPUs. Choose "
                "others by CUDA_VISIBLE_DEVICES, and leave out device."
            )
        for name in ("num_attention_heads", "num_key_value_heads", "moe_intermediate_size", "intermediate_size"):
            value = self._checkpoint.config.get(name)
            if name == "num_key_value_heads" and value and tensor_parallel % value == 0:
                continue  # each GPU has one of them
            if value and value % tensor_parallel:
                raise UserError(
                    f"tensor_parallel_size={tensor_parallel} does not divide {name}={value} of checkpoint "
                    f"{self._checkpoint.name!r}. Choose a number that does."
                )

    def _check_checkpoint(self) -> None:
        """Refuse what LMDeploy would get wrong or stumble over.

        Raises:
            UserError: says what runs it.
        """
        check_rope(self._checkpoint)
        config = self._checkpoint.config

        def refuse(what: str) -> None:
            raise UserError(f"LMDeploy cannot run {self._checkpoint.name!r}: {what}. Use --model sdar.")

        if config.get("hidden_act", "silu") != "silu":  # models/sdar.py: SDARMLP
            refuse(f"its hidden_act is {config['hidden_act']!r}; LMDeploy takes silu for all")
        size = self._checkpoint.full_config()["head_dim"]
        if size not in HEAD_DIMS:
            refuse(f"its heads have {size} dimensions; tried are {listed(HEAD_DIMS)}")
        self._checkpoint.check_weights()

    def _check(self, requests: Sequence[GenerationRequest]) -> None:
        """Refuse requests that would be answered wrongly, before any of them runs."""
        check_requests(requests, DECODES, self._checkpoint)

    # Loading

    def prepare(self, requests: Sequence[GenerationRequest]) -> None:
        """See `Engine.prepare`: checks the requests, loads the weights and warms up, for the first settings."""
        with self._one_run():
            self._check(requests)
            if requests:
                groups = self._groups(requests)
                fixed, indices = next(iter(groups.items()))
                self._load(fixed, requests, len(groups))
                self._check_room(requests)
                for together in self._together(requests, indices):
                    key = Draw.of(requests[together[0]].decoding)
                    if key not in self._warm:
                        short = warm_up_requests([requests[i] for i in together], min(self._active, len(together)))
                        for _ in self._run(short, range(len(short)), Failures()):
                            pass
                        self._warm.add(key)

    def _check_room(self, requests: Sequence[GenerationRequest]) -> None:
        check_lengths(requests, int(self._engine.max_session_len), "LMDeploy has room for")

    def _groups(self, requests: Sequence[GenerationRequest]) -> dict[_Fixed, list[int]]:
        """Positions of requests by what the engine is made for; those first that it is made for now."""
        groups = grouped(range(len(requests)), lambda i: _fixed(requests[i].decoding))
        return dict(sorted(groups.items(), key=lambda group: group[0] != self._fixed))

    def _load(self, fixed: _Fixed, requests: Sequence[GenerationRequest], groups: int) -> None:
        """Make the engine for these settings, unless it is there; `requests` are all of the run."""
        active = self._wanted_active(fixed, len(requests))
        if self._engine is not None and self._fixed == fixed and self._active >= active:
            return
        if self._engine is not None:
            why = "more of them run at once" if self._fixed == fixed else "they are decoded in another way"
            logger.info(
                "LMDeploy is loaded once more for the next requests: %s (%s). Its decoding settings hold for all that "
                "it runs; requests of this run have %d kind(s) of them.", why, fixed, groups,
            )  # fmt: skip
            self._unload()
        try:
            self._open(fixed, active)
        except (Exception, SystemExit) as error:  # it exits where it finds something wrong (check_env/base.py)
            self._unload()
            raise EngineError(
                f"LMDeploy {self._installed.version} did not start: {type(error).__name__}: {error}. If memory is "
                "short, lower max_active or cache_max_entry_count, or raise tensor_parallel_size."
            ) from error
        try:
            check_mask_token("LMDeploy", self._engine.model_config.dllm_mask_token, self._checkpoint)
        except EngineError:
            self._unload()
            raise
        self._fixed, self._active = fixed, active
        self._loads += 1

    def _wanted_active(self, fixed: _Fixed, number: int) -> int:
        """Sequences to make room for: a power of 2, or the most that there may be."""
        _, total = torch.cuda.mem_get_info(self._device)
        logits = fixed.block_length * self._checkpoint.config["vocab_size"] * BYTES_PER_LOGIT
        most = max(1, min(self._max_active or MAX_ACTIVE, int(LOGITS_SHARE * total / logits)))
        return min(most, 1 << (number - 1).bit_length())

    def _open(self, fixed: _Fixed, active: int) -> None:
        register_configs(SDARConfig, SDARMoeConfig)
        register_model_types()
        engine: Any = importlib.import_module("lmdeploy.pytorch.engine")
        settings = self._lmdeploy.PytorchEngineConfig(
            dtype=self._dtype,
            tp=self._tensor_parallel_size,
            distributed_executor_backend=self._executor,
            session_len=self._checkpoint.max_length,
            max_batch_size=active,
            cache_max_entry_count=self._cache_share,
            block_size=PAGE_SIZE,
            max_prefill_token_num=max(PREFILL_TOKENS, active * fixed.block_length),
            enable_metrics=False,
            dllm_block_length=fixed.block_length,
            dllm_unmasking_strategy=fixed.strategy,
            dllm_denoising_steps=fixed.steps,
            dllm_confidence_threshold=fixed.threshold,
        )
        torch.cuda.set_device(self._device)
        with (
            self._checkpoint.clean_folder(_config_for_lmdeploy(self._checkpoint, self._dtype)) as folder,
            log_kept(),
            processes_started() as self._workers,
        ):
            self._engine = engine.Engine.from_pretrained(str(folder), engine_config=settings, trust_remote_code=False)
        give_seeds(self._engine, fixed.block_length)
        self._forwards = Forwards(self._engine)
        self._loop = loop = LoopThread(self._device)
        loop.run(_call(self._engine.start_loop))
        atexit.register(self._unload)

    def _unload(self) -> None:
        atexit.unregister(self._unload)
        engine, loop = self._engine, self._loop
        self._engine = self._loop = self._fixed = None
        self._active = 0
        self._warm.clear()
        if loop is not None:
            try:
                loop.run(_close(engine), PATIENCE)
            except Exception as error:
                logger.warning("LMDeploy did not end: %s: %s", type(error).__name__, error)
            loop.close()
        # An engine ends its workers itself, one that failed to start does not.
        end_processes(self._workers, PATIENCE if loop is not None else 0.0)
        self._workers = []
        del engine
        free_memory()

    # Running

    def generate(self, requests: Sequence[GenerationRequest]) -> Results[GenerationResult]:
        """See `Engine.generate`.

        A request with several stop tokens, or a stop string, is ended by this side as soon as a block completes it.
        """
        with self._one_run():
            self._check(requests)
            groups, failures = self._groups(requests), Failures()
            for fixed, indices in groups.items():
                self._load(fixed, requests, len(groups))
                self._check_room(requests)
                for together in self._together(requests, indices):
                    yield from self._run(requests, together, failures)
            failures.raise_if_any(len(requests))

    def _together(self, requests: Sequence[GenerationRequest], indices: Sequence[int]) -> Iterable[list[int]]:
        """Positions of requests that may run at the same time.

        strategies/dllm/sampling.py gives request i's temperature, top_k and top_p to others of its batch. And where
        requests have different numbers of stop tokens, the shorter lists are filled up with -1, which is also what
        strategies/dllm/model_agent.py (_check_stopwords_dllm) makes of a prompt's tokens: they then end the answer.
        """

        def alike(index: int) -> tuple[Draw, frozenset[int]]:
            return Draw.of(requests[index].decoding), stop_ids_of(requests[index], self._checkpoint)

        return grouped(indices, alike).values()

    def _run(
        self, requests: Sequence[GenerationRequest], indices: Sequence[int], failures: Failures
    ) -> Iterator[tuple[int, GenerationResult]]:
        """Run requests that may run together; a crash, or a caller who has enough, loses those under way only."""
        results: queue.SimpleQueue[_Result | None] = queue.SimpleQueue()

        async def begin() -> asyncio.Task[None]:
            return asyncio.create_task(self._serve(requests, indices, results.put, failures))

        async def end() -> None:
            task.cancel()
            await asyncio.wait([task])

        loop = self._loop
        assert loop is not None
        task = loop.run(begin())
        try:
            while True:
                try:
                    result = results.get(timeout=WATCH)
                except queue.Empty:
                    self._check_workers()
                    continue
                if result is None:
                    break
                yield result
        finally:
            if self._loop is loop:  # else the engine ended meanwhile, and its requests with it
                lost = not all(worker.is_alive() for worker in self._workers)
                try:
                    loop.run(end(), WATCH if lost else PATIENCE)
                except concurrent.futures.TimeoutError:
                    if not lost:
                        raise
                if lost:
                    self._unload()
        if error := task.exception():
            self._unload()
            raise error

    def _check_workers(self) -> None:
        """Look whether the worker processes are there.

        Raises:
            EngineError: one is gone; the engine would wait for its answer without end.
        """
        if not all(worker.is_alive() for worker in self._workers):
            end_processes(self._workers, 0.0)  # the others wait for it
            raise EngineError(
                "a worker process of LMDeploy ended; its messages or the system's log may say why. Finished answers "
                "are kept (--use_cache)."
            )

    async def _serve(
        self,
        requests: Sequence[GenerationRequest],
        indices: Sequence[int],
        put: Callable[[_Result | None], None],
        failures: Failures,
    ) -> None:
        """Put each result as it is there, None at the end."""
        waiting = deque(indices)

        async def work() -> None:
            instance = self._engine.create_instance()
            while waiting:
                index = waiting.popleft()
                try:
                    put((index, await self._answer(instance, requests[index])))
                except NoAnswerError as error:
                    failures.add(index, str(error))

        workers = [asyncio.create_task(work()) for _ in range(self._at_once([requests[index] for index in indices]))]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
            put(None)

    def _at_once(self, requests: Sequence[GenerationRequest]) -> int:
        """Sequences that run at once: as many as have pages to their end, so that none is evicted and run again."""
        config = self._engine.cache_config
        free = int(config.num_gpu_blocks) - 1  # one is LMDeploy's own
        largest = sorted((-(-request.longest // int(config.block_size)) + 2 for request in requests), reverse=True)
        fit = sum(total <= free for total in itertools.accumulate(largest))
        return max(1, min(self._active, len(requests), fit))

    async def _answer(self, instance: Any, request: GenerationRequest) -> GenerationResult:
        session, tokens, started = next(self._sessions), [], time.perf_counter()
        stream = instance.async_stream_infer(session, list(request.prompt_ids), gen_config=self._settings(request))
        finished = False
        try:
            async for output in stream:
                status = output.status.name
                if status not in ("SUCCESS", "FINISH"):
                    if status in OF_ONE_REQUEST:
                        raise NoAnswerError(f"LMDeploy {self._installed.version} refused it ({status}).")
                    raise EngineError(
                        f"LMDeploy {self._installed.version} stopped ({status}); its log says why. Finished answers "
                        "are kept (--use_cache)."
                    )
                tokens += output.token_ids
                finished = status == "FINISH"
                if not finished and self._has_ended(tokens, len(output.token_ids), request):
                    break
            if not finished:
                await instance.async_cancel(session)
        finally:
            await stream.aclose()
        end, reason = answer_end(tokens, request, self._checkpoint, "LMDeploy")
        forwards = self._forwards.take(session)
        # The pass over a prompt that does not fill a block denoises, and does nothing else.
        prefilled = len(request.prompt_ids) >= request.decoding.block_length
        return GenerationResult(
            token_ids=tuple(tokens[:end]),
            finish_reason=reason,
            prefill_forwards=forwards.prefill if prefilled else 0,
            denoising_forwards=forwards.denoising + (0 if prefilled else forwards.prefill),
            commit_forwards=forwards.commit,
            seconds=time.perf_counter() - started,
        )

    def _has_ended(self, tokens: Sequence[int], new: int, request: GenerationRequest) -> bool:
        """Whether the last tokens hold what ends the answer and LMDeploy does not know or see.

        It sees no stop token in the block that begins with the prompt's last tokens (strategies/dllm/sequence.py:
        output_start_pos is where that block ends).
        """
        before = len(tokens) - new
        return end_of_answer(tokens[before:], request, self._checkpoint.decode, tokens[:before])[1] == "stop"

    def _settings(self, request: GenerationRequest) -> Any:
        """A request's GenerationConfig.

        Stop tokens are those given alone: this way below the pipeline, LMDeploy adds none. `ignore_eos` would forbid
        them (messages.py: SamplingParam.from_gen_config), not ignore them.
        """
        greedy, temperature, top_k, top_p = Draw.of(request.decoding)
        vocabulary = self._checkpoint.config["vocab_size"]
        settings = self._lmdeploy.GenerationConfig(
            max_new_tokens=request.max_new_tokens,
            do_sample=not greedy,
            top_k=0 if top_k >= vocabulary else top_k,
            top_p=top_p,
            random_seed=request.seed,
            stop_token_ids=sorted(stop_ids_of(request, self._checkpoint)) or None,
            bad_token_ids=[self._checkpoint.mask_token_id],
        )
        settings.temperature = temperature  # when it is made, it takes none above 2; the engine takes any
        return settings


def _fixed(decoding: DecodingConfig) -> _Fixed:
    """What the engine has to be made for; settings without effect do not count."""
    dynamic = decoding.remasking_strategy == "low_confidence_dynamic"
    return _Fixed(
        block_length=decoding.block_length,
        strategy=decoding.remasking_strategy,
        steps=decoding.block_length if dynamic else decoding.steps,
        threshold=decoding.confidence_threshold if dynamic else DecodingConfig.confidence_threshold,
    )


def _config_for_lmdeploy(checkpoint: Checkpoint, dtype: str) -> dict[str, Any]:
    """config.json with all that LMDeploy reads, none of it left to a config class's defaults.

    `rope_parameters` is read in transformers 4 too (nn/rotary_embedding.py: get_rope_parameters). `sliding_window`
    counts whatever `use_sliding_window` says (models/sdar.py).
    """
    config = checkpoint.config
    own = config.get("rope_parameters") or {}
    rope = {"rope_type": "default", **(config.get("rope_scaling") or {}), **own}
    rope["rope_theta"] = rope_theta(config)
    if "type" in rope:  # its older name
        rope["rope_type"] = rope.pop("type")
    return {
        "attention_bias": False,
        "bos_token_id": None,
        "decoder_sparse_step": 1,
        "eos_token_id": None,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "tie_word_embeddings": False,
        **plain_config(config, "rope_theta", "attn_implementation"),
        "architectures": ["SDARMoeForCausalLM" if checkpoint.is_moe else "SDARForCausalLM"],
        "head_dim": checkpoint.full_config()["head_dim"],
        "mask_token_id": checkpoint.mask_token_id,
        "model_type": MODEL_TYPES[config["model_type"]],
        "pad_token_id": None,
        "rope_parameters": rope,
        "sliding_window": None,
        "torch_dtype": dtype,
        "use_sliding_window": False,
    }


async def _call(function: Callable[[], Any]) -> Any:
    return function()


async def _close(engine: Any) -> None:
    """End an engine in its own loop, and wait until its memory is free."""
    engine.close()
    with contextlib.suppress(asyncio.CancelledError):
        await engine.wait_tasks()
