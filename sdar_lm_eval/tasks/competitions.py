"""Functions that the task files of AIME 2024, AIME 2025 and LiveMathBench name: the data, the filter, the score.

Imports are absolute, since lm-eval opens this file by its path, outside of the package.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypedDict

import datasets

from sdar_lm_eval.tasks.data import Columns, Source, dataset, documents
from sdar_lm_eval.tasks.math500 import require_parser, verified
from sdar_lm_eval.tasks.repeated import answers_of
from sdar_lm_eval.tasks.thoughts import without_thoughts


class Problem(TypedDict):
    """A document; the answer is LaTeX, in AIME a number."""

    question: str
    answer: str


def _row(row: Columns) -> Problem:
    return Problem(question=row.text("question"), answer=row.text("answer"))


def _aime2024_row(row: Columns) -> Problem:
    return Problem(question=row.text("problem"), answer=row.text("answer"))


AIME2024 = Source(
    title="AIME 2024",
    folder="aime2024",
    hub="HuggingFaceH4/aime_2024",
    config=None,
    files=("test.jsonl", "{split}.jsonl", "data/{split}-*.parquet"),
    where="the files of https://huggingface.co/datasets/HuggingFaceH4/aime_2024",
    row='{"problem": "…", "answer": "204"}',
    parse=_aime2024_row,
)
AIME2025 = Source(
    title="AIME 2025",
    folder="aime2025",
    hub="opencompass/AIME2025",
    config=("AIME2025-I", "AIME2025-II"),
    files=("{split}.jsonl", "aime2025-*.jsonl"),
    where="the files of https://huggingface.co/datasets/opencompass/AIME2025",
    row='{"question": "…", "answer": "70"}',
    parse=_row,
)
LIVEMATHBENCH = Source(
    title="LiveMathBench",
    folder="livemathbench",
    hub="opencompass/LiveMathBench",
    config=None,
    files=("{config}.jsonl", "{config}/{split}-*.parquet"),
    where="v202412_hard_cn.jsonl and v202412_hard_en.jsonl, the rows of "
    "https://huggingface.co/datasets/opencompass/LiveMathBench,",
    row='{"question": "…", "answer": "…"}',
    parse=_row,
)


_COMPETITIONS = {
    "aime2024": (AIME2024, "train", None),
    "aime2025": (AIME2025, "test", None),
    "livemathbench_hard_cn": (LIVEMATHBENCH, "test", "v202412_hard_cn"),
    "livemathbench_hard_en": (LIVEMATHBENCH, "test", "v202412_hard_en"),
}


def load(*, competition: str, **metadata: object) -> datasets.DatasetDict:
    """Return the problems of a competition: 30 of an AIME, those of I before those of II.

    Raises:
        UserError: the data cannot be used, or math_verify cannot be used.
    """
    source, split, config = _COMPETITIONS[competition]
    require_parser(source.title)
    return dataset(test=documents(source, split, metadata, config=config))


def filter_thoughts(responses: Iterable[Iterable[str]], docs: Sequence[Problem]) -> list[list[str]]:
    """Apply `without_thoughts` to each document's responses."""
    return [[without_thoughts(response) for response in of_doc] for of_doc in responses]


def score(doc: Problem, results: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return the share of a document's answers that math_verify finds equal to the gold one, as in `math500`.

    Of several answers, returns the other metrics of `repeated` too.
    """
    return verified(answers_of(results), doc["answer"])
