r"""The released evaluation's rule for GSM8K, by hand. test_opencompass.py compares it with the released code itself."""

from __future__ import annotations

import pytest

from sdar_lm_eval.tasks.opencompass_math import best_form, prediction


@pytest.mark.parametrize(
    ("response", "gold"),
    [
        (r"So $\boxed{18}$.", "18"),
        (r"\boxed{18 \text{ dollars}}", "18"),
        (r"\boxed{\text{18}}", "18"),
        (r"\boxed{18.00}", "18"),
        (r"\boxed{18. }", "18"),
        (r"\boxed{\$18}", "18"),
        (r"\boxed{18\%}", "18"),
        (r"\boxed{x=18}", "18"),
        (r"\boxed{{18}}", "18"),
        (r"\boxed{\mbox{18}}", "18"),  # by the second normal form alone
        (r"\boxed{1{,}000}", "1000"),
        (r"\boxed{1,000}", "1000"),
        (r"\boxed{-5}", "-5"),
        (r"\boxed{0.5 / 1}, no: \boxed{1/2}", "1/2"),
        (r"\boxed{\dfrac12}", "1/2"),
        (r"\boxed{-inf}", r"-\infty"),
        (r"\boxed{2j}", "2i"),
        (r"\boxed{}, so the answer is 18.", "18"),
        ("The answer is 18.", "18"),
        ("Two a day. So the answer is: 18", "18"),
        ("18", "18"),
        ("$18", "18"),
        ("18 dollars...", "18"),
        ("1,000", "1000"),
    ],
)
def test_right(response: str, gold: str) -> None:
    assert best_form(response, gold) == gold


@pytest.mark.parametrize(
    ("response", "gold", "read"),
    [
        (r"\boxed{17}", "18", "17"),
        (r"\boxed{18 eggs}", "18", "18eggs"),
        (r"\boxed{Total = 18}", "18", "Total=18"),
        (r"\boxed{9+9=18}", "18", "9+9=18"),
        (r"\boxed{1\,000}", "1000", "1\\,000"),
        (r"\boxed{18", "18", "\\boxed{18"),
        (r"\boxed{18}, as asked in \boxed{}", "18", "18},asaskedin\\boxed{"),
        (r"\boxed{18} and \fbox{17}", "17", "18"),
        (r"\boxed{3/x}", "3", "3/x"),
        ("#### 18", "18", "####18"),
        ("It makes 18 dollars a day.", "18", "Itmakes18day"),
        ("The answer is 18.5", "37/2", "18"),  # a sentence ends at any full stop
        ("The final answer is: 18", "18", ":18"),
        ("", "18", ""),
    ],
)
def test_wrong(response: str, gold: str, read: str) -> None:
    assert best_form(response, gold) == read


@pytest.mark.parametrize(
    "loop", ["0", "1 ", "1,000", "\\text{", "\\text{a}", "\\boxed{", "oxed{", "\\mbox{", "\\overline{"]
)
@pytest.mark.parametrize(("before", "behind"), [("", " x"), ("\\boxed{", "x}")])
def test_a_text_in_a_loop_is_read_once(before: str, loop: str, behind: str) -> None:
    """Patterns that read a text once for each beginning of a match take minutes."""
    assert best_form(before + loop * (100_000 // len(loop)) + behind, "18") != "18"


def test_which_text_is_the_answer() -> None:
    assert prediction("\\boxed{1} \\boxed{ {2} }") == " {2} "
    assert prediction("\\boxed{{2}}") == "2"
    assert prediction("\\boxed {2}") == "2"
    assert prediction("One. The answer is 2. Final answer: 3.") == "2"
