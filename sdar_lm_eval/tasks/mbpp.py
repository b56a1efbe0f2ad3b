"""Functions that the MBPP task file names: the data, the filter, the score.

Imports are absolute, since lm-eval opens this file by its path, outside of the package.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypedDict

import datasets

from sdar_lm_eval.tasks.data import Columns, Source, dataset, documents
from sdar_lm_eval.tasks.programs import Job, extract_and_start, require_runner, scores
from sdar_lm_eval.tasks.repeated import answers_of, metrics

# OpenCompass's MBPPEvaluator (opencompass/datasets/mbpp.py) gives 10 seconds, and its alarm rings a second earlier.
SECONDS = 9.0


class Problem(TypedDict):
    """A document; the tests are assertions."""

    task_id: int
    prompt: str
    test_list: list[str]


def _problem(row: Columns) -> Problem:
    expected = "a list of strings such as 'assert f(2) == 4'"
    task_id, prompt, assertions = row.whole("task_id"), row.text("prompt"), row.texts("test_list", expected)
    if not all(map(str.strip, assertions)):
        raise row.malformed("test_list", expected)
    return Problem(task_id=task_id, prompt=prompt, test_list=assertions)


MBPP = Source(
    title="MBPP",
    folder="mbpp",
    hub="google-research-datasets/mbpp",
    config="sanitized",
    files=("{split}.jsonl", "{config}/{split}-*.parquet"),
    where="sanitized/test-00000-of-00001.parquet of https://huggingface.co/datasets/google-research-datasets/mbpp",
    row='{"task_id": 11, "prompt": "Write …", "test_list": ["assert …"]}',
    parse=_problem,
)

_FENCE = "```"


def load(**metadata: object) -> datasets.DatasetDict:
    """Return the 257 problems of the sanitized test split, those of SDAR's evaluation.

    Raises:
        UserError: the data cannot be used, or programs cannot be run here.
    """
    require_runner(MBPP.title, guard=False)
    return dataset(test=documents(MBPP, "test", metadata))


def tests(doc: Problem) -> str:
    """Return the problem's tests, as the prompt shows them and as they are run."""
    return "\n".join(doc["test_list"])


def question(doc: Problem) -> str:
    """Return the user's turn (OpenCompass, sanitized_mbpp_mdblock_0shot_nocot_gen_a2e416.py), with its line break."""
    return (
        f"You are an expert Python programmer, and here is your task:\n{doc['prompt']}\n"
        f"Your code should pass these tests:\n\n{tests(doc)}\n"
        " You should submit your final solution in the following format: ```python\n\n```\n"
    )


def filter_code(responses: Iterable[Iterable[str]], docs: Sequence[Problem]) -> list[list[str]]:
    """Apply `code_of` to each document's responses (one, or one a repeat), and begin to run it."""
    return extract_and_start(responses, docs, code_of, _job)


def code_of(response: str) -> str:
    r"""Return the program of a response.

    The program is the first closed block that opens with ```python, else the first closed block, else the text behind
    the only fence, else the whole response; `\_` becomes `_`. Blocks of other languages keep the language's name.
    Source: OpenCompass's `MBPPEvaluator._process_answer`, but for the marks `[BEGIN]` and `[DONE]` of few-shot prompts.
    """
    before, *parts = response.split(_FENCE)
    if not parts:
        code = before
    else:
        closed = parts[:-1] or parts
        code = next((part for part in closed if part.startswith("python")), closed[0]).removeprefix("python")
    return code.replace("\\_", "_").strip()


def score(doc: Problem, results: Sequence[str | Sequence[str]]) -> dict[str, float]:
    """Return whether the program passes the problem's tests, 0.0 or 1.0. Runs the program.

    Of several programs, returns the metrics of `repeated`.
    """
    return metrics("pass@1", scores([_job(doc, code) for code in answers_of(results)]))


def _job(doc: Problem, code: str) -> Job:
    """The program and its tests, composed as in OpenCompass: without `test_imports`, and without a guard."""
    return Job(code, tests(doc), SECONDS)
