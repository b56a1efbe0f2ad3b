"""What the registered model owes lm_eval when it is asked for log-likelihoods, over an engine that keeps a record."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from scripted_lm import BOS_TEMPLATE, ScriptedEngine, ScriptedLM, checkpoint_with

from sdar_lm_eval import Checkpoint
from sdar_lm_eval.engines.types import LikelihoodConfig, ScoreRequest, ScoreResult
from sdar_lm_eval.errors import EngineError, UserError
from sdar_lm_eval.lm import frontend
from sdar_lm_eval.lm.prompts import Prompts

END = 707  # <|endoftext|>: the demo's prefix token


class ScoringEngine(ScriptedEngine):
    """Scores a continuation by its tokens, the last request first; stops after `answers_before_error`."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.asked: list[ScoreRequest] = []
        self.configs: list[LikelihoodConfig] = []

    def score(self, requests: Sequence[ScoreRequest], config: LikelihoodConfig) -> Iterator[tuple[int, ScoreResult]]:
        self.configs.append(config)
        for count, (index, request) in enumerate(reversed(list(enumerate(requests)))):
            if count == self.answers_before_error:
                raise self.error
            self.asked.append(request)
            yield index, ScoreResult(value_of(request), is_greedy=len(request.continuation_ids) == 1,
                                     standard_error=0.3, clean_tokens=4, noised_tokens=16)  # fmt: skip


def value_of(request: ScoreRequest) -> float:
    return -sum(request.continuation_ids) / 1000 - len(request.context_ids)


class ScoringLM(ScriptedLM):
    engine: ScoringEngine

    def asked(self, context: str, continuation: str) -> tuple[str, str]:
        """Return what reaches the engine for a pair, as text with special tokens."""
        self.loglikelihood([request(context, continuation)])
        sent = self.engine.asked[-1]
        return str(self.tokenizer.decode(sent.context_ids)), str(self.tokenizer.decode(sent.continuation_ids))


MakeLM = Callable[..., ScoringLM]


@pytest.fixture
def make_lm(monkeypatch: pytest.MonkeyPatch) -> MakeLM:
    def make(pretrained: str | Path = "demo", **arguments: Any) -> ScoringLM:
        monkeypatch.setattr(
            frontend,
            "make_engine",
            lambda name, checkpoint, **options: ScoringEngine(checkpoint, lambda _: "", options),
        )
        return ScoringLM(str(pretrained), **arguments)

    return make


def request(*arguments: str, doc_id: int = 0) -> Instance:
    kind = "loglikelihood" if len(arguments) == 2 else "loglikelihood_rolling"
    return Instance(kind, {}, arguments, 0, ("a_task", doc_id, 1))


def pairs(count: int) -> list[Instance]:
    return [request(f"Question {i // 2}" + " and more" * (i // 2 % 3), f" {i}", doc_id=i // 2) for i in range(count)]


def expected(lm: ScoringLM, instances: list[Instance]) -> list[tuple[float, bool]]:
    values = []
    for instance in instances:
        context, continuation = (lm.tok_encode(text) for text in instance.args)
        values.append((value_of(ScoreRequest(tuple(context), tuple(continuation))), len(continuation) == 1))
    return values


def cached(lm: ScoringLM, path: Path) -> CachingLM:
    return CachingLM(lm, str(path))


def test_scores_come_in_the_order_asked_and_copies_are_scored_once(make_lm: MakeLM) -> None:
    lm = make_lm()
    instances = pairs(7)
    scores = lm.loglikelihood([*instances, instances[2], instances[2], *pairs(1)])
    assert scores[:7] == expected(lm, instances)
    assert scores[7:] == [scores[2], scores[2], scores[0]]
    assert len(lm.engine.asked) == 8  # an equal request of another document counts as one of its own
    assert lm.counts.scored_requests == 8
    assert all(type(value) is float and type(greedy) is bool for value, greedy in scores)
    assert lm.loglikelihood([]) == lm.loglikelihood_rolling([]) == []


# Tokens


def test_contexts_are_plain_text_whatever_the_template_setting(make_lm: MakeLM) -> None:
    for mode in ("auto", "on", "off"):
        assert make_lm(chat_template=mode).asked("One and", " two") == ("One and", " two")
    lm = make_lm()
    templated = lm.apply_chat_template([{"role": "user", "content": "One and"}])
    assert lm.asked(templated, "two") == (templated.rstrip(), "\ntwo")


def test_special_tokens_of_a_rendered_context_s_text_stay_text(make_lm: MakeLM) -> None:
    lm = make_lm()
    templated = lm.apply_chat_template([{"role": "user", "content": "What is <|im_end|> for?"}])
    lm.loglikelihood([request(templated, "an end")])
    sent = lm.engine.asked[-1]
    end = lm.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert (*sent.context_ids, *sent.continuation_ids).count(end) == 1  # the template's
    assert lm.tokenizer.decode((*sent.context_ids, *sent.continuation_ids)) == templated + "an end"


def test_trailing_spaces_of_a_context_belong_to_the_continuation(make_lm: MakeLM) -> None:
    lm = make_lm()
    assert lm.asked("One and ", "two") == ("One and", " two")
    assert lm.asked("One and \n", "two") == ("One and", " \ntwo")


def test_an_empty_context_is_the_prefix_token(make_lm: MakeLM) -> None:
    lm = make_lm()
    assert lm.asked("", "One") == ("<|endoftext|>", "One")
    assert lm.asked("", "<|endoftext|>One") == ("<|endoftext|>", "One")


def test_no_second_bos(make_lm: MakeLM, tmp_path: Path) -> None:
    lm = make_lm(checkpoint_with(tmp_path / "bos", bos=True, template=BOS_TEMPLATE))
    assert lm.asked("One and", " two") == ("<|endoftext|>One and", " two")
    assert lm.asked("<|endoftext|>One and", " two") == ("<|endoftext|>One and", " two")
    assert lm.asked("", "One") == ("<|endoftext|>", "One")
    lm.loglikelihood_rolling([request("One and two")])
    assert lm.tokenizer.decode(lm.engine.asked[-1].continuation_ids) == "One and two"
    # A template that writes none, and a text that looks like one.
    template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
    bare = make_lm(checkpoint_with(tmp_path / "bare", bos=True, template=template))
    rendered = bare.apply_chat_template([{"role": "user", "content": "One and"}])
    assert bare.asked(rendered, " two") == ("[user] One and", " two")
    assert bare.asked("[assistant] One and", " two") == ("<|endoftext|>[assistant] One and", " two")


def test_an_empty_continuation_is_certain(make_lm: MakeLM, caplog: pytest.LogCaptureFixture) -> None:
    lm = make_lm()
    assert lm.loglikelihood([request("One", ""), request("", ""), request("One", " two")])[:2] == [(0.0, True)] * 2
    assert lm.loglikelihood_rolling([request("")]) == [0.0]
    assert len(lm.engine.asked) == 1
    assert (lm.counts.scored_requests, lm.counts.scored_tokens) == (4, 3)  # the tokens of " two"
    assert "2 of 3 texts to be scored are empty; their log-likelihood is 0." in caplog.text


def test_a_choice_that_tokenization_joins_with_its_context_is_not_certain(
    make_lm: MakeLM, caplog: pytest.LogCaptureFixture
) -> None:
    """The demo has a token "st": it is scored, behind what the two texts share."""
    lm = make_lm()
    (joined,) = lm.tok_encode("st")
    assert lm.loglikelihood([request("s", "t"), request("1 s", "t")]) != [(0.0, True)] * 2
    behind, alone = lm.engine.asked  # the script scores the last first
    assert (alone.context_ids, alone.continuation_ids) == ((lm.prefix_token_id,), (joined,))
    assert (*behind.context_ids, *behind.continuation_ids) == tuple(lm.tok_encode("1 st"))
    assert len(behind.continuation_ids) == 1 and lm.tok_decode(behind.context_ids) == "1"
    assert "to be scored" not in caplog.text


TEXTS = st.text(st.sampled_from("ab1 \n.é<|>"), max_size=6)


@given(pairs=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=9), together=st.integers(1, 4))
def test_pairs_tokenized_together_get_the_tokens_of_pairs_tokenized_one_by_one(
    pairs: list[tuple[str, str]], together: int
) -> None:
    prompts = Prompts(Checkpoint.open("demo"), "off")

    def one_by_one(context: str, continuation: str) -> tuple[list[int], list[int]]:
        known, whole = prompts.encode(context.rstrip()), prompts.encode(context + continuation)
        if context and context.rstrip() == context + continuation:
            return known or [END], []
        same = itertools.takewhile(lambda both: both[0] == both[1], zip(known, whole, strict=False))
        shared = min(len(list(same)), max(len(whole) - 1, 0))
        return whole[:shared] or [END], whole[shared:]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sdar_lm_eval.lm.prompts.TOKENIZED_TOGETHER", together)
        found = list(prompts.encode_pairs(pairs, [False] * len(pairs)))
    assert [(list(context), list(continuation)) for context, continuation in found] == [
        one_by_one(*pair) for pair in pairs
    ]


def test_choices_share_the_tokens_of_their_question(make_lm: MakeLM) -> None:
    """Copies of a question would take memory: a question of MMLU has four choices and a thousand tokens."""
    lm = make_lm()
    lm.loglikelihood([request("2 + 2 = ", choice) for choice in "1234"])
    assert len({id(sent.context_ids) for sent in lm.engine.asked}) == 1


def test_pairs_are_tokenized_on_all_cores(make_lm: MakeLM, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    lm = make_lm()
    call = type(lm.tokenizer).__call__

    def keep(self: Any, texts: Any, **options: Any) -> Any:
        seen.append((len(texts), os.environ.get("TOKENIZERS_PARALLELISM")))
        return call(self, texts, **options)

    monkeypatch.setattr(type(lm.tokenizer), "__call__", keep)
    lm.loglikelihood([request("2 + 2 = ", choice) for choice in "1234"])
    assert seen == [(5, "true")]  # the question, and the question with each choice


def test_a_continuation_that_adds_no_token_is_scored_by_the_last_one(make_lm: MakeLM, tmp_path: Path) -> None:
    """A normalizer that drops a character: the whole has the context's tokens."""
    folder = checkpoint_with(tmp_path / "drops")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "Replace", "pattern": {"String": "~"}, "content": ""}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    lm = make_lm(folder)
    assert lm.loglikelihood([request("1 2", "~")]) != [(0.0, True)]
    (sent,) = lm.engine.asked
    assert (*sent.context_ids, *sent.continuation_ids) == tuple(lm.tok_encode("1 2"))
    assert len(sent.continuation_ids) == 1


def test_texts_with_the_mask_token_are_told(make_lm: MakeLM, caplog: pytest.LogCaptureFixture) -> None:
    lm = make_lm()
    mask = lm.tokenizer.convert_ids_to_tokens(lm.checkpoint.mask_token_id)
    lm.loglikelihood([request("One", f" {mask} two"), request("One", " two"), request(f"One {mask}", " two")])
    assert f"1 of 3 texts to be scored contain the mask token {mask!r}, which is never generated" in caplog.text
    caplog.clear()
    lm.loglikelihood_rolling([request("One"), request(f"One {mask} two")])
    assert "1 of 2 texts to be scored contain the mask token" in caplog.text
    caplog.clear()
    lm.loglikelihood(pairs(2))
    assert "mask token" not in caplog.text


def test_long_contexts_lose_their_beginning(make_lm: MakeLM, caplog: pytest.LogCaptureFixture) -> None:
    lm = make_lm(max_length=12)
    lm.loglikelihood([request("1 2 3 4 5 6 7 8 9", " 1 2"), request("1", " 2")])
    short, long = lm.engine.asked
    ids = lm.tok_encode("1 2 3 4 5 6 7 8 9 1 2")
    assert (*long.context_ids, *long.continuation_ids) == tuple(ids[-12:])
    assert lm.tok_decode(long.continuation_ids) == " 1 2"
    assert lm.tok_decode(short.context_ids) == "1"
    assert (
        "1 of 2 contexts do not fit into max_length=12 beside their continuations, and lost their beginning."
        in caplog.text
    )


def test_a_continuation_that_never_fits_is_refused_before_anything_runs(make_lm: MakeLM) -> None:
    lm = make_lm(max_length=6)
    with pytest.raises(UserError, match=r"a continuation of 8 tokens and one of context are more than max_length=6"):
        lm.loglikelihood([request("1", " 2"), request("1", " 2 3 4 5")])
    assert not lm.engine.asked
    with pytest.raises(UserError, match=r"a continuation of 1 tokens .* max_length=1\. Raise max_length"):
        make_lm(max_length=1).loglikelihood_rolling([request("1 2")])


# Rolling windows


def test_rolling_windows_are_the_harness_s(make_lm: MakeLM) -> None:
    """Its documentation's example: ten tokens in windows of four behind one."""
    lm = make_lm(max_length=5)
    text = "1 2 3 4 5 6"
    ids = lm.tok_encode(text)[:10]
    text = lm.tok_decode(ids)
    assert len(ids) == 10
    (total,) = lm.loglikelihood_rolling([request(text)])
    windows = [(r.context_ids, r.continuation_ids) for r in reversed(lm.engine.asked)]
    t = tuple(ids)
    assert windows == [((END,), t[:4]), ((t[3],), t[4:8]), (t[5:8], t[8:])]
    assert total == pytest.approx(sum(value_of(r) for r in lm.engine.asked))


def test_rolling_sums_equal_those_of_its_windows_alone(make_lm: MakeLM) -> None:
    lm = make_lm(max_length=9)
    texts = ["1 2 3 4 5 6 7 8 9 10", "One", "", "1 2 3 4 5 6 7 8 9 10", " and more" * 9]
    totals = lm.loglikelihood_rolling([request(text, doc_id=i) for i, text in enumerate(texts)])
    for text, total in zip(texts, totals, strict=True):
        windows = map(make_disjoint_window, get_rolling_token_windows(lm.tok_encode(text), END, 8, 1))
        parts = lm._loglikelihood_tokens([(("", ""), context, continuation) for context, continuation in windows])
        assert total == pytest.approx(sum(value for value, _ in parts))
    assert lm.counts.scored_requests == 5


def test_mc_samples_are_checked_and_have_no_effect_under_chain(
    make_lm: MakeLM, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(UserError, match="mc_samples=0 is out of range"):
        make_lm(likelihood="nelbo", mc_samples=0)
    make_lm(likelihood="nelbo", mc_samples=8)
    assert "has no effect" not in caplog.text
    make_lm(mc_samples=8)
    assert "mc_samples=8 has no effect: likelihood=chain samples nothing." in caplog.text


# Cache


@pytest.mark.parametrize("error", [EngineError("out of luck"), RuntimeError("CUDA error"), KeyboardInterrupt()])
def test_what_was_finished_before_a_failure_is_kept(make_lm: MakeLM, tmp_path: Path, error: BaseException) -> None:
    lm = make_lm()
    lm.engine.answers_before_error, lm.engine.error = 3, error  # type: ignore[assignment]
    with pytest.raises(type(error)):
        cached(lm, tmp_path / "c.db").loglikelihood(pairs(5))
    finished = set(lm.engine.asked)
    assert len(finished) == lm.counts.scored_requests == 3

    again = make_lm()
    scores = cached(again, tmp_path / "c.db").loglikelihood(pairs(5))
    assert len(again.engine.asked) == 2
    assert not finished & set(again.engine.asked)
    assert scores == expected(again, pairs(5))
    assert cached(again, tmp_path / "c.db").loglikelihood(pairs(5)) == scores
    assert len(again.engine.asked) == 2


def test_a_text_goes_on_from_the_windows_that_were_finished(make_lm: MakeLM, tmp_path: Path) -> None:
    texts = [request(" and more" * n, doc_id=n) for n in (6, 7)]
    whole = make_lm(max_length=9)
    totals = whole.loglikelihood_rolling(texts)
    lm = make_lm(max_length=9)
    lm.engine.answers_before_error = 3
    with pytest.raises(EngineError):
        cached(lm, tmp_path / "c.db").loglikelihood_rolling(texts)
    again = make_lm(max_length=9)
    assert cached(again, tmp_path / "c.db").loglikelihood_rolling(texts) == pytest.approx(totals)
    distinct = set(whole.engine.asked)
    assert set(again.engine.asked) == distinct - set(lm.engine.asked)
    assert cached(make_lm(max_length=9), tmp_path / "c.db").loglikelihood_rolling(texts) == pytest.approx(totals)


def test_a_cache_holds_scores_of_several_methods(make_lm: MakeLM, tmp_path: Path) -> None:
    settings: list[dict[str, Any]] = [{}, {"likelihood": "nelbo"}, {"likelihood": "nelbo", "mc_samples": 64},
                                      {"likelihood": "nelbo", "seed": 1}, {"block_length": 8}]  # fmt: skip
    for asked in (3, 0):
        for arguments in settings:
            lm = make_lm(**arguments)
            cached(lm, tmp_path / "c.db").loglikelihood(pairs(3))
            assert len(lm.engine.asked) == asked
    lm = make_lm(seed=1)  # chain draws nothing
    assert cached(lm, tmp_path / "c.db").loglikelihood(pairs(3)) == expected(lm, pairs(3))
    assert not lm.engine.asked


def test_scores_are_kept_in_a_folder_too(make_lm: MakeLM, tmp_path: Path) -> None:
    scores = make_lm(answers=tmp_path, likelihood="nelbo").loglikelihood(pairs(3))
    lm = make_lm(answers=tmp_path, likelihood="nelbo")
    assert lm.loglikelihood(pairs(4))[:3] == scores
    assert len(lm.engine.asked) == 1
    assert (lm.counts.scored_requests, lm.counts.stored_scores) == (1, 3)
    again = make_lm(answers=tmp_path, likelihood="nelbo")
    again.loglikelihood(pairs(4))
    info = again.get_model_info()["sdar_lm_eval"]
    assert info["run"]["likelihoods"]["standard_error"] == {"mean": 0.3, "largest": 0.3}


# Settings, trace, summary


def test_settings_reach_the_engine_and_the_results(make_lm: MakeLM, caplog: pytest.LogCaptureFixture) -> None:
    lm = make_lm(likelihood="nelbo", mc_samples="64", block_length=8, seed=3)
    lm.loglikelihood(pairs(1))
    assert lm.engine.configs == [LikelihoodConfig("nelbo", 64, 8, 3)]
    info = lm.get_model_info()["sdar_lm_eval"]
    assert (info["likelihood"], info["mc_samples"]) == ("nelbo", 64)
    assert "has no effect" not in caplog.text
    info = make_lm(mc_samples=64).get_model_info()["sdar_lm_eval"]
    assert (info["likelihood"], "mc_samples" in info) == ("chain", False)
    assert "mc_samples=64 has no effect: likelihood=chain samples nothing." in caplog.text


def test_each_score_is_a_line_of_the_trace(make_lm: MakeLM, tmp_path: Path) -> None:
    lm = make_lm(trace=tmp_path / "trace.jsonl", likelihood="nelbo", max_length=9)
    scores = lm.loglikelihood(pairs(2))
    (total,) = lm.loglikelihood_rolling([request(" and more" * 9, doc_id=7)])
    head, *lines = (json.loads(line) for line in (tmp_path / "trace.jsonl").read_text().splitlines())
    assert head["model"]["likelihood"] == "nelbo"
    assert [(line["task"], line["document"], line["likelihood"]) for line in lines] == [
        ("a_task", 0, "nelbo"), ("a_task", 0, "nelbo"), ("a_task", 7, "nelbo")
    ]  # fmt: skip
    assert sorted(line["log_likelihood"] for line in lines[:2]) == sorted(value for value, _ in scores)
    assert lines[0]["tokens"] == len(lm.tok_encode(" 1"))
    assert lines[0]["context_tokens"] == len(lm.tok_encode("Question 0"))
    assert lines[2]["log_likelihood"] == total
    windows = len(lm.engine.asked) - 2
    assert windows > 1
    assert lines[2]["standard_error"] == pytest.approx(0.3 * math.sqrt(windows))
    assert lines[2]["tokens_run"] == {"clean": 4 * windows, "noised": 16 * windows}


def test_the_summary_adds_up(make_lm: MakeLM, caplog: pytest.LogCaptureFixture) -> None:
    lm = make_lm(likelihood="nelbo")
    lm.loglikelihood(pairs(4))
    lm.loglikelihood(pairs(6)[4:])
    tokens = sum(len(r.continuation_ids) for r in lm.engine.asked)
    run = lm.get_model_info()["sdar_lm_eval"]["run"]
    found = run["likelihoods"]
    assert (found["requests"], found["tokens"]) == (6, tokens)
    assert found["tokens_run"] == {"clean": 24, "noised": 96}
    assert found["standard_error"] == {"mean": 0.3, "largest": 0.3}
    assert (run["requests"], run["generation_seconds"], run["tokens_per_second"]) == (0, None, None)
    assert found["seconds"] >= 0
    assert f"6 log-likelihoods of {tokens} tokens in" in caplog.text
    assert "standard errors up to 0.3 nats; loaded in" in caplog.text
    assert "new tokens" not in caplog.text


def test_the_bar_can_be_switched_off(make_lm: MakeLM, capsys: pytest.CaptureFixture[str]) -> None:
    lm = make_lm()
    lm.loglikelihood([*pairs(2), request("One", "")])
    assert "3/3" in capsys.readouterr().err
    lm.loglikelihood(pairs(3), disable_tqdm=True)
    assert "Scoring" not in capsys.readouterr().err


def test_an_engine_that_loses_requests_is_found_out(make_lm: MakeLM, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = make_lm()
    complete = lm.engine.score
    monkeypatch.setattr(lm.engine, "score", lambda *arguments: (result for result in list(complete(*arguments))[1:]))
    with pytest.raises(EngineError, match="scored 2 of 3 requests"):
        lm.loglikelihood(pairs(3))
