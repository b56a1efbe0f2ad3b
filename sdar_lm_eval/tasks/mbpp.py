"""What the MBPP task file names: the data, the filter, the score.

lm-eval opens this file by its path, outside of its package: imports are absolute.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import datasets

from sdar_lm_eval.tasks.data import Row, Source, documents
from sdar_lm_eval.tasks.programs import Job, passes, require_runner, start

SECONDS = 9.0  # OpenCompass's MBPPEvaluator (opencompass/datasets/mbpp.py) gives 10, its alarm rings one earlier


def _complaint(row: Row) -> str | None:
    if all(isinstance(test, str) and test.strip() for test in row["test_list"]):
        return None
    return f"'test_list' is {row['test_list']!r}, not a list of strings such as 'assert f(2) == 4'."


MBPP = Source(
    title="MBPP",
    folder="mbpp",
    hub="google-research-datasets/mbpp",
    config="sanitized",
    files=("{split}.jsonl", "{config}/{split}-*.parquet"),
    where="sanitized/test-00000-of-00001.parquet of https://huggingface.co/datasets/google-research-datasets/mbpp",
    columns={"task_id": int, "prompt": str, "test_list": list},
    row='{"task_id": 11, "prompt": "Write …", "test_list": ["assert …"]}',
    complaint=_complaint,
)

_FENCE = "```"


def load(**metadata: Any) -> datasets.DatasetDict:
    """Return the 257 problems of the sanitized test split, which are the ones SDAR's evaluation takes.

    Raises:
        UserError: the data cannot be used, or programs cannot be run here.
    """
    require_runner(MBPP.title, guard=False)
    return datasets.DatasetDict({"test": datasets.Dataset.from_list(documents(MBPP, "test", metadata))})


def tests(doc: Row) -> str:
    """Return the problem's tests, as the prompt shows them and as they are run."""
    return "\n".join(doc["test_list"])


def question(doc: Row) -> str:
    """Return the user's turn (OpenCompass, sanitized_mbpp_mdblock_0shot_nocot_gen_a2e416.py), with its line break."""
    return (
        f"You are an expert Python programmer, and here is your task:\n{doc['prompt']}\n"
        f"Your code should pass these tests:\n\n{tests(doc)}\n"
        " You should submit your final solution in the following format: ```python\n\n```\n"
    )


def filter_code(responses: Iterable[Iterable[str]], docs: Sequence[Row]) -> list[list[str]]:
    """Apply `code_of` to each document's responses (one, or one a repeat), and begin to run the first code of each."""
    codes = [[code_of(response) for response in rs] for rs in responses]
    start(_job(doc, of_doc[0]) for doc, of_doc in zip(docs, codes, strict=True) if of_doc)
    return codes


def code_of(response: str) -> str:
    r"""Return the program of a response.

    The first closed block that opens with ```python, else the first closed block, else what follows the only fence,
    else all of it; with `\_` as `_`. Of other blocks the language's name is not taken off. So has it OpenCompass's
    `MBPPEvaluator._process_answer`, which also knows the marks `[BEGIN]` and `[DONE]` of few-shot prompts.
    """
    before, *parts = response.split(_FENCE)
    if not parts:
        code = before
    else:
        closed = parts[:-1] or parts
        code = next((part for part in closed if part.startswith("python")), closed[0]).removeprefix("python")
    return code.replace("\\_", "_").strip()


def score(doc: Row, results: Sequence[str]) -> dict[str, float]:
    """Return whether the program passes the problem's tests, 0.0 or 1.0. Runs the program."""
    return {"pass@1": float(passes(_job(doc, results[0])))}


def _job(doc: Row, code: str) -> Job:
    """The program and its tests, as OpenCompass puts them together: without `test_imports`, and without a guard."""
    return Job(code, tests(doc), SECONDS)
