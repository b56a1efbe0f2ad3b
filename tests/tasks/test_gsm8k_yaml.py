"""The task files, through lm-eval."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable
from scripted import evaluate, manager

from sdar_lm_eval.demo import PROBLEMS
from sdar_lm_eval.tasks.extraction import INVALID

Rows = list[dict[str, str]]
WriteFolder = Callable[..., Path]

BOXED = "Please reason step by step, and put your final answer within \\boxed{}."
HASHED = 'Please reason step by step, and end with a line "#### <number>".'
PROMPTS = {
    "gsm8k_sdar": "{}\n\n" + BOXED.replace("{}", "{{}}"),
    "gsm8k_sdar_paper": "{}\n" + BOXED.replace("{}", "{{}}") + "\n",
    "gsm8k_sdar_hash": "{}\n\n" + HASHED,
    "gsm8k_sdar_demo": "{}\n\n" + HASHED,
}


def _manager(folder: Path | None = None) -> TaskManager:
    return manager(**{"gsm8k_dir": str(folder)} if folder else {})


def _task(name: str, folder: Path | None = None) -> Any:
    return _manager(folder).load_task_or_group(name)[name]


def _evaluate(answer: Callable[[dict[str, str]], str], name: str, folder: Path | None, **settings: Any) -> Any:
    return evaluate(answer, name, {"gsm8k_dir": str(folder)} if folder else None, **settings)


@pytest.fixture
def folder(write_folder: WriteFolder) -> Path:
    return write_folder()


def test_these_are_the_tasks() -> None:
    assert sorted(name for name in _manager().all_tasks if name.startswith("gsm8k")) == sorted(PROMPTS)


@pytest.mark.parametrize("name", ["gsm8k_sdar", "gsm8k_sdar_paper", "gsm8k_sdar_hash"])
def test_what_a_task_asks(name: str, folder: Path, rows: Rows) -> None:
    task = _task(name, folder)
    task.build_all_requests(rank=0, world_size=1)
    assert [instance.args[0] for instance in task.instances] == [PROMPTS[name].format(row["question"]) for row in rows]
    longest, version = (4096, 3.0) if name == "gsm8k_sdar_paper" else (512, 1.0)
    settings = {"until": [], "do_sample": False, "temperature": 0.0, "max_gen_toks": longest}
    assert [instance.args[1] for instance in task.instances] == [settings] * len(rows)
    assert [task.doc_to_target(row) for row in rows] == ["18", "1000", "-5", "1/2"]
    assert (task.VERSION, task.OUTPUT_TYPE, task.config.num_fewshot) == (version, "generate_until", 0)


def test_what_the_demo_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDAR_GSM8K_DIR", "/nowhere")
    task = _task("gsm8k_sdar_demo", Path("/nowhere"))
    task.build_all_requests(rank=0, world_size=1)
    problems = [json.loads(line) for line in PROBLEMS.read_text("utf-8").splitlines()]
    assert [instance.args[0] for instance in task.instances] == [
        PROMPTS["gsm8k_sdar_demo"].format(problem["question"]) for problem in problems
    ]
    assert task.instances[0].args[1] == {"until": [], "do_sample": False, "temperature": 0.0, "max_gen_toks": 128}


def test_filters_and_scores(folder: Path, rows: Rows) -> None:
    task = _task("gsm8k_sdar", folder)
    task.build_all_requests(rank=0, world_size=1)
    # With repeats the first one counts.
    for instance, responses in zip(
        task.instances,
        [[r"\boxed{\$18.00}", "#### 17"], ["It is 1,000.", "#### 1000"], [r"\boxed{5}", "#### -5"], ["none"]],
        strict=True,
    ):
        instance.resps = responses
    task.apply_filters()
    expected = [("18", 1, "18", 1), (INVALID, 0, "1000", 1), ("5", 0, "5", 0), (INVALID, 0, INVALID, 0)]
    for instance, row, (strict, strict_score, flexible, flexible_score) in zip(
        task.instances, rows, expected, strict=True
    ):
        assert instance.filtered_resps == {"strict-match": strict, "flexible-extract": flexible}
        assert task.process_results(row, [strict]) == {"exact_match": strict_score}
        assert task.process_results(row, [flexible]) == {"exact_match": flexible_score}


def test_the_paper_s_column(folder: Path) -> None:
    """18 without a box: right in the released evaluation, invalid by strict-match; the sixth is the other way round."""
    results, _ = _evaluate(
        lambda doc: "The answer is 18." if "hens" in doc["question"] else "\\boxed{Total = 1000}",
        "gsm8k_sdar_paper",
        folder,
        limit=2,
    )
    scores = results["results"]["gsm8k_sdar_paper"]
    assert [scores[f"exact_match,{name}"] for name in ("opencompass", "strict-match", "flexible-extract")] == [
        0.5, 0.5, 1.0
    ]  # fmt: skip
    of = {(sample["filter"], sample["doc_id"]): sample for sample in results["samples"]["gsm8k_sdar_paper"]}
    assert [of["opencompass", 0]["exact_match"], of["strict-match", 0]["exact_match"]] == [1, 0]
    assert [of["opencompass", 1]["exact_match"], of["strict-match", 1]["exact_match"]] == [0, 1]


def test_an_evaluation(folder: Path, rows: Rows) -> None:
    answers = dict(
        zip(
            [row["question"] for row in rows],
            [r"\boxed{18 \text{ eggs}}", "#### $1,000", "It is -5.", r"\boxed{1}"],
            strict=True,
        )
    )
    results, requests = _evaluate(lambda doc: answers[doc["question"]], "gsm8k_sdar", folder)
    scores = results["results"]["gsm8k_sdar"]
    assert scores["exact_match,strict-match"] == 0.5
    assert scores["exact_match,flexible-extract"] == 0.75
    assert results["n-samples"]["gsm8k_sdar"] == {"original": 4, "effective": 4}
    assert results["versions"]["gsm8k_sdar"] == 1.0
    assert [context for context, _ in requests] == [PROMPTS["gsm8k_sdar"].format(row["question"]) for row in rows]
    assert json.dumps(results, default=handle_non_serializable)


def test_a_chat_template_and_other_settings(folder: Path, rows: Rows) -> None:
    _, requests = _evaluate(
        lambda doc: doc["answer"],
        "gsm8k_sdar_hash",
        folder,
        apply_chat_template=True,
        num_fewshot=2,  # the task's 0 holds
        gen_kwargs="do_sample=true,temperature=1.0",
        limit=2,
    )
    assert [json.loads(context) for context, _ in requests] == [
        [{"role": "user", "content": PROMPTS["gsm8k_sdar_hash"].format(row["question"])}] for row in rows[:2]
    ]
    settings = requests[0][1]
    assert (settings["do_sample"], float(settings["temperature"])) == (True, 1.0)
    assert (settings["until"], settings["max_gen_toks"]) == ([], 512)


def test_a_bad_folder_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="which holds no test") as raised:
        _task("gsm8k_sdar", tmp_path)
    assert type(raised.value).__name__ == "UserError"


def test_gsm8k(gsm8k: Path) -> None:
    results, requests = _evaluate(lambda doc: doc["answer"], "gsm8k_sdar_paper", gsm8k)
    scores = results["results"]["gsm8k_sdar_paper"]
    assert scores["exact_match,strict-match"] == scores["exact_match,flexible-extract"] == 1.0
    assert scores["exact_match,opencompass"] < 0.1  # it reads no "#### 18"
    assert len(requests) == 1319
    assert requests[0][0].startswith("Janet’s ducks lay 16 eggs per day.")
