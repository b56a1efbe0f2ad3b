"""SDAR: Qwen3, dense or with experts (MoE), under a block-causal mask.

A token sees all tokens of its own block and of earlier blocks. The engine's attention implements this mask, so the
model is Qwen3: transformers' Qwen3 classes load SDAR's weights by SDAR's own names, and no code of a checkpoint runs.
Source: modeling_sdar.py, modeling_sdar_moe.py and configuration_sdar.py of JetLM's checkpoints.

What a file for another family needs, and what has to change in other files:

LLaDA2-MoE (`llada2_moe`)
    settings    the router's groups (`n_group`, `topk_group`), shared experts, `partial_rotary_factor`
    weights     joined `query_key_value`, experts with a router bias, shared experts, a first dense layer
    fused       none: the fused decoder rotates whole heads, and its router has no groups; transformers' modules run it
    other       a `torch.nn.Module`, if transformers has no class for the model. Block length 32 and mask token 156895
                come from the checkpoint, as SDAR's do.

Fast-dLLM v2 (`Fast_dLLM_Qwen`)
    settings    Qwen2's; `bd_size` for the block length
    weights     Qwen2's: biases of queries, keys and values, no norms of heads
    fused       needs optional `q_norm` and `k_norm` in `LayerWeights` and its kernel
    other       logits belong to the next position, so a block's first token comes from the commit forward of the block
                before: `engines/native/batch.py` would have to draw one position to the right. Blocks are decoded in
                parts of 8.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sdar_lm_eval.families.base import (
    Config,
    DecoderWeights,
    DenseMLP,
    Experts,
    Family,
    LayerWeights,
    Shapes,
    transformers_version,
)

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel
    from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

SETTINGS = (
    "attention_bias", "decoder_sparse_step", "head_dim", "hidden_act", "hidden_size", "intermediate_size",
    "max_position_embeddings", "mlp_only_layers", "moe_intermediate_size", "norm_topk_prob", "num_attention_heads",
    "num_experts", "num_experts_per_tok", "num_hidden_layers", "num_key_value_heads", "rms_norm_eps",
    "tie_word_embeddings", "vocab_size",
)  # fmt: skip
# Defaults of SDARConfig.
DEFAULTS = {"vocab_size": 151936, "max_position_embeddings": 32768}
WEIGHTS_OF_A_LAYER = 11


def dense_weights(config: PretrainedConfig) -> Shapes:
    """Name and shape of every weight of the dense model."""
    return _weights(config, range(0))


def moe_weights(config: PretrainedConfig) -> Shapes:
    """Name and shape of every weight of the MoE model."""
    without, step = config.mlp_only_layers, config.decoder_sparse_step
    return _weights(config, [i for i in range(config.num_hidden_layers) if i not in without and (i + 1) % step == 0])


def _weights(config: PretrainedConfig, layers_with_experts: range | list[int]) -> Shapes:
    d, size, vocabulary = config.hidden_size, config.head_dim, config.vocab_size
    heads, kv_heads = config.num_attention_heads * size, config.num_key_value_heads * size
    projections = {"q_proj": (heads, d), "k_proj": (kv_heads, d), "v_proj": (kv_heads, d), "o_proj": (d, heads)}

    shapes: Shapes = {"model.embed_tokens.weight": (vocabulary, d), "model.norm.weight": (d,)}
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (vocabulary, d)
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.{norm}_layernorm.weight": (d,) for norm in ("input", "post_attention")}
        shapes |= {f"{layer}.self_attn.{norm}_norm.weight": (size,) for norm in "qk"}
        shapes |= {f"{layer}.self_attn.{name}.weight": shape for name, shape in projections.items()}
        if config.attention_bias:
            shapes |= {f"{layer}.self_attn.{name}.bias": shape[:1] for name, shape in projections.items()}
        mlps = {f"{layer}.mlp": config.intermediate_size}
        if i in layers_with_experts:
            shapes[f"{layer}.mlp.gate.weight"] = (config.num_experts, d)
            mlps = {f"{layer}.mlp.experts.{e}": config.moe_intermediate_size for e in range(config.num_experts)}
        for mlp, width in mlps.items():
            shapes |= {f"{mlp}.{name}_proj.weight": (width, d) for name in ("gate", "up")}
            shapes[f"{mlp}.down_proj.weight"] = (d, width)
    return shapes


def count_dense(config: Config) -> int:
    """About the number of weights that a dense model's config.json asks for."""
    return WEIGHTS_OF_A_LAYER * _whole(config, "num_hidden_layers")


def count_moe(config: Config) -> int:
    """About the number of weights that an MoE model's config.json asks for."""
    layers, step = _whole(config, "num_hidden_layers"), _whole(config, "decoder_sparse_step") or 1
    dense = config.get("mlp_only_layers")
    without = dense if isinstance(dense, list) else []
    with_experts = sum((i + 1) % step == 0 and i not in without for i in range(layers))
    return count_dense(config) + 3 * _whole(config, "num_experts") * with_experts


def _whole(config: Config, key: str) -> int:
    value = config.get(key)
    return value if isinstance(value, int) else 0


def fused(model: PreTrainedModel) -> DecoderWeights | None:
    """Weights of transformers' Qwen3ForCausalLM or Qwen3MoeForCausalLM for the fused decoder.

    Returns:
        None if the activation is not SiLU, or if an expert's size is not a multiple of 16.
    """
    import torch

    config, decoder = model.config, model.model
    has_experts = any(hasattr(layer.mlp, "experts") for layer in decoder.layers)
    if config.hidden_act != "silu" or (has_experts and (config.hidden_size | config.moe_intermediate_size) % 16):
        return None
    like = torch.zeros(1, device=model.device)  # rotary_emb's result has its device and dtype

    def rotary(positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = decoder.rotary_emb(like, positions)
        return cos, sin

    return DecoderWeights(
        embedding=decoder.embed_tokens.weight,
        layers=[_layer(layer, config) for layer in decoder.layers],
        norm=decoder.norm.weight,
        head=model.lm_head.weight,
        rotary=rotary,
        head_dim=config.head_dim,
        eps=config.rms_norm_eps,
    )


def _layer(layer: Qwen3DecoderLayer, config: PretrainedConfig) -> LayerWeights:
    attention = layer.self_attn
    qkv = (attention.q_proj, attention.k_proj, attention.v_proj)
    return LayerWeights(
        input_norm=layer.input_layernorm.weight,
        qkv=_joined("weight", *qkv),
        qkv_bias=None if attention.q_proj.bias is None else _joined("bias", *qkv),
        q_norm=attention.q_norm.weight,
        k_norm=attention.k_norm.weight,
        o=attention.o_proj.weight,
        o_bias=attention.o_proj.bias,
        post_norm=layer.post_attention_layernorm.weight,
        mlp=_experts(layer.mlp, config) if hasattr(layer.mlp, "experts") else _mlp(layer.mlp),
    )


def _mlp(mlp: Any) -> DenseMLP:
    return DenseMLP(gate_up=_joined("weight", mlp.gate_proj, mlp.up_proj), down=mlp.down_proj.weight)


def _experts(block: Any, config: PretrainedConfig) -> Experts:
    """Weights of a Qwen3MoeSparseMoeBlock. transformers before 5.0 has a module for each expert."""
    import torch

    experts = block.experts
    if hasattr(experts, "gate_up_proj"):
        gate_up, down = experts.gate_up_proj, experts.down_proj
    else:
        gate_up = torch.stack([_joined("weight", expert.gate_proj, expert.up_proj) for expert in experts])
        down = torch.stack([expert.down_proj.weight.data for expert in experts])
        for expert, own_gate_up, own_down in zip(experts, gate_up, down, strict=True):
            expert.gate_proj.weight.data, expert.up_proj.weight.data = own_gate_up.chunk(2)
            expert.down_proj.weight.data = own_down
    return Experts(block.gate.weight, gate_up, down, config.num_experts_per_tok, config.norm_topk_prob)


def _joined(name: str, *projections: torch.nn.Linear) -> torch.Tensor:
    """Join a parameter of several projections. The projections' own parameters become views of the joined tensor."""
    import torch

    joined = torch.cat([getattr(projection, name).data for projection in projections])
    sizes = [len(getattr(projection, name)) for projection in projections]
    for projection, part in zip(projections, torch.split(joined, sizes), strict=True):
        getattr(projection, name).data = part
    return joined


def hand_keywords_to_attention(model: PreTrainedModel) -> None:
    """Pass keyword arguments on to attention: the MoE layers of transformers before 4.53 drop them."""
    if transformers_version() >= (4, 53):
        return
    given: dict[str, object] = {}
    model.model.register_forward_pre_hook(lambda _, args, keywords: given.update(keywords), with_kwargs=True)
    model.model.register_forward_hook(lambda *_: given.clear())
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(lambda _, args, keywords: (args, given | keywords), with_kwargs=True)


FAMILIES = (
    Family(
        "sdar", "Qwen3Config", "Qwen3ForCausalLM", SETTINGS, DEFAULTS, is_moe=False, weights=dense_weights,
        count=count_dense, fused=fused,
    ),
    Family(
        "sdar_moe", "Qwen3MoeConfig", "Qwen3MoeForCausalLM", SETTINGS, DEFAULTS, is_moe=True, weights=moe_weights,
        count=count_moe, fused=fused, prepare=hand_keywords_to_attention,
    ),
)  # fmt: skip
