from __future__ import annotations

import atexit
import dataclasses
from collections import deque
from typing import Any

import jetengine_shared as shared
import torch
import torch.distributed as dist
from jetengine.engine import scheduler
from jetengine.engine.distributed_manager import DistributedManager
from jetengine_shared import Model, Pages, Sequence, pages_for
from transformers import AutoTokenizer


@dataclasses.dataclass
class SamplingParams(shared.SamplingParams):
    eb_threshold: float = 0.35
    repetition_penalty: float = 1.0


@dataclasses.dataclass
class Config(shared.Config):
    max_num_batched_tokens: int = 131072
    gpu_memory_utilization: float = 0.8
    dtype: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.torch_dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(self.dtype, torch.bfloat16)
        assert self.mask_token_id != -1


class Scheduler:
    def __init__(self, config: Config) -> None:
        self.max_num_seqs = config.max_num_seqs
        self.mask_token_id = config.mask_token_id
        self.pages = Pages(config.num_kvcache_blocks)
        self.running: list[Sequence] = []
        self.waiting_prefill: deque[Sequence] = deque()
        self.prefill_ready: deque[Sequence] = deque()

    def add(self, sequence: Sequence) -> None:
        if not self._start(sequence):
            self.waiting_prefill.append(sequence)

    def is_finished(self) -> bool:
        return not self.running and not self.waiting_prefill and not self.prefill_ready

    def _start(self, sequence: Sequence) -> bool:
        if len(self.running) >= self.max_num_seqs or not self.pages.give(sequence, pages_for(len(sequence.token_ids))):
            return False
        if sequence.status == "waiting":
            self.prefill_ready.append(sequence)
        self.running.append(sequence)
        return True

    def schedule(self) -> tuple[list[Sequence], list[Sequence]]:
        while self.waiting_prefill and self._start(self.waiting_prefill[0]):
            self.waiting_prefill.popleft()
        prefill = list(self.prefill_ready)
        self.prefill_ready.clear()
        denoise = []
        for sequence in self.running:
            if sequence.status == "waiting":
                continue
            needed = pages_for(len(sequence.token_ids) + len(sequence.block)) - sequence.pages
            if self.pages.give(sequence, max(needed, 0)):
                denoise.append(sequence)
            else:
                print(f"[Warning] no page for sequence {sequence.seq_id}")
        if not prefill and not denoise and self.running:
            print("[Warning] nothing can run")
        return prefill, denoise

    def remove_finished(self) -> list[Sequence]:
        finished = [sequence for sequence in self.running if sequence.is_finished]
        self.running = [sequence for sequence in self.running if not sequence.is_finished]
        for sequence in finished:
            self.pages.take_back(sequence)
        return finished


class LLM:
    def __init__(self, model: str, **kwargs: Any) -> None:
        config = Config.of(model, kwargs)
        print("[KVCache] an estimate")
        manager = DistributedManager(config.tensor_parallel_size)
        assert dist.get_world_size(manager.tp_group) == 1  # the model's layers assert this too
        torch.cuda.set_device(manager.device)
        default_dtype = torch.get_default_dtype()
        torch.set_default_dtype(config.torch_dtype)
        torch.set_default_device("meta")  # for a GPU
        if "moe" in config.hf_config.model_type:
            raise ValueError("MoE not supported")
        self.model_runner = Model(model, config.hf_config)
        if shared.faults.at_start:
            raise shared.faults.at_start
        config.num_kvcache_blocks = shared.pages_in_memory(
            config, config.hf_config, config.torch_dtype, self.model_runner.bytes
        )
        print(f"[KVCache] {config.num_kvcache_blocks} pages")
        torch.set_default_device("cpu")
        torch.set_default_dtype(default_dtype)
        self.tokenizer = AutoTokenizer.from_pretrained(model, use_fast=True, trust_remote_code=True)
        config.eos = self.tokenizer.eos_token_id
        self.config = config
        self.scheduler = Scheduler(config)
        self.scheduler.consistent_sampling_params = False
        atexit.register(self.exit)
        shared.made.append(self)

    def exit(self) -> None:
        del self.model_runner

    def add_request(self, prompt: str | list[int], params: SamplingParams) -> None:
        if isinstance(prompt, str):
            prompt = self.tokenizer.encode(prompt)
        if self.tokenizer.pad_token_id in prompt:
            prompt = prompt[prompt.index(self.tokenizer.pad_token_id) + 1 :]
        if params.stop_words is None:
            params.stop_words = [self.tokenizer.eos_token_id]
        self.scheduler.add(Sequence(prompt, self.config.mask_token_id, params))

    def is_finished(self) -> bool:
        return self.scheduler.is_finished()

    def step(self) -> tuple[list[Any], int]:
        prefill, denoise = self.scheduler.schedule()
        if not prefill and not denoise:
            return shared.stand_still()
        shared.start_step()
        shared.batches.append((len(prefill), len(denoise)))
        if sum(len(sequence.token_ids) for sequence in prefill) > self.config.max_num_batched_tokens:
            raise torch.OutOfMemoryError("more than the warm-up")
        for sequence in prefill:
            self._run(sequence, sequence.token_ids, keep=True)
            sequence.status = "denoising"
        logits = [self._run(sequence, sequence.block, keep=sequence.status == "saving") for sequence in denoise]
        if denoise:
            self._unmask(denoise, torch.stack(logits))
        finished = self.scheduler.remove_finished()
        limit = self.config.max_model_len
        outputs = [(s.seq_id, s.token_ids[:limit], [], [], []) for s in finished]
        return outputs, sum(sequence.transferred for sequence in denoise)

    def _run(self, sequence: Sequence, ids: list[int], keep: bool) -> torch.Tensor:
        logits, past = self.model_runner.forward(ids, sequence.past, self.config.block_length)
        if keep:
            sequence.past = past
        return logits

    def _unmask(self, sequences: list[Sequence], logits: torch.Tensor) -> None:
        """Draw a token for each position, from logits (B, L, V), with the first sequence's settings."""
        first, rows = sequences[0].params, logits.shape[0] * logits.shape[1]
        if not self.scheduler.consistent_sampling_params and rows > 1:
            raise ValueError("batch size mismatch")
        shared.check_temperature(first.temperature)
        probabilities = (logits / first.temperature).softmax(-1)
        entropies = -(probabilities * probabilities.clamp_min(1e-12).log()).sum(-1)  # (B, L)
        tokens = scheduler.top_k_top_p_sampling_from_probs(probabilities.flatten(0, 1), first.topk, first.topp)
        tokens = tokens.view(logits.shape[:2])
        confidence = probabilities.gather(-1, tokens[..., None])[..., 0]
        for i, sequence in enumerate(sequences):
            if sequence.status == "saving":
                commit(sequence)
                continue
            masked = sequence.masked()
            quota = sequence.quotas[sequence.step]
            leftmost = [place for place in masked if place < masked[0] + quota] if masked else []
            surest = sorted(masked, key=lambda place: -float(confidence[i, place]))
            if first.remasking_strategy == "sequential":
                places = leftmost
            elif first.remasking_strategy == "low_confidence_static":
                places = surest[:quota]
            elif first.remasking_strategy == "low_confidence_dynamic":
                places = [place for place in masked if confidence[i, place] > first.dynamic_threshold]
                if len(places) < quota:
                    places = leftmost
            elif first.remasking_strategy == "entropy_bounded":
                plainest = sorted(masked, key=lambda place: float(entropies[i, place]))
                sums = entropies[i, plainest].cumsum(0)
                places = plainest[: max(int((sums < first.eb_threshold).sum()), 1)]
            elif first.remasking_strategy == "random":
                places = [masked[place] for place in torch.randperm(len(masked))[:quota]]
            else:
                raise ValueError(f"Unsupported remasking strategy: {first.remasking_strategy}")
            sequence.unmask(places, tokens[i].tolist())

    def generate(self, prompts: list[Any], params: Any, use_tqdm: bool = True) -> list[dict[str, Any]]:
        if not isinstance(params, list):
            params = [params] * len(prompts)
            self.scheduler.consistent_sampling_params = True
        return self._generate(prompts, params, len(self.scheduler.running) + len(prompts))

    def generate_streaming(
        self, prompts: list[Any], params: SamplingParams, max_active: int | None = None, use_tqdm: bool = True
    ) -> list[dict[str, Any]]:
        print(f"[KVCache] {params.max_tokens} tokens, {max_active:,} sequences")
        self.scheduler.consistent_sampling_params = True
        assert max_active is not None
        return self._generate(prompts, [params] * len(prompts), max_active)

    def _generate(self, prompts: list[Any], params: list[SamplingParams], active: int) -> list[dict[str, Any]]:
        waiting, outputs, stalls = deque(zip(prompts, params, strict=True)), {}, 0
        while waiting or not self.is_finished():
            while waiting and len(self.scheduler.running) < active:
                self.add_request(*waiting.popleft())
            finished, progress = self.step()
            stalls = 0 if finished or progress or self.is_finished() or waiting else stalls + 1
            if stalls > 3:
                print("[Warning] Deadlock detected")
                break
            outputs |= {number: tokens for number, tokens, *_ in finished}
        return [
            {"text": self.tokenizer.decode(tokens), "token_ids": tokens} for tokens in shared.outputs_in_order(outputs)
        ]


def commit(sequence: Sequence) -> None:
    """Add the whole block; finish at a stop token after the prompt's last token, or at the limit."""
    params = sequence.params
    stops = not params.ignore_eos and not set(params.stop_words).isdisjoint(sequence.block[sequence.tail :])
    sequence.token_ids = sequence.token_ids + sequence.block
    sequence.transferred = 0
    if stops or sequence.num_completion_tokens >= params.max_tokens:
        sequence.status = "finished"
    else:
        sequence.next_block()
