"""Qwen3's dense decoder for a GPU: packed tokens, fused projections, and the kernels of `kernels.py`.

It computes what transformers' Qwen3Model does, from the same weights: the projections of queries, keys and values, and
those of gate and up, are joined into one matrix each, and the model's own become views of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import linear

from sdar_lm_eval.engines.native import kernels

hopper_kernels: Any
try:
    from sdar_lm_eval.engines.native import hopper_kernels
except (ImportError, AttributeError):  # Triton is older than 3.6
    hopper_kernels = None

HEAD_DIMS = (64, 128)
# From so many weights on `kernels.few_rows` takes the place of cuBLAS, where there are few rows: what takes the time is
# reading the weights, and it reads faster (SDAR-4B's products of a layer on an H100: 79 us in the place of 88).
LARGE = 1 << 20
SPLITS = 4  # of the products with an output as narrow as the model's state, which make too few programs otherwise


@dataclass(frozen=True)
class Layer:
    """Weights of one layer; matrices as torch.nn.Linear has them."""

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


class FusedDecoder:
    """The decoder of transformers' Qwen3ForCausalLM; its LM head apart (`logits`).

    Args:
        model: on its device already. Its projections become views of the joined ones: no weight is there twice.
        alone: whether what becomes of a token should not depend on how many others there are, if that can be had.

    Attributes:
        alone: whether it does not: products are run by `hopper_kernels`, which takes a Hopper GPU.
    """

    def __init__(self, model: Any, *, alone: bool = False) -> None:
        config = model.config
        self._rotary, self._half, self._device = model.model.rotary_emb, config.head_dim // 2, model.device
        self._cos_sin = torch.empty(0, config.head_dim, device=model.device)
        self._embedding = model.model.embed_tokens.weight
        self._norm = model.model.norm.weight
        self._eps = config.rms_norm_eps
        self._scaling = config.head_dim**-0.5
        self._layers = [_join(layer) for layer in model.model.layers]
        self._head = model.lm_head.weight
        first = self._layers[0]
        self._on_hopper = runs_on_hopper(first.gate_up)
        plain = [first.qkv, first.o, first.down, self._head]
        self.alone = alone and self._on_hopper and first.qkv_bias is first.o_bias is None and runs_on_hopper(*plain)

    def reach(self, length: int) -> None:
        """Make ready for positions below `length`."""
        if len(self._cos_sin) < length:
            position = torch.arange(length, device=self._device)[None]
            cos, sin = self._rotary(
                torch.zeros(1, device=self._device), position
            )  # (1, length, size), both halves alike
            self._cos_sin = torch.cat([cos[0, :, : self._half], sin[0, :, : self._half]], dim=-1).contiguous()

    @staticmethod
    def fits(model: Any) -> bool:
        """Whether a model can be run by this."""
        return (
            type(model).__name__ == "Qwen3ForCausalLM"
            and model.config.head_dim in HEAD_DIMS
            and model.config.hidden_act == "silu"
        )

    def __call__(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        places: torch.Tensor,
        tiles: kernels.Tiles,
        cache: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run T packed tokens, and store their keys and values.

        Args:
            tokens, positions: (T,) int64.
            places: (T,) int64 into pages * page size, where keys and values go.
            tiles: what attends to what.
            cache: (layers, 2, pages, page size, KV heads, head size).

        Returns:
            What `finish` takes, of the last layer: what attention gives, (T, heads * size), and its input, (T, D).
        """

        def attention(
            layer: Layer, kv: torch.Tensor, x: torch.Tensor, residual: torch.Tensor | None
        ) -> tuple[torch.Tensor, torch.Tensor]:
            keys, values = kv
            normed, added = kernels.add_norm(x, residual, layer.input_norm, self._eps)
            query = kernels.norm_rope_store(
                self._product(normed, layer.qkv, layer.qkv_bias), layer.q_norm, layer.k_norm, self._cos_sin, positions,
                places, keys, values, self._eps,
            )  # fmt: skip
            return kernels.attend(query, keys, values, tiles, self._scaling).flatten(1), added

        seen, residual = attention(self._layers[0], cache[0], self._embedding[tokens], None)
        for before, layer, kv in zip(self._layers, self._layers[1:], cache[1:], strict=False):
            seen, residual = attention(layer, kv, *self._behind_attention(before, seen, residual))
        return seen, residual

    def finish(self, seen: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """The last hidden states (T, D) of the tokens whose logits are wanted; `residual` is written to."""
        x, residual = self._behind_attention(self._layers[-1], seen, residual)
        return kernels.add_norm(x, residual, self._norm, self._eps)[0]

    def _behind_attention(
        self, layer: Layer, seen: torch.Tensor, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x = self._product(seen, layer.o, layer.o_bias, splits=SPLITS)
        normed, residual = kernels.add_norm(x, residual, layer.post_norm, self._eps)
        if self.alone:
            active = hopper_kernels.gated(normed, layer.gate_up)
        else:
            active = activated(normed, layer.gate_up, on_hopper=self._on_hopper)
        return self._product(active, layer.down, splits=SPLITS), residual

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Of last hidden states, (M, D) -> (M, V)."""
        return self._product(hidden, self._head) if self.alone else linear(hidden, self._head)

    def _product(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, splits: int = 1
    ) -> torch.Tensor:
        if self.alone:
            result: torch.Tensor = hopper_kernels.product(x, weight)
            return result
        return product(x, weight, bias, splits=splits)


def runs_on_hopper(*weights: torch.Tensor) -> bool:
    """Whether `hopper_kernels` multiplies by such weights here: by gate and up, joined, or by several plain ones."""
    return hopper_kernels is not None and hopper_kernels.run_for(*weights)


def activated(x: torch.Tensor, gate_up: torch.Tensor, *, on_hopper: bool) -> torch.Tensor:
    """silu(x @ gate.T) * (x @ up.T) of joined weights, by what is quickest for so many rows."""
    if _is_streamed(x, gate_up):
        return kernels.few_rows(x, gate_up, gated=True)
    if on_hopper and len(x) >= hopper_kernels.FEWEST_ROWS:
        result: torch.Tensor = hopper_kernels.gated(x, gate_up)
        return result
    return kernels.silu_mul(linear(x, gate_up))


def product(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, splits: int = 1
) -> torch.Tensor:
    """x @ weight.T + bias, of few rows perhaps in splits, for `kernels.add_norm` to add up."""
    if bias is None and _is_streamed(x, weight, splits):
        return kernels.few_rows(x, weight, splits=splits)
    return linear(x, weight, bias)


def _is_streamed(x: torch.Tensor, weight: torch.Tensor, splits: int = 1) -> bool:
    return len(x) <= kernels.FEW_ROWS and weight.numel() >= LARGE and x.shape[1] % (16 * splits) == 0


def _join(layer: Any) -> Layer:
    attention, mlp = layer.self_attn, layer.mlp
    return Layer(
        input_norm=layer.input_layernorm.weight,
        qkv=_joined("weight", attention.q_proj, attention.k_proj, attention.v_proj),
        qkv_bias=None
        if attention.q_proj.bias is None
        else _joined("bias", attention.q_proj, attention.k_proj, attention.v_proj),
        q_norm=attention.q_norm.weight,
        k_norm=attention.k_norm.weight,
        o=attention.o_proj.weight,
        o_bias=attention.o_proj.bias,
        post_norm=layer.post_attention_layernorm.weight,
        gate_up=_joined("weight", mlp.gate_proj, mlp.up_proj),
        down=mlp.down_proj.weight,
    )


def _joined(name: str, *projections: Any) -> torch.Tensor:
    """One tensor of several projections' parameters, which become views of it."""
    joined = torch.cat([getattr(projection, name).data for projection in projections])
    sizes = [len(getattr(projection, name)) for projection in projections]
    for projection, part in zip(projections, torch.split(joined, sizes), strict=True):
        getattr(projection, name).data = part
    return joined
