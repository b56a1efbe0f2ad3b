"""What the MMLU task files name: the data, the prompt, the filter, the score.

lm-eval opens this file by its path, outside of its package: imports are absolute.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import datasets

from sdar_lm_eval.tasks.data import Row, Source, documents

INVALID = "[invalid]"
LETTERS = "ABCD"
_LINE_BREAK = re.compile(r"\r\n?")


def _complaint(row: Row) -> str | None:
    choices, answer = row["choices"], row["answer"]
    if len(choices) != len(LETTERS) or not all(isinstance(choice, str) for choice in choices):
        return f"'choices' is {choices!r}, not {len(LETTERS)} strings."
    return None if 0 <= answer < len(LETTERS) else f"'answer' is {answer}, not 0 to {len(LETTERS) - 1}."


MMLU = Source(
    title="MMLU",
    folder="mmlu",
    hub="cais/mmlu",
    config=None,
    files=("{config}/{split}.jsonl", "{config}/{split}-*.parquet"),
    where="the files of https://huggingface.co/datasets/cais/mmlu",
    columns={"question": str, "choices": list, "answer": int},
    row='{"question": "…", "choices": ["…", "…", "…", "…"], "answer": 0}',
    complaint=_complaint,
)


def load(*, subject: str, **metadata: Any) -> datasets.DatasetDict:
    """Return a subject's test split, and its dev split, which has the five shots.

    Raises:
        UserError: the data cannot be used, or the hub cannot be reached.
    """
    return datasets.DatasetDict(
        {
            split: datasets.Dataset.from_list(
                [_line_feeds(row) | {"subject": subject} for row in documents(MMLU, split, metadata, config=subject)]
            )
            for split in ("dev", "test")
        }
    )


def _line_feeds(row: Row) -> Row:
    """Return the row with `\\n` for each line break, as the released evaluation reads its CSV files.

    The hub has `\\r\\n` in places: one of them is a shot of college_mathematics, so in each of its prompts.
    """
    question, *choices = (_LINE_BREAK.sub("\n", text) for text in (row["question"], *row["choices"]))
    return row | {"question": question, "choices": choices}


def question(doc: Row) -> str:
    """Return the user's turn (OpenCompass, mmlu_gen_4d595a.py), with the line break its chat models get."""
    options = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, doc["choices"], strict=True))
    return (
        f"There is a single choice question about {doc['subject'].replace('_', ' ')}. "
        f"Answer the question by replying A, B, C or D.\nQuestion: {doc['question']}\n{options}\nAnswer: \n"
    )


def answer(doc: Row) -> str:
    """Return the assistant's turn of a shot."""
    return f"{gold(doc)}\n"


def gold(doc: Row) -> str:
    """Return the letter of the right choice."""
    return LETTERS[doc["answer"]]


def score(doc: Row, results: Sequence[str]) -> dict[str, float]:
    """Return whether the letter that was found is the right one, 0.0 or 1.0."""
    return {"exact_match": float(results[0] == gold(doc))}


def filter_first_option(responses: Iterable[Iterable[str]], docs: Sequence[Row]) -> list[list[str]]:
    """Apply `first_option` to each document's responses (one, or one a repeat)."""
    return [[first_option(response) for response in rs] for rs in responses]


_SAYS = r"[Tt]he {}:?\s+\(?([A-D])"
_STARS = r"[Tt]he {}:?\s+\(?\*{{0,2}}([A-D])"
_BOXES = r"[Tt]he {}:?.*?boxed{{([A-D])}}"
# In this order; each holds the letter as its only group. A small letter after "answer:" is none.
_RULES = [
    re.compile(rule, re.DOTALL)
    for rule in (
        r"[\s,:，：]([A-D])[.,。，]?$",
        r"(?i:answer\s*:\s*)([A-Da-d])",
        _SAYS.format("answer is"),
        _STARS.format("answer is"),
        _SAYS.format("answer is option"),
        _SAYS.format("correct answer is"),
        _SAYS.format("correct answer is option"),
        _BOXES.format("correct answer is"),
        _BOXES.format("correct option is"),
        _BOXES.format("correct answer option is"),
        _SAYS.format("answer to the question is"),
        r"^([A-D])[\s.,:$。，：]",
    )
]
_AFTER_ONE = re.compile(r"1.\s?(.*)", re.DOTALL)
_BEFORE_COLON = re.compile(r"([A-D]):")
_ANY = re.compile(r"([A-D])")


def first_option(response: str) -> str:
    """Return the letter that a response chooses, or `INVALID`.

    The choices are made in the order of OpenCompass's `first_option_postprocess`
    (opencompass/utils/text_postprocessors.py, in JetAstra/SDAR at c2041a8): a letter that ends the response; one after
    "answer:", "the answer is" and its variants; one that begins the response; and then, less meaningfully, the first of
    the alphabet after a 1, the first before a colon, the first anywhere. Its rules for Chinese are left out.
    """
    text = response.strip()
    for rule in _RULES:
        match = rule.search(text)
        if match and match[1] in LETTERS:
            return match[1]
    if match := _AFTER_ONE.search(text):
        after = match[1] or match[0]
        for letter in LETTERS:
            if letter in after:
                return letter
    match = _BEFORE_COLON.search(text) or _ANY.search(text)
    return match[1] if match else INVALID
