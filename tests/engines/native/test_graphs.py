from __future__ import annotations

import bisect

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sdar_lm_eval.engines.native import graphs
from sdar_lm_eval.engines.native.graphs import Graphs, cost, ladder


@given(st.integers(1, 5000), st.sampled_from([1, 4, 8, 64]), st.data())
def test_there_is_a_size_for_every_number(largest, rows, data):
    """The next larger one, or one that costs less a piece; never one with much less room."""
    sizes = ladder(largest, rows)
    assert list(sizes) == sorted(set(sizes))
    assert sizes[-1] >= largest and (len(sizes) == 1 or sizes[-2] < largest)
    wanted = data.draw(st.integers(1, largest))
    room = Graphs(print, sizes, enabled=True).room_for(wanted, rows)
    above = sizes[bisect.bisect_left(sizes, wanted)]
    assert room in sizes and room <= above
    if room < above:
        assert (1 - graphs.WAIT) * wanted <= room
        assert cost(room * rows) / min(room, wanted) < cost(above * rows) / wanted


def test_more_rows_cost_more():
    costs = [cost(rows) for rows in range(1, 10_000, 7)]
    assert costs == sorted(costs)


def test_some_wait_where_that_is_quicker(monkeypatch):
    monkeypatch.setattr(graphs, "COSTS", {4: 10, 40: 11, 80: 30, 100: 31})
    some = Graphs(print, ladder(25, 4), enabled=True)
    assert [some.room_for(wanted, 4) for wanted in (1, 2, 10, 11, 12, 13, 25)] == [1, 10, 10, 10, 20, 20, 25]


@pytest.mark.parametrize("size", [1, 7, 100])
def test_without_graphs_a_size_is_what_it_is(size):
    seen = []
    Graphs(lambda *key: seen.append(key), ladder(100), enabled=False)(size, "context")
    assert seen == [(size, "context")]
    assert Graphs(print, ladder(100), enabled=False).room_for(size, 64) == size


def test_a_graph_that_no_memory_is_left_for_is_done_without(monkeypatch):
    """What ran before its capture is not run again."""
    seen = []

    def no_memory(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(Graphs, "_capture", no_memory)
    graphs = Graphs(lambda *key: seen.append(key), ladder(100), enabled=True)
    graphs(100)
    graphs(120)
    assert seen == [(128,), (128,)]
