"""Functions that the LiveCodeBench task files name: the data, the prompt, the filter, the score.

Imports are absolute, since lm-eval opens this file by its path, outside of the package.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import TypedDict

import datasets

from sdar_lm_eval.tasks.data import Columns, HubFile, RowError, Source, dataset, documents
from sdar_lm_eval.tasks.livecodebench_tests import ProblemTests, job, keep, read_cases
from sdar_lm_eval.tasks.programs import extract_and_start, require_runner, scores
from sdar_lm_eval.tasks.repeated import answers_of, metrics
from sdar_lm_eval.tasks.thoughts import without_thoughts


class Problem(TypedDict):
    """A document; `starter_code` is empty where the program reads stdin."""

    question_id: str
    question: str
    starter_code: str


class Row(Problem):
    """A row: a document and its tests."""

    tests: ProblemTests


def _row(row: Columns) -> Row:
    try:
        cases = [case for name in ("public", "private") for case in read_cases(row.text(f"{name}_test_cases"))]
        function = json.loads(row.text("metadata")).get("func_name")
    except (ValueError, AttributeError) as error:
        raise RowError(f"the test cases or 'metadata' cannot be read ({error}).") from error
    if not cases:
        raise RowError("no test cases.")
    return Row(
        question_id=row.text("question_id"),
        question=row.text("question_content"),
        starter_code=row.string("starter_code"),
        tests=ProblemTests(
            function=function,
            inputs=[case["input"] for case in cases],
            outputs=[case["output"] for case in cases],
        ),
    )


LIVECODEBENCH = Source(
    title="LiveCodeBench",
    folder="livecodebench",
    hub=HubFile("livecodebench/code_generation_lite", "{config}.jsonl"),
    config=None,
    files=("{config}.jsonl",),
    where="test5.jsonl and test6.jsonl of https://huggingface.co/datasets/livecodebench/code_generation_lite",
    row='{"question_id": "…", "question_content": "…", "starter_code": "", "public_test_cases": "[…]", …}',
    parse=_row,
)

_FENCE = "```"


def load(*, release: int, **metadata: object) -> datasets.DatasetDict:
    """Return the problems that a release added: 167 for 5, 175 for 6.

    Raises:
        UserError: the data cannot be used, or programs cannot be run here.
    """
    require_runner(LIVECODEBENCH.title, guard=True)
    problems = []
    for row in documents(LIVECODEBENCH, "test", metadata, config=f"test{release}"):
        keep(row["question_id"], row["tests"])
        problems.append(
            Problem(question_id=row["question_id"], question=row["question"], starter_code=row["starter_code"])
        )
    return dataset(test=problems)


def question(doc: Problem) -> str:
    """Return the user's turn (OpenCompass, livecodebench_gen_a4f90b.py), with the line break its chat models get."""
    if doc["starter_code"]:
        how = (
            "You will use the following starter code to write the solution to the problem and enclose your code within "
        )
        shown = f"{how}delimiters.\n{_FENCE}python\n{doc['starter_code']}\n{_FENCE}"
    else:
        how = (
            "Read the inputs from stdin solve the problem and write the answer to stdout (do not directly test on the "
        )
        shown = f"{how}sample inputs). Enclose your code within delimiters as follows.\n"
        shown += f"{_FENCE}python\n# YOUR CODE HERE\n{_FENCE}"
    return (
        f"### Question:\n{doc['question']}\n\n### Format: {shown}\n\n"
        "### Answer: (use the provided format with backticks)\n\n\n"
    )


def filter_code(responses: Iterable[Iterable[str]], docs: Sequence[Problem]) -> list[list[str]]:
    """Apply `code_of` to each document's responses, and begin to run it."""
    return extract_and_start(responses, docs, code_of, lambda doc, code: job(doc["question_id"], code))


def code_of(response: str) -> str:
    """Return the lines between the first two with a fence, outside of thoughts; "" where there are not two.

    Source: `extract_code_generation` in opencompass/datasets/livecodebench/extract_utils.py of JetAstra/SDAR at
    c2041a8.
    """
    lines = without_thoughts(response).split("\n")
    fences = [place for place, line in enumerate(lines) if _FENCE in line]
    return "\n".join(lines[fences[0] + 1 : fences[1]]) if len(fences) > 1 else ""


def score(doc: Problem, results: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return the share of a document's programs that pass all its tests, and the metrics of `repeated`.

    Runs the programs.
    """
    return metrics("pass@1", scores([job(doc["question_id"], code) for code in answers_of(results)]))
