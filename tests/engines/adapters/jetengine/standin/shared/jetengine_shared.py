"""What both versions of the stand-in for JetEngine are made of.

The model is real: Qwen3 and Qwen3-MoE in float32 on the CPU, from the folder's safetensors, so that answers can be
compared with the native engine's. So is the bookkeeping that an adapter has to look after, with JetEngine's faults.
Attention over pages is only there to be asked for its results.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoConfig

PAGE = 256


class Faults:
    """What a test can have go wrong beside what always does.

    Attributes:
        attention: flash-attn's results are wrong "always", where it "splits", or never ("").
        pages: the KV pages that there are, in the place of what memory allows.
        at_step: step (from 0, of all that the process runs) -> what it raises.
        at_start: what LLM() raises once the weights are loaded.
        alone: 0.1.0 can be there once in a process only, as is true of it.
    """

    def __init__(self) -> None:
        self.attention = ""
        self.pages: int | None = None
        self.at_step: dict[int, BaseException] = {}
        self.at_start: BaseException | None = None
        self.alone = True


faults = Faults()
made: list[Any] = []  # every LLM
sampled: list[Any] = []  # settings that requests came with
batches: list[tuple[int, int]] = []  # of every step that ran: sequences prefilled, sequences denoised


idle_steps = itertools.count()


def stand_still() -> tuple[list[Any], int]:
    """What a step with nothing to run returns. Who asks for ever is stopped, so that a test of it ends."""
    assert next(idle_steps) < 1000
    return [], 0


@dataclasses.dataclass
class SamplingParams:
    """0.1.0's; 0.2.0 has more."""

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
    """0.1.0's; 0.2.0 has more, and other defaults."""

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
        """From what LLM was given; what has no such name vanishes."""
        names = {field.name for field in dataclasses.fields(cls)}
        return cls(model, **{name: value for name, value in options.items() if name in names})


def start_step() -> None:
    """Count a step that runs, and stop at the one that is to fail."""
    if error := faults.at_step.pop(len(batches), None):
        batches.append((0, 0))
        raise error


class Model:
    """Qwen3, dense or with experts. `forward` takes a sequence's next tokens, with keys and values of those before.

    `config` has the attributes that JetEngine reads, under these names.
    """

    def __init__(self, folder: str, config: Any) -> None:
        self.weights = {}
        for path in sorted(Path(folder).glob("*.safetensors")):
            self.weights |= {name: weight.float() for name, weight in load_file(path, device="cpu").items()}
        self.bytes = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
        self.config = config
        assert getattr(config, "rope_scaling", None) is None
        assert config.hidden_act == "silu"
        self.head_dim = config.head_dim
        self.theta = getattr(config, "rope_theta", 1000000)
        head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
        self.head = self.weights[head]

    @torch.inference_mode()
    def forward(self, ids: list[int], past: list[Any] | None, block_length: int) -> tuple[torch.Tensor, list[Any]]:
        """Logits (N, V) of tokens that see their own block and all before; keys and values with theirs behind them."""
        config, device = self.config, "cpu"
        n, before = len(ids), past[0][0].shape[1] if past else 0
        frequencies = self.theta ** (-torch.arange(0, self.head_dim, 2, device=device) / self.head_dim)
        angles = torch.outer(torch.arange(before, before + n, device=device).float(), frequencies)
        cos, sin = angles.cos(), angles.sin()  # (N, size / 2)
        block = torch.arange(before + n, device=device) // block_length
        sees = block[before:, None] >= block

        def norm(x: torch.Tensor, name: str) -> torch.Tensor:
            return (
                x * torch.rsqrt((x * x).mean(-1, keepdim=True) + config.rms_norm_eps) * self.weights[f"{name}.weight"]
            )

        def project(x: torch.Tensor, name: str) -> torch.Tensor:
            bias = self.weights.get(f"{name}.bias") if getattr(config, "attention_bias", False) else None
            return torch.nn.functional.linear(x, self.weights[f"{name}.weight"], bias)

        def mlp(x: torch.Tensor, name: str) -> torch.Tensor:
            gate, up = project(x, f"{name}.gate_proj"), project(x, f"{name}.up_proj")
            return project(torch.nn.functional.silu(gate) * up, f"{name}.down_proj")

        def rotate(x: torch.Tensor) -> torch.Tensor:  # (heads, N, size)
            a, b = x.chunk(2, dim=-1)
            return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

        hidden, kept = self.weights["model.embed_tokens.weight"][torch.tensor(ids, device=device)], []
        for i in range(config.num_hidden_layers):
            layer = f"model.layers.{i}"
            x = norm(hidden, f"{layer}.input_layernorm")
            q, k, v = (
                project(x, f"{layer}.self_attn.{name}_proj").view(n, -1, self.head_dim).transpose(0, 1)
                for name in "qkv"
            )
            q, k = (rotate(norm(t, f"{layer}.self_attn.{name}_norm")) for t, name in ((q, "q"), (k, "k")))
            if past:
                k, v = torch.cat([past[i][0], k], dim=1), torch.cat([past[i][1], v], dim=1)
            kept.append((k, v))
            groups = q.shape[0] // k.shape[0]
            out = torch.nn.functional.scaled_dot_product_attention(
                q, k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0), attn_mask=sees
            )
            hidden = hidden + project(out.transpose(0, 1).reshape(n, -1), f"{layer}.self_attn.o_proj")
            x = norm(hidden, f"{layer}.post_attention_layernorm")
            if f"{layer}.mlp.gate.weight" not in self.weights:
                hidden = hidden + mlp(x, f"{layer}.mlp")
                continue
            share, chosen = project(x, f"{layer}.mlp.gate").softmax(-1).topk(config.num_experts_per_tok)
            experts = torch.stack([mlp(x, f"{layer}.mlp.experts.{e}") for e in range(config.num_experts)], dim=1)
            used = experts.gather(1, chosen[..., None].expand(-1, -1, x.shape[-1]))
            hidden = hidden + (used * (share / share.sum(-1, keepdim=True))[..., None]).sum(1)
        return torch.nn.functional.linear(norm(hidden, "model.norm"), self.head), kept


def pages_in_memory(config: Any, hf_config: Any, dtype: torch.dtype, weight_bytes: int) -> int:
    """KV pages in the part of the GPU's memory that the weights and a warm-up leave.

    The warm-up uses up numbers of sequences, which is why the first request's is not 0.
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
    """A prompt under way: whole blocks of tokens, and the block that is being denoised."""

    counter = itertools.count()  # of the process, never set back

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
        self.past: list[Any] | None = None
        sampled.append(params)

    @property
    def num_completion_tokens(self) -> int:
        """Below 0 while the end of the prompt is not among the whole blocks."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def completion_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def is_finished(self) -> bool:
        return self.status == "finished"

    def masked(self) -> list[int]:
        """Places of the block that hold the mask token, wherever it comes from."""
        return [place for place, token in enumerate(self.block) if token == self.mask]

    def unmask(self, places: Iterable[int], tokens: list[int]) -> None:
        """Set these places; the block is done when no mask is left, or the schedule is at its end."""
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
    """How many KV pages are free."""

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
    """(N, V) with the k most probable tokens of each row only."""
    values, tokens = probabilities.topk(min(k, probabilities.shape[-1]))
    return torch.zeros_like(probabilities).scatter_(-1, tokens, values)


def nucleus(probabilities: torch.Tensor, p: float) -> torch.Tensor:
    """(N, V) with the smallest set of tokens of each row that holds p of it."""
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
    """flash_attn_with_kvcache: new keys and values go into their pages; all queries see all tokens."""
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
