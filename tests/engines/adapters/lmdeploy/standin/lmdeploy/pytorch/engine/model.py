"""SDAR as LMDeploy reads its checkpoint, in float32 on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from support import KeysValues, block_causal, read_weights, reference_forward

ARCHITECTURES = ("SDARForCausalLM", "SDARMoeForCausalLM")


class Model:
    """SDAR, dense or with experts.

    Args:
        folder: the checkpoint's.
        config: has the attributes that LMDeploy reads, under these names.
    """

    def __init__(self, folder: str, config: Any) -> None:
        assert config.architectures[0] in ARCHITECTURES
        assert not hasattr(config, "auto_map")
        assert getattr(config, "quantization_config", {}).get("quant_method") is None
        assert config.pad_token_id is None or config.pad_token_id < config.vocab_size
        assert config.attention_bias is False
        names = ("head_dim", "num_hidden_layers", "rms_norm_eps", "tie_word_embeddings")
        if "Moe" in config.architectures[0]:
            assert config.mlp_only_layers == []
            assert config.decoder_sparse_step == 1
            assert config.norm_topk_prob
            names += ("norm_topk_prob", "num_experts", "num_experts_per_tok")
        if hasattr(config, "rope_parameters"):
            theta = config.rope_parameters.get("rope_theta", 10000)
        else:
            theta = getattr(config, "rope_theta", 10000)
        self.config = {name: getattr(config, name) for name in names} | {"rope_theta": theta}
        self.window = config.sliding_window
        self.weights = {name: weight.float() for name, weight in read_weights(Path(folder)).items()}

    @torch.inference_mode()
    def forward(self, ids: list[int], past: KeysValues | None, block_length: int) -> tuple[torch.Tensor, KeysValues]:
        """Logits (N, V) of a sequence's next tokens, and the keys and values of `past` with theirs behind them."""
        before = len(past[0][0]) if past else 0
        positions = torch.arange(before + len(ids))
        sees = block_causal(len(positions), block_length)[before:]
        if self.window:
            sees &= positions[before:, None] - positions < self.window
        return reference_forward(self.weights, self.config, torch.tensor(ids), sees, past)
