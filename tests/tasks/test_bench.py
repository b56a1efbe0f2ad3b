"""The group of all columns, through lm-eval on miniature data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lm_eval
import miniature
import pytest
from lm_eval.utils import handle_non_serializable
from scripted import evaluate, manager

from sdar_lm_eval.report.columns import COLUMNS
from sdar_lm_eval.tasks import mathbench


def _right_answer(doc: dict[str, Any]) -> str:
    """What a chat model that knows everything might write."""
    if "choices" in doc:
        return f"{'ABCD'[doc['answer']]}."
    if "test_list" in doc or "entry_point" in doc:
        of = {row["task_id"]: row for row in [*miniature.MBPP, *miniature.HUMANEVAL]}[doc["task_id"]]
        code = of["code"] if "code" in of else of["prompt"] + of["canonical_solution"]
        return f"Here is the function:\n\n```python\n{code}\n```\n\nIt does what was asked."
    if "instruction_id_list" in doc:
        return "The rain falls. It falls on the roof."
    if doc.get("options"):
        return f"Therefore, the correct answer is option {mathbench.gold(doc, mathbench.ORDERS[doc['request']])}"
    answer = doc["answer"].rpartition("####")[2].strip()
    return f"Step by step.\n\n\\[\n\\boxed{{{answer}}}\n\\]"


@pytest.mark.parametrize(("answer", "score"), [(_right_answer, 1.0), (lambda doc: "I do not know, sorry", 0.0)])
def test_all_columns(answer: Any, score: float, offline: Path) -> None:
    results, requests = evaluate(answer, "sdar_bench", confirm_run_unsafe_code=True)
    found = results["groups"] | results["results"]
    assert [found[column.task][column.metric] for column in COLUMNS] == [score] * 7
    assert len(requests) == 57 * 2 + 5 * 2 + (14 * 4 * 4 + 3 * 2)
    assert json.dumps(results, default=handle_non_serializable)


def test_it_has_the_columns_of_the_table() -> None:
    group = (Path(miniature.TASKS) / "sdar_bench.yaml").read_text()
    assert [line[4:] for line in group.splitlines() if line.startswith("  - ")] == [column.task for column in COLUMNS]


def _leaves(loaded: Any) -> list[Any]:
    """The tasks of a loaded group, at any depth; lm-eval 0.4.9 gives dicts whose keys may be groups."""
    if isinstance(loaded, dict):
        return [leaf for value in loaded.values() for leaf in _leaves(value)]
    if isinstance(loaded, (list, tuple)):
        return [leaf for value in loaded for leaf in _leaves(value)]
    return [loaded] if hasattr(loaded, "build_all_requests") else []


def test_its_tasks_carry_the_published_decoding(offline: Path) -> None:
    """In metadata, beside what the user gives there, and not among what every model is asked with."""
    tasks = _leaves(manager(note="mine").load_task_or_group("sdar_bench"))
    assert len(tasks) == 57 + 5 + 2
    for task in tasks:
        metadata = task.config.metadata
        assert metadata["sdar_decoding"] == {"remasking_strategy": "low_confidence_static"}, task.config.task
        assert metadata["note"] == "mine"
        assert metadata["version"] >= 1.0
        assert set(task.config.generation_kwargs) == {"until", "do_sample", "temperature", "max_gen_toks"}
    (other,) = _leaves(manager().load_task_or_group("gsm8k_sdar"))
    assert "sdar_decoding" not in other.config.metadata


def test_the_user_s_metadata_wins(offline: Path) -> None:
    own = {"sdar_decoding": {"remasking_strategy": "sequential"}}
    (task,) = _leaves(manager(**own).load_task_or_group("math500_sdar"))
    assert task.config.metadata["sdar_decoding"] == {"remasking_strategy": "sequential"}
    assert task.config.metadata["version"] == 2.0


def test_the_demo_model(offline: Path) -> None:
    """The bundled checkpoint knows nothing of this, but what arrives at it is the protocol."""
    results = lm_eval.simple_evaluate(
        "sdar",
        model_args="pretrained=demo",
        tasks=[
            "mmlu_sdar_anatomy",
            "gsm8k_sdar_paper",
            "math500_sdar",
            "humaneval_sdar",
            "mbpp_sdar",
            "ifeval_sdar",
            "mathbench_sdar",
        ],
        task_manager=manager(),
        gen_kwargs={"max_gen_toks": 8},  # the protocol's 4,096 are more than it was trained for
        limit=1,
        bootstrap_iters=0,
        confirm_run_unsafe_code=True,
        verbosity="ERROR",
    )
    decoding = results["config"]["sdar_lm_eval"]["decoding_of_tasks"]
    assert len(decoding) == 8
    for settings in decoding.values():
        assert (settings["temperature"], settings["block_length"], settings["denoising_steps"]) == (0.0, 4, 4)
        assert settings["remasking_strategy"] == "low_confidence_static"
    for task, samples in results["samples"].items():
        assert samples and all(sample["resps"][0][0] for sample in samples), task  # no stop string leaves it empty
