"""SDAR through JetEngine (github.com/Labman42/JetEngine), with what a careful user of it has to look after.

JetEngine is driven by the methods that its own `generate` is made of: `add_request` for each prompt, then `step` until
all are back. Unlike `generate` that hands each answer on as it finishes, lets requests of different lengths run side by
side, and shows a standstill (no page is free for any sequence) at once: what was under way then runs again, with half
as many sequences at a time.

Two versions are in use; versions.py finds the installed one and says where they differ.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import io
import itertools
import logging
import platform
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
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
from sdar_lm_eval.engines.adapters.jetengine.flash_attention import ensure_right_attention
from sdar_lm_eval.engines.adapters.jetengine.memory import (
    CAPTURED,
    MESSAGE_BYTES,
    PAGE_SIZE,
    PREFILL_TOKENS,
    Size,
    bytes_per_page,
    captured,
    message_bytes,
    pages_of,
    size_for,
)
from sdar_lm_eval.engines.adapters.jetengine.versions import INSTALL, find_jetengine
from sdar_lm_eval.engines.base import (
    DecodingConfig,
    GenerationRequest,
    GenerationResult,
    Results,
    at_least_one,
    check_bool,
)
from sdar_lm_eval.engines.runs import Allowance, Failures, OneRun, is_out_of_memory, warm_up_requests
from sdar_lm_eval.errors import EngineError, SDARError, UserError

logger = logging.getLogger(__name__)

PATIENCE = 60.0  # seconds for 0.1.0's other processes to end
SPARE_BYTES = 256 << 20  # by which GPUs that share a model may differ in what is free
IDLE_STEPS = 4  # so many steps without any progress are a standstill; sound ones make progress in every second


class SDARConfig(BareConfig):
    """SDAR. transformers' Qwen3Config says `rope_scaling` in another way from version 5 on, which JetEngine refuses."""

    model_type = "sdar"
    rope_scaling = None


class SDARMoeConfig(SDARConfig):
    """The same for SDAR MoE."""

    model_type = "sdar_moe"


class JetEngine:
    """SDAR on JetEngine.

    The weights are loaded when the first requests are there, since JetEngine takes its memory once and for all.

    Args:
        checkpoint: the opened checkpoint.
        device: "cuda", "cuda:1", ... or "auto".
        dtype: "bfloat16" or "float16"; "auto" is the checkpoint's own where it is one of them, else bfloat16.
        max_active: sequences running at once, rounded down to one that has a CUDA graph; None: as many as fit, up to
            256.
        gpu_memory_utilization: the part of the GPU's memory that JetEngine may fill; None: what the requests need.
        tensor_parallel_size: GPUs that share the weights (0.1.0 only).
        enforce_eager: go without CUDA graphs.

    Raises:
        UserError: JetEngine cannot run this checkpoint, or not with these options; says what can.
        EngineError: JetEngine, something that it needs, or a GPU is missing.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        device: str = "auto",
        dtype: str = "auto",
        max_active: int | None = None,
        gpu_memory_utilization: float | None = None,
        tensor_parallel_size: int = 1,
        enforce_eager: bool = False,
    ) -> None:
        self._checkpoint = checkpoint
        self._dialect, self._commit = find_jetengine()
        self._config = checkpoint.full_config()
        self._device = gpu_named(device, "JetEngine")
        self._dtype = half_precision(dtype, checkpoint, "JetEngine")
        self._tensor_parallel_size = at_least_one("tensor_parallel_size", tensor_parallel_size)
        self._gpu_memory_utilization = (
            None if gpu_memory_utilization is None else to_share("gpu_memory_utilization", gpu_memory_utilization)
        )
        self._max_active = None if max_active is None else at_least_one("max_active", max_active)
        self._graphs = not check_bool("enforce_eager", enforce_eager) and self._dialect.graphs
        self._decodes = Decodes(
            engine=f"JetEngine {self._dialect.version}",
            strategies=self._dialect.strategies,
            block_lengths="JetEngine takes",
            repetition_penalty=f"JetEngine {self._dialect.version} has none, or another (it divides probabilities, "
            "from half of max_gen_toks on)",
        )
        self._check_checkpoint()
        self._jetengine = _import_jetengine()
        self._one_run = OneRun("JetEngine")
        self._llm: Any = None
        self._warm: set[Any] = set()  # groups of settings whose kernels are compiled
        self._workers: list[BaseProcess] = []
        self._size: Size | None = None
        self._splits = True
        self._generator = torch.Generator(self._device)
        self._mask_tokens_drawn = self._retries = self._steps = self._eager_steps = 0

    # What it says of itself

    @property
    def info(self) -> Mapping[str, Any]:
        """See `Engine.info`."""
        active = self._size.max_active if self._size else self._max_active or CAPTURED[-1]
        return {
            "engine": "jetengine",
            "engine_version": self._dialect.version,
            "engine_commit": self._commit,
            "device": str(self._device),
            "dtype": self._dtype,
            "max_active": active,
            "tensor_parallel_size": self._tensor_parallel_size,
            "cuda_graphs": self._graphs,
            "steps": self._steps,
            "steps_without_graph": self._eager_steps,
            "standstills": self._retries,
            "mask_tokens_drawn": self._mask_tokens_drawn,
            "flash_attn_splits": self._splits,
            "deviations": dict(self._dialect.deviations),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            **{name: version_of(name) for name in ("flashinfer-python", "flash-attn")},
            "python": platform.python_version(),
            "gpu": torch.cuda.get_device_name(self._device),
        }

    def peak_memory_bytes(self) -> int:
        """See `Engine.peak_memory_bytes`."""
        return torch.cuda.max_memory_allocated(self._device)

    # What it refuses

    def _check_checkpoint(self) -> None:
        """Refuse what this JetEngine would get wrong or stumble over.

        Raises:
            UserError: says what runs it.
        """
        config, version, tensor_parallel = self._config, self._dialect.version, self._tensor_parallel_size

        def refuse(what: str, use: str = "--model sdar") -> None:
            raise UserError(f"JetEngine {version} cannot run {self._checkpoint.name!r}: {what}. Use {use}.")

        if self._checkpoint.is_moe and version == "0.2.0":
            refuse("it takes no mixture-of-experts models", "--model sdar or JetEngine 0.1.0")
        if self._checkpoint.is_moe and (config.get("mlp_only_layers") or not config["norm_topk_prob"]):
            refuse("it takes all layers for sparse and always normalizes the experts' weights, unlike its config.json")
        rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
        if rope.get("rope_type", rope.get("type", "default")) != "default":
            refuse("it knows no RoPE scaling")
        if config["head_dim"] not in HEAD_DIMS:
            refuse(f"its heads have {config['head_dim']} dimensions; JetEngine's kernels take {listed(HEAD_DIMS)}")
        if version == "0.1.0" and self._device.index:
            raise UserError(
                f"device={str(self._device)!r}: JetEngine {version} takes the first GPUs. Choose others by "
                "CUDA_VISIBLE_DEVICES, and leave out device."
            )
        if tensor_parallel > 1:
            if version == "0.2.0":
                refuse(
                    f"tensor_parallel_size={tensor_parallel}, but it gives the logits to the first process only and "
                    "then draws tokens in all of them, which stops the others",
                    "tensor_parallel_size=1",
                )
            width = "moe_intermediate_size" if self._checkpoint.is_moe else "intermediate_size"
            for name in ("num_attention_heads", "num_key_value_heads", "vocab_size", width):
                if config[name] % tensor_parallel:
                    refuse(f"tensor_parallel_size={tensor_parallel} does not divide its {name}={config[name]}")
            check_tensor_parallel(tensor_parallel)
        self._checkpoint.check_weights()
        if world_size() > 1 and not self._dialect.several_processes:
            raise UserError(
                f"JetEngine {version} cannot run in several processes: each takes the first GPU and the same port. "
                f"Use JetEngine 0.2.0, tensor_parallel_size={world_size()} in one process, or --model sdar."
            )

    def _check(self, requests: Sequence[GenerationRequest]) -> None:
        """Refuse requests that would be answered wrongly, before any of them runs."""
        check_requests(requests, self._decodes, self._checkpoint)
        for number, request in enumerate(requests):
            if self._checkpoint.mask_token_id in _tail(request):
                raise UserError(
                    f"prompt {number} of {len(requests)} holds the mask token among its last "
                    f"{len(_tail(request))} tokens; JetEngine would replace it. Use --model sdar for this task."
                )

    # Memory

    def prepare(self, requests: Sequence[GenerationRequest]) -> None:
        """See `Engine.prepare`: checks the requests, loads the weights, with memory for them, and warms up.

        JetEngine compiles at the first steps of a process, which takes up to a minute.
        """
        with self._one_run():
            self._check(requests)
            if requests:
                block_length = requests[0].decoding.block_length
                of_length = [request for request in requests if request.decoding.block_length == block_length]
                self._load(of_length)
                for group, alike in grouped(range(len(of_length)), lambda i: _group(of_length[i].decoding)).items():
                    if group not in self._warm:
                        self._warm_up([of_length[i] for i in alike])
                        self._warm.add(group)

    def _warm_up(self, requests: Sequence[GenerationRequest]) -> None:
        """Run short requests with the settings of these, and count none of their steps."""
        assert self._size is not None
        counted = self._mask_tokens_drawn, self._retries, self._steps, self._eager_steps
        short = warm_up_requests(requests, min(self._size.max_active, len(requests)))
        for _ in self._generate_group(short, list(range(len(short))), Failures()):
            pass
        self._mask_tokens_drawn, self._retries, self._steps, self._eager_steps = counted

    def _load(self, requests: Sequence[GenerationRequest]) -> None:
        """Make JetEngine with room for these requests, which have one block length, unless there is one already.

        Raises:
            UserError: one of them can never run.
        """
        wanted = self._sized(requests)
        if self._size is None or not self._size.holds(wanted):
            self._make(wanted)
        self._check_pages(requests)

    def _make(self, wanted: Size) -> None:
        if self._llm is not None:
            logger.info("JetEngine is loaded once more: the next requests have other blocks, or need more room.")
            self._unload()
        used = self._used_bytes()
        try:
            with processes_started() as self._workers:
                self._llm = self._open(wanted)
        except SDARError:
            raise
        except AssertionError as error:  # its own way to say that no page is left
            raise UserError(self._does_not_fit(wanted, "no memory is left for keys and values")) from error
        except Exception as error:
            if is_out_of_memory(error):
                raise UserError(self._does_not_fit(wanted, str(error))) from error
            message = f"JetEngine {self._dialect.version} did not start: {type(error).__name__}: {error}"
            if "address already in use" in message and not self._dialect.several_processes:
                message += ". One run of it fits a machine at a time, since all take the same port: wait for the other."
            raise EngineError(message) from error
        finally:
            if self._llm is None:
                end_processes(self._workers, 0.0)
        if self._tensor_parallel_size > 1:
            # Each process has as many pages as its own GPU has memory for, and all use the numbers that this one gives.
            difference = max(used) - used[0] + SPARE_BYTES
            pages = -(-difference // bytes_per_page(self._config, self._tensor_parallel_size))
            self._llm.config.num_kvcache_blocks = max(self._llm.config.num_kvcache_blocks - pages, 0)
        check_mask_token("JetEngine", self._llm.config.mask_token_id, self._checkpoint)
        # It drops all of a prompt up to a pad token, and 0.1.0 stops at the end-of-text token, asked to or not. It has
        # no need to know either of them.
        self._llm.tokenizer.pad_token = self._llm.tokenizer.eos_token = None
        self._size = wanted

    def _open(self, size: Size) -> Any:
        register_configs(SDARConfig, SDARMoeConfig)
        options = {
            "block_length": size.block_length,
            "dtype": self._dtype,
            "enforce_eager": not self._graphs,
            "gpu_memory_utilization": size.gpu_memory_utilization,
            "kvcache_block_size": PAGE_SIZE,
            "mask_token_id": self._checkpoint.mask_token_id,
            "max_model_len": size.max_tokens,
            "max_num_batched_tokens": size.prefill_tokens,
            "max_num_seqs": size.max_active,
            "tensor_parallel_size": self._tensor_parallel_size,
        }
        # 0.1.0 takes the mask token from the tokenizer.
        mask_token = self._checkpoint.tokenizer.convert_ids_to_tokens(self._checkpoint.mask_token_id)
        with (
            self._checkpoint.clean_folder(
                _config_for_jetengine(self._config, self._dtype), {"mask_token": mask_token}
            ) as folder,
            _torch_defaults_kept(),
            _prints_to_log(),
        ):
            torch.cuda.set_device(self._device)
            if self._dialect.version == "0.2.0":
                _give_process_group(self._device)
                _give_generator(self._generator)
                self._splits = ensure_right_attention(
                    self._config, size.block_length, getattr(torch, self._dtype), self._device
                )
            return self._jetengine.LLM(str(folder), **options)

    def _unload(self) -> None:
        atexit.unregister(self._llm.exit)
        if all(worker.is_alive() for worker in self._workers):
            self._llm.exit()
        end_processes(self._workers, PATIENCE)
        self._llm = self._size = None
        self._warm.clear()
        free_memory()

    def _used_bytes(self) -> list[int]:
        """Memory in use on each GPU that is to share the model."""
        gpus = range(self._tensor_parallel_size) if self._tensor_parallel_size > 1 else [self._device]
        return [total - free for free, total in map(torch.cuda.mem_get_info, gpus)]

    def _sized(self, requests: Sequence[GenerationRequest]) -> Size:
        total = torch.cuda.mem_get_info(self._device)[1]
        free = total - max(self._used_bytes())
        size = size_for(
            requests,
            self._config,
            weight_bytes=sum(path.stat().st_size for path in self._checkpoint.weight_files()),
            free_bytes=free,
            total_bytes=total,
            max_active=self._max_active,
            tensor_parallel_size=self._tensor_parallel_size,
            page_a_step=self._dialect.page_a_step,
        )
        if self._gpu_memory_utilization is not None:
            size = dataclasses.replace(size, gpu_memory_utilization=self._gpu_memory_utilization)
        return size

    def _does_not_fit(self, size: Size, reason: str) -> str:
        free, total = torch.cuda.mem_get_info(self._device)
        return (
            f"checkpoint {self._checkpoint.name!r} with {size.max_active} sequences of up to {size.max_tokens:,} "
            f"tokens does not fit into {total / 2**30:.1f} GiB of GPU memory, {free / 2**30:.1f} GiB of which are free "
            f"({reason}). JetEngine was to fill {total * size.gpu_memory_utilization / 2**30:.1f} GiB, what other "
            f"programs take included (gpu_memory_utilization={size.gpu_memory_utilization}): set it higher, or lower "
            "max_active, max_gen_toks or max_length."
        )

    def _pages_of(self, request: GenerationRequest) -> int:
        return pages_of(request, self._dialect.page_a_step)

    def _check_pages(self, requests: Sequence[GenerationRequest]) -> None:
        assert self._size is not None
        pages, longest = self._llm.config.num_kvcache_blocks, max(requests, key=self._pages_of)
        if (needed := self._pages_of(longest)) > pages:
            mib = bytes_per_page(self._config, self._tensor_parallel_size) / 2**20
            raise UserError(
                f"a request of {longest.longest:,} tokens (prompt and answer) needs {needed} KV pages of "
                f"{PAGE_SIZE} tokens, {needed * mib:,.0f} MiB; JetEngine has {pages}, {pages * mib:,.0f} MiB, at "
                f"gpu_memory_utilization={self._size.gpu_memory_utilization}. Raise it, or lower max_gen_toks or "
                "max_length."
            )

    def _active(self, requests: Sequence[GenerationRequest]) -> int:
        """How many of the requests can run at once, the longest ones."""
        assert self._size is not None
        pages = self._llm.config.num_kvcache_blocks
        needs = sorted(map(self._pages_of, requests), reverse=True)
        fitting = sum(sum_ <= pages for sum_ in itertools.accumulate(needs))
        if self._tensor_parallel_size > 1:
            sizes = sorted(map(message_bytes, requests), reverse=True)
            fitting = min(fitting, sum(sum_ <= MESSAGE_BYTES for sum_ in itertools.accumulate(sizes)))
        active = captured(min(fitting, self._size.max_active))
        if fitting < min(self._size.max_active, len(requests)):
            logger.warning(
                "%d sequences at once in the place of %d: JetEngine has %d KV pages of %d tokens.",
                active,
                self._size.max_active,
                pages,
                PAGE_SIZE,
            )
        return active

    # Generation

    def generate(self, requests: Sequence[GenerationRequest]) -> Results[GenerationResult]:
        """See `Engine.generate`. Requests are started in the order given, those with like settings together."""
        with self._one_run():
            yield from self._generate(requests)

    def _generate(self, requests: Sequence[GenerationRequest]) -> Iterator[tuple[int, GenerationResult]]:
        self._check(requests)
        failures = Failures()
        for of_length in grouped(range(len(requests)), lambda i: requests[i].decoding.block_length).values():
            self._load([requests[i] for i in of_length])
            for indices in grouped(of_length, lambda i: _group(requests[i].decoding)).values():
                yield from self._generate_group(requests, indices, failures)
        if self._mask_tokens_drawn:
            logger.warning(
                "JetEngine drew the mask token %d times; answers were made without it.", self._mask_tokens_drawn
            )
        if self._graphs and self._eager_steps:
            logger.info(
                "%d of %d steps ran without a CUDA graph: JetEngine has them for %s, 32, 48, ... sequences.",
                self._eager_steps,
                self._steps,
                listed(CAPTURED[:5]),
            )
        failures.raise_if_any(len(requests))

    def _generate_group(
        self, requests: Sequence[GenerationRequest], indices: list[int], failures: Failures
    ) -> Iterator[tuple[int, GenerationResult]]:
        """Run requests with like settings; after a standstill with half as many at a time, for a while."""
        allowance = Allowance(self._active([requests[i] for i in indices]))
        greedy = requests[indices[0]].decoding.greedy
        self._reset_scheduler(greedy)
        seed = _common_seed(requests[i].seed for i in indices)
        torch.manual_seed(seed)
        self._generator.manual_seed(seed)
        waiting = deque(indices)
        running: dict[int, _Started] = {}
        try:
            while waiting or running:
                active = captured(allowance.now)
                if waiting and len(running) >= active:
                    allowance.count_full_step()
                added = self._admit(requests, waiting, running, active)
                if self._graphs and not waiting and not added:
                    self._fill_up(len(running), requests[indices[0]])
                finished = self._step(len(running), added)
                if finished is None:
                    if active == 1:
                        raise EngineError(
                            f"JetEngine stands still with a single sequence; {len(waiting) + len(running)} of "
                            f"{len(indices)} requests are unanswered. Finished answers are kept (--use_cache)."
                        )
                    waiting.extendleft(reversed([started.index for started in running.values()]))
                    running.clear()
                    allowance.cut(active := captured(active // 2))
                    self._retries += 1
                    self._reset_scheduler(greedy)
                    logger.warning(
                        "JetEngine ran out of memory; its sequences run again, %d at a time. Answers are kept.", active
                    )
                    continue
                for number, tokens in finished:
                    started = running.pop(number)
                    try:
                        result = self._result(requests[started.index], started, tokens)
                    except NoAnswerError as error:
                        failures.add(started.index, str(error))
                    else:
                        yield started.index, result
        finally:
            self._llm.scheduler.consistent_sampling_params = False

    def _reset_scheduler(self, greedy: bool) -> None:
        """A scheduler that holds no sequences, for requests that all have the same settings."""
        self._llm.scheduler = type(self._llm.scheduler)(self._llm.config)
        self._llm.scheduler.consistent_sampling_params = True
        if greedy and self._dialect.version == "0.1.0":
            # Its top_k=1 makes every token's confidence 1.
            self._llm.scheduler.sample_pipe = self._llm.scheduler.sample_pipe_topk0 = _greedy_weights
        self._fillers: set[int] = set()
        self._idle = 0

    def _admit(
        self, requests: Sequence[GenerationRequest], waiting: deque[int], running: dict[int, _Started], active: int
    ) -> list[_Started]:
        """Hand over requests until `active` are running or a prefill is full; returns those."""
        added: list[_Started] = []
        prefill = 0
        while waiting and len(running) < active:
            request = requests[waiting[0]]
            prefill += len(request.prompt_ids)
            if added and prefill > PREFILL_TOKENS:
                break
            number = self._add(request.prompt_ids, self._sampling_params(request))
            started = _Started(waiting.popleft(), self._steps, len(_tail(request)) < len(request.prompt_ids))
            running[number] = started
            added.append(started)
        return added

    def _fill_up(self, running: int, example: GenerationRequest) -> None:
        """Add sequences of one block, without a prompt, up to a number that has a CUDA graph.

        At the end of a run, when fewer and fewer are left, a step with a graph takes less time than a smaller one
        without.
        """
        now = running + len(self._fillers)
        wanted = next(size for size in CAPTURED if size >= now)
        params = self._sampling_params(dataclasses.replace(example, max_new_tokens=example.decoding.block_length))
        self._fillers |= {self._add((), params) for _ in range(wanted - now)}

    def _add(self, prompt: Sequence[int], params: Any) -> int:
        """Hand a prompt over; returns the number that JetEngine gives it."""
        self._llm.add_request(list(prompt), params)
        scheduler = self._llm.scheduler
        queues = (scheduler.running, getattr(scheduler, "waiting_prefill", None))
        return int(max(queue[-1].seq_id for queue in queues if queue))

    def _step(self, running: int, added: list[_Started]) -> list[tuple[int, list[int]]] | None:
        """One step of JetEngine: (number, tokens) of each request that finished, or None at a standstill."""
        prefilled = sum(started.prefilled for started in added)
        blocks = running + len(self._fillers) - prefilled
        if self._dialect.version == "0.2.0" or not prefilled:  # 0.1.0 prefills and denoises in turn
            self._steps += 1
            self._eager_steps += blocks > 0 and blocks not in CAPTURED
        try:
            with _prints_to_log():
                finished, progress = self._llm.step()
        except Exception as error:
            if is_out_of_memory(error) and not self._workers:
                torch.cuda.empty_cache()
                return None
            if self._workers:  # they wait for this process's part of the step
                atexit.unregister(self._llm.exit)
                end_processes(self._workers, 0.0)
            raise EngineError(
                f"JetEngine {self._dialect.version} stopped: {type(error).__name__}: {error}. Finished answers are "
                "kept (--use_cache)."
            ) from error
        self._idle = 0 if finished or progress else self._idle + 1
        if self._idle >= IDLE_STEPS:
            return None
        results = [(output[0], output[1]) for output in finished if output[0] not in self._fillers]
        self._fillers.difference_update(output[0] for output in finished)
        return results

    def _sampling_params(self, request: GenerationRequest) -> Any:
        decoding, vocabulary = request.decoding, self._config["vocab_size"]
        draw, stop_ids = Draw.of(decoding), stop_ids_of(request, self._checkpoint)
        params: dict[str, Any] = {
            "temperature": draw.temperature,
            # 0, which means "off" in JetEngine's examples, makes 0.2.0 draw the most probable token.
            "topk": min(draw.top_k or vocabulary, vocabulary),
            "topp": draw.top_p,
            "max_tokens": request.max_new_tokens,
            "block_length": decoding.block_length,
            "denoising_steps": decoding.steps,
            "remasking_strategy": decoding.remasking_strategy,
            "dynamic_threshold": decoding.confidence_threshold,
            "stop_words": sorted(stop_ids),
            "ignore_eos": False,
        }
        if self._dialect.version == "0.2.0":
            params["eb_threshold"] = decoding.eb_threshold
            if decoding.remasking_strategy == "entropy_bounded":  # has no schedule, but stops after so many steps
                params["denoising_steps"] = decoding.block_length
        elif not stop_ids.isdisjoint(_tail(request)):
            # It takes stop tokens at the end of the prompt for the answer's: better it goes on to the limit.
            params["ignore_eos"] = True
        return self._jetengine.SamplingParams(**params)

    def _result(self, request: GenerationRequest, started: _Started, tokens: list[int]) -> GenerationResult:
        """Cut what JetEngine returned to the answer."""
        if self._dialect.returns_prompt:
            length = len(request.prompt_ids)
            if tuple(tokens[:length]) != request.prompt_ids:
                raise NoAnswerError("JetEngine returned another prompt than it was given.")
            tokens = tokens[length:]
        block_length = request.decoding.block_length
        forwards = self._steps - started.step - (started.prefilled and self._dialect.version == "0.2.0")
        commits = -(-(len(request.prompt_ids) % block_length + len(tokens)) // block_length)
        mask = self._checkpoint.mask_token_id
        end, reason = answer_end(tokens, request, self._checkpoint, "JetEngine")
        answer = tuple(token for token in tokens[:end] if token != mask)
        self._mask_tokens_drawn += end - len(answer)
        return GenerationResult(
            token_ids=answer,
            finish_reason=reason,
            prefill_forwards=int(started.prefilled),
            denoising_forwards=max(forwards - commits, 0),
            commit_forwards=commits,
            seconds=time.perf_counter() - started.time,
        )


class _Started:
    """A request under way: its index, the step it began at, whether its prompt has a full block to prefill."""

    def __init__(self, index: int, step: int, prefilled: bool) -> None:
        self.index, self.step, self.prefilled, self.time = index, step, prefilled, time.perf_counter()


def _import_jetengine() -> Any:
    try:
        return importlib.import_module("jetengine")
    except Exception as error:
        raise EngineError(f"JetEngine cannot be imported: {type(error).__name__}: {error}. {INSTALL}") from error


def _give_process_group(device: torch.device) -> None:
    """Have 0.2.0 take this process for the whole of its world.

    Its DistributedManager asks accelerate, which knows of no group where no launcher made one; and where a launcher
    did, it makes groups together with all other processes, at a time when some may have nothing left to do. Each of our
    processes holds the whole model, so a group of its own is all it needs.
    """
    dist: Any = importlib.import_module("torch.distributed")
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        atexit.register(dist.destroy_process_group)
    group = dist.new_group([dist.get_rank()], backend="gloo", use_local_synchronization=True)

    class OneProcess:
        def __init__(self, tensor_parallel_size: int) -> None:
            assert tensor_parallel_size == 1
            self.device = device
            self.tp_size = self.dp_size = 1
            self.tp_rank = self.dp_rank = 0
            self.tp_group = self.dp_group = group

    llm_engine: Any = importlib.import_module("jetengine.engine.llm_engine")
    llm_engine.DistributedManager = OneProcess


def _give_generator(generator: torch.Generator) -> None:
    """Have 0.2.0 draw tokens from this generator.

    flashinfer (0.5.3, sampling.py: get_seed_and_offset) begins a new one at each call where it is given none: at every
    step a row of the batch would draw by the same random number, whatever the seed.
    """
    scheduler: Any = importlib.import_module("jetengine.engine.scheduler")
    draw = scheduler.top_k_top_p_sampling_from_probs
    scheduler.top_k_top_p_sampling_from_probs = functools.partial(getattr(draw, "func", draw), generator=generator)


def _config_for_jetengine(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """config.json with what JetEngine reads, where it looks for it."""
    return plain_config(config, "rope_parameters") | {"rope_theta": rope_theta(config), "torch_dtype": dtype}


def _greedy_weights(logits: torch.Tensor, **_: Any) -> torch.Tensor:
    """Weights (N, V) from logits (N, V), all of it on the most probable token, and as much as its probability is.

    0.1.0 draws by these weights and takes the drawn one for the confidence, so this is greedy decoding with the
    probability at temperature 1.
    """
    probability, token = logits.float().softmax(-1).max(-1, keepdim=True)
    return torch.zeros_like(logits, dtype=torch.float32).scatter_(-1, token, probability)


def _group(decoding: DecodingConfig) -> tuple[Any, ...]:
    """What must be equal in requests that run together: JetEngine takes these settings from the first of them."""
    return decoding.remasking_strategy, decoding.confidence_threshold, decoding.eb_threshold, Draw.of(decoding)


def _common_seed(seeds: Iterator[int]) -> int:
    digest = hashlib.sha256(",".join(map(str, seeds)).encode()).digest()
    return int.from_bytes(digest[:7], "little")


def _tail(request: GenerationRequest) -> tuple[int, ...]:
    """The prompt's tokens behind its last full block."""
    return request.prompt_ids[
        len(request.prompt_ids) // request.decoding.block_length * request.decoding.block_length :
    ]


@contextlib.contextmanager
def _torch_defaults_kept() -> Iterator[None]:
    """Undo what JetEngine does to torch's defaults: a default device, even the CPU, slows down every call of torch."""
    dtype = torch.get_default_dtype()
    try:
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(dtype)


class _Log(io.TextIOBase):
    def write(self, text: str) -> int:
        for line in text.splitlines():
            if line.strip():
                logger.debug("JetEngine: %s", line.strip())
        return len(text)


@contextlib.contextmanager
def _prints_to_log() -> Iterator[None]:
    """What JetEngine prints goes to the log (level DEBUG): lm_eval's own output stays what it is."""
    with contextlib.redirect_stdout(_Log()):
        yield
