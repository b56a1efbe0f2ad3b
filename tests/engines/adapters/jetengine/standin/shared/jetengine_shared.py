"""What the stand-ins for JetEngine 0.2.0 and 0.1.0 share. They run on the CPU, in float32.

The stand-ins have JetEngine's public surface, its scheduling, its unmasking rules, and its faults. The model is real,
read from the folder's safetensors, so that answers can be compared with the native engine's. Attention over pages is
not part of the model: the adapter asks it for its results.

Compared with JetEngine itself:

    0.2.0 (commit 11563d1)   The stand-in does what 0.2.0 was seen to do on an H100 (torch 2.11, transformers 4.52.4,
                             flash-attn 2.8.3.post2, flashinfer 0.5.3), and what its source says where nothing was run.
                             On an H100 the adapter's answers to the demo's 200 problems end in the native engine's
                             numbers for 196 (static) and 199 (sequential) of them (docs/measurements.md). On
                             2026-11-28 and 2026-11-29 tests/gpu/test_jetengine.py ran on an H200 (torch 2.11,
                             transformers 5.17): its first part only, because of a time limit.
    0.1.0 (commit 0ddc55a)   The stand-in does what 0.1.0's source says. On an H100 the adapter's answers end in the
                             native engine's numbers for 196 (static), 199 (sequential) and 196 (dynamic) of 200
                             problems (docs/measurements.md, on 2026-11-24). No run of tests/gpu with 0.1.0 is recorded
                             since.

To compare again, on a GPU, where the version in question is installed (docs/engines.md says how):

    python -m pytest tests/gpu/test_jetengine.py -s

That asks the real engine most of what tests/engines/adapters/jetengine/test_adapter.py asks the stand-ins.
tests/engines/adapters/jetengine/test_standin.py lists the faults, each as a test.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from support import KeysValues, block_causal, read_weights, reference_forward
from transformers import AutoConfig

PAGE = 256


class Faults:
    """Faults that a test can add to JetEngine's own.

    Attributes:
        attention: flash-attn's results are wrong "always", where it "splits", or never ("").
        pages: number of KV pages; None: as many as memory allows.
        at_step: number of a step, from 0 on over the whole process -> the error that the step raises.
        at_start: the error that LLM() raises once the weights are loaded.
        alone: whether a process can have one LLM only, which is so in 0.1.0.
    """

    def __init__(self) -> None:
        self.attention = ""
        self.pages: int | None = None
        self.at_step: dict[int, BaseException] = {}
        self.at_start: BaseException | None = None
        self.alone = True


faults = Faults()
made: list[Any] = []  # every LLM
sampled: list[Any] = []  # every request's SamplingParams
batches: list[tuple[int, int]] = []  # every step that ran: sequences prefilled, sequences denoised


idle_steps = itertools.count()


def stand_still() -> tuple[list[Any], int]:
    """What a step with nothing to run returns. The 1,000th such step fails: a caller that never stops ends its test."""
    assert next(idle_steps) < 1000
    return [], 0


@dataclasses.dataclass
class SamplingParams:
    """As in 0.1.0; 0.2.0 has more settings."""

    temperature: float = 1.0
    max_tokens: int = 64
    ignore_eos: bool = False
    block_length: int = 4
    denoising_steps: int = 4
    dynamic_threshold: float = 0.9
    topk: int = 0
    topp: float = 1
    remasking_strategy: str = "low_confidence_static"
    stop_words: list[int] | None = None


@dataclasses.dataclass
class Config:
    """As in 0.1.0; 0.2.0 has more settings, and other defaults."""

    model: str
    max_num_batched_tokens: int = 16384
    max_num_seqs: int = 512
    max_model_len: int = 4096
    gpu_memory_utilization: float = 0.9
    tensor_parallel_size: int = 1
    enforce_eager: bool = False
    hf_config: Any = None
    eos: int | None = -1
    kvcache_block_size: int = 256
    num_kvcache_blocks: int = -1
    mask_token_id: int = -1
    block_length: int = 4

    def __post_init__(self) -> None:
        assert Path(self.model).is_dir()
        assert self.kvcache_block_size % 256 == 0
        self.hf_config = AutoConfig.from_pretrained(self.model, trust_remote_code=True)
        self.max_model_len = min(self.max_model_len, self.hf_config.max_position_embeddings)
        assert self.max_num_batched_tokens >= self.max_model_len

    @classmethod
    def of(cls, model: str, options: dict[str, Any]) -> Any:
        """From LLM's keyword arguments; unknown ones vanish, as in JetEngine."""
        names = {field.name for field in dataclasses.fields(cls)}
        return cls(model, **{name: value for name, value in options.items() if name in names})


def start_step() -> None:
    """Raise the error of a step that is to fail; such a step counts as a batch of nothing."""
    if error := faults.at_step.pop(len(batches), None):
        batches.append((0, 0))
        raise error


class Model:
    """SDAR, dense or with experts, in float32.

    Args:
        folder: the checkpoint's.
        config: has the attributes that JetEngine reads, under these names.
    """

    def __init__(self, folder: str, config: Any) -> None:
        assert getattr(config, "rope_scaling", None) is None
        assert config.hidden_act == "silu"
        assert not getattr(config, "attention_bias", False)
        with torch.device("cpu"):  # safetensors 0.4.3 loads onto the default device
            self.weights = {name: weight.float() for name, weight in read_weights(Path(folder)).items()}
        self.bytes = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
        names = ("head_dim", "num_hidden_layers", "rms_norm_eps", "tie_word_embeddings")
        if "model.layers.0.mlp.gate.weight" in self.weights:
            names += ("num_experts", "num_experts_per_tok")
        self.config = {name: getattr(config, name) for name in names}
        self.config |= {"norm_topk_prob": True, "rope_theta": getattr(config, "rope_theta", 1000000)}

    @torch.inference_mode()
    def forward(self, ids: list[int], past: KeysValues | None, block_length: int) -> tuple[torch.Tensor, KeysValues]:
        """Logits (N, V) of a sequence's next tokens, and the keys and values of `past` with theirs behind them."""
        before = len(past[0][0]) if past else 0
        sees = block_causal(before + len(ids), block_length)[before:]
        return reference_forward(self.weights, self.config, torch.tensor(ids), sees, past)


def pages_in_memory(config: Any, hf_config: Any, dtype: torch.dtype, weight_bytes: int) -> int:
    """Number of KV pages that fit what the weights and the warm-up leave of the part of the GPU's memory to fill.

    The warm-up's sequences take the first numbers: the first request's number is not 0.
    """
    sequences = min(config.max_num_batched_tokens // config.max_model_len, config.max_num_seqs)
    for _ in range(sequences):
        next(Sequence.counter)
    free, total = torch.cuda.mem_get_info()
    heads = hf_config.num_attention_heads + 2 * hf_config.num_key_value_heads
    width = 3 * hf_config.hidden_size + 3 * hf_config.intermediate_size + 2 * heads * hf_config.head_dim
    prefill = sequences * config.max_model_len * width * dtype.itemsize
    kv_heads = hf_config.num_key_value_heads // config.tensor_parallel_size
    page = 2 * hf_config.num_hidden_layers * PAGE * kv_heads * hf_config.head_dim * dtype.itemsize
    pages = int(total * config.gpu_memory_utilization - (total - free) - weight_bytes - prefill) // page
    assert pages > 0
    return pages if faults.pages is None else faults.pages


class Sequence:
    """A request under way: whole blocks of tokens, and the block that is being denoised."""

    counter = itertools.count()  # one for the process; never reset

    def __init__(self, prompt: list[int], mask: int, params: Any) -> None:
        self.seq_id = next(Sequence.counter)
        self.params, self.mask = params, mask
        self.num_prompt_tokens = len(prompt)
        length = params.block_length
        whole = len(prompt) // length * length
        self.token_ids = list(prompt[:whole])
        self.tail = len(prompt) - whole
        self.block = [*prompt[whole:], *[mask] * (length - self.tail)]
        self.status = "waiting" if whole else "denoising"
        base, more = divmod(length, params.denoising_steps)
        self.quotas = [base + (step < more) for step in range(params.denoising_steps)]
        self.step = self.transferred = self.pages = 0
        self.past: KeysValues | None = None
        sampled.append(params)

    @property
    def num_completion_tokens(self) -> int:
        """Below 0 until the block with the prompt's last tokens is whole."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def completion_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def is_finished(self) -> bool:
        return self.status == "finished"

    def masked(self) -> list[int]:
        """Positions in the block that hold the mask token, which may have been drawn or stood in the prompt."""
        return [place for place, token in enumerate(self.block) if token == self.mask]

    def unmask(self, places: Iterable[int], tokens: list[int]) -> None:
        """Set the tokens at these positions; the block is done when no mask, or no step of the schedule, is left."""
        places = list(places)
        for place in places:
            self.block[place] = tokens[place]
        self.transferred = len(places)
        self.step += 1
        if not self.masked() or self.step >= self.params.denoising_steps:
            self.status = "saving"

    def next_block(self) -> None:
        self.block = [self.mask] * self.params.block_length
        self.step, self.tail, self.status = 0, 0, "denoising"


class Pages:
    """Counts the free KV pages."""

    def __init__(self, number: int) -> None:
        assert number > 0
        self.free = number

    def give(self, sequence: Sequence, number: int) -> bool:
        if number > self.free:
            return False
        self.free -= number
        sequence.pages += number
        return True

    def take_back(self, sequence: Sequence) -> None:
        self.free += sequence.pages
        sequence.pages = 0


def pages_for(tokens: int) -> int:
    return -(-tokens // PAGE)


def most_probable(probabilities: torch.Tensor, k: int) -> torch.Tensor:
    """(N, V): each row keeps its k most probable tokens, and has 0 elsewhere."""
    values, tokens = probabilities.topk(min(k, probabilities.shape[-1]))
    return torch.zeros_like(probabilities).scatter_(-1, tokens, values)


def nucleus(probabilities: torch.Tensor, p: float) -> torch.Tensor:
    """(N, V): each row keeps the smallest set of tokens whose probability reaches p, and has 0 elsewhere."""
    values, tokens = probabilities.sort(descending=True)
    values = values / values.sum(-1, keepdim=True)
    values[values.cumsum(-1) - values >= p] = 0
    return torch.zeros_like(probabilities).scatter_(-1, tokens, values)


def check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"Temperature must be a positive float, not {temperature}")


def attend_over_pages(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cache_seqlens: torch.Tensor,
    block_table: torch.Tensor,
    causal: bool = False,
    num_splits: int = 0,
) -> torch.Tensor:
    """flash_attn_with_kvcache: writes new keys and values into their pages; all queries attend to all tokens."""
    assert not causal
    out = torch.empty_like(q)
    for i, length in enumerate(cache_seqlens.tolist()):
        for place in range(k.shape[1]):
            page, row = divmod(length + place, PAGE)
            k_cache[block_table[i, page], row], v_cache[block_table[i, page], row] = k[i, place], v[i, place]
        pages = block_table[i, : pages_for(length + k.shape[1])].long()
        keys, values = (c[pages].flatten(0, 1)[: length + k.shape[1]].float() for c in (k_cache, v_cache))
        groups = q.shape[2] // keys.shape[1]
        result = torch.nn.functional.scaled_dot_product_attention(
            q[i].float().transpose(0, 1),
            keys.repeat_interleave(groups, 1).transpose(0, 1),
            values.repeat_interleave(groups, 1).transpose(0, 1),
        )
        out[i] = result.transpose(0, 1)
    wrong = faults.attention == "always" or (faults.attention == "splits" and num_splits != 1)
    return out.roll(1, dims=-1) if wrong else out


def outputs_in_order(outputs: dict[int, Any]) -> list[Any]:
    return [outputs[number] for number in sorted(outputs)]
