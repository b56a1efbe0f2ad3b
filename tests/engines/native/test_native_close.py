from __future__ import annotations

import weakref

from asking import GREEDY, run

from sdar_lm_eval import GenerationRequest, make_engine


def test_a_closed_engine_keeps_neither_model_nor_cache(tiny):
    engine = make_engine("native", tiny, device="cpu")
    run(engine, [GenerationRequest((1, 2, 3), 8, GREEDY)])
    held = [weakref.ref(thing) for thing in (engine.model, engine.runner, engine.runner.cache, engine.runner.batch)]
    engine.close()
    assert [ref() for ref in held] == [None] * 4
