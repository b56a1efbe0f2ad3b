"""The kernels of experts compared with transformers' Qwen3MoeSparseMoeBlock's algebra in PyTorch."""

from __future__ import annotations

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
experts = pytest.importorskip("sdar_lm_eval.engines.native.kernels.experts", exc_type=ImportError)

from sdar_lm_eval.families.base import Experts  # noqa: E402

DTYPES = [torch.float32] if DEVICE == "cpu" else [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def layer(dtype, *, experts=6, inputs=48, width=32, top_k=2, normalized=True):
    shapes = (experts, inputs), (experts, 2 * width, inputs), (experts, inputs, width)
    weights = [(torch.randn(shape, device=DEVICE) * shape[-1] ** -0.5).to(dtype) for shape in shapes]
    return Experts(*weights, top_k, normalized)


def run(x, layer, visible=None, tiles=None):
    tiles = tiles or (experts.FLOAT32_TILES if x.dtype == torch.float32 else experts.FIXED_TILES)
    return experts.run(x, torch.nn.functional.linear(x, layer.router), layer, visible, tiles=tiles)


def reference(x, layer):
    """Outputs of each token's experts (K, T, D), float32."""
    logits = torch.nn.functional.linear(x, layer.router)
    # Of experts that are equally probable, the first ones are taken; torch.topk does not say which.
    weight, chosen = (some[:, : layer.top_k] for some in logits.float().softmax(-1).sort(descending=True, stable=True))
    if layer.normalized:
        weight = weight / weight.sum(-1, keepdim=True)
    weight = weight.to(x.dtype).float()
    gate, up = torch.einsum("td,tkfd->tkf", x.float(), layer.gate_up[chosen].float()).chunk(2, dim=-1)
    active = (torch.nn.functional.silu(gate) * up).to(x.dtype).float()
    return torch.einsum("tkf,tkdf,tk->ktd", active, layer.down[chosen].float(), weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("tokens", "shape"),
    [
        (1, {}),
        (5, {"normalized": False}),
        (40, {"top_k": 3}),
        (33, {"experts": 5, "top_k": 5}),
        (20, {"experts": 1, "top_k": 1}),
        (150, {"experts": 20, "top_k": 4, "width": 16}),
    ],
)
def test_experts(dtype, tokens, shape):
    weights = layer(dtype, **shape)
    x = torch.randn(tokens, 48, device=DEVICE).to(dtype)
    for tiles in (experts.FLOAT32_TILES,) if dtype == torch.float32 else experts.TILES:
        got = run(x, weights, tiles=tiles)
        torch.testing.assert_close(got.float(), reference(x, weights), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("rows", [1, 16, 60, 200])
def test_tiles_of_every_size(rows):
    """Tiles of each size that a GPU takes, and rows that fill them in part, just, and several times."""
    weights, x = layer(torch.float32), torch.randn(rows, 48, device=DEVICE)
    expected = reference(x, weights)
    for size in (16, 32, 64, 128):
        tiles = experts.TileSettings(size, 32, 16, 16, 4, 2)
        torch.testing.assert_close(run(x, weights, tiles=tiles), expected, rtol=2e-5, atol=2e-5)


def test_equal_logits_go_to_the_first_experts():
    weights = layer(torch.float32, top_k=3)
    weights.router.zero_()
    x = torch.randn(4, 48, device=DEVICE)
    got = run(x, weights)
    for k in range(3):
        alone = Experts(weights.router[:1], weights.gate_up[k : k + 1], weights.down[k : k + 1], 1, normalized=True)
        torch.testing.assert_close(got[k] * 3, run(x, alone)[0], rtol=2e-5, atol=2e-5)


def test_padding_runs_through_no_expert_and_nan_stays_in_its_row():
    weights, x = layer(torch.float32), torch.randn(9, 48, device=DEVICE)
    expected = run(x, weights)
    visible = torch.tensor([3, 0, 1, 0, 0, 2, 9, 1, 0], device=DEVICE)
    x[visible == 0] = torch.nan
    x[5] = torch.nan
    got = run(x, weights, visible)
    whole = (visible > 0) & (torch.arange(9, device=DEVICE) != 5)
    assert torch.equal(got[:, whole], expected[:, whole])
    assert got[:, 5].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_the_others(dtype):
    weights, x = layer(dtype, experts=8, inputs=64), torch.randn(100, 64, device=DEVICE).to(dtype)
    logits = torch.nn.functional.linear(x, weights.router)
    tiles = experts.FLOAT32_TILES if dtype == torch.float32 else experts.FIXED_TILES
    together = experts.run(x, logits, weights, tiles=tiles)
    for rows in (slice(0, 1), slice(3, 90), slice(50, 53)):
        assert torch.equal(experts.run(x[rows], logits[rows], weights, tiles=tiles), together[:, rows])
