"""Evaluations of a model that thinks: thoughts never score and never stop, and are always kept.

The model is `thinking_checkpoint.py`'s; each engine runs it. This file is the program of the ranks' test too.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lm_eval
import lm_eval.evaluator
import lmdeploy_standin
import pytest
import torch
from jetengine_standin import standin
from lm_eval.api.model import LM
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager
from scripted_lm import GREEDY, MakeLM, request
from support import QUICK_START, REAL_FOLDER, environment, random_checkpoint
from thinking_checkpoint import thinking_checkpoint
from transformers import AutoTokenizer

from sdar_lm_eval.checkpoint import Checkpoint
from sdar_lm_eval.checkpoint.tokenizer import copy_tokenizer
from sdar_lm_eval.errors import UserError
from sdar_lm_eval.lm.model import SDARLM, SDARJetEngineLM, SDARLMDeployLM
from sdar_lm_eval.lm.prompts import Prompts
from sdar_lm_eval.lm.thoughts import Thoughts
from sdar_lm_eval.loaded import load
from sdar_lm_eval.report.documents import documents_of
from sdar_lm_eval.report.runs import read_runs
from sdar_lm_eval.tasks.thoughts import without_thoughts
from sdar_lm_eval.thinking import Thought

DATA = """
from datasets import Dataset, DatasetDict

def load(**_):
    rows = [{"question": f"Question {i}", "answer": "7"} for i in range(5)]
    return DatasetDict({"test": Dataset.from_list(rows), "train": Dataset.from_list(rows)})
"""
TASK = """
task: thinks
custom_dataset: !function data.load
test_split: test
fewshot_split: train
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
filter_list:
  - name: number
    filter: [{function: regex, regex_pattern: "([0-9])"}, {function: take_first}]
metric_list: [{metric: exact_match}]
"""
UNTIL = 'generation_kwargs: {until: ["e"], do_sample: false, max_gen_toks: 24}\n'
DRAWN = 'repeats: 3\ngeneration_kwargs: {until: ["e"], do_sample: true, temperature: 1.0, max_gen_toks: 24}\n'
STATIC = {"remasking_strategy": "low_confidence_static"}
CONVERSATION = [{"role": "user", "content": "2 + 2?"}]
Lines = dict[tuple[int, int], tuple[str, dict[str, Any] | None]]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda _: None)  # slow, and of no interest here


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(thinking_checkpoint(tmp_path_factory.mktemp("thinker")))


@pytest.fixture(params=["native", "jetengine 0.2.0", "jetengine 0.1.0", "lmdeploy"])
def make(request: pytest.FixtureRequest, thinker: str) -> Iterator[Callable[..., SDARLM]]:
    """A function that opens the model, on each engine in turn."""
    engine, _, version = request.param.partition(" ")
    if engine == "native":
        yield lambda **settings: SDARLM(thinker, **STATIC, **settings)
    elif engine == "lmdeploy":
        with lmdeploy_standin.standin():
            yield lambda **settings: SDARLMDeployLM(thinker, **STATIC, **settings)
    else:
        with standin(version) as shared:
            shared.faults.alone = False
            yield lambda **settings: SDARJetEngineLM(thinker, **STATIC, **settings)


def evaluate(lm: Any, folder: Path, lines: str = UNTIL, **settings: Any) -> Any:
    tasks = folder / "tasks"
    tasks.mkdir(exist_ok=True)
    (tasks / "data.py").write_text(DATA)
    (tasks / "thinks.yaml").write_text(TASK + lines)
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    settings = {"bootstrap_iters": 0, "log_samples": True} | settings
    return lm_eval.simple_evaluate(lm, tasks=["thinks"], task_manager=manager, **settings)


def answers_of(results: Any, repeats: int = 1) -> Lines:
    """(document, repeat) -> the scored text, and the thought beside it."""
    found = {}
    for line in results["samples"]["thinks"]:
        thoughts = line["thoughts"][0] if "thoughts" in line else [None] * len(line["resps"][0])
        for repeat in range(repeats):
            found[line["doc_id"], repeat] = line["resps"][0][repeat], thoughts[repeat]
    return found


def score(results: Any) -> float:
    return float(results["results"]["thinks"]["exact_match,number"])


def ended(text: str) -> dict[str, Any]:
    return {"text": text, "ended": True}


def run_of(lm: SDARLM) -> dict[str, Any]:
    facts: Any = lm.get_model_info()["sdar_lm_eval"]
    return dict(facts["run"])


def test_thoughts_never_score_never_stop_and_are_kept(
    make: Callable[..., SDARLM], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The thought holds the stop string, and a wrong number; answers= and --use_cache give the same once more."""
    caplog.set_level(logging.INFO, logger="sdar_lm_eval")
    expected = {(i, 0): ("7r", ended("<think>Ae5C")) for i in range(5)}
    kept = {"answers": str(tmp_path / "answers")}
    lm = make(trace=str(tmp_path / "trace.jsonl"), **kept)
    results = evaluate(lm, tmp_path, use_cache=str(tmp_path / "cache"))
    assert answers_of(results) == expected
    assert score(results) == 1
    assert run_of(lm)["thoughts"] == {"answers": 5, "unfinished": 0}
    assert "0 of 5 answers ended while thinking" in caplog.text
    assert "thinking" not in lm.get_model_info()["sdar_lm_eval"]  # type: ignore[operator]  # nobody set anything
    lines = [json.loads(line) for line in (tmp_path / "trace.jsonl").read_text().splitlines()[1:]]
    assert [(line["text"], line["thought"], line["thought_ended"]) for line in lines] == [
        ("7r", "<think>Ae5C", True)
    ] * 5
    assert {"".join(line["texts"]) for line in lm.denoising_lines()("thinks")} == {"<think>Ae5C</think>7re"}
    lm.close()
    for again, settings in ((make(**kept), {}), (make(), {"use_cache": str(tmp_path / "cache")})):
        results = evaluate(again, tmp_path, **settings)
        assert (answers_of(results), score(results)) == (expected, 1)
        assert again.counts.requests == 0
        assert run_of(again)["thoughts"] == {"answers": 5, "unfinished": 0}
        again.close()


@pytest.mark.parametrize("prefix", ["<think>", "<think>\\n"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"apply_chat_template": True}, {"apply_chat_template": True, "num_fewshot": 2, "fewshot_as_multiturn": True}],
)
def test_an_answer_prefix_stands_behind_the_opening(
    thinker: str, tmp_path: Path, prefix: str, settings: dict[str, Any]
) -> None:
    """In every way of templating; the prefix belongs to the prompt, and the thought goes on from there."""
    lm = SDARLM(thinker, **STATIC, answer_prefix=prefix)
    results = evaluate(lm, tmp_path, limit=2, **settings)
    prefix = prefix.replace("\\n", "\n")
    example = str(lm.evaluation.account.sent["thinks"].example)
    assert example.endswith(f"Question 0<|im_end|>\n<|im_start|>assistant\n{prefix}")
    assert example.count("<think>") == 1
    thought = "Ae5C" if prefix == "<think>" else "<think>Ae5C"  # the script knows no "\n", and opens a thought
    assert answers_of(results) == {(i, 0): ("7r", ended(thought)) for i in range(2)}
    facts: Any = lm.get_model_info()["sdar_lm_eval"]
    assert facts["thinking"]["answer_prefix"].replace("\\n", "\n") == prefix
    assert lm._prompts.template_hash != SDARLM(thinker)._prompts.template_hash


def test_a_tasks_own_beginning_of_the_answer_follows_the_prefix(thinker: str, tmp_path: Path) -> None:
    """And one that opens a thought follows the assistant's opening."""
    for prefix, begun, tail in (("<think>", "Ae", "<think>Ae"), ("", "<think>A", "<think>A"), ("", "So", "So")):
        lm = SDARLM(thinker, **STATIC, **({"answer_prefix": prefix} if prefix else {}))
        results = evaluate(lm, tmp_path, f'gen_prefix: "{begun}"\n{UNTIL}', limit=1, apply_chat_template=True)
        assert str(lm.evaluation.account.sent["thinks"].example).endswith(f"<|im_start|>assistant\n{tail}")
        ((text, thought),) = answers_of(results).values()
        assert text == "7r"
        assert thought == ended({"Ae": "5C", "<think>A": "e5C", "So": "<think>Ae5C"}[begun])
    lm = SDARLM(thinker, chat_template="off", answer_prefix="<think>")
    with pytest.raises(UserError, match="thinks begins its answers itself"):
        evaluate(lm, tmp_path, f'gen_prefix: "Ae"\n{UNTIL}', limit=1)


def test_a_prompt_that_opens_a_thought_says_that_the_model_thinks(make_lm: MakeLM, tmp_path: Path) -> None:
    """Also of a checkpoint that has no token </think>, as of a task with `gen_prefix: <think>`."""
    for settings, text in (({}, "7"), ({"think_end_token": "off"}, "5</think> 7")):
        lm = make_lm("demo", answer=lambda _: "5</think> 7", **settings)
        results = evaluate(lm, tmp_path, f'gen_prefix: "<think>"\n{UNTIL}', limit=1)
        assert [line["resps"] for line in results["samples"]["thinks"]] == [[[text]]]
        assert lm.generate_until([request("Question", GREEDY)]) == ["5</think> 7"]  # its prompt opens none


def test_a_task_that_writes_the_template_itself(thinker: str, tmp_path: Path) -> None:
    lm = SDARLM(thinker, **STATIC, chat_template="off", answer_prefix="<think>")
    results = evaluate(lm, tmp_path, UNTIL, limit=1)
    assert lm.evaluation.account.sent["thinks"].example == "Question 0<think>"
    assert answers_of(results) == {(0, 0): ("7r", ended("Ae5C"))}


def test_log_likelihoods_have_no_prefix_and_no_thoughts(thinker: str, tmp_path: Path) -> None:
    choices = TASK.replace("generate_until", "multiple_choice").partition("filter_list")[0]
    choices += 'doc_to_choice: ["7", "8"]\nmetric_list: [{metric: acc}]\n'
    choices = choices.replace('doc_to_target: "{{answer}}"', "doc_to_target: 0")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "data.py").write_text(DATA)
    (tmp_path / "tasks" / "thinks.yaml").write_text(choices)
    manager = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    lm = SDARLM(thinker, answer_prefix="<think>")
    lm_eval.simple_evaluate(lm, tasks=["thinks"], task_manager=manager, limit=1, apply_chat_template=True)
    assert str(lm.evaluation.account.sent["thinks"].example).endswith("<|im_start|>assistant\n")
    with pytest.raises(UserError, match="asks for log-likelihoods, and enable_thinking=true for thoughts"):
        lm_eval.simple_evaluate(SDARLM(thinker, enable_thinking=True), tasks=["thinks"], task_manager=manager, limit=1)


def test_an_answer_that_ends_while_thinking_is_no_answer(
    make: Callable[..., SDARLM], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="sdar_lm_eval")
    lm = make()
    results = evaluate(lm, tmp_path, gen_kwargs="max_gen_toks=4")
    assert answers_of(results) == {(i, 0): ("", {"text": "<think>Ae5", "ended": False}) for i in range(5)}
    assert score(results) == 0
    assert run_of(lm)["thoughts"] == {"answers": 5, "unfinished": 5}
    assert run_of(lm)["tasks"]["thinks"]["thoughts"] == {"answers": 5, "unfinished": 5}
    assert "5 of 5 answers ended while thinking" in caplog.text


def test_a_limit_closes_thoughts(make: Callable[..., SDARLM], tmp_path: Path) -> None:
    lm = make(max_thinking_toks=3, answers=str(tmp_path / "answers"))
    results = evaluate(lm, tmp_path)
    assert answers_of(results) == {(i, 0): ("7r", ended("<think>Ae")) for i in range(5)}
    run = run_of(lm)
    assert run["thoughts"] == {"answers": 5, "unfinished": 0, "forced_tokens": 5}
    made = run["forwards"]["denoising"] + run["forwards"]["commit"]
    assert run["tokens_per_forward"] == pytest.approx((run["new_tokens"] - 5) / made, abs=0.001)
    assert [line["forced_tokens"] for line in lm.denoising_lines()("thinks")] == [1] * 5
    lm.close()
    again = make(max_thinking_toks=3, answers=str(tmp_path / "answers"))
    assert answers_of(evaluate(again, tmp_path)) == answers_of(results)
    assert (again.counts.requests, run_of(again)["thoughts"]) == (0, run["thoughts"])
    assert list(again.denoising_lines()("thinks")) == list(lm.denoising_lines()("thinks"))
    again.close()
    other = make(answers=str(tmp_path / "answers"))  # finds no answer of another limit
    evaluate(other, tmp_path, limit=1)
    assert other.counts.requests == 1


def test_a_limit_without_room_for_an_answer_is_said(
    thinker: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lm = SDARLM(thinker, **STATIC, max_thinking_toks=22)
    evaluate(lm, tmp_path, limit=1)
    assert "max_thinking_toks" not in caplog.text
    evaluate(lm, tmp_path, limit=1, gen_kwargs="max_gen_toks=23")
    assert caplog.text.count("max_thinking_toks=22 has no effect: max_gen_toks=23 leaves no room") == 1


def test_repeats_each_have_their_thought(make: Callable[..., SDARLM], tmp_path: Path) -> None:
    """Drawn answers end in the loop or do not; each repeat keeps its own thought, from the store too."""
    lm = make(answers=str(tmp_path / "answers"))
    first = answers_of(evaluate(lm, tmp_path, DRAWN), repeats=3)
    assert len(first) == 15
    for text, thought in first.values():
        assert thought is not None
        assert text == ("7r" if thought["ended"] else "")
        assert thought["text"].startswith("<think>Ae5C")
        assert thought["ended"] == ("x" not in thought["text"])
    unfinished = sum(not thought["ended"] for _, thought in first.values() if thought is not None)
    assert 0 < unfinished < 15
    assert run_of(lm)["thoughts"] == {"answers": 15, "unfinished": unfinished}
    lm.close()
    again = make(answers=str(tmp_path / "answers"))
    assert answers_of(evaluate(again, tmp_path, DRAWN), repeats=3) == first
    assert (again.counts.requests, run_of(again)["thoughts"]["unfinished"]) == (0, unfinished)
    greedy = answers_of(evaluate(again, tmp_path, DRAWN, gen_kwargs="do_sample=false"), repeats=3)
    assert set(map(json.dumps, greedy.values())) == {json.dumps(("7r", ended("<think>Ae5C")))}


def test_a_loop_ends_a_thought_and_says_what_it_saves(
    thinker: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="sdar_lm_eval")
    lm = SDARLM(thinker, **STATIC, stop_repetition="2:3", answers=str(tmp_path / "answers"))
    results = evaluate(lm, tmp_path, DRAWN)
    loops = [thought for _, thought in answers_of(results, repeats=3).values() if thought and not thought["ended"]]
    assert loops == [{"text": "<think>Ae5Cxyxyxy", "ended": False}] * len(loops)
    saved = {"answers": len(loops), "saved_tokens": len(loops) * (24 - 11)}
    assert run_of(lm)["repetition"] == saved
    assert f"{len(loops)} of 15 answers ended in a loop, {13 * len(loops)} tokens before their limits" in caplog.text
    assert {line["finish_reason"] for line in lm.denoising_lines()("thinks")} == {"stop", "repetition"}
    again = SDARLM(thinker, **STATIC, stop_repetition="2:3", answers=str(tmp_path / "answers"))
    evaluate(again, tmp_path, DRAWN)
    assert (again.counts.requests, run_of(again)["repetition"]) == (0, saved)


def test_saved_runs_have_the_thoughts(thinker: str, tmp_path: Path) -> None:
    """In the samples file, and where documents are read back."""
    tracker = EvaluationTracker(output_path=str(tmp_path / "results"))
    results = evaluate(SDARLM(thinker, **STATIC), tmp_path, limit=2, evaluation_tracker=tracker)
    samples = results.pop("samples")
    tracker.save_results_aggregated(results=results, samples=samples)
    tracker.save_results_samples(task_name="thinks", samples=samples["thinks"])
    (file,) = (tmp_path / "results").rglob("samples_thinks_*.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["thoughts"] for line in lines] == [[[ended("<think>Ae5C")]]] * 2
    (run,) = read_runs([tmp_path / "results"])
    for document in documents_of(run, "thinks"):
        (answer,) = document.answers
        assert (answer.text, answer.thought, answer.denoising is not None) == ("7r", Thought("<think>Ae5C", True), True)


@pytest.mark.parametrize("end", ["</think>", 712, "712"])
def test_the_think_end_by_text_or_token(thinker: str, tmp_path: Path, end: object) -> None:
    lm = SDARLM(thinker, **STATIC, think_end_token=end)
    assert answers_of(evaluate(lm, tmp_path, limit=1)) == {(0, 0): ("7r", ended("<think>Ae5C"))}


def test_special_marks_are_found_by_their_tokens(tmp_path: Path) -> None:
    """Decoding leaves out special tokens, so no text has them; as in an answer prefix, where they are tokens too."""
    thinker = str(thinking_checkpoint(tmp_path / "special", special=True))
    for settings in ({}, {"answer_prefix": "<think>"}):
        lm = SDARLM(thinker, **STATIC, **settings)
        assert answers_of(evaluate(lm, tmp_path, limit=1)) == {(0, 0): ("7r", ended("Ae5C"))}
    assert lm.tok_encode("x<think>", add_special_tokens=False)[-1] == 711
    ((job),) = lm.jobs.of([request("Question", GREEDY)], lm.evaluation.task_of, 0).jobs.values()
    assert job.request.prompt_ids[-1] == 711


def test_off_scores_everything(thinker: str, tmp_path: Path) -> None:
    """And finds no answer that was read with thoughts."""
    answers = str(tmp_path / "answers")
    evaluate(SDARLM(thinker, **STATIC, answers=answers), tmp_path, limit=1)
    off = SDARLM(thinker, **STATIC, think_end_token="off", answers=answers)
    results = evaluate(off, tmp_path, limit=1)
    assert (answers_of(results), off.counts.requests) == ({(0, 0): ("<think>A", None)}, 1)


class TestOfStoredAnswers:
    """Records that a version without thoughts wrote: their text is the whole answer."""

    def stored(self, make_lm: MakeLM, thinker: str, folder: Path, until: list[str], text: str) -> tuple[str, int]:
        """The answer, and how many were computed."""
        asked = [request("Question", {**GREEDY, "until": until})]
        lm = make_lm(thinker, answers=str(folder), answer=lambda _: text)
        (job,) = lm.jobs.of(asked, lm.evaluation.task_of, 0).jobs.values()
        lm.rounds.store.begin()
        lm.rounds.store.put(job.key, {**job.name, "text": text, "prompt_tokens": 1, "new_tokens": 3})
        lm.rounds.store.close()
        (answer,) = lm.generate_until(asked)
        return answer, lm.counts.requests

    def test_their_thoughts_are_cut(self, make_lm: MakeLM, thinker: str, tmp_path: Path) -> None:
        assert self.stored(make_lm, thinker, tmp_path, [], "<think>5</think> 7") == ("7", 0)
        assert self.stored(make_lm, thinker, tmp_path / "2", [], "<think>5") == ("", 0)

    def test_one_that_a_stop_string_may_have_cut_is_made_again(
        self, make_lm: MakeLM, thinker: str, tmp_path: Path
    ) -> None:
        assert self.stored(make_lm, thinker, tmp_path, ["5"], "<think>5</think> 7") == ("7", 1)

    def test_answers_without_thoughts_stay(self, make_lm: MakeLM, thinker: str, tmp_path: Path) -> None:
        assert self.stored(make_lm, thinker, tmp_path, ["5"], "7 <think") == ("7 <think", 0)


def test_keys_change_with_new_features_only(make_lm: MakeLM, thinker: str) -> None:
    """The key of the bundled checkpoint is that of the versions before."""
    keys = {}
    for name, settings in {
        "plain": {},
        "the same": {"think_end_token": "</think>"},
        "off": {"think_end_token": "off"},
        "prefix": {"answer_prefix": "<think>"},
        "limit": {"max_thinking_toks": 5},
        "repetition": {"stop_repetition": "20:3"},
        "another repetition": {"stop_repetition": "30:3"},
    }.items():
        lm = make_lm(thinker, **settings)
        (job,) = lm.jobs.of([request("Question", GREEDY)], lm.evaluation.task_of, 0).jobs.values()
        keys[name] = job.key
    assert keys["plain"] == keys.pop("the same")
    assert len(set(keys.values())) == len(keys)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"max_thinking_toks": 5}, "max_thinking_toks=5: checkpoint 'demo' has no </think>"),
        ({"enable_thinking": True}, "enable_thinking=true: checkpoint 'demo' has no </think>"),
        ({"max_thinking_toks": 5, "think_end_token": "off"}, "think_end_token is off"),
        ({"max_thinking_toks": 0, "think_end_token": "</think>"}, "max_thinking_toks=0 is out of range"),
        (
            {"think_end_token": 711},
            "think_end_token=711 is out of range: .* a token of the checkpoint, 0 to 710",
        ),
        ({"think_end_token": True}, "think_end_token=true names nothing"),
        ({"chat_template_args": "[1]"}, "chat_template_args=.* is no mapping"),
        ({"chat_template_args": "{"}, "is no JSON"),
        ({"chat_template_args": {"messages": []}}, "chat_template_args has messages, which rendering sets"),
        ({"answer_prefix": 7}, "answer_prefix=7 is no text"),
        ({"stop_repetition": "20"}, "stop_repetition='20': give N:K"),
        ({"stop_repetition": "20:1"}, "K is 2 or more"),
        ({"think_end_token": "²", "max_thinking_toks": 0}, "max_thinking_toks=0 is out of range"),  # no number
        ({"chat_template_args": {"enable_thinking": "no"}}, "enable_thinking='no' is neither true nor false"),
        ({"enable_thinking": "perhaps"}, "enable_thinking='perhaps' is neither true nor false"),
    ],
)
def test_what_is_refused(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        SDARLM("demo", **settings)


def test_a_think_end_by_number_in_the_default_vocabulary(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(random_checkpoint(tmp_path, vocab_size=151936, leave_out=["vocab_size"]))
    with pytest.raises(UserError, match=r"think_end_token=151936 is out of range: .* 0 to 151935"):
        Thoughts.read({"think_end_token": 151936}, checkpoint)


@pytest.mark.parametrize("end", ["OFF", "None", "none", "False"])
def test_no_think_end_in_any_spelling(end: str) -> None:
    """As a think end, the text would make each answer a thought that does not end."""
    assert SDARLM("demo", think_end_token=end)._prompts.thoughts.thinking is None


def test_a_value_that_the_template_does_not_read_is_told(thinker: str, caplog: pytest.LogCaptureFixture) -> None:
    SDARLM(thinker, enable_thinking=True, chat_template_args='{"enable_thinkin": "false"}')
    told = [f"{name} has no effect: the chat template of checkpoint" for name in ("enable_thinkin", "enable_thinking")]
    assert [text in caplog.text for text in told] == [True, True]
    caplog.clear()
    prompts = SDARLM(thinker, chat_template_args={"enable_thinking": "False"})._prompts
    assert prompts.thoughts.template_args == {"enable_thinking": False}  # a template takes the text for true


def test_log_likelihoods_of_thoughts_are_refused_before_anything_runs(thinker: str, tmp_path: Path) -> None:
    choices = TASK.replace("generate_until", "multiple_choice").partition("filter_list")[0]
    choices += 'doc_to_choice: ["7", "8"]\nmetric_list: [{metric: acc}]\n'
    choices = choices.replace('doc_to_target: "{{answer}}"', "doc_to_target: 0").replace(
        "task: thinks", "task: chooses"
    )
    (tmp_path / "data.py").write_text(DATA)
    (tmp_path / "thinks.yaml").write_text(TASK + UNTIL)
    (tmp_path / "chooses.yaml").write_text(choices)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    lm = SDARLM(thinker, **STATIC, enable_thinking=True)
    with pytest.raises(UserError, match="'chooses' asks for log-likelihoods, and enable_thinking=true for thoughts"):
        lm_eval.simple_evaluate(lm, tasks=["thinks", "chooses"], task_manager=manager)
    assert lm.counts.requests == 0


def test_load_has_the_thought_beside_the_text(thinker: str) -> None:
    with load(thinker, remasking_strategy="low_confidence_static", answer_prefix="<think>") as model:
        answer = model.generate("Question", until="e", max_gen_toks=24)
        assert (answer.text, answer.thought and answer.thought.text) == ("7r", "Ae5C")
        begun = model.generate([{"role": "user", "content": "Q"}, {"role": "assistant", "content": "Ae"}])
        assert (begun.text, begun.thought and begun.thought.text) == ("7re", "5C")
        assert begun.prompt.endswith("<|im_start|>assistant\n<think>Ae")


def test_the_tasks_rule_leaves_a_cut_answer_as_it_is() -> None:
    for text in ("7", "", "7 of </b>"):
        assert without_thoughts(text) == text


@pytest.mark.skipif(not REAL_FOLDER.is_dir(), reason=f"needs SDAR-4B-Chat's folder in {REAL_FOLDER}")
class TestOfTheRealTokenizer:
    checkpoint = staticmethod(functools.cache(lambda: Checkpoint.open(str(REAL_FOLDER))))  # opening takes long

    def prompts(self, **settings: object) -> Prompts:
        return Prompts(self.checkpoint(), "on", Thoughts.read(settings, self.checkpoint()))

    def test_the_prefix_is_one_token_behind_the_opening(self) -> None:
        for prefix, tail in (("<think>", [151667]), ("<think>\\n", [151667, 198])):
            prompts = self.prompts(answer_prefix=prefix)
            plain = self.prompts().encode(self.prompts().render(CONVERSATION))
            text = prompts.render(CONVERSATION)
            assert prompts.encode(text) == [*plain, *tail]
            assert prompts.encode_prompts([text], [True]) == [[*plain, *tail]]
            assert prompts.opens_thought(text)
        assert self.prompts().thoughts.thinking.end_ids == (151668,)  # type: ignore[union-attr]
        begun = [*CONVERSATION, {"role": "assistant", "content": "<think>\nSo"}]
        rendered = self.prompts().render(begun, add_generation_prompt=False)
        assert rendered.endswith("<|im_start|>assistant\n<think>\nSo")  # without the template's own empty thought
        assert self.prompts().encode(rendered)[-3:-1] == [151667, 198]

    @pytest.mark.parametrize("settings", [{"enable_thinking": False}, {"enable_thinking": True}, {}])
    def test_templates_are_rendered_as_by_transformers(self, tmp_path: Path, settings: dict[str, Any]) -> None:
        copy_tokenizer("real", REAL_FOLDER, tmp_path)
        theirs = AutoTokenizer.from_pretrained(tmp_path)
        expected = theirs.apply_chat_template(CONVERSATION, tokenize=False, add_generation_prompt=True, **settings)
        prompts = self.prompts(**settings)
        assert prompts.render(CONVERSATION) == expected
        assert self.prompts(chat_template_args=json.dumps(settings)).render(CONVERSATION) == expected
        assert expected.endswith("</think>\n\n") == (settings == {"enable_thinking": False})
        assert not prompts.opens_thought(expected)


def scenarios(folder: Path) -> dict[str, Any]:
    """Evaluate on this rank; return what it learns."""
    lm = SDARLM(str(folder / "thinker"), **STATIC, answers=str(folder / "answers"))
    found = {}
    for name, lines, repeats in (("greedy", UNTIL, 1), ("drawn", DRAWN, 3), ("drawn again", DRAWN, 3)):
        results = evaluate(lm, folder, lines)
        (task,) = results["samples"] if results else [""]
        found[name] = results and {
            "answers": [[*key, *value] for key, value in answers_of(results, repeats).items()],  # in the samples' order
            "written": [[line["document"], line["repeat"], line["token_ids"]] for line in lm.denoising_lines()(task)],
            "thoughts": results["config"]["sdar_lm_eval"]["run"]["thoughts"],
            "score": score(results),
        }
    return found


if __name__ == "__main__":
    logging.disable()
    lm_eval.evaluator.add_env_info = lambda _: None  # as above
    output = Path(sys.argv[1])
    (output / f"found{os.environ['RANK']}.json").write_text(json.dumps(scenarios(output)))
    torch.distributed.barrier()
    os._exit(0)  # as in test_ranks.py


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(LM, "gather_object"), reason="lm_eval before 0.4.12 collects samples itself")
def test_two_ranks_give_what_one_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in (tmp_path / "one", tmp_path / "two"):
        thinking_checkpoint(folder / "thinker")
    alone = json.loads(json.dumps(scenarios(tmp_path / "one")))
    variables = {name: value for name, value in environment(QUICK_START).items() if name not in ("RANK", "WORLD_SIZE")}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
    command = [*launcher, str(tmp_path / "two")]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=variables, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    together = json.loads((tmp_path / "two" / "found0.json").read_text())
    assert together == alone
    assert together["drawn"] == together["drawn again"]
    assert together["drawn"]["thoughts"]["answers"] == 15
