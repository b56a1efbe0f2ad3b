"""Qwen3 and Qwen3-MoE in float32 on the CPU, with keys and values kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.nn.functional import linear, scaled_dot_product_attention, silu

ARCHITECTURES = ("SDARForCausalLM", "SDARMoeForCausalLM")
Kept = list[tuple[torch.Tensor, torch.Tensor]]  # of each layer, keys and values (heads, N, size)


class Model:
    """`config` has the attributes that LMDeploy reads, under these names."""

    def __init__(self, folder: str, config: Any) -> None:
        assert config.architectures[0] in ARCHITECTURES
        assert not hasattr(config, "auto_map")
        assert getattr(config, "quantization_config", {}).get("quant_method") is None
        assert config.pad_token_id is None or config.pad_token_id < config.vocab_size
        assert config.attention_bias is False
        self.weights = {}
        for path in sorted(Path(folder).glob("*.safetensors")):
            self.weights |= {name: weight.float() for name, weight in load_file(path, device="cpu").items()}
        if hasattr(config, "rope_parameters"):
            self.theta = config.rope_parameters.get("rope_theta", 10000)
        else:
            self.theta = getattr(config, "rope_theta", 10000)
        if "Moe" in config.architectures[0]:
            assert config.mlp_only_layers == []
            assert config.decoder_sparse_step == 1
            assert config.norm_topk_prob
        self.config, self.window = config, config.sliding_window
        self.head = "model.embed_tokens" if config.tie_word_embeddings else "lm_head"

    @torch.inference_mode()
    def forward(self, ids: list[int], past: Kept, block_length: int) -> tuple[torch.Tensor, Kept]:
        """Logits (N, V) of tokens behind those of `past`, and keys and values with theirs."""
        config, n, before = self.config, len(ids), past[0][0].shape[1] if past else 0
        size = config.head_dim
        places = torch.arange(before + n)
        sees = places[before:, None] // block_length >= places // block_length
        if self.window:
            sees &= places[before:, None] - places < self.window
        angles = torch.outer(places[before:].float(), self.theta ** (-torch.arange(0, size, 2) / size))
        cos, sin = angles.cos(), angles.sin()

        def norm(x: torch.Tensor, name: str) -> torch.Tensor:
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + config.rms_norm_eps)
            return x * self.weights[f"{name}.weight"]

        def apply(x: torch.Tensor, name: str) -> torch.Tensor:
            return linear(x, self.weights[f"{name}.weight"])

        def mlp(x: torch.Tensor, name: str) -> torch.Tensor:
            return apply(silu(apply(x, f"{name}.gate_proj")) * apply(x, f"{name}.up_proj"), f"{name}.down_proj")

        def rotated(x: torch.Tensor) -> torch.Tensor:
            a, b = x.chunk(2, dim=-1)
            return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

        hidden, kept = self.weights["model.embed_tokens.weight"][ids], []
        for i in range(config.num_hidden_layers):
            layer = f"model.layers.{i}"
            x = norm(hidden, f"{layer}.input_layernorm")
            q, k, v = (apply(x, f"{layer}.self_attn.{t}_proj").view(n, -1, size).transpose(0, 1) for t in "qkv")
            q, k = rotated(norm(q, f"{layer}.self_attn.q_norm")), rotated(norm(k, f"{layer}.self_attn.k_norm"))
            if past:
                k, v = (torch.cat(pair, dim=1) for pair in zip(past[i], (k, v), strict=True))
            kept.append((k, v))
            share = len(q) // len(k)
            keys, values = k.repeat_interleave(share, 0), v.repeat_interleave(share, 0)
            out = scaled_dot_product_attention(q, keys, values, attn_mask=sees)
            hidden = hidden + apply(out.transpose(0, 1).flatten(1), f"{layer}.self_attn.o_proj")
            x = norm(hidden, f"{layer}.post_attention_layernorm")
            if f"{layer}.mlp.gate.weight" not in self.weights:
                hidden = hidden + mlp(x, f"{layer}.mlp")
                continue
            weight, chosen = apply(x, f"{layer}.mlp.gate").softmax(-1).topk(config.num_experts_per_tok)
            experts = torch.stack([mlp(x, f"{layer}.mlp.experts.{e}") for e in range(config.num_experts)], dim=1)
            experts = experts.gather(1, chosen[..., None].expand(-1, -1, x.shape[-1]))
            hidden = hidden + (experts * (weight / weight.sum(-1, keepdim=True))[..., None]).sum(1)
        return apply(norm(hidden, "model.norm"), self.head), kept
