from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import miniature
import pytest
from scripted import evaluate, load_task, prompts

from sdar_lm_eval.errors import UserError
from sdar_lm_eval.tasks.math500 import is_equal, is_equal_by_default, load, score

# OpenCompass at SDAR c2041a8, opencompass/configs/datasets/math/math_prm800k_500_0shot_cot_gen_11c4b5.py
PROMPT = "{}\nPlease reason step by step, and put your final answer within \\boxed{{}}.\n"


def test_what_it_asks(offline: Path) -> None:
    task = load_task("math500_sdar")
    assert prompts(task) == [PROMPT.format(row["problem"]) for row in miniature.MATH500]
    assert task.instances[0].args[1] == {"until": [], "do_sample": False, "temperature": 0.0, "max_gen_toks": 4096}
    assert (task.VERSION, task.OUTPUT_TYPE, task.config.num_fewshot) == (2.0, "generate_until", 0)
    assert [task.doc_to_target(doc) for doc in task.eval_docs] == ["5", "\\frac{1}{6}"]


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("5", r"So $x = \boxed{5}$."),
        ("5", r"\boxed{x = 5}"),
        ("x=5", r"\boxed{5}"),
        ("5", r"\boxed{5.0}"),
        ("5", r"\boxed{5 \text{ apples}}"),
        ("5", r"\boxed{4 + 1}"),
        ("5", "Is it \\boxed{4}? No.\nIt is \\boxed{5}."),
        ("5", r"Is it $\boxed{4}$? No: $\boxed{5}$."),
        ("5", r"The answer is $5$."),
        (r"\frac{14}{3}", r"\[\boxed{14/3}\]"),
        (r"\frac{14}{3}", r"\boxed{\dfrac{14}{3}}"),
        (r"\frac{14}{3}", r"\boxed{4\frac{2}{3}}"),
        (r"\frac43", r"\boxed{\frac{4}{3}}"),
        (r"11\sqrt2", r"\boxed{11\sqrt{2}}"),
        ("2000", r"\boxed{2{,}000}"),
        (r"90^\circ", r"\boxed{90}"),
        ("10", r"\boxed{10\%}"),
        ("18.90", r"\boxed{\$18.90}"),
        ("p - q", r"\boxed{-q + p}"),
        ("6 - 5i", r"\boxed{6-5i}"),
        ("3, 5, 7", r"\boxed{7, 5, 3}"),
        (r"\left( 3, \frac{\pi}{2} \right)", r"\boxed{(3, \frac{\pi}{2})}"),
        (r"(2,12) \cup (12,102)", r"\boxed{(2,12)\cup(12,102)}"),
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\boxed{\begin{pmatrix}1\\2\end{pmatrix}}"),
        (r"\text{Evelyn}", r"\boxed{\text{Evelyn}}"),
        (r"\text{(E)}", r"\boxed{E}"),
        # Of a chain of equations the last side counts.
        ("5", r"\boxed{2+3=5=5}"),
        ("10", r"\boxed{\binom{5}{2} = \frac{5 \cdot 4}{2} = 10}"),
        ("7", r"\boxed{x = 5 + 2 = 7}"),
        ("-3", r"The answer is $1 - 4 = -4 + 1 = -3$."),
    ],
)
def test_right(gold: str, answer: str) -> None:
    assert is_equal(answer, gold)


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("5", r"\boxed{6}"),
        ("5", r"\boxed{-5}"),
        ("5", "The answer is 5."),  # no formula
        ("5", r"Then $2 + 3$ is $5$"),  # nothing says that it is the answer
        ("5", r"\boxed{5"),
        ("5", r"\boxed{}"),
        ("5", r"\boxed{\text{five}}"),
        ("5", r"\boxed{4} or \boxed{5}"),
        ("5", "It is \\boxed{5}.\nOr is it \\boxed{4}?"),
        ("5", ""),
        ("5", "\\boxed{5}".replace("\\", "")),
        ("p - q", r"\boxed{q - p}"),
        ("(3, 4)", r"\boxed{(4, 3)}"),
        ("3, 5, 7", r"\boxed{3, 5}"),
        (r"\text{even}", r"\boxed{\text{odd}}"),
        ("", r"\boxed{5}"),
        ("5", r"\boxed{5 = 3 + 2 = 6}"),
        # LaTeX that math_verify's own settings forgive.
        (r"11\sqrt2", r"\boxed{11\sqrt2}"),
        (r"\frac12", r"\boxed{\frac12}"),
    ],
)
def test_wrong(gold: str, answer: str) -> None:
    assert not is_equal(answer, gold)


@pytest.mark.parametrize(
    ("gold", "answer", "equal"),
    [
        (r"11\sqrt2", r"\boxed{11\sqrt2}", True),
        (r"\frac12", r"\boxed{\frac12}", True),
        ("5", r"\boxed{2+3=5=5}", True),
        ("5", "The answer is 5.", True),
        ("5", "5", True),
        ("5", r"\boxed{6}", False),
        (r"\frac12", r"\boxed{\frac13}", False),
        ("5", "", False),
        ("", r"\boxed{5}", False),
    ],
)
def test_by_math_verify_s_own_settings(gold: str, answer: str, equal: bool) -> None:
    assert is_equal_by_default(answer, gold) is equal


def test_a_parser_that_reads_per_cents_otherwise_is_told(
    offline: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    load()
    assert not caplog.records
    monkeypatch.setattr("importlib.metadata.version", lambda _: "4.11.0")
    load()
    assert "antlr4-python3-runtime 4.11.0 reads 50\\% as 50" in caplog.text


@pytest.mark.parametrize("task", ["math500_sdar", "aime2024_sdar"])
def test_another_thread_is_refused_before_answers_are_made(task: str, offline: Path) -> None:
    """There math_verify raises an error at the first answer."""
    with (
        ThreadPoolExecutor(thread_name_prefix="worker") as threads,
        pytest.raises(UserError, match=r"main thread only, and this is the thread 'worker_0'\. Call"),
    ):
        threads.submit(load_task, task).result()


def test_score(offline: Path) -> None:
    half, sixth = load()["test"]
    assert score(half, [r"\boxed{5}"]) == {"math_verify": 1.0, "math_verify_default": 1.0}
    assert score(half, ["It is 5."]) == {"math_verify": 0.0, "math_verify_default": 1.0}
    assert score(sixth, [r"\boxed{5}"]) == {"math_verify": 0.0, "math_verify_default": 0.0}


def test_nothing_is_logged_for_each_answer(caplog: pytest.LogCaptureFixture) -> None:
    """math_verify calls `equations=True` deprecated whenever it is used."""
    caplog.set_level(logging.WARNING)
    assert is_equal(r"\boxed{2+3=5=5}", "5")
    assert not caplog.records
    logging.getLogger("latex2sympy2_extended.math_normalization").warning("another")
    assert [record.getMessage() for record in caplog.records] == ["another"]


def test_an_evaluation(offline: Path) -> None:
    results, _ = evaluate(lambda doc: rf"\boxed{{{doc['answer']}}}" if doc["answer"] == "5" else "1/6", "math500_sdar")
    scores = results["results"]["math500_sdar"]
    assert (scores["math_verify,none"], scores["math_verify_default,none"]) == (0.5, 1.0)
