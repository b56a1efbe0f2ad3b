from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lm_eval
import pytest
from lm_eval.tasks import TaskManager

from sdar_lm_eval.autoload import TASKS
from sdar_lm_eval.errors import UserError
from sdar_lm_eval.lm.answers import AnswerFolder, Session, busy_seconds, key_of, read_sessions, united
from sdar_lm_eval.lm.model import SDARLM

SETTINGS = {"seed": 0, "dtype": "float32"}


def _instance(prompt: str = "1 + 1?", task: str = "t", **gen_kwargs: Any) -> SimpleNamespace:
    return SimpleNamespace(task_name=task, args=(prompt, gen_kwargs))


def _folder(path: Path, **settings: Any) -> AnswerFolder:
    return AnswerFolder(path, SETTINGS | settings, lambda: {"engine": "native"})


def test_what_one_process_keeps_another_recalls(tmp_path: Path) -> None:
    first = _folder(tmp_path / "new" / "folder")
    first.begin()
    first.keep(_instance(), 0, {"text": "Zwei\u2028, 2"})
    second = _folder(tmp_path / "new" / "folder")  # the first is still at it
    assert second.recall(_instance(), 0) == "Zwei\u2028, 2"
    for other in (_instance("1 + 2?"), _instance(task="u"), _instance(temperature=1.0)):
        assert second.recall(other, 0) is None
    assert second.recall(_instance(), 1) is None
    second.keep(_instance(), 1, {"text": "drei"})
    assert len(list((tmp_path / "new" / "folder").iterdir())) == 2  # each writes a file of its own


def test_a_file_begins_with_its_settings_and_ends_with_what_became_of_the_model(tmp_path: Path) -> None:
    facts = {"steps": 0}
    folder = AnswerFolder(tmp_path, SETTINGS, lambda: dict(facts))
    assert list(tmp_path.iterdir()) == []  # nothing was answered
    folder.keep(_instance(), 0, {"text": "2"})
    (open_session,) = read_sessions(tmp_path)
    facts["steps"] = 7
    folder.finish()
    (session,) = read_sessions(tmp_path)
    assert (open_session.model, session.model) == ({"steps": 0}, {"steps": 7})
    assert session.settings == SETTINGS and [a["text"] for a in session.answers.values()] == ["2"]
    assert 0 <= session.ended - session.started < 60


def test_a_line_that_was_not_finished_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = _folder(tmp_path)
    for prompt in ("a", "b"):
        folder.keep(_instance(prompt), 0, {"text": prompt})
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-5])
    with caplog.at_level(logging.WARNING):
        again = _folder(tmp_path)
    assert (again.recall(_instance("a"), 0), again.recall(_instance("b"), 0)) == ("a", None)
    assert "last line was not finished" in caplog.text
    path.write_bytes(b'{"settings"')  # killed at its first line
    assert read_sessions(tmp_path) == []


def test_other_settings_answers_are_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _folder(tmp_path).keep(_instance(), 0, {"text": "2"})
    with caplog.at_level(logging.WARNING):
        other = _folder(tmp_path, seed=1)
    assert other.recall(_instance(), 0) is None
    assert "1 files were made with other settings and are left alone (seed was 0, is 1)" in caplog.text


def test_the_first_answer_counts(tmp_path: Path) -> None:
    for number in (1, 2):
        line = {"key": "k", "text": f"answer {number}", "at": 1.0}
        head = {"settings": SETTINGS, "model": {}, "started": 0.0}
        (tmp_path / f"{number}.jsonl").write_text(f"{json.dumps(head)}\n{json.dumps(line)}\n")
    assert united(read_sessions(tmp_path))["k"]["text"] == "answer 1"


def test_time_is_counted_once_and_pauses_are_not() -> None:
    def session(started: float, *at: float) -> Session:
        return Session(Path(), {}, {}, started, {str(second): {"at": second} for second in at})

    # 0 to 10, beside it 4 to 12, a pause, 20 to 25, within it 21 to 22, and one without an answer
    sessions = [session(20, 5.0), session(0, 3.0, 10.0), session(4, 8.0), session(21, 1.0), session(90)]
    assert busy_seconds(sessions) == pytest.approx(12 + 5)
    assert busy_seconds([]) == 0


def test_what_is_no_file_of_answers_is_named(tmp_path: Path) -> None:
    (tmp_path / "notes.jsonl").write_text('{"settings": {}}\n')
    with pytest.raises(UserError, match=r"notes.jsonl is no file of answers \(KeyError: 'model'\)\. Move it away"):
        read_sessions(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be made a folder"):
        _folder(tmp_path / "file" / "below")


def test_a_run_goes_on_from_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn repeats too: each is recalled as itself, and scores stay what they were."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda _: None)
    task = f"include: {TASKS}/gsm8k_sdar_demo.yaml\ntask: twice\nrepeats: 2\n"
    task += "generation_kwargs: {until: [], do_sample: true, temperature: 3.0, max_gen_toks: 12}\n"
    (tmp_path / "twice.yaml").write_text(task)
    manager = TaskManager(include_path=[TASKS, str(tmp_path)], include_defaults=False)

    def run(tasks: list[str], limit: int, **model_args: Any) -> tuple[Any, int]:
        lm = SDARLM("demo", answers=str(tmp_path / "answers"), **model_args)
        results = lm_eval.simple_evaluate(lm, tasks=tasks, task_manager=manager, limit=limit)
        assert results is not None
        found = {(s["doc_id"], s["filter"]): s["resps"] for task in tasks for s in results["samples"][task]}
        return (results["results"], found), lm.counts.requests

    _, computed = run(["twice"], 2)
    assert computed == 4
    first, computed = run(["twice"], 3)
    assert computed == 2  # the third document's
    again, computed = run(["twice"], 3)
    assert computed == 0 and again == first
    resps = [texts[0] for texts in first[1].values()]
    assert any(one != two for one, two in resps)
    _, computed = run(["twice"], 3, seed=1)
    assert computed == 6


def test_keys_do_not_depend_on_the_order_of_settings() -> None:
    assert key_of(_instance(a=1, b=2), 0) == key_of(_instance(b=2, a=1), 0) != key_of(_instance(a=2, b=1), 0)
