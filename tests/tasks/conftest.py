from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nltk
import pytest
from miniature import write_all, write_punkt
from opencompass_code import conversations_by, running

from sdar_lm_eval.tasks.gsm8k import GSM8K

ROWS = [
    {"question": "Ann has 3 hens, each lays 6 eggs. How many eggs?", "answer": "3 * 6 = <<3*6=18>>18 eggs.\n#### 18"},
    {"question": "Bo earns $500 twice.  How much?\nSay {{it}} in \\boxed{}.", "answer": "2 * 500\n#### 1,000"},
    {"question": "It is 5° and falls by 10°. “How cold” is it?", "answer": "5 - 10 = -5\n#### -5"},
    {"question": "Cy cuts 1 pie in 2. How much is a piece?", "answer": "1 / 2 = .5\n#### 0.5"},
]

_FOLDER = os.environ.get(GSM8K.variable) or Path(__file__).parents[3] / "shared" / "data" / "gsm8k"

_BENCH = Path(os.environ.get("SDAR_DATA_DIR") or Path(__file__).parents[3] / "shared" / "data" / "sdar_bench")

WriteFolder = Callable[..., Path]


@pytest.fixture(autouse=True)
def _no_folder_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("SDAR_") and name.endswith("_DIR")]:
        monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def miniature_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder for SDAR_DATA_DIR, with a few documents of every data set; a test must leave it as it is."""
    return write_all(tmp_path_factory.mktemp("data"))


@pytest.fixture
def offline(
    miniature_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, _no_folder_from_outside: None
) -> Path:
    """Let every task read the miniature data, and nltk a sentence splitter of ours."""
    monkeypatch.setenv("SDAR_DATA_DIR", str(miniature_data))
    monkeypatch.setattr(nltk.data, "path", [str(write_punkt(tmp_path / "nltk"))])
    return miniature_data


@pytest.fixture
def gsm8k() -> Path:
    """Return the folder of the real data, where the machine has it: the one set, or one beside the checkout."""
    folder = Path(_FOLDER)
    if not (folder / "test.jsonl").is_file():
        pytest.skip(f"needs GSM8K's test.jsonl in ${GSM8K.variable} or {folder}")
    return folder


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, _no_folder_from_outside: None) -> Path:
    """Let tasks read the real data of SDAR's table, where the machine has it, and return its folder."""
    if not (_BENCH / "mmlu" / "anatomy" / "test.jsonl").is_file():
        pytest.skip(f"needs the data sets of SDAR's table in $SDAR_DATA_DIR or {_BENCH}")
    monkeypatch.setenv("SDAR_DATA_DIR", str(_BENCH))
    if (_BENCH / "nltk_data").is_dir():
        monkeypatch.setattr(nltk.data, "path", [str(_BENCH / "nltk_data")])
    return _BENCH


@pytest.fixture
def rows() -> list[dict[str, str]]:
    return ROWS


@pytest.fixture
def write_folder(tmp_path: Path) -> WriteFolder:
    """Return a function that makes a folder with a test.jsonl of these lines (or bytes), by default `ROWS`."""

    def write(*lines: object, name: str = "gsm8k") -> Path:
        folder = tmp_path / name
        folder.mkdir()
        if lines and isinstance(lines[0], bytes):
            content = b"".join(line for line in lines if isinstance(line, bytes))
        else:
            texts = [line if isinstance(line, str) else json.dumps(line) for line in lines or ROWS]
            content = "\n".join(texts).encode()
        (folder / "test.jsonl").write_bytes(content)
        return folder

    return write


@pytest.fixture
def opencompass() -> Iterator[Any]:
    """Return a function that runs a file of OpenCompass, or lines of it, and returns its names."""
    yield from running()


@pytest.fixture
def conversation(opencompass: Any) -> Any:
    """Return a function from a dataset configuration, its shots and a row to what the chat template would get."""
    return conversations_by(opencompass)
