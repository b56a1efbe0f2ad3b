from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest

from sdar_lm_eval.errors import UserError
from sdar_lm_eval.tasks import gsm8k as tasks
from sdar_lm_eval.tasks.extraction import INVALID, strict_match

Rows = list[dict[str, str]]
WriteFolder = Callable[..., Path]
GOOD = {"question": "How many?", "answer": "#### 18"}


def test_a_folder(write_folder: WriteFolder, rows: Rows) -> None:
    data = tasks.load(gsm8k_dir=str(write_folder()))
    assert list(data) == ["test"]
    assert list(data["test"]) == rows
    assert list(tasks.load(gsm8k_dir=write_folder(name="path"))["test"]) == rows


def test_the_model_arguments_are_ignored(write_folder: WriteFolder, rows: Rows) -> None:
    data = tasks.load(gsm8k_dir=str(write_folder()), pretrained="x", version=1.0, config_source="y", batch_size=1)
    assert list(data["test"]) == rows


def test_a_folder_below_home(write_folder: WriteFolder, rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_folder()
    monkeypatch.setenv("HOME", str(folder.parent))
    assert list(tasks.load(gsm8k_dir="~/gsm8k")["test"]) == rows


def test_what_beats_what(write_folder: WriteFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def questions(**metadata: object) -> list[str]:
        return tasks.load(**metadata)["test"]["question"][:]

    hub = datasets.Dataset.from_list([{**GOOD, "question": "hub"}])
    monkeypatch.setattr(datasets, "load_dataset", lambda path, name, split: {("openai/gsm8k", "main", "test"): hub}[
        path, name, split
    ])  # fmt: skip
    given = str(write_folder({**GOOD, "question": "given"}, name="given"))
    assert questions() == ["hub"]
    monkeypatch.setenv("SDAR_GSM8K_DIR", "")
    assert questions() == ["hub"]
    monkeypatch.setenv("SDAR_GSM8K_DIR", str(write_folder({**GOOD, "question": "variable"}, name="variable")))
    assert questions() == questions(gsm8k_dir=None) == ["variable"]
    assert questions(gsm8k_dir=given) == ["given"]


@pytest.mark.parametrize(
    "content",
    [
        json.dumps(GOOD).encode(),
        b"\xef\xbb\xbf" + json.dumps(GOOD).encode(),
        json.dumps(GOOD).encode() + b"\r\n\r\n  \n",
        b"\n" + json.dumps({**GOOD, "id": 7}).encode() + b"\n",
    ],
    ids=["plain", "byte order mark", "blank lines", "more keys"],
)
def test_files_that_are_fine(content: bytes, write_folder: WriteFolder) -> None:
    assert list(tasks.load(gsm8k_dir=write_folder(content))["test"]) == [GOOD]


def test_separators_inside_a_string_do_not_end_a_line(write_folder: WriteFolder) -> None:
    row = {"question": "a\u2028b\u0085c", "answer": "#### 1"}
    folder = write_folder(json.dumps(row, ensure_ascii=False).encode())
    assert list(tasks.load(gsm8k_dir=folder)["test"]) == [row]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'question': 1}", "not JSON"),
        ('{"question": "How', "not JSON"),
        (json.dumps(GOOD) + json.dumps(GOOD), "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('{"question": "\\ud800", "answer": "#### 1"}', "not JSON"),
        ([GOOD], '[{"answer": "#### 18", "question": "'),
        ("18", "18 is no object"),
        ({"question": "How many?"}, "no 'answer', only 'question'"),
        ({"problem": "How many?", "answer": "#### 1"}, "no 'question', only 'answer', 'problem'"),
        ({**GOOD, "question": 5}, "'question' is 5, not a string"),
        ({**GOOD, "answer": None}, "'answer' is null, not a string"),
        ({**GOOD, "question": " \n"}, "'question' is empty"),
        ({**GOOD, "answer": ""}, "'answer' is empty"),
        ({**GOOD, "answer": "18"}, "'answer' has no number after '####'"),
        ({**GOOD, "answer": "18\n#### many"}, "'answer' has no number after '####'"),
        ({**GOOD, "answer": r"\boxed{18}"}, "'answer' has no number after '####'"),
    ],
    ids=lambda value: None if isinstance(value, str) and len(value) < 100 else "",
)
def test_a_bad_line(line: object, message: str, write_folder: WriteFolder) -> None:
    folder = write_folder(GOOD, "", line, GOOD)
    with pytest.raises(UserError) as raised:
        tasks.load(gsm8k_dir=folder)
    text = str(raised.value)
    assert text.startswith(f"{folder / 'test.jsonl'}, line 3: {message}")
    assert "\n" not in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty. It needs one {"),
        (b"\xef\xbb\xbf\n \n", "is empty"),
        (json.dumps(GOOD).encode() + b'\n{"question": "\xe9"}', ", line 2: not UTF-8. Save the file as UTF-8."),
        (json.dumps(GOOD).encode("utf-16"), ", line 1: not UTF-8"),
    ],
    ids=["empty", "blank", "latin-1", "utf-16"],
)
def test_a_bad_file(content: bytes, message: str, write_folder: WriteFolder) -> None:
    folder = write_folder(content)
    with pytest.raises(UserError) as raised:
        tasks.load(gsm8k_dir=folder)
    assert str(raised.value).startswith(f"{folder / 'test.jsonl'}{message if message[0] == ',' else ' ' + message}")


def _refusal(**metadata: object) -> str:
    with pytest.raises(UserError) as raised:
        tasks.load(**metadata)
    text = str(raised.value)
    assert "\n" not in text
    return text


def test_a_bad_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = str(tmp_path / "missing")
    remedy = "Give a folder that holds GSM8K's test.jsonl, or leave it out to load openai/gsm8k"
    refused = _refusal(gsm8k_dir=missing)
    assert refused.startswith(f"gsm8k_dir is {missing!r}, and there is no such folder. {remedy}")
    for given, shown in ((5, "5"), ("", "''"), (" ", "' '"), (True, "true")):
        assert _refusal(gsm8k_dir=given).startswith(f"gsm8k_dir is {shown}, which is no path. {remedy}")
    assert "cannot be read" in _refusal(gsm8k_dir="~nobody-of-this-name/gsm8k")
    assert "xxxxx" in _refusal(gsm8k_dir="x" * 5000)  # longer than a path can be
    monkeypatch.setenv("SDAR_GSM8K_DIR", missing)
    assert _refusal().startswith(f"SDAR_GSM8K_DIR is {missing!r}, and there is no such folder.")


def test_a_folder_without_the_file(tmp_path: Path) -> None:
    assert "which holds no test.jsonl (it is empty)." in _refusal(gsm8k_dir=tmp_path)
    for name in ("train.jsonl", "test.json"):
        (tmp_path / name).touch()
    assert "which holds no test.jsonl (it holds test.json, train.jsonl)." in _refusal(gsm8k_dir=tmp_path)
    for number in range(10):
        (tmp_path / f"a{number}").touch()
    assert "(it holds a0, a1, a2, a3, a4, a5, a6, a7 and 4 more)" in _refusal(gsm8k_dir=tmp_path)


def test_the_file_in_place_of_its_folder(write_folder: WriteFolder) -> None:
    file = str(write_folder() / "test.jsonl")
    assert _refusal(gsm8k_dir=file) == f"gsm8k_dir is {file!r}, a file: give the folder that holds test.jsonl."


def test_a_misspelt_name() -> None:
    refused = _refusal(gsm8k_path="/data")
    assert refused == (
        "Unknown metadata 'gsm8k_path': the GSM8K tasks know 'gsm8k_dir' only. Did you mean 'gsm8k_dir'?"
    )


def test_the_hub_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach 'openai/gsm8k' on the Hub\nand more")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    refused = _refusal(pretrained="x")
    assert "(ConnectionError: Couldn't reach 'openai/gsm8k' on the Hub)" in refused
    assert """--metadata '{"gsm8k_dir": "/path/to/folder"}' or SDAR_GSM8K_DIR=/path/to/folder.""" in refused
    assert "/test.jsonl" in refused


def test_rows_of_the_hub_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: [GOOD, {**GOOD, "answer": "none"}])
    assert _refusal().startswith("openai/gsm8k, row 1: 'answer' has no number after '####'.")


def test_the_demo_has_its_own_problems(
    tmp_path: Path, write_folder: WriteFolder, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    problems = shutil.copy(write_folder() / "test.jsonl", tmp_path / "problems.jsonl")
    monkeypatch.setattr(tasks, "PROBLEMS", Path(problems))
    monkeypatch.setenv("SDAR_GSM8K_DIR", "/nowhere")
    assert list(tasks.load_demo(gsm8k_dir="/nowhere", pretrained="demo")["test"]) == rows
    monkeypatch.setattr(tasks, "PROBLEMS", tmp_path / "missing.jsonl")
    with pytest.raises(UserError, match="reinstall"):
        tasks.load_demo()


@pytest.mark.parametrize(
    ("variable", "metadata", "says"),
    [
        ("SDAR_GSM8K_DIR", {}, "SDAR_GSM8K_DIR is 'mine'"),
        ("SDAR_DATA_DIR", {}, "SDAR_DATA_DIR's folder for GSM8K is 'mine'"),
        (None, {"gsm8k_dir": "yours"}, "gsm8k_dir is 'yours'"),
        ("SDAR_GSM8K_DIR", {"sdar_data_dir": "yours"}, "SDAR_GSM8K_DIR is 'mine'"),
    ],
)
def test_the_demo_says_that_it_reads_no_folder(
    variable: str | None,
    metadata: dict[str, str],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("WARNING")
    if variable:
        monkeypatch.setenv(variable, "mine")
    assert len(tasks.load_demo(pretrained="demo", **metadata)["test"]) == 200
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        (
            "WARNING",
            f"gsm8k_sdar_demo asks its own problems. {says}, and the task does not read that folder. "
            "For the problems there: --tasks gsm8k_sdar_hash.",
        )
    ]


def test_the_demo_says_nothing_where_no_folder_is_named(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("WARNING")
    tasks.load_demo(pretrained="demo", gsm8k_dir=None)
    assert not caplog.records


def test_the_bundled_problems() -> None:
    problems = tasks.load_demo()["test"]
    assert len(problems) == 200
    assert len({problem["question"] for problem in problems}) == 200
    for problem in problems:
        assert strict_match(problem["answer"], problem["question"]) == tasks.gold(problem) != INVALID


def test_gold(rows: Rows) -> None:
    assert [tasks.gold(row) for row in rows] == ["18", "1000", "-5", "1/2"]


def test_filters_keep_documents_and_repeats_apart(rows: Rows) -> None:
    responses = [
        ["#### 18", r"\boxed{17}", "18"],
        [rows[1]["question"], "", "$1,000.00"],
        ["#### -5", f"{rows[2]['question']} -5", "5"],
        ["#### 1/2", ".5", r"\boxed{\frac12}"],
    ]
    assert tasks.filter_strict_match(responses, rows) == [
        ["18", "17", INVALID],
        [INVALID, INVALID, INVALID],
        ["-5", INVALID, INVALID],
        ["1/2", INVALID, "1/2"],
    ]
    assert [[number == tasks.gold(row) for number in numbers] for numbers, row in zip(
        tasks.filter_opencompass(responses, rows), rows, strict=True
    )] == [[False, False, True], [False, False, True], [False, False, False], [False, False, True]]  # fmt: skip
    assert tasks.filter_flexible_extract(iter(responses), rows) == [
        ["18", "17", "18"],
        [INVALID, INVALID, "1000"],
        ["-5", "-5", "5"],
        ["1/2", "1/2", "1/2"],
    ]
