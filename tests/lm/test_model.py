"""What the registered model owes lm_eval, over an engine that answers from a script; and once over the real one."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
from lm_eval.api.model import CachingLM
from lm_eval.api.task import TaskConfig
from lm_eval.tasks import TaskManager
from scripted_lm import (
    BARE_TEMPLATE,
    BOS_TEMPLATE,
    GREEDY,
    SAMPLED,
    Evaluate,
    MakeLM,
    ScriptedLM,
    cached,
    checkpoint_with,
    request,
    requests_of,
)

import sdar_lm_eval.tasks
from sdar_lm_eval.demo import CHECKPOINT as DEMO
from sdar_lm_eval.errors import EngineError, UserError
from sdar_lm_eval.lm import model as harness
from sdar_lm_eval.lm.model import SDARLM
from sdar_lm_eval.lm.prompts import Prompts
from sdar_lm_eval.lm.ranks import Ranks

# Order, length, text


def test_answers_come_in_the_order_asked_whatever_order_they_finish_in(make_lm: MakeLM) -> None:
    lm = make_lm(answer=lambda r: lm.tokenizer.decode(r.prompt_ids).split("user\n")[1].split("<|im_end|>")[0])
    asked = requests_of(9)
    answers = lm.generate_until([*asked, asked[3]])
    assert type(answers) is list
    assert answers == [instance.args[0] for instance in [*asked, asked[3]]]
    assert all(type(answer) is str for answer in answers)
    assert lm.generate_until([]) == []


def test_longer_prompts_start_first(make_lm: MakeLM) -> None:
    lm = make_lm()
    lm.generate_until(requests_of(6))
    lengths = [len(r.prompt_ids) for r in reversed(lm.engine.requests)]  # the script answers the last first
    assert lengths == sorted(lengths, reverse=True)


@pytest.mark.parametrize(
    ("until", "text"),
    [
        ([], " \n 1 + 1 = 2.\n\nQ: 3\n "),  # nothing is stripped
        (["Q:"], " \n 1 + 1 = 2.\n\n"),
        ("Q:", " \n 1 + 1 = 2.\n\n"),
        (["Q:", "\n\n", "absent"], " \n 1 + 1 = 2."),  # the earliest, not the first of the list
        (["1"], " \n "),
        ([" ", "1"], ""),  # at the very beginning
        (["", None][:1], " \n 1 + 1 = 2.\n\nQ: 3\n "),
    ],
)
def test_answers_are_cut_before_the_earliest_stop_text(make_lm: MakeLM, until: Any, text: str) -> None:
    lm = make_lm(answer=lambda _: " \n 1 + 1 = 2.\n\nQ: 3\n ")
    assert lm.generate_until([request("q", GREEDY | {"until": until})]) == [text]


def test_each_request_has_its_own_stop_texts(make_lm: MakeLM) -> None:
    lm = make_lm(answer=lambda _: "1, 2. 3")
    asked = [request("a", GREEDY | {"until": [stop]}) for stop in (",", ".", "3")]
    assert lm.generate_until(asked) == ["1", "1, 2", "1, 2. "]


def test_special_tokens_are_no_text(make_lm: MakeLM) -> None:
    lm = make_lm(answer=lambda _: "<|im_start|>4<|im_end|><|endoftext|>")
    assert lm.generate_until([request("q")]) == ["4"]


def test_stop_tokens_and_texts_reach_the_engine(make_lm: MakeLM) -> None:
    lm = make_lm()
    lm.generate_until([request("q", GREEDY | {"until": ["<|im_start|>", "</s>", "\n\n", "."]})])
    (sent,) = lm.engine.requests
    assert sent.stop_ids == {709, 707, lm.tokenizer.convert_tokens_to_ids("<|im_start|>")}
    assert sent.stop_strings == ("</s>", "\n\n", ".")
    assert sent.max_new_tokens == 32


def test_a_stop_text_that_no_answer_can_hold_is_told_once(make_lm: MakeLM, caplog: pytest.LogCaptureFixture) -> None:
    """Decoding leaves special tokens out, so no answer holds a special token beside other text."""
    lm = make_lm(answer=lambda _: "4<|im_start|>user")
    asked = [request(text, GREEDY | {"until": ["<|im_start|>user", "<|im_start|>", " user", "<s>\n"]}) for text in "ab"]
    lm.generate_until(asked)
    told = [record.getMessage() for record in caplog.records if "ends no answer" in record.getMessage()]
    assert len(told) == 1 and told[0].startswith("until='<|im_start|>user' ends no answer")


@pytest.mark.parametrize("text", ["<|im_start|>", "<|call|>"])
def test_special_tokens_of_tokenizer_json_alone_end_answers(make_lm: MakeLM, tmp_path: Path, text: str) -> None:
    """tokenizer_config.json gives them no role, so `all_special_ids` lacks them; decoding leaves them out."""
    folder = checkpoint_with(tmp_path / "unlisted", template=BARE_TEMPLATE)
    added = {"id": 711, "content": "<|call|>", "special": True}
    added |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append(added)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    for name, changes in {
        "tokenizer_config.json": {"additional_special_tokens": []},
        "config.json": {"vocab_size": 712},
    }.items():
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | changes))
    lm = make_lm(folder, answer=lambda _: f"4{text}5")
    token = lm.tokenizer.convert_tokens_to_ids(text)
    assert token not in lm.tokenizer.all_special_ids
    assert lm.generate_until([request("q", GREEDY | {"until": [text, "  "]})]) == [
        "45"
    ]  # the engine ends it, not the cut
    (sent,) = lm.engine.requests
    assert (token in sent.stop_ids, sent.stop_strings) == (True, ("  ",))


def test_an_engine_that_loses_requests_is_found_out(make_lm: MakeLM, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = make_lm()
    complete = lm.engine.generate
    monkeypatch.setattr(lm.engine, "generate", lambda r: (result for result in list(complete(r))[1:]))
    with pytest.raises(EngineError, match="answered 2 of 3 requests"):
        lm.generate_until(requests_of(3))


# Settings on their way


def test_the_harness_default_and_the_command_line_reach_the_engine(make_lm: MakeLM, evaluate: Evaluate) -> None:
    lm = make_lm(confidence_threshold=0.6)
    evaluate(lm)
    sent = lm.engine.requests[-1]
    harness = TaskConfig(task="x", output_type="generate_until").generation_kwargs  # lm_eval 0.4.9's has no limit
    limit = harness.get("max_gen_toks", 512)
    assert (sent.max_new_tokens, sent.stop_strings, sent.decoding.temperature) == (limit, ("\n\n",), 0.0)
    assert sent.decoding.confidence_threshold == 0.6

    lines = ("output_type: generate_until", "generation_kwargs: {until: [], max_gen_toks: 64, do_sample: false}")
    evaluate(lm, *lines, gen_kwargs="max_new_tokens=16,do_sample=true,temperature=0.5,confidence_threshold=0.7")
    sent = lm.engine.requests[-1]
    assert (sent.max_new_tokens, sent.decoding.temperature, sent.decoding.confidence_threshold) == (16, 0.5, 0.7)


def test_settings_are_refused_before_anything_runs(make_lm: MakeLM) -> None:
    lm = make_lm()
    with pytest.raises(UserError, match=r"'max_token' is unknown. Did you mean 'max_tokens'"):
        lm.generate_until([*requests_of(3), request("q", GREEDY | {"max_token": 3})])
    assert not lm.engine.requests


def test_contradictions_are_said_once_not_for_each_document(make_lm: MakeLM, caplog: pytest.LogCaptureFixture) -> None:
    make_lm().generate_until(requests_of(5, GREEDY | {"temperature": 1}))
    assert caplog.text.count("temperature=1 has no effect") == 1


@pytest.mark.parametrize(
    ("arguments", "max_active"),
    [
        ({}, None),
        ({"batch_size": 1}, None),  # what the harness passes when nobody asked
        ({"batch_size": "auto"}, None),
        ({"batch_size": "auto:4"}, None),
        ({"batch_size": "auto", "max_batch_size": 16}, 16),
        ({"batch_size": "8", "max_batch_size": None}, 8),
        ({"batch_size": 8, "max_active": "4"}, 4),
        ({"max_active": 1}, 1),
    ],
)
def test_batch_size_caps_what_runs_at_once(make_lm: MakeLM, arguments: dict[str, Any], max_active: int | None) -> None:
    assert make_lm(**arguments).engine.options["max_active"] == max_active


@pytest.mark.parametrize("batch_size", [0, "-1", "many", 1.5])
def test_batch_sizes_out_of_range_are_refused(make_lm: MakeLM, batch_size: Any) -> None:
    with pytest.raises(UserError, match="batch_size="):
        make_lm(batch_size=batch_size)


@pytest.mark.parametrize(
    ("user", "harness_adds", "device"),
    [
        ({}, None, "auto"),
        ({}, {"device": "cuda:0", "batch_size": 1, "max_batch_size": None}, "auto"),  # lm_eval's default
        ({}, {"device": "cpu"}, "cpu"),
        ({}, {"device": "cuda:1"}, "cuda:1"),
        ({"device": "cpu"}, {"device": "cuda:0"}, "cpu"),
        ({"device": "cpu"}, {"device": "cuda:1"}, "cpu"),  # given twice: model_args win
        ({"device": "cuda:0"}, {"device": "cpu"}, "cuda:0"),
    ],
)
def test_devices_given_once_or_twice(
    make_lm: MakeLM, user: dict[str, Any], harness_adds: dict[str, Any] | None, device: str
) -> None:
    make_lm()  # puts the scripted engine in place
    text = ",".join(["pretrained=demo", *(f"{name}={value}" for name, value in user.items())])
    made = [
        ScriptedLM.create_from_arg_obj({"pretrained": "demo"} | user, harness_adds),
        ScriptedLM.create_from_arg_string(text, harness_adds),
    ]
    assert [lm.engine.options["device"] for lm in made] == [device, device]


def test_model_arguments_come_as_values_or_text(make_lm: MakeLM) -> None:
    lm = make_lm(max_length="100", seed="7", max_gen_toks="20", kv_pages=None, dtype=None, trust_remote_code="false")
    assert (lm.max_length, lm.max_gen_toks) == (100, 20)
    assert "kv_pages" not in lm.engine.options
    assert lm.engine.options["dtype"] == "auto"
    assert lm.get_model_info()["sdar_lm_eval"]["seed"] == 7
    assert make_lm(chat_template=False).get_model_info()["sdar_lm_eval"]["chat_template"] == "off"


def test_going_beyond_the_checkpoint_is_said(make_lm: MakeLM, caplog: pytest.LogCaptureFixture) -> None:
    make_lm(block_length=4, max_length=2048)
    assert "trained" not in caplog.text
    make_lm(block_length=8, max_length=4096)
    assert "block_length=8, but checkpoint 'demo' was trained with 4" in caplog.text
    assert "max_length=4096, but checkpoint 'demo' was trained for 2048 tokens" in caplog.text


# Prompts: length, emptiness, BOS


def test_long_prompts_lose_their_beginning_and_it_is_said(make_lm: MakeLM, caplog: pytest.LogCaptureFixture) -> None:
    lm = make_lm(max_length=40, max_gen_toks=30, chat_template="off")
    long, short = "first " * 30 + "last", "short"
    lm.generate_until([request(long), request(short), request(long + " one")])
    by_length = {len(r.prompt_ids): r.prompt_ids for r in lm.engine.requests}
    room = 40 - 32
    assert max(by_length) == room
    assert "2 of 3 prompts are longer than max_length - max_gen_toks" in caplog.text
    assert by_length[room] in {tuple(lm.tok_encode(text)[-room:]) for text in (long, long + " one")}
    caplog.clear()
    lm.generate_until([request(short)])
    assert "prompts are longer" not in caplog.text


def test_a_length_that_leaves_no_room_for_a_prompt_is_refused(make_lm: MakeLM) -> None:
    with pytest.raises(UserError, match="max_gen_toks=512 must be below max_length=512"):
        make_lm(max_length=512, max_gen_toks=512)
    lm = make_lm(max_length=512, max_gen_toks=511)
    with pytest.raises(UserError, match=r"max_gen_toks=600 must be below max_length=512.*allows 2048"):
        lm.generate_until([request("q", {"max_gen_toks": 600})])


def test_a_short_max_length_is_no_mistake_where_the_task_asks_for_less(make_lm: MakeLM) -> None:
    lm = make_lm(max_length=100)  # below the default of max_gen_toks, which nobody gave
    assert lm.generate_until([request("q", {"max_gen_toks": 60})])
    with pytest.raises(UserError, match="max_gen_toks=512 must be below max_length=100"):
        lm.generate_until([request("q", {"until": []})])


def test_a_block_length_that_was_not_trained_is_warned_of(make_lm: MakeLM, caplog: pytest.LogCaptureFixture) -> None:
    lm = make_lm()
    lm.generate_until([request("a"), request("b")])
    assert "was trained with" not in caplog.text
    lm.generate_until([request("a", {"block_length": 8}), request("b", {"block_length": 8})])
    assert caplog.text.count("block_length=8, but checkpoint 'demo' was trained with 4") == 1
    make_lm(block_length=2)
    assert "block_length=2, but checkpoint 'demo' was trained with 4" in caplog.text


def test_an_empty_context_becomes_the_prefix_token(make_lm: MakeLM, tmp_path: Path) -> None:
    lm = make_lm(chat_template="off")
    lm.generate_until([request("")])
    assert lm.engine.requests[0].prompt_ids == (lm.prefix_token_id,) == (lm.eot_token_id,) == (707,)
    assert make_lm().prompt_of("") == "<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n"
    with_bos = make_lm(checkpoint_with(tmp_path / "bos", bos=True))
    with_bos.generate_until([request("")])
    assert with_bos.engine.requests[0].prompt_ids == (707,)


@pytest.mark.parametrize("before", [None, "false", "true"])
def test_prompts_are_tokenized_together_as_one_by_one(
    make_lm: MakeLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str | None
) -> None:
    """In a template, without, with the BOS there or not, empty; in parallel, which is off again afterwards."""
    monkeypatch.setattr("sdar_lm_eval.lm.prompts.TOKENIZED_TOGETHER", 2)
    seen = []
    if before is None:
        monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    else:
        monkeypatch.setenv("TOKENIZERS_PARALLELISM", before)
    monkeypatch.delenv("RAYON_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(9))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    lm = make_lm(checkpoint_with(tmp_path / "bos", bos=True, template=BOS_TEMPLATE), chat_template="off")
    tokenizer = lm.tokenizer

    def keep(texts: list[str], **options: Any) -> Any:
        seen.append((len(texts), (os.environ["TOKENIZERS_PARALLELISM"], os.environ.get("RAYON_NUM_THREADS"))))
        return type(tokenizer).__call__(tokenizer, texts, **options)

    rendered = lm.apply_chat_template([{"role": "user", "content": "4"}])
    prompts = ["2 + 3?", "<|endoftext|>2 + 3?", "", rendered, "5", "6"]
    expected = [lm.tok_encode(prompt) for prompt in prompts]
    own = Prompts(lm.checkpoint, "off")
    own.tokenizer = _Calls(tokenizer, keep)
    is_rendered = [prompt == rendered for prompt in prompts]
    assert own.encode_prompts(prompts, is_rendered) == expected
    assert {count for count, _ in seen} <= {1, 2} and sum(count for count, _ in seen) == len(prompts)
    assert {values for _, values in seen} == {("true", "4")}  # a rank's share of the cores
    assert os.environ["TOKENIZERS_PARALLELISM"] == (before or "false")
    assert "RAYON_NUM_THREADS" not in os.environ

    # A forked process does not tokenize in parallel: fork copies no threads.
    seen.clear()
    monkeypatch.setattr(os, "getpid", lambda: -1)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    assert own.encode_prompts(prompts, is_rendered) == expected
    assert {values for _, values in seen} == {("false", None)}

    # A rank with one core does not tokenize in parallel either.
    seen.clear()
    monkeypatch.undo()
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(9))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert own.encode_prompts(prompts, is_rendered) == expected
    assert {values for _, values in seen} == {("false", None)}


class _Calls:
    """A tokenizer whose calls are looked at."""

    def __init__(self, tokenizer: Any, call: Callable[..., Any]) -> None:
        self._tokenizer, self._call = tokenizer, call

    def __call__(self, texts: list[str], **options: Any) -> Any:
        return self._call(texts, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


def test_there_is_one_bos_whoever_writes_it(make_lm: MakeLM, tmp_path: Path, evaluate: Evaluate) -> None:
    lm = make_lm(checkpoint_with(tmp_path / "bos", bos=True, template=BOS_TEMPLATE))
    assert lm.prompt_of("q") == "<|endoftext|>[user]q"
    evaluate(lm, apply_chat_template=True, limit=1)
    assert lm.tokenizer.decode(lm.engine.requests[-1].prompt_ids) == "<|endoftext|>[user]Question 0"

    plain = make_lm(tmp_path / "bos", chat_template="off")
    assert plain.prompt_of("q") == plain.prompt_of("<|endoftext|>q") == "<|endoftext|>q"
    assert plain.tok_encode("q") == [707, *plain.tok_encode("q", add_special_tokens=False)]
    assert make_lm(chat_template="off").prompt_of("q") == "q"
    # A template that writes none means none.
    own = make_lm(checkpoint_with(tmp_path / "own", bos=True, template=(DEMO / "chat_template.jinja").read_text()))
    assert own.prompt_of("q") == TURN.format("q")


# Chat template

TURN = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("mode", ["auto", "on"])
def test_a_prompt_becomes_one_user_turn_and_it_is_said_once(
    make_lm: MakeLM, evaluate: Evaluate, caplog: pytest.LogCaptureFixture, mode: str
) -> None:
    lm = make_lm(chat_template=mode)
    evaluate(lm)
    prompts = sorted(lm.tokenizer.decode(r.prompt_ids) for r in lm.engine.requests)
    assert prompts == [TURN.format(f"Question {i}") for i in range(5)]
    lm.prompt_of("q")
    assert caplog.text.count("checkpoint's chat template is applied to prompts, as by --apply_chat_template") == 1


def test_off_leaves_prompts_as_they_are(make_lm: MakeLM, caplog: pytest.LogCaptureFixture) -> None:
    assert make_lm(chat_template="off").prompt_of("Question 1") == "Question 1"
    assert "chat template" not in caplog.text


@pytest.mark.parametrize("mode", ["auto", "off"])
def test_a_checkpoint_without_template_is_warned_of_once(
    make_lm: MakeLM, evaluate: Evaluate, caplog: pytest.LogCaptureFixture, tmp_path: Path, mode: str
) -> None:
    lm = make_lm(checkpoint_with(tmp_path / "base", template=None), chat_template=mode)
    evaluate(lm)
    evaluate(lm)
    assert caplog.text.count("has no chat template, so prompts are sent as plain text") == (mode == "auto")


@pytest.mark.parametrize("mode", ["auto", "on", "off"])
def test_the_harness_template_is_not_applied_again(
    make_lm: MakeLM, evaluate: Evaluate, caplog: pytest.LogCaptureFixture, mode: str
) -> None:
    lm = make_lm(chat_template=mode)
    results = evaluate(lm, apply_chat_template=True, system_instruction="Be brief.", limit=1)
    prompt = "<|im_start|>system\nBe brief.<|im_end|>\n" + TURN.format("Question 0")
    assert lm.tokenizer.decode(lm.engine.requests[-1].prompt_ids) == prompt
    assert results["samples"]["five"][0]["arguments"][0][0] == prompt
    assert "checkpoint's chat template is applied to prompts" not in caplog.text
    # The next evaluation with the same model is on its own.
    evaluate(lm, limit=1)
    expected = "Question 0" if mode == "off" else TURN.format("Question 0")
    assert lm.tokenizer.decode(lm.engine.requests[-1].prompt_ids) == expected


def test_few_shot_examples_are_turns(make_lm: MakeLM, evaluate: Evaluate) -> None:
    lm = make_lm()
    lines = ("output_type: generate_until", "num_fewshot: 1", "fewshot_config: {split: train, sampler: first_n}")
    evaluate(lm, *lines, apply_chat_template=True, fewshot_as_multiturn=True, samples={"five": [4]})
    prompt = lm.tokenizer.decode(lm.engine.requests[-1].prompt_ids)
    assert prompt == TURN.format("Question 0") + "0<|im_end|>\n" + TURN.format("Question 4")


def test_a_question_that_looks_like_the_template_is_a_question(
    make_lm: MakeLM, caplog: pytest.LogCaptureFixture
) -> None:
    lm = make_lm()
    start, end = (lm.tokenizer.convert_tokens_to_ids(token) for token in ("<|im_start|>", "<|im_end|>"))
    for question in (TURN.format("q"), "<|im_start|>", "What does <|im_start|> mean?", "user"):
        assert lm.prompt_of(question) == TURN.format(question)
        sent = lm.engine.requests[-1].prompt_ids
        assert (sent.count(start), sent.count(end)) == (2, 1)  # the template's own
    assert caplog.text.count("hold special tokens in their text, such as '<|im_start|>', which are read as text") == 1
    # Where a task writes the template itself, the user says so.
    own = make_lm(chat_template="off")
    assert own.prompt_of(TURN.format("q")) == TURN.format("q")
    assert own.engine.requests[-1].prompt_ids.count(start) == 2


def test_a_template_without_constant_text_is_not_applied_twice(
    make_lm: MakeLM, evaluate: Evaluate, tmp_path: Path
) -> None:
    lm = make_lm(checkpoint_with(tmp_path / "bare", template=BARE_TEMPLATE))
    evaluate(lm, apply_chat_template=True, limit=1)
    assert lm.tokenizer.decode(lm.engine.requests[-1].prompt_ids) == "Question 0!"
    assert lm.prompt_of("q") == "q!"


def test_gen_prefix_is_left_open(make_lm: MakeLM, evaluate: Evaluate) -> None:
    lm = make_lm()
    lines = ("output_type: generate_until", "gen_prefix: 'The answer is'")
    evaluate(lm, *lines, apply_chat_template=True, limit=1)
    assert lm.tokenizer.decode(lm.engine.requests[-1].prompt_ids) == TURN.format("Question 0") + "The answer is"


def test_a_checkpoint_without_template(make_lm: MakeLM, evaluate: Evaluate, tmp_path: Path) -> None:
    folder = checkpoint_with(tmp_path / "none")
    lm = make_lm(folder)
    assert lm.prompt_of("Question") == "Question"
    assert lm.chat_template(True) is None
    with pytest.raises(UserError, match="has no chat template; leave out --apply_chat_template"):
        evaluate(lm, apply_chat_template=True)
    with pytest.raises(UserError, match=r"chat_template=on, but checkpoint .* has no chat template"):
        make_lm(folder, chat_template="on")


def test_the_harness_can_ask_for_the_template_and_its_name(make_lm: MakeLM) -> None:
    lm = make_lm()
    assert "<|im_start|>" in str(lm.chat_template(True))
    assert lm.chat_template(False) is None
    assert lm.tokenizer_name.startswith("demo-")


# Cache


def test_the_harness_s_own_table_is_bypassed(make_lm: MakeLM, tmp_path: Path) -> None:
    """Its keys hold neither model nor task, seed or repeat."""
    lm = make_lm()
    wrapped = cached(lm, tmp_path / "c.db")
    wrapped.generate_until(requests_of(3))
    assert len(wrapped.dbdict) == 0
    with sqlite3.connect(tmp_path / "c.db") as file:
        assert file.execute("SELECT count(*) FROM sdar_records").fetchone() == (3,)


@pytest.mark.parametrize("gen_kwargs", [GREEDY, SAMPLED, SAMPLED | {"do_sample": "false"}])
@pytest.mark.parametrize("error", [EngineError("out of luck"), RuntimeError("CUDA error"), KeyboardInterrupt()])
def test_what_was_finished_before_a_failure_is_kept(
    make_lm: MakeLM, tmp_path: Path, gen_kwargs: dict[str, Any], error: BaseException
) -> None:
    lm = make_lm()
    lm.engine.answers_before_error, lm.engine.error = 3, error  # type: ignore[assignment]
    with pytest.raises(type(error)):
        cached(lm, tmp_path / "c.db").generate_until(requests_of(5, gen_kwargs))
    finished = {r.prompt_ids for r in lm.engine.requests}
    assert len(finished) == 3
    assert lm.counts.requests == 3

    again = make_lm()
    answers = cached(again, tmp_path / "c.db").generate_until(requests_of(5, gen_kwargs))
    assert len(again.engine.requests) == 2
    assert not finished & {r.prompt_ids for r in again.engine.requests}
    assert answers == make_lm().generate_until(requests_of(5, gen_kwargs))


def test_sampled_answers_are_read_back_as_they_would_be_drawn(
    make_lm: MakeLM, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    drawn = make_lm().generate_until(requests_of(4, SAMPLED, repeats=3))
    assert len(set(drawn)) == 12
    assert cached(make_lm(), tmp_path / "c.db").generate_until(requests_of(4, SAMPLED, repeats=3)) == drawn
    again = make_lm()
    assert cached(again, tmp_path / "c.db").generate_until(requests_of(4, SAMPLED, repeats=3)) == drawn
    assert not again.engine.requests
    # Other questions, more repeats and other lengths are drawn.
    more = cached(again, tmp_path / "c.db").generate_until(requests_of(5, SAMPLED, repeats=4))
    assert len(again.engine.requests) == 5 * 4 - 4 * 3
    assert "12 of 20 answers are there already" in caplog.text
    assert [more[4 * i : 4 * i + 3] for i in range(4)] == [drawn[3 * i : 3 * i + 3] for i in range(4)]
    cached(again, tmp_path / "c.db").generate_until(requests_of(1, SAMPLED | {"max_gen_toks": 31}))
    assert len(again.engine.requests) == 5 * 4 - 4 * 3 + 1


def test_drawn_repeats_are_read_back_each_as_itself(make_lm: MakeLM, tmp_path: Path) -> None:
    drawn = {"temperature": 0.7, "max_gen_toks": 32}  # drawn, by the harness's own rule, but not marked
    first = cached(make_lm(), tmp_path / "c.db").generate_until(requests_of(2, drawn, repeats=3))
    assert len(set(first)) == 6
    again = make_lm()
    assert cached(again, tmp_path / "c.db").generate_until(requests_of(2, drawn, repeats=3)) == first
    assert not again.engine.requests


@pytest.mark.parametrize(
    "gen_kwargs", [GREEDY, SAMPLED, {"temperature": 0.7}, GREEDY | {"remasking_strategy": "random"}]
)
@pytest.mark.parametrize("kept", ["cache", "folder"])
def test_tasks_with_equal_requests_keep_their_own_draws(
    make_lm: MakeLM, tmp_path: Path, gen_kwargs: dict[str, Any], kept: str
) -> None:
    def ask() -> tuple[list[str], int]:
        lm = make_lm(answers=tmp_path / "answers" if kept == "folder" else None)
        asked = [request("the same", gen_kwargs), request("the same", gen_kwargs)]
        asked[1].task_name = "another_task"
        model = cached(lm, tmp_path / "c.db") if kept == "cache" else lm
        return model.generate_until(asked), len(lm.engine.requests)

    first, computed = ask()
    assert ask() == (first, 0)
    assert computed == 2


@pytest.mark.parametrize(
    "settings",
    [
        [{}, {"confidence_threshold": 0.9}, {"block_length": 8}],
        [{}, {"chat_template": "off"}],
        [{}, {"max_length": 40}],
        [{}, {"until": ["1"]}, {"max_gen_toks": 600}],
        [{"temperature": 0.5}, {"temperature": 0.5, "seed": 1}, {"temperature": 0.6}],
    ],
)
@pytest.mark.parametrize("kept", ["cache", "folder"])
def test_answers_of_several_settings_are_kept_side_by_side(
    make_lm: MakeLM, tmp_path: Path, settings: list[dict[str, Any]], kept: str
) -> None:
    """Each run gets the answers that it would have computed."""
    asked = [request(f"Question {i}" + " and more" * 9, {}) for i in range(2)]
    fresh = [make_lm(**{"max_gen_toks": 30} | given).generate_until(asked) for given in settings]
    for computed in (2, 0):
        for given, expected in zip(settings, fresh, strict=True):
            folder = {"answers": tmp_path / "answers"} if kept == "folder" else {}
            lm = make_lm(**{"max_gen_toks": 30} | given, **folder)
            model = cached(lm, tmp_path / "c.db") if kept == "cache" else lm
            assert model.generate_until(asked) == expected
            assert len(lm.engine.requests) == computed


@pytest.mark.parametrize("kept", ["cache", "folder"])
def test_answers_of_other_weights_are_left_alone_and_it_is_said(
    make_lm: MakeLM, tmp_path: Path, caplog: pytest.LogCaptureFixture, kept: str
) -> None:
    def ask(pretrained: str | Path) -> int:
        lm = make_lm(pretrained, answers=tmp_path / "answers" if kept == "folder" else None)
        (cached(lm, tmp_path / "c.db") if kept == "cache" else lm).generate_until(requests_of(2))
        return len(lm.engine.requests)

    assert (ask("demo"), ask("demo")) == (2, 0)
    assert "ignored" not in caplog.text
    folder = checkpoint_with(tmp_path / "other")
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-3, 2)
        file.write(b"\x01\x02\x03")
    assert (ask(folder), ask(folder), ask("demo")) == (2, 0, 0)
    assert "are ignored (checkpoint was '" in caplog.text


@pytest.mark.parametrize("changed", [{"answer_options": {"quantization": "fp8"}}, {"engine_commit": "1" * 40}])
def test_answers_of_an_engine_that_answers_otherwise_are_left_alone(
    make_lm: MakeLM, tmp_path: Path, changed: dict[str, Any]
) -> None:
    def ask(**info: Any) -> int:
        lm = make_lm()
        lm.engine.info = dataclasses.replace(lm.engine.info, **info)
        cached(lm, tmp_path / "c.db").generate_until(requests_of(2))
        return len(lm.engine.requests)

    assert [ask(), ask(**changed), ask(**changed), ask()] == [2, 2, 0, 0]
    off = {"answer_options": {"quantization": None, "reproducible": False}}
    assert ask(**off) == 0  # options that are off need no mention: answers from before the options hold


def test_another_model_s_cache_file_may_be_shared(make_lm: MakeLM, tmp_path: Path) -> None:
    theirs = CachingLM(lm_eval.api.registry.get_model("dummy")(), str(tmp_path / "c.db")).dbdict
    theirs["key"] = "lol"
    assert cached(make_lm(), tmp_path / "c.db").generate_until(requests_of(1)) != ["lol"]
    assert theirs["key"] == "lol"


# Repeats


def test_repeats_differ_where_drawn_and_cost_nothing_where_not(make_lm: MakeLM) -> None:
    lm = make_lm()
    drawn = lm.generate_until(requests_of(3, SAMPLED, repeats=3))
    assert len(set(drawn)) == 9
    assert [r.decoding.greedy for r in lm.engine.requests] == [False] * 9
    assert len({r.seed for r in lm.engine.requests}) == 9
    lm.engine.requests.clear()
    greedy = lm.generate_until(requests_of(3, GREEDY, repeats=3))
    assert len(greedy) == 9
    assert greedy[0] == greedy[1] == greedy[2] != greedy[3]
    assert len(lm.engine.requests) == 3


def test_a_draw_depends_on_seed_question_and_repeat_alone(make_lm: MakeLM, evaluate: Evaluate) -> None:
    lines = ("output_type: generate_until", "repeats: 3", f"generation_kwargs: {json.dumps(SAMPLED)}")

    def draws(lm: SDARLM, **settings: Any) -> dict[str, list[str]]:
        results = evaluate(lm, *lines, **settings)
        return {sample["doc"]["question"]: sample["resps"][0] for sample in results["samples"]["five"]}

    everything = draws(make_lm())
    assert len({draw for of_one in everything.values() for draw in of_one}) == 15
    assert draws(make_lm()) == everything
    assert draws(make_lm(), limit=2) == {question: everything[question] for question in ("Question 0", "Question 1")}
    assert draws(make_lm(), samples={"five": [3]}) == {"Question 3": everything["Question 3"]}
    other = draws(make_lm(seed=1))
    assert not {d for ds in other.values() for d in ds} & {d for ds in everything.values() for d in ds}


def test_padding_for_other_ranks_gets_the_same_answers_for_nothing(make_lm: MakeLM) -> None:
    lm = make_lm()
    asked = requests_of(2, SAMPLED, repeats=3)
    padding = [asked[-1]] * 3  # lm_eval pads a rank that has fewer documents with copies of its last one
    answers = lm.generate_until([*asked, *padding])
    assert len(lm.engine.requests) == 6
    assert answers[6:] == answers[3:6]


# What it tells


def test_model_info_is_plain_json_and_reaches_the_results(make_lm: MakeLM, evaluate: Evaluate) -> None:
    lm = make_lm(confidence_threshold=0.6)
    config = evaluate(lm, gen_kwargs="max_gen_toks=8")["config"]
    info = config["sdar_lm_eval"]
    assert json.loads(json.dumps(lm.get_model_info())) == {name: config[name] for name in lm.get_model_info()}
    assert config["model_dtype"] == "float32"
    assert (info["engine"], info["device"], info["pretrained"], info["block_size"]) == ("scripted", "cpu", "demo", 4)
    assert info["decoding"]["confidence_threshold"] == info["decoding_of_tasks"]["five"]["confidence_threshold"] == 0.6
    assert info["decoding"]["max_gen_toks"] == 512
    assert info["decoding_of_tasks"]["five"]["max_gen_toks"] == 8
    assert info["run"]["requests"] == 5


def test_the_summary_adds_up(make_lm: MakeLM, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lm = make_lm(answer=lambda r: "one two three"[: len(r.prompt_ids) % 13])
    lm.generate_until(requests_of(4))
    lm.generate_until(requests_of(3))
    sent = lm.engine.requests
    new = [len(lm.tok_encode(lm.engine.answer(r))) for r in sent]
    run = lm.get_model_info()["sdar_lm_eval"]["run"]
    assert run["requests"] == 7
    assert run["new_tokens"] == sum(new)
    assert run["prompt_tokens"] == sum(len(r.prompt_ids) for r in sent)
    assert run["forwards"] == {"prefill": 7, "denoising": sum(new), "commit": 14}
    assert run["tokens_per_forward"] == round(sum(new) / (sum(new) + 14), 3)
    assert run["peak_memory_bytes"] == 1 << 30
    assert f"7 requests, {sum(new)} new tokens in" in caplog.text


def test_each_finished_request_is_a_line_of_the_trace(make_lm: MakeLM, tmp_path: Path) -> None:
    lm = make_lm(trace=tmp_path / "trace.jsonl", answer=lambda _: "1 + 1. Ümlaut")
    lm.engine.answers_before_error = 4
    with pytest.raises(EngineError):
        lm.generate_until([*requests_of(2, SAMPLED | {"until": [" "]}, repeats=2), request("q", doc_id=9)])
    head, *lines = (json.loads(line) for line in (tmp_path / "trace.jsonl").read_text().splitlines())
    assert head["model"]["pretrained"] == "demo" and head["model"]["checkpoint_fingerprint"]
    assert len(lines) == 4
    assert {(line["task"], line["document"], line["repeat"]) for line in lines} < {
        ("a_task", 0, 0), ("a_task", 0, 1), ("a_task", 1, 0), ("a_task", 1, 1), ("a_task", 9, 0)
    }  # fmt: skip
    line = next(line for line in lines if line["document"] == 0)
    assert line["text"] == "1"
    assert lm.tokenizer.decode(line["prompt_ids"]) == line["prompt"] == TURN.format("Question 0")
    assert line["decoding"]["block_length"] == 4
    assert line["token_ids"] == lm.tok_encode("1 + 1. Ümlaut")
    assert "".join(line["tokens"]) == "1 + 1. Ümlaut" and len(line["tokens"]) == line["new_tokens"]
    assert line["finish_reason"] == "stop"
    assert (
        line["new_tokens"]
        == len(line["unmasked_at"])
        == len(line["confidences"])
        == len(lm.tok_encode("1 + 1. Ümlaut"))
    )
    assert line["forwards"] == {"prefill": 1, "denoising": line["new_tokens"], "commit": 2}
    assert all(r.record_steps for r in lm.engine.requests)


def test_steps_are_recorded_unless_told_not_to(make_lm: MakeLM) -> None:
    for recorded in (True, False):
        lm = make_lm(record_steps=recorded)
        lm.generate_until([request("q")])
        assert lm.engine.requests[0].record_steps == recorded


def test_the_bar_can_be_switched_off(make_lm: MakeLM, capsys: pytest.CaptureFixture[str]) -> None:
    lm = make_lm()
    lm.generate_until([request("q")])
    assert "Generating: 100%" in capsys.readouterr().err
    lm.generate_until([request("q")], disable_tqdm=True)
    assert "Generating" not in capsys.readouterr().err


@pytest.mark.parametrize("output_type", ["multiple_choice", "loglikelihood", "loglikelihood_rolling"])
def test_log_likelihoods_are_refused_in_one_clear_error(make_lm: MakeLM, evaluate: Evaluate, output_type: str) -> None:
    lines = [f"output_type: {output_type}"]
    lines += ["doc_to_choice: ['a', 'b']", "doc_to_target: 0"] if output_type == "multiple_choice" else []
    lines += ["metric_list: [{metric: word_perplexity}]"] if output_type == "loglikelihood_rolling" else []
    with pytest.raises(UserError, match=r"task 'five' asks for log-likelihoods.* Use --model sdar"):
        evaluate(make_lm(), *lines)


def test_the_device_is_where_the_harness_looks_for_it(make_lm: MakeLM) -> None:
    lm = make_lm()
    assert lm.device == "cpu"
    assert torch.tensor(1, device=lm.device).device.type == "cpu"
    assert (lm.rank, lm.world_size) == (0, 1)
    assert lm.gather_object({"a": 1}) == [{"a": 1}]
    assert lm.all_gather(torch.tensor([3])).tolist() == [3]
    assert lm.accelerator.gather(torch.tensor([3])).tolist() == [3]  # what lm_eval up to 0.4.12 calls
    lm.accelerator.wait_for_everyone()


@pytest.mark.parametrize(
    ("device", "rank", "expected"),
    [("auto", 1, "cuda:1"), ("cuda", 3, "cuda:1"), ("cuda:0", 1, "cuda:0"), ("cpu", 1, "cpu")],
)
def test_each_rank_takes_a_gpu_of_its_own(
    make_lm: MakeLM, monkeypatch: pytest.MonkeyPatch, device: str, rank: int, expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    shared = []
    ranks = Ranks()
    ranks.local_rank, ranks.world_size = rank, 4
    monkeypatch.setattr(ranks, "share_cpu", lambda: shared.append(True))
    monkeypatch.setattr(ranks, "gather_object", lambda obj: None)  # the others are not there
    monkeypatch.setattr(harness, "Ranks", lambda: ranks)
    assert make_lm(device=device).engine.options["device"] == expected
    assert shared  # the scripted engine is on the CPU


# The real engine


def test_the_demo_answers_through_lm_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda _: None)
    manager = TaskManager(include_path=str(Path(sdar_lm_eval.tasks.__file__).parent), include_defaults=False)
    lm = SDARLM("demo")
    settings = {"tasks": ["gsm8k_sdar_demo"], "task_manager": manager, "bootstrap_iters": 0, "limit": 12}
    results = lm_eval.simple_evaluate(lm, **settings)
    assert results is not None
    assert results["results"]["gsm8k_sdar_demo"]["exact_match,strict-match"] > 0.6
    samples = [s for s in results["samples"]["gsm8k_sdar_demo"] if s["filter"] == "strict-match"]
    assert [s["doc_id"] for s in samples] == list(range(12))
    counts = results["config"]["sdar_lm_eval"]["run"]
    texts = [s["resps"][0][0] for s in samples]
    assert counts["new_tokens"] == sum(len(lm.tok_encode(text, add_special_tokens=False)) for text in texts)

    # Sampled, the batch makes no difference to a draw.
    sampled = settings | {"gen_kwargs": "do_sample=true,temperature=1.0", "limit": 3}
    together = lm_eval.simple_evaluate(lm, **sampled)
    alone = lm_eval.simple_evaluate(SDARLM("demo", max_active=1), **sampled)
    assert together is not None and alone is not None
    drawn, drawn_alone = ([s["resps"] for s in r["samples"]["gsm8k_sdar_demo"]] for r in (together, alone))
    assert drawn == drawn_alone
    assert drawn[0][0][0] != texts[0]
