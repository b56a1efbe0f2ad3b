"""A model family: how config.json and the weights become a model. `families/` has one file for each family."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

Shapes = dict[str, tuple[int, ...]]
"""Name of a weight -> its shape."""

Config = Mapping[str, Any]
"""The content of config.json."""


@dataclass(frozen=True)
class DenseMLP:
    """Weights of an MLP with a SiLU gate.

    Attributes:
        gate_up: (2 * width, D), the joined gate and up projections.
        down: (D, width), the down projection.
    """

    gate_up: torch.Tensor
    down: torch.Tensor


@dataclass(frozen=True)
class Experts:
    """Weights of E MLPs of which a router picks some for each token.

    Attributes:
        router: (E, D), the projection to the experts' logits.
        gate_up: (E, 2 * width, D), each expert's joined gate and up projections.
        down: (E, D, width), each expert's down projection.
        top_k: experts of a token: those with the largest softmax of logits, which weigh their outputs.
        normalized: whether the weights of a token's experts sum to 1.
    """

    router: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    top_k: int
    normalized: bool


@dataclass(frozen=True)
class LayerWeights:
    """Weights of a decoder layer, for the fused decoder. Matrices are laid out as in torch.nn.Linear.

    Attributes:
        input_norm, post_norm: (D,), the RMSNorms before attention and before the MLP.
        qkv: ((heads + 2 KV heads) * size, D), the joined projections of queries, keys and values.
        qkv_bias: ((heads + 2 KV heads) * size,), or None.
        q_norm, k_norm: (size,), the RMSNorms of each head's queries and keys.
        o: (D, heads * size), attention's output projection.
        o_bias: (D,), or None.
        mlp: the MLP, or the experts.
    """

    input_norm: torch.Tensor
    qkv: torch.Tensor
    qkv_bias: torch.Tensor | None
    q_norm: torch.Tensor
    k_norm: torch.Tensor
    o: torch.Tensor
    o_bias: torch.Tensor | None
    post_norm: torch.Tensor
    mlp: DenseMLP | Experts


@dataclass(frozen=True)
class DecoderWeights:
    """Weights of the fused decoder: RMSNorm, attention with RoPE over whole heads, MLPs or experts with a SiLU gate.

    Attributes:
        embedding, head: (V, D), the token embedding and the LM head.
        norm: (D,), the last RMSNorm.
        layers: the decoder layers.
        rotary: positions (1, T) -> cosines and sines (1, T, size), equal for both halves of a head.
        head_dim: size of a head.
        eps: epsilon of the RMSNorms.
    """

    embedding: torch.Tensor
    layers: list[LayerWeights]
    norm: torch.Tensor
    head: torch.Tensor
    rotary: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    head_dim: int
    eps: float


def transformers_version() -> tuple[int, ...]:
    """Major and minor version of the installed transformers."""
    import transformers

    return tuple(map(int, transformers.__version__.split(".")[:2]))


def no_weights(model: PreTrainedModel) -> DecoderWeights | None:
    """The `fused` of a family that transformers' modules run."""
    return None


def leave(model: PreTrainedModel) -> None:
    """The `prepare` of a family whose model runs as transformers loads it."""


@dataclass(frozen=True)
class Family:
    """A model family.

    Attributes:
        model_type: value of `model_type` in config.json.
        config_class, model_class: names of transformers' classes.
        settings: keys of config.json that the computation depends on, except those of RoPE. No other key is passed to
            transformers.
        defaults: defaults of vocab_size and max_position_embeddings, for a config.json without these keys.
        is_moe: whether layers have experts.
        weights: transformers' config -> name and shape of every weight that the files must hold.
        count: config.json -> about the number of weights that it asks for, without building anything.
        fused: the loaded model -> weights for the fused decoder, or None where transformers' modules run the model.
            The model's own weights become views of the joined weights.
        prepare: changes a loaded model so that keyword arguments reach its attention.
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
