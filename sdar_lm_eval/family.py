"""What a model family is: how a checkpoint's config.json and weights become a model. `families/` has one file each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

Shapes = dict[str, tuple[int, ...]]
"""Name of a weight -> its shape."""

Config = Mapping[str, object]
"""config.json, parsed and checked."""


@dataclass(frozen=True)
class LayerWeights:
    """Weights of a dense decoder layer, for the fused decoder; matrices as torch.nn.Linear has them.

    Attributes:
        input_norm, post_norm: (D,), the RMSNorms in front of attention and MLP.
        qkv: ((heads + 2 KV heads) * size, D), the projections of queries, keys and values, joined.
        qkv_bias: of `qkv`, or None.
        q_norm, k_norm: (size,), the RMSNorms of each head's queries and keys.
        o, o_bias: (D, heads * size), attention's output projection, and its bias or None.
        gate_up: (2 * width, D), the MLP's gate and up projections, joined.
        down: (D, width).
    """

    input_norm: torch.Tensor
    qkv: torch.Tensor
    qkv_bias: torch.Tensor | None
    q_norm: torch.Tensor
    k_norm: torch.Tensor
    o: torch.Tensor
    o_bias: torch.Tensor | None
    post_norm: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor


@dataclass(frozen=True)
class DecoderWeights:
    """What the fused decoder runs: RMSNorm, attention with rotary positions over whole heads, MLP with SiLU gate.

    Attributes:
        embedding, head: (V, D).
        norm: (D,), the last RMSNorm.
        layers: the decoder layers.
        rotary: positions (1, T) -> cosines and sines (1, T, size), both halves of a head alike.
        head_dim: size of a head.
        eps: of the RMSNorms.
    """

    embedding: torch.Tensor
    layers: list[LayerWeights]
    norm: torch.Tensor
    head: torch.Tensor
    rotary: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    head_dim: int
    eps: float


def no_weights(model: PreTrainedModel) -> DecoderWeights | None:
    """Of a family without a fused decoder: transformers' modules run it."""
    return None


def leave(model: PreTrainedModel) -> None:
    """Of a family whose model runs as transformers loads it."""


@dataclass(frozen=True)
class Family:
    """A model family.

    Attributes:
        model_type: what config.json says.
        config_class, model_class: names of transformers' classes.
        settings: keys of config.json that say how the model computes, RoPE apart. No other key reaches transformers.
        defaults: key -> value where config.json is silent, of vocab_size and max_position_embeddings.
        is_moe: whether layers hold experts.
        weights: transformers' config -> name and shape of every weight that the files must hold.
        count: config.json -> about how many weights it asks for, without building anything.
        fused: the loaded model -> weights for the fused decoder, or None where transformers' modules run the model.
            Joined weights take the place of the model's own, which become views of them.
        prepare: changes a model that was just loaded, so that keyword arguments reach its attention.
    """

    model_type: str
    config_class: str
    model_class: str
    settings: tuple[str, ...]
    defaults: Mapping[str, int]
    is_moe: bool
    weights: Callable[[PretrainedConfig], Shapes]
    count: Callable[[Config], int]
    fused: Callable[[PreTrainedModel], DecoderWeights | None] = field(default=no_weights)
    prepare: Callable[[PreTrainedModel], None] = field(default=leave)
