from __future__ import annotations

from pathlib import Path

import miniature
import pytest
from scripted import evaluate, load_task, prompts

from sdar_lm_eval.tasks.humaneval import code_of, filter_code, score

# OpenCompass at SDAR c2041a8, opencompass/configs/datasets/humaneval/humaneval_openai_sample_evals_gen_dcae0e.py
PROMPT = (
    "Read the following function signature and docstring, and fully implement the function described. "
    "Your response should only contain the code for this function.\n{}\n"
)
BODY = "    return sum(xs)\n"
FUNCTION = "def total(xs):\n" + BODY
FENCED = f"```python\n{FUNCTION}```"


def test_what_it_asks(offline: Path) -> None:
    task = load_task("humaneval_sdar")
    assert prompts(task) == [PROMPT.format(row["prompt"]) for row in miniature.HUMANEVAL]
    assert task.instances[0].args[1] == {"until": [], "do_sample": False, "temperature": 0.0, "max_gen_toks": 4096}
    assert (task.VERSION, task.OUTPUT_TYPE, task.config.num_fewshot, task.UNSAFE_CODE) == (
        2.0,
        "generate_until",
        0,
        True,
    )
    assert task.doc_to_target(task.eval_docs[1]) == miniature.HUMANEVAL[1]["test"] + "\ncheck(shout)"


@pytest.mark.parametrize(
    ("response", "code"),
    [
        (FENCED, FUNCTION),
        (f"Here it is:\n\n{FENCED}\n\nIt adds the numbers.", FUNCTION),
        (f"```\n{FUNCTION}```", FUNCTION),
        (f"```py\n\n{FUNCTION}```", FUNCTION),
        (f"{FENCED}\nor\n```python\ndef total(xs):\n    return 0\n```", FUNCTION),
        (FUNCTION, FUNCTION),
        (f"\n\n{FUNCTION}", FUNCTION),
        (f"```python\n{FUNCTION}", f"```python\n{FUNCTION}"),  # cut: the block was never closed
        (f"```python\n{BODY}```", BODY.lstrip()),
        ("", ""),
    ],
)
def test_the_code_of_a_response(response: str, code: str) -> None:
    assert code_of(response) == code


@pytest.mark.parametrize(
    ("response", "passed"),
    [
        (FENCED, True),
        (f"Sure!\n{FENCED}\nDone.", True),
        ("```python\nfrom typing import List\n\ndef total(xs: List[int]) -> int:\n    return sum(xs)\n```", True),
        ("```python\ndef helper(xs):\n    return sum(xs)\n\n\ndef total(xs):\n    return helper(xs)\n```", True),
        (f"{FUNCTION}\n\nif __name__ == '__main__':\n    raise ValueError", True),
        ("def total(xs):\n    print(xs)\n    return sum(xs)", True),
        ("def total(xs):\n    return len(xs) or 0", False),
        ("def other(xs):\n    return sum(xs)", False),  # the prompt's own function returns nothing
        (BODY, False),  # as SDAR's evaluation has it: see code_of
        (f"Sure!\n{FUNCTION}", False),
        ("def total(xs):\n    raise SystemExit(0)", False),
        ("def total(xs):\n    import os\n    os._exit(0)", False),
        ("def total(xs):\n    while True:\n        pass", False),
        ("def total(xs:\n", False),
        ("", False),
    ],
)
def test_scores(response: str, passed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdar_lm_eval.tasks.humaneval.SECONDS", 0.5)
    assert score(miniature.HUMANEVAL[0], [code_of(response)]) == {"pass@1": float(passed)}


def test_documents_and_repeats_stay_apart() -> None:
    responses = [[FENCED, "x"], ["```\ny\n```"]]
    assert filter_code(responses, miniature.HUMANEVAL) == [[FUNCTION, "x"], ["y\n"]]


def test_code_runs_only_with_the_user_s_word(offline: Path) -> None:
    with pytest.raises(ValueError, match="confirm_run_unsafe_code"):
        evaluate(lambda doc: FENCED, "humaneval_sdar")
    results, _ = evaluate(lambda doc: FENCED, "humaneval_sdar", confirm_run_unsafe_code=True)
    assert results["results"]["humaneval_sdar"]["pass@1,code-block"] == 0.5  # right for the first problem only
