"""What the GSM8K task files name: the data, the gold answers, the filters.

lm-eval opens this file by its path, outside of its package: imports are absolute.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import datasets

from sdar_lm_eval.demo import PROBLEMS
from sdar_lm_eval.errors import UserError, did_you_mean
from sdar_lm_eval.tasks.extraction import INVALID, flexible_extract, gold_number, strict_match

FOLDER_KEY = "gsm8k_dir"
FOLDER_VARIABLE = "SDAR_GSM8K_DIR"
FILE_NAME = "test.jsonl"
HUB = ("openai/gsm8k", "main")
SOURCE_URL = "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data/test.jsonl"

_ROW = '{"question": "…", "answer": "… #### 18"}'
_REMEDY = f"Give a folder that holds GSM8K's {FILE_NAME}, or leave it out to load {HUB[0]} from the Hugging Face Hub."


def load(*, gsm8k_dir: str | os.PathLike[str] | None = None, **others: Any) -> datasets.DatasetDict:
    """Return GSM8K's test split: `gsm8k_dir` if given, else the folder in `SDAR_GSM8K_DIR`, else the hub.

    lm-eval calls it with the run's metadata and model arguments; all but `gsm8k_dir` are somebody else's.

    Raises:
        UserError: the folder or its file cannot be used, or the hub cannot be reached.
    """
    for name in others:
        if name.startswith("gsm8k"):
            hint = did_you_mean(name, [FOLDER_KEY])
            raise UserError(f"Unknown metadata {name!r}: the GSM8K tasks know {FOLDER_KEY!r} only.{hint}")
    if gsm8k_dir is not None:
        return _split(_read_folder(gsm8k_dir, FOLDER_KEY))
    if folder := os.environ.get(FOLDER_VARIABLE):
        return _split(_read_folder(folder, FOLDER_VARIABLE))
    return _split(_read_hub())


def load_demo(**_: Any) -> datasets.DatasetDict:
    """Return the problems that come with the package, whatever folder of GSM8K is set."""
    try:
        return _split(_read_file(PROBLEMS))
    except OSError as error:
        raise UserError(f"The demo's problems are missing ({error}): reinstall sdar-lm-eval.") from error


def gold(doc: dict[str, str]) -> str:
    """Return the canonical gold number of a document."""
    return gold_number(doc["answer"])


def filter_strict_match(responses: Iterable[Iterable[str]], docs: Sequence[dict[str, str]]) -> list[list[str]]:
    """Apply `strict_match` to each document's responses (one, or one a repeat)."""
    return [[strict_match(r, doc["question"]) for r in rs] for rs, doc in zip(responses, docs, strict=True)]


def filter_flexible_extract(responses: Iterable[Iterable[str]], docs: Sequence[dict[str, str]]) -> list[list[str]]:
    """Apply `flexible_extract` to each document's responses (one, or one a repeat)."""
    return [[flexible_extract(r, doc["question"]) for r in rs] for rs, doc in zip(responses, docs, strict=True)]


def _split(rows: list[dict[str, str]]) -> datasets.DatasetDict:
    return datasets.DatasetDict({"test": datasets.Dataset.from_list(rows)})


def _read_hub() -> list[dict[str, str]]:
    try:
        test = datasets.load_dataset(*HUB, split="test")
    except Exception as error:  # whatever the network, the hub's client or a cache can raise
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise UserError(
            f"GSM8K cannot be loaded from the Hugging Face Hub ({reason}). To work offline, put {SOURCE_URL} in a "
            f'folder and name it: --metadata \'{{"{FOLDER_KEY}": "/path/to/folder"}}\' or '
            f"{FOLDER_VARIABLE}=/path/to/folder."
        ) from error
    return [_checked(row, f"{HUB[0]}, row {number}") for number, row in enumerate(test)]


def _read_folder(given: str | os.PathLike[str], source: str) -> list[dict[str, str]]:
    if not isinstance(given, (str, os.PathLike)) or not str(given).strip():
        raise UserError(f"{source} is {given!r}, which is no path. {_REMEDY}")
    try:
        folder = Path(given).expanduser()
        if folder.is_file():
            raise UserError(f"{source} is {str(given)!r}, a file: give the folder that holds {FILE_NAME}.")
        if not folder.is_dir():
            raise UserError(f"{source} is {str(given)!r}, and there is no such folder. {_REMEDY}")
        if not (folder / FILE_NAME).is_file():
            raise UserError(f"{source} is {str(given)!r}, which holds no {FILE_NAME} ({_contents(folder)}). {_REMEDY}")
        return _read_file(folder / FILE_NAME)
    except (OSError, RuntimeError) as error:  # no permission; a ~user that does not exist
        raise UserError(f"{source} is {str(given)!r}, which cannot be read ({error}). {_REMEDY}") from error


def _contents(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    if not names:
        return "it is empty"
    return f"it holds {', '.join(names[:8])}" + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _read_file(file: Path) -> list[dict[str, str]]:
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{file}, line {line}: not UTF-8. Save the file as UTF-8.") from error
    # Not splitlines(): a JSON string may hold U+2028 and its like.
    rows = [
        _checked(_parsed(line, where), where)
        for where, line in ((f"{file}, line {number}", line) for number, line in enumerate(text.split("\n"), 1))
        if line.strip()
    ]
    if not rows:
        raise UserError(f"{file} is empty. It needs one {_ROW} a line.")
    return rows


def _parsed(line: str, where: str) -> Any:
    try:
        row = json.loads(line)
        json.dumps(row, ensure_ascii=False).encode()  # half of a surrogate pair is valid JSON, but no text
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error}). Each line must be one {_ROW}.") from error
    return row


def _checked(row: Any, where: str) -> dict[str, str]:
    """Return the row's question and answer.

    Raises:
        UserError: they are not there, or not usable.
    """
    if not isinstance(row, dict):
        raise UserError(f"{where}: a {type(row).__name__}, not an object. Each line must be one {_ROW}.")
    for key in ("question", "answer"):
        if key not in row:
            raise UserError(f"{where}: no {key!r}, only {sorted(row)}. Each line must be one {_ROW}.")
        if not isinstance(row[key], str):
            raise UserError(f"{where}: {key!r} is a {type(row[key]).__name__}, not a string.")
        if not row[key].strip():
            raise UserError(f"{where}: {key!r} is empty.")
    if gold_number(row["answer"]) == INVALID:
        raise UserError(f"{where}: 'answer' has no number after '####'. It must end in a line like '#### 18'.")
    return {"question": row["question"], "answer": row["answer"]}
