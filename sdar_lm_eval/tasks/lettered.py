"""Functions that task files of GPQA, MMLU-Pro and ProteinLMBench name: the data, the prompts, the filters, the score.

Imports are absolute, since lm-eval opens this file by its path, outside of the package.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterable, Sequence
from typing import TypedDict

import datasets

from sdar_lm_eval.errors import UserError
from sdar_lm_eval.tasks.data import Columns, Source, dataset, documents
from sdar_lm_eval.tasks.extraction import INVALID
from sdar_lm_eval.tasks.first_option import first_option
from sdar_lm_eval.tasks.repeated import answers_of, matched
from sdar_lm_eval.tasks.thoughts import without_thoughts


class Question(TypedDict):
    """A document: the options' texts in the order of their letters, and the right letter."""

    question: str
    options: list[str]
    answer: str


class Categorized(Question):
    """A row of MMLU-Pro."""

    category: str


class GPQARow(TypedDict):
    """A row of GPQA; the first option is the right one."""

    question: str
    options: list[str]


def _texts(row: Columns, column: str, at_most: int) -> list[str]:
    expected = f"a list of at most {at_most} strings"
    texts = row.texts(column, expected)
    if len(texts) > at_most:
        raise row.malformed(column, expected)
    return texts


def _gpqa_row(row: Columns) -> GPQARow:
    wrong = (row.text(f"Incorrect Answer {number}") for number in (1, 2, 3))
    return GPQARow(question=row.text("Question"), options=[row.text("Correct Answer"), *wrong])


def _mmlu_pro_row(row: Columns) -> Categorized:
    options, answer = _texts(row, "options", 16), row.text("answer")
    if answer not in tuple(string.ascii_uppercase[:16]):
        raise row.malformed("answer", "a letter from A to P")
    return Categorized(question=row.text("question"), options=options, answer=answer, category=row.text("category"))


def _protein_row(row: Columns) -> Question:
    # "option 2: …" is an option, and "option 2" the answer. OpenCompass takes what follows the last ": " for the text.
    options = [option.rpartition(": ")[2] for option in _texts(row, "options", 26)]
    number = row.text("answer").rpartition(" ")[2]
    if number not in map(str, range(1, 27)):
        raise row.malformed("answer", "such as 'option 1'")
    # As in OpenCompass, a row whose answer is none of its options is asked, and never right.
    return Question(question=row.text("question"), options=options, answer=string.ascii_uppercase[int(number) - 1])


GPQA = Source(
    title="GPQA",
    folder="gpqa",
    hub="Idavidrein/gpqa",
    config="gpqa_diamond",
    files=("{config}.csv", "{split}.jsonl"),
    where="gpqa_diamond.csv of https://huggingface.co/datasets/Idavidrein/gpqa (its authors ask for a login there)",
    row='{"Question": "…", "Correct Answer": "…", "Incorrect Answer 1": "…", …}',
    parse=_gpqa_row,
)
MMLU_PRO = Source(
    title="MMLU-Pro",
    folder="mmlu_pro",
    hub="TIGER-Lab/MMLU-Pro",
    config=None,
    files=("{split}.jsonl", "data/{split}-*.parquet"),
    where="data/test-00000-of-00001.parquet of https://huggingface.co/datasets/TIGER-Lab/MMLU-Pro",
    row='{"question": "…", "options": ["…", …], "answer": "F", "category": "law"}',
    parse=_mmlu_pro_row,
)
PROTEINLMBENCH = Source(
    title="ProteinLMBench",
    folder="proteinlmbench",
    hub="tsynbio/ProteinLMBench",
    config="evaluation",
    files=("{split}.jsonl", "test.jsonl", "{config}/{split}-*.parquet"),
    where="train.jsonl, the rows of https://huggingface.co/datasets/tsynbio/ProteinLMBench, configuration evaluation,",
    row='{"question": "…", "options": ["option 1: …", …], "answer": "option 1"}',
    parse=_protein_row,
)

_ORDERS = ((1, 2, 3, 0), (2, 3, 0, 1), (3, 0, 1, 2), (0, 1, 2, 3))


def load_gpqa(**metadata: object) -> datasets.DatasetDict:
    """Return the 198 questions of GPQA-diamond; the place of the right option goes round from question to question.

    Raises:
        UserError: the data cannot be used, or the hub cannot be reached.
    """
    questions = []
    for number, row in enumerate(documents(GPQA, "train", metadata)):
        options = [row["options"][place] for place in _ORDERS[number % 4]]
        right = "ABCD"[options.index(row["options"][0])]
        questions.append(Question(question=row["question"], options=options, answer=right))
    return dataset(test=questions)


def load_mmlu_pro(*, category: str, **metadata: object) -> datasets.DatasetDict:
    """Return the questions of a category.

    Raises:
        UserError: the data cannot be used or has none of the category, or the hub cannot be reached.
    """
    rows = documents(MMLU_PRO, "test", metadata)
    if not (chosen := [row for row in rows if row["category"] == category]):
        known = ", ".join(sorted({row["category"] for row in rows}))
        raise UserError(f"MMLU-Pro has no questions of category {category!r} here, only of {known}. Complete the data.")
    return dataset(test=chosen)


def load_proteinlmbench(**metadata: object) -> datasets.DatasetDict:
    """Return the 944 questions of the evaluation set.

    Raises:
        UserError: the data cannot be used, or the hub cannot be reached.
    """
    return dataset(test=documents(PROTEINLMBENCH, "train", metadata))


def gpqa_question(doc: Question) -> str:
    """Return the user's turn (OpenCompass, gpqa_cascade_eval_gen_772ea0.py), with its line break."""
    return (
        "Answer the following multiple choice question. The last line of your response should be of the following "
        f"format: 'ANSWER: $LETTER' (without quotes) where LETTER is one of ABCD.\n\n{doc['question']}\n\n"
        + "".join(f"{letter}) {option}\n" for letter, option in zip("ABCD", doc["options"], strict=True))
    )


def mmlu_pro_question(doc: Question) -> str:
    """Return the user's turn (OpenCompass, mmlu_pro_0shot_cot_gen_08c1de.py), with its line break.

    An option "N/A" is left out, and its letter with it.
    """
    lettered = zip(string.ascii_uppercase, doc["options"], strict=False)
    options = "".join(f"{letter}. {option}\n" for letter, option in lettered if option != "N/A").strip()
    return (
        "Answer the following multiple choice question. The last line of your response should be of the following "
        "format: 'ANSWER: $LETTER' (without quotes) where LETTER is one of Options(e.g. one of ABCDEFGHIJKLMNOP). "
        f"Think step by step before answering.\n\nQuestion:\n\n{doc['question']}\n\nOptions:\n\n{options}\n"
    )


def protein_question(doc: Question) -> str:
    """Return the user's turn (OpenCompass, ProteinLMBench_gen_a67965.py), with the line break its chat models get."""
    letters = string.ascii_uppercase[: len(doc["options"])]
    return (
        "Answer the following multiple choice question. There is only one correct answer. The last line of your "
        f"response should be in the format 'Answer: $LETTER' (without quotes), where LETTER is the letter among "
        f"{letters[0]} through {letters[-1]}.\n\nQuestion: {doc['question']}\nAnswer Choices: \n"
        + "".join(f"{letter}. {option}\n" for letter, option in zip(letters, doc["options"], strict=True))
        + "\n"
    )


def filter_gpqa(responses: Iterable[Iterable[str]], docs: Sequence[Question]) -> list[list[str]]:
    """Apply `letter_of` to each document's responses, up to D."""
    return [[letter_of(response, "D") for response in of_doc] for of_doc in responses]


def filter_mmlu_pro(responses: Iterable[Iterable[str]], docs: Sequence[Question]) -> list[list[str]]:
    """Apply `letter_of` to each document's responses, up to P, whatever the number of options."""
    return [[letter_of(response, "P") for response in of_doc] for of_doc in responses]


def filter_first_option(responses: Iterable[Iterable[str]], docs: Sequence[Question]) -> list[list[str]]:
    """Apply `first_option` to each document's responses, without their thoughts."""
    return [
        [first_option(without_thoughts(r), string.ascii_uppercase[: len(doc["options"])]) for r in of_doc]
        for of_doc, doc in zip(responses, docs, strict=True)
    ]


def letter_of(response: str, last: str) -> str:
    """Return the letter from A to `last` behind a response's first such "ANSWER:" outside of thoughts, or `[invalid]`.

    A small letter is returned as it is, and no right answer. Source: `match_answer_pattern`, as
    mmlu_pro_0shot_cot_gen_08c1de.py has it, and `GPQA_Simple_Eval_postprocess` in opencompass/datasets/gpqa.py of
    JetAstra/SDAR at c2041a8.
    """
    match = re.search(rf"(?i)ANSWER\s*:\s*([A-{last}])", without_thoughts(response))
    return match[1] if match else INVALID


def score(doc: Question, results: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return the share of a document's answers that are the right letter, and the metrics of `repeated`."""
    return matched(answers_of(results), doc["answer"])
