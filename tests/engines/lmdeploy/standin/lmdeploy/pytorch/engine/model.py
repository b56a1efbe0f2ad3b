"""Qwen3 and Qwen3-MoE in float32 on the CPU: a sequence's tokens in, logits of its last block out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from support import block_causal, reference_logits

ARCHITECTURES = ("SDARForCausalLM", "SDARMoeForCausalLM")


class Model:
    """`config` has the attributes that LMDeploy reads, under these names."""

    def __init__(self, folder: str, config: Any) -> None:
        assert config.architectures[0] in ARCHITECTURES
        assert not hasattr(config, "auto_map")
        getattr(config, "quantization_config", {}).get("quant_method")
        assert config.pad_token_id is None or config.pad_token_id < config.vocab_size
        self.weights = {}
        for path in sorted(Path(folder).glob("*.safetensors")):
            self.weights |= {name: weight.float() for name, weight in load_file(path, device="cpu").items()}
        if hasattr(config, "rope_parameters"):
            theta = config.rope_parameters.get("rope_theta", 10000)
        else:
            theta = getattr(config, "rope_theta", 10000)
        assert config.attention_bias is False
        self.settings = {
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            **config.to_dict(),
            "model_type": "sdar_moe" if "Moe" in config.architectures[0] else "sdar",
            "head_dim": config.head_dim,
            "rope_theta": theta,
        }
        self.window = config.sliding_window

    @torch.inference_mode()
    def forward(self, ids: list[int], block_length: int) -> torch.Tensor:
        sees = block_causal(len(ids), block_length)
        if self.window:
            places = torch.arange(len(ids))
            sees &= places[:, None] - places < self.window
        return reference_logits(self.weights, self.settings, torch.tensor(ids), sees)[-block_length:]
