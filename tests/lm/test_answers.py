from __future__ import annotations

import errno
import json
import logging
import os
import zlib
from pathlib import Path
from typing import Any

import lm_eval
import pytest
from lm_eval.tasks import TaskManager

from sdar_lm_eval.autoload import TASKS
from sdar_lm_eval.errors import UserError
from sdar_lm_eval.lm.answers import AnswerFolder, Session, earlier_work, read_sessions, united
from sdar_lm_eval.lm.model import SDARLM
from sdar_lm_eval.lm.store import decode_line, encode_line
from sdar_lm_eval.report.counts import Counts, EarlierWork, seconds_of

SETTINGS = {"engine": "native", "dtype": "float32"}


def _folder(path: Path, **settings: Any) -> AnswerFolder:
    return AnswerFolder(path, SETTINGS | settings, lambda: {"engine": "native"})


def test_what_one_process_keeps_another_has(tmp_path: Path) -> None:
    first = _folder(tmp_path / "new" / "folder")
    first.begin()
    first.put("a", {"text": "Zwei\u2028, 2 \ud800"})
    assert first.get("a") == {**first.get("a"), "text": "Zwei\u2028, 2 \ud800"}  # type: ignore[dict-item]
    second = _folder(tmp_path / "new" / "folder")  # the first is still at it
    assert second.get("a") == first.get("a")
    assert second.get("b") is None
    second.put("b", {"text": "drei"})
    assert len(list((tmp_path / "new" / "folder").iterdir())) == 2  # each writes a file of its own


def test_names_of_another_version_are_left_out(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    folder.put("a", {"text": "x", "passes": {"made": 3}})
    for reader in (folder, _folder(tmp_path)):
        assert set(reader.get("a") or ()) == {"key", "at", "text"}


def test_a_file_begins_with_its_settings_and_ends_with_what_became_of_the_model(tmp_path: Path) -> None:
    facts = {"steps": 0}
    folder = AnswerFolder(tmp_path, SETTINGS, lambda: dict(facts))
    assert list(tmp_path.iterdir()) == []  # nothing was answered
    folder.put("a", {"text": "2"})
    (open_session,) = read_sessions(tmp_path)
    facts["steps"] = 7
    assert folder._file is not None
    descriptor = folder._file._descriptor
    folder.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
    (session,) = read_sessions(tmp_path)
    assert (open_session.model, session.model) == ({"steps": 0}, {"steps": 7})
    assert session.settings == SETTINGS and [a["text"] for a in session.answers.values()] == ["2"]
    assert 0 <= session.ended - session.started < 60


def _flip(line: bytes) -> bytes:
    place = line.index(b"text") + 9
    return line[:place] + bytes([line[place] ^ 1]) + line[place + 1 :]


DAMAGES = {
    "cut": lambda line: line[:-9],
    "a bit of its text": _flip,
    "no checksum": lambda line: b'{"key": "b", "at": 1.0, "text": "b"}',
    "no text": lambda line: encode_line({"key": "b", "at": 1.0, "token": "b"})[:-1],
    "text is null": lambda line: encode_line({"key": "b", "at": 1.0, "text": None})[:-1],
    "nested without end": lambda line: b"[" * 100_000,
    "binary": lambda line: bytes(range(256)).replace(b"\n", b""),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_line_is_named_and_the_good_ones_count(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    folder = _folder(tmp_path)
    for key in ("a", "b", "c"):
        folder.put(key, {"text": f"answer {key}"})
    (path,) = tmp_path.iterdir()
    head, a, b, c, _ = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([head, a, DAMAGES[damage](b), c, b""]))
    again = _folder(tmp_path)
    assert [again.get(key) is not None for key in ("a", "b", "c")] == [True, False, True]
    assert (
        f"{path}: 1 damaged lines (3) are skipped, and their answers are computed again; 2 good lines count"
        in caplog.text
    )
    again.put("b", {"text": "made again"})
    assert _folder(tmp_path).get("b")["text"] == "made again"  # type: ignore[index]


def test_a_line_that_a_full_disk_cut_does_not_cost_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = _folder(tmp_path)
    folder.put("a", {"text": "x" * 20_000})
    write, left = os.write, [10_000]

    def full(descriptor: int, content: bytes) -> int:
        if left[0] == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        left[0] -= (written := min(left[0], len(content)))
        return write(descriptor, content[:written])

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        folder.put("b", {"text": "y" * 20_000})
    monkeypatch.undo()  # there is space again
    folder.put("c", {"text": "z"})
    again = _folder(tmp_path)
    assert [again.get(key) is not None for key in ("a", "b", "c")] == [True, False, True]


def test_a_first_line_that_a_full_disk_cut_costs_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file without it stays behind; the next answer begins another."""
    folder, write = _folder(tmp_path), os.write

    def full(descriptor: int, content: bytes) -> int:
        if len(content) < 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, content[:20])

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        folder.put("a", {"text": "a"})
    monkeypatch.undo()
    folder.put("b", {"text": "b"})
    assert _folder(tmp_path).get("b") is not None


@pytest.mark.parametrize("head", [b'{"settings"', b"", b'{"settings": null}\n', b"\x00\x01\n", b"[]\n"])
def test_a_file_without_settings_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture, head: bytes) -> None:
    (tmp_path / "broken.jsonl").write_bytes(head)
    assert read_sessions(tmp_path) == []
    assert ("begins with no readable settings, and is skipped" in caplog.text) is bool(head)
    nulls = {"settings": None, "model": None, "started": None}
    undated = {"settings": SETTINGS, "model": {}, "started": "now"}
    for first_line in (nulls, undated):
        (tmp_path / "broken.jsonl").write_bytes(encode_line(first_line))
        assert read_sessions(tmp_path) == []


def test_what_is_no_regular_file_is_passed_over_and_not_waited_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    _folder(tmp_path)
    for name in ("folder.jsonl is no regular file", "pipe.jsonl is no regular file", "gone.jsonl cannot be read"):
        assert name in caplog.text


def test_a_checksum_is_of_the_line_s_bytes() -> None:
    line = {"key": "k", "text": 'a ", "crc32": "00000000"}', "number": 1.5}
    encoded = encode_line(line)
    assert decode_line(encoded[:-1]) == line
    assert json.loads(encoded)["crc32"] == f"{zlib.crc32(encoded[: encoded.rindex(b', ')]):08x}"


def test_other_settings_answers_are_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _folder(tmp_path).put("a", {"text": "2"})
    with caplog.at_level(logging.WARNING):
        other = _folder(tmp_path, dtype="bfloat16")
    assert other.get("a") is None
    assert "1 files are of other settings, and are ignored (dtype was 'float32', is 'bfloat16')" in caplog.text


def test_the_first_answer_counts(tmp_path: Path) -> None:
    for number in (1, 2):
        head = {"settings": SETTINGS, "model": {}, "started": 0.0}
        line = {"key": "k", "text": f"answer {number}", "at": 1.0}
        (tmp_path / f"{number}.jsonl").write_bytes(encode_line(head) + encode_line(line))
    assert united(read_sessions(tmp_path))["k"]["text"] == "answer 1"


def test_a_folder_that_cannot_be_used_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/answers")):
        with pytest.raises(UserError, match=r"answers=.* cannot be written: .*\. Name another folder\."):
            _folder(folder)
    with pytest.raises(UserError, match=r"'~nobody-of-that-name/x': .* Write the whole path"):
        _folder(Path("~nobody-of-that-name/x"))


def test_a_run_goes_on_from_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn repeats too: each is recalled as itself, and scores stay what they were."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda _: None)
    task = f"include: {TASKS}/gsm8k_sdar_demo.yaml\ntask: twice\nrepeats: 2\n"
    task += "generation_kwargs: {until: [], do_sample: true, temperature: 3.0, max_gen_toks: 12}\n"
    (tmp_path / "twice.yaml").write_text(task)
    manager = TaskManager(include_path=[TASKS, str(tmp_path)], include_defaults=False)

    def run(tasks: list[str], limit: int, **model_args: Any) -> tuple[Any, Any]:
        lm = SDARLM("demo", answers=str(tmp_path / "answers"), **model_args)
        results = lm_eval.simple_evaluate(lm, tasks=tasks, task_manager=manager, limit=limit)
        assert results is not None
        found = {(s["doc_id"], s["filter"]): s["resps"] for task in tasks for s in results["samples"][task]}
        return (results["results"], found), lm.counts.as_dict()

    _, before = run(["twice"], 2)
    assert before["requests"] == 4
    first, rest = run(["twice"], 3)
    assert rest["requests"] == 2  # the third document's
    again, nothing = run(["twice"], 3)
    assert nothing["requests"] == 0 and again == first
    assert nothing["stored"]["new_tokens"] == before["new_tokens"] + rest["new_tokens"]
    assert nothing["stored"]["forwards"] == sum(
        counts["forwards"][kind] for counts in (before, rest) for kind in ("denoising", "commit")
    )
    assert nothing["stored"]["seconds"] > 0
    resps = [texts[0] for texts in first[1].values()]
    assert any(one != two for one, two in resps)
    _, other = run(["twice"], 3, seed=1)
    assert other["requests"] == 6
    again, nothing = run(["twice"], 3, seed=1234)  # lm_eval's default of --seed
    assert nothing["requests"] == 0 and again == first


def test_the_time_of_some_answers_is_their_share_of_the_tokens(tmp_path: Path) -> None:
    def session(name: str, started: float, **tokens: int) -> Session:
        lines = {key: {"text": "", "at": 10.0, "new_tokens": number} for key, number in tokens.items()}
        return Session(tmp_path / name, SETTINGS, {}, started, lines)  # type: ignore[arg-type]

    sessions = [session("1", 0.0, a=30, b=10), session("2", 100.0, c=50), session("3", 105.0, d=10)]

    def seconds(*ranks: str) -> float:
        """Of ranks that each find the answers under some keys."""
        each = [Counts() for _ in ranks]
        for counts, keys in zip(each, ranks, strict=True):
            counts.add_earlier(earlier_work(sessions, set(keys)))
        return Counts.of_ranks(each).stored_seconds

    assert seconds("a") == pytest.approx(10 * 30 / 40)
    assert seconds("ab") == seconds("a", "b") == pytest.approx(10)
    assert seconds("cd") == seconds("c", "d") == pytest.approx(15)  # the two overlap
    assert seconds("abcd") == seconds("bc", "ad") == seconds("a", "", "bcd") == pytest.approx(25)
    assert seconds("") == seconds("", "") == 0


def test_time_is_counted_once_and_pauses_are_not() -> None:
    # 0 to 10, beside it 4 to 12, a pause, 20 to 25, and within it 21 to 22
    spans = [(20, 25), (0, 10), (4, 12), (21, 22)]
    assert seconds_of([EarlierWork(*span, tokens=2, used=2) for span in spans]) == pytest.approx(12 + 5)
    assert seconds_of([EarlierWork(*span, tokens=0, used=0) for span in spans]) == pytest.approx(12 + 5)
    assert seconds_of([]) == 0


def test_the_time_of_own_answers_is_another_s(tmp_path: Path) -> None:
    """A folder knows what earlier processes took; its own time is counted by the run."""
    first = _folder(tmp_path)
    first.put("a", {"text": "1", "new_tokens": 4})
    assert first.earlier({"a"}) is None
    first.close()
    second = _folder(tmp_path)
    (work,) = (second.earlier({"a"}) or {}).values()
    assert (work.tokens, work.used) == (4, 4) and work.ended - work.started == pytest.approx(0, abs=1)
    assert second.earlier({"a", "b"}) is None
