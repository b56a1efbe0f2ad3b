"""Functions that the task files of parallel_bench_sdar name: the documents, the filters, the score.

Imports are absolute, since lm-eval opens this file by its path, outside of the package.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import datasets

from sdar_lm_eval.errors import UserError
from sdar_lm_eval.files import shown
from sdar_lm_eval.tasks.data import dataset
from sdar_lm_eval.tasks.extraction import INVALID
from sdar_lm_eval.tasks.generated import KINDS, Answer, Document, Form, Size, documents, is_right
from sdar_lm_eval.tasks.repeated import answers_of, metrics
from sdar_lm_eval.tasks.thoughts import without_thoughts

DOCUMENTS, SHOTS = 100, 4
SEED = "parallel_bench_seed"
"""The metadata entry that chooses other documents."""


def load(*, kind: str, size: Size, **metadata: object) -> datasets.DatasetDict:
    """Return the documents of a kind: `test`, and `dev` for shots, which share no case.

    Args:
        kind: a name of `KINDS`.
        size: the size of the documents.
        metadata: the run's. `parallel_bench_seed` is a whole number from 0; without it the seed is 0.

    Raises:
        UserError: the seed is no such number.
    """
    seed = metadata.get(SEED, 0)
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise UserError(f"{SEED} is {shown(seed)}. Give a whole number from 0; each gives other documents.")
    return dataset(
        test=documents(kind, size, DOCUMENTS, seed=seed, held_out=True),
        dev=documents(kind, size, SHOTS, seed=seed, held_out=False),
    )


def gold(doc: Document) -> str:
    """Return a right answer, in the asked form."""
    return doc["answer"]


def filter_strict_match(responses: Iterable[Iterable[str]], docs: Sequence[Document]) -> list[list[str]]:
    """Return each response that is an answer in the asked form and nothing else, but for thoughts; else `[invalid]`."""
    return [
        [_written(doc, _form(doc).strict(without_thoughts(r))) for r in rs]
        for rs, doc in zip(responses, docs, strict=True)
    ]


def filter_flexible_extract(responses: Iterable[Iterable[str]], docs: Sequence[Document]) -> list[list[str]]:
    """Return the answer that each response contains outside of thoughts, in the asked form; `[invalid]` without any."""
    return [
        [_written(doc, _form(doc).lenient(without_thoughts(r))) for r in rs]
        for rs, doc in zip(responses, docs, strict=True)
    ]


def score(doc: Document, results: Sequence[str | Sequence[str]]) -> dict[str, float]:
    """Return the share of a document's answers that are right, and the metrics of `repeated`.

    Any right answer counts. Different right answers are no agreement.
    """
    answers = answers_of(results)
    scores = [float(is_right(doc, _form(doc).strict(answer))) for answer in answers]
    return metrics("exact_match", scores, [None if answer == INVALID else answer for answer in answers])


def _form(doc: Document) -> Form:
    return KINDS[doc["kind"]].form(doc["size"])


def _written(doc: Document, answer: Answer | None) -> str:
    return INVALID if answer is None else _form(doc).write(answer)
