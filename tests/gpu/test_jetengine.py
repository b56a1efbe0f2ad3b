"""The real JetEngine, 0.2.0 or 0.1.0, on a GPU. `python -m pytest tests/gpu -s` where it is installed."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from asking import (
    GREEDY,
    ask,
    check_agreement,
    check_frequencies,
    check_mixture_of_experts,
    check_odd_tokens,
    check_refusals_of_jetengine,
    differing_answers,
    drawn_frequencies,
    first_token_logits,
    run,
)

from sdar_lm_eval import DecodingConfig, EngineError, GenerationRequest, make_engine
from sdar_lm_eval.engines.adapters.jetengine import loading

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")


@pytest.fixture(scope="module")
def jetengine(demo):
    """One engine for the module, with room for all of its requests, so that the weights are loaded once."""
    try:
        engine = make_engine("jetengine", demo)
    except EngineError as error:
        pytest.skip(str(error))
    engine.prepare([GenerationRequest((1,) * 1500, 500, GREEDY)] * 256)
    print("\n", engine.info)
    yield engine
    engine.close()


@pytest.mark.parametrize("strategy", ["low_confidence_static", "sequential", "low_confidence_dynamic"])
def test_answers_are_the_native_engines(demo, jetengine, native, rounded, questions, strategy):
    requests = ask(demo, questions, dataclasses.replace(GREEDY, remasking_strategy=strategy))
    theirs, ours = run(jetengine, requests), run(native, requests)
    differing_answers(demo, theirs, run(rounded, requests), f"{strategy}, both in bfloat16: JetEngine")
    if strategy in jetengine.info.deviations:
        assert len(differing_answers(demo, theirs, ours, f"{strategy}: JetEngine")) <= 30
    else:
        check_agreement(demo, requests, theirs, ours, f"{strategy}: JetEngine")


def test_the_end_token_ends_a_sequence_in_the_engine(demo, jetengine, questions):
    results = run(jetengine, ask(demo, questions, count=64, max_new_tokens=500))
    stopped = [result for result in results if result.finish_reason == "stop"]
    assert len(stopped) > 60
    for result in stopped:
        assert not set(result.token_ids) & set(demo.stop_ids)
        blocks = len(result.token_ids) // 4 + 2
        assert result.commit_forwards <= blocks and result.denoising_forwards <= 4 * blocks


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 5, 10])
def test_the_limit_is_exact(demo, jetengine, questions, limit):
    results = run(jetengine, ask(demo, questions, count=8, max_new_tokens=limit, stop_ids=frozenset()))
    assert [(len(result.token_ids), result.finish_reason) for result in results] == [(limit, "length")] * 8


def test_a_stop_string_ends_an_answer(demo, jetengine, questions):
    whole = run(jetengine, ask(demo, questions, count=8))
    cut = run(jetengine, ask(demo, questions, count=8, stop_strings=("####",)))
    for a, b in zip(whole, cut, strict=True):
        assert "####" in demo.decode(b.token_ids) and "####" not in demo.decode(b.token_ids[:-1])
        assert b.token_ids == a.token_ids[: len(b.token_ids)]


def test_twelve_prompts_with_twelve_settings(demo, jetengine, questions):
    settings = [
        {"remasking_strategy": strategy, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        for strategy in ("low_confidence_static", "sequential", "low_confidence_dynamic")
        for temperature, top_k, top_p in [(0, 0, 1), (1.0, 0, 1), (0.7, 5, 1), (1.2, 0, 0.9)]
    ]
    requests = [GenerationRequest(questions[i], 20 + i, DecodingConfig(**s), seed=i) for i, s in enumerate(settings)]
    results = run(jetengine, requests)
    assert [len(result.token_ids) for result in results] == [20 + i for i in range(12)]
    alone = run(jetengine, requests[:1])[0]
    assert alone.token_ids[:8] == results[0].token_ids[:8]  # greedy, and in its place


@pytest.mark.parametrize("decoding", [{"temperature": 1.0}, {"temperature": 0.7, "top_k": 5}])
def test_draws_have_the_models_frequencies(demo, jetengine, questions, decoding):
    """The first token at the first step: softmax(logits / T), from the weights by transformers."""
    prompt = next(q for q in questions if len(q) % 4 == 0)
    count = 4096 if jetengine.info.extra["cuda_graphs"] else 1024  # 0.1.0 draws row by row
    settings = DecodingConfig(**decoding, remasking_strategy="sequential")
    results = run(jetengine, [GenerationRequest(prompt, 1, settings, seed=i) for i in range(count)])
    check_frequencies(drawn_frequencies(demo, results), first_token_logits(demo, prompt), settings, count)


def test_a_standstill_loses_nothing(demo, jetengine, questions, monkeypatch):
    """Eight pages for eight sequences that all come to need a second one."""
    requests = ask(demo, questions, count=12, max_new_tokens=300, stop_ids=frozenset())
    expected = run(jetengine, requests)
    pages, before = jetengine.loaded.llm.config.num_kvcache_blocks, jetengine.info.extra["standstills"]
    monkeypatch.setattr(loading.Loaded, "at_once", lambda self, _: 8)
    jetengine.loaded.llm.config.num_kvcache_blocks = 8
    try:
        results = run(jetengine, requests)
    finally:
        jetengine.loaded.llm.config.num_kvcache_blocks = pages
    assert jetengine.info.extra["standstills"] > before
    assert [len(result.token_ids) for result in results] == [300] * 12
    assert sum(a.token_ids[:8] == b.token_ids[:8] for a, b in zip(expected, results, strict=True)) >= 9


def test_a_standstill_with_one_sequence_is_an_error(demo, jetengine, questions, monkeypatch):
    pages = jetengine.loaded.llm.config.num_kvcache_blocks
    monkeypatch.setattr(loading.Loaded, "at_once", lambda self, _: 1)
    monkeypatch.setattr(loading.Loaded, "check_room", lambda self, _: None)
    jetengine.loaded.llm.config.num_kvcache_blocks = 1
    try:
        with pytest.raises(EngineError, match="single sequence"):
            run(jetengine, ask(demo, questions, count=2, max_new_tokens=300, stop_ids=frozenset()))
    finally:
        jetengine.loaded.llm.config.num_kvcache_blocks = pages
    assert len(run(jetengine, ask(demo, questions, count=4))) == 4


def test_pad_and_stop_tokens_inside_a_prompt_stay(demo, jetengine, questions):
    check_odd_tokens(demo, jetengine, (demo.tokenizer.pad_token_id, *demo.stop_ids), questions)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5])
def test_short_prompts(demo, jetengine, native, questions, length):
    request = GenerationRequest(questions[0][:length], 16, GREEDY)
    assert run(jetengine, [request])[0].token_ids[:4] == run(native, [request])[0].token_ids[:4]


def test_what_it_would_get_wrong_is_refused(demo, jetengine, questions):
    check_refusals_of_jetengine(jetengine, demo, questions[0])


def test_two_block_lengths_in_one_run(demo, jetengine, questions):
    """Last in the module: the engine is made again for each."""
    requests = [
        GenerationRequest(questions[i], 24, dataclasses.replace(GREEDY, block_length=n, denoising_steps=n), frozenset())
        for i, n in enumerate([4, 8, 4, 8])
    ]
    assert [len(result.token_ids) for result in run(jetengine, requests)] == [24] * 4


def test_a_mixture_of_experts(demo, jetengine, tmp_path):
    if jetengine.info.engine_version != "0.1.0":
        pytest.skip("0.2.0 takes none")
    jetengine.close()
    check_mixture_of_experts(tmp_path, "jetengine")
