"""The engine compared with the oracle, token by token, in float32 on the CPU."""

from __future__ import annotations

import dataclasses
import itertools
import random

import asking
import lmdeploy_standin
import pytest
import torch
from asking import prompts, tokens_of
from oracle import STRATEGIES
from oracle import generate as oracle
from support import random_checkpoint
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from sdar_lm_eval import Checkpoint, DecodingConfig, GenerationRequest, UserError, make_engine
from sdar_lm_eval.demo import golds
from sdar_lm_eval.demo import prompts as demo_prompts
from sdar_lm_eval.engines import runs
from sdar_lm_eval.engines.native import engine as engine_module
from sdar_lm_eval.engines.native import forecast
from sdar_lm_eval.engines.native.forward.graphs import Graphs, rounded_up
from sdar_lm_eval.engines.native.scheduler import Scheduler
from sdar_lm_eval.errors import EngineError


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A checkpoint whose head size not every engine supports, and whose mask token is as likely as any other token."""
    return Checkpoint.open(str(random_checkpoint(tmp_path_factory.mktemp("tiny"))))


@pytest.fixture(scope="module")
def plain(tiny, demo):
    """The same weights in transformers' model class, for the oracle."""
    return {c.name: c.load_model(dtype=torch.float32, device="cpu", attention="sdpa") for c in (tiny, demo)}


def questions(checkpoint, count):
    return demo_prompts(checkpoint)[:count]


def run(checkpoint, requests, **options):
    return asking.run(make_engine("native", checkpoint, device="cpu", **options), requests)


def check(checkpoint, plain, requests, **options):
    """Assert that the engine returns the oracle's tokens, finish reasons, steps and confidences."""
    results = run(checkpoint, requests, **options)
    for request, result in zip(requests, results, strict=True):
        tokens, reason, unmasked_at, confidences, _ = oracle(
            plain[checkpoint.name], checkpoint.mask_token_id, request, checkpoint.decode
        )
        assert list(result.token_ids) == tokens
        assert result.finish_reason == reason
        if request.record_steps:
            assert list(result.unmasked_at) == unmasked_at
            assert list(result.confidences) == pytest.approx(confidences, rel=1e-3, abs=1e-5)
    return results


@pytest.mark.parametrize("block_length", [1, 4, 8, 16])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_greedy_with_prompts_of_lengths_modulo_the_block(tiny, plain, strategy, block_length):
    steps = {1: (1,), 4: (4, 3), 8: (8, 2), 16: (16, 5)}[block_length]
    lengths = range(block_length, 2 * block_length) if block_length > 1 else range(1, 4)
    if block_length > 4:
        lengths = lengths[:: block_length // 3]  # the oracle is slow: it runs the whole prompt in every step
    requests = [
        GenerationRequest(
            prompt,
            max_new_tokens=min(block_length, 8) + 3,
            decoding=DecodingConfig(
                block_length, steps[i % len(steps)], strategy, confidence_threshold=0.3, eb_threshold=3.0, temperature=0
            ),
            seed=i,
            record_steps=True,
        )
        for i, prompt in enumerate(prompts(tiny, lengths))
    ]
    check(tiny, plain, requests, max_active=5)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_demo_model_answers_as_the_oracle_does(demo, plain, strategy):
    requests = [
        GenerationRequest(
            prompt, 24, DecodingConfig(remasking_strategy=strategy, temperature=0), frozenset(demo.stop_ids), seed=i
        )
        for i, prompt in enumerate(questions(demo, 2))
    ]
    check(demo, plain, requests)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 5},
        {"temperature": 1.3, "top_p": 0.8},
        {"temperature": 1.0, "top_k": 20, "top_p": 0.9},
        {"temperature": 1.0, "repetition_penalty": 1.5},
        {"temperature": 0, "repetition_penalty": 2.0},
    ],
    ids=str,
)
def test_sampling_and_penalties(tiny, plain, settings):
    requests = [
        GenerationRequest(
            prompt, 10, DecodingConfig(confidence_threshold=0.2, **settings), seed=2**63 + i, record_steps=True
        )
        for i, prompt in enumerate(prompts(tiny, (5, 6, 7, 8)))
    ]
    check(tiny, plain, requests)


def mixed_requests(checkpoint, count=16):
    """Requests with random settings, which differ from request to request."""
    rng = random.Random(1)
    requests = []
    for i, prompt in enumerate(prompts(checkpoint, [rng.randint(1, 40) for _ in range(count)])):
        block = rng.choice([1, 2, 4, 8])
        decoding = DecodingConfig(
            block_length=block,
            denoising_steps=rng.randint(1, block),
            remasking_strategy=STRATEGIES[i % 5],
            confidence_threshold=rng.random(),
            eb_threshold=rng.random() * 4,
            temperature=rng.choice([0, 0.5, 1.0]),
            top_k=rng.choice([0, 3, 10]),
            top_p=rng.choice([1.0, 0.7]),
            repetition_penalty=rng.choice([1.0, 1.0, 1.2]),
        )
        stops = frozenset(rng.sample(range(checkpoint.config["vocab_size"]), 2))
        requests.append(GenerationRequest(prompt, rng.randint(1, 20), decoding, stops, seed=i))
    return requests


@pytest.fixture(scope="module")
def mixed(tiny):
    requests = mixed_requests(tiny)
    return requests, tokens_of(run(tiny, requests, max_active=1))


def test_mixed_settings_in_one_batch_equal_the_oracle(tiny, plain, mixed):
    check(tiny, plain, mixed[0][:12], max_active=12)


@pytest.mark.parametrize("max_active", [3, 16])
def test_an_answer_does_not_depend_on_the_batch(tiny, mixed, max_active):
    requests, expected = mixed
    assert tokens_of(run(tiny, requests, max_active=max_active)) == expected
    order = random.Random(2).sample(range(len(requests)), len(requests))
    shuffled = run(tiny, [requests[i] for i in order], max_active=max_active)
    assert tokens_of(shuffled) == [expected[i] for i in order]


@pytest.mark.parametrize("max_active", [1, 2])
def test_a_slot_reused_while_a_step_is_in_flight_counts_once(tiny, monkeypatch, max_active):
    """The device goes on with an answer that a stop string has ended. Steps are padded as CUDA graphs pad them."""
    settings = DecodingConfig(remasking_strategy="low_confidence_static", denoising_steps=1)  # a block a step
    whole = [GenerationRequest((1, 2, 3 + i), 24 + 5 * i, settings, seed=i) for i in range(6)]
    stops = [
        tiny.decode(result.token_ids[5:7]) for result in asking.run(make_engine("native", tiny, device="cpu"), whole)
    ]
    requests = [
        dataclasses.replace(request, stop_strings=(stop,)) for request, stop in zip(whole, stops, strict=True) if stop
    ]
    expected = tokens_of(run(tiny, requests, max_active=max_active))
    assert sum(reason == "stop" for _, reason in expected) > 3
    engine = make_engine("native", tiny, device="cpu", max_active=max_active)
    engine.steps_in_flight = 2

    def padded(self, size, *others):
        size = rounded_up(self.sizes, size)
        self.run(size, *others)
        return size

    monkeypatch.setattr(Graphs, "__call__", padded)
    assert tokens_of(asking.run(engine, requests)) == expected


def test_a_slot_that_a_stop_string_empties(tiny):
    """The device would go on with the ended answer beside the running one."""
    settings = DecodingConfig(denoising_steps=1)
    short, long = (GenerationRequest((1, 2, i), 60, settings, seed=i) for i in (3, 4))
    stop = tiny.decode(run(tiny, [short])[0].token_ids[5:7])
    requests = [dataclasses.replace(short, stop_strings=(stop,)), long]
    expected = tokens_of(run(tiny, requests, max_active=1))
    engine = make_engine("native", tiny, device="cpu")
    engine.steps_in_flight = 2
    assert tokens_of(asking.run(engine, requests)) == expected
    assert expected[0][1] == "stop"


def test_a_cache_that_is_too_small_is_freed_before_sizes_are_measured(tiny, monkeypatch):
    """On a GPU, a measurement needs memory, and the old cache may take most of it."""
    engine = make_engine("native", tiny, device="cpu")
    sizes, held = engine.runner.forward.sizes, []

    def measured(most, block):
        held.append(engine.runner.cache.num_pages)
        return sizes(most, block)

    monkeypatch.setattr(engine.runner.forward, "sizes", measured)
    for new_tokens, strategy in ((20, "random"), (200, "random"), (100, "sequential")):
        decoding = DecodingConfig(remasking_strategy=strategy)
        asking.run(engine, [GenerationRequest((1, 2, 3), new_tokens, decoding)])
    assert held[:2] == [0, 0] and held[2] > 10  # a cache that is large enough stays


def test_a_run_that_is_abandoned(tiny):
    """The next run has fewer requests, so some slots stay empty."""
    requests = [GenerationRequest((1, 2, 3 + i), 10 + 10 * i, DecodingConfig(), seed=i) for i in range(6)]
    expected = tokens_of(run(tiny, requests[:2]))
    engine = make_engine("native", tiny, device="cpu")
    engine.steps_in_flight = 2
    abandoned = engine.generate(requests)
    next(abandoned)
    abandoned.close()
    assert tokens_of(asking.run(engine, requests[:2])) == expected


@pytest.mark.parametrize(("max_active", "free_rows"), [(1, 0), (5, 0), (16, 0), (16, forecast.FREE_ROWS)])
def test_a_step_launched_ahead_of_the_host_changes_nothing(tiny, mixed, monkeypatch, max_active, free_rows):
    """Two steps in flight, as on a GPU. With FREE_ROWS = 0, some blocks do not fit and wait for the next step."""
    requests, expected = mixed
    engine = make_engine("native", tiny, device="cpu", max_active=max_active, kv_pages=40)
    engine.steps_in_flight = 2
    monkeypatch.setattr(forecast, "FREE_ROWS", free_rows)
    launch, waited = engine.runner.launch, []

    def counting(context):
        state, active = engine.runner.batch, int(engine.runner.batch.blocks.active.sum())
        launched = launch(context)
        waited.append(active - int(state.room.fits.sum()) if launched else 0)
        return launched

    monkeypatch.setattr(engine.runner, "launch", counting)
    assert tokens_of(asking.run(engine, requests)) == expected
    if max_active == 1 or not free_rows:
        assert (sum(waited) > 0) == (max_active > 1)


def test_a_block_a_step_takes_a_step_a_block(tiny, monkeypatch):
    """The schedule says one token a step, so the second step has room for all blocks only if the first one is known."""
    monkeypatch.setattr(forecast, "FREE_ROWS", 0)
    decoding = DecodingConfig(confidence_threshold=0, temperature=1)
    requests = [GenerationRequest((1, 2, 3, 4), 24, decoding, seed=seed) for seed in range(8)]
    engine = make_engine("native", tiny, device="cpu")
    engine.steps_in_flight = 2
    launch, launched = engine.runner.launch, []
    monkeypatch.setattr(engine.runner, "launch", lambda context: launched.append(launch(context)) or launched[-1])
    results = asking.run(engine, requests)
    assert all(result.denoising_forwards == 6 for result in results)
    assert sum(launched) == 6


def test_preempted_sequences_lose_nothing(tiny):
    decodings = [DecodingConfig(temperature=t, remasking_strategy=s) for t in (0, 1.0) for s in STRATEGIES]
    requests = [
        GenerationRequest(prompt, 34, decoding, seed=i, record_steps=True)
        for i, (prompt, decoding) in enumerate(zip(prompts(tiny, range(8, 18)), decodings, strict=True))
    ]
    engine = make_engine("native", tiny, device="cpu", max_active=8, kv_pages=9)
    results = dict(engine.generate(requests))
    assert engine.info.extra["preemptions"] > 0
    expected = run(tiny, requests, max_active=1)
    assert tokens_of(results[i] for i in range(len(requests))) == tokens_of(expected)
    assert [results[i].unmasked_at for i in range(len(requests))] == [r.unmasked_at for r in expected]
    assert sum(r.prefill_forwards for r in results.values()) > sum(r.prefill_forwards for r in expected)


def test_prefill_in_chunks(tiny, plain, monkeypatch):
    monkeypatch.setitem(engine_module.PREFILL_CHUNK, "cpu", 12)
    requests = [GenerationRequest(p, 6, DecodingConfig(temperature=0)) for p in prompts(tiny, (50, 3, 31, 17))]
    results = check(tiny, plain, requests)
    assert results[0].prefill_forwards > 3
    assert results[1].prefill_forwards == 0


def alike_requests(checkpoint, count=12):
    """Requests with random settings. Prompts share prefixes of one text; some have tokens of their own after it."""
    rng = random.Random(3)
    (text,) = prompts(checkpoint, (96,), seed=4)
    cuts = [15, 16, 17, 31, 32, 33, 48, 64, 80, 96]
    requests = []
    for i, end in enumerate(prompts(checkpoint, [rng.choice([0, 0, 1, 5, 20]) for _ in range(count)], seed=5)):
        prompt = list(text[: rng.choice(cuts)])
        if i % 5 == 0:  # only the last token of a page differs
            prompt[(len(prompt) - 1) // 16 * 16 - 1] = (prompt[(len(prompt) - 1) // 16 * 16 - 1] + 1) % 5
        block = rng.choice([1, 4, 4, 4, 8, 24])
        decoding = DecodingConfig(
            block_length=block,
            remasking_strategy=STRATEGIES[i % 5],
            confidence_threshold=rng.random(),
            eb_threshold=rng.random() * 4,
            temperature=rng.choice([0, 1.0]),
        )
        requests.append(GenerationRequest((*prompt, *end), rng.randint(1, 30), decoding, seed=i, record_steps=True))
    return requests


class TestSharedPrefixes:
    @pytest.fixture(scope="class")
    def alike(self, tiny):
        requests = alike_requests(tiny)
        return requests, run(tiny, requests, max_active=1, share_prefixes=False)

    @pytest.mark.parametrize(
        ("max_active", "kv_pages", "ahead", "chunk"),
        [
            (1, None, False, 1024),
            (6, 12, False, 12),
            (20, 12, True, 1024),
            (20, None, False, 12),
            (20, None, True, 1024),
        ],
    )
    def test_answers_are_the_same(self, tiny, alike, monkeypatch, max_active, kv_pages, ahead, chunk):
        """With few pages, idle nodes are evicted, and sequences with shared pages are preempted."""
        monkeypatch.setitem(engine_module.PREFILL_CHUNK, "cpu", chunk)
        requests, expected = alike
        engine = make_engine("native", tiny, device="cpu", max_active=max_active, kv_pages=kv_pages)
        engine.steps_in_flight = 1 + ahead
        results = asking.run(engine, requests)
        assert tokens_of(results) == tokens_of(expected)
        assert [r.unmasked_at for r in results] == [r.unmasked_at for r in expected]
        assert engine.info.extra["shared_prompt_tokens"] > 0
        assert (engine.info.extra["preemptions"] > 0) == (kv_pages is not None)

    def test_answers_equal_the_oracles(self, tiny, plain, alike):
        check(tiny, plain, alike[0][:10])

    @pytest.mark.parametrize("share", [True, False])
    def test_a_prefix_is_prefilled_once(self, demo, monkeypatch, share):
        common, *own = questions(demo, 7)
        common = (common * 10)[:320]
        decoding = DecodingConfig(temperature=0, remasking_strategy="low_confidence_static")
        requests = [GenerationRequest((*common, *end), 8, decoding) for end in own]
        engine = make_engine("native", demo, device="cpu", share_prefixes=share)
        prefill, prefilled = engine.runner.prefill, []
        monkeypatch.setattr(engine.runner, "prefill", lambda chunks: (prefilled.extend(chunks), prefill(chunks)))
        asking.run(engine, requests)
        whole = [len(request.prompt_ids) // 4 * 4 for request in requests]
        shared = 320 * (len(requests) - 1) if share else 0
        # The prompts' own tokens may share a page more.
        assert engine.info.extra["shared_prompt_tokens"] in range(
            shared, shared + 16 * len(requests) if share else 1, 16
        )
        assert sum(end - start for _, start, end in prefilled) == sum(whole) - engine.info.extra["shared_prompt_tokens"]

    def test_equal_prompts_of_whole_pages_go_through_the_model_once(self, tiny):
        request = GenerationRequest(prompts(tiny, (32,))[0], 8, DecodingConfig(temperature=0))
        results = run(tiny, [request] * 3)
        assert [result.prefill_forwards for result in results] == [1, 0, 0]
        assert len(set(tokens_of(results))) == 1
        assert all(result.seconds > 0 for result in results)

    def test_a_run_shares_no_pages_with_an_earlier_run(self, tiny):
        """Scoring may have freed the cache between the two runs."""
        engine = make_engine("native", tiny, device="cpu")
        requests = [GenerationRequest(prompts(tiny, (64,))[0], 8, DecodingConfig(temperature=0))]
        first = asking.run(engine, requests)
        engine.runner.release()
        assert tokens_of(asking.run(engine, requests)) == tokens_of(first)
        assert engine.info.extra["shared_prompt_tokens"] == 0

    def test_out_of_memory_while_sequences_wait_for_a_prefix(self, tiny, monkeypatch):
        """Prefill fails at first, and no sequence uses the pages that it did not write."""
        (common,) = prompts(tiny, (48,))
        requests = [GenerationRequest((*common, i), 12, DecodingConfig(temperature=0)) for i in range(6)]
        engine = make_engine("native", tiny, device="cpu")
        prefill, failures = engine.runner.prefill, [1, 1]

        def fails_twice(chunks):
            if failures:
                failures.pop()
                raise torch.OutOfMemoryError
            prefill(chunks)

        monkeypatch.setattr(engine.runner, "prefill", fails_twice)
        results = asking.run(engine, requests)
        assert tokens_of(results) == tokens_of(run(tiny, requests, share_prefixes=False))


def test_a_prompt_may_hold_the_mask_token(tiny, plain):
    (prompt,) = prompts(tiny, (10,))
    prompt = (*prompt[:5], tiny.mask_token_id, *prompt[5:], tiny.mask_token_id)
    check(tiny, plain, [GenerationRequest(prompt, 8, DecodingConfig(temperature=0))])


def test_forwards_are_counted(demo):
    decoding = DecodingConfig(remasking_strategy="low_confidence_static", temperature=0)
    prompt = questions(demo, 1)[0]
    given = len(prompt) % 4
    (result,) = run(demo, [GenerationRequest(prompt, 12 - given, decoding)])
    assert (result.prefill_forwards, result.denoising_forwards, result.commit_forwards) == (1, 12 - given, 2)
    assert result.seconds > 0


def test_an_answer_is_done_when_all_before_its_end_is_decided(tiny):
    """Masked positions after a stop token or the limit delay no answer, and change none."""
    prompt = (1, 2, 3, 4)

    def answers(strategy, limits, stops=()):
        decoding = DecodingConfig(remasking_strategy=strategy, temperature=0)
        return run(tiny, [GenerationRequest(prompt, limit, decoding, frozenset(stops)) for limit in limits])

    whole = answers("sequential", [12])[0].token_ids
    for limit, result in zip(range(1, 13), answers("sequential", range(1, 13)), strict=True):
        assert (result.token_ids, result.denoising_forwards) == (whole[:limit], limit)
    end = whole.index(whole[6])
    (result,) = answers("sequential", [12], stops=[whole[6]])
    assert (result.token_ids, result.finish_reason) == (whole[:end], "stop")
    assert result.denoising_forwards == end + 1

    whole = answers("low_confidence_static", [12])[0].token_ids
    forwards = []
    for limit, result in zip(range(1, 13), answers("low_confidence_static", range(1, 13)), strict=True):
        assert result.token_ids == whole[:limit]
        assert limit <= result.denoising_forwards <= -(-limit // 4) * 4
        forwards.append(result.denoising_forwards)
    assert forwards == sorted(forwards) and len(set(forwards)) > 3


def test_a_mask_token_among_the_stop_tokens_stops_nothing(tiny):
    """Masked positions hold the mask token; it is never drawn."""
    decoding = DecodingConfig(remasking_strategy="low_confidence_static", temperature=0)
    plain, masked = (
        run(tiny, [GenerationRequest((1, 2, 3), 9, decoding, frozenset(stops))])[0]
        for stops in ((), (tiny.mask_token_id,))
    )
    assert (plain.token_ids, plain.finish_reason) == (masked.token_ids, masked.finish_reason)


def test_two_steps_a_block_are_two_forwards(tiny):
    decoding = DecodingConfig(denoising_steps=2, remasking_strategy="low_confidence_static", temperature=0)
    (result,) = run(tiny, [GenerationRequest((1, 2, 3, 4), 8, decoding)])
    assert (result.denoising_forwards, result.commit_forwards) == (4, 1)


def test_bfloat16_on_the_cpu(demo):
    decoding = DecodingConfig(remasking_strategy="sequential", temperature=0)
    requests = [GenerationRequest(p, 100, decoding, frozenset(demo.stop_ids)) for p in questions(demo, 10)]
    answers = [demo.decode(result.token_ids) for result in run(demo, requests, dtype="bfloat16")]
    assert sum(a.endswith(f"#### {gold}") for a, gold in zip(answers, golds()[:10], strict=True)) >= 8


def test_moe(tmp_path):
    checkpoint = Checkpoint.open(str(random_checkpoint(tmp_path, moe=True)))
    plain = {checkpoint.name: checkpoint.load_model(dtype=torch.float32, device="cpu", attention="sdpa")}
    requests = [
        GenerationRequest(prompt, 9, DecodingConfig(temperature=t), seed=i)
        for i, (prompt, t) in enumerate(zip(prompts(checkpoint, (3, 8, 21)), itertools.cycle([0, 1.0]), strict=False))
    ]
    check(checkpoint, plain, requests)


class TestWarmUp:
    def test_it_runs_before_the_first_request_and_counts_nothing(self, tiny, monkeypatch):
        requests = [
            GenerationRequest((*common, i), 24, DecodingConfig()) for common in prompts(tiny, (40,)) for i in range(5)
        ]
        expected = tokens_of(run(tiny, requests))
        engine = make_engine("native", tiny, device="cpu", max_active=4, kv_pages=14)
        launch, active = engine.runner.launch, []
        monkeypatch.setattr(
            engine.runner,
            "launch",
            lambda c: (active.append(int(engine.runner.batch.blocks.active.sum())), launch(c))[1],
        )
        engine.prepare(requests)
        assert not active  # the CPU has nothing to compile
        with monkeypatch.context() as on_gpu:
            on_gpu.setattr(engine, "device", torch.device("cuda"))
            engine.prepare(requests)
        assert {1, 3, 4} <= set(active)
        assert engine.info.extra["shared_prompt_tokens"] == engine.info.extra["preemptions"] == 0
        assert tokens_of(asking.run(engine, requests)) == expected

    def test_on_a_gpu_it_is_part_of_loading(self, tiny, monkeypatch):
        engine = make_engine("native", tiny, device="cpu", max_active=3, kv_pages=10)
        monkeypatch.setattr(engine, "device", torch.device("cuda"))
        warmed = []

        def warm_up_requests(requests, count):
            warmed.append((requests, count))
            return runs.warm_up_requests(requests, count)

        monkeypatch.setattr(engine_module, "warm_up_requests", warm_up_requests)
        requests = [GenerationRequest((1, 2), 4, DecodingConfig())] * 5
        for _ in range(2):  # the second call finds everything compiled and captured
            engine.prepare(requests)
        assert warmed == [(requests, 3)]
        others = [GenerationRequest((1, 2), 4, DecodingConfig(repetition_penalty=2.0))]
        engine.prepare(others)
        assert warmed[1:] == [(others, 1)]


class TestErrors:
    @pytest.mark.parametrize("strategy", STRATEGIES)
    @pytest.mark.parametrize("temperature", [0, 1.0])
    def test_logits_that_are_not_numbers(self, tiny, strategy, temperature):
        engine = make_engine("native", tiny, device="cpu")
        engine.model.lm_head.weight[3] = float("nan")
        decoding = DecodingConfig(remasking_strategy=strategy, temperature=temperature)
        with pytest.raises(EngineError, match=r"logits are not finite numbers \(dtype float32\).*use dtype=bfloat16"):
            list(engine.generate([GenerationRequest((1, 2, 3), 8, decoding)]))

    @pytest.mark.parametrize(("ahead", "kv_pages"), [(False, None), (True, None), (True, 14)])
    @pytest.mark.parametrize("temperature", [0, 1.0])
    def test_one_request_with_nan_costs_the_others_nothing(self, tiny, monkeypatch, temperature, ahead, kv_pages):
        """The others share its prefill, its batch, its padding and later its pages; one shares its prefix."""
        bad, (common,) = 700, prompts(tiny, (16,))
        decoding = DecodingConfig(temperature=temperature)
        texts = [common + end for end in prompts(tiny, (3, 7, 18, 0, 5, 9, 2, 11), seed=1)]
        requests = [
            GenerationRequest(tuple(t for t in text if t != bad), 20, decoding, seed=i) for i, text in enumerate(texts)
        ]
        poisoned = [dataclasses.replace(requests[i], prompt_ids=(bad, *requests[i].prompt_ids)) for i in (0, 1)]
        poisoned.append(dataclasses.replace(requests[2], prompt_ids=(*requests[2].prompt_ids, bad)))

        def open_engine(**options):
            engine = make_engine("native", tiny, device="cpu", **options)
            engine.model.lm_head.weight[bad] = 0  # so that the token is never drawn
            engine.steps_in_flight = 1 + ahead
            return engine

        expected = tokens_of(asking.run(open_engine(), requests))
        engine = open_engine(max_active=6, kv_pages=kv_pages)
        engine.model.model.embed_tokens.weight[bad] = torch.nan
        given = [poisoned[0], *requests[:4], poisoned[1], *requests[4:], poisoned[2]]
        clear, cleared = engine.runner.cache.clear, []
        monkeypatch.setattr(engine.runner.cache, "clear", lambda *pages: (cleared.append(pages), clear(*pages)))
        results = {}
        with pytest.raises(EngineError, match=r"^3 of 11 requests have no answer; .*Number 0, 5, 10: the model's log"):
            results.update(engine.generate(given))
        assert not engine.runner.cache.kv.isnan().any()
        # Each of the three requests fails in the batch and without the others; no other request fails.
        assert [pages == () for pages in cleared].count(False) == 2 * 3
        good = [i for i in range(11) if i not in (0, 5, 10)]
        assert sorted(results) == good
        assert tokens_of(results[i] for i in good) == expected
        assert tokens_of(asking.run(engine, requests)) == expected  # no NaN is left

    def test_what_finished_in_the_same_step_is_given_out_first(self, tiny, monkeypatch):
        engine = make_engine("native", tiny, device="cpu")
        decoding = DecodingConfig(temperature=0, remasking_strategy="sequential")  # each answer ends in its first step
        requests = [GenerationRequest((1, 2, 3, i), 1, decoding) for i in range(6)]
        expected = tokens_of(asking.run(engine, requests))
        collect, single = engine.runner.collect, []

        def third_is_stuck():
            outcome = collect()
            single.append(int(outcome.took_part.sum()) == 1)
            outcome.stuck[2 if not single[-1] else 0] = True
            return outcome

        monkeypatch.setattr(engine.runner, "collect", third_is_stuck)
        results = []
        with pytest.raises(EngineError, match=r"1 of 6 requests have no answer.*Number 2: "):
            for result in engine.generate(requests):
                assert not any(single)
                results.append(result)
        assert [index for index, _ in results] == [0, 1, 3, 4, 5]
        assert tokens_of(result for _, result in results) == expected[:2] + expected[3:]

    def test_a_request_that_another_ones_kv_spoilt_is_answered_without_the_others(self, tiny, monkeypatch):
        """The second run of the request has pages without NaN."""
        engine = make_engine("native", tiny, device="cpu")
        decoding = DecodingConfig(temperature=0, remasking_strategy="sequential")
        requests = [GenerationRequest((1, 2, 3, i), 1, decoding) for i in range(6)]
        expected = tokens_of(asking.run(engine, requests))
        collect = engine.runner.collect

        def spoilt():
            outcome = collect()
            if outcome.took_part.sum() > 1:
                outcome.stuck[2] = True
                engine.runner.cache.kv[:] = torch.nan
            return outcome

        monkeypatch.setattr(engine.runner, "collect", spoilt)
        assert tokens_of(asking.run(engine, requests)) == expected

    @pytest.mark.parametrize(
        "error",
        [
            torch.OutOfMemoryError(),
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        ],
        ids=["torch's", "the CPU's"],
    )
    def test_after_a_shortage_the_batch_grows_again(self, tiny, monkeypatch, error):
        requests = [GenerationRequest((1, 2, 3, i), 8, DecodingConfig(temperature=1.0), seed=i) for i in range(80)]
        expected = tokens_of(run(tiny, requests))
        engine = make_engine("native", tiny, device="cpu", max_active=8)
        monkeypatch.setattr(runs, "PATIENCE", 3)
        launch, active = engine.runner.launch, []

        def fails_once(context):
            active.append(int(engine.runner.batch.blocks.active.sum()))
            if len(active) == 3:
                raise error
            return launch(context)

        monkeypatch.setattr(engine.runner, "launch", fails_once)
        assert tokens_of(asking.run(engine, requests)) == expected
        first = active.index(4)
        assert max(active[:first]) == 8 and max(active[first : first + 5]) == 4
        assert [n for n, _ in itertools.groupby(active[first:]) if n >= 4][:5] == [4, 5, 6, 7, 8]

    def test_out_of_memory_halves_the_batch_and_changes_no_answer(self, tiny, monkeypatch, caplog):
        requests = [GenerationRequest((1, 2, 3 + i), 12, DecodingConfig(temperature=1.0), seed=i) for i in range(8)]
        expected = run(tiny, requests)
        for at in ("prefill", "launch"):
            engine = make_engine("native", tiny, device="cpu", max_active=8)
            work = getattr(engine.runner, at)

            def fails_for_many(given, engine=engine, work=work):
                if engine.runner.batch.blocks.active.sum() > 3 or (isinstance(given, list) and len(given) > 3):
                    raise torch.OutOfMemoryError
                return work(given)

            monkeypatch.setattr(engine.runner, at, fails_for_many)
            longer = [dataclasses.replace(r, prompt_ids=r.prompt_ids * 2) for r in requests]
            results = dict(engine.generate(requests if at == "launch" else longer))
            assert sorted(results) == list(range(8))
            if at == "launch":
                assert tokens_of(results[i] for i in range(8)) == tokens_of(expected)
            assert "Out of memory on cpu with 8 sequences at once; 4 go on" in caplog.text
            caplog.clear()

    @pytest.fixture(scope="class")
    def undisturbed(self, tiny):
        requests = [GenerationRequest((1, 2, 3 + i), 30, DecodingConfig(temperature=1.0), seed=i) for i in range(8)]
        return requests, tokens_of(run(tiny, requests))

    @pytest.mark.parametrize(
        ("at", "call"), [("set_pages", 0), ("set_pages", 2), ("set_pages", 5), ("stop", 0), ("begin", 0), ("begin", 1)]
    )
    def test_out_of_memory_between_two_steps_loses_nothing(self, tiny, undisturbed, monkeypatch, at, call):
        """A plan is carried out in part, and no later plan repeats the rest."""
        requests, expected = undisturbed
        engine = make_engine("native", tiny, device="cpu", max_active=8, kv_pages=12)
        engine.steps_in_flight = 2
        work, calls = getattr(engine.runner, at), itertools.count()

        def fails_once(given):
            if list(given) and next(calls) == call:
                raise torch.OutOfMemoryError
            work(given)

        monkeypatch.setattr(engine.runner, at, fails_once)
        assert tokens_of(asking.run(engine, requests)) == expected
        assert next(calls) > call

    @pytest.mark.parametrize("steps", [1, 2])
    def test_any_error_comes_after_what_was_finished(self, tiny, monkeypatch, steps):
        """With two steps in flight, finished answers wait for the next launch, which fails."""
        engine = make_engine("native", tiny, device="cpu", max_active=2)
        engine.steps_in_flight = steps
        launch, finish, settled = engine.runner.launch, Scheduler.finish, []

        def finishes(scheduler, sequence, **options):
            settled.append(sequence.index)
            finish(scheduler, sequence, **options)

        def fails_later(context):
            if settled:
                raise RuntimeError("CUDA error: unspecified launch failure")
            return launch(context)

        monkeypatch.setattr(Scheduler, "finish", finishes)
        monkeypatch.setattr(engine.runner, "launch", fails_later)
        requests = [GenerationRequest((1, 2, 3), new, DecodingConfig(temperature=0)) for new in (1, 40)]
        finished = []
        with pytest.raises(RuntimeError, match="launch failure"):
            for index, _ in engine.generate(requests):
                finished.append(index)
        assert finished == settled == [0]

    def test_a_standstill_is_an_error(self, tiny, monkeypatch):
        engine = make_engine("native", tiny, device="cpu")
        monkeypatch.setattr(engine.runner, "launch", lambda _: False)
        with pytest.raises(EngineError, match="stands still with 1 unfinished"):
            list(engine.generate([GenerationRequest((1, 2, 3), 8, DecodingConfig())]))

    def test_out_of_memory_with_one_sequence_keeps_what_is_finished(self, tiny, monkeypatch):
        engine = make_engine("native", tiny, device="cpu", max_active=2)
        launch, finished = engine.runner.launch, []

        def fails_later(context):
            if finished:
                raise torch.OutOfMemoryError
            return launch(context)

        monkeypatch.setattr(engine.runner, "launch", fails_later)
        requests = [GenerationRequest((1, 2, 3), new, DecodingConfig(temperature=0)) for new in (1, 40)]
        with pytest.raises(EngineError, match=r"out of memory on cpu.*smaller max_active"):
            for index, _ in engine.generate(requests):
                finished.append(index)
        assert finished == [0]

    def test_pages_that_no_request_needs_are_not_allocated(self, tiny):
        (result,) = run(tiny, [GenerationRequest((1, 2, 3), 8, DecodingConfig())], kv_pages=10**12)
        assert len(result.token_ids) == 8

    @pytest.mark.parametrize(("count", "pages", "emptied"), [(1, 2, False), (4, 5, True)])
    def test_torchs_unused_memory_is_used_for_pages(self, tiny, monkeypatch, count, pages, emptied):
        """A request needs 2 pages. 2 pages are in the free memory, and 3 more in torch's unused memory."""
        engine = make_engine("native", tiny, device="cpu")
        page = engine.runner.cache.bytes_per_page
        free = [4 * page]
        monkeypatch.setattr(engine, "device", torch.device("cuda"))
        monkeypatch.setattr(engine_module, "MEMORY_FRACTION", 0.5)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free[0], free[0]))
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: free.append(free.pop() + 6 * page))
        allocate, allocated = engine.runner.allocate, []
        monkeypatch.setattr(engine.runner, "allocate", lambda n, *rest: (allocated.append(n), allocate(n, *rest)))
        engine.prepare([GenerationRequest((1,) * 20, 12, DecodingConfig())] * count)
        assert allocated[0] == pages
        assert (free[0] > 4 * page) == emptied

    @pytest.mark.parametrize("ask", ["prepare", "generate"])
    def test_a_request_that_no_pool_holds(self, tiny, ask):
        engine = make_engine("native", tiny, device="cpu", kv_pages=2)
        with pytest.raises(UserError, match=r"a request of 44 tokens .* needs 3 KV pages of 16 tokens.*there are 2"):
            list(getattr(engine, ask)([GenerationRequest((1,) * 12, 30, DecodingConfig())]))

    def test_what_is_there_is_kept_for_smaller_requests(self, tiny):
        """New tensors would need new CUDA graphs."""
        engine = make_engine("native", tiny, device="cpu")
        small, large = (GenerationRequest((1, 2, 3), new, DecodingConfig()) for new in (4, 60))
        engine.prepare([large] * 3)
        batch = engine.runner.batch
        asking.run(engine, [small] * 2)
        asking.run(engine, [large] * 3)
        assert engine.runner.batch is batch
        asking.run(engine, [small] * 4)  # more sequences at once; the longest earlier one still fits
        batch = engine.runner.batch
        asking.run(engine, [large])
        assert engine.runner.batch is batch

    @pytest.mark.parametrize("device", ["cuda", "cuda:7"])
    def test_no_gpu(self, tiny, device, monkeypatch):
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        with pytest.raises(UserError, match=rf"device='{device}': this machine has no usable GPU.*choose cpu or auto"):
            make_engine("native", tiny, device=device)

    @pytest.mark.parametrize("device", ["gpu", "mps", "cuda:x"])
    def test_an_unknown_device(self, tiny, device):
        with pytest.raises(UserError, match=f"device='{device}' is unknown; choose cpu, cuda"):
            make_engine("native", tiny, device=device)

    def test_an_unknown_dtype(self, tiny):
        with pytest.raises(UserError, match="dtype='int8' is unknown; choose float32"):
            make_engine("native", tiny, device="cpu", dtype="int8")

    @pytest.mark.parametrize("name", ["kernels", "share_prefixes"])
    def test_neither_on_nor_off(self, tiny, name):
        with pytest.raises(UserError, match=f"{name}='maybe' is neither true nor false"):
            make_engine("native", tiny, device="cpu", **{name: "maybe"})

    @pytest.mark.parametrize("kind", sorted({*ROPE_INIT_FUNCTIONS, "default", "dynamic", "longrope"}))
    def test_rope_that_depends_on_the_batch_is_refused(self, tmp_path, kind):
        """The test compares transformers' frequencies for a short batch and for a long one."""
        settings = {"factor": 4.0, "original_max_position_embeddings": 64}
        settings |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}  # llama3
        settings |= {"short_factor": [1.0] * 16, "long_factor": [4.0] * 16}  # longrope
        scaling = None if kind == "default" else {"rope_type": kind, **settings}
        folder = random_checkpoint(tmp_path, head_dim=32, max_position_embeddings=64, rope_scaling=scaling)
        checkpoint = Checkpoint.open(str(folder))
        model = checkpoint.load_model(dtype=torch.float32, device="cpu", attention="sdpa")
        rotary, x = model.model.rotary_emb, torch.zeros(1)
        # The frequencies of the same 8 positions.
        short, long = (rotary(x, torch.arange(n)[None])[1][0, :8] for n in (8, 2000))
        if torch.equal(short, long):
            make_engine("native", checkpoint, device="cpu")
            return
        assert kind in ("dynamic", "longrope")
        told = rf"rope_type='{kind}' in its config.json.*longest sequence of a batch.*Choose a type"
        for name in ("native", "lmdeploy"):
            with lmdeploy_standin.standin(), pytest.raises(UserError, match=told):
                make_engine(name, checkpoint, device="auto" if name == "lmdeploy" else "cpu")

    @pytest.mark.parametrize(
        "config",
        [
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
        ],
        ids=str,
    )
    def test_rope_by_its_other_names(self, tmp_path, config):
        with pytest.raises(UserError, match="rope_type='dynamic'"):
            make_engine("native", Checkpoint.open(str(random_checkpoint(tmp_path, **config))), device="cpu")

    def test_no_pages(self, tiny):
        with pytest.raises(UserError, match="kv_pages=0 is out of range"):
            make_engine("native", tiny, device="cpu", kv_pages=0)
