from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sdar_lm_eval.engines.native.graphs import COSTS, Graphs, ladder


@given(st.integers(1, 5000), st.sampled_from([1, 4, 8, 64]))
def test_a_ladder_ends_where_it_has_to(largest, rows):
    sizes = ladder(largest, rows)
    assert list(sizes) == sorted(set(sizes))
    assert sizes[-1] >= largest and (len(sizes) == 1 or sizes[-2] < largest)


@given(st.integers(1, 5000))
def test_padding_costs_little(rows):
    """A quarter more at most than the next smaller size."""
    known = list(COSTS)
    padded = ladder(rows)[-1]
    assert padded <= max(64, 2 * rows)
    below = max((rung for rung in known if rung <= rows), default=known[0])
    if padded in COSTS:
        assert COSTS[padded] <= 1.25 * COSTS[below]


def test_more_rows_cost_more():
    """Else a size would be there that nobody should take."""
    assert list(COSTS.items()) == sorted(COSTS.items(), key=lambda item: item[1]) == sorted(COSTS.items())


@pytest.mark.parametrize("size", [1, 7, 100])
def test_without_graphs_a_size_is_what_it_is(size):
    seen = []
    Graphs(lambda *key: seen.append(key), ladder(100), enabled=False)(size, "context")
    assert seen == [(size, "context")]


def test_a_graph_that_no_memory_is_left_for_is_done_without(monkeypatch, caplog):
    """What ran before its capture is not run again."""
    seen = []

    def no_memory(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(Graphs, "_capture", no_memory)
    graphs = Graphs(lambda *key: seen.append(key), ladder(100), enabled=True)
    graphs(100)
    graphs(120)
    assert seen == [(128,), (128,)]
    assert [record.levelname for record in caplog.records] == ["WARNING"]  # once
