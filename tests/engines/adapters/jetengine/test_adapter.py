"""The adapter on stand-ins that have JetEngine's faults. The native engine's answers are the right ones."""

from __future__ import annotations

import atexit
import dataclasses
import itertools
import json
import logging
import multiprocessing
from pathlib import Path

import pytest
import torch
from asking import GREEDY, SHORT, check_refusals_of_jetengine, native, random_prompts, run, tokens_of
from jetengine_standin import GIB, gpu_on_the_cpu
from support import random_checkpoint, read_weights, write_weights
from thinking_checkpoint import thinking_checkpoint

from sdar_lm_eval import Checkpoint, DecodingConfig, EngineError, GenerationRequest, UserError, make_engine
from sdar_lm_eval.demo import prompts as demo_prompts
from sdar_lm_eval.engines import runs
from sdar_lm_eval.engines.adapters.jetengine import checks, group, loading, memory
from sdar_lm_eval.thinking import Thinking

STRATEGIES = ("low_confidence_static", "sequential", "low_confidence_dynamic")


def of(checkpoint, **options):
    return make_engine("jetengine", checkpoint, **options)


def variant(checkpoint, folder, **config):
    """The checkpoint `tiny` with other values in its config.json; None leaves a key out."""
    folder = random_checkpoint(folder, head_dim=32)
    write_weights(folder, read_weights(checkpoint.folder))
    return with_config(folder, **config)


def with_config(folder, **config):
    written = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps({key: v for key, v in written.items() if v is not None}))
    return Checkpoint.open(str(folder))


class TestAnswers:
    @pytest.mark.parametrize("strategy", STRATEGIES)
    def test_they_are_the_native_engines_where_the_rules_are_the_same(self, jetengine, demo, strategy):
        decoding = dataclasses.replace(GREEDY, remasking_strategy=strategy)
        requests = [GenerationRequest(p, 24, decoding, frozenset(demo.stop_ids)) for p in demo_prompts(demo)[:3]]
        engine = of(demo)
        other_rules = strategy in engine.info.deviations
        assert other_rules == (jetengine.version == "0.2.0" and strategy == "low_confidence_dynamic")
        assert (tokens_of(run(engine, requests)) != native(demo, requests)) == other_rules

    @pytest.mark.parametrize("block_length", [1, 2, 8, 16])
    def test_of_other_block_lengths(self, jetengine, tiny, block_length):
        decoding = dataclasses.replace(GREEDY, block_length=block_length, denoising_steps=(block_length + 1) // 2)
        requests = [GenerationRequest(p, 11, decoding) for p in random_prompts((1, 8, 21))]
        engine = of(tiny)
        engine.prepare([GenerationRequest((1, 2), 500, GREEDY)] * 8)  # JetEngine is loaded, for blocks of 4
        assert tokens_of(run(engine, requests)) == native(tiny, requests)

    def test_of_a_mixture_of_experts(self, jetengine_010, tmp_path):
        checkpoint = Checkpoint.open(str(random_checkpoint(tmp_path, moe=True, head_dim=32)))
        requests = [GenerationRequest(p, 9, GREEDY) for p in random_prompts((3, 8, 21))]
        assert tokens_of(run(of(checkpoint), requests)) == native(checkpoint, requests)

    def test_a_threshold_is_above_the_probability_at_temperature_1(self, jetengine_010, tiny):
        """0.1.0 itself gives every token that it draws greedily a confidence of 1."""
        decodings = [DecodingConfig(temperature=0, confidence_threshold=threshold) for threshold in (0.2, 0.6, 0.99)]
        requests = [GenerationRequest(p, 12, decoding) for p in random_prompts((5, 8)) for decoding in decodings]
        assert tokens_of(run(of(tiny), requests)) == native(tiny, requests)

    def test_each_request_has_its_own_settings(self, jetengine, tiny):
        """0.2.0 itself takes the first sequence's settings for all that run with it."""
        decodings = [
            dataclasses.replace(GREEDY, remasking_strategy="sequential"),
            GREEDY,
            dataclasses.replace(GREEDY, denoising_steps=2),
            *(DecodingConfig(temperature=0, confidence_threshold=threshold) for threshold in (1.0, 0.0)),
        ]
        requests = [GenerationRequest(p, 12, d) for p, d in zip(random_prompts([9] * 5), decodings, strict=True)]
        engine = of(tiny)
        results = run(engine, requests)
        assert tokens_of(results) == [tokens_of(run(engine, [request]))[0] for request in requests]
        steps = [result.denoising_forwards for result in results]
        assert steps[4] < steps[2] < steps[1]

    def test_sampling_settings_are_not_shared(self, jetengine, tiny):
        """At a low temperature an answer is the greedy one, whatever the other requests' temperatures."""
        cold, hot = (DecodingConfig(temperature=t, remasking_strategy="sequential") for t in (1e-3, 5.0))
        requests = [GenerationRequest((5, 6, 7), 12, d, seed=i) for i, d in enumerate([hot, cold, hot, cold])]
        results = tokens_of(run(of(tiny), requests))
        (greedy,) = native(tiny, [dataclasses.replace(requests[0], decoding=dataclasses.replace(cold, temperature=0))])
        assert results[1] == results[3] == greedy
        assert len({*results}) == 3

    @pytest.mark.parametrize(
        ("settings", "drawn_by"),
        [
            ({"temperature": 0}, (1.0, 1, 1.0)),
            ({"temperature": 0.5, "top_k": 1, "top_p": 0.5}, (1.0, 1, 1.0)),
            ({"temperature": 0.5}, (0.5, 711, 1.0)),  # topk is off at the vocabulary's size; 0 means something else
            ({"temperature": 2.0, "top_k": 10**30, "top_p": 0.5}, (2.0, 711, 0.5)),
            ({"temperature": 2.0, "top_k": 5}, (2.0, 5, 1.0)),
        ],
        ids=str,
    )
    def test_how_settings_are_said(self, jetengine, tiny, settings, drawn_by):
        run(of(tiny), [GenerationRequest((5, 6), 2, DecodingConfig(**settings))])
        params = jetengine.sampled[0]
        assert (params.temperature, params.topk, params.topp) == drawn_by

    def test_all_that_is_greedy_runs_together(self, jetengine, tiny):
        decodings = [DecodingConfig(temperature=0, top_p=0.5), DecodingConfig(temperature=0.7, top_k=1)]
        run(of(tiny), [GenerationRequest((5, 6, 7), 4, decoding) for decoding in decodings])
        assert max(denoised for _, denoised in jetengine.batches) == 2

    def test_each_step_draws_by_other_numbers(self, jetengine, tiny):
        """0.2.0 itself draws by the same number at every step: the same token, where all are equally probable."""
        decoding = DecodingConfig(temperature=1e4, remasking_strategy="sequential")
        (result,) = run(of(tiny), [GenerationRequest((5, 6, 7, 8), 40, decoding)])
        assert len(set(result.token_ids)) > 20

    def test_other_requests_or_seeds_are_other_draws(self, jetengine, tiny):
        decoding = DecodingConfig(temperature=2.0, remasking_strategy="sequential")
        engine = of(tiny)

        def draw(*seeds):
            return tokens_of(run(engine, [GenerationRequest((5, 6, 7), 8, decoding, seed=seed) for seed in seeds]))

        assert draw(1, 2) == draw(1, 2)
        assert draw(1, 2) != draw(1, 3)

    @pytest.mark.parametrize("steps", [1, 4])
    def test_entropy_bounded_ends_when_no_mask_is_left(self, jetengine_020, tiny, steps):
        """0.2.0 itself ends a block after `denoising_steps` steps."""
        decoding = DecodingConfig(4, steps, "entropy_bounded", eb_threshold=0.01, temperature=0)
        requests = [GenerationRequest(p, 8, decoding) for p in random_prompts((4, 7))]
        results = run(of(tiny), requests)
        assert [len(result.token_ids) for result in results] == [8, 8]
        assert tokens_of(results) == native(tiny, requests)  # each step unmasks the token of least entropy

    def test_entropy_bounds_are_each_requests_own(self, jetengine_020, tiny):
        decodings = [
            DecodingConfig(remasking_strategy="entropy_bounded", eb_threshold=bound, temperature=0)
            for bound in (100.0, 0.01)
        ]
        results = run(of(tiny), [GenerationRequest((1, 2, 3, 4), 8, decoding) for decoding in decodings])
        assert [result.denoising_forwards for result in results] == [2, 8]

    @pytest.mark.parametrize("strategy", ["entropy_bounded", "random"])
    def test_all_of_its_strategies(self, jetengine_020, tiny, strategy):
        decoding = DecodingConfig(remasking_strategy=strategy, temperature=0)
        assert len(run(of(tiny), [GenerationRequest((1, 2, 3), 10, decoding)])[0].token_ids) == 10


class TestPrompts:
    def test_a_pad_token_inside_a_prompt_stays(self, jetengine, tiny):
        """0.2.0 itself drops the prompt up to a pad token."""
        pad = tiny.tokenizer.pad_token_id
        requests = [GenerationRequest((*p, pad, *p), 8, GREEDY) for p in random_prompts((9, 12))]
        assert tokens_of(run(of(tiny), requests)) == native(tiny, requests)

    @pytest.mark.parametrize("length", [5, 6, 7])
    def test_a_stop_token_at_the_end_of_a_prompt_is_not_the_answers(self, jetengine, tiny, length):
        """0.1.0 itself ends the answer at a stop token after the prompt's last full block."""
        stop = tiny.stop_ids[0]
        (word,) = tiny.tokenizer.encode("####", add_special_tokens=False)
        (prompt,) = random_prompts((length - 1,))
        requests = [
            GenerationRequest((*prompt, stop), 8, GREEDY, frozenset({stop})),
            GenerationRequest((*prompt, word), 8, GREEDY, stop_strings=("####",)),
        ]
        expected = native(tiny, requests)
        assert [len(tokens) for tokens, _ in expected] == [8, 8]
        assert tokens_of(run(of(tiny), requests)) == expected

    def test_a_mask_token_at_the_end_of_a_prompt_is_refused(self, jetengine, tiny):
        """JetEngine would draw another token for it."""
        mask = tiny.mask_token_id
        whole = GenerationRequest((1, 2, mask, 4, 5), 8, GREEDY)
        assert tokens_of(run(of(tiny), [whole])) == native(tiny, [whole])
        bad = GenerationRequest((1, 2, 3, 4, 5, mask), 8, GREEDY)
        with pytest.raises(UserError, match=r"prompt 1 of 2 holds the mask token among its last 2 tokens.*model sdar"):
            next(of(tiny).generate([whole, bad]))

    def test_one_that_is_too_long_is_refused(self, jetengine, tiny):
        """JetEngine would cut the prompt, and return its beginning as the answer."""
        fits = GenerationRequest((1,) * 2040, 8, GREEDY)
        assert len(run(of(tiny), [fits])[0].token_ids) == 8
        bad = GenerationRequest((1,) * 2040, 9, GREEDY)
        with pytest.raises(UserError, match=r"2,040 prompt and 9 new tokens needs 2,052 tokens.* takes 2,048. Lower"):
            next(of(tiny).generate([fits, bad]))

    def test_refusals_that_the_real_jetengine_is_asked_for_too(self, jetengine, tiny):
        check_refusals_of_jetengine(of(tiny), tiny, tuple(range(1, 10)))

    def test_longer_ones_after_shorter_ones(self, jetengine, tiny):
        """JetEngine has room for requests up to a length; for longer ones it is loaded once more."""
        engine = of(tiny)
        for length in (5, 300, 40):
            requests = [GenerationRequest(p, 8, GREEDY) for p in random_prompts((length, 6))]
            assert tokens_of(run(engine, requests)) == native(tiny, requests)
        assert len(jetengine.made) == 2

    def test_another_prompt_than_was_given_is_an_error(self, jetengine_020, tiny, monkeypatch):
        engine = of(tiny)
        engine.prepare([GenerationRequest((1, 2, 3, 4), 8, GREEDY)])
        add = engine.loaded.llm.add_request
        monkeypatch.setattr(engine.loaded.llm, "add_request", lambda prompt, params: add([9, *prompt[1:]], params))
        with pytest.raises(EngineError, match="returned another prompt than it was given"):
            run(engine, [GenerationRequest((1, 2, 3, 4), 8, GREEDY)])


class TestEnds:
    def test_jetengine_stops_where_the_answer_does(self, jetengine, demo):
        """At the request's stop tokens, beside which the tokenizer's do not count, and at stop strings of one token."""
        prompt = demo_prompts(demo)[SHORT]
        end = demo.tokenizer.convert_tokens_to_ids("<|im_end|>")
        assert end != demo.tokenizer.eos_token_id
        requests = [
            GenerationRequest(prompt, 48, GREEDY, frozenset({end})),
            GenerationRequest(prompt, 48, GREEDY, stop_strings=("####",)),
        ]
        results = run(of(demo), requests)
        assert tokens_of(results) == native(demo, requests)
        for result in results:
            blocks = len(result.token_ids) // 4 + 2
            assert result.commit_forwards <= blocks
            assert result.denoising_forwards <= 4 * blocks

    def test_a_stop_string_with_spaces_around_its_token(self, jetengine, demo):
        """A token that does not hold the whole string ends no answer."""
        prompt = demo_prompts(demo)[SHORT]
        engine = of(demo)
        (whole,) = run(engine, [GenerationRequest(prompt, 24, GREEDY)])
        stops = sorted({demo.decode([token]).strip() for token in whole.token_ids[:12]} - {""})
        requests = [GenerationRequest(prompt, 24, GREEDY, stop_strings=(stop,)) for stop in stops]
        assert tokens_of(run(engine, requests)) == native(demo, requests)

    def test_the_end_of_text_does_not_stop_unless_it_is_asked_to(self, jetengine, demo):
        prompt = demo_prompts(demo)[SHORT]
        request = GenerationRequest(prompt, 48, GREEDY)
        ((tokens, reason),) = tokens_of(run(of(demo), [request]))
        assert demo.tokenizer.eos_token_id in tokens[:-1]
        assert [(tokens, reason)] == native(demo, [request])
        assert reason == "length"

    def test_an_answer_without_an_end_is_an_error(self, jetengine, tiny, monkeypatch):
        engine = of(tiny)
        params = engine.jetengine.SamplingParams
        monkeypatch.setattr(engine.jetengine, "SamplingParams", lambda **given: params(**given | {"max_tokens": 3}))
        with pytest.raises(EngineError, match=r"returned \d of 40 tokens, and none that ends the answer"):
            run(engine, [GenerationRequest((1, 2, 3), 40, GREEDY)])

    def test_mask_tokens_that_are_drawn_are_left_out_and_counted(self, jetengine, tiny, tmp_path, caplog):
        checkpoint = variant(tiny, tmp_path / "masks")
        weights = read_weights(checkpoint.folder)
        # The mask token is often the most probable one.
        weights["lm_head.weight"][checkpoint.mask_token_id] = 3 * weights["lm_head.weight"][6]
        write_weights(checkpoint.folder, weights)
        engine = of(checkpoint)
        with caplog.at_level(logging.WARNING):
            results = run(engine, [GenerationRequest(p, 12, GREEDY) for p in random_prompts((4, 5, 6, 7))])
        assert all(checkpoint.mask_token_id not in result.token_ids for result in results)
        drawn = sum(12 - len(result.token_ids) for result in results)
        assert engine.info.extra["mask_tokens_drawn"] == drawn > 0
        assert f"drew the mask token {drawn} times" in caplog.text


class TestCounts:
    @pytest.mark.parametrize("length", [3, 4, 6])
    def test_forwards_are_those_that_a_request_took_part_in(self, jetengine, tiny, length):
        """Static, 4 steps a block: a forward for each token of the answer's blocks, and a commit for each block."""
        requests = [GenerationRequest(p, 9, GREEDY) for p in random_prompts((length, 40))]
        result = run(of(tiny), requests)[0]
        blocks = -(-(length % 4 + 9) // 4)
        given = length % 4
        assert (result.prefill_forwards, result.commit_forwards) == (int(length >= 4), blocks)
        assert result.denoising_forwards == 4 * blocks - given

    def test_a_request_that_waits_is_not_charged_for_it(self, jetengine, tiny):
        results = run(of(tiny, max_active=1), [GenerationRequest((1, 2, 3, 4), 8, GREEDY)] * 3)
        assert [(r.denoising_forwards, r.commit_forwards) for r in results] == [(8, 2)] * 3


class TestMemory:
    def test_what_jetengine_is_made_for(self, jetengine, tiny):
        engine = of(tiny, max_active=5)
        engine.prepare([GenerationRequest((1,) * 30, 13, GREEDY), GenerationRequest((1,) * 9, 40, GREEDY)] * 4)
        config = engine.loaded.llm.config
        assert (config.max_model_len, config.max_num_seqs) == (52, 4)  # whole blocks; a number that has a CUDA graph
        assert config.max_num_batched_tokens == 4 * 30  # the longest prompts that can begin in one step
        assert config.kvcache_block_size == 256
        assert engine.info.max_active == 4
        assert config.num_kvcache_blocks >= 4
        free = 79 * GIB - config.gpu_memory_utilization * 80 * GIB
        assert free > 70 * GIB  # no more than is needed

    @pytest.mark.parametrize("stops", [(), ("e",)])
    def test_thoughts_that_go_on_fit_into_a_prefill(self, jetengine, demo, tmp_path, stops):
        """Their parts have prompts that are longer than the first ones: JetEngine does not run out of memory.

        A part goes on behind the thought's limit, or behind a stop string within the thought.
        """
        jetengine.faults.alone = False
        checkpoint = Checkpoint.open(str(thinking_checkpoint(tmp_path / "thinker"))) if stops else demo
        thinking = Thinking("</think>", (9,), "<think>", opened=not stops, max_tokens=None if stops else 20)
        engine = of(checkpoint)
        prompts = random_prompts([5] * 16)
        length = 60 if stops else 28
        run(engine, [GenerationRequest(p, length, GREEDY, stop_strings=stops, thinking=thinking) for p in prompts])
        assert engine.info.extra["standstills"] == 0

    def test_a_part_of_memory_that_was_asked_for(self, jetengine, tiny):
        engine = of(tiny, gpu_memory_utilization=0.5)
        engine.prepare([GenerationRequest((1,), 4, GREEDY)])
        assert engine.loaded.llm.config.gpu_memory_utilization == 0.5

    def test_as_many_at_once_as_there_are_pages_for(self, jetengine, tiny, caplog):
        requests = [GenerationRequest(p, 12, GREEDY) for p in random_prompts((250, 5, 250, 6, 251))]
        expected = tokens_of(run(of(tiny), requests))
        jetengine.faults.pages = {"0.2.0": 4, "0.1.0": 7}[jetengine.version]
        jetengine.faults.alone = False
        jetengine.batches.clear()
        engine = of(tiny)
        with caplog.at_level(logging.WARNING):
            assert tokens_of(run(engine, requests)) == expected
        assert max(denoised for _, denoised in jetengine.batches) == {"0.2.0": 2, "0.1.0": 1}[jetengine.version]
        assert engine.info.extra["standstills"] == 0

    def test_fewer_at_once_are_told(self, jetengine_020, tiny, caplog):
        jetengine_020.faults.pages = 3
        with caplog.at_level(logging.WARNING):
            run(of(tiny), [GenerationRequest(p, 12, GREEDY) for p in random_prompts((250, 250, 251))])
        assert "1 sequences at once in the place of 2: JetEngine has 3 KV pages of 256 tokens" in caplog.text
        assert max(denoised for _, denoised in jetengine_020.batches) == 1

    def test_a_request_that_no_pool_holds(self, jetengine, tiny):
        jetengine.faults.pages = 1
        requests = [
            GenerationRequest((1, 2, 3, 4), 4, GREEDY),
            GenerationRequest((1,) * 300, 4, dataclasses.replace(GREEDY, remasking_strategy="sequential")),
        ]
        told = r"a request of 304 tokens .* needs 2 KV pages of 256 tokens.* has 1"
        with pytest.raises(UserError, match=told):
            next(of(tiny).generate(requests))  # the first request does not run either
        jetengine.faults.alone = False
        with pytest.raises(UserError, match=told):
            of(tiny).prepare(requests)

    def test_prompts_that_begin_together_are_no_more_than_the_warm_up(self, jetengine, tiny, monkeypatch):
        for module in (group, memory):
            monkeypatch.setattr(module, "PREFILL_TOKENS", 64)
        engine = of(tiny)
        requests = [GenerationRequest(p, 8, GREEDY) for p in random_prompts((40, 24, 30, 8, 9))]
        assert tokens_of(run(engine, requests)) == native(tiny, requests)
        assert engine.info.extra["standstills"] == 0
        assert max(prefilled for prefilled, _ in jetengine.batches) > 1

    def test_no_memory_for_the_weights_or_for_pages(self, jetengine, tiny, monkeypatch):
        request = GenerationRequest((1,) * 300, 40, GREEDY)
        told = r"1 sequences of up to 340 tokens does not fit into 80.0 GiB .* or lower max_active, max_gen_toks"
        with pytest.raises(UserError, match=r"to fill 0.1 GiB, .*\(gpu_memory_utilization=0.001\): set it higher, or"):
            of(tiny, gpu_memory_utilization=0.001).prepare([request])
        jetengine.faults.alone = False
        jetengine.faults.at_start = torch.OutOfMemoryError("all is taken")
        with pytest.raises(UserError, match=rf"{told}|all is taken"):
            of(tiny).prepare([request])

    def test_a_gpu_that_others_use(self, jetengine, tiny, monkeypatch):
        """JetEngine fills a part of all memory: what other programs use has to count as filled."""
        gpu_on_the_cpu(monkeypatch, free=20 * GIB)
        engine = of(tiny)
        engine.prepare([GenerationRequest((1,) * 300, 40, GREEDY)] * 16)
        assert engine.loaded.llm.config.num_kvcache_blocks >= 32

    def test_jetengine_is_left_in_order_when_it_is_made_again(self, jetengine, tiny, monkeypatch):
        taken_back = []
        monkeypatch.setattr(atexit, "unregister", taken_back.append)
        engine = of(tiny)
        engine.prepare([GenerationRequest((1,), 4, GREEDY)])
        engine.prepare([GenerationRequest((1,), 400, GREEDY)])
        first, _ = jetengine.made
        assert not hasattr(first, "model_runner")
        assert taken_back == [first.exit]  # else it would be called at the end of the process, and fail

    def test_one_that_takes_another_mask_token_is_ended(self, jetengine, tiny, monkeypatch):
        engine = of(tiny)
        made = engine.jetengine.LLM

        def of_another_mask(folder, **options):
            llm = made(folder, **options)
            llm.config.mask_token_id = 3
            return llm

        monkeypatch.setattr(engine.jetengine, "LLM", of_another_mask)
        with pytest.raises(EngineError, match="JetEngine takes 3 for the mask token"):
            engine.prepare([GenerationRequest((1,), 4, GREEDY)])
        assert not hasattr(jetengine.made[-1], "model_runner")

    def test_closing_ends_jetengine(self, jetengine, tiny):
        of(tiny).close()  # nothing is loaded yet
        with of(tiny) as engine:
            engine.prepare([GenerationRequest((1,), 4, GREEDY)])
            assert hasattr(jetengine.made[-1], "model_runner")
        assert not hasattr(jetengine.made[-1], "model_runner")


class TestStandstill:
    """No page is free for any sequence: JetEngine keeps them all, and does nothing."""

    def requests(self):
        return [GenerationRequest(p, 12, GREEDY) for p in random_prompts((9, 248, 249, 250, 251))]

    def pages(self, jetengine):
        return {"0.2.0": 4, "0.1.0": 7}[jetengine.version]  # enough for each request alone

    def test_nothing_is_lost_and_nothing_is_there_twice(self, jetengine, tiny, monkeypatch, caplog):
        expected = native(tiny, self.requests())
        monkeypatch.setattr(loading.Loaded, "at_once", lambda self, _: 4)
        jetengine.faults.pages = self.pages(jetengine)
        engine = of(tiny)
        with caplog.at_level(logging.WARNING):
            assert tokens_of(run(engine, self.requests())) == expected
        assert engine.info.extra["standstills"] > 0
        assert "ran out of memory; its sequences run again, 2 at a time" in caplog.text
        assert tokens_of(run(engine, self.requests()[:1])) == expected[:1]  # the next run is as any

    def test_of_a_single_sequence_is_an_error(self, jetengine, tiny, monkeypatch):
        monkeypatch.setattr(loading.Loaded, "at_once", lambda self, _: 2)
        monkeypatch.setattr(loading.Loaded, "check_room", lambda self, _: None)
        jetengine.faults.pages = 1
        engine, answered = of(tiny), []
        with pytest.raises(EngineError, match=r"single sequence; 4 of 5 requests are unanswered.*are kept"):
            for index, _ in engine.generate(self.requests()):
                answered.append(index)
        assert answered == [0]
        assert tokens_of(run(engine, self.requests()[:1])) == native(tiny, self.requests()[:1])

    @pytest.mark.parametrize("step", [0, 3])
    def test_no_memory_in_a_step(self, jetengine, tiny, step):
        jetengine.faults.at_step = {step: torch.OutOfMemoryError("all is taken")}
        engine = of(tiny)
        assert tokens_of(run(engine, self.requests())) == native(tiny, self.requests())
        assert engine.info.extra["standstills"] == 1

    def test_another_error_in_a_step_keeps_what_is_finished(self, jetengine, tiny):
        requests = [GenerationRequest((1, 2, 3, 4), new, GREEDY) for new in (4, 40)]
        jetengine.faults.at_step = {20: RuntimeError("device-side assert")}
        engine, answered = of(tiny), {}
        with pytest.raises(EngineError, match=r"stopped: RuntimeError: device-side assert. Finished answers are kept"):
            for index, result in engine.generate(requests):
                answered[index] = result
        assert tokens_of(answered.values()) == native(tiny, requests[:1])
        assert tokens_of(run(engine, requests)) == native(tiny, requests)

    def test_the_batch_grows_again(self, jetengine, tiny, monkeypatch):
        monkeypatch.setattr(runs, "PATIENCE", 2)
        requests = [GenerationRequest(p, 8, GREEDY) for p in random_prompts([4] * 40)]
        jetengine.faults.at_step = {
            3: RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate")
        }
        engine = of(tiny, max_active=8)
        assert tokens_of(run(engine, requests)) == native(tiny, requests)
        assert engine.info.extra["standstills"] == 1
        sizes = [denoised for _, denoised in jetengine.batches if denoised in (4, 8)]
        assert [size for size, _ in itertools.groupby(sizes)][:3] == [8, 4, 8]

    def test_one_request_without_an_answer_costs_the_others_nothing(self, jetengine, tiny, monkeypatch):
        engine = of(tiny)
        prompts = random_prompts((5, 6, 7, 8))
        requests = [GenerationRequest(p, new, GREEDY) for p, new in zip(prompts, (9, 10, 9, 9), strict=True)]
        expected = native(tiny, requests)
        params = engine.jetengine.SamplingParams
        monkeypatch.setattr(  # the request for 10 tokens ends too early
            engine.jetengine,
            "SamplingParams",
            lambda **given: params(**given | {"max_tokens": 1 if given["max_tokens"] == 10 else given["max_tokens"]}),
        )
        results = {}
        with pytest.raises(EngineError, match=r"^1 of 4 requests have no answer.*Number 1: .* returned \d of 10"):
            results.update(engine.generate(requests))
        assert tokens_of(results[i] for i in (0, 2, 3)) == [expected[i] for i in (0, 2, 3)]


class TestWarmUp:
    """JetEngine compiles at its first steps: the time for these counts as loading, not as generation."""

    def test_it_runs_before_the_first_request_and_counts_nothing(self, jetengine, tiny):
        other = dataclasses.replace(GREEDY, remasking_strategy="sequential")
        requests = [GenerationRequest(p, 30, d) for d in (GREEDY, other) for p in random_prompts((3, 20, 40))]
        expected = native(tiny, requests)
        engine = of(tiny)
        engine.prepare(requests)
        of_strategy = [params.remasking_strategy for params in jetengine.sampled]
        assert {"low_confidence_static", "sequential"} == set(of_strategy)
        assert max(denoised for _, denoised in jetengine.batches) >= 2
        assert engine.info.extra["steps"] == engine.info.extra["steps_without_graph"] == 0
        jetengine.batches.clear()
        engine.prepare(requests)
        assert not jetengine.batches
        assert tokens_of(run(engine, requests)) == expected

    def test_draws_are_as_without(self, jetengine, tiny):
        decoding = DecodingConfig(temperature=2.0, remasking_strategy="sequential")
        requests = [GenerationRequest((5, 6, 7), 8, decoding, seed=i) for i in range(3)]
        jetengine.faults.alone = False
        warm = of(tiny)
        warm.prepare(requests)
        drawn = tokens_of(run(warm, requests))
        assert tokens_of(run(of(tiny), requests)) == drawn


class TestTensorParallel:
    """Tensor parallelism of 0.1.0, which starts a process for each GPU but the first."""

    @pytest.fixture(autouse=True)
    def two(self, jetengine_010, monkeypatch):
        gpu_on_the_cpu(monkeypatch, gpus=2)

    @pytest.fixture
    def even(self, tmp_path):
        return Checkpoint.open(str(random_checkpoint(tmp_path, head_dim=32, vocab_size=712)))

    def test_answers_are_the_same(self, jetengine_010, even):
        engine = of(even, tensor_parallel_size=2)
        requests = [GenerationRequest(p, 9, GREEDY) for p in random_prompts((3, 8))]
        assert tokens_of(run(engine, requests)) == native(even, requests)
        (worker,) = jetengine_010.made[-1].ps
        assert worker.is_alive()
        engine.close()
        assert not worker.is_alive()

    def test_sequences_of_a_step_fit_its_message(self, jetengine_010, even, monkeypatch):
        requests = [GenerationRequest((700,) * 5, 8, GREEDY, seed=i) for i in range(12)]
        monkeypatch.setattr(loading, "MESSAGE_BYTES", 9 * memory.message_bytes(requests[0]))
        assert len(run(of(even, tensor_parallel_size=2), requests)) == 12
        assert max(denoised for _, denoised in jetengine_010.batches) == 8

    def test_pages_are_those_that_all_gpus_have(self, jetengine_010, even, monkeypatch):
        def pages(of_second):
            monkeypatch.setattr(
                torch.cuda, "mem_get_info", lambda gpu=0: ((of_second if gpu == 1 else 79) * GIB, 80 * GIB)
            )
            engine = of(even, tensor_parallel_size=2, gpu_memory_utilization=0.9)
            engine.prepare([GenerationRequest((1,) * 8, 8, GREEDY)])
            found = engine.loaded.llm.config.num_kvcache_blocks
            engine.close()
            return found

        a_page = memory.bytes_per_page(even.full_config(), 2)
        assert pages(79) - pages(69) == 10 * GIB // a_page

    @pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory"), RuntimeError("NCCL error")])
    def test_no_process_stays_after_an_error(self, jetengine_010, even, error):
        engine = of(even, tensor_parallel_size=2)
        jetengine_010.faults.at_step[1] = error
        with pytest.raises(EngineError, match=r"JetEngine 0\.1\.0 stopped"):
            run(engine, [GenerationRequest((1, 2), 8, GREEDY)])
        assert not any(worker.is_alive() for worker in jetengine_010.made[-1].ps)
        jetengine_010.faults.alone = False
        assert len(run(engine, [GenerationRequest((1, 2), 8, GREEDY)])) == 1  # by a JetEngine loaded anew
        assert len(jetengine_010.made) == 2

    def test_no_process_stays_of_a_failed_start(self, jetengine_010, even):
        jetengine_010.faults.at_start = RuntimeError("the port is taken")
        with pytest.raises(EngineError, match="did not start"):
            of(even, tensor_parallel_size=2).prepare([GenerationRequest((1, 2), 8, GREEDY)])
        assert not multiprocessing.active_children()


class TestGraphs:
    def test_steps_have_a_number_of_sequences_that_has_a_graph(self, jetengine_020, tiny):
        """When fewer are left, fillers run with them, and are not returned."""
        requests = [GenerationRequest(p, 5 + 6 * i, GREEDY) for i, p in enumerate(random_prompts([8] * 4))]
        engine = of(tiny)
        assert tokens_of(run(engine, requests)) == native(tiny, requests)
        assert {denoised for _, denoised in jetengine_020.batches} == {0, 4, 2, 1}
        assert engine.info.extra["steps_without_graph"] == 0
        assert engine.info.extra["steps"] == len(jetengine_020.batches)

    def test_steps_without_a_graph_are_counted(self, jetengine_020, tiny):
        """While requests wait, there are no fillers, and sequences that are prefilled are not denoised in that step."""
        requests = [GenerationRequest(p, 5 + 6 * i, GREEDY) for i, p in enumerate(random_prompts([8] * 7))]
        engine = of(tiny)
        run(engine, requests)
        others = [denoised for _, denoised in jetengine_020.batches if denoised not in (0, 1, 2, 4)]
        assert engine.info.extra["steps_without_graph"] == len(others) > 0

    def test_no_more_run_than_that(self, jetengine, tiny):
        run(of(tiny, max_active=3), [GenerationRequest(p, 5, GREEDY) for p in random_prompts([8] * 5)])
        assert max(denoised for _, denoised in jetengine.batches) == 2

    def test_without_graphs_nobody_is_added(self, jetengine, tiny):
        engine = of(tiny, enforce_eager=True)
        run(engine, [GenerationRequest(p, 5 + 4 * i, GREEDY) for i, p in enumerate(random_prompts([8] * 4))])
        assert {denoised for _, denoised in jetengine.batches} == {0, 1, 2, 3, 4}
        assert engine.loaded.llm.config.enforce_eager
        assert not engine.info.extra["cuda_graphs"]

    def test_graphs_are_on_where_there_are_any(self, jetengine, tiny):
        engine = of(tiny)
        engine.prepare([GenerationRequest((1,), 4, GREEDY)])
        assert (
            engine.info.extra["cuda_graphs"]
            == (not engine.loaded.llm.config.enforce_eager)
            == (jetengine.version == "0.2.0")
        )


class TestTheProcess:
    """What JetEngine does to the process that it runs in."""

    def test_nothing_is_printed(self, jetengine, tiny, capsys, caplog, monkeypatch):
        """0.2.0 prints when it starts, and in each step in which a sequence waits for a page."""
        monkeypatch.setattr(loading.Loaded, "at_once", lambda self, _: 2)
        jetengine.faults.pages = {"0.2.0": 3, "0.1.0": 7}[jetengine.version]
        with caplog.at_level(logging.DEBUG):
            run(of(tiny), [GenerationRequest(p, 12, GREEDY) for p in random_prompts((250, 251))])
        assert capsys.readouterr().out == ""
        for printed in ("JetEngine: [KVCache]", "JetEngine: [Warning] no page"):
            assert (printed in caplog.text) == (jetengine.version == "0.2.0")

    def test_torchs_defaults_are_as_they_were(self, jetengine, tiny):
        def defaults():
            device = torch.get_default_device()  # transformers calls it when it loads the next model
            assert str(device) == "cpu"
            return torch.utils._device.CURRENT_DEVICE, torch.get_default_dtype()

        engine = of(tiny)
        run(engine, [GenerationRequest((1, 2, 3), 4, GREEDY)])
        assert defaults() == (None, torch.float32)
        jetengine.faults.alone = False
        jetengine.faults.at_start = RuntimeError("no kernel image")
        with pytest.raises(EngineError, match=r"did not start: RuntimeError: no kernel image"):
            of(tiny).prepare([GenerationRequest((1, 2, 3), 4, GREEDY)])
        assert defaults() == (None, torch.float32)

    def test_a_second_run_on_a_machine_says_so(self, jetengine, tiny):
        jetengine.faults.at_start = RuntimeError("port: 2333, code: -98, message: address already in use")
        reason = r"in use\. One run of it fits a machine" if jetengine.version == "0.1.0" else "in use$"
        with pytest.raises(EngineError, match=reason):
            of(tiny).prepare([GenerationRequest((1, 2, 3), 4, GREEDY)])

    def test_settings_that_are_the_same_for_all_are_not_taken_for_that_afterwards(self, jetengine_020, tiny):
        engine = of(tiny)
        results = engine.generate([GenerationRequest((1, 2, 3), new, GREEDY) for new in (4, 40)])
        next(results)
        assert engine.loaded.llm.scheduler.consistent_sampling_params
        results.close()
        assert not engine.loaded.llm.scheduler.consistent_sampling_params

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16", "auto"])
    def test_the_dtype_reaches_jetengine(self, jetengine, tiny, dtype):
        engine = of(tiny, dtype=dtype)  # the checkpoint's own is float32
        engine.prepare([GenerationRequest((1,), 4, GREEDY)])
        expected = torch.float16 if dtype == "float16" else torch.bfloat16
        config = engine.loaded.llm.config
        assert (config.torch_dtype if jetengine.version == "0.2.0" else config.hf_config.torch_dtype) == expected
        assert f"torch.{engine.info.dtype}" == str(expected)

    def test_the_checkpoints_own_dtype(self, jetengine, tiny, tmp_path):
        assert of(variant(tiny, tmp_path / "a", torch_dtype="float16")).info.dtype == "float16"
        assert of(variant(tiny, tmp_path / "b", torch_dtype=None, dtype="float16")).info.dtype == "float16"

    def test_facts(self, jetengine, demo):
        info = of(demo, max_active=9).info.as_dict()
        assert (info["engine"], info["engine_version"]) == ("jetengine", jetengine.version)
        assert len(info["engine_commit"]) == 40
        assert (info["device"], info["gpu"], info["max_active"]) == ("cuda:0", "a GPU on the CPU", 9)
        assert {"sampling", "mask_token"} <= set(info["deviations"])
        assert json.loads(json.dumps(info)) == info


class TestCheckpoints:
    def test_no_code_of_a_checkpoint_is_run(self, jetengine, tiny, tmp_path):
        """JetEngine itself runs the code that a checkpoint's folder names."""
        checkpoint = variant(
            tiny, tmp_path / "evil", auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
        )
        settings = json.loads((checkpoint.folder / "tokenizer_config.json").read_text())
        settings["auto_map"] = {"AutoTokenizer": ["evil.Tokenizer", None]}
        (checkpoint.folder / "tokenizer_config.json").write_text(json.dumps(settings))
        (checkpoint.folder / "evil.py").write_text(f"open({str(tmp_path / 'was_here')!r}, 'w')\nraise SystemExit\n")
        request = GenerationRequest((1, 2, 3, 4, 5), 8, GREEDY)
        engine = of(checkpoint)
        assert tokens_of(run(engine, [request])) == native(tiny, [request])
        assert not (tmp_path / "was_here").exists()
        # Versions of transformers differ in which they prefer, the folder's code or a registered class.
        assert not hasattr(engine.loaded.llm.config.hf_config, "auto_map")

    def test_the_folder_that_jetengine_opens(self, jetengine, tiny, monkeypatch):
        engine, seen = of(tiny), {}

        def look(folder, **options):
            seen.update({path.name: path.is_symlink() for path in Path(folder).iterdir()})
            return made(folder, **options)

        made = engine.jetengine.LLM
        monkeypatch.setattr(engine.jetengine, "LLM", look)
        engine.prepare([GenerationRequest((1,), 4, GREEDY)])
        copied = ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
        assert seen == {"model.safetensors": True, **dict.fromkeys(copied, False)}
        assert not Path(engine.loaded.llm.config.model).exists()

    def test_the_mask_token_is_config_jsons(self, jetengine, tiny, tmp_path):
        """0.1.0 itself takes the tokenizer's."""
        checkpoint = variant(tiny, tmp_path / "mask")
        settings = json.loads((checkpoint.folder / "tokenizer_config.json").read_text())
        (checkpoint.folder / "tokenizer_config.json").write_text(json.dumps(settings | {"mask_token": "<|im_start|>"}))
        checkpoint = Checkpoint.open(str(checkpoint.folder))
        assert checkpoint.mask_token_id != checkpoint.tokenizer.mask_token_id
        request = GenerationRequest((1, 2, 3, 4, 5), 8, GREEDY)
        assert tokens_of(run(of(checkpoint), [request])) == native(tiny, [request])

    def test_a_mask_token_that_jetengine_cannot_have_is_an_error(self, jetengine_010, tmp_path):
        checkpoint = Checkpoint.open(str(random_checkpoint(tmp_path, head_dim=32, vocab_size=720, mask_token_id=715)))
        with pytest.raises(EngineError, match=r"takes \d+ for the mask token, not 715"):
            of(checkpoint).prepare([GenerationRequest((1,), 4, GREEDY)])

    @pytest.mark.parametrize(
        "rope",
        [
            {"rope_theta": 2000},
            {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 2000.0}},
            {"rope_theta": 2000, "rope_scaling": {"rope_type": "default"}},
            {"rope_theta": 2000, "rope_scaling": {"type": "default"}},
            {"rope_theta": None},  # transformers takes 10,000 for it, JetEngine 1,000,000
        ],
        ids=str,
    )
    def test_the_rotary_base(self, jetengine, tiny, tmp_path, rope):
        checkpoint = variant(tiny, tmp_path / "rope", **rope)
        requests = [GenerationRequest(p, 8, GREEDY) for p in random_prompts((30, 31))]
        expected = native(checkpoint, requests)
        assert expected != native(tiny, requests)
        assert tokens_of(run(of(checkpoint), requests)) == expected

    @pytest.mark.parametrize("tied", [True, False, None])
    def test_tied_embeddings(self, jetengine, tmp_path, tied):
        folder = random_checkpoint(tmp_path / "tied", head_dim=32, tie_word_embeddings=bool(tied))
        checkpoint = with_config(folder, tie_word_embeddings=tied)
        requests = [GenerationRequest(p, 5, GREEDY) for p in random_prompts((8, 9))]
        assert tokens_of(run(of(checkpoint), requests)) == native(checkpoint, requests)

    def test_several_weight_files(self, jetengine, tmp_path):
        folder = random_checkpoint(tmp_path / "shards", head_dim=32, shards=3)
        (folder / "consolidated.safetensors").write_bytes(b"no part of it")
        checkpoint = Checkpoint.open(str(folder))
        requests = [GenerationRequest(p, 5, GREEDY) for p in random_prompts((8, 9))]
        assert tokens_of(run(of(checkpoint), requests)) == native(checkpoint, requests)

    def test_keys_that_config_json_may_leave_out(self, jetengine, tiny, tmp_path):
        """Keys for which transformers has the right defaults, and JetEngine others or none."""
        names = ("hidden_act", "rms_norm_eps", "max_position_embeddings", "attention_bias", "tie_word_embeddings")
        checkpoint = variant(tiny, tmp_path / "short", **dict.fromkeys(names))
        requests = [GenerationRequest(p, 8, GREEDY) for p in random_prompts((8, 9))]
        assert tokens_of(run(of(checkpoint), requests)) == native(checkpoint, requests)


class TestRefusals:
    @pytest.mark.parametrize(
        ("config", "says"),
        [
            (
                {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
                "JetEngine knows no RoPE scaling. Use --model sdar",
            ),
            ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "JetEngine knows no RoPE scaling"),
            (
                {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
                "JetEngine knows no RoPE scaling",
            ),
            (
                {"head_dim": 24},
                "the checkpoint's heads have 24 dimensions; JetEngine's kernels take 16, 32, 64, 128, 256",
            ),
        ],
        ids=str,
    )
    def test_checkpoints(self, jetengine, tmp_path, config, says):
        checkpoint = Checkpoint.open(str(random_checkpoint(tmp_path, **{"head_dim": 32, **config})))
        with pytest.raises(UserError) as caught:
            of(checkpoint)
        assert f"JetEngine {jetengine.version} cannot run {checkpoint.name!r}: {says}" in str(caught.value)

    def test_a_mixture_of_experts_on_020(self, jetengine_020, tmp_path):
        checkpoint = Checkpoint.open(str(random_checkpoint(tmp_path, moe=True, head_dim=32)))
        with pytest.raises(UserError, match=r"no mixture-of-experts models. Use --model sdar or JetEngine 0.1.0"):
            of(checkpoint)

    @pytest.mark.parametrize(
        "config", [{"norm_topk_prob": False}, {"norm_topk_prob": None}, {"mlp_only_layers": [1]}], ids=str
    )
    def test_other_mixtures_of_experts_on_010(self, jetengine_010, tmp_path, config):
        """Without the key, `norm_topk_prob` is false, as in transformers."""
        checkpoint = with_config(random_checkpoint(tmp_path, moe=True, head_dim=32), **config)
        with pytest.raises(UserError, match="takes all layers for sparse and always normalizes"):
            of(checkpoint)

    def test_weights_that_do_not_fit_config_json(self, jetengine, tiny, tmp_path):
        with pytest.raises(UserError, match=r"the weights of checkpoint .* do not fit its config.json"):
            of(variant(tiny, tmp_path / "wrong", intermediate_size=100))

    @pytest.mark.parametrize(
        ("options", "says"),
        [
            ({"dtype": "float32"}, "dtype='float32': JetEngine takes bfloat16, float16 or auto; for others use "),
            ({"device": "cpu"}, "device='cpu': JetEngine runs on a GPU only; choose cuda or cuda:N, or use --model sd"),
            ({"device": "cuda:3"}, "device='cuda:3': this machine has 1 usable GPU(s); choose cuda:0 or auto."),
            ({"device": "gpu"}, "device='gpu' is unknown; choose cuda, cuda:N or auto"),
            ({"max_active": 0}, "max_active=0 is out of range: it must be 1 or more"),
            ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization=1.5 is out of range: it must be above 0 and"),
            ({"gpu_memory_utilization": "most"}, "gpu_memory_utilization='most' is not a number"),
            ({"tensor_parallel_size": 0}, "tensor_parallel_size=0 is out of range: it must be 1 or more"),
            ({"enforce_eager": "yes"}, "enforce_eager='yes' is neither true nor false"),
        ],
        ids=str,
    )
    def test_options(self, jetengine, tiny, options, says):
        with pytest.raises(UserError) as caught:
            of(tiny, **options)
        assert says in str(caught.value)

    def test_tensor_parallel(self, jetengine, demo, tmp_path):
        checkpoint = Checkpoint.open(str(random_checkpoint(tmp_path, head_dim=32, num_key_value_heads=1)))
        if jetengine.version == "0.2.0":
            with pytest.raises(UserError, match=r"tensor_parallel_size=2, but it gives the logits.* Use tensor_para"):
                of(demo, tensor_parallel_size=2)
        else:
            with pytest.raises(UserError, match="tensor_parallel_size=2 does not divide its num_key_value_heads=1"):
                of(checkpoint, tensor_parallel_size=2)
            with pytest.raises(UserError, match="tensor_parallel_size=2 does not divide its vocab_size=711"):
                of(demo, tensor_parallel_size=2)
            of(checkpoint, tensor_parallel_size=1)

    def test_gpus_that_010_does_not_take(self, jetengine_010, tiny, tmp_path, monkeypatch):
        even = Checkpoint.open(str(random_checkpoint(tmp_path, head_dim=32, vocab_size=712)))
        with pytest.raises(UserError, match=r"tensor_parallel_size=2: this machine has 1 usable GPU\(s\)\. Give at m"):
            of(even, tensor_parallel_size=2)
        gpu_on_the_cpu(monkeypatch, gpus=2)
        with pytest.raises(UserError, match=r"device='cuda:1': JetEngine 0.1.0 takes the first.*CUDA_VISIBLE_DEVICES"):
            of(tiny, device="cuda:1")

    def test_several_processes(self, jetengine, tiny, monkeypatch):
        monkeypatch.setattr(checks, "world_size", lambda: 2)
        if jetengine.version == "0.2.0":
            of(tiny)
        else:
            with pytest.raises(UserError, match=r"cannot run in several processes.*tensor_parallel_size=2 in one"):
                of(tiny)

    @pytest.mark.parametrize(
        ("settings", "says"),
        [
            ({"repetition_penalty": 1.1}, "repetition_penalty=1.1: JetEngine .* has none, or another"),
            ({"block_length": 3}, "block_length=3: JetEngine takes 1, 2, 4, 8, 16, 32, 64. Use --model sdar"),
            ({"block_length": 128}, "block_length=128: JetEngine takes"),
        ],
    )
    def test_decoding_settings(self, jetengine, tiny, settings, says):
        """The other requests, which could run, do not run either."""
        requests = [GenerationRequest((1, 2), 4, d) for d in (GREEDY, DecodingConfig(**settings))]
        with pytest.raises(UserError, match=says):
            next(of(tiny).generate(requests))
        with pytest.raises(UserError, match=says):
            of(tiny).prepare(requests)

    @pytest.mark.parametrize("strategy", ["entropy_bounded", "random"])
    def test_strategies_that_010_does_not_have(self, jetengine_010, tiny, strategy):
        with pytest.raises(
            UserError, match=f"remasking_strategy='{strategy}' is not in JetEngine 0.1.0, which has low"
        ):
            next(of(tiny).generate([GenerationRequest((1, 2), 4, DecodingConfig(remasking_strategy=strategy))]))
