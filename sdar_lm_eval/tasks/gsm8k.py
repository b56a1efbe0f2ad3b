"""What the GSM8K task files name: the data, the gold answers, the filters.

lm-eval opens this file by its path, outside of its package: imports are absolute.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import datasets

from sdar_lm_eval.demo import PROBLEMS
from sdar_lm_eval.errors import UserError
from sdar_lm_eval.report.live import Verdict
from sdar_lm_eval.tasks.data import Row, Source, documents, read_jsonl, warn_of_folders
from sdar_lm_eval.tasks.extraction import INVALID, flexible_extract, gold_number, strict_match
from sdar_lm_eval.tasks.opencompass_math import best_form


def _complaint(row: Row) -> str | None:
    if gold_number(row["answer"]) != INVALID:
        return None
    return "'answer' has no number after '####'. It must end in a line like '#### 18'."


GSM8K = Source(
    title="GSM8K",
    folder="gsm8k",
    hub="openai/gsm8k",
    config="main",
    files=("{split}.jsonl", "{config}/{split}-*.parquet"),
    where="https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data/test.jsonl",
    columns={"question": str, "answer": str},
    row='{"question": "…", "answer": "… #### 18"}',
    complaint=_complaint,
)


def load(**metadata: Any) -> datasets.DatasetDict:
    """Return GSM8K's test split: from `gsm8k_dir` or another folder that data.py knows, else from the hub.

    Raises:
        UserError: the folder or its file cannot be used, or the hub cannot be reached.
    """
    return _split(documents(GSM8K, "test", metadata))


def load_demo(**metadata: Any) -> datasets.DatasetDict:
    """Return the problems that come with the package, whatever folder of GSM8K is set; a WARNING says so."""
    warn_of_folders(GSM8K, metadata, "gsm8k_sdar_demo", "gsm8k_sdar_hash")
    try:
        return _split(read_jsonl(GSM8K, PROBLEMS))
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


def filter_opencompass(responses: Iterable[Iterable[str]], docs: Sequence[dict[str, str]]) -> list[list[str]]:
    """Apply the released evaluation's rule to each document's responses (one, or one a repeat)."""
    return [[best_form(r, gold(doc)) for r in rs] for rs, doc in zip(responses, docs, strict=True)]


def verdict(doc: dict[str, str], response: str) -> Verdict:
    """Return what the harness will find in one response, by the filter `flexible-extract`."""
    predicted, right = flexible_extract(response, doc["question"]), gold(doc)
    return Verdict(predicted, right, predicted == right, "flexible-extract")


def paper_verdict(doc: dict[str, str], response: str) -> Verdict:
    """Return what the harness will find in one response, by the filter `opencompass`."""
    right = gold(doc)
    predicted = best_form(response, right)
    return Verdict(predicted, right, predicted == right, "opencompass")


def _split(rows: list[dict[str, str]]) -> datasets.DatasetDict:
    return datasets.DatasetDict({"test": datasets.Dataset.from_list(rows)})
