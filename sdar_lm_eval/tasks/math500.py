"""What the MATH500 task file names: the data and the score.

Imports are absolute, since lm-eval opens this file by its path, outside of the package.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import TypedDict

import datasets

from sdar_lm_eval.tasks.data import Columns, Source, dataset, documents, require


class Problem(TypedDict):
    """A document; the answer is LaTeX."""

    problem: str
    answer: str


def _problem(row: Columns) -> Problem:
    return Problem(problem=row.text("problem"), answer=row.text("answer"))


MATH500 = Source(
    title="MATH500",
    folder="math500",
    hub="HuggingFaceH4/MATH-500",
    config=None,
    files=("{split}.jsonl", "{split}-*.parquet", "data/{split}-*.parquet"),
    where="https://huggingface.co/datasets/HuggingFaceH4/MATH-500/resolve/main/test.jsonl",
    row='{"problem": "…", "answer": "\\\\frac{1}{2}"}',
    parse=_problem,
)


def load(**metadata: object) -> datasets.DatasetDict:
    """Return the 500 problems of PRM800K's test split.

    Raises:
        UserError: the data cannot be used, or math_verify is not installed.
    """
    require(MATH500.title, "math_verify")
    return dataset(test=documents(MATH500, "test", metadata))


def score(doc: Problem, results: Sequence[str]) -> dict[str, float]:
    """Return whether an answer's formula equals the gold one, 0.0 or 1.0, by the paper's rule and by math_verify's."""
    answer, gold = results[0], doc["answer"]
    return {
        "math_verify": float(is_equal(answer, gold)),
        "math_verify_default": float(is_equal_by_default(answer, gold)),
    }


def is_equal(answer: str, gold: str) -> bool:
    r"""Whether math_verify finds an answer and the gold answer equal, with the released evaluation's settings.

    The answer's formula is the last `\boxed{}`, else the formula after "the answer is". Boxes with at most "and"
    between them are one set. A number in plain text is no formula. Of a chain of two or more equations the last side
    counts. The settings, and the order of the two formulas in the comparison, are those of OpenCompass's
    `MATHVerifyEvaluator` (opencompass/evaluator/math_evaluator.py, in JetAstra/SDAR at c2041a8).
    """
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    gold_formulas = parse(
        f"${gold}$",
        extraction_config=[LatexExtractionConfig(), ExprExtractionConfig()],
        extraction_mode="first_match",
    )
    if not gold_formulas:
        return False
    normalization = NormalizationConfig(
        basic_latex=True, units=True, malformed_operators=False, nits=False, boxed="all", equations=True
    )
    with _quiet():
        formulas = parse(
            answer,
            extraction_config=[
                LatexExtractionConfig(
                    normalization_config=normalization, boxed_match_priority=0, try_extract_without_anchor=False
                )
            ],
            extraction_mode="first_match",
        )
    return bool(verify(formulas, gold_formulas))


def is_equal_by_default(answer: str, gold: str) -> bool:
    r"""Whether math_verify finds an answer and the gold answer equal, with its own default settings.

    They accept what LaTeX does, such as `\frac12` and `11\sqrt2`, and find answers in plain text too.
    """
    from math_verify import parse, verify

    return bool(verify(parse(f"${gold}$"), parse(answer)))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Drop the WARNING that `equations=True` is deprecated: nothing replaces it, and every answer would log it."""
    logger = logging.getLogger("latex2sympy2_extended.math_normalization")

    def other(record: logging.LogRecord) -> bool:
        return "equations=True" not in record.getMessage()

    logger.addFilter(other)
    try:
        yield
    finally:
        logger.removeFilter(other)
