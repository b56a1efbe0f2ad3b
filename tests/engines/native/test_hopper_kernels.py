"""The kernel for Hopper GPUs: the distribution of tiles on any machine, and its results on a Hopper GPU."""

from __future__ import annotations

import logging
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

hopper = pytest.importorskip("sdar_lm_eval.engines.native.kernels.hopper", exc_type=ImportError)

ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
on_hopper = pytest.mark.skipif(not ON_HOPPER, reason="takes a Hopper GPU")


@given(st.integers(1, 150), st.integers(1, 40), st.integers(1, 140))
def test_every_tile_is_worked_on_once(strips, columns, programs):
    own = hopper.schedule(strips, columns, programs)
    done = Counter((first + i, column) for tiles in own for first, count, column in tiles for i in range(count))
    assert set(done.values()) == {1}
    wanted = {(strip, column) for strip in range(strips) for column in range(columns)}
    # The second strip of a pair may be empty.
    assert wanted <= set(done) <= wanted | {(strips + strips % 2 - 1, column) for column in range(columns)}
    assert all(first < strips for tiles in own for first, _, _ in tiles)  # an empty half is left out
    times = [sum(count for _, count, _ in tiles) for tiles in own]
    assert max(times) - min(times) <= 2


@pytest.mark.parametrize(
    ("rows", "turns"),
    [
        (640, 3),
        (1280, 6),
        (1344, 6.5),
        (1408, 6.5),
        (1536, 7),
    ],  # in tiles of two strips; half a turn is a tile of one strip
)
def test_the_last_turn_is_short(rows, turns):
    """SDAR-4B on an H100: tiles of the last turn are halved where that shortens the turn."""
    own = hopper.schedule(rows // hopper.STRIP, 76, 132)
    assert max(sum(count for _, count, _ in tiles) for tiles in own) == 2 * turns


def test_work_for_the_kernel(monkeypatch):
    monkeypatch.setattr(hopper, "multiprocessors", lambda: 4)
    work = hopper.work_table(3, 2, 128, torch.device("cpu"))
    assert work.tolist() == [
        [[0, 2, 0, 0], [128, 2, 0, 0], [0, 2, 128, 0], [128, 2, 128, 0]],
        [[0, 0, 0, 0]] * 4,
    ]


def test_not_on_other_devices():
    assert not hopper.run_for(torch.zeros(64, 64, dtype=torch.bfloat16))


def test_what_does_not_run_is_said(monkeypatch, caplog):
    def gated(x, weight):
        raise AttributeError("'tma' has no 'load'")

    monkeypatch.setattr(hopper, "gated", gated)
    monkeypatch.setattr(hopper, "is_hopper", lambda device: True)
    good = torch.zeros(64, 64, dtype=torch.bfloat16)
    with caplog.at_level(logging.WARNING):
        assert not hopper.run_for(good)
    assert "cuBLAS takes its place" in caplog.text and "'tma' has no 'load'" in caplog.text
    # Not tried: float32, sizes that do not fit.
    assert not hopper.run_for(good, torch.zeros(64, 64))
    assert not hopper.run_for(torch.zeros(72, 64, dtype=torch.bfloat16))
    assert not hopper.run_for(good, torch.zeros(64, 60, dtype=torch.bfloat16))
    assert len(caplog.records) == 1


@on_hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("rows", "inputs", "size"),
    [(1, 64, 128), (4, 8, 8), (65, 72, 136), (129, 320, 1000), (336, 2560, 9728), (1300, 512, 2048), (5000, 128, 384)],
)
def test_products(dtype, rows, inputs, size):
    torch.manual_seed(0)
    x = torch.randn(rows, inputs, device="cuda").to(dtype)
    weight = torch.randn(2 * size, inputs, device="cuda").to(dtype) / inputs**0.5
    plain = x.float() @ weight.float().T
    gate, up = plain.chunk(2, dim=1)
    tolerance = 1e-2 if dtype == torch.bfloat16 else 2e-3
    expected = torch.nn.functional.silu(gate) * up
    for run, wanted in [(hopper.gated, expected), (hopper.product, plain)]:
        torch.full_like(wanted, torch.nan, dtype=dtype)  # freed at once, so that the result's memory holds NaN
        torch.testing.assert_close(run(x, weight).float(), wanted, rtol=tolerance, atol=tolerance)


@on_hopper
@pytest.mark.parametrize("name", ["gated", "product"])
def test_a_row_does_not_depend_on_the_others(name):
    run = getattr(hopper, name)
    torch.manual_seed(0)
    x = torch.randn(3000, 512, device="cuda").bfloat16()
    weight = torch.randn(4096, 512, device="cuda").bfloat16() / 20
    whole = run(x, weight)
    for begin, end in [(0, 1), (0, 64), (100, 165), (7, 1300), (1000, 3000)] * 20:
        assert torch.equal(run(x[begin:end].clone(), weight), whole[begin:end])


@on_hopper
def test_in_a_graph_with_new_inputs():
    x = torch.zeros(400, 256, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(1024, 256, device="cuda").bfloat16() / 16
    hopper.gated(x, weight)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = hopper.gated(x, weight)
    for _ in range(3):
        x.normal_()
        out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(out, hopper.gated(x, weight))
