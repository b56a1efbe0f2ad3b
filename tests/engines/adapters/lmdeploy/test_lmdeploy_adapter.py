"""The adapter on a stand-in that has LMDeploy's faults. The native engine's answers are the right ones."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import multiprocessing
import sys
import threading
import types
from pathlib import Path

import lm_eval
import lmdeploy_standin
import pytest
import torch
from asking import GREEDY, SHORT, check_refusals_of_lmdeploy, native, random_prompts, run, tokens_of
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager
from lmdeploy_standin import gpu_on_the_cpu, standin
from support import random_checkpoint, read_weights, write_weights

import sdar_lm_eval.tasks
from sdar_lm_eval import Checkpoint, DecodingConfig, EngineError, GenerationRequest, UserError, make_engine
from sdar_lm_eval.demo import prompts as demo_prompts
from sdar_lm_eval.engines.adapters import adapter
from sdar_lm_eval.engines.adapters.lmdeploy import checks, engine, group, loading, versions
from sdar_lm_eval.engines.adapters.lmdeploy.config import config_for_lmdeploy
from sdar_lm_eval.engines.adapters.lmdeploy.hooks import ForwardCounts
from sdar_lm_eval.lm.model import SDARLMDeployLM

DYNAMIC = DecodingConfig(temperature=0)
SAMPLED = DecodingConfig(remasking_strategy="sequential", temperature=1.0)


@pytest.fixture
def lmdeploy():
    with standin() as faults:
        yield faults


@pytest.fixture(scope="module")
def questions(demo):
    return demo_prompts(demo)


def variant(folder, *, leave_out=(), moe=False, **config):
    random_checkpoint(folder, head_dim=32, moe=moe)
    weights = read_weights(folder)
    weights["lm_head.weight"][Checkpoint.open(str(folder)).mask_token_id] = 0
    write_weights(folder, weights)
    settings = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps({k: v for k, v in settings.items() if k not in leave_out}))
    return Checkpoint.open(str(folder))


def of(checkpoint, **options):
    return make_engine("lmdeploy", checkpoint, **options)


class TestAnswers:
    @pytest.mark.parametrize("strategy", ["low_confidence_static", "low_confidence_dynamic", "sequential"])
    def test_they_are_the_native_engines(self, lmdeploy, demo, questions, strategy):
        decoding = dataclasses.replace(GREEDY, remasking_strategy=strategy)
        requests = [GenerationRequest(p, 24, decoding, frozenset(demo.stop_ids)) for p in questions[:3]]
        assert tokens_of(run(of(demo), requests)) == native(demo, requests)

    @pytest.mark.parametrize("block_length", [1, 2, 8, 16])
    def test_of_other_block_lengths(self, lmdeploy, tiny, block_length):
        decoding = dataclasses.replace(GREEDY, block_length=block_length, denoising_steps=block_length)
        requests = [GenerationRequest(p, 11, decoding) for p in random_prompts((1, 8, 21))]
        assert tokens_of(run(of(tiny), requests)) == native(tiny, requests)

    def test_of_a_mixture_of_experts(self, lmdeploy, tmp_path):
        checkpoint = variant(tmp_path, moe=True)
        requests = [GenerationRequest(p, 9, GREEDY) for p in random_prompts((3, 8, 21))]
        assert tokens_of(run(of(checkpoint), requests)) == native(checkpoint, requests)

    def test_confidence_is_a_probability_at_temperature_1(self, lmdeploy, tiny):
        """top_k=1 is greedy, whatever the temperature."""
        decodings = [dataclasses.replace(DYNAMIC, temperature=t, top_k=1, confidence_threshold=0.4) for t in (0.2, 3)]
        requests = [GenerationRequest(p, 12, decoding) for p in random_prompts((5, 8)) for decoding in decodings]
        assert tokens_of(run(of(tiny), requests)) == native(tiny, requests)

    def test_stop_tokens_that_are_none_can_be_in_an_answer(self, lmdeploy, demo, questions):
        """LMDeploy's `ignore_eos` would forbid them; its pipeline would add those of generation_config.json."""
        requests = [GenerationRequest(questions[SHORT], 48, GREEDY)]
        answers = tokens_of(run(of(demo), requests))
        assert answers == native(demo, requests)
        assert set(answers[0][0]) & set(demo.stop_ids)

    def test_a_prompt_can_hold_the_mask_token_and_stop_tokens(self, lmdeploy, tiny):
        mask = tiny.mask_token_id
        requests = [GenerationRequest((*p, mask, 7), 9, GREEDY, frozenset({7})) for p in random_prompts((4, 5, 6))]
        assert tokens_of(run(of(tiny), requests)) == native(tiny, requests)

    def test_forwards_are_counted(self, lmdeploy, tiny):
        """The first request has two full blocks of prompt and two blocks of answer, the first of them committed."""
        requests = [
            GenerationRequest(p, new, GREEDY) for p, new in zip(random_prompts((8, 6, 2)), (8, 6, 6), strict=True)
        ]
        counts = [
            (result.prefill_forwards, result.denoising_forwards, result.commit_forwards)
            for result in run(of(tiny), requests)
        ]
        # A prompt of 6 tokens has 2 in the answer's first block; the prefill is also this block's first denoising.
        assert counts == [(1, 8, 1), (1, 5, 1), (0, 6, 1)]


class TestRequestsThatRunTogether:
    def test_one_does_not_get_the_others_settings(self, lmdeploy, tiny):
        hot = dataclasses.replace(SAMPLED, temperature=9.0)
        cool = dataclasses.replace(SAMPLED, temperature=0.01)  # in effect greedy
        few = dataclasses.replace(hot, top_k=1)
        settings = [hot, cool, few, dataclasses.replace(hot, top_p=1e-6), dataclasses.replace(hot, top_k=2)]
        requests = [
            GenerationRequest(p, 8, settings[i % 5], seed=i) for i, p in enumerate(random_prompts([5, 6, 7, 8, 9] * 2))
        ]
        answers = tokens_of(run(of(tiny), requests))
        sequential = dataclasses.replace(GREEDY, remasking_strategy="sequential")
        greedy = native(tiny, [dataclasses.replace(request, decoding=sequential) for request in requests])
        same = [a == b for a, b in zip(answers, greedy, strict=True)]
        assert same == [i % 5 in (1, 2, 3) for i in range(10)]

    def test_another_number_of_stop_tokens_ends_no_answer(self, lmdeploy, tiny):
        requests = [
            GenerationRequest(p, 9, GREEDY, frozenset(stops))
            for p, stops in zip(random_prompts((5, 6, 7, 9)), ((), {701}, {701, 702}, {701, 702, 703}), strict=True)
        ]
        assert tokens_of(run(of(tiny), requests)) == native(tiny, requests)

    def test_draws_are_a_requests_own(self, lmdeploy, tiny):
        requests = [GenerationRequest(p, 7, SAMPLED, seed=i) for i, p in enumerate(random_prompts((3, 4, 5, 6, 9, 10)))]
        engine = of(tiny)
        together = tokens_of(run(engine, requests))
        assert together == [tokens_of(run(engine, [request]))[0] for request in requests]
        requests = [dataclasses.replace(request, seed=100 + i) for i, request in enumerate(requests)]
        other = tokens_of(run(engine, requests))
        assert all(a != b for a, b in zip(together, other, strict=True))

    def test_repeats_of_a_prompt_are_drawn_independently(self, lmdeploy, tiny):
        """LMDeploy itself gives the same random numbers to every (B / block_length)th of B requests."""
        hot = dataclasses.replace(SAMPLED, temperature=9.0)
        answers = tokens_of(run(of(tiny), [GenerationRequest((5, 6, 7, 8), 4, hot, seed=i) for i in range(64)]))
        assert len(set(answers)) == 64

    def test_the_positions_of_a_block_are_drawn_independently(self, lmdeploy, tiny):
        """LMDeploy itself draws all positions by one number: where all tokens are alike, tokens of the same rank."""
        hot = dataclasses.replace(SAMPLED, temperature=1e4, denoising_steps=1)
        answers = tokens_of(run(of(tiny), [GenerationRequest((5, 6, 7, 8), 4, hot, seed=i) for i in range(100)]))
        model = tiny.load_model(dtype=torch.float32, device="cpu", attention="sdpa")
        ids = torch.tensor([5, 6, 7, 8, *[tiny.mask_token_id] * 4])
        block = torch.arange(8) // 4
        sees = torch.zeros(8, 8).masked_fill(block[:, None] < block, -torch.inf)
        order = model(ids[None], attention_mask=sees[None, None]).logits[0, 4:].argsort(-1, descending=True)
        ranks = torch.tensor([[int((order[j] == token).nonzero()) for j, token in enumerate(t)] for t, _ in answers])
        assert (torch.corrcoef(ranks.T.float()) - torch.eye(4)).abs().max() < 0.4

    def test_the_mask_token_is_not_drawn(self, lmdeploy, tiny):
        hot = dataclasses.replace(SAMPLED, temperature=1e4, denoising_steps=1)
        results = run(of(tiny), [GenerationRequest((5, 6), 18, hot, seed=i) for i in range(90)])
        drawn = {token for result in results for token in result.token_ids}
        assert tiny.mask_token_id not in drawn
        assert len(drawn) > 500  # top_k=0 allows all other tokens

    def test_a_temperature_that_its_own_settings_refuse(self, lmdeploy, tiny):
        run(of(tiny), [GenerationRequest((5,), 4, dataclasses.replace(SAMPLED, temperature=9.0))])
        assert lmdeploy.settings[-1].temperature == 9.0

    def test_top_k_beyond_the_vocabulary_is_off(self, lmdeploy, tiny):
        requests = [GenerationRequest((5,), 4, dataclasses.replace(SAMPLED, top_k=10**30), seed=3)]
        off = [GenerationRequest((5,), 4, SAMPLED, seed=3)]
        engine = of(tiny)
        assert tokens_of(run(engine, requests)) == tokens_of(run(engine, off))


class TestEnds:
    def test_a_stop_token_in_the_prompts_own_block(self, lmdeploy, tiny):
        """LMDeploy itself goes on to the limit; the adapter neither returns nor waits for what follows."""
        (prompt,) = random_prompts([6])
        engine = of(tiny)
        (whole,) = run(engine, [GenerationRequest(prompt, 2, GREEDY)])
        stop = frozenset(whole.token_ids[1:])
        (result,) = run(engine, [GenerationRequest(prompt, 400, GREEDY, stop)])
        assert tokens_of([result]) == native(tiny, [GenerationRequest(prompt, 400, GREEDY, stop)])
        assert result.denoising_forwards + result.commit_forwards < 20

    def test_a_stop_token_before_the_length_in_one_block(self, lmdeploy, tiny):
        requests = [GenerationRequest(p, 8, GREEDY) for p in random_prompts((4, 8))]
        whole = native(tiny, requests)
        stops = [frozenset(tokens[5:6]) for tokens, _ in whole]
        requests = [dataclasses.replace(r, stop_ids=stop) for r, stop in zip(requests, stops, strict=True)]
        answers = tokens_of(run(of(tiny), requests))
        assert answers == native(tiny, requests)
        assert all(reason == "stop" for _, reason in answers)

    def test_a_stop_string_of_several_tokens_ends_the_work(self, lmdeploy, demo, questions):
        (whole,) = run(of(demo), [GenerationRequest(questions[0], 24, GREEDY)])
        string = demo.decode(whole.token_ids[8:11])
        assert len(demo.tokenizer.encode(string, add_special_tokens=False)) > 1
        request = GenerationRequest(questions[0], 400, GREEDY, stop_strings=("never", string))
        (result,) = run(of(demo), [request])
        assert string in demo.decode(result.token_ids)
        assert string not in demo.decode(result.token_ids[:-1])
        assert result.finish_reason == "stop"
        assert result.commit_forwards < 8
        assert not lmdeploy.made[-1].sessions

    @pytest.mark.parametrize("block", [1, 2, 3, 4])
    def test_a_character_of_several_tokens_at_a_blocks_border(self, lmdeploy, demo, block):
        """Each byte of the character is a token, and the last byte comes with the next block."""
        before, stop = (demo.tokenizer.encode(text, add_special_tokens=False) for text in ("ab", "日"))
        assert len(stop) == 3
        given = [*before, *stop, *before * 20]
        sent = []

        class Instance:
            async def async_stream_infer(self, session, prompt, gen_config):
                for begin in range(0, len(given), block):
                    sent.append(begin)
                    yield types.SimpleNamespace(
                        status=types.SimpleNamespace(name="SUCCESS"), token_ids=given[begin : begin + block]
                    )

            async def async_cancel(self, session):
                sent.append("cancelled")

        engine = of(demo)
        loaded = types.SimpleNamespace(
            setup=engine.setup, lmdeploy=engine.lmdeploy, sessions=iter([1]),
            forwards=types.SimpleNamespace(take=lambda _: ForwardCounts()),
        )  # fmt: skip
        request = GenerationRequest((1, 2, 3), len(given), GREEDY, stop_strings=("日",))
        result = asyncio.run(group.Group(loaded, [request], [0]).answer(Instance(), request))
        end = len(before) + 3
        assert (list(result.token_ids), result.finish_reason) == (given[:end], "stop")
        assert sent == [*range(0, end, block), "cancelled"]

    def test_a_stop_string_of_one_token_is_told_to_lmdeploy(self, lmdeploy, demo, questions):
        (token,) = demo.tokenizer.encode("####", add_special_tokens=False)[:1]
        list(of(demo).generate([GenerationRequest(questions[0], 4, GREEDY, stop_strings=(demo.decode([token]),))]))
        assert lmdeploy.settings[-1].stop_words == [token]


class TestFailures:
    def test_one_request_without_an_answer_costs_the_others_nothing(self, lmdeploy, tiny, monkeypatch):
        engine = of(tiny, max_active=4)
        requests = [GenerationRequest(p, 9, GREEDY) for p in random_prompts((5, 6, 7, 8, 9, 10))]
        expected = native(tiny, requests)
        instance = sys.modules["lmdeploy.pytorch.engine"].Instance
        infer = instance.async_stream_infer

        async def refuses_one(self, session, prompt, **others):
            if len(prompt) == 6:
                yield types.SimpleNamespace(status=types.SimpleNamespace(name="INPUT_LENGTH_ERROR"), token_ids=[])
                return
            async for output in infer(self, session, prompt, **others):
                if len(prompt) == 9:  # a finish too early, after one token
                    yield types.SimpleNamespace(status=types.SimpleNamespace(name="FINISH"), token_ids=[1])
                    break
                yield output

        monkeypatch.setattr(instance, "async_stream_infer", refuses_one)
        results = {}
        told = (
            r"^2 of 6 requests have no answer.*Number 1: LMDeploy 0.18.0 refused it \(INPUT_L.*Number 4: .*1 of 9 tok"
        )
        with pytest.raises(EngineError, match=told):
            results.update(engine.generate(requests))
        assert sorted(results) == [0, 2, 3, 5]
        assert tokens_of(results[i] for i in (0, 2, 3, 5)) == [expected[i] for i in (0, 2, 3, 5)]
        monkeypatch.undo()


class TestLoading:
    def test_once_for_settings_that_need_no_other_engine(self, lmdeploy, tiny):
        engine = of(tiny)
        settings = [
            GREEDY,
            dataclasses.replace(GREEDY, confidence_threshold=0.1),
            dataclasses.replace(GREEDY, eb_threshold=0.1, temperature=0.5),
        ]
        requests = [GenerationRequest((1, 2, 3), 4, decoding) for decoding in settings]
        run(engine, requests)
        run(engine, requests[:1])
        assert engine.info.extra["loads"] == 1

    def test_it_warms_up_once_for_each_way_to_draw(self, lmdeploy, tiny):
        """Kernels that are compiled at the first steps are part of loading."""
        greedy = dataclasses.replace(SAMPLED, temperature=0.0)
        requests = [GenerationRequest(p, 30, d) for d in (SAMPLED, greedy) for p in random_prompts((3, 20, 40))]
        expected = tokens_of(run(of(tiny), requests))
        engine = of(tiny)
        lmdeploy.batches.clear()
        engine.prepare(requests)
        assert max(map(sum, lmdeploy.batches)) == 3
        assert {param.max_new_tokens for param in lmdeploy.settings[-3:]} == {4, 8, 12}
        lmdeploy.batches.clear()
        engine.prepare(requests)
        assert not lmdeploy.batches
        assert tokens_of(run(engine, requests)) == expected

    def test_again_for_others_and_those_of_the_loaded_one_first(self, lmdeploy, tiny, caplog):
        caplog.set_level(logging.INFO)
        engine = of(tiny)
        a, b = (dataclasses.replace(DYNAMIC, confidence_threshold=threshold) for threshold in (0.1, 0.9))
        requests = [GenerationRequest(p, 9, decoding) for p in random_prompts((5, 6)) for decoding in (a, b)]
        expected = native(tiny, requests)
        assert tokens_of(run(engine, requests)) == expected
        assert "loaded once more" in caplog.text
        assert "2 kind(s)" in caplog.text
        assert tokens_of(run(engine, requests)) == expected
        assert engine.info.extra["loads"] == 3
        assert [made.closed for made in lmdeploy.made] == [True, True, False]

    def test_again_for_more_at_once_but_not_for_fewer(self, lmdeploy, tiny):
        engine = of(tiny)
        for number, loads in ((3, 1), (4, 1), (2, 1), (5, 2)):
            run(engine, [GenerationRequest((1, 2), 2, GREEDY)] * number)
            assert engine.info.extra["loads"] == loads
        assert lmdeploy.made[-1].engine_config.max_batch_size == 8

    def test_all_settings_reach_it(self, lmdeploy, tiny):
        decoding = DecodingConfig(block_length=16, denoising_steps=8, remasking_strategy="sequential", temperature=0)
        engine = of(tiny, cache_max_entry_count=0.3, dtype="float16", max_active=3)
        run(engine, [GenerationRequest((1, 2), 2, decoding)] * 9)
        config = lmdeploy.made[-1].engine_config
        assert (config.dllm_block_length, config.dllm_denoising_steps) == (16, 8)
        assert (config.dllm_unmasking_strategy, config.dtype) == ("sequential", "float16")
        assert (config.cache_max_entry_count, config.max_batch_size) == (0.3, 3)
        assert config.session_len == tiny.max_length
        assert max(sum(batch) for batch in lmdeploy.batches) == lmdeploy.made[-1].most_sessions == 3

    def test_many_sequences_of_long_blocks_fit_a_prefill(self, lmdeploy, tiny, monkeypatch):
        monkeypatch.setattr(adapter, "warm_up_requests", lambda *_: [])  # a long run on the CPU
        decoding = dataclasses.replace(GREEDY, block_length=64, denoising_steps=64, remasking_strategy="sequential")
        engine = of(tiny, max_active=200)
        engine.prepare([GenerationRequest((1, 2), 2, decoding)] * 200)
        assert lmdeploy.made[-1].engine_config.max_batch_size == 200

    def test_logits_bound_the_sequences_at_once(self, lmdeploy, tiny, monkeypatch):
        gpu_on_the_cpu(monkeypatch, total=8 * tiny.config["vocab_size"] * loading.BYTES_PER_LOGIT * 4 * 10)
        engine = of(tiny)
        engine.prepare([GenerationRequest((1, 2), 2, GREEDY)] * 100)
        assert engine.info.max_active == 8

    def test_closing_ends_lmdeploy(self, lmdeploy, tiny):
        of(tiny).close()  # nothing is loaded yet
        with of(tiny) as engine:
            engine.prepare([GenerationRequest((1, 2), 2, GREEDY)])
            assert not lmdeploy.made[-1].closed
        assert lmdeploy.made[-1].closed
        assert not [thread for thread in threading.enumerate() if thread.name == "lmdeploy"]

    @pytest.mark.parametrize("error", [RuntimeError("No enough gpu memory for kv cache."), SystemExit(1)])
    def test_it_does_not_start(self, lmdeploy, tiny, error):
        engine = of(tiny)
        lmdeploy.at_start = error
        with pytest.raises(EngineError, match=r"did not start: (RuntimeError: No enough|SystemExit).*max_active"):
            engine.prepare([GenerationRequest((1, 2), 2, GREEDY)])
        lmdeploy.at_start = None
        assert len(run(engine, [GenerationRequest((1, 2), 2, GREEDY)])) == 1

    def test_another_mask_token_is_an_error(self, lmdeploy, tiny, monkeypatch):
        engine = of(tiny)
        builder = sys.modules["lmdeploy.pytorch.configurations.builder"].AutoModelConfigBuilder
        wrong = type("Wrong", (), {"dllm_mask_token": 3, "model_paradigm": "dllm"})
        monkeypatch.setattr(builder, "build", lambda *_: wrong)
        with pytest.raises(EngineError, match="takes 3 for the mask token"):
            engine.prepare([GenerationRequest((1, 2), 2, GREEDY)])

    def test_the_log_of_others_stays_as_it_is(self, lmdeploy, tiny, monkeypatch):
        for name in [name for name in sys.modules if name.partition(".")[0] == "lmdeploy"]:
            monkeypatch.delitem(sys.modules, name)  # LMDeploy changes the log when it is imported
        handler = logging.StreamHandler()
        handler.setLevel(logging.INFO)
        logging.getLogger().addHandler(handler)
        try:
            of(tiny)
            assert handler.level == logging.INFO
        finally:
            logging.getLogger().removeHandler(handler)

    def test_its_thread_has_the_device(self, lmdeploy, tiny, monkeypatch):
        gpu_on_the_cpu(monkeypatch, gpus=2)
        lmdeploy_standin.devices.clear()
        of(tiny, device="cuda:1").prepare([GenerationRequest((1, 2), 2, GREEDY)])
        assert set(lmdeploy_standin.devices) == {("MainThread", "cuda:1"), ("lmdeploy", "cuda:1")}


class TestFolder:
    def check(self, lmdeploy, checkpoint):
        requests = [GenerationRequest(p, 9, GREEDY) for p in random_prompts((5, 30))]
        assert tokens_of(run(of(checkpoint), requests)) == native(checkpoint, requests)

    def test_it_holds_no_code_and_names_none(self, lmdeploy, tmp_path):
        checkpoint = variant(tmp_path, auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})
        (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
        self.check(lmdeploy, checkpoint)
        assert not any(name.endswith(".py") for name in lmdeploy.files[0])

    def test_a_window_that_is_not_used(self, lmdeploy, tmp_path):
        self.check(lmdeploy, variant(tmp_path, sliding_window=4, use_sliding_window=False))

    def test_keys_that_are_not_there(self, lmdeploy, tmp_path):
        names = (
            "attention_bias",
            "sliding_window",
            "use_sliding_window",
            "bos_token_id",
            "eos_token_id",
            "torch_dtype",
            "rms_norm_eps",
            "tie_word_embeddings",
        )
        self.check(lmdeploy, variant(tmp_path, leave_out=names))

    def test_the_default_vocabulary(self, lmdeploy, tmp_path):
        random_checkpoint(tmp_path, head_dim=32, vocab_size=151936, leave_out=["vocab_size"])
        checkpoint = Checkpoint.open(tmp_path)
        self.check(lmdeploy, checkpoint)
        sampled = dataclasses.replace(SAMPLED, top_k=151936)
        assert run(of(checkpoint), [GenerationRequest((1, 2), 4, sampled)])

    def test_keys_of_experts_that_are_not_there(self, lmdeploy, tmp_path):
        """LMDeploy gets transformers' defaults, by which the native engine decodes too."""
        names = ("mlp_only_layers", "decoder_sparse_step", "norm_topk_prob")
        config = config_for_lmdeploy(variant(tmp_path, moe=True, leave_out=names), "bfloat16")
        assert [config[name] for name in names] == [[], 1, False]

    def test_keys_that_would_trip_it(self, lmdeploy, tiny, tmp_path):
        checkpoint = variant(tmp_path, pad_token_id=151643, quantization_config=None)
        requests = [GenerationRequest(p, 9, GREEDY) for p in random_prompts((5, 30))]
        assert tokens_of(run(of(checkpoint), requests)) == native(tiny, requests)

    @pytest.mark.parametrize(
        "rope",
        [
            {"rope_theta": 500.0, "rope_scaling": None},
            {"rope_theta": None, "rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}},
        ],
    )
    def test_the_rotary_base(self, lmdeploy, tmp_path, rope):
        leave_out = () if rope["rope_theta"] else ("rope_theta",)
        self.check(lmdeploy, variant(tmp_path, leave_out=leave_out, **rope))

    def test_rope_scaling_in_its_older_spelling(self, tmp_path):
        checkpoint = variant(tmp_path, rope_scaling={"type": "linear", "factor": 2.0}, rope_theta=500.0)
        rope = config_for_lmdeploy(checkpoint, "bfloat16")["rope_parameters"]
        assert rope == {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}


class TestMemory:
    def test_no_sequence_is_evicted(self, lmdeploy, tiny):
        lmdeploy.pages = 21
        requests = [GenerationRequest(p, 50 + i, GREEDY) for i, p in enumerate(random_prompts(range(60, 72)))]
        assert tokens_of(run(of(tiny), requests)) == native(tiny, requests)
        assert max(sum(batch) for batch in lmdeploy.batches) > 1

    def test_what_has_no_room_is_not_cut_short(self, lmdeploy, tiny):
        lmdeploy.pages = 4
        requests = [GenerationRequest((1, 2), 4, GREEDY), GenerationRequest((1, 2), 300, GREEDY)]
        with pytest.raises(UserError, match=r"needs 304 tokens in whole blocks; LMDeploy has room for 128"):
            run(of(tiny), requests)
        assert not lmdeploy.batches


class TestCrashes:
    def test_what_is_finished_is_kept(self, lmdeploy, tiny):
        requests = [GenerationRequest((1, 2, 3), new, GREEDY, seed=new) for new in (60, 4, 4, 4)]
        expected = native(tiny, requests)
        engine = of(tiny, max_active=2)
        lmdeploy.at_step[20] = RuntimeError("CUDA error")
        kept = {}
        with pytest.raises(EngineError, match=r"LMDeploy 0.18.0 stopped \(ENGINE_STOP_ERROR\)"):
            for index, result in engine.generate(requests):
                kept[index] = result
        assert 2 <= len(kept) < 4
        assert all(tokens_of([result])[0] == expected[index] for index, result in kept.items())
        assert tokens_of(run(engine, requests)) == expected  # on a new engine
        assert engine.info.extra["loads"] == 2

    def test_an_abandoned_run_leaves_nothing_behind(self, lmdeploy, tiny):
        engine = of(tiny, max_active=2)
        requests = [GenerationRequest((1, 2, 3, i), 4 + 40 * i, GREEDY) for i in range(4)]
        generation = engine.generate(requests)
        next(generation)
        generation.close()
        assert not lmdeploy.made[-1].sessions
        assert tokens_of(run(engine, requests)) == native(tiny, requests)
        assert engine.info.extra["loads"] == 1

    def test_an_answer_without_an_end_is_an_error(self, lmdeploy, tiny, monkeypatch):
        engine = of(tiny)
        run(engine, [GenerationRequest((1, 2), 4, GREEDY)])
        lmdeploy.made[-1].max_session_len = 5  # LMDeploy cuts the answer at 3 tokens, and calls it finished
        monkeypatch.setattr(loading, "check_lengths", lambda *_: None)
        with pytest.raises(EngineError, match="3 of 4 tokens, and none that ends the answer"):
            run(engine, [GenerationRequest((1, 2), 4, GREEDY)])


class TestRefusals:
    @pytest.mark.parametrize(
        ("decoding", "reason"),
        [
            ({"remasking_strategy": "entropy_bounded"}, "entropy_bounded.*low_confidence_dynamic.*--model sdar"),
            ({"remasking_strategy": "random"}, "'random' is not in LMDeploy"),
            ({"repetition_penalty": 1.1}, "repetition_penalty=1.1.*the answer's tokens alone"),
            ({"block_length": 3, "denoising_steps": 3}, "block_length=3.*1, 2, 4, 8"),
        ],
    )
    def test_settings(self, lmdeploy, tiny, decoding, reason):
        requests = [
            GenerationRequest((1, 2), 2, GREEDY),
            GenerationRequest((1, 2), 2, dataclasses.replace(GREEDY, **decoding)),
        ]
        for refused in (lambda: of(tiny).prepare(requests), lambda: next(iter(of(tiny).generate(requests)))):
            with pytest.raises(UserError, match=reason):
                refused()
        assert not lmdeploy.made

    def test_those_that_the_real_lmdeploy_is_asked_for_too(self, lmdeploy, tiny):
        check_refusals_of_lmdeploy(of(tiny), (1, 2, 3))
        assert not lmdeploy.made

    def test_more_than_the_checkpoint_has_places_for(self, lmdeploy, tiny):
        with pytest.raises(UserError, match=r"needs 3,004 tokens.*takes 2,048"):
            of(tiny).prepare([GenerationRequest((1, 2), 3000, GREEDY)])

    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            ({"device": "cpu"}, "device='cpu'.*GPU only"),
            ({"device": "cuda:3"}, r"has 1 usable GPU\(s\); choose cuda:0 or auto\."),
            ({"dtype": "float32"}, "dtype='float32'.*bfloat16, float16"),
            ({"cache_max_entry_count": 1}, "cache_max_entry_count=1 is out of range: it must be above 0 and below 1"),
            ({"cache_max_entry_count": "all"}, "'all' is not a number"),
            ({"max_active": 0}, "max_active=0 is out of range"),
            ({"tensor_parallel_size": 0}, "tensor_parallel_size=0 is out of range"),
            ({"data_parallel_size": 2}, "data_parallel_size=2, but 1 process.*accelerate launch.*--num_processes 2"),
        ],
    )
    def test_options(self, lmdeploy, tiny, options, reason):
        with pytest.raises(UserError, match=reason):
            of(tiny, **options)

    def test_checkpoints(self, lmdeploy, tmp_path):
        with pytest.raises(UserError, match=r"hidden_act is 'gelu'.*Use --model sdar"):
            of(variant(tmp_path / "gelu", hidden_act="gelu"))
        with pytest.raises(UserError, match="heads have 24 dimensions"):
            of(Checkpoint.open(str(random_checkpoint(tmp_path / "heads"))))
        checkpoint = variant(tmp_path / "cut short")
        (checkpoint.folder / "model.safetensors").write_bytes(b"")
        with pytest.raises(UserError, match="not a whole safetensors file"):
            of(checkpoint)


class TestSeveralGPUs:
    @pytest.fixture(autouse=True)
    def four(self, lmdeploy, monkeypatch):
        gpu_on_the_cpu(monkeypatch, gpus=4)

    @pytest.mark.parametrize("executor", ["ray", "mp"])
    def test_tensor_parallel(self, lmdeploy, tiny, monkeypatch, executor):
        if executor == "ray":
            monkeypatch.setattr(versions, "is_there", lambda module: True)
            monkeypatch.setitem(sys.modules, "ray", type(sys)("ray"))
        before = set(threading.enumerate())
        engine = of(tiny, tensor_parallel_size=2)
        requests = [GenerationRequest(p, 9, GREEDY) for p in random_prompts((3, 8))]
        assert tokens_of(run(engine, requests)) == native(tiny, requests)
        made = lmdeploy.made[-1]
        assert (made.engine_config.tp, made.engine_config.distributed_executor_backend) == (2, executor)
        assert (engine.info.extra["tensor_parallel_size"], engine.info.extra["executor"]) == (2, executor)
        assert engine.peak_memory_bytes() > 0
        assert [worker.is_alive() for worker in made.workers] == [True] * (2 if executor == "mp" else 0)
        # At its end, Python first waits for threads that are no daemons, then ends the workers.
        assert all(thread.daemon for thread in set(threading.enumerate()) - before)
        engine.close()
        assert not any(worker.is_alive() for worker in made.workers)

    def test_a_worker_that_dies_is_an_error(self, lmdeploy, tiny, monkeypatch):
        monkeypatch.setattr(group, "WATCH", 0.1)
        engine = of(tiny, tensor_parallel_size=2)
        generation = engine.generate(
            [GenerationRequest(p, n, GREEDY) for p, n in zip(random_prompts((3, 8)), (4, 900), strict=True)]
        )
        next(generation)
        workers = lmdeploy.made[-1].workers
        workers[1].kill()
        with pytest.raises(EngineError, match=r"a worker process of LMDeploy ended.*Finished answers are kept"):
            list(generation)
        assert not any(worker.is_alive() for worker in workers)
        assert len(run(engine, [GenerationRequest((1, 2), 4, GREEDY)])) == 1  # with new workers

    def test_no_worker_stays_of_an_engine_that_did_not_start(self, lmdeploy, tiny):
        lmdeploy.at_start = RuntimeError("no memory")
        with pytest.raises(EngineError, match="did not start"):
            of(tiny, tensor_parallel_size=2).prepare([GenerationRequest((1, 2), 4, GREEDY)])
        assert not multiprocessing.active_children()

    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            ({"tensor_parallel_size": 8}, "tensor_parallel_size=8: this machine has 4"),
            ({"tensor_parallel_size": 3}, "does not divide num_attention_heads=4"),
            ({"tensor_parallel_size": 2, "device": "cuda:1"}, "device='cuda:1'.*CUDA_VISIBLE_DEVICES"),
        ],
    )
    def test_what_cannot_be_shared_out(self, tiny, options, reason):
        with pytest.raises(UserError, match=reason):
            of(tiny, **options)

    def test_a_default_number_of_heads_cannot_be_shared_out(self, tmp_path):
        with pytest.raises(UserError, match="does not divide num_attention_heads=32"):
            of(variant(tmp_path, leave_out=["num_attention_heads"]), tensor_parallel_size=3)

    def test_key_value_heads_can_be_fewer_than_gpus(self, tiny):
        engine = of(tiny, tensor_parallel_size=4)
        assert tiny.config["num_key_value_heads"] == 2 and engine.info.extra["tensor_parallel_size"] == 4

    def test_processes(self, tiny, monkeypatch):
        for module in (engine, checks):
            monkeypatch.setattr(module, "world_size", lambda: 2)
        assert of(tiny, data_parallel_size=2).info.extra["data_parallel_size"] == 2
        with pytest.raises(UserError, match="data_parallel_size=4, but 2 process"):
            of(tiny, data_parallel_size=4)
        with pytest.raises(UserError, match="in 2 processes: each would take the same GPUs"):
            of(tiny, tensor_parallel_size=2)


class TestRequirements:
    def test_all_that_is_missing_is_said_at_once(self, monkeypatch):
        gpu_on_the_cpu(monkeypatch, gpus=0)
        monkeypatch.setattr(versions.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(EngineError) as error:
            versions.find_lmdeploy()
        for part in ("LMDeploy, triton, a CUDA GPU", "sdar-lm-eval[lmdeploy]", "--model sdar"):
            assert part in str(error.value)

    def test_a_torch_without_cuda(self, lmdeploy, tiny, monkeypatch):
        monkeypatch.setattr(torch.version, "cuda", None)
        with pytest.raises(EngineError, match="lacks a torch for CUDA"):
            of(tiny)

    def test_an_old_one(self, lmdeploy, tiny, monkeypatch):
        monkeypatch.setattr(versions, "_version_in", lambda _: versions.Installed("0.12.3", None))
        with pytest.raises(EngineError, match=r"LMDeploy 0.12.3 is installed; 0.16 or newer is needed"):
            of(tiny)

    def test_a_new_one(self, lmdeploy, tiny, monkeypatch, caplog):
        monkeypatch.setattr(versions, "_version_in", lambda _: versions.Installed("0.19.0rc1", None))
        caplog.set_level(logging.WARNING)
        of(tiny)
        assert "LMDeploy 0.19.0rc1 is newer than 0.18" in caplog.text

    def test_one_that_cannot_be_imported(self, lmdeploy, tiny, monkeypatch):
        monkeypatch.setitem(sys.modules, "lmdeploy.pytorch.engine", None)
        with pytest.raises(EngineError, match=r"LMDeploy 0.18.0 cannot be imported: ModuleNotFoundError"):
            of(tiny)

    def test_what_it_says_of_itself(self, lmdeploy, tiny):
        info = of(tiny).info.as_dict()
        assert info["engine_version"] == "0.18.0"
        assert set(info["deviations"]) == {"low_confidence_dynamic", "denoising_steps", "confidence", "sampling"}
        json.dumps(dict(info))


class TestThroughTheHarness:
    def test_a_task(self, lmdeploy, demo):
        tasks = TaskManager(include_path=str(Path(sdar_lm_eval.tasks.__file__).parent), include_defaults=False)

        def responses(model, **arguments):
            results = lm_eval.simple_evaluate(
                model=model,
                model_args={"pretrained": "demo", "remasking_strategy": "low_confidence_static", **arguments},
                tasks=["gsm8k_sdar_demo"],
                task_manager=tasks,
                limit=3,
                gen_kwargs={"max_gen_toks": 24},
                bootstrap_iters=0,
            )
            samples = [s for s in results["samples"]["gsm8k_sdar_demo"] if s["filter"] == "strict-match"]
            return [s["resps"] for s in samples], results["config"]

        theirs, config = responses("sdar-lmdeploy", max_active="2", cache_max_entry_count="0.5")
        assert theirs == responses("sdar", device="cpu")[0]
        info = config["sdar_lm_eval"]
        assert (info["engine"], info["max_active"], info["cache_max_entry_count"]) == ("lmdeploy", 2, 0.5)
        assert info["run"]["requests"] == 3

    def test_log_likelihoods_name_the_model_that_has_them(self, lmdeploy):
        lm = SDARLMDeployLM(pretrained="demo")
        instance = Instance("loglikelihood", {}, ("a", "b"), 0, metadata=("a task", 0, 1))
        with pytest.raises(UserError, match=r"'a task' asks for log-likelihoods.*lmdeploy.*Use --model sdar"):
            lm.loglikelihood([instance])

    def test_an_argument_of_another_engine(self, lmdeploy):
        with pytest.raises(UserError, match="gpu_memory_utilization"):
            SDARLMDeployLM(pretrained="demo", gpu_memory_utilization=0.5)


class TestDeviations:
    """Rules in which LMDeploy differs from the native engine: those that `info` names."""

    def test_the_quota_of_dynamic(self, lmdeploy, tiny):
        decoding = dataclasses.replace(DYNAMIC, denoising_steps=1, confidence_threshold=1.0)
        request = GenerationRequest((1, 2, 3, 4), 4, decoding)
        (theirs,) = run(of(tiny), [request])
        (ours,) = run(make_engine("native", tiny, device="cpu"), [request])
        assert (theirs.denoising_forwards, ours.denoising_forwards) == (4, 1)

    def test_steps_that_do_not_divide_a_block(self, lmdeploy, tiny):
        request = GenerationRequest((1, 2, 3, 4), 4, dataclasses.replace(GREEDY, denoising_steps=3))
        (theirs,) = run(of(tiny), [request])
        (ours,) = run(make_engine("native", tiny, device="cpu"), [request])
        assert (theirs.denoising_forwards, ours.denoising_forwards) == (4, 3)
