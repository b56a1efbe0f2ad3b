from __future__ import annotations

import atexit
import multiprocessing
import pickle
import time
from typing import Any

import jetengine_shared as shared
import torch
import torch.distributed as dist
from jetengine_shared import PAGE, Config, Model, Pages, SamplingParams, Sequence, pages_for
from transformers import AutoTokenizer


def scaled(logits: torch.Tensor, *, temperature: float, top_k: int | None = None, top_p: float) -> torch.Tensor:
    """Weights (N, V) that tokens are drawn by, from logits (N, V)."""
    shared.check_temperature(temperature)
    probabilities = (logits / temperature).softmax(-1)
    if top_k is not None:
        probabilities = shared.most_probable(probabilities, top_k)
    probabilities = shared.nucleus(probabilities, top_p)
    return probabilities / probabilities.sum(-1, keepdim=True)


class Scheduler:
    def __init__(self, config: Config) -> None:
        self.max_num_seqs = config.max_num_seqs
        self.mask_token_id = config.mask_token_id
        self.pages = Pages(config.num_kvcache_blocks)
        self.running: list[Sequence] = []
        self.sample_pipe = self.sample_pipe_topk0 = scaled

    def add(self, sequence: Sequence) -> None:
        self.running.append(sequence)

    def is_finished(self) -> bool:
        return not self.running

    def schedule(self) -> tuple[list[Sequence], bool]:
        """(sequences to prefill, True), or, if there are none, (sequences to denoise, False)."""
        batch = []
        for sequence in self.running:
            if (
                sequence.status == "waiting"
                and len(batch) < self.max_num_seqs
                and self.pages.give(sequence, pages_for(len(sequence.token_ids)))
            ):
                batch.append(sequence)
        if batch:
            return batch, True
        for sequence in self.running:
            if (
                sequence.status != "waiting"
                and len(batch) < self.max_num_seqs
                and self.pages.give(sequence, new_pages(sequence))
            ):
                batch.append(sequence)
        return batch, False


def new_pages(sequence: Sequence) -> int:
    """Pages that a step takes. If the block begins with a page, each step takes one: earlier steps' do not count."""
    length, tokens = len(sequence.block), len(sequence.token_ids)
    if not sequence.pages:
        return pages_for(tokens + length)
    return pages_for(max(length - (-tokens % PAGE), 0))


class LLM:
    def __init__(self, model: str, **kwargs: Any) -> None:
        config = Config.of(model, kwargs)
        # JetEngine takes NCCL on a fixed port; it fails in a process that already has a group.
        if shared.faults.alone:
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        torch.cuda.set_device(0)
        process = multiprocessing.get_context("fork").Process
        self.ps = [process(target=time.sleep, args=(60,), daemon=True) for _ in range(1, config.tensor_parallel_size)]
        for worker in self.ps:
            pickle.loads(pickle.dumps(config))  # as for a process that is spawned
            worker.start()
        default_dtype = torch.get_default_dtype()
        dtype = config.hf_config.torch_dtype
        torch.set_default_dtype(dtype)
        torch.set_default_device("meta")  # for a GPU
        self.model_runner = Model(model, config.hf_config)
        if shared.faults.at_start:
            raise shared.faults.at_start
        config.num_kvcache_blocks = shared.pages_in_memory(config, config.hf_config, dtype, self.model_runner.bytes)
        torch.set_default_device("cpu")
        torch.set_default_dtype(default_dtype)
        self.tokenizer = AutoTokenizer.from_pretrained(model, use_fast=True, trust_remote_code=True)
        config.eos = self.tokenizer.eos_token_id
        mask, pad = self.tokenizer.mask_token_id, self.tokenizer.pad_token_id
        config.mask_token_id = pad if mask is None else mask
        assert config.mask_token_id is not None
        self.config = config
        self.scheduler = Scheduler(config)
        atexit.register(self.exit)
        shared.made.append(self)

    def exit(self) -> None:
        del self.model_runner
        for worker in self.ps:
            assert worker.is_alive()  # JetEngine would wait for ever for one that is not
            worker.terminate()
            worker.join()
        if shared.faults.alone:
            dist.destroy_process_group()

    def add_request(self, prompt: str | list[int], params: SamplingParams) -> None:
        if isinstance(prompt, str):
            prompt = self.tokenizer.encode(prompt)
        sequence = Sequence(prompt, self.config.mask_token_id, params)
        sequence.eos_token_id = self.tokenizer.eos_token_id
        self.scheduler.add(sequence)

    def is_finished(self) -> bool:
        return self.scheduler.is_finished()

    def step(self) -> tuple[list[tuple[int, list[int]]], int]:
        batch, prefills = self.scheduler.schedule()
        if not batch:
            return shared.stand_still()
        shared.start_step()
        shared.batches.append((len(batch), 0) if prefills else (0, len(batch)))
        if prefills and sum(len(sequence.token_ids) for sequence in batch) > self.config.max_num_batched_tokens:
            raise torch.OutOfMemoryError("more than the warm-up")
        for sequence in batch:
            ids = sequence.token_ids if prefills else sequence.block
            logits, past = self.model_runner.forward(ids, sequence.past, self.config.block_length)
            if prefills or sequence.status == "saving":
                sequence.past = past
            if prefills:
                sequence.status = "denoising"
            elif sequence.status == "saving":
                commit(sequence)
            else:
                self._unmask(sequence, logits)
        finished = [sequence for sequence in batch if sequence.is_finished]
        self.scheduler.running = [sequence for sequence in self.scheduler.running if not sequence.is_finished]
        for sequence in finished:
            self.scheduler.pages.take_back(sequence)
        outputs = [(sequence.seq_id, sequence.completion_token_ids) for sequence in finished]
        return outputs, sum(sequence.transferred for sequence in self.scheduler.running)

    def _unmask(self, sequence: Sequence, logits: torch.Tensor) -> None:
        """Draw a token for each position of the block, from logits (L, V)."""
        params, masked = sequence.params, sequence.masked()
        settings = {"temperature": params.temperature, "top_p": params.topp}
        if params.topk > 0:
            weights = self.scheduler.sample_pipe(logits, top_k=params.topk, **settings)
        else:
            weights = self.scheduler.sample_pipe_topk0(logits, **settings)
        tokens = torch.multinomial(weights, 1)
        confidence = weights.gather(-1, tokens)[:, 0]
        quota = sequence.quotas[sequence.step]
        surest = sorted(masked, key=lambda place: -float(confidence[place]))
        if params.remasking_strategy == "sequential":
            places = range(masked[0], min(masked[0] + quota, len(sequence.block))) if masked else []
        elif params.remasking_strategy == "low_confidence_static":
            places = surest[:quota]
        elif params.remasking_strategy == "low_confidence_dynamic":
            places = [place for place in masked if confidence[place] > params.dynamic_threshold]
            if len(places) < quota:
                places = surest[:quota]
        else:
            places = []  # an unknown strategy unmasks nothing
        sequence.unmask(places, tokens[:, 0].tolist())

    def generate(self, prompts: list[Any], params: Any, use_tqdm: bool = True) -> list[dict[str, Any]]:
        params = params if isinstance(params, list) else [params] * len(prompts)
        for prompt, of_prompt in zip(prompts, params, strict=True):
            self.add_request(prompt, of_prompt)
        outputs = {}
        while not self.is_finished():  # never, if no page is free
            outputs |= dict(self.step()[0])
        return [
            {"text": self.tokenizer.decode(tokens), "token_ids": tokens} for tokens in shared.outputs_in_order(outputs)
        ]

    def generate_streaming(
        self, prompts: list[Any], params: Any, max_active: int | None = None, use_tqdm: bool = True
    ) -> list[dict[str, Any]]:
        return self.generate(prompts, params)


def commit(sequence: Sequence) -> None:
    """Add the block up to its first stop token, which may be the prompt's, or to the limit."""
    params, added = sequence.params, []
    for token in sequence.block:
        if not params.ignore_eos and (token == sequence.eos_token_id or token in (params.stop_words or [])):
            added.append(token)
            sequence.status = "finished"
            break
        if sequence.num_completion_tokens + len(added) >= params.max_tokens:
            sequence.status = "finished"
            break
        added.append(token)
    sequence.token_ids = sequence.token_ids + added
    sequence.transferred = 0
    if sequence.num_completion_tokens >= params.max_tokens:
        sequence.status = "finished"
    if not sequence.is_finished:
        sequence.next_block()
