"""Functions that the MATH500 task file names: the data and the score.

Imports are absolute, since lm-eval opens this file by its path, outside of the package.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import logging
import signal
import threading
from collections.abc import Iterator, Sequence
from typing import TypedDict

import datasets

from sdar_lm_eval.errors import UserError
from sdar_lm_eval.tasks.data import Columns, Source, dataset, documents, require
from sdar_lm_eval.tasks.repeated import answers_of, metrics

logger = logging.getLogger(__name__)

ANTLR = "4.13.2"
"""The version of antlr4-python3-runtime that `pip install math-verify` brings."""

FORMS_SECONDS = 1
"""The time limit of a comparison of two wrong answers: 32 answers have 496 of them. math_verify's own limit is 5."""


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
        UserError: the data cannot be used, or math_verify cannot be used.
    """
    require_parser(MATH500.title)
    return dataset(test=documents(MATH500, "test", metadata))


def require_parser(title: str) -> None:
    r"""Warn where formulas are read by another grammar than that of `pip install math-verify`.

    With antlr4-python3-runtime 4.11 or 4.9, which other packages ask for, math_verify reads 50\% as 50.

    Raises:
        UserError: math_verify is not installed, or cannot stop the formulas that take too long.
    """
    require(title, "math_verify")
    if hasattr(signal, "SIGALRM") and threading.current_thread() is not threading.main_thread():
        raise UserError(
            f"{title} is scored by math_verify, whose time limits work in the main thread only, and this is the thread "
            f"{threading.current_thread().name!r}. Call lm_eval in the main thread, or in a process of its own."
        )
    version = importlib.metadata.version("antlr4-python3-runtime")
    if not version.startswith(ANTLR):
        logger.warning(
            "%s: math_verify with antlr4-python3-runtime %s reads 50\\%% as 50. The scores are comparable with "
            "antlr4-python3-runtime %s, which math-verify installs: pip install antlr4-python3-runtime==%s",
            title,
            version,
            ANTLR,
            ANTLR,
        )


def score(doc: Problem, results: Sequence[str | Sequence[str]]) -> dict[str, float]:
    """Return whether an answer's formula equals the gold one, 0.0 or 1.0, by the paper's rule and by math_verify's.

    Of several answers, returns the means, and the other metrics of `repeated` by the paper's rule.
    """
    answers, gold = answers_of(results), doc["answer"]
    by_default = [float(is_equal_by_default(answer, gold)) for answer in answers]
    return verified(answers, gold) | {"math_verify_default": sum(by_default) / len(by_default)}


def verified(answers: Sequence[str], gold: str) -> dict[str, float]:
    """Return the metrics `math_verify` and, of several answers, those of `repeated`, by `is_equal`."""
    scores = [float(is_equal(answer, gold)) for answer in answers]
    several = len(answers) > 1
    return metrics("math_verify", scores, _forms(answers, scores) if several else None)


def _forms(answers: Sequence[str], scores: Sequence[float]) -> list[int | None]:
    """A number for each answer: 0 for right ones, the same for wrong ones whose formulas are equal; None: no formula.

    A wrong answer's formula is compared with the first formula of each number, since math_verify's equality is not
    transitive. Formulas that math_verify does not find equal within `FORMS_SECONDS` count as different.
    """
    from math_verify import verify

    firsts: list[list[object]] = []
    found: list[int | None] = []
    for answer, score in zip(answers, scores, strict=True):
        if score == 1:
            found.append(0)
            continue
        formulas = _formulas(answer)
        equal = (verify(formulas, first, timeout_seconds=FORMS_SECONDS) for first in firsts if formulas)
        number = next((n for n, found_equal in enumerate(equal, 1) if found_equal), None)
        if formulas and number is None:
            firsts.append(formulas)
            number = len(firsts)
        found.append(number)
    return found


def is_equal(answer: str, gold: str) -> bool:
    r"""Whether math_verify finds an answer and the gold answer equal, with the released evaluation's settings.

    The answer's formula is the last `\boxed{}`, else the formula after "the answer is". Boxes with at most "and"
    between them are one set. A number in plain text is no formula. Of a chain of two or more equations the last side
    counts. The settings, and the order of the two formulas in the comparison, are those of OpenCompass's
    `MATHVerifyEvaluator` (opencompass/evaluator/math_evaluator.py, in JetAstra/SDAR at c2041a8).
    """
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    gold_formulas = parse(
        f"${gold}$",
        extraction_config=[LatexExtractionConfig(), ExprExtractionConfig()],
        extraction_mode="first_match",
    )
    return bool(gold_formulas) and bool(verify(_formulas(answer), gold_formulas))


@functools.lru_cache(maxsize=64)  # a document's answers are read for the score, and again for its wrong answers' forms
def _formulas(answer: str) -> list[object]:
    """An answer's formula and its text, by `is_equal`'s settings; empty where there is none."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse

    normalization = NormalizationConfig(
        basic_latex=True, units=True, malformed_operators=False, nits=False, boxed="all", equations=True
    )
    with _quiet():
        return list(
            parse(
                answer,
                extraction_config=[
                    LatexExtractionConfig(
                        normalization_config=normalization, boxed_match_priority=0, try_extract_without_anchor=False
                    )
                ],
                extraction_mode="first_match",
            )
        )


def is_equal_by_default(answer: str, gold: str) -> bool:
    r"""Whether math_verify finds an answer and the gold answer equal, with its own default settings.

    The default settings accept what LaTeX does, such as `\frac12` and `11\sqrt2`, and find answers in plain text too.
    """
    from math_verify import parse, verify

    return bool(verify(parse(f"${gold}$"), parse(answer)))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Drop the WARNING that `equations=True` is deprecated: nothing replaces it, and every answer would log it."""
    normalization = logging.getLogger("latex2sympy2_extended.math_normalization")

    def other(record: logging.LogRecord) -> bool:
        return "equations=True" not in record.getMessage()

    normalization.addFilter(other)
    try:
        yield
    finally:
        normalization.removeFilter(other)
