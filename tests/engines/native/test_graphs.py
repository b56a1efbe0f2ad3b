from __future__ import annotations

import contextlib
import gc

import pytest
import torch

from sdar_lm_eval.engines.native.forward.graphs import Graphs

SIZES = (4, 8, 16, 64, 128)


@pytest.mark.parametrize("size", [1, 7, 100])
def test_without_graphs_a_size_is_what_it_is(size):
    seen = []
    assert Graphs(lambda *key: seen.append(key), SIZES, enabled=False)(size, "context") == size
    assert seen == [(size, "context")]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError(), RuntimeError("CUDA error: out of memory")], ids=repr)
def test_a_size_runs_without_a_graph_where_memory_is_short(monkeypatch, caplog, error):
    """The function runs once, before the capture, and not again after it."""
    seen = []

    def no_memory(*_):
        raise error

    emptied = []
    monkeypatch.setattr(Graphs, "capture", no_memory)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(True))
    graphs = Graphs(lambda *key: seen.append(key), SIZES, enabled=True)
    assert [graphs(100), graphs(120)] == [128, 128]  # the size that ran
    assert seen == [(128,), (128,)]
    assert len(emptied) == 2
    assert [record.levelname for record in caplog.records] == ["WARNING"]  # once


@pytest.mark.parametrize("enabled", [True, False])
def test_nothing_is_collected_during_a_capture(monkeypatch, enabled):
    """A collection may destroy the graphs of an earlier engine, and the destruction would invalidate the capture."""
    collecting = []

    class Graph:
        def capture_begin(self, pool, capture_error_mode):
            assert capture_error_mode == "thread_local"

        def capture_end(self):
            pass

        def pool(self):
            return (0, 0)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr("sdar_lm_eval.engines.native.forward.graphs._capture_stream", lambda device: None)
    before = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        Graphs(lambda size: collecting.append(gc.isenabled()), SIZES, enabled=True)(100)
        assert collecting == [enabled, False]  # in the run, and in the capture
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if before else gc.disable)()


def test_another_error_of_a_capture_ends_the_run(monkeypatch):
    def broken(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(Graphs, "capture", broken)
    with pytest.raises(RuntimeError, match="illegal"):
        Graphs(lambda *_: None, SIZES, enabled=True)(100)
