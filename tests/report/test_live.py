from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lm_eval
import pytest
from lm_eval.tasks import TaskManager

from sdar_lm_eval.autoload import TASKS
from sdar_lm_eval.decoding import DecodingConfig
from sdar_lm_eval.engines.types import GenerationRequest, GenerationResult
from sdar_lm_eval.errors import UserError
from sdar_lm_eval.lm.model import SDARLM
from sdar_lm_eval.report.counts import Counts
from sdar_lm_eval.report.live import Live, steps_of
from sdar_lm_eval.report.run import Progress

DOC = {"question": "2 hens lay 9 eggs each. How many?", "answer": "2 * 9 = 18\n#### 18"}


JUDGE = {"title": "GSM8K", "verdict": "sdar_lm_eval.tasks.gsm8k:verdict"}


def _live(*tasks: str, total: int = 4, whole: bool = True) -> Live:
    return Live({task: JUDGE if task.startswith("gsm8k") else None for task in tasks or ("gsm8k_sdar",)}, total, whole)


def _instance(task: str = "gsm8k_sdar", doc: Any = DOC) -> SimpleNamespace:
    return SimpleNamespace(task_name=task, doc=doc, args=("the prompt", {}))


def _request(prompt: int, length: int = 4) -> GenerationRequest:
    return GenerationRequest(tuple(range(prompt)), 32, DecodingConfig(block_length=length))


def _result(**recorded: Any) -> GenerationResult:
    return GenerationResult((1, 2, 3, 4, 5, 6), "stop", 1, 4, 2, 1.5, **recorded)


def test_how_blocks_were_denoised() -> None:
    """A prompt of 5 leaves 3 places in its last block of 4; then a block follows of which 3 tokens were returned."""
    result = _result(unmasked_at=(0, 1, 0, 2, 0, 0), confidences=(0.9, 0.5, 0.7, 0.25, 1.0, 0.5))
    assert steps_of(_request(5), result) == [
        [(3, 2, pytest.approx(0.8)), (1, 1, 0.5)],
        [(3, 2, 0.75), (1, 1, 0.25)],
    ]
    assert steps_of(_request(8), result) == [
        [(4, 2, pytest.approx(0.8)), (2, 1, 0.5), (1, 1, 0.25)],
        [(2, 2, 0.75)],
    ]
    assert steps_of(_request(5), _result()) is None


def test_accuracy_while_answers_come_in() -> None:
    live = _live()
    assert live.knows_accuracy and live.title == "GSM8K Eval"
    verdicts = [
        live.judge("gsm8k_sdar", _instance(), text) for text in (r"It is \boxed{18}.", "18.0 eggs", "19", "none")
    ]
    assert [(v.predicted, v.gold, v.correct) for v in verdicts if v] == [
        ("18", "18", True), ("18", "18", True), ("19", "18", False), ("[invalid]", "18", False),
    ]  # fmt: skip
    assert live.bar(seconds=6.0, computed=4).endswith("] Acc: 50.0% | 1.5s/q")
    assert live.summary(6.0, 4, 300) == [
        "GSM8K Eval: accuracy 50.0% (2/4, flexible-extract), 1.50 s a question, 50.0 returned tokens/s, 6.0 s"
    ]
    assert live.summary(6.0, 0, 0) == ["GSM8K Eval: accuracy 50.0% (2/4, flexible-extract), 6.0 s"]


def test_a_task_may_have_another_name_in_an_evaluation() -> None:
    live = Live({"mine": JUDGE}, 1)
    live.judge("mine", _instance(), "18")
    assert live.summary(1.0, 0, 0) == ["GSM8K Eval: accuracy 100.0% (1/1, flexible-extract), 1.0 s"]


def test_each_task_has_an_accuracy_of_its_own() -> None:
    other = "gsm8k_sdar_hash"
    live = _live("gsm8k_sdar", other)
    assert live.title == "GSM8K Eval"
    for task, text in (("gsm8k_sdar", "18"), ("gsm8k_sdar", "19"), (other, "18")):
        if task == other:
            assert live.bar(6.0, 2).endswith("] Acc: gsm8k_sdar 50.0% | 3.0s/q")  # none of the other's is there yet
        live.judge(task, _instance(task), text)
    assert live.bar(6.0, 3).endswith("] Acc: gsm8k_sdar 50.0%, gsm8k_sdar_hash 100.0% | 2.0s/q")
    assert live.summary(6.0, 3, 300) == [
        "gsm8k_sdar: accuracy 50.0% (1/2, flexible-extract)",
        "gsm8k_sdar_hash: accuracy 100.0% (1/1, flexible-extract)",
        "GSM8K Eval: 2.00 s a question, 50.0 returned tokens/s, 6.0 s",
    ]


def test_where_it_cannot_be_known_there_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    live = _live("gsm8k_sdar", "humaneval_sdar", total=2)
    assert not live.knows_accuracy
    assert live.judge("humaneval_sdar", _instance("humaneval_sdar"), "x") is None
    assert Live({}, 0).knows_accuracy is False
    counts = Counts()
    progress = Progress(counts, total=2, stored=0, show=True, live=live)
    counts.add("humaneval_sdar", _result(), prompt_tokens=1)
    progress.step()
    progress.close(0)
    bar = capsys.readouterr().err
    assert "Generating" in bar and "Acc" not in bar and "tok/s" in bar


def test_a_judge_that_cannot_read_a_document_is_not_asked_again(caplog: pytest.LogCaptureFixture) -> None:
    live = _live(total=2)
    with caplog.at_level(logging.WARNING):
        assert live.judge("gsm8k_sdar", _instance(doc={"question": "?"}), "18") is None
    assert "Live accuracy is switched off: KeyError: 'answer'" in caplog.text
    assert not live.knows_accuracy and live.judge("gsm8k_sdar", _instance(), "18") is None
    assert "Acc" not in live.bar(1.0, 1)


def test_the_judge_of_other_filters_is_not_asked_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A variant whose YAML replaces the filters keeps the judge of the task that it includes."""
    yaml = f"include: {TASKS}/gsm8k_sdar_demo.yaml\ntask: mine\nfilter_list:\n  - name: first-line\n    filter:\n"
    (tmp_path / "mine.yaml").write_text(yaml + "      - function: take_first\n")
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    with caplog.at_level(logging.INFO):
        lm_eval.simple_evaluate(
            "sdar", model_args={"pretrained": "demo"}, tasks=["mine"], limit=2, task_manager=manager, bootstrap_iters=0
        )
    assert caplog.text.count("Live accuracy is switched off") == 1
    told = "the judge of mine applies the filter flexible-extract, which is none of the task's (first-line). Name"
    assert told in caplog.text and "accuracy 1" not in caplog.text


FILTERS = """
filter_list:
  - name: flexible-extract
    filter:
      - function: regex
        regex_pattern: '(\\d)'
      - function: take_first
"""


@pytest.mark.parametrize(
    ("yaml", "told"),
    [(FILTERS, r"'(\d+)' \(gold: '\1'\) where the task finds '\d' \(gold: '\1'\)"),
     ("doc_to_target: '0'\n", r"'(\d+)' \(gold: '\1'\) where the task finds '\1' \(gold: '0'\)")],
)  # fmt: skip
def test_the_judge_of_another_filter_of_the_same_name_or_of_other_gold_is_not_asked_again(
    yaml: str, told: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "mine.yaml").write_text(f"include: {TASKS}/gsm8k_sdar_demo.yaml\ntask: mine\n{yaml}")
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    with caplog.at_level(logging.INFO):
        lm_eval.simple_evaluate(
            "sdar", model_args={"pretrained": "demo"}, tasks=["mine"], limit=2, task_manager=manager, bootstrap_iters=0
        )
    assert caplog.text.count("Live accuracy is switched off") == 1 and "accuracy 1" not in caplog.text
    start = "the judge of mine applies the filter flexible-extract, and finds "
    assert re.search(start + told + r"\. Name another judge", caplog.text)


def test_the_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    live = _live()
    for text in ("18", "17"):  # an earlier run's
        live.judge("gsm8k_sdar", _instance(), text)
    counts = Counts()
    progress = Progress(counts, total=4, stored=2, show=True, live=live)
    live.judge("gsm8k_sdar", _instance(), "18")
    counts.add("gsm8k_sdar", _result(), prompt_tokens=1)
    progress.step()
    progress.close(0)
    first, *_, last = [part for part in capsys.readouterr().err.split("\r") if part.strip()]
    assert first.startswith("GSM8K Eval:  50%|") and "| 2/4 [00:00<?, ?q/s] Acc: 50.0%" in first
    assert last.startswith("GSM8K Eval:  75%|") and "| 3/4 [00:00<" in last and "q/s] Acc: 66.7% | 0.0s/q" in last


@pytest.mark.parametrize("whole", [True, False])
def test_a_rank_s_share_is_no_accuracy_of_the_run(caplog: pytest.LogCaptureFixture, whole: bool) -> None:
    live = _live(total=1, whole=whole)
    progress = Progress(Counts(), total=1, stored=0, show=False, live=live)
    live.judge("gsm8k_sdar", _instance(), "18")
    progress.step()
    with caplog.at_level(logging.INFO):
        progress.close(0)
    assert ("accuracy 100.0% (1/1, flexible-extract)" in caplog.text) is whole


def test_the_log_of_an_example() -> None:
    live = _live(total=10)
    result = _result(unmasked_at=(0, 1, 0, 2, 0, 0), confidences=(0.9, 0.5, 0.7, 0.25, 1.0, 0.5))
    verdict = live.judge("gsm8k_sdar", _instance(), "18")
    assert live.example(_instance(), _request(5), result, "18", verdict).splitlines() == [
        "=" * 80,
        "Example 1/10",
        "Question: 2 hens lay 9 eggs each. How many?",
        "Generated: 6 tokens in 2 blocks and 1.50 s (4.0 tok/s; the prompt has 5; ended by stop)",
        "Denoised (masked -> transferred, their mean confidence; a step each):",
        "  block 1: 3 -> 2 0.800, 1 -> 1 0.500",
        "  block 2: 3 -> 2 0.750, 1 -> 1 0.250",
        "Text: 18",
        "Predicted: 18 (flexible-extract)",
        "Ground truth: 18",
        "Correct: ✓",
    ]
    # Of another task, from an engine that does not record steps.
    plain = live.example(_instance("other", doc={"text": 1}), _request(5), _result(), "18", None).splitlines()
    assert plain[2] == "Question: the prompt" and plain[-1] == "Text: 18" and len(plain) == 5


def test_a_local_run_tells_what_the_harness_finds(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda _: None)
    manager = TaskManager(include_path=TASKS, include_defaults=False)

    def run(lm: SDARLM) -> Any:
        # So few tokens that some answers are cut before their number.
        found = lm_eval.simple_evaluate(
            lm, tasks=["gsm8k_sdar_demo"], task_manager=manager, limit=12, gen_kwargs="max_gen_toks=44"
        )
        assert found is not None
        return found["results"], found["samples"]

    results, samples = run(SDARLM("demo", verbose="true"))
    told = capsys.readouterr()
    right = sum(s["exact_match"] for s in samples["gsm8k_sdar_demo"] if s["filter"] == "flexible-extract")
    assert 0 < right < 12
    assert told.out.count("Correct: ✓") == right and told.out.count("Correct: ✗") == 12 - right
    assert told.out.count("  block ") > 12 and "Example 12/12" in told.out
    assert f"Acc: {right / 12:.1%} |" in told.err
    assert (results, samples) == run(SDARLM("demo"))
    assert "Example" not in capsys.readouterr().out


@pytest.mark.parametrize("task", ["gsm8k_sdar", "gsm8k_sdar_paper", "gsm8k_sdar_hash", "gsm8k_sdar_demo", "mine"])
def test_every_judge_finds_what_the_harness_finds(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the filter that it names; a user's variant has the judge of the task that it includes."""
    (tmp_path / "test.jsonl").write_text(json.dumps(DOC) + "\n")
    (tmp_path / "mine.yaml").write_text(f"include: {TASKS}/gsm8k_sdar.yaml\ntask: mine\n")
    monkeypatch.setenv("SDAR_GSM8K_DIR", str(tmp_path))
    manager = TaskManager(include_path=[TASKS, str(tmp_path)], include_defaults=False)
    found = manager.load_task_or_group(task)[task]
    live = Live({task: found.config.metadata["sdar_judge"]}, total=1)
    assert live.knows_accuracy
    verdict = live.judge(task, _instance(task), r"It is \boxed{18}.")
    assert verdict is not None and verdict.correct
    assert verdict.filter in {ensemble.name for ensemble in found._filters}
    assert verdict.filter == ("opencompass" if task == "gsm8k_sdar_paper" else "flexible-extract")


@pytest.mark.parametrize(
    ("judge", "told"),
    [
        ({"title": "Toy"}, "task 'toy': metadata: sdar_judge: of its YAML has no verdict."),
        (
            {"title": "Toy", "verdict": "no_such_module:verdict"},
            "cannot be imported (No module named 'no_such_module')",
        ),
        ({"title": "Toy", "verdict": "sdar_lm_eval.tasks.gsm8k:verdicts"}, "has no attribute 'verdicts'"),
        ({"title": "Toy", "verdict": ""}, "its judge '' cannot be imported (Empty module name)"),
    ],
)
def test_a_judge_that_is_not_there(judge: dict[str, str], told: str) -> None:
    with pytest.raises(UserError) as raised:
        Live({"toy": judge}, total=1)
    assert told in str(raised.value)
