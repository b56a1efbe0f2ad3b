"""Functions that the TraDo task files name: the data, the filter, the score.

Imports are absolute, since lm-eval opens this file by its path, outside of the package.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import datasets

from sdar_lm_eval.tasks import gsm8k
from sdar_lm_eval.tasks.competitions import AIME2024, Problem
from sdar_lm_eval.tasks.data import dataset, documents
from sdar_lm_eval.tasks.dllm_rl_math import form, is_equal, last_box
from sdar_lm_eval.tasks.extraction import INVALID
from sdar_lm_eval.tasks.math500 import MATH500
from sdar_lm_eval.tasks.repeated import answers_of, metrics


def load(*, benchmark: str, **metadata: object) -> datasets.DatasetDict:
    """Return the problems of a benchmark: 500 of math500, 1,319 of gsm8k, 30 of aime24.

    Raises:
        UserError: the data cannot be used, or the hub cannot be reached.
    """
    return dataset(test=_PROBLEMS[benchmark](metadata))


def _math500(metadata: Mapping[str, object]) -> list[Problem]:
    return [Problem(question=row["problem"], answer=row["answer"]) for row in documents(MATH500, "test", metadata)]


def _gsm8k(metadata: Mapping[str, object]) -> list[Problem]:
    return [
        Problem(question=row["question"], answer=gsm8k.gold(row)) for row in documents(gsm8k.GSM8K, "test", metadata)
    ]


def _aime24(metadata: Mapping[str, object]) -> list[Problem]:
    return documents(AIME2024, "train", metadata)


_PROBLEMS = {"math500": _math500, "gsm8k": _gsm8k, "aime24": _aime24}


def filter_box(responses: Iterable[Iterable[str]], docs: Sequence[Problem]) -> list[list[str]]:
    """Apply `last_box` to each document's responses."""
    return [[last_box(response) for response in of_doc] for of_doc in responses]


def score(doc: Problem, results: Sequence[str | Sequence[str]]) -> dict[str, float]:
    """Return the share of a document's answers that dLLM-RL's rule finds equal to the gold one.

    Of several answers, returns the other metrics of `repeated` too.
    """
    answers, gold = answers_of(results), doc["answer"]
    scores = [float(answer != INVALID and is_equal(answer, gold)) for answer in answers]
    forms = [None if a == INVALID else form(gold if right else a) for a, right in zip(answers, scores, strict=True)]
    return metrics("is_equal", scores, forms)
