"""The fused decoder: packed tokens, joined projections, and the kernels of `kernels/`.

The decoder computes what transformers' Qwen3Model or Qwen3MoeModel computes, from the same weights.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from sdar_lm_eval.engines.native.forward import choices
from sdar_lm_eval.engines.native.forward.cache import PagedCache
from sdar_lm_eval.engines.native.forward.choices import ANY, MEASURED, Choice
from sdar_lm_eval.engines.native.forward.timings import Timings
from sdar_lm_eval.engines.native.kernels import attention, layers
from sdar_lm_eval.engines.native.kernels.gluon import hopper_attention
from sdar_lm_eval.families.base import DecoderWeights, DenseMLP, LayerWeights

HEAD_DIMS = (64, 128)


class FusedDecoder:
    """A decoder and its LM head.

    Args:
        weights: the weights, on their device.
        cache: the KV cache, for the shape of its pages.
        batch_invariant: whether products should be batch-invariant: a row's result does not depend on other rows.

    Attributes:
        batch_invariant: whether products are batch-invariant: asked for, and possible here.
        choices: name of a product -> its choice of kernels.
    """

    def __init__(self, weights: DecoderWeights, cache: PagedCache, *, batch_invariant: bool = False) -> None:
        self._weights, self._device = weights, weights.norm.device
        self._half, self._scaling = weights.head_dim // 2, weights.head_dim**-0.5
        self._cos_sin = torch.empty(0, weights.head_dim, device=self._device)
        self.batch_invariant = batch_invariant and choices.can_be_batch_invariant(weights)
        self.choices = choices.of_model(weights, batch_invariant=self.batch_invariant, tiles_are_fixed=batch_invariant)
        first = weights.layers[0]
        heads = first.o.shape[1] // weights.head_dim
        self._heads, self._kv_heads = heads, cache.kv_heads
        self._page = first.qkv.new_zeros(1, cache.page_size, cache.kv_heads, weights.head_dim)

    @functools.cached_property
    def _attends_on_hopper(self) -> bool:
        """Whether `hopper_attention` runs here. The trial compiles the kernel, and waits for tiles that suit it."""
        return hopper_attention is not None and hopper_attention.runs(self._heads, self._page)

    def compile(self, tiles: Iterable[attention.Tiles]) -> None:
        """Compile the attention of tiles with these settings, and the kernels of experts for all chosen tiles."""
        query = self._page.new_zeros(1, self._heads, self._page.shape[-1])
        for some in tiles:
            self._attention(some, self._page)(query, self._page, self._page, some, self._scaling)
        padding = torch.zeros(1, dtype=torch.int64, device=self._device)
        for mlp in choices.mlps_of(self._weights):
            if not isinstance(mlp, DenseMLP):
                row = mlp.router.new_zeros(1, mlp.router.shape[1])
                logits = row.new_zeros(1, len(mlp.router))
                for kernel, visible in itertools.product(self.choices["experts"].used, (None, padding)):
                    kernel.run(row, logits, mlp, visible)

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
            branches: keys and values that the tokens see beside the cache. The tokens' keys and values are stored in
                the branches, not in the cache. None: the tokens see the cache only.

        Returns:
            The input of `finish`: the output of the last layer's attention, (T, heads * size), and the residual (T, D).
        """
        attend_to_pages = self._attention(tiles, cache[0, 0])

        def attend(
            layer: LayerWeights, kv: torch.Tensor, x: torch.Tensor, residual: torch.Tensor | None
        ) -> tuple[torch.Tensor, torch.Tensor]:
            keys, values = kv
            new_keys, new_values = (keys, values) if branches is None else (branches.keys, branches.values)
            normed, added = layers.add_norm(x, residual, layer.input_norm, self._weights.eps)
            query = layers.norm_rope_store(
                self._product("qkv", normed, layer.qkv, layer.qkv_bias), layer.q_norm, layer.k_norm, self._cos_sin,
                positions, kv_slots, new_keys, new_values, self._weights.eps,
            )  # fmt: skip
            if branches is None:
                attended = attend_to_pages(query, keys, values, tiles, self._scaling)
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
            x, added = self._after_attention(layer, attended, residual.clone())
            normed, _ = layers.add_norm(x, added, layer.input_norm, self._weights.eps)
            self._product("qkv", normed, layer.qkv, layer.qkv_bias)

    def choose(self, timings: Timings, rows: Callable[[int], Sequence[torch.Tensor]]) -> None:
        """Choose the fastest kernels by the times of `products`. Without memory for a measurement, nothing changes.

        Args:
            timings: the machine's times.
            rows: makes the arguments of `products` for a number of rows.
        """
        trials = {
            f"products, {name} by {kernel}": (name, kernel)
            for name, choice in self.choices.items()
            for kernel in choice.measured
        }
        rows_of = {trial: self.choices[name].measured[kernel] for trial, (name, kernel) in trials.items()}

        def make() -> Callable[[str, int], None]:
            attended, residual = rows(MEASURED[-1])

            def run(trial: str, count: int) -> None:
                name, kernel = trials[trial]
                chosen = self.choices[name]
                self.choices[name] = Choice({ANY: chosen.kernels[kernel]})
                try:
                    self.products(attended[:count], residual[:count])
                finally:
                    self.choices[name] = chosen

            return run

        times = timings("kernels of products", rows_of, make)
        for name, choice in self.choices.items():
            own = {kernel: times[trial] for trial, (of, kernel) in trials.items() if of == name and trial in times}
            if own:
                choice.choose(own)

    def _attention(self, tiles: attention.Tiles, keys: torch.Tensor) -> Callable[..., torch.Tensor]:
        """The fastest attention of these tiles, over keys of (pages, page size, KV heads, size)."""
        tried = keys.shape[1:] == self._page.shape[1:]  # the trial of the Hopper kernel has pages of this shape
        suits = hopper_attention is not None and tried and hopper_attention.suits(tiles, self._heads, self._kv_heads)
        return hopper_attention.attend if suits and self._attends_on_hopper else attention.attend

    def finish(self, attended: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """The last hidden states (T, D) of tokens, from their rows of a call's results. Overwrites `residual`."""
        x, residual = self._after_attention(self._weights.layers[-1], attended, residual)
        return layers.add_norm(x, residual, self._weights.norm, self._weights.eps)[0]

    def _after_attention(
        self, layer: LayerWeights, attended: torch.Tensor, residual: torch.Tensor, visible: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A layer's output projection and MLP; `visible` is 0 for padding."""
        x = self._product("o", attended, layer.o, layer.o_bias)
        normed, residual = layers.add_norm(x, residual, layer.post_norm, self._weights.eps)
        if isinstance(layer.mlp, DenseMLP):
            active = self._product("gate_up", normed, layer.mlp.gate_up)
            return self._product("down", active, layer.mlp.down), residual
        logits = self._product("router", normed, layer.mlp.router)
        return self._product("experts", normed, logits, layer.mlp, visible), residual

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits of last hidden states, (M, D) -> (M, V)."""
        return self._product("head", hidden, self._weights.head)

    def _product(self, name: str, x: torch.Tensor, *operands: Any) -> torch.Tensor:
        """Run a product of `choices` by the kernel for the number of rows."""
        return self.choices[name](len(x))(x, *operands)
