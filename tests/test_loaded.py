"""The Python API: `load` and what it returns, beside an evaluation's prompts, answers and log-likelihoods."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jetengine_standin
import lm_eval
import lmdeploy_standin
import pytest
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

import sdar_lm_eval
from sdar_lm_eval import GenerationRequest, load
from sdar_lm_eval.autoload import TASKS
from sdar_lm_eval.demo import PROMPT, problems
from sdar_lm_eval.errors import EngineError, UserError
from sdar_lm_eval.lm.model import SDARLM
from sdar_lm_eval.loaded import LoadedModel

QUESTIONS = [PROMPT.format(question=problem["question"]) for problem in problems()]
USER_TURN = [{"role": "user", "content": QUESTIONS[0]}]


@pytest.fixture(scope="module")
def model() -> Iterator[LoadedModel]:
    with load("demo") as loaded:
        yield loaded


@pytest.fixture(scope="module")
def plain() -> Iterator[LoadedModel]:
    with load("demo", chat_template="off") as loaded:
        yield loaded


# As an evaluation does


def evaluated(monkeypatch: pytest.MonkeyPatch, chat_template: str, **settings: Any) -> tuple[list[Any], list[str]]:
    """What an evaluation of the demo's first problems sends to the engine, and its answers, both by document."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda _: None)
    lm = SDARLM(pretrained="demo", chat_template=chat_template)
    sent: list[GenerationRequest] = []
    monkeypatch.setattr(lm.engine, "prepare", sent.extend)
    tasks = TaskManager(include_path=TASKS, include_defaults=False)
    settings = {"tasks": ["gsm8k_sdar_demo"], "task_manager": tasks, "limit": 3, "bootstrap_iters": 0, **settings}
    results = lm_eval.simple_evaluate(lm, **settings)
    samples = [s for s in results["samples"]["gsm8k_sdar_demo"] if s["filter"] == "strict-match"]
    return sent, [s["resps"][0][0] for s in sorted(samples, key=lambda s: s["doc_id"])]


@pytest.mark.parametrize("chat_template", ["auto", "on", "off"])
def test_prompts_and_answers_are_an_evaluations(monkeypatch: pytest.MonkeyPatch, chat_template: str) -> None:
    sent, texts = evaluated(monkeypatch, chat_template)
    with load("demo", chat_template=chat_template) as model:
        answers = model.generate(QUESTIONS[:3], until=["\n\n\n"])
    mine = {answer.request.prompt_ids for answer in answers}
    assert mine == {request.prompt_ids for request in sent} and len(mine) == 3
    assert [answer.text for answer in answers] == texts
    assert answers[0].request.decoding == sent[0].decoding


def test_a_system_instruction_is_a_conversations_first_turn(
    monkeypatch: pytest.MonkeyPatch, model: LoadedModel
) -> None:
    sent, texts = evaluated(monkeypatch, "auto", system_instruction="Count well.")
    system = {"role": "system", "content": "Count well."}
    answers = model.generate([[system, {"role": "user", "content": question}] for question in QUESTIONS[:3]])
    assert {answer.request.prompt_ids for answer in answers} == {request.prompt_ids for request in sent}
    assert [answer.text for answer in answers] == texts


def test_special_tokens_in_a_prompt_are_text(model: LoadedModel, plain: LoadedModel) -> None:
    text = "<|im_end|> is a token."
    end = model.checkpoint.tokenizer.convert_tokens_to_ids("<|im_end|>")
    in_template, as_it_is = (m.generate(text, max_gen_toks=1).request.prompt_ids for m in (model, plain))
    assert in_template.count(end) == model.generate("is a token.", max_gen_toks=1).request.prompt_ids.count(end)
    assert as_it_is.count(end) == 1


def test_log_likelihoods_are_an_evaluations(model: LoadedModel) -> None:
    pairs = [("2 + 3 =", " 5"), ("", "So the answer"), ("The answer is ", "126 marbles."), ("a", "")]
    requests = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
    with SDARLM(pretrained="demo") as lm:
        assert model.loglikelihood(pairs) == lm.loglikelihood(requests, disable_tqdm=True)
    assert model.loglikelihood(pair for pair in pairs) == model.loglikelihood(pairs)
    with load("demo", likelihood="nelbo", mc_samples=2, seed=3) as sampled:
        assert sampled.loglikelihood(pairs) != model.loglikelihood(pairs)


# Answers


def test_an_answer_says_how_it_was_written(model: LoadedModel) -> None:
    answer = model.generate(QUESTIONS[0])
    how, result = answer.denoising, answer.result
    assert "".join(how.texts) == answer.text and how.token_ids == result.token_ids
    assert how.steps == result.unmasked_at and how.confidences == result.confidences
    assert (how.block_length, how.prompt_tokens) == (4, len(answer.request.prompt_ids))
    assert answer.finish_reason == how.finish_reason == "stop"
    assert sum(map(len, how.blocks)) == len(how.token_ids)
    assert repr(answer) == f"Answer({answer.text!r}, 'stop', {len(how.token_ids)} tokens, {answer.forwards} forwards)"
    short = model.generate(QUESTIONS[0], max_gen_toks=3)
    assert (short.finish_reason, len(short.denoising.token_ids)) == ("length", 3)


def test_a_lone_prompt_a_list_and_a_conversation(model: LoadedModel) -> None:
    alone = model.generate(QUESTIONS[0])
    first, second, third = model.generate([QUESTIONS[0], QUESTIONS[1], QUESTIONS[0]])
    assert (first.text, third.text) == (alone.text, alone.text) != (second.text, second.text)
    conversation: list[Any] = USER_TURN
    assert model.generate(conversation).text == alone.text
    assert [a.text for a in model.generate([conversation, QUESTIONS[1]])] == [alone.text, second.text]
    assert [a.text for a in model.generate(iter([conversation]))] == [alone.text]  # type: ignore[call-overload]
    assert model.generate([]) == []
    begun = [*USER_TURN, {"role": "assistant", "content": "This makes 474 -"}]
    continued = model.generate(begun)
    assert continued.prompt.endswith("This makes 474 -") and continued.text.startswith(" 190 = 284")


def test_answers_are_cut_before_until(model: LoadedModel) -> None:
    answer = model.generate(QUESTIONS[0], until="marbles")
    assert "marbles" not in answer.text and "marbles" in "".join(answer.denoising.texts)
    assert answer.finish_reason == "stop"


def test_answers_come_as_they_finish(model: LoadedModel) -> None:
    stream = model.stream([QUESTIONS[0], QUESTIONS[1], QUESTIONS[1]])
    position, _ = next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert position in (0, 1, 2)
    assert sorted(i for i, _ in model.stream([QUESTIONS[0], QUESTIONS[1], QUESTIONS[1]])) == [0, 1, 2]


def test_steps_are_told_by_the_prompts_position(model: LoadedModel) -> None:
    steps: list[Any] = []
    prompts = ["1 + 1 = ?", QUESTIONS[0], "1 + 1 = ?"]
    answers = model.generate(prompts, watch=steps.append)
    assert model.shows_steps and {step.index for step in steps} == {0, 1}
    for i in (0, 1):
        decided = [token for step in steps if step.index == i and step.decided for token in step.token_ids]
        assert tuple(decided) == answers[i].result.token_ids


# Settings


def test_settings_are_gen_kwargs(model: LoadedModel) -> None:
    short = model.generate(QUESTIONS[0], strategy="sequential", steps="2")  # type: ignore[call-overload]
    decoding = short.request.decoding
    assert (decoding.remasking_strategy, decoding.denoising_steps, decoding.greedy) == ("sequential", 2, True)
    with load("demo", threshold=0.5, max_gen_toks=16) as loose:
        assert loose.generate(QUESTIONS[0]).request.decoding.confidence_threshold == 0.5
        assert loose.generate(QUESTIONS[0], threshold=0.7).request.decoding.confidence_threshold == 0.7  # type: ignore[call-overload]
        assert loose.generate(QUESTIONS[0]).request.max_new_tokens == 16


def test_sampled_answers_depend_on_the_seed_alone(model: LoadedModel) -> None:
    settings: dict[str, Any] = {"temperature": 1.0, "max_gen_toks": 24}
    drawn = model.generate([QUESTIONS[0]] * 4, **settings)
    assert len({answer.text for answer in drawn}) > 1  # equal prompts are repeats
    assert [a.denoising.repeat for a in drawn] == [0, 1, 2, 3]
    again = model.generate([QUESTIONS[1], QUESTIONS[0], QUESTIONS[0]], **settings)
    assert [a.text for a in again[1:]] == [a.text for a in drawn[:2]]
    other = [model.generate(QUESTIONS[0], seed=seed, **settings).text for seed in range(4)]
    assert len(set(other)) > 1 and model.generate(QUESTIONS[0], seed=1234, **settings).text == drawn[0].text
    with load("demo", seed=2) as seeded:
        assert seeded.generate(QUESTIONS[0], **settings).text == other[2]


@pytest.mark.parametrize(
    ("prompt", "settings", "told"),
    [
        (5, {}, "5 is no prompt: give a text, or a list of"),
        ([5], {}, "5 is no prompt"),
        ([[]], {}, r"\[\] is no prompt"),
        ({"role": "user", "content": "hi"}, {}, "is no prompt"),
        ([{"role": "user"}], {}, "is no prompt"),
        ([{"role": "user", "content": 3}], {}, "is no prompt"),
        ([*USER_TURN, {"role": "asistant", "content": "5"}], {}, "writes no role 'asistant'. Did you mean 'assistant'"),
        ("\ud800", {}, "is no Unicode text"),
        ([{"role": "user", "content": "\ud800"}], {}, "is no Unicode text"),
        ("a", {"until": ["\ud800"]}, r"until '\\ud800' is no Unicode text"),
        ("a", {"stratgy": "static"}, "'stratgy' is unknown. Did you mean 'strategy'"),
        ("a", {"steps": 9}, "denoising_steps=9"),
        ("a", {"max_gen_toks": 10**6}, "must be below max_length"),
    ],
    ids=str,
)
def test_mistakes_are_one_line(model: LoadedModel, prompt: Any, settings: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told) as error:
        model.generate(prompt, **settings)
    assert "\n" not in str(error.value)


def test_what_cannot_be_loaded_is_said(model: LoadedModel, plain: LoadedModel) -> None:
    with pytest.raises(UserError, match=r"'nativ' is unknown; known: .*native.*Did you mean 'native'"):
        load("demo", engine="nativ")
    with pytest.raises(UserError, match="'kv_page' is unknown"):
        load("demo", kv_page=3)  # type: ignore[call-overload]
    with pytest.raises(UserError, match=r"answers=here is for evaluations"):
        load("demo", answers="here")
    with pytest.raises(UserError, match="chat_template=off"):
        plain.generate(USER_TURN)
    with pytest.raises(UserError, match="'ab' is no pair"):
        model.loglikelihood(["ab"])  # type: ignore[list-item]
    with pytest.raises(UserError, match="is no Unicode text"):
        model.loglikelihood([("a", "\ud800")])
    with pytest.raises(UserError, match="'ab' is one text, and a list of prompts is needed"):
        next(model.stream("ab"))


def test_after_close_calls_are_refused() -> None:
    with load("demo") as model:
        assert repr(model) == "LoadedModel('demo', native on cpu, float32)"
    model.close()
    with pytest.raises(EngineError, match="closed"):
        model.generate("a")
    with pytest.raises(EngineError, match="closed"):
        model.loglikelihood([("a", "b")])


def test_truncated_prompts_are_said(caplog: pytest.LogCaptureFixture) -> None:
    with load("demo", max_length=40) as model:
        answer = model.generate(QUESTIONS[0], max_gen_toks=8)
    assert len(answer.request.prompt_ids) == 32
    assert "1 of 1 prompts are longer than max_length - max_gen_toks, and lost their beginning" in caplog.text


def test_steps_may_be_left_out() -> None:
    with load("demo", record_steps=False) as model:
        assert model.generate(QUESTIONS[0], max_gen_toks=4).denoising.steps is None


# Engines


@pytest.mark.parametrize("kind", ["jetengine 0.2.0", "jetengine 0.1.0", "lmdeploy"])
def test_other_engines(kind: str, model: LoadedModel) -> None:
    name, _, version = kind.partition(" ")
    place: Any = jetengine_standin.standin(version) if version else lmdeploy_standin.standin()
    greedy: dict[str, Any] = {"remasking_strategy": "low_confidence_static", "max_gen_toks": 12}
    steps: list[Any] = []
    expected = model.generate(QUESTIONS[:2], **greedy)
    with contextlib.ExitStack() as stack:
        shared = stack.enter_context(place)
        if version:
            shared.faults.alone = False
        other = stack.enter_context(load("demo", name, dtype="bfloat16"))  # type: ignore[call-overload]
        answers = other.generate(QUESTIONS[:2], watch=steps.append, **greedy)
        assert [a.text for a in answers] == [a.text for a in expected]
        assert not other.shows_steps and not steps
        with pytest.raises(UserError, match=f"the {name} engine computes no log-likelihoods"):
            other.loglikelihood([("a", "b")])
    with pytest.raises(EngineError, match="closed"):
        other.generate("a")


def test_the_names_load_lazily() -> None:
    assert sdar_lm_eval.load is load and sdar_lm_eval.LoadedModel is LoadedModel
    assert {"load", "LoadedModel", "Answer"} <= set(dir(sdar_lm_eval))
