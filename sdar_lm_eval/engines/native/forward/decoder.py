"""The fused decoder: packed tokens, joined projections, and the kernels of `kernels/`.

The decoder computes what transformers' Qwen3Model or Qwen3MoeModel computes, from the same weights.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch.nn.functional import linear

from sdar_lm_eval.engines.native.forward.cache import PagedCache
from sdar_lm_eval.engines.native.kernels import attention, experts, layers
from sdar_lm_eval.families.base import DecoderWeights, DenseMLP, LayerWeights

hopper: Any
hopper_attention: Any
try:
    from sdar_lm_eval.engines.native.kernels import hopper, hopper_attention
except (ImportError, AttributeError):  # Triton is older than 3.6
    hopper = hopper_attention = None

HEAD_DIMS = (64, 128)
# For few rows, reading the weights takes the time. `layers.few_rows` reads matrices of at least this many weights
# faster than cuBLAS (SDAR-4B's products of a layer on an H100: 79 us instead of 88).
LARGE = 1 << 20
# Splits of K in products whose output is as narrow as the hidden state: without splits, programs are too few.
SPLITS = 4


class FusedDecoder:
    """A decoder and its LM head.

    Args:
        weights: the weights, on their device.
        cache: the KV cache, for the shape of its pages.
        batch_invariant: whether products should be batch-invariant: a row's result does not depend on other rows.

    Attributes:
        batch_invariant: whether products are batch-invariant: asked for, and `hopper` runs them, on a Hopper GPU.
    """

    def __init__(self, weights: DecoderWeights, cache: PagedCache, *, batch_invariant: bool = False) -> None:
        self._weights, self._device = weights, weights.norm.device
        self._half, self._scaling = weights.head_dim // 2, weights.head_dim**-0.5
        self._cos_sin = torch.empty(0, weights.head_dim, device=self._device)
        self._tiles_are_fixed = batch_invariant
        first = weights.layers[0]
        mlps = {type(layer.mlp): layer.mlp for layer in weights.layers}.values()  # one of each kind
        gates = [mlp.gate_up for mlp in mlps if isinstance(mlp, DenseMLP)]
        plain = [mlp.down if isinstance(mlp, DenseMLP) else mlp.router for mlp in mlps]
        self._gates_on_hopper = bool(gates) and runs_on_hopper(*gates)
        biased = first.qkv_bias is not None or first.o_bias is not None
        on_hopper = self._gates_on_hopper == bool(gates) and runs_on_hopper(first.qkv, first.o, *plain, weights.head)
        self.batch_invariant = batch_invariant and on_hopper and not biased
        heads = first.o.shape[1] // weights.head_dim
        self._heads, self._group = heads, heads // cache.kv_heads
        self._page = first.qkv.new_zeros(1, cache.page_size, cache.kv_heads, weights.head_dim)

    @functools.cached_property
    def _attends_on_hopper(self) -> bool:
        """Whether `hopper_attention` runs here. The trial compiles the kernel, and waits for tiles that suit it."""
        return hopper_attention is not None and hopper_attention.runs(self._heads, self._page)

    def compile(self, tiles: Iterable[attention.Tiles]) -> None:
        """Compile the attention of tiles with these settings, and the kernels of experts for tiles of every size."""
        query = self._page.new_zeros(1, self._heads, self._page.shape[-1])
        for some in tiles:
            self._attention(some, self._page).attend(query, self._page, self._page, some, self._scaling)
        for mlp in {type(layer.mlp): layer.mlp for layer in self._weights.layers}.values():
            if not isinstance(mlp, DenseMLP):
                experts.compile_for(mlp, batch_invariant=self._tiles_are_fixed)

    def reserve(self, length: int) -> None:
        """Prepare rotary cosines and sines for positions below `length`."""
        if len(self._cos_sin) < length:
            cos, sin = self._weights.rotary(torch.arange(length, device=self._device)[None])  # (1, length, size)
            halves = [cos[0, :, : self._half], sin[0, :, : self._half]]
            self._cos_sin = torch.cat(halves, dim=-1).contiguous()

    def __call__(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        kv_slots: torch.Tensor,
        tiles: attention.Tiles,
        cache: torch.Tensor,
        branches: attention.Branches | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run T packed tokens, and store their keys and values.

        Args:
            tokens, positions: (T,) int64.
            kv_slots: (T,) int64, where each token's keys and values are stored: an index into pages * page size or,
                with `branches`, into `branches.keys`.
            tiles: the tiles of attention, and what their tokens see of the cache.
            cache: (layers, 2, pages, page size, KV heads, head size).
            branches: what the tokens see beside the cache. The tokens' keys and values are stored in the branches, not
                in the cache. None: the tokens see the cache only.

        Returns:
            The input of `finish`: the output of the last layer's attention, (T, heads * size), and the residual (T, D).
        """
        kernel = self._attention(tiles, cache[0, 0])

        def attend(
            layer: LayerWeights, kv: torch.Tensor, x: torch.Tensor, residual: torch.Tensor | None
        ) -> tuple[torch.Tensor, torch.Tensor]:
            keys, values = kv
            new_keys, new_values = (keys, values) if branches is None else (branches.keys, branches.values)
            normed, added = layers.add_norm(x, residual, layer.input_norm, self._weights.eps)
            query = layers.norm_rope_store(
                self._product(normed, layer.qkv, layer.qkv_bias), layer.q_norm, layer.k_norm, self._cos_sin, positions,
                kv_slots, new_keys, new_values, self._weights.eps,
            )  # fmt: skip
            if branches is None:
                attended = kernel.attend(query, keys, values, tiles, self._scaling)
            else:
                attended = attention.attend_branches(query, keys, values, tiles, branches, self._scaling)
            return attended.flatten(1), added

        # 0 marks padding. A masked copy that sees nothing of the cache is no padding: the copy sees its own branch.
        visible = tiles.visible if branches is None else branches.tiles.visible
        first, *others = self._weights.layers
        attended, residual = attend(first, cache[0], self._weights.embedding[tokens], None)
        for before, layer, kv in zip(self._weights.layers, others, cache[1:], strict=False):
            after = self._after_attention(before, attended, residual, visible)
            attended, residual = attend(layer, kv, *after)
        return attended, residual

    def products(self, attended: torch.Tensor, residual: torch.Tensor) -> None:
        """Run the first and the last layer without attention, for measurements. Takes the arguments of `finish`."""
        for layer in (self._weights.layers[0], self._weights.layers[-1]):
            self._product(residual, layer.qkv, layer.qkv_bias)
            self._after_attention(layer, attended, residual.clone())

    def _attention(self, tiles: attention.Tiles, keys: torch.Tensor) -> Any:
        """The module with the fastest attention of these tiles, over keys of (pages, page size, KV heads, size)."""
        tried = keys.shape[1:] == self._page.shape[1:]  # the trial of the Hopper kernel has pages of this shape
        suits = hopper_attention is not None and tried and hopper_attention.suits(tiles, self._group)
        return hopper_attention if suits and self._attends_on_hopper else attention

    def finish(self, attended: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """The last hidden states (T, D) of tokens, from their rows of a call's results. Overwrites `residual`."""
        x, residual = self._after_attention(self._weights.layers[-1], attended, residual)
        return layers.add_norm(x, residual, self._weights.norm, self._weights.eps)[0]

    def _after_attention(
        self, layer: LayerWeights, attended: torch.Tensor, residual: torch.Tensor, visible: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A layer's output projection and MLP; `visible` is 0 for padding."""
        x = self._product(attended, layer.o, layer.o_bias, splits=SPLITS)
        normed, residual = layers.add_norm(x, residual, layer.post_norm, self._weights.eps)
        if not isinstance(layer.mlp, DenseMLP):
            logits = self._product(normed, layer.mlp.router)
            return experts.run(normed, logits, layer.mlp, visible, batch_invariant=self._tiles_are_fixed), residual
        if self.batch_invariant:
            active = hopper.gated(normed, layer.mlp.gate_up)
        else:
            active = activated(normed, layer.mlp.gate_up, on_hopper=self._gates_on_hopper)
        return self._product(active, layer.mlp.down, splits=SPLITS), residual

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits of last hidden states, (M, D) -> (M, V)."""
        return self._product(hidden, self._weights.head) if self.batch_invariant else linear(hidden, self._weights.head)

    def _product(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, splits: int = 1
    ) -> torch.Tensor:
        if self.batch_invariant:
            result: torch.Tensor = hopper.product(x, weight)
            return result
        return product(x, weight, bias, splits=splits)


def runs_on_hopper(*weights: torch.Tensor) -> bool:
    """Whether `hopper` runs products with these weights here; see `hopper.run_for`."""
    return hopper is not None and hopper.run_for(*weights)


def activated(x: torch.Tensor, gate_up: torch.Tensor, *, on_hopper: bool) -> torch.Tensor:
    """silu(x @ gate.T) * (x @ up.T) of joined weights, by the fastest kernel for the number of rows."""
    if _is_streamed(x, gate_up):
        return layers.few_rows(x, gate_up, gated=True)
    if on_hopper and len(x) >= hopper.FEWEST_ROWS:
        result: torch.Tensor = hopper.gated(x, gate_up)
        return result
    return layers.silu_mul(linear(x, gate_up))


def product(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, splits: int = 1
) -> torch.Tensor:
    """x @ weight.T + bias; for few rows, it may be `splits` partial sums that `layers.add_norm` adds up."""
    if bias is None and _is_streamed(x, weight, splits):
        return layers.few_rows(x, weight, splits=splits)
    return linear(x, weight, bias)


def _is_streamed(x: torch.Tensor, weight: torch.Tensor, splits: int = 1) -> bool:
    return len(x) <= layers.FEW_ROWS and weight.numel() >= LARGE and x.shape[1] % (16 * splits) == 0
