"""Prompts and extraction beside SDAR's own evaluation, where it is at hand.

    SDAR_OPENCOMPASS=…/SDAR/evaluation/opencompass python -m pytest tests/tasks/test_opencompass.py

Its dataset configurations, template code and postprocessors are run as they are, with stand-ins for what they import.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import multiprocessing
import random
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import miniature
import pytest
from opencompass_code import Registry, answers, needs_opencompass
from scripted import conversations, load_task, prompts
from test_programs import HONEST, WRONG

from sdar_lm_eval.tasks import gsm8k as tasks
from sdar_lm_eval.tasks import humaneval, math500, mbpp
from sdar_lm_eval.tasks.first_option import INVALID, first_option
from sdar_lm_eval.tasks.opencompass_math import best_form, normal_form, prediction
from sdar_lm_eval.tasks.programs import Job, passes

ANSWERS = 20_000

pytestmark = needs_opencompass


def _user(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


@pytest.mark.parametrize(
    ("task", "file", "name", "rows"),
    [
        ("gsm8k_sdar_paper", "gsm8k/gsm8k_0shot_v2_gen_17d799.py", "gsm8k_datasets", miniature.GSM8K),
        ("math500_sdar", "math/math_prm800k_500_0shot_cot_gen_11c4b5.py", "math_datasets", miniature.MATH500),
        (
            "humaneval_sdar",
            "humaneval/humaneval_openai_sample_evals_gen_dcae0e.py",
            "humaneval_datasets",
            miniature.HUMANEVAL,
        ),
        (
            "mbpp_sdar",
            "mbpp/sanitized_mbpp_mdblock_0shot_nocot_gen_a2e416.py",
            "sanitized_mbpp_datasets",
            [{"text": row["prompt"], "test_list": "\n".join(row["test_list"])} for row in miniature.MBPP],
        ),
        ("ifeval_sdar", "IFEval/IFEval_gen_353ae7.py", "ifeval_datasets", miniature.IFEVAL),
    ],
)
def test_prompts(
    task: str, file: str, name: str, rows: list[Any], opencompass: Any, conversation: Any, offline: Path
) -> None:
    (config,) = opencompass(f"configs/datasets/{file}")[name]
    expected = [conversation(config, [], row) for row in rows]
    assert [_user(prompt) for prompt in prompts(load_task(task))] == expected


def test_mmlu_prompts(opencompass: Any, conversation: Any, offline: Path) -> None:
    configs = opencompass("configs/datasets/mmlu/mmlu_gen_4d595a.py")["mmlu_datasets"]
    assert sorted(config["name"] for config in configs) == miniature.SUBJECTS
    for config in configs[::10]:
        subject = config["name"]
        dev, test = (
            [
                {
                    "input": row["question"],
                    **dict(zip("ABCD", row["choices"], strict=True)),
                    "target": "ABCD"[row["answer"]],
                }
                for row in miniature.mmlu(subject, split)
            ]
            for split in ("dev", "test")
        )
        shots = config["infer_cfg"]["retriever"]["fix_id_list"]
        expected = [conversation(config, [dev[i] for i in shots], row) for row in test]
        assert conversations(load_task(f"mmlu_sdar_{subject}")) == expected


def _answers(pieces: str, seed: int = 0) -> Iterator[str]:
    return answers(pieces, ANSWERS, seed)


_ENGLISH = (
    "A|B|C|D|a|b| |\\n|. |, |: |The |the |answer is |answer is: |correct answer is |option |correct option is |"
    "correct answer option is |answer to the question is |\\boxed{|}|boxed{B}|(|**|)|Answer: |ANSWER:|1|1.|10 |$|"
    "Because |Dogs |I think |：|，|E|text|2. "
)
_CHINESE = (
    "A|B|C|D| |。|，|：|:|,|.|1|答案|是|为|选|项|应该|故|即|只有|对|错|"
    "错误|正确|不|说法|的是|的|所以|答|所有|因此|显然|\\n|$|x|是正确|"
    "所以答案为选项|答案选项"
)


@pytest.mark.parametrize("pieces", [_ENGLISH, _CHINESE], ids=["English", "Chinese"])
@pytest.mark.parametrize("options", ["ABCD", "ABCDEF"])
def test_first_option(pieces: str, options: str, opencompass: Any) -> None:
    theirs = opencompass("utils/text_postprocessors.py")["first_option_postprocess"]
    for answer in _answers(pieces):
        assert first_option(answer, options) == (theirs(answer, options) or INVALID), answer


def test_code(opencompass: Any) -> None:
    theirs = opencompass("datasets/humaneval.py", "def humaneval_postprocess_v2", "def humaneval_postprocess_v3", re=re)
    first_block = theirs["humaneval_postprocess_v2"]
    names = {"re": pytest.importorskip("regex"), "ICL_EVALUATORS": Registry(), "BaseEvaluator": object}
    end = "@ICL_EVALUATORS.register_module()\nclass MBPPEvaluator2"
    evaluator = opencompass("datasets/mbpp.py", "class MBPPEvaluator(", end, **names)["MBPPEvaluator"]()
    pieces = (
        "```|```python|```python\\n|```\\n|\\n```|python|def f(x):\\n    return x\\n|\\n|  |text |x\\_y|```py\\n|"
        "Here:\\n\\n|print(1)|```Python\\n|import math\\n|# c "
    )
    for answer in _answers(pieces):
        assert humaneval.code_of(answer) == first_block(answer), answer
        if "````" not in answer:  # a fence is three of them here
            assert mbpp.code_of(answer) == evaluator._process_answer(answer), answer


@pytest.fixture
def math_verify(opencompass: Any) -> Any:
    """Return OpenCompass's verdict on an answer to MATH500 and its gold answer."""
    names = {"ICL_EVALUATORS": Registry(), "BaseEvaluator": object}
    evaluator = opencompass("evaluator/math_evaluator.py", "@ICL", "if __name__", **names)["MATHVerifyEvaluator"]()
    evaluator.is_num_equal = lambda *_: None
    return lambda answer, gold: evaluator.score([answer], [gold])["accuracy"] == 100


def test_programs(opencompass: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MBPP's, without those that end the evaluator itself or deceive it."""
    monkeypatch.chdir(tmp_path)  # there it runs programs where it stands
    names = {
        "contextlib": contextlib,
        "io": io,
        "signal": signal,
        "multiprocessing": multiprocessing.get_context("fork"),
    }
    file, end = "datasets/mbpp.py", "@ICL_EVALUATORS.register_module()\nclass MBPPEvaluator("
    names = opencompass(file, "class TimeOutException", end, **names)
    execution = opencompass(file, "def _execution", "class MBPPPassKEvaluator", **names)["execution"]
    wrong = (
        "wrong",
        "no Python",
        "swallows the tests",
        "sys.exit",
        "input",
        "reads",
        "a fileno",
        "a thread that stays",
    )
    chosen = {**HONEST, **{name: WRONG[name] for name in wrong}}
    for name, (program, tests) in chosen.items():
        theirs = execution(f"{program}\n{tests}", 0, 10)[1] == "pass"
        assert passes(Job(program, tests, 9.0)) == theirs, name


def test_gsm8k(opencompass: Any, gsm8k: Path) -> None:
    file = "datasets/math.py"
    names = opencompass(file, "def last_boxed_only_string", "@LOAD_DATASET", re=re)
    registries = {"TEXT_POSTPROCESSORS": Registry(), "ICL_EVALUATORS": Registry(), "BaseEvaluator": object}
    names |= opencompass(file, "@TEXT_POSTPROCESSORS", "@ICL_EVALUATORS", **names, **registries)
    end = "@ICL_EVALUATORS.register_module()\nclass MATHAgentEvaluator"
    evaluator = object.__new__(opencompass(file, "class MATHEvaluator(", end, **names)["MATHEvaluator"])
    evaluator.version = "v2"
    gold_of = opencompass("datasets/gsm8k.py", "@TEXT", "@TEXT_POSTPROCESSORS.register_module('gsm8k')", **registries)

    rows = tasks.load(gsm8k_dir=gsm8k)["test"]
    golds = [tasks.gold(row) for row in rows]
    assert golds == [gold_of["gsm8k_dataset_postprocess"](row["answer"]) for row in rows]
    pieces = (
        "18|-18|1,800|1{,}800|18.0|18.00|0.5|.|. |, |=|/|x=|9+9=|\\n|\r| |  |$|\\$|\\%|%|{|}|{{|}}|\\boxed{|\\boxed{{|"
        "boxed{|\\fbox{|\\boxed |\\text{|\\text{ dollars}|\\text{m}|\\mbox{|\\textbf{|\\overline{|\\mathbf{|"
        "\\mathrm{th}| eggs|dollars|ft|a |an |and|The answer is |Answer: |final answer|The final answer is: |"
        "answeris|answerjs|\\frac|\\dfrac12|\\frac{1}{2}|rac|\\sqrt|inf|infinity|j|i|\\left|\\right|\\!|\\ |\\;|\\\\|"
        "\\cdot|\\le|^\\circ|1/2|１８|#### 18|x\\in|'|\""
    )
    numbers = ["18", "-18", "1800", "5", "1/2", "0"]
    right = 0
    for answer in itertools.chain(
        _answers(pieces), _answers("18|.|\\boxed{|}|\\text{|$| |answer is |eggs|\\mbox{|.0", 1)
    ):
        taken = names["math_postprocess_v2"](answer)
        assert prediction(answer) == taken
        assert normal_form(answer) == names["normalize_final_answer"](answer), answer
        for gold in numbers:
            theirs = evaluator.is_equiv(taken, gold)
            assert (best_form(answer, gold) == gold) == theirs, (answer, gold)
            right += theirs
    assert right > 1_000


def test_math(math_verify: Any) -> None:
    formulas = [
        "5",
        "x=5",
        "-5",
        "\\frac{1}{2}",
        "1/2",
        "0.5",
        "p-q",
        "-q+p",
        "3, 5",
        "5, 3",
        "(3, 5)",
        "52_8",
        "2,000",
    ]
    formulas += ["\\text{even}", "10\\%"]
    wrappings = [r"\boxed{%s}", r"So $\boxed{%s}$.", "The answer is $%s$.", "$%s$", "%s", "\\boxed{1}\nno: \\boxed{%s}"]
    for gold in formulas:
        for formula in formulas:
            for wrapping in wrappings:
                answer = wrapping.replace("%s", formula)
                assert math500.is_equal(answer, gold) == math_verify(answer, gold), (answer, gold)


def test_math_with_chains_of_equations(math_verify: Any) -> None:
    sides = ["5", "2+3", "6", "x", r"\frac{10}{2}", r"\binom{5}{2}", "10", r"\frac{5 \cdot 4}{2}", r"\sqrt{25}", "f(2)"]
    marks = ["=", " = ", r" \approx ", r" \neq ", r" \le ", ", y = "]
    chosen = random.Random(0)
    wrappings = [r"\boxed{%s}", r"So $\boxed{%s}$.", "The answer is $%s$.", r"\boxed{5} or $\boxed{%s}$"]
    for _ in range(3_000):
        chain = chosen.choice(sides)
        for _ in range(chosen.randint(1, 4)):
            chain += chosen.choices(marks, [4, 4, 1, 1, 1, 1])[0] + chosen.choice(sides)
        answer, gold = chosen.choice(wrappings).replace("%s", chain), chosen.choice(["5", "10", "6", "x=5"])
        assert math500.is_equal(answer, gold) == math_verify(answer, gold), (answer, gold)
