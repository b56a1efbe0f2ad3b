from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lm_eval
import pytest
from lm_eval.tasks import TaskManager
from scripted_lm import DATA, Answer, MakeLM, ScriptedEngine, ScriptedLM, echo

from sdar_lm_eval.lm import frontend


@pytest.fixture
def make_lm(monkeypatch: pytest.MonkeyPatch) -> MakeLM:
    def make(pretrained: str | Path = "demo", answer: Answer = echo, **arguments: Any) -> ScriptedLM:
        monkeypatch.setattr(
            frontend, "make_engine", lambda name, checkpoint, **options: ScriptedEngine(checkpoint, answer, options)
        )
        return ScriptedLM(str(pretrained), **arguments)

    return make


@pytest.fixture(autouse=True)
def _log_everything(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="sdar_lm_eval")


@pytest.fixture
def evaluate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Return a function that runs lm_eval itself over a task of five questions, defined by YAML lines."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda _: None)  # slow, and of no interest here

    def run(lm: Any, *lines: str, **settings: Any) -> dict[str, Any]:
        folder = tmp_path / "task"
        folder.mkdir(exist_ok=True)
        (folder / "data.py").write_text(DATA)
        head = ["task: five", "custom_dataset: !function data.load", "test_split: test", "doc_to_text: '{{question}}'"]
        head += ["doc_to_target: '{{answer}}'", "metric_list: [{metric: exact_match}]"]
        (folder / "five.yaml").write_text("\n".join([*head, *(lines or ["output_type: generate_until"])]))
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        results = lm_eval.simple_evaluate(lm, tasks=["five"], task_manager=manager, bootstrap_iters=0, **settings)
        assert results is not None
        return dict(results)

    return run
