from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest
from asking import GREEDY, run

from sdar_lm_eval import GenerationRequest, make_engine


@pytest.fixture(autouse=True)
def _nothing_frozen(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a program; tests/conftest.py freezes the modules of the tests, and counts no objects."""
    monkeypatch.setattr(gc, "get_freeze_count", gc.get_freeze_count.__wrapped__)
    gc.unfreeze()
    yield
    gc.collect()
    gc.freeze()


def test_a_closed_engine_keeps_neither_model_nor_cache(tiny):
    engine = make_engine("native", tiny, device="cpu")
    run(engine, [GenerationRequest((1, 2, 3), 8, GREEDY)])
    held = [weakref.ref(thing) for thing in (engine.model, engine.runner, engine.runner.cache, engine.runner.batch)]
    engine.close()
    assert [ref() for ref in held] == [None] * 4


def test_an_engine_that_nobody_closed_is_freed_too(tiny):
    """During a run the collector visits no older object; after it, it has to visit them all again."""
    engine = make_engine("native", tiny, device="cpu")
    results = engine.generate([GenerationRequest((1, 2, 3), 8, GREEDY)])
    assert gc.get_freeze_count() == 0
    next(results)
    assert gc.get_freeze_count() > 0
    results.close()
    assert gc.get_freeze_count() == 0
    held = [weakref.ref(thing) for thing in (engine.runner, engine.runner.cache, engine.runner.batch)]
    del engine, results
    gc.collect()
    assert [ref() for ref in held] == [None] * 3


def test_a_run_within_a_run_leaves_nothing_frozen(tiny):
    engines = [make_engine("native", tiny, device="cpu") for _ in range(2)]
    outer, inner = (engine.generate([GenerationRequest((1, 2, 3), 8, GREEDY)] * 2) for engine in engines)
    next(outer)
    assert len(list(inner)) == 2 and len(list(outer)) == 1
    assert gc.get_freeze_count() == 0


def test_what_a_program_froze_stays_frozen(tiny):
    engine = make_engine("native", tiny, device="cpu")
    gc.freeze()
    frozen = gc.get_freeze_count()
    run(engine, [GenerationRequest((1, 2, 3), 8, GREEDY)])
    assert 0.9 * frozen < gc.get_freeze_count() <= frozen  # objects whose last reference went are gone
