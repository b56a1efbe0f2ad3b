"""A task of a user's own: a YAML file and the functions it names, and nothing else."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import lm_eval
import pytest
from lm_eval.tasks import TaskManager

from sdar_lm_eval.demo import PROBLEMS, golds

YAML = r"""
task: parity
custom_dataset: !function parity.load
test_split: test
output_type: generate_until
doc_to_text: !function parity.prompt
doc_to_target: "{{parity}}"
generation_kwargs:
  until: []
  do_sample: false
  max_gen_toks: 96
filter_list:
  - name: parity
    filter:
      - function: custom
        filter_fn: !function parity.filter_parity
      - function: take_first
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
  sdar_judge:
    title: Parity
    verdict: "parity:verdict"
"""

PYTHON = r"""
from collections.abc import Iterable, Sequence
from typing import TypedDict

import datasets

from sdar_lm_eval.demo import PROMPT
from sdar_lm_eval.report.live import Verdict
from sdar_lm_eval.tasks.data import Columns, RowError, Source, dataset, documents
from sdar_lm_eval.tasks.extraction import INVALID, flexible_extract, gold_number


class Problem(TypedDict):
    question: str
    parity: str


def _problem(row: Columns) -> Problem:
    number = gold_number(row.text("answer"))
    if not number.isdigit():
        raise RowError("'answer' ends in no whole number.")
    return Problem(question=row.text("question"), parity=_parity(number))


def _parity(number: str) -> str:
    return ("even", "odd")[int(number) % 2] if number.isdigit() else INVALID


PARITY = Source(
    title="Parity",
    folder="parity",
    hub="nobody/parity",
    config=None,
    files=("problems.jsonl",),
    where="problems.jsonl",
    row='{"question": "…", "answer": "… #### 18"}',
    parse=_problem,
)


def load(**metadata: object) -> datasets.DatasetDict:
    return dataset(test=documents(PARITY, "test", metadata))


def prompt(doc: Problem) -> str:
    return PROMPT.format(question=doc["question"])


def filter_parity(responses: Iterable[Iterable[str]], docs: Sequence[Problem]) -> list[list[str]]:
    return [[_parity(flexible_extract(r, doc["question"])) for r in rs] for rs, doc in zip(responses, docs)]


def verdict(doc: Problem, response: str) -> Verdict:
    predicted = _parity(flexible_extract(response, doc["question"]))
    return Verdict(predicted, doc["parity"], predicted == doc["parity"], "parity")
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the two files of the task, as `--include_path` and PYTHONPATH name it."""
    (tmp_path / "parity.yaml").write_text(YAML, "utf-8")
    (tmp_path / "parity.py").write_text(PYTHON, "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "parity", None)  # so that it is removed after the test
    monkeypatch.delitem(sys.modules, "parity")
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda _: None)
    return tmp_path


def test_a_task_is_two_files(folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Data, prompt, filter, score and live accuracy, which is the harness's at the end."""
    monkeypatch.setenv("SDAR_PARITY_DIR", str(PROBLEMS.parent))
    with caplog.at_level(logging.INFO):
        results = lm_eval.simple_evaluate(
            "sdar",
            model_args="pretrained=demo",
            tasks=["parity"],
            task_manager=TaskManager(include_path=str(folder), include_defaults=False),
            limit=8,
        )
    assert results is not None
    samples = results["samples"]["parity"]
    assert [sample["target"] for sample in samples] == [("even", "odd")[int(gold) % 2] for gold in golds()[:8]]
    right = sum(sample["exact_match"] for sample in samples)
    assert results["results"]["parity"]["exact_match,parity"] == right / 8 >= 0.75
    assert f"Parity Eval: accuracy {right / 8:.1%} ({right:.0f}/8, parity)" in caplog.text
