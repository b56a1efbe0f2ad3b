"""The contract of engines: the native engine, and the adapters of JetEngine (each version) and LMDeploy."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random

import asking
import pytest
from asking import GREEDY, prompts, tokens_of

from sdar_lm_eval import DecodingConfig, EngineError, GenerationRequest, UserError
from sdar_lm_eval.demo import prompts as demo_prompts
from sdar_lm_eval.engines.types import LikelihoodConfig, ScoreRequest

STRATEGIES = ("low_confidence_static", "low_confidence_dynamic", "sequential")  # those that all engines have


@pytest.fixture(scope="module")
def engine(open_engine, tiny):
    return open_engine(tiny)


@pytest.fixture(scope="module")
def demo_engine(open_engine, demo):
    return open_engine(demo)


@pytest.fixture(scope="module")
def question(demo):
    return demo_prompts(demo)[asking.SHORT]


def run(engine, requests):
    engine.prepare(requests)
    return asking.run(engine, requests)


def test_no_requests(engine):
    engine.prepare([])
    assert list(engine.generate([])) == []


@pytest.mark.parametrize("token", [-1, 10**6])
def test_a_token_that_the_checkpoint_does_not_have(engine, tiny, token):
    """The engine answers other requests afterwards."""
    good, bad = GenerationRequest((1, 2, 3), 4, GREEDY), GenerationRequest((1, token, 3), 4, GREEDY)
    last = tiny.config["vocab_size"] - 1
    for begin in (engine.prepare, lambda requests: list(engine.generate(requests))):
        with pytest.raises(UserError, match=f"has the token {token}: .* has tokens 0 to {last}"):
            begin([good, bad])
    if hasattr(engine, "score"):
        with pytest.raises(UserError, match=f"has the token {token}"):
            list(engine.score([ScoreRequest((1,), (2, token))], LikelihoodConfig()))
    assert len(run(engine, [good])[0].token_ids) == 4


def test_each_result_is_its_own_requests(engine, tiny):
    """Prompts and limits of all lengths: no answer depends on what runs beside it."""
    rng = random.Random(0)
    requests = [
        GenerationRequest(prompt, rng.randint(1, 14), GREEDY, seed=i)
        for i, prompt in enumerate(prompts(tiny, [1, 2, 3, 4, 5, 8, 11, 30, 7, 16]))
    ]
    together = tokens_of(run(engine, requests))
    assert [len(tokens) for tokens, _ in together] == [request.max_new_tokens for request in requests]
    assert together == [tokens_of(run(engine, [request]))[0] for request in requests]
    assert tokens_of(run(engine, requests[::-1])) == together[::-1]


def test_more_requests_than_run_at_once(open_engine, engine, tiny):
    requests = [GenerationRequest(p, 3 + i % 4, GREEDY) for i, p in enumerate(prompts(tiny, range(3, 12)))]
    assert tokens_of(run(open_engine(tiny, max_active=2), requests)) == tokens_of(run(engine, requests))


def test_results_come_as_they_finish(open_engine, tiny):
    engine = open_engine(tiny, max_active=2)
    requests = [GenerationRequest((1, 2, 3), new, GREEDY) for new in (40, 4, 4)]
    assert [index for index, _ in engine.generate(requests)] == [1, 2, 0]


def test_an_abandoned_run_leaves_the_engine_usable(open_engine, tiny):
    engine = open_engine(tiny, max_active=2)
    requests = [GenerationRequest((1, 2, 3, i), 4 + i, GREEDY) for i in range(4)]
    whole = tokens_of(run(engine, requests))
    next(iter(engine.generate(requests)))
    assert tokens_of(run(engine, requests)) == whole


@pytest.mark.parametrize("second", ["generate", "prepare"])
def test_a_run_inside_another_is_refused(open_engine, tiny, second):
    engine = open_engine(tiny, max_active=2)
    requests = [GenerationRequest((1, 2, 3, i), 4 + 4 * i, GREEDY) for i in range(4)]
    whole = tokens_of(run(engine, requests))
    first = engine.generate(requests)
    results = dict([next(first)])
    for _ in range(2):
        with pytest.raises(EngineError, match="is in the middle of another run"):
            list(getattr(engine, second)(requests[:2]) or ())
    results |= dict(first)
    assert tokens_of(results[i] for i in range(4)) == whole
    assert tokens_of(run(engine, requests)) == whole


@pytest.mark.slow
def test_mixed_settings_in_one_call(engine, tiny):
    settings = [
        {"remasking_strategy": strategy, "confidence_threshold": threshold, "denoising_steps": steps, **draw}
        for strategy in STRATEGIES
        for threshold, steps in [(0.1, 4), (0.9, 3)]
        for draw in [{"temperature": 0}, {"temperature": 0.7, "top_k": 1}, {"temperature": 1.0, "top_p": 0.9}]
    ]
    requests = [
        GenerationRequest(prompt, 5 + i % 7, DecodingConfig(**of_request), seed=i)
        for i, (prompt, of_request) in enumerate(zip(prompts(tiny, range(5, 23)), settings, strict=True))
    ]
    results = run(engine, requests)
    assert [len(result.token_ids) for result in results] == [request.max_new_tokens for request in requests]
    for request, result in zip(requests, results, strict=True):
        if request.decoding.greedy:
            assert result.token_ids == run(engine, [request])[0].token_ids


def test_mixed_block_lengths_in_one_call(engine, tiny):
    requests = [
        GenerationRequest(prompt, 10, dataclasses.replace(GREEDY, block_length=n, denoising_steps=n))
        for n, prompt in zip((4, 8, 1, 8, 4), prompts(tiny, (9, 10, 11, 12, 13)), strict=True)
    ]
    results = tokens_of(run(engine, requests))
    assert results == [tokens_of(run(engine, [request]))[0] for request in requests]
    assert results[1] != tokens_of(run(engine, [dataclasses.replace(requests[1], decoding=GREEDY)]))[0]


def test_seeds_repeat_and_differ(engine, tiny):
    def draw(seed):
        decoding = DecodingConfig(temperature=1.0, remasking_strategy="sequential")
        return tokens_of(run(engine, [GenerationRequest(p, 8, decoding, seed=seed) for p in prompts(tiny, (5, 6, 7))]))

    first = draw(1)
    assert draw(1) == first
    assert draw(2) != first


def test_draws_are_from_all_tokens_unless_top_k_says_otherwise(engine, tiny):
    def draw(**settings):
        decoding = DecodingConfig(remasking_strategy="sequential", block_length=1, temperature=2.0, **settings)
        return tokens_of(run(engine, [GenerationRequest((5,), 1, decoding, seed=seed) for seed in range(20)]))

    drawn = draw()
    assert len(set(drawn)) > 5
    assert draw(top_k=10**30) == drawn
    greedy = dataclasses.replace(GREEDY, block_length=1, denoising_steps=1)
    most_probable = tokens_of(run(engine, [GenerationRequest((5,), 1, greedy)]))
    assert draw(top_k=1) == most_probable * 20
    assert 1 < len(set(draw(top_k=2))) <= 2


def test_the_mask_token_is_never_in_an_answer(engine, tiny):
    decoding = DecodingConfig(temperature=9.0, remasking_strategy="low_confidence_static")
    requests = [GenerationRequest((i % 5 + 1,), 12, decoding, seed=i) for i in range(32)]
    assert all(tiny.mask_token_id not in result.token_ids for result in run(engine, requests))


def test_the_harness_learns_what_it_needs(engine, tiny):
    (result,) = run(engine, [GenerationRequest((1, 2, 3, 4, 5), 9, GREEDY)])
    assert result.prefill_forwards == 1
    assert result.denoising_forwards >= 9
    assert result.commit_forwards >= 2
    assert result.seconds > 0
    assert engine.peak_memory_bytes() > 0


FACTS = {
    "native": "engine device dtype max_active kernels preemptions shared_prompt_tokens answer_options torch "
    "transformers python",
    "jetengine": "engine engine_version engine_commit device dtype max_active tensor_parallel_size cuda_graphs steps "
    "steps_without_graph standstills mask_tokens_drawn flash_attn_splits deviations torch transformers "
    "flashinfer-python flash-attn python gpu",
    "lmdeploy": "engine engine_version engine_commit device dtype max_active tensor_parallel_size executor "
    "data_parallel_size cache_max_entry_count loads deviations torch transformers triton python gpu",
}
"""What the results file has of each engine, in this order: who reads the file relies on these names."""


def test_facts_for_the_results_file(engine):
    info, facts = engine.info, engine.info.as_dict()
    assert list(facts) == FACTS[info.engine].split()
    assert (facts["device"], facts["dtype"], facts["max_active"]) == (info.device, info.dtype, info.max_active)
    assert all(facts[key] for key in ("engine", "device", "dtype", "max_active", "torch", "transformers", "python"))
    assert json.loads(json.dumps(facts)) == facts


def test_a_closed_engine_refuses_and_gives_all_back(open_engine, tiny):
    requests = [GenerationRequest((1, 2, 3, i), 4 + 8 * i, GREEDY) for i in range(3)]
    with open_engine(tiny, max_active=2) as engine:
        whole = tokens_of(run(engine, requests))
        in_the_middle = engine.generate(requests)
        results = dict([next(in_the_middle)])
    facts = engine.info
    refused = [
        lambda: engine.prepare(requests),
        lambda: next(engine.generate(requests)),
        lambda: next(engine.generate([])),
    ]
    if hasattr(engine, "score"):
        refused.append(lambda: next(engine.score([ScoreRequest((1,), (2,))], LikelihoodConfig())))
    for again in refused:
        with pytest.raises(EngineError, match=r"engine is closed\. Open another one"):
            again()
    results |= dict(in_the_middle)  # a run that had begun goes on
    assert tokens_of(results[i] for i in range(3)) == whole
    engine.close()
    assert engine.info.as_dict().keys() == facts.as_dict().keys()
    assert engine.peak_memory_bytes() > 0


@pytest.mark.parametrize("max_active", [0, -1, "many"])
def test_no_sequences_at_once(open_engine, tiny, max_active):
    with pytest.raises(UserError, match=f"max_active={max_active!r} is "):
        open_engine(tiny, max_active=max_active)


class TestEnds:
    """An answer ends at the first of: stop token, stop string, length."""

    def request(self, demo, question, **changes):
        settings = {"max_new_tokens": 40, "stop_ids": frozenset(demo.stop_ids)} | changes
        return GenerationRequest(question, decoding=GREEDY, **settings)

    @pytest.fixture(scope="class")
    def whole(self, demo, demo_engine, question):
        (result,) = run(demo_engine, [self.request(demo, question, max_new_tokens=100)])
        return result

    def test_a_stop_token_is_not_part_of_the_answer(self, demo, question, whole):
        assert whole.finish_reason == "stop"
        assert not set(whole.token_ids) & set(demo.stop_ids)
        assert "####" in demo.decode(whole.token_ids)
        assert set(demo.stop_ids) & set(question)  # those of the prompt do not stop

    def test_the_length_is_exact(self, demo, demo_engine, question, whole):
        limits = [1, 2, 3, 4, 5, 9]
        results = run(demo_engine, [self.request(demo, question, max_new_tokens=limit) for limit in limits])
        assert tokens_of(results) == [(whole.token_ids[:limit], "length") for limit in limits]

    def test_any_stop_token_at_any_place_of_a_block(self, demo, demo_engine, question, whole):
        stops = [whole.token_ids[place] for place in (0, 1, 5, 6, 7, 8)]
        results = run(demo_engine, [self.request(demo, question, stop_ids=frozenset({stop})) for stop in stops])
        firsts = [whole.token_ids.index(stop) for stop in stops]
        assert tokens_of(results) == [(whole.token_ids[:first], "stop") for first in firsts]

    def test_stop_strings_across_tokens_and_blocks(self, demo, demo_engine, question, whole):
        text = demo.decode(whole.token_ids[:40])
        starts = range(0, len(text) - 15, 23)
        stops = [text[start : start + length] for start, length in zip(starts, itertools.cycle((1, 3, 15)))]
        results = run(demo_engine, [self.request(demo, question, stop_strings=("never", stop)) for stop in stops])
        for stop, result in zip(stops, results, strict=True):
            got = demo.decode(result.token_ids)
            assert text.startswith(got)
            assert stop in got
            assert stop not in demo.decode(result.token_ids[:-1])  # not a token more than it takes
            assert result.finish_reason == "stop"

    def test_a_string_that_ends_with_the_length_is_a_stop(self, demo, demo_engine, question, whole):
        stop = demo.decode(whole.token_ids[:5])
        (result,) = run(demo_engine, [self.request(demo, question, max_new_tokens=5, stop_strings=(stop,))])
        assert tokens_of([result]) == [(whole.token_ids[:5], "stop")]
