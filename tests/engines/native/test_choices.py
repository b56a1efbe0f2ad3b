"""The choice among kernels of a product by measured times."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")

from sdar_lm_eval.engines.native.forward import choices
from sdar_lm_eval.engines.native.forward.choices import ANY, MEASURED, MOST_TIME, Choice, Kernel, fastest, of_model
from sdar_lm_eval.engines.native.kernels import experts
from sdar_lm_eval.families.base import DecoderWeights, DenseMLP, Experts, LayerWeights


def kernel(name, most=ANY):
    return Kernel(name, lambda: name, most)


def chosen(choice, rows):
    return choice(rows)()


def test_the_choice_without_times():
    choice = Choice({16: kernel("few", 16), 335: kernel("middle"), ANY: kernel("many")}, [kernel("other")])
    assert [chosen(choice, rows) for rows in (1, 16, 17, 335, 336, 1 << 20)] == [
        "few", "few", "middle", "middle", "many", "many",
    ]  # fmt: skip
    assert [each.name for each in choice.used] == ["few", "middle", "many"]
    assert set(choice.kernels) == {"few", "middle", "many", "other"}


def test_only_numbers_of_rows_that_several_kernels_take_are_measured():
    few, other, many = kernel("few", 16), kernel("other", 16), kernel("many")
    assert Choice({16: few, ANY: many}, [other]).measured == {
        "few": (4, 8, 16), "other": (4, 8, 16), "many": (4, 8, 16, 32),
    }  # fmt: skip
    assert Choice({16: few, ANY: many}, [kernel("all")]).measured["all"] == MEASURED
    assert Choice({ANY: many}).measured == {}


def test_measured_times_decide():
    choice = Choice({16: kernel("few", 16), ANY: kernel("many")}, [kernel("other", 16)])
    choice.choose({"few": {4: 3, 8: 3, 16: 3}, "other": {4: 2, 8: 2, 16: 9}, "many": {4: 5, 8: 5, 16: 2, 32: 5}})
    assert [chosen(choice, rows) for rows in (1, 4, 5, 8, 9, 16, 17, 1 << 20)] == ["other"] * 4 + ["many"] * 4
    assert [each.name for each in choice.used] == ["other", "many"]


@given(st.data(), st.integers(1, 4))
def test_the_chosen_kernel_is_nearly_the_fastest(data, count):
    seconds = st.floats(1, 2)
    times = {f"kernel {i}": {rows: data.draw(seconds) for rows in MEASURED[i:]} for i in range(count)}
    choice = Choice({ANY: kernel("kernel 0")}, [kernel(name) for name in times])
    choice.choose(times)
    for before, rows in zip((0, *MEASURED), MEASURED, strict=False):
        own = {name: known[rows] for name, known in times.items() if rows in known}
        assert own[chosen(choice, rows)] <= MOST_TIME * min(own.values())
        assert chosen(choice, before + 1) == chosen(choice, rows)
    assert chosen(choice, ANY) == chosen(choice, MEASURED[-1])


def test_a_kernel_stays_while_it_is_nearly_the_fastest():
    """Every further kernel has to be compiled."""
    assert fastest({"a": {1: 1.0, 2: 1.009, 3: 1.02}, "b": {1: 1.1, 2: 1.0, 3: 1.0}}) == {1: "a", 2: "a", 3: "b"}
    assert fastest({"default": {1: 1.009, 2: 1.02}, "b": {1: 1.0, 2: 1.0}}) == {1: "default", 2: "b"}


def weights(mlp, dtype=torch.bfloat16, bias=None):
    def zeros(*shape):
        return torch.zeros(shape, dtype=dtype)

    layer = LayerWeights(
        zeros(64), zeros(192, 64), bias, zeros(64), zeros(64), zeros(64, 64), None, zeros(64), mlp
    )  # fmt: skip
    return DecoderWeights(zeros(9, 64), [layer], zeros(64), zeros(9, 64), lambda positions: None, 64, 1e-6)


def test_the_kernels_of_a_dense_layer(monkeypatch):
    monkeypatch.setattr(choices, "LARGE", 64 * 192)
    mlp = DenseMLP(torch.zeros(192, 64), torch.zeros(64, 96))
    found = of_model(weights(mlp), batch_invariant=False, tiles_are_fixed=False)
    names = {name: list(choice.kernels) for name, choice in found.items()}
    assert names == {
        "qkv": ["few_rows in 1", "cuBLAS"],
        "o": ["cuBLAS", "few_rows in 4", "few_rows in 1", "few_rows in 2"],  # 64 inputs have no 8 splits of 16
        "head": ["cuBLAS"],
        "gate_up": ["few_rows", "cuBLAS"],
        "down": ["cuBLAS", "few_rows in 1", "few_rows in 2"],
    }
    biased = of_model(weights(mlp, bias=torch.zeros(192)), batch_invariant=False, tiles_are_fixed=False)
    assert list(biased["qkv"].kernels) == ["cuBLAS"]


@pytest.mark.parametrize(
    ("dtype", "fixed", "tiles"),
    [
        (torch.bfloat16, False, experts.TILES),
        (torch.bfloat16, True, [experts.FIXED_TILES]),
        (torch.float32, False, [experts.FLOAT32_TILES]),
        (torch.float32, True, [experts.FLOAT32_TILES]),
    ],
)
def test_the_tiles_of_experts(dtype, fixed, tiles):
    mlp = Experts(*(torch.zeros(4, 8, dtype=dtype) for _ in range(3)), 2, normalized=True)
    choice = of_model(weights(mlp, dtype), batch_invariant=False, tiles_are_fixed=fixed)["experts"]
    assert [each.run.keywords["tiles"] for each in choice.used] == list(tiles)
    if len(tiles) > 1:  # 8 rows of each of 4 experts are 16 tokens
        assert [choice(rows).keywords["tiles"].rows for rows in (16, 17, 48, 49, 112, 113)] == [16, 32, 32, 64, 64, 128]


def test_on_hopper_gpus_the_gated_product_has_a_third_kernel(monkeypatch):
    monkeypatch.setattr(choices, "runs_on_hopper", lambda *weights: True)
    monkeypatch.setattr(choices, "hopper", types_of_hopper())
    mlp = DenseMLP(torch.zeros(192, 64), torch.zeros(64, 96))
    gated = of_model(weights(mlp), batch_invariant=False, tiles_are_fixed=False)["gate_up"]
    assert gated(336)(None, None) == "gated" and gated(335) is gated.kernels["cuBLAS"].run
    assert choices.can_be_batch_invariant(weights(mlp))
    fixed = of_model(weights(mlp), batch_invariant=True, tiles_are_fixed=True)
    assert {name: [choice(rows)(None, None) for rows in (1, 4096)] for name, choice in fixed.items()} == {
        name: 2 * ["gated" if name == "gate_up" else "product"] for name in fixed
    }
    assert not choices.can_be_batch_invariant(weights(mlp, bias=torch.zeros(192)))


def types_of_hopper():
    class Hopper:
        product = staticmethod(lambda x, weight: "product")
        gated = staticmethod(lambda x, weight: "gated")

    return Hopper
