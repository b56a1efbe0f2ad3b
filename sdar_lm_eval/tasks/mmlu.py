"""Functions that the MMLU task files name: the data, the prompt, the filter, the score.

Imports are absolute, since lm-eval opens this file by its path, outside of the package.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TypedDict

import datasets

from sdar_lm_eval.tasks.data import Columns, Source, dataset, documents
from sdar_lm_eval.tasks.first_option import LETTERS, first_option
from sdar_lm_eval.tasks.repeated import answers_of, matched

_LINE_BREAK = re.compile(r"\r\n?")


class Row(TypedDict):
    """A row of the data set; `answer` is the right choice, from 0."""

    question: str
    choices: list[str]
    answer: int


class Question(Row):
    """A document: a row and its subject."""

    subject: str


def _row(row: Columns) -> Row:
    expected = f"{len(LETTERS)} strings"
    question, choices, answer = row.text("question"), row.texts("choices", expected), row.whole("answer")
    if len(choices) != len(LETTERS):
        raise row.malformed("choices", expected)
    if not 0 <= answer < len(LETTERS):
        raise row.malformed("answer", f"0 to {len(LETTERS) - 1}")
    return Row(question=question, choices=choices, answer=answer)


MMLU = Source(
    title="MMLU",
    folder="mmlu",
    hub="cais/mmlu",
    config=None,
    files=("{config}/{split}.jsonl", "{config}/{split}-*.parquet"),
    where="the files of https://huggingface.co/datasets/cais/mmlu",
    row='{"question": "…", "choices": ["…", "…", "…", "…"], "answer": 0}',
    parse=_row,
)


def load(*, subject: str, **metadata: object) -> datasets.DatasetDict:
    """Return a subject's test split, and its dev split, which has the five shots.

    Raises:
        UserError: the data cannot be used, or the hub cannot be reached.
    """

    def questions(split: str) -> list[Question]:
        return [_question(row, subject) for row in documents(MMLU, split, metadata, config=subject)]

    return dataset(dev=questions("dev"), test=questions("test"))


def _question(row: Row, subject: str) -> Question:
    """Return a document, with `\\n` for each line break, as the released evaluation reads its CSV files.

    The hub has `\\r\\n` in places. A shot of college_mathematics is one of them, so each prompt of that subject had it.
    """
    question, *choices = (_LINE_BREAK.sub("\n", text) for text in (row["question"], *row["choices"]))
    return Question(question=question, choices=choices, answer=row["answer"], subject=subject)


def question(doc: Question) -> str:
    """Return the user's turn (OpenCompass, mmlu_gen_4d595a.py), with the line break its chat models get."""
    options = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, doc["choices"], strict=True))
    return (
        f"There is a single choice question about {doc['subject'].replace('_', ' ')}. "
        f"Answer the question by replying A, B, C or D.\nQuestion: {doc['question']}\n{options}\nAnswer: \n"
    )


def answer(doc: Question) -> str:
    """Return the assistant's turn of a shot."""
    return f"{gold(doc)}\n"


def gold(doc: Question) -> str:
    """Return the letter of the right choice."""
    return LETTERS[doc["answer"]]


def score(doc: Question, results: Sequence[str | Sequence[str]]) -> dict[str, float]:
    """Return 1.0 where the filter found the right letter, else 0.0; of several answers the metrics of `repeated`."""
    return matched(answers_of(results), gold(doc))


def filter_first_option(responses: Iterable[Iterable[str]], docs: Sequence[Question]) -> list[list[str]]:
    """Apply `first_option` to each document's responses (one, or one a repeat)."""
    return [[first_option(response) for response in rs] for rs in responses]
