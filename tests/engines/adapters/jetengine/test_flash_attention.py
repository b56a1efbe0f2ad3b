"""A wrong flash-attn is noticed; where only its splits are wrong, JetEngine calls it without them."""

from __future__ import annotations

import importlib
import logging

import pytest
import torch
from jetengine_standin import standin

from sdar_lm_eval import DecodingConfig, EngineError, GenerationRequest, make_engine
from sdar_lm_eval.engines.adapters.jetengine.flash_attention import ensure_right_attention

SHAPES = [(4, 2, 64, 4), (32, 8, 128, 4), (4, 4, 16, 1), (2, 1, 256, 64), (8, 2, 32, 16)]


def try_it(heads=4, kv_heads=2, size=64, block_length=4, dtype=torch.bfloat16):
    config = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": size, "hidden_size": 1}
    return ensure_right_attention(config, block_length, dtype, "cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_right_one_is_left_alone(jetengine_020, shape, dtype, caplog):
    attention = importlib.import_module("jetengine.layers.attention")
    before = attention.flash_attn_with_kvcache
    assert try_it(*shape, dtype=dtype)
    assert attention.flash_attn_with_kvcache is before
    assert not caplog.text


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_that_is_wrong_where_it_splits_is_kept_from_it(jetengine_020, shape, caplog):
    jetengine_020.faults.attention = "splits"
    with caplog.at_level(logging.WARNING):
        assert not try_it(*shape)
    assert f"wrong where it splits a context among thread blocks, for heads of {shape[2]} dimensions" in caplog.text
    # JetEngine now calls it without splits; a second try must not take that for a flash-attn that may split.
    jetengine_020.faults.attention = "splits"
    assert not try_it(*shape)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_that_is_always_wrong_is_an_error(jetengine_020, shape):
    jetengine_020.faults.attention = "always"
    with pytest.raises(
        EngineError, match=rf"wrong attention for heads of {shape[2]} dimensions in torch.bfloat16. Inst"
    ):
        try_it(*shape)


def test_the_engine_tries_it_and_says_what_it_found(jetengine_020, tiny):
    jetengine_020.faults.attention = "splits"
    engine = make_engine("jetengine", tiny)
    for block_length in (4, 8):  # JetEngine is loaded twice
        engine.prepare([GenerationRequest((1, 2), 4, DecodingConfig(block_length))])
        assert not engine.info.extra["flash_attn_splits"]
    attention = importlib.import_module("jetengine.layers.attention").flash_attn_with_kvcache
    assert attention.keywords == {"num_splits": 1}
    jetengine_020.faults.attention = "always"
    with pytest.raises(EngineError, match="wrong attention"):
        make_engine("jetengine", tiny).prepare([GenerationRequest((1, 2), 4, DecodingConfig())])


def test_the_engine_says_that_a_right_one_may_split(tiny):
    with standin("0.2.0"):
        engine = make_engine("jetengine", tiny)
        engine.prepare([GenerationRequest((1, 2), 4, DecodingConfig())])
        assert engine.info.extra["flash_attn_splits"]
