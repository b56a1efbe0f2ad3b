"""The kernels of a layer's matrix products. Each machine measures which of them is the fastest for how many rows."""

from __future__ import annotations

import bisect
import functools
import math
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import linear

from sdar_lm_eval.engines.native.kernels import experts, layers
from sdar_lm_eval.engines.native.kernels.gluon import hopper
from sdar_lm_eval.families.base import DecoderWeights, DenseMLP, Experts

ANY = sys.maxsize  # rows
# Numbers of rows that kernels are measured for. More rows take the kernel of the last number.
MEASURED = (4, 8, 16, *range(32, 513, 32), *range(576, 1025, 64), 1536, 2048, 3072, 4096)
# Most time of all products with a kernel that is chosen for fewer rows, too, relative to the fastest kernel. The fewer
# kernels are chosen, the sooner all are compiled.
MOST_TIME = 1.01


@dataclass(frozen=True)
class Kernel:
    """A kernel.

    Attributes:
        name: the kernel's name among those of the same product.
        run: runs the kernel.
        most: most rows that the kernel takes.
    """

    name: str
    run: Callable[..., torch.Tensor]
    most: int = ANY


class Choice:
    """The kernel of a product for each number of rows.

    Args:
        unmeasured: most rows -> the kernel that is chosen until times are known, ascending. The last takes ANY rows.
        others: kernels that are chosen only if they are measured to be the fastest.

    Attributes:
        kernels: name -> kernel, of all kernels to choose from.
        times: the times that decided: name of a kernel -> number of rows -> seconds.
    """

    def __init__(self, unmeasured: Mapping[int, Kernel], others: Sequence[Kernel] = ()) -> None:
        self.kernels = {kernel.name: kernel for kernel in (*unmeasured.values(), *others)}
        self.times: Mapping[str, Mapping[int, float]] = {}
        self._set(unmeasured)

    def _set(self, chosen: Mapping[int, Kernel]) -> None:
        self._most, self._chosen = tuple(chosen), tuple(chosen.values())

    def __call__(self, rows: int) -> Callable[..., torch.Tensor]:
        """The function that computes so many rows."""
        return self.kernel(rows).run

    def kernel(self, rows: int) -> Kernel:
        """The kernel that is chosen for so many rows."""
        return self._chosen[bisect.bisect_left(self._most, rows)]

    @property
    def used(self) -> tuple[Kernel, ...]:
        """The kernels that are chosen for some number of rows."""
        return tuple(dict.fromkeys(self._chosen))

    @property
    def measured(self) -> dict[str, tuple[int, ...]]:
        """Name of each kernel -> numbers of rows whose times decide; {} where there is only one kernel."""
        if len(self.kernels) == 1:
            return {}
        *_, end = sorted(kernel.most for kernel in self.kernels.values())[:-1]  # more rows have only one kernel
        decisive = MEASURED[: bisect.bisect_right(MEASURED, end) + 1]
        return {name: tuple(rows for rows in decisive if rows <= each.most) for name, each in self.kernels.items()}

    def choose(self, times: Mapping[str, Mapping[int, float]]) -> None:
        """Choose the fastest kernels.

        Args:
            times: name of each kernel -> number of rows of `measured` -> seconds.
        """
        self.times = times
        *but_last, (_, last) = fastest(times).items()
        self._set({rows: self.kernels[name] for rows, name in (*but_last, (ANY, last))})


def fastest(times: Mapping[str, Mapping[int, float]]) -> dict[int, str]:
    """Number of rows, ascending -> name of the fastest kernel, or of the previous number's kernel if nearly as fast.

    Args:
        times: name of a kernel -> number of rows -> seconds. Before the first number, the first kernel counts as
            chosen.
    """
    found: dict[int, str] = {}
    chosen = next(iter(times))
    for rows in sorted(set().union(*times.values())):
        seconds = {name: own[rows] for name, own in times.items() if rows in own}
        best = min(seconds, key=seconds.__getitem__)
        if seconds.get(chosen, math.inf) > MOST_TIME * seconds[best]:
            chosen = best
        found[rows] = chosen
    return found


# Until times are known, the choices are what was the fastest on an H100 or H200, with SDAR-4B and SDAR-30B-A3B.

# `layers.few_rows` reads matrices of at least so many weights.
LARGE = 1 << 20
# Splits of K, by `layers.few_rows`, of products whose output is as narrow as the hidden state: without splits, programs
# are too few. The first number is the choice until times are known.
SPLITS = (4, 1, 2, 8)
# Most rows of the gated product for cuBLAS and `layers.silu_mul`, where `hopper.gated` runs, too.
MOST_ROWS_OF_CUBLAS = 335


def of_model(weights: DecoderWeights, *, batch_invariant: bool, tiles_are_fixed: bool) -> dict[str, Choice]:
    """The choices for all products of a model: name of a product -> choice.

    A kernel is a function of x and the weight; for "qkv" and "o", of the bias, too. For "experts", a kernel is a
    function of x, the router's logits, the experts, and what is 0 for padding.

    Args:
        weights: the model's weights. Layers of one kind have weights of one shape.
        batch_invariant: whether products are batch-invariant; see `can_be_batch_invariant`.
        tiles_are_fixed: whether the tiles of experts do not depend on the number of rows.
    """
    first = weights.layers[0]
    if batch_invariant:
        product, activated = Choice({ANY: Kernel("Hopper", _hopper)}), Choice({ANY: Kernel("Hopper", hopper.gated)})
        found = dict.fromkeys(("qkv", "o", "down", "router", "head"), product) | {"gate_up": activated}
    else:
        found = {
            "qkv": _plain(first.qkv, first.qkv_bias), "o": _plain(first.o, first.o_bias, SPLITS),
            "head": Choice({ANY: Kernel("cuBLAS", linear)}),
        }  # fmt: skip
        for mlp in mlps_of(weights):
            if isinstance(mlp, DenseMLP):
                found |= {"gate_up": _gated(mlp.gate_up), "down": _plain(mlp.down, splits=SPLITS)}
            else:
                found["router"] = _plain(mlp.router)
    for mlp in mlps_of(weights):
        if isinstance(mlp, Experts):
            found["experts"] = _experts(mlp, tiles_are_fixed=tiles_are_fixed)
    return found


def can_be_batch_invariant(weights: DecoderWeights) -> bool:
    """Whether `hopper` computes all products here: a row's result then does not depend on other rows."""
    first, mlps = weights.layers[0], mlps_of(weights)
    gates = [mlp.gate_up for mlp in mlps if isinstance(mlp, DenseMLP)]
    plain = [mlp.down if isinstance(mlp, DenseMLP) else mlp.router for mlp in mlps]
    unbiased = first.qkv_bias is None and first.o_bias is None
    return unbiased and all(map(runs_on_hopper, gates)) and runs_on_hopper(first.qkv, first.o, *plain, weights.head)


def mlps_of(weights: DecoderWeights) -> Collection[DenseMLP | Experts]:
    """One MLP of each kind."""
    return {type(layer.mlp): layer.mlp for layer in weights.layers}.values()


def runs_on_hopper(*weights: torch.Tensor) -> bool:
    """Whether `hopper` runs products with these weights here; see `hopper.run_for`."""
    return hopper is not None and hopper.run_for(*weights)


def _plain(weight: torch.Tensor, bias: torch.Tensor | None = None, splits: Sequence[int] = (1,)) -> Choice:
    """x @ weight.T + bias. A result can be partial sums that `layers.add_norm` adds up: as many as one of `splits`."""
    few = [
        Kernel(f"few_rows in {number}", functools.partial(_few_rows, splits=number), layers.FEW_ROWS)
        for number in splits
        if bias is None and weight.shape[1] % (16 * number) == 0
    ]
    first = {kernel.most: kernel for kernel in few[:1] if weight.numel() >= LARGE}
    return Choice({**first, ANY: Kernel("cuBLAS", linear)}, few)


def _gated(gate_up: torch.Tensor) -> Choice:
    """silu(x @ gate.T) * (x @ up.T) of joined weights."""
    few = Kernel("few_rows", functools.partial(layers.few_rows, gated=True), layers.FEW_ROWS)
    cublas = Kernel("cuBLAS", lambda x, weight: layers.silu_mul(linear(x, weight)))
    fits = gate_up.shape[1] % 16 == 0
    unmeasured = {few.most: few} if fits and gate_up.numel() >= LARGE else {}
    if runs_on_hopper(gate_up):
        unmeasured |= {MOST_ROWS_OF_CUBLAS: cublas, ANY: Kernel("Hopper", hopper.gated)}
    else:
        unmeasured[ANY] = cublas
    return Choice(unmeasured, [few] if fits else [])


def _experts(mlp: Experts, *, tiles_are_fixed: bool) -> Choice:
    def kernel(tiles: experts.TileSettings) -> Kernel:
        return Kernel(f"tiles of {tiles.rows} rows", functools.partial(experts.run, tiles=tiles))

    if mlp.router.dtype.itemsize > 2:
        return Choice({ANY: kernel(experts.FLOAT32_TILES)})
    if tiles_are_fixed:
        return Choice({ANY: kernel(experts.FIXED_TILES)})
    most = [rows * len(mlp.router) // mlp.top_k for rows in experts.ROWS_OF_TILES]
    return Choice(dict(zip((*most, ANY), map(kernel, experts.TILES), strict=True)))


def _hopper(x: torch.Tensor, weight: torch.Tensor, bias: None = None) -> torch.Tensor:
    result: torch.Tensor = hopper.product(x, weight)
    return result


def _few_rows(x: torch.Tensor, weight: torch.Tensor, bias: None = None, *, splits: int) -> torch.Tensor:
    return layers.few_rows(x, weight, splits=splits)
