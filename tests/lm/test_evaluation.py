"""Where features meet: samples and trace, template and kinds of requests, one object used twice, stored requests."""

from __future__ import annotations

import dataclasses
import json
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lm_eval
import lm_eval.evaluator
import pytest
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager, get_task_dict
from scripted_lm import BARE_TEMPLATE, DATA, SAMPLED, Evaluate, MakeLM, ScriptedLM, cached, checkpoint_with, request

from sdar_lm_eval import settings, spellings
from sdar_lm_eval.errors import EngineError, Interrupted, UserError
from sdar_lm_eval.lm import task_methods
from sdar_lm_eval.lm.account import facts_of_evaluation
from sdar_lm_eval.lm.model import SDARLM

GENERATE = "output_type: generate_until"
TURN = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


def sent(lm: ScriptedLM) -> list[str]:
    """Prompts as they reached the engine since the last call, by their text."""
    prompts = sorted(lm.tokenizer.decode(request.prompt_ids) for request in lm.engine.requests)
    lm.engine.requests.clear()
    return prompts


def run_of(results: dict[str, Any]) -> dict[str, Any]:
    return dict(results["config"]["sdar_lm_eval"]["run"])


@pytest.fixture
def evaluate_objects(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Evaluate Task objects of the folder "tasks". Reading lm_eval's own tasks would take six seconds."""

    def run(lm: SDARLM, **settings: Any) -> dict[str, Any]:
        manager = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
        found: dict[str, Any] = lm_eval.simple_evaluate(lm, task_manager=manager, **settings)
        return found

    return run


def tasks_of(folder: Path, monkeypatch: pytest.MonkeyPatch, **tasks: str) -> TaskManager:
    """Tasks over the same five questions, each with lines of its own."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda _: None)
    folder.mkdir(exist_ok=True)
    (folder / "data.py").write_text(DATA)
    head = ["custom_dataset: !function data.load", "test_split: test", "doc_to_text: '{{question}}'"]
    for name, lines in tasks.items():
        body = [f"task: {name}", *head, lines]
        (folder / f"{name}.yaml").write_text("\n".join(body))
    return TaskManager(include_path=str(folder), include_defaults=False)


EXACT = "\ndoc_to_target: '{{answer}}'\nmetric_list: [{metric: exact_match}]"


# A task's settings under the user's


def test_gen_kwargs_beat_a_task_that_spells_a_setting_twice(
    make_lm: MakeLM, evaluate: Evaluate, caplog: pytest.LogCaptureFixture
) -> None:
    spellings.warn_once_of_two_spellings.cache_clear()
    lm, task = make_lm(), f"{GENERATE}\ngeneration_kwargs: "
    twice = task + "{max_gen_toks: 9, max_new_tokens: 12, threshold: 0.6, confidence_threshold: 0.7}"

    def decoded(**gen_kwargs: object) -> tuple[object, object]:
        results = evaluate(lm, twice, gen_kwargs=gen_kwargs or None)
        (decoding,) = results["config"]["sdar_lm_eval"]["decoding_of_tasks"].values()
        return decoding["max_gen_toks"], decoding["confidence_threshold"]

    assert decoded(max_gen_toks=7, threshold=0.5) == (7, 0.5)
    assert decoded(max_tokens=7, confidence_threshold=0.5) == (7, 0.5)
    assert "overrides" not in caplog.text
    assert decoded() == decoded() == (12, 0.7)
    assert caplog.text.count("max_new_tokens=12 overrides max_gen_toks=9, which") == 1
    assert caplog.text.count("confidence_threshold=0.7 overrides confidence_threshold=0.6, which") == 1


def test_a_task_object_keeps_its_settings_for_other_models(
    make_lm: MakeLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, evaluate_objects: Any
) -> None:
    manager = tasks_of(
        tmp_path / "tasks", monkeypatch, five=f"{GENERATE}{EXACT}\ngeneration_kwargs: {{max_tokens: 12}}"
    )
    (task,) = get_task_dict(["five"], manager).values()
    results = evaluate_objects(make_lm(), tasks=[task], gen_kwargs={"max_gen_toks": 7}, bootstrap_iters=0)
    told = results["configs"]["five"]["generation_kwargs"]
    assert told | {"max_tokens": 12} == {"max_tokens": 12, "max_gen_toks": 7, "until": ["\n\n"]}  # 0.4.9 tells both
    assert task.config.generation_kwargs == {"max_tokens": 12, "max_gen_toks": 7, "until": ["\n\n"]}  # lm_eval's


def test_settings_that_differ_between_documents_are_all_told(make_lm: MakeLM) -> None:
    lm = make_lm()
    for limits in ((8, 12), (12, 16)):  # as two ranks' shares
        lm.generate_until([request(f"Question {n}", {"max_gen_toks": n, "until": ["\n"]}) for n in limits])
    (told,) = lm.get_model_info()["sdar_lm_eval"]["decoding_of_tasks"].values()  # type: ignore[index]
    assert (told["max_gen_toks"], told["until"], told["block_length"]) == ([8, 12, 16], ["\n"], 4)
    other = make_lm()
    other.generate_until([request("Question", {"max_gen_toks": n, "until": ["\n"]}) for n in (16, 12, 8)])
    both = facts_of_evaluation([other.evaluation.account, lm.evaluation.account])["decoding_of_tasks"]
    assert list(both.values()) == [told]  # whichever rank has which document


def test_calls_with_equal_settings_do_not_fill_the_memory(make_lm: MakeLM) -> None:
    lm = make_lm()
    for number in range(3):
        lm.generate_until([request(f"Question {number}", {"max_gen_toks": 8})])
    assert [len(noted) for noted in lm.evaluation.account.decoding.values()] == [1]


# One object, evaluated twice


def test_each_evaluation_counts_from_zero(make_lm: MakeLM, evaluate: Evaluate, tmp_path: Path) -> None:
    lm = make_lm(trace=tmp_path / "trace.jsonl", answers=tmp_path / "answers")
    first, second = (evaluate(lm, GENERATE, limit=limit) for limit in (2, 5))
    assert (run_of(first)["requests"], run_of(first)["stored_requests"]) == (2, 0)
    assert (run_of(second)["requests"], run_of(second)["stored_requests"]) == (3, 2)
    third = run_of(evaluate(lm, GENERATE))
    assert (third["requests"], third["stored_requests"]) == (0, 5)
    assert third["tokens_per_second"] is third["tokens_per_forward"] is third["generation_seconds"] is None
    assert len(lm.engine.requests) == 5
    files = sorted(tmp_path.glob("trace*.jsonl"), key=lambda file: file.stat().st_mtime_ns)
    lines = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
    assert [len(of) for of in lines] == [1 + 2, 1 + 5, 1 + 5]
    assert [sum("stored" in line for line in of) for of in lines] == [0, 2, 5]
    assert all({line["document"] for line in of[1:]} == set(range(len(of) - 1)) for of in lines)


def test_settings_of_two_evaluations_do_not_mix(make_lm: MakeLM, evaluate: Evaluate) -> None:
    lm = make_lm()
    info = [
        evaluate(lm, GENERATE, gen_kwargs=f"confidence_threshold={threshold}")["config"]["sdar_lm_eval"]
        for threshold in (0.5, 0.9)
    ]
    assert [of["decoding_of_tasks"]["five"]["confidence_threshold"] for of in info] == [0.5, 0.9]
    assert [of["run"]["requests"] for of in info] == [5, 5]


def test_an_evaluation_without_a_cache_does_not_use_the_one_before(
    make_lm: MakeLM, evaluate: Evaluate, tmp_path: Path
) -> None:
    lm = make_lm()
    for use_cache, computed in ((str(tmp_path / "c"), 5), (str(tmp_path / "c"), 0), (None, 5)):
        assert run_of(evaluate(lm, GENERATE, use_cache=use_cache))["requests"] == computed


def test_each_task_is_counted_by_itself(make_lm: MakeLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = tasks_of(tmp_path / "tasks", monkeypatch, one=GENERATE + EXACT, two=f"{GENERATE}\nrepeats: 2{EXACT}")
    lm = make_lm(answers=tmp_path / "answers")
    settings: dict[str, Any] = {"task_manager": manager, "bootstrap_iters": 0}
    settings["gen_kwargs"] = SAMPLED | {"temperature": 1.0}
    lm_eval.simple_evaluate(lm, tasks=["one"], limit=3, **settings)
    results = lm_eval.simple_evaluate(lm, tasks=["one", "two"], **settings)
    assert results is not None
    tasks = run_of(dict(results))["tasks"]
    assert {name: (of["requests"], of["stored_requests"]) for name, of in tasks.items()} == {
        "one": (2, 3), "two": (10, 0)
    }  # fmt: skip
    assert run_of(dict(results))["new_tokens"] == sum(of["new_tokens"] for of in tasks.values())


def test_what_comes_behind_an_evaluation_is_no_part_of_it(
    make_lm: MakeLM, evaluate: Evaluate, caplog: pytest.LogCaptureFixture
) -> None:
    """Its prompts are not taken for rendered ones, nor its documents for the chosen ones, nor counted with it."""
    lm = make_lm()
    results = evaluate(lm, GENERATE, samples={"five": [1, 3]})
    sent(lm)
    late = Instance("generate_until", {}, ("Question 9", {"max_gen_toks": 8}), 0, ("five", 3, 1))
    lm.generate_until([late])
    assert sent(lm) == [TURN.format("Question 9")]
    assert "Each prompt that lm_eval did not put into the chat template" in caplog.text
    assert (run_of(results)["requests"], lm.counts.requests) == (2, 1)
    with pytest.raises(EngineError):  # nor behind one that failed
        lm.engine.answers_before_error = 0
        evaluate(lm, GENERATE, samples={"five": [1]})
    lm.engine.answers_before_error = None
    lm.generate_until([late])
    assert sent(lm) == [TURN.format("Question 9")]


def test_a_task_goes_by_the_name_that_lm_eval_gives_it(
    make_lm: MakeLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two tasks of one name under keys of their own, one of them twice."""
    manager = tasks_of(tmp_path / "tasks", monkeypatch, five=GENERATE + EXACT)
    a, b = (manager.load_task_or_group("five")["five"] for _ in range(2))
    b.set_config("generation_kwargs", {"max_gen_toks": 4, "until": []})
    lm = make_lm(trace=tmp_path / "trace.jsonl")
    lm_eval.evaluate(lm=lm, task_dict={"a": a, "b": b}, samples={"a": [4, 2]}, bootstrap_iters=0)
    info = lm.get_model_info()["sdar_lm_eval"]
    default = a.config.generation_kwargs.get("max_gen_toks", 512)  # lm_eval 0.4.9 leaves it to the model
    assert {name: of["max_gen_toks"] for name, of in info["decoding_of_tasks"].items()} == {"a": default, "b": 4}
    assert {name: of["requests"] for name, of in info["run"]["tasks"].items()} == {"a": 2, "b": 5}
    _, *lines = map(json.loads, (tmp_path / "trace.jsonl").read_text().splitlines())
    assert sorted((line["task"], line["document"]) for line in lines) == [
        ("a", 2),
        ("a", 4),
        *(("b", i) for i in range(5)),
    ]
    assert lm_eval.evaluate(lm=lm, task_dict={"group": {"a": a}, "a": a}, limit=1, bootstrap_iters=0)


def test_copies_by_which_ranks_are_padded_are_not_scored(
    make_lm: MakeLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = make_lm()
    manager = tasks_of(tmp_path / "tasks", monkeypatch, five=f"{GENERATE}\nrepeats: 2{EXACT}")
    generate = lm.generate_until

    def padded(requests: Any) -> list[str]:
        """As on a rank that has two documents fewer than another."""
        copies = [requests[-1]] * 4
        answers = generate([*requests, *copies])
        requests[-1].resps.extend(answers[-4:])
        return answers[: len(requests)]

    monkeypatch.setattr(lm, "generate_until", padded)
    results = lm_eval.simple_evaluate(lm, tasks=["five"], task_manager=manager, bootstrap_iters=0)
    assert results is not None
    assert {len(sample["resps"][0]) for sample in results["samples"]["five"]} == {2}


@pytest.mark.parametrize("limit", [0, -1, "5", float("nan")])
def test_limits_that_mean_nothing(make_lm: MakeLM, evaluate: Evaluate, limit: Any) -> None:
    with pytest.raises(UserError, match=r"--limit .*: give a number of documents above 0"):
        evaluate(make_lm(), GENERATE, limit=limit)


def test_the_template_that_the_user_named(make_lm: MakeLM, evaluate: Evaluate, tmp_path: Path) -> None:
    folder = checkpoint_with(tmp_path / "several")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    templates = {"default": BARE_TEMPLATE, "terse": BARE_TEMPLATE.replace("!", "?")}
    settings["chat_template"] = [{"name": name, "template": text} for name, text in templates.items()]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    lm = make_lm(folder)
    hashes = []
    for name, end in (("terse", "?"), (True, "!"), (False, "!"), ("terse", "?")):
        results = evaluate(lm, GENERATE, apply_chat_template=name, limit=1)
        assert sent(lm) == [f"Question 0{end}"]
        hashes.append(results["config"]["sdar_lm_eval"]["prompts"]["five"]["chat_template_sha256"])
    assert hashes[0] == hashes[3] != hashes[1] == hashes[2]
    assert lm.chat_template("terse") == templates["terse"] and lm.chat_template(True) == BARE_TEMPLATE
    with pytest.raises(UserError, match=r"one of several .*, and none of them is called 'long'"):
        evaluate(lm, GENERATE, apply_chat_template="long")


@pytest.mark.parametrize(
    ("arguments", "metadata", "says"),
    [
        (
            {"threshold": 0.5},
            True,
            "confidence_threshold=0.5 has no effect: low_confidence_static is published for five",
        ),
        (
            {"threshold": 0.5, "strategy": "static"},
            False,
            "confidence_threshold=0.5 has no effect: low_confidence_static",
        ),
        (
            {"eb_threshold": 0.5},
            False,
            "eb_threshold=0.5 has no effect: low_confidence_dynamic decodes; strategy=",
        ),
        ({"threshold": 0.5, "strategy": "dynamic"}, True, None),
        ({"threshold": 0.85}, True, None),  # the default
    ],
)
def test_a_knob_without_effect_is_said(
    make_lm: MakeLM,
    evaluate: Evaluate,
    caplog: pytest.LogCaptureFixture,
    arguments: Any,
    metadata: bool,
    says: str | None,
) -> None:
    settings.warn_once_of_idle_knob.cache_clear()
    lines = "metadata: {version: 1, sdar_decoding: {remasking_strategy: low_confidence_static}}" if metadata else ""
    evaluate(make_lm(**arguments), GENERATE, lines, limit=1)
    assert ("has no effect" in caplog.text) is (says is not None)
    assert (says or "") in caplog.text


def test_the_harness_seed_draws_unless_the_model_has_one(make_lm: MakeLM, evaluate: Evaluate) -> None:
    lines = (GENERATE, f"generation_kwargs: {json.dumps(SAMPLED)}")

    def draws(lm: ScriptedLM, seed: int) -> list[Any]:
        results = evaluate(lm, *lines, torch_random_seed=seed)
        assert results["config"]["sdar_lm_eval"]["seed"] == fixed.get("seed", seed)
        return [sample["resps"] for sample in results["samples"]["five"]]

    fixed: dict[str, int] = {}
    lm = make_lm()
    assert draws(lm, 3) == draws(make_lm(), 3) == draws(lm, 3) != draws(lm, 4)
    fixed = {"seed": 7}
    assert draws(make_lm(seed=7), 3) == draws(make_lm(seed=7), 4)


# Samples


@pytest.mark.parametrize("asked", [[1, 4], [4, 1], [4, 1, 4]])
def test_documents_are_named_by_their_place_in_the_data(
    make_lm: MakeLM, evaluate: Evaluate, tmp_path: Path, asked: list[int]
) -> None:
    """lm_eval itself names the k-th answer by the k-th id, in whatever order they were given."""
    lm = make_lm(trace=tmp_path / "trace.jsonl", answers=tmp_path / "answers")
    results = evaluate(lm, GENERATE, samples={"five": asked})
    assert [(s["doc_id"], s["doc"]["question"]) for s in results["samples"]["five"]] == [
        (1, "Question 1"), (4, "Question 4")
    ]  # fmt: skip
    _, *traced = map(json.loads, (tmp_path / "trace.jsonl").read_text().splitlines())
    (answers,) = (tmp_path / "answers").iterdir()
    stored = [line for line in map(json.loads, answers.read_text().splitlines()) if "key" in line]
    for lines in (traced, stored):
        assert {line["document"] for line in lines} == {1, 4}
    assert {line["document"]: f"Question {line['document']}" in line["prompt"] for line in traced} == {1: True, 4: True}


@pytest.mark.parametrize(
    ("samples", "says"),
    [
        ({"fife": [1]}, r"task 'fife', which is not evaluated\. Did you mean 'five'\? Evaluated: five\."),
        ({"five": []}, r"--samples 'five': \[\]; give a list of document numbers, 0 or more, at least one"),
        ({"five": [-1]}, r"--samples 'five': \[-1\]; give a list of document numbers"),
        ({"five": ["1"]}, r"--samples 'five': \['1'\]; give a list of document numbers"),
        ({"five": [0, 5]}, r"--samples 'five': 5; the task has documents 0 to 4\."),
        ({"five": 1}, r"--samples 'five': 1; give a list of document numbers"),
        ([1], r'--samples \[1\]: give document numbers of tasks, such as \{"five": \[0, 3\]\}'),
    ],
)
def test_samples_that_would_evaluate_something_else_are_refused(
    make_lm: MakeLM, evaluate: Evaluate, samples: Any, says: str
) -> None:
    lm = make_lm()
    with pytest.raises(UserError, match=says):
        evaluate(lm, GENERATE, samples=samples)
    assert not lm.engine.requests


# Template


def test_auto_is_the_harness_s_own_template(
    make_lm: MakeLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With a system instruction, shots and the beginning of an answer: the same prompts as by --apply_chat_template."""
    shots = "num_fewshot: 1\nfewshot_config: {split: train, sampler: first_n}"
    manager = tasks_of(
        tmp_path / "tasks", monkeypatch, plain=GENERATE + EXACT, shots=f"{GENERATE}\n{shots}{EXACT}",
        prefix=f"{GENERATE}\ngen_prefix: 'The answer is'{EXACT}", described=f"{GENERATE}\ndescription: 'Add.'{EXACT}",
    )  # fmt: skip
    settings: dict[str, Any] = {"task_manager": manager, "bootstrap_iters": 0, "limit": 1}
    for task in ("plain", "shots", "prefix", "described"):
        prompts = []
        for flag in ({}, {"apply_chat_template": True}):
            lm = make_lm()
            results = lm_eval.simple_evaluate(lm, tasks=[task], system_instruction="You are terse.", **flag, **settings)
            assert results is not None
            (prompt,) = sent(lm)
            assert results["samples"][task][0]["arguments"][0][0] == prompt  # what is logged was sent
            told = results["config"]["sdar_lm_eval"]["prompts"][task]
            assert told["chat_template_applied_by"] == ("lm_eval" if flag else "sdar_lm_eval")
            assert told["example"] == prompt and told["chat_template_sha256"]
            prompts.append((prompt, told["tokens_sha256"]))
        assert prompts[0] == prompts[1]
        assert prompts[0][0].startswith("<|im_start|>system\nYou are terse.")
        assert prompts[0][0].endswith(TURN.format("Question 0") + "The answer is" * (task == "prefix"))
    assert caplog.text.count("The checkpoint's chat template is applied to prompts, as by --apply_chat_template") == 4


def test_plain_text_is_told_apart(make_lm: MakeLM, evaluate: Evaluate) -> None:
    told = evaluate(make_lm(chat_template="off"), GENERATE)["config"]["sdar_lm_eval"]["prompts"]["five"]
    assert (told["chat_template_applied_by"], told["chat_template_sha256"]) == (None, None)
    assert told["example"] == "Question 0"
    other = evaluate(make_lm(), GENERATE)["config"]["sdar_lm_eval"]["prompts"]["five"]
    assert other["tokens_sha256"] != told["tokens_sha256"]
    drawn = f"generation_kwargs: {SAMPLED}\nrepeats: 3"
    several = evaluate(make_lm(), GENERATE, drawn)["config"]["sdar_lm_eval"]["prompts"]["five"]
    assert several["tokens_sha256"] == other["tokens_sha256"]  # the same prompts, each answered three times


@pytest.mark.parametrize("apply", [False, True])
@pytest.mark.parametrize("template", [None, BARE_TEMPLATE])
def test_tasks_of_several_kinds_are_templated_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, template: str | None, apply: bool
) -> None:
    """A template without a fixed opening, generated answers and log-likelihoods in one evaluation."""
    from test_likelihoods import ScoringEngine, ScoringLM

    from sdar_lm_eval.lm import frontend

    caplog.set_level(logging.INFO, logger="sdar_lm_eval")
    monkeypatch.setattr(
        frontend, "make_engine", lambda name, checkpoint, **options: ScoringEngine(checkpoint, lambda _: "", options)
    )
    choices = (
        "output_type: multiple_choice\ndoc_to_choice: ['yes', 'no']\ndoc_to_target: 0\nmetric_list: [{metric: acc}]"
    )
    texts = (
        "output_type: loglikelihood_rolling\ndoc_to_target: '{{question}}'\nmetric_list: [{metric: word_perplexity}]"
    )
    manager = tasks_of(tmp_path / "tasks", monkeypatch, a=choices, b=GENERATE + EXACT, c=texts)
    lm = ScoringLM(str(checkpoint_with(tmp_path / "model", template=template)) if template else "demo")
    user_turn = "{}!" if template else TURN
    for tasks in (["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"]):
        lm.engine.asked.clear()
        lm_eval.simple_evaluate(
            lm, tasks=tasks, task_manager=manager, bootstrap_iters=0, apply_chat_template=apply, limit=1
        )
        assert sent(lm) == [user_turn.format("Question 0")]
        scored = {lm.tokenizer.decode((*r.context_ids, *r.continuation_ids)) for r in lm.engine.asked}
        plain = {"Question 0 yes", "Question 0 no"}
        templated = {user_turn.format("Question 0") + choice for choice in ("yes", "no")}
        assert scored == {"<|endoftext|>Question 0", *(templated if apply else plain)}
    assert caplog.text.count("Log-likelihoods are computed without the chat template") == (not apply)


def test_a_system_turn_that_the_template_refuses_is_one_error(
    make_lm: MakeLM, evaluate: Evaluate, tmp_path: Path
) -> None:
    refusing = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}{{ messages[0].content }}"
    )
    lm = make_lm(checkpoint_with(tmp_path / "model", template=refusing))
    with pytest.raises(UserError, match=r"refuses a conversation of system, user .*no system.* leave out --system_ins"):
        evaluate(lm, GENERATE, system_instruction="Be brief.")


# Requests that lm_eval stores: its keys hold neither gen_kwargs nor documents, wording, seeds of shots


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ({"gen_kwargs": "max_gen_toks=8"}, {"gen_kwargs": "max_gen_toks=30"}),
        ({"samples": {"five": [3]}}, {}),
        ({}, {"samples": {"five": [3]}}),
        ({"limit": 2}, {"limit": 3}),
    ],
)
@pytest.mark.parametrize("refresh", [False, True])
def test_requests_of_another_run_are_never_sent(
    make_lm: MakeLM,
    evaluate: Evaluate,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    first: dict[str, Any],
    then: dict[str, Any],
    refresh: bool,
) -> None:
    monkeypatch.setattr("lm_eval.caching.cache.PATH", str(tmp_path / "requests"))
    task_methods.warn_of_cached_requests.cache_clear()
    evaluate(make_lm(), GENERATE, cache_requests=True, **first)
    fresh, again = make_lm(), make_lm()
    evaluate(fresh, GENERATE, **then)
    evaluate(again, GENERATE, cache_requests=True, rewrite_requests_cache=refresh, **then)
    assert again.engine.requests == fresh.engine.requests
    assert caplog.text.count("--cache_requests is ignored, and requests are built again") == 1
    assert not (tmp_path / "requests").exists()


# Other models, published protocols, Ctrl-C


class OtherLM(LM):
    """A model that is none of ours."""

    def generate_until(self, requests: Any) -> list[str]:
        return ["?"] * len(requests)

    def loglikelihood(self, requests: Any) -> Any:
        raise NotImplementedError

    loglikelihood_rolling = loglikelihood


def test_other_models_are_left_alone(make_lm: MakeLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = tasks_of(tmp_path / "tasks", monkeypatch, five=GENERATE + EXACT)
    make_lm()
    model = dataclasses.make_dataclass("DataclassLM", [], bases=(OtherLM,))()  # it has no hash
    LM.__init__(model)
    results = lm_eval.simple_evaluate(model, tasks=["five"], task_manager=manager, bootstrap_iters=0)
    assert results is not None
    assert results["samples"]["five"][0]["arguments"][0][0] == "Question 0"
    assert "sdar_lm_eval" not in results["config"]


@pytest.mark.parametrize("of_ours", [True, False])
def test_advice_of_no_use_is_left_out(
    make_lm: MakeLM, evaluate: Evaluate, caplog: pytest.LogCaptureFixture, of_ours: bool
) -> None:
    """lm_eval reads "inst" or "chat" in a checkpoint's name, and advises a template that is applied anyway."""
    evaluate(make_lm() if of_ours else OtherLM(), model_args="pretrained=SDAR-4B-Chat-Instruct")
    for advice in ("Recommend setting `apply_chat_template`", "Custom kwargs can be passed to `--metadata`"):
        assert (advice in " ".join(caplog.text.split())) == (not of_ours)


def test_advice_reaches_a_thread_that_evaluates_another_model(
    make_lm: MakeLM, evaluate: Evaluate, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, log = make_lm(), logging.getLogger("lm_eval.evaluator")
    advice, generate = "Recommend setting\n  `apply_chat_template`", lm.generate_until

    def beside_another(requests: Any, **settings: Any) -> list[str]:
        log.warning("%s: ours", advice)
        log.warning(f"{advice} %d", "a mistake of lm_eval in a message ends no evaluation")
        other = threading.Thread(target=log.warning, args=(f"{advice}: other",))
        other.start()
        other.join()
        return generate(requests, **settings)

    monkeypatch.setattr(lm, "generate_until", beside_another)
    evaluate(lm)
    log.warning(f"{advice}: later")
    assert [text for text in ("other", "later") if f"{advice}: {text}" in caplog.text] == ["other", "later"]


def test_a_published_protocol_decodes_unless_somebody_says_otherwise(
    make_lm: MakeLM, evaluate: Evaluate, caplog: pytest.LogCaptureFixture
) -> None:
    lines = (GENERATE, "metadata: {version: 1, sdar_decoding: {remasking_strategy: low_confidence_static}}")
    results = evaluate(make_lm(), *lines)
    info = results["config"]["sdar_lm_eval"]
    assert info["decoding_of_tasks"]["five"]["remasking_strategy"] == "low_confidence_static"
    assert info["published_decoding_of_tasks"] == {"five": {"remasking_strategy": "low_confidence_static"}}
    assert "remasking_strategy" not in results["configs"]["five"]["generation_kwargs"]  # other models' settings
    assert "five is decoded as published: remasking_strategy=low_confidence_static" in caplog.text
    said = "five is not decoded as published: remasking_strategy was 'low_confidence_static', is 'sequential'"
    for model_args, gen_kwargs in (({"remasking_strategy": "sequential"}, None), ({}, "remasking_strategy=sequential")):
        caplog.clear()
        info = evaluate(make_lm(**model_args), *lines, gen_kwargs=gen_kwargs)["config"]["sdar_lm_eval"]
        assert info["decoding_of_tasks"]["five"]["remasking_strategy"] == "sequential"
        assert said in caplog.text


def test_a_published_protocol_may_have_short_names(
    make_lm: MakeLM, evaluate: Evaluate, caplog: pytest.LogCaptureFixture
) -> None:
    info = evaluate(make_lm(), GENERATE, "metadata: {sdar_decoding: {strategy: dynamic, threshold: '0.7'}}")["config"]
    published = {"remasking_strategy": "low_confidence_dynamic", "confidence_threshold": 0.7}
    assert info["sdar_lm_eval"]["published_decoding_of_tasks"] == {"five": published}
    assert published.items() <= info["sdar_lm_eval"]["decoding_of_tasks"]["five"].items()
    assert "five is decoded as published: remasking_strategy=low_confidence_dynamic" in caplog.text


@pytest.mark.parametrize(
    ("decoding", "told"),
    [
        ("static", "'static' is no mapping. Give one"),
        ("{stragety: static}", "'stragety' is no decoding setting. Did you mean"),
        ("{max_gen_toks: 5}", "'max_gen_toks' is no decoding setting"),
    ],
)
def test_a_published_protocol_that_cannot_be_read_is_refused(
    make_lm: MakeLM, evaluate: Evaluate, decoding: str, told: str
) -> None:
    with pytest.raises(UserError, match=told):
        evaluate(make_lm(), GENERATE, f"metadata: {{sdar_decoding: {decoding}}}")


@pytest.mark.parametrize("kept", ["cache", "folder", None])
def test_ctrl_c_says_what_is_kept(make_lm: MakeLM, evaluate: Evaluate, tmp_path: Path, kept: str | None) -> None:
    lm = make_lm(answers=tmp_path / "answers" if kept == "folder" else None)
    lm.engine.answers_before_error, lm.engine.error = 3, KeyboardInterrupt()  # type: ignore[assignment]
    told = {
        "cache": r"Interrupted\. 3 of 5 answers are in --use_cache .*c_rank0\.db\. Run the same command again",
        "folder": r"Interrupted\. 3 of 5 answers are in answers=.*answers\. Run the same command again",
        None: r"Interrupted\. 3 of 5 answers were made\. No file has them all: --use_cache FILE or answers=FOLDER",
    }[kept]
    with pytest.raises(Interrupted, match=told):
        evaluate(lm, GENERATE, use_cache=str(tmp_path / "c") if kept == "cache" else None)


def test_ctrl_c_among_ranks_counts_the_answers_of_this_process(make_lm: MakeLM, evaluate: Evaluate) -> None:
    lm = make_lm()
    lm.rounds._alone = False
    lm.engine.answers_before_error, lm.engine.error = 3, KeyboardInterrupt()  # type: ignore[assignment]
    with pytest.raises(Interrupted, match=r"Interrupted\. 3 of 5 answers of this process were made\."):
        evaluate(lm, GENERATE)


def test_ctrl_c_names_no_place_that_lacks_answers(make_lm: MakeLM, evaluate: Evaluate, tmp_path: Path) -> None:
    evaluate(make_lm(answers=tmp_path / "answers"), GENERATE, limit=2)
    lm = make_lm(answers=tmp_path / "answers")
    lm.engine.answers_before_error, lm.engine.error = 1, KeyboardInterrupt()  # type: ignore[assignment]
    with pytest.raises(Interrupted, match=r"Interrupted\. 3 of 5 answers are in answers=\S*answers\. Run the same"):
        evaluate(lm, GENERATE, use_cache=str(tmp_path / "new"))


def test_a_cache_that_cannot_be_written_costs_no_answer(
    make_lm: MakeLM, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its disk is full after two answers; the folder has all."""
    import sqlite3

    from scripted_lm import requests_of

    lm = make_lm(answers=tmp_path / "answers")
    wrapped = cached(lm, tmp_path / "c.db")
    place = lm.rounds.store._places[0]
    put, left = place.put, [2]

    def full(key: str, record: Any) -> None:
        if not left[0]:
            raise sqlite3.OperationalError("database or disk is full")
        left[0] -= 1
        put(key, record)

    place.put = full  # type: ignore[method-assign]
    answers = wrapped.generate_until(requests_of(5))
    assert all(answers)
    assert caplog.text.count("cannot be written (database or disk is full). Its answers so far are kept,") == 1
    assert f"are kept in answers={tmp_path / 'answers'}." in caplog.text
    again = make_lm(answers=tmp_path / "answers")
    assert again.generate_until(requests_of(5)) == answers and not again.engine.requests
    again = make_lm()
    assert cached(again, tmp_path / "c.db").generate_until(requests_of(5)) == answers
    assert len(again.engine.requests) == 3


def test_evaluate_tells_whoever_imported_it(make_lm: MakeLM) -> None:
    make_lm()
    assert hasattr(lm_eval.evaluator.evaluate, "tells_watched_models")
    assert lm_eval.evaluate is lm_eval.evaluator.evaluate


# Tasks of classes of their own


class _Mixed(ConfigurableTask):
    """A generated answer and a log-likelihood for each document, as lm_eval's SQuADv2."""

    def construct_requests(self, doc: Any, ctx: Any, **settings: Any) -> Any:
        of = {"doc": doc, "metadata": settings["metadata"]}
        return [
            Instance("generate_until", arguments=(ctx, {"until": ["\n"]}), idx=0, **of),
            Instance("loglikelihood", arguments=(ctx, " none"), idx=0, **of),
        ]

    def process_results(self, doc: Any, results: Any) -> dict[str, float]:
        return {"exact_match": float(isinstance(results[0], str))}


class _Scored(_Mixed):
    """Log-likelihoods alone, though the task's output type is the default, as in lm_eval's SCROLLS."""

    def construct_requests(self, doc: Any, ctx: Any, **settings: Any) -> Any:
        return super().construct_requests(doc, ctx, **settings)[1:]


class _Plain(ConfigurableTask):
    """Writes its prompts without the chat template that it is given."""

    def fewshot_context(self, doc: Any, *_: Any, **__: Any) -> str:
        return str(self.doc_to_text(doc))


class _Thrice(ConfigurableTask):
    """Three requests with one prompt for each document."""

    def construct_requests(self, doc: Any, ctx: Any, **settings: Any) -> Any:
        made = [super(_Thrice, self).construct_requests(doc, ctx, **settings) for _ in range(3)]
        for number, instance in enumerate(made):
            instance.idx = number
        return made

    def process_results(self, doc: Any, results: Any) -> dict[str, float]:
        return {"exact_match": float(len(set(results)))}


@pytest.fixture
def of_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., ConfigurableTask]:
    def make(kind: type[ConfigurableTask], lines: str = "") -> ConfigurableTask:
        manager = tasks_of(tmp_path / "tasks", monkeypatch, five=GENERATE + EXACT + lines)
        (task,) = get_task_dict(["five"], manager).values()
        task.__class__ = kind
        return task

    return make


@pytest.mark.parametrize("kind", [_Mixed, _Scored])
@pytest.mark.parametrize("asked", [False, True])
def test_log_likelihoods_of_a_class_are_in_the_template_only_where_the_user_asks(
    kind: type[ConfigurableTask], asked: bool, of_class: Any, monkeypatch: pytest.MonkeyPatch, evaluate_objects: Any
) -> None:
    lm = SDARLM("demo", answer_prefix="So")
    scored: list[str] = []
    score = lm.rounds.score

    def note(kind: Any, requests: Any, *rest: Any) -> Any:
        scored.extend(request.args[0] for request in requests)
        return score(kind, requests, *rest)

    monkeypatch.setattr(lm.rounds, "score", note)
    results = evaluate_objects(
        lm, tasks=[of_class(kind)], limit=1, apply_chat_template=asked, bootstrap_iters=0,
        gen_kwargs={"max_gen_toks": 8},
    )  # fmt: skip
    prefix = "So" if kind is _Mixed else ""  # a generated answer begins with the prefix
    assert scored == [TURN.format("Question 0") + prefix if asked else "Question 0"]
    told = results["config"]["sdar_lm_eval"]["prompts"]["five"]
    assert told["chat_template_applied_by"] == ("lm_eval" if asked else None)


def test_a_class_without_documents_has_the_error_of_lm_eval(
    make_lm: MakeLM, of_class: Any, monkeypatch: pytest.MonkeyPatch, evaluate_objects: Any
) -> None:
    monkeypatch.setattr(_Mixed, "eval_docs", property(lambda self: []))
    with pytest.raises(ValueError, match="did not find any docs"):
        evaluate_objects(make_lm(), tasks=[of_class(_Mixed)], bootstrap_iters=0)


def test_a_class_that_leaves_out_the_template_is_sent_in_it(
    make_lm: MakeLM, of_class: Any, caplog: pytest.LogCaptureFixture, evaluate_objects: Any
) -> None:
    lm = make_lm()
    results = evaluate_objects(lm, tasks=[of_class(_Plain)], limit=1, bootstrap_iters=0)
    assert sent(lm) == [TURN.format("Question 0")]
    assert results["config"]["sdar_lm_eval"]["prompts"]["five"]["chat_template_applied_by"] == "sdar_lm_eval"
    assert "becomes one user turn" in caplog.text


def test_an_engine_that_cannot_score_says_so_before_a_class_generates(
    make_lm: MakeLM, of_class: Any, evaluate_objects: Any
) -> None:
    lm = make_lm()
    with pytest.raises(UserError, match="asks for log-likelihoods"):
        evaluate_objects(lm, tasks=[of_class(_Mixed)], bootstrap_iters=0)
    assert lm.engine.requests == []


@pytest.mark.parametrize(
    ("gen_kwargs", "model_args", "told"),
    [
        ({"num_beams": 4}, {}, "num_beams=4 is not supported"),
        ({"threshold": 2}, {}, "confidence_threshold"),
        ({"max_gen_toks": 64}, {"max_length": 64}, "must be below max_length"),
        ({"gen_prefix": "So"}, {"answer_prefix": "So", "chat_template": "off"}, "begins its answers itself"),
    ],
)
def test_a_task_with_wrong_settings_is_refused_before_others_are_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gen_kwargs: dict[str, Any], model_args: dict[str, Any], told: str
) -> None:
    prefix = "".join(f"\ngen_prefix: {value}" for name, value in gen_kwargs.items() if name == "gen_prefix")
    gen_kwargs = {name: value for name, value in gen_kwargs.items() if name != "gen_prefix"}
    manager = tasks_of(
        tmp_path / "tasks",
        monkeypatch,
        first="output_type: loglikelihood\ndoc_to_target: '{{answer}}'",
        second=f"{GENERATE}{EXACT}{prefix}\ngeneration_kwargs: {json.dumps(gen_kwargs)}",
    )
    with SDARLM("demo", **model_args) as lm:
        with pytest.raises(UserError, match=told):
            lm_eval.simple_evaluate(lm, tasks=["first", "second"], task_manager=manager, bootstrap_iters=0)
        assert lm.counts.scored_requests == 0


def test_a_continuation_that_never_fits_is_refused_before_other_tasks_generate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = f"output_type: loglikelihood\ndoc_to_target: '{'{{answer}} ' * 60}'"
    manager = tasks_of(tmp_path / "tasks", monkeypatch, first=GENERATE + EXACT, second=long)
    with SDARLM("demo", max_length=60, max_gen_toks=8) as lm:
        with pytest.raises(UserError, match="a continuation of"):
            lm_eval.simple_evaluate(
                lm, tasks=["first", "second"], task_manager=manager, bootstrap_iters=0, gen_kwargs="max_gen_toks=8"
            )
        assert lm.counts.requests == 0


# Equal questions


def test_greedy_answers_need_no_look_for_copies(
    make_lm: MakeLM, evaluate: Evaluate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The look reads all documents of a task, also with a limit."""
    monkeypatch.setattr(task_methods, "_copies", lambda task: pytest.fail("read the documents"))
    evaluate(make_lm())


def test_copies_of_a_document_draw_answers_of_their_own(make_lm: MakeLM, evaluate: Evaluate) -> None:
    def drawn(lm: ScriptedLM, *more: str, **settings: Any) -> dict[int, str]:
        lines = (GENERATE, f"generation_kwargs: {json.dumps(SAMPLED)}", *more)
        samples = evaluate(lm, *lines, **settings)["samples"]["five"]
        return {sample["doc_id"]: sample["resps"][0][0] for sample in samples}

    plain = drawn(make_lm())
    moved = drawn(make_lm(), "process_docs: !function data.backwards")
    assert moved == {4 - number: answer for number, answer in plain.items()}  # its place in the data set is no seed
    copies = "process_docs: !function data.copies"
    six = drawn(make_lm(), copies)
    assert len(set(six.values())) == 6
    assert (six[0], six[1]) == (plain[0], plain[1])  # the first one draws as it does alone
    assert drawn(make_lm(), copies, samples={"five": [3, 4]}) == {3: six[3], 4: six[4]}
    assert drawn(make_lm(), copies, limit=4) == {number: six[number] for number in range(4)}
    assert len(set(drawn(make_lm(), copies, gen_kwargs={"do_sample": False}).values())) == 2


def test_requests_of_one_document_draw_answers_of_their_own(
    make_lm: MakeLM, of_class: Any, evaluate_objects: Any
) -> None:
    task = of_class(_Thrice, f"\ngeneration_kwargs: {json.dumps(SAMPLED)}")
    results = evaluate_objects(make_lm(), tasks=[task], bootstrap_iters=0)
    assert results["results"]["five"]["exact_match,none"] == 3


def test_requests_that_a_class_leaves_unnumbered_keep_their_records(
    make_lm: MakeLM, of_class: Any, evaluate_objects: Any
) -> None:
    class Unnumbered(_Thrice):
        def construct_requests(self, *args: Any, **settings: Any) -> Any:
            made = super().construct_requests(*args, **settings)
            for instance in made:
                instance.idx = 0
            return made

    lm = make_lm()
    evaluate_objects(lm, tasks=[of_class(Unnumbered, "\nrepeats: 2")], bootstrap_iters=0)
    named = [(line["document"], line["repeat"]) for line in lm.denoising_lines()("five")]
    assert named == [(document, repeat) for document in range(5) for repeat in (0, 2, 4)]
