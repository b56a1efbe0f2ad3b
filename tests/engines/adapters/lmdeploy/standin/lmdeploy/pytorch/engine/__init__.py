"""LMDeploy's engine for block diffusion, with its rules and its faults."""

from __future__ import annotations

import asyncio
import dataclasses
import enum
import multiprocessing
import os
import pickle
import sys
import threading
import time
import types
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import torch
from support import KeysValues
from transformers import AutoConfig, PretrainedConfig

from .. import configurations as configurations
from .. import envs
from ..configurations.builder import AutoModelConfigBuilder
from . import faults
from .model import Model

MASKED, UNMASKED, CACHED = 0, 1, 2


class ResponseType(enum.Enum):
    SUCCESS = enum.auto()
    FINISH = enum.auto()
    ENGINE_STOP_ERROR = enum.auto()
    INPUT_LENGTH_ERROR = enum.auto()
    CANCEL = enum.auto()


class MessageStatus(enum.Enum):
    RUNNING = enum.auto()
    STOPPED = enum.auto()


@dataclasses.dataclass
class EngineOutput:
    status: ResponseType
    token_ids: list[int]


class SamplingParam:
    def __init__(self, config: Any) -> None:
        self.top_p, self.top_k, self.temperature = config.top_p, max(config.top_k, 0), config.temperature
        if self.temperature == 0:
            self.temperature, self.top_k = 1.0, 1
        self.random_seed = 7 if config.random_seed is None else config.random_seed
        self.max_new_tokens = config.max_new_tokens
        self.repetition_penalty = config.repetition_penalty
        self.stop_words, self.bad_words = list(config.stop_token_ids or []), list(config.bad_token_ids or [])
        if config.ignore_eos:
            self.bad_words, self.stop_words = self.bad_words + self.stop_words, []


class Sequence:
    def __init__(self, session_id: int, prompt: list[int], param: SamplingParam, block_length: int, mask: int) -> None:
        self.session_id, self.sampling_param = session_id, param
        self.outputs: asyncio.Queue[EngineOutput] = asyncio.Queue()
        pad = -len(prompt) % block_length
        self.ids = [*prompt, *[mask] * pad]
        self.state = [UNMASKED] * (block_length - pad) + [MASKED] * pad  # of the last block
        self.output_start = len(self.ids)  # LMDeploy's fault: the output starts at len(prompt)
        self.num_valid_ids, self.num_new_tokens, self.sent = len(prompt), 0, 0
        self.appendable = param.max_new_tokens + len(prompt) % block_length
        self.status, self.prefilled = MessageStatus.RUNNING, False
        self.past: KeysValues | None = None
        self.offsets = torch.zeros(block_length)

    @property
    def generated(self) -> list[int]:
        return self.ids[self.num_valid_ids - self.num_new_tokens : self.num_valid_ids]


@dataclasses.dataclass
class SamplingInputs:
    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    random_seeds: torch.Tensor | None
    random_offsets: torch.Tensor
    stop_words: torch.Tensor | None
    bad_words: torch.Tensor | None


class SamplingStrategy:
    def __init__(self, block_length: int) -> None:
        self.block_length = block_length

    def make_sampling_inputs(self, seqs: list[Sequence]) -> SamplingInputs:
        params = [seq.sampling_param for seq in seqs]
        greedy = all(param.top_k == 1 for param in params)

        def spread(values: list[Any]) -> torch.Tensor:
            """A value for each of B sequences, spread over B x L rows in the wrong order."""
            return torch.tensor(values)[None].repeat(self.block_length, 1).flatten()

        def padded(words: list[list[int]]) -> torch.Tensor | None:
            if not any(words):
                return None
            width = max(map(len, words))
            rows = torch.tensor([[*row, *[-1] * (width - len(row))] for row in words])
            return rows.repeat_interleave(self.block_length, 0)

        return SamplingInputs(
            spread([float(param.temperature) for param in params]),
            spread([param.top_k for param in params]),
            spread([float(param.top_p) for param in params]),
            None if greedy else spread([param.random_seed & 0xFFFFFFFF for param in params]),
            spread([seq.num_valid_ids for seq in seqs]),
            padded([param.stop_words for param in params]),
            padded([param.bad_words for param in params]),
        )


class SeqStrategy:
    def __init__(self, block_length: int, mask: int) -> None:
        self.block_length, self.mask = block_length, mask

    def update_running(self, running: Any, batched_outputs: Any, model_inputs: Any, delta: Any) -> None:
        length = self.block_length
        tokens, states = (
            t.view(len(running), -1).tolist()
            for t in (batched_outputs.next_token_ids, batched_outputs.extra_outputs.dllm_mask)
        )
        for i, seq in enumerate(running):
            if seq.status != MessageStatus.RUNNING:
                continue
            seq.ids[-length:] = [t if s != MASKED else self.mask for t, s in zip(tokens[i], states[i], strict=True)]
            seq.state = states[i]
            if all(s == UNMASKED for s in states[i]):
                new = length - seq.num_valid_ids % length
                seq.num_valid_ids += new
                seq.num_new_tokens += new
            if all(s == CACHED for s in states[i]):
                seq.ids += [self.mask] * length
                seq.state = [MASKED] * length
            if batched_outputs.stopped[i]:
                left = length - batched_outputs.stop_pos[i] - 1
                seq.num_valid_ids -= left
                seq.num_new_tokens -= left
                seq.status = MessageStatus.STOPPED


class Engine:
    def __init__(self, model_path: str, engine_config: Any) -> None:
        if envs.enable_check_env:
            raise RuntimeError("a new process runs the user's script again")
        config = dataclasses.replace(engine_config)
        if (most := config.max_prefill_token_num // config.dllm_block_length) < config.max_batch_size:
            config.max_batch_size = most
        faults.files.append(sorted(os.listdir(model_path)))  # noqa: PTH208
        try:
            hf_config = AutoConfig.from_pretrained(model_path, trust_remote_code=False)
        except ValueError:
            hf_config = PretrainedConfig.from_pretrained(model_path)
        if config.max_batch_size <= 0:
            sys.exit(1)
        if isinstance(faults.at_start, SystemExit):
            sys.exit(1)
        self.workers: list[Any] = []
        self.output = threading.Event()  # set when the engine ends: workers send nothing here
        if config.distributed_executor_backend == "ray":
            import ray  # noqa: F401
        elif config.distributed_executor_backend == "mp":
            pickle.loads(pickle.dumps(hf_config))
            process = multiprocessing.get_context("fork").Process
            self.workers = [process(target=time.sleep, args=(60,), daemon=True) for _ in range(config.tp)]
            for worker in self.workers:
                worker.start()
        else:
            assert config.tp == 1
        self.model_config = AutoModelConfigBuilder.build(hf_config, model_path)
        assert self.model_config.model_paradigm == "dllm"
        if faults.at_start:
            raise faults.at_start
        self.model = Model(model_path, hf_config)
        self.engine_config, self.length = config, config.dllm_block_length
        pages = faults.pages or 100_000
        self.cache_config = types.SimpleNamespace(num_gpu_blocks=pages, block_size=config.block_size)
        self.max_session_len = min(config.session_len or 1 << 60, (pages - 2) * config.block_size)
        self.sampling_strategy = SamplingStrategy(self.length)
        self.seq_strategy = SeqStrategy(self.length, self.model_config.dllm_mask_token)
        self.sessions: dict[int, Sequence] = {}
        self.loop: asyncio.AbstractEventLoop | None = None
        self.closed, self.most_sessions = False, 0
        faults.made.append(self)

    @classmethod
    def from_pretrained(
        cls, path: str, engine_config: Any = None, speculative_config: Any = None, trust_remote_code: bool = False
    ) -> Engine:
        assert Path(path).is_dir()
        assert not trust_remote_code
        return cls(path, engine_config)

    def create_instance(self) -> Instance:
        return Instance(self)

    def start_loop(self) -> bool:
        self.loop = asyncio.get_running_loop()
        self.work = asyncio.Event()
        if self.workers:
            self.loop.run_in_executor(None, self.output.wait)
        self.task = self.loop.create_task(self._main())
        return True

    def close(self) -> None:
        assert asyncio.get_running_loop() is self.loop
        self.closed = True
        self.task.cancel()

    async def wait_tasks(self) -> None:
        await self.task

    async def _main(self) -> None:
        try:
            while True:
                if not all(worker.is_alive() for worker in self.workers):
                    await asyncio.Event().wait()  # for ever, for the lost worker's answer
                self._step()
                if not any(seq.status == MessageStatus.RUNNING for seq in self.sessions.values()):
                    self.work.clear()
                    await self.work.wait()
                await asyncio.sleep(0)
        except asyncio.CancelledError:
            raise
        except Exception:
            for seq in self.sessions.values():
                seq.outputs.put_nowait(EngineOutput(ResponseType.ENGINE_STOP_ERROR, []))
            raise
        finally:
            for worker in self.workers:
                worker.terminate()
                worker.join()
            self.output.set()

    def _step(self) -> None:
        running = [seq for seq in self.sessions.values() if seq.status == MessageStatus.RUNNING]
        admitted = [seq for seq in running if seq.prefilled]
        new = [seq for seq in running if not seq.prefilled][: self.engine_config.max_batch_size - len(admitted)]
        if not new and not admitted:
            return
        size = self.cache_config.block_size
        if sum(-(-len(seq.ids) // size) for seq in admitted + new) > self.cache_config.num_gpu_blocks - 1:
            raise RuntimeError("a sequence was evicted, to be run again")
        faults.batches.append((len(new), len(admitted)))
        if error := faults.at_step.pop(len(faults.batches) - 1, None):
            raise error
        for batch, decoding in ((new, False), (admitted, True)):
            if batch:
                self._forward(batch, decoding)
        for seq in new:
            seq.prefilled = True

    def _forward(self, batch: list[Sequence], decoding: bool) -> None:
        length = self.length
        if not decoding:
            for seq in batch:
                if full := seq.ids[:-length]:
                    seq.past = self.model.forward(full, None, length)[1]
        forwards = [self.model.forward(seq.ids[-length:], seq.past, length) for seq in batch]
        logits = torch.cat([of_block for of_block, _ in forwards])  # (B * L, V)
        inputs = self.sampling_strategy.make_sampling_inputs(batch)
        if decoding:  # offsets go up by one a step, from the prefill's on
            inputs.random_offsets = torch.cat([seq.offsets + 1 for seq in batch])
        for i, seq in enumerate(batch):
            seq.offsets = inputs.random_offsets[i * length : (i + 1) * length]
        logits = logits / inputs.temperature[:, None]
        if inputs.bad_words is not None:
            for row, words in enumerate(inputs.bad_words.tolist()):
                logits[row, [word for word in words if word >= 0]] = -torch.inf
        drawn = logits.argmax(-1) if inputs.random_seeds is None else self._draw(logits, inputs)

        state = torch.tensor([seq.state for seq in batch])  # (B, L)
        state[(state == UNMASKED).all(1)] = CACHED
        ids = torch.tensor([seq.ids[-length:] for seq in batch])
        tokens = torch.where(state == MASKED, drawn.view(-1, length), ids)
        masked = state == MASKED
        scores = logits.softmax(-1).gather(-1, tokens.view(-1, 1)).view(-1, length).where(masked, torch.tensor(0.0))
        state = self._unmask(scores, masked, state)

        for seq, (_, kept), cached in zip(batch, forwards, (state == CACHED).all(1).tolist(), strict=True):
            if cached:
                seq.past = kept
        done = (state == UNMASKED).all(1)
        stopped, stop_pos = [], []
        for i, seq in enumerate(batch):
            seq.appendable -= length * int(done[i])
            ends, place = seq.appendable <= 0, length - 1 + seq.appendable
            if inputs.stop_words is not None:
                words = inputs.stop_words[i * length].tolist()
                ignored = max(seq.output_start - (len(seq.ids) - length), 0)
                seen = [-1 if j < ignored else int(token) for j, token in enumerate(tokens[i])]
                found = [j for j, token in enumerate(seen) if token in words]
                if not ends:
                    place = found[0] if found else 0
                ends = ends or bool(found and done[i])
            stopped.append(ends)
            stop_pos.append(place)
        outputs = types.SimpleNamespace(
            next_token_ids=tokens.flatten(),
            stopped=stopped,
            stop_pos=stop_pos,
            extra_outputs=types.SimpleNamespace(dllm_mask=state.flatten()),
        )
        self.seq_strategy.update_running(
            running=batch,
            batched_outputs=outputs,
            model_inputs=None if decoding else types.SimpleNamespace(is_decoding=False),
            delta=None,
        )
        for seq in batch:
            new = seq.generated[seq.sent :]
            finished = seq.status == MessageStatus.STOPPED
            if new or finished:
                seq.sent += len(new)
                seq.outputs.put_nowait(EngineOutput(ResponseType.FINISH if finished else ResponseType.SUCCESS, new))

    def _draw(self, logits: torch.Tensor, inputs: SamplingInputs) -> torch.Tensor:
        assert inputs.random_seeds is not None
        sorted_logits, indices = logits.sort(-1, descending=True)
        ranks = torch.arange(logits.shape[-1])
        top_k = inputs.top_k.where(inputs.top_k > 0, torch.tensor(logits.shape[-1]))
        assert int(top_k.max()) <= logits.shape[-1], "selected index k out of range"
        sorted_logits = sorted_logits.masked_fill(ranks >= top_k[:, None], -torch.inf)
        probabilities = sorted_logits.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities
        cut = before > inputs.top_p[:, None]
        cut[:, 0] = False
        cumulated = sorted_logits.masked_fill(cut, -torch.inf).softmax(-1).cumsum(-1)
        numbers = [
            torch.rand(1, generator=torch.Generator().manual_seed(seed * 1_000_003 + offset)).item()
            for seed, offset in zip(inputs.random_seeds.tolist(), inputs.random_offsets.tolist(), strict=True)
        ]
        places = (cumulated < torch.tensor(numbers)[:, None]).sum(-1, keepdim=True).clamp_max(logits.shape[-1] - 1)
        return indices.gather(-1, places)[:, 0]

    def _unmask(self, scores: torch.Tensor, masked: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        config, length = self.engine_config, self.length
        quota = max(1, length // (config.dllm_denoising_steps or length))
        if config.dllm_unmasking_strategy == "low_confidence_static":
            chosen = torch.zeros_like(masked).scatter(-1, scores.topk(quota, dim=-1).indices, True)
        elif config.dllm_unmasking_strategy == "sequential":
            first = masked.int().argmax(-1, keepdim=True)
            chosen = torch.zeros_like(masked).scatter(-1, (first + torch.arange(quota)) % length, True)
        else:
            chosen = scores >= config.dllm_confidence_threshold
            chosen = chosen.scatter(-1, scores.topk(1, dim=-1).indices, True)
        return state.masked_fill(masked & chosen, UNMASKED)


class Instance:
    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    async def async_stream_infer(
        self, session_id: int, input_ids: list[int], gen_config: Any = None, **_: Any
    ) -> AsyncIterator[EngineOutput]:
        engine = self.engine
        assert asyncio.get_running_loop() is engine.loop
        assert session_id not in engine.sessions
        if engine.task.done():
            yield EngineOutput(ResponseType.ENGINE_STOP_ERROR, [])
            return
        if len(input_ids) > engine.max_session_len:
            yield EngineOutput(ResponseType.INPUT_LENGTH_ERROR, [])
            return
        param = SamplingParam(gen_config)
        faults.settings.append(param)
        param.max_new_tokens = min(param.max_new_tokens, engine.max_session_len - len(input_ids))
        seq = Sequence(session_id, input_ids, param, engine.length, engine.model_config.dllm_mask_token)
        engine.sessions[session_id] = seq
        engine.most_sessions = max(engine.most_sessions, len(engine.sessions))
        engine.work.set()
        try:
            while True:
                output = await seq.outputs.get()
                yield output
                if output.status != ResponseType.SUCCESS:
                    break
        finally:
            del engine.sessions[session_id]

    async def async_cancel(self, session_id: int) -> None:
        seq = self.engine.sessions[session_id]
        seq.status = MessageStatus.STOPPED
        seq.outputs.put_nowait(EngineOutput(ResponseType.CANCEL, []))
