"""Functions that the GSM8K task files name: the data, the gold answers, the filters.

Imports are absolute, since lm-eval opens this file by its path, outside of the package.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypedDict

import datasets

from sdar_lm_eval.demo import PROBLEMS
from sdar_lm_eval.errors import UserError
from sdar_lm_eval.report.live import Verdict
from sdar_lm_eval.tasks.data import Columns, RowError, Source, dataset, documents, read_jsonl, warn_of_folders
from sdar_lm_eval.tasks.extraction import INVALID, flexible_extract, gold_number, strict_match
from sdar_lm_eval.tasks.opencompass_math import best_form


class Problem(TypedDict):
    """A document; its answer ends in `#### 18`."""

    question: str
    answer: str


def _problem(row: Columns) -> Problem:
    problem = Problem(question=row.text("question"), answer=row.text("answer"))
    if gold_number(problem["answer"]) == INVALID:
        raise RowError("'answer' has no number after '####'. It must end in a line like '#### 18'.")
    return problem


GSM8K = Source(
    title="GSM8K",
    folder="gsm8k",
    hub="openai/gsm8k",
    config="main",
    files=("{split}.jsonl", "{config}/{split}-*.parquet"),
    where="https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data/test.jsonl",
    row='{"question": "…", "answer": "… #### 18"}',
    parse=_problem,
)


def load(**metadata: object) -> datasets.DatasetDict:
    """Return GSM8K's test split, from a folder that data.py knows (such as `gsm8k_dir`), else from the hub.

    Raises:
        UserError: the folder or its file cannot be used, or the hub cannot be reached.
    """
    return dataset(test=documents(GSM8K, "test", metadata))


def load_demo(**metadata: object) -> datasets.DatasetDict:
    """Return the problems that come with the package; a WARNING says so where the user names a folder of GSM8K."""
    warn_of_folders(GSM8K, metadata, "gsm8k_sdar_demo", "gsm8k_sdar_hash")
    try:
        return dataset(test=read_jsonl(GSM8K, PROBLEMS))
    except OSError as error:
        raise UserError(f"The demo's problems are missing ({error}): reinstall sdar-lm-eval.") from error


def gold(doc: Problem) -> str:
    """Return the canonical gold number of a document."""
    return gold_number(doc["answer"])


def filter_strict_match(responses: Iterable[Iterable[str]], docs: Sequence[Problem]) -> list[list[str]]:
    """Apply `strict_match` to each document's responses (one, or one a repeat)."""
    return [[strict_match(r, doc["question"]) for r in rs] for rs, doc in zip(responses, docs, strict=True)]


def filter_flexible_extract(responses: Iterable[Iterable[str]], docs: Sequence[Problem]) -> list[list[str]]:
    """Apply `flexible_extract` to each document's responses (one, or one a repeat)."""
    return [[flexible_extract(r, doc["question"]) for r in rs] for rs, doc in zip(responses, docs, strict=True)]


def filter_opencompass(responses: Iterable[Iterable[str]], docs: Sequence[Problem]) -> list[list[str]]:
    """Apply the released evaluation's rule to each document's responses (one, or one a repeat)."""
    return [[best_form(r, gold(doc)) for r in rs] for rs, doc in zip(responses, docs, strict=True)]


def verdict(doc: Problem, response: str) -> Verdict:
    """Return what the harness finds in a response by the filter `flexible-extract`."""
    predicted, right = flexible_extract(response, doc["question"]), gold(doc)
    return Verdict(predicted, right, predicted == right, "flexible-extract")


def paper_verdict(doc: Problem, response: str) -> Verdict:
    """Return what the harness finds in a response by the filter `opencompass`."""
    right = gold(doc)
    predicted = best_form(response, right)
    return Verdict(predicted, right, predicted == right, "opencompass")
