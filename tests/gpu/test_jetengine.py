"""The real JetEngine, 0.2.0 or 0.1.0, on a GPU. `python -m pytest tests/gpu -s` where it is installed."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
import torch

from sdar_lm_eval import Checkpoint, DecodingConfig, EngineError, GenerationRequest, UserError, make_engine
from sdar_lm_eval.demo import golds, prompts
from sdar_lm_eval.tasks.extraction import flexible_extract

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")

GREEDY = DecodingConfig(temperature=0, remasking_strategy="low_confidence_static")


@pytest.fixture(scope="module")
def demo():
    return Checkpoint.open("demo")


@pytest.fixture(scope="module")
def jetengine(demo):
    """One engine for the module, with room for all of its requests, so that the weights are loaded once."""
    try:
        engine = make_engine("jetengine", demo)
    except EngineError as error:
        pytest.skip(str(error))
    engine.prepare([GenerationRequest((1,) * 1500, 500, GREEDY)] * 256)
    print("\n", engine.info)
    return engine


@pytest.fixture(scope="module")
def native(demo):
    return make_engine("native", demo)


@pytest.fixture(scope="module")
def questions(demo):
    return prompts(demo)


def ask(demo, questions, decoding=GREEDY, count=200, **settings):
    settings = {"max_new_tokens": 128, "stop_ids": frozenset(demo.stop_ids), **settings}
    return [
        GenerationRequest(prompt, decoding=decoding, seed=i, **settings) for i, prompt in enumerate(questions[:count])
    ]


def run(engine, requests):
    results = dict(engine.generate(requests))
    assert sorted(results) == list(range(len(requests)))
    return [results[i] for i in range(len(requests))]


def extracted(demo, results):
    return [flexible_extract(demo.decode(result.token_ids)) for result in results]


def accuracy(answers):
    share = sum(a == g for a, g in zip(answers, golds(), strict=True)) / len(answers)
    return f"{100 * share:.1f} ± {100 * (share * (1 - share) / (len(answers) - 1)) ** 0.5:.1f}"


@pytest.mark.parametrize("strategy", ["low_confidence_static", "sequential", "low_confidence_dynamic"])
def test_answers_are_the_native_engines(demo, jetengine, native, questions, strategy):
    requests = ask(demo, questions, dataclasses.replace(GREEDY, remasking_strategy=strategy))
    theirs, ours = (extracted(demo, run(engine, requests)) for engine in (jetengine, native))
    differing = {i: (a, b) for i, (a, b) in enumerate(zip(theirs, ours, strict=True)) if a != b}
    print(f"\n{strategy}: JetEngine {accuracy(theirs)}, native {accuracy(ours)}; {len(differing)} differ: {differing}")
    same_rules = strategy not in jetengine.info["deviations"]
    assert len(differing) <= (4 if same_rules else 30)


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
    count = 4096 if jetengine.info["cuda_graphs"] else 1024  # 0.1.0 draws row by row
    settings = DecodingConfig(**decoding, remasking_strategy="sequential")
    results = run(jetengine, [GenerationRequest(prompt, 1, settings, seed=i) for i in range(count)])
    drawn = torch.zeros(demo.config["vocab_size"])
    for token, times in Counter(result.token_ids[0] for result in results if result.token_ids).items():
        drawn[token] = times / count
    model = demo.load_model(dtype=torch.bfloat16, device="cuda", attention="sdpa")
    ids = torch.tensor([*prompt, *[demo.mask_token_id] * 4], device="cuda")
    block = torch.arange(len(ids), device="cuda") // 4
    mask = torch.zeros(len(ids), len(ids), device="cuda", dtype=torch.bfloat16)
    mask.masked_fill_(block[:, None] < block, -torch.inf)
    logits = model(ids[None], attention_mask=mask[None, None]).logits[0, len(prompt)].float().cpu()
    logits = logits / settings.temperature
    if settings.top_k:
        logits[logits < logits.topk(settings.top_k).values[-1]] = -torch.inf
    expected = logits.softmax(-1)
    distance = float((drawn - expected).abs().sum() / 2)
    noise = float((expected * (1 - expected) / count).sqrt().sum() / 2)  # about what chance alone makes of it
    print(f"\n{decoding}: total variation {distance:.3f}, by chance {noise:.3f}; most probable {expected.max():.2f}")
    assert distance < 2 * noise + 0.02 and int((drawn > 0).sum()) > 1


def test_a_standstill_loses_nothing(demo, jetengine, questions, monkeypatch):
    """Eight pages for eight sequences that all come to need a second one."""
    requests = ask(demo, questions, count=12, max_new_tokens=300, stop_ids=frozenset())
    expected = run(jetengine, requests)
    pages, before = jetengine._llm.config.num_kvcache_blocks, jetengine.info["standstills"]
    monkeypatch.setattr(jetengine, "_active", lambda _: 8)
    jetengine._llm.config.num_kvcache_blocks = 8
    try:
        results = run(jetengine, requests)
    finally:
        jetengine._llm.config.num_kvcache_blocks = pages
    assert jetengine.info["standstills"] > before
    assert [len(result.token_ids) for result in results] == [300] * 12
    assert sum(a.token_ids[:8] == b.token_ids[:8] for a, b in zip(expected, results, strict=True)) >= 9


def test_a_standstill_with_one_sequence_is_an_error(demo, jetengine, questions, monkeypatch):
    pages = jetengine._llm.config.num_kvcache_blocks
    monkeypatch.setattr(jetengine, "_active", lambda _: 1)
    monkeypatch.setattr(jetengine, "_check_pages", lambda _: None)
    jetengine._llm.config.num_kvcache_blocks = 1
    try:
        with pytest.raises(EngineError, match="single sequence"):
            run(jetengine, ask(demo, questions, count=2, max_new_tokens=300, stop_ids=frozenset()))
    finally:
        jetengine._llm.config.num_kvcache_blocks = pages
    assert len(run(jetengine, ask(demo, questions, count=4))) == 4


def test_pad_and_stop_tokens_inside_a_prompt_stay(demo, jetengine, native, questions):
    pad = demo.tokenizer.pad_token_id
    requests = [GenerationRequest((*questions[i][:9], pad, *questions[i]), 40, GREEDY) for i in range(8)]
    theirs, ours = run(jetengine, requests), run(native, requests)
    assert sum(a.token_ids[:4] == b.token_ids[:4] for a, b in zip(theirs, ours, strict=True)) >= 6


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5])
def test_short_prompts(demo, jetengine, native, questions, length):
    request = GenerationRequest(questions[0][:length], 16, GREEDY)
    assert run(jetengine, [request])[0].token_ids[:4] == run(native, [request])[0].token_ids[:4]


def test_what_it_would_get_wrong_is_refused(demo, jetengine, questions):
    mask = demo.mask_token_id
    for request, reason in [
        (GenerationRequest((*questions[0][:8], mask), 8, GREEDY), "mask token"),
        (GenerationRequest(questions[0], 4000, GREEDY), "places in whole blocks"),
        (GenerationRequest(questions[0], 8, DecodingConfig(repetition_penalty=1.1)), "repetition_penalty"),
    ]:
        with pytest.raises(UserError, match=reason):
            run(jetengine, [request])


def test_two_block_lengths_in_one_run(demo, jetengine, questions):
    """Last in the module: the engine is made again for each."""
    requests = [
        GenerationRequest(questions[i], 24, dataclasses.replace(GREEDY, block_length=n, denoising_steps=n), frozenset())
        for i, n in enumerate([4, 8, 4, 8])
    ]
    assert [len(result.token_ids) for result in run(jetengine, requests)] == [24] * 4
