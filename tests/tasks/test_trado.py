"""TraDo's protocol: prompts, settings, and dLLM-RL's rule beside dLLM-RL's own code."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import miniature
import pytest
import yaml
from scripted import TASKS, evaluate, load_task, prompts
from support import REAL_FOLDER

from sdar_lm_eval.checkpoint import Checkpoint
from sdar_lm_eval.lm.prompts import Prompts
from sdar_lm_eval.report.columns import TRADO_COLUMNS
from sdar_lm_eval.tasks.dllm_rl_math import distinct_substrings, form, is_equal, last_box, math_form
from sdar_lm_eval.tasks.extraction import INVALID

BENCHMARKS = ("math500", "gsm8k", "aime24")


@pytest.mark.parametrize(
    ("response", "text"),
    [
        ("Is it \\boxed{4}? It is $\\boxed{5}$.", "5"),
        ("\\boxed{\\frac{1}{2}} done", "\\frac{1}{2}"),
        ("\\boxed{\\boxed{7}}", "7"),
        ("\\boxed{}", ""),
        ("\\boxed{5} and \\boxed{4", INVALID),
        ("\\boxed 5", INVALID),
        ("<think>\\boxed{3}", "3"),
        ("The answer is 5.", INVALID),
    ],
)
def test_the_last_box(response: str, text: str) -> None:
    assert last_box(response) == text


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("5.0", "5"),
        ("1,000", "1000"),
        ("\\dfrac12", "\\frac{1}{2}"),
        ("1/2", "\\frac{1}{2}"),
        ("0.5", "1/2"),
        ("x = 3", "3"),
        ("025", "25"),
        ("90^\\circ", "90"),
        ("\\$5", "5"),
        ("3 \\text{ cm}", "3"),
        ("\\left(1, 2\\right)", "(1,2)"),
        ("\\sqrt2", "\\sqrt{2}"),
        ("\\text{Evelyn}", "Evelyn"),  # by Minerva's normal form
        ("\\text{ two } \\text{ units}", "\\text{ two } \\text{ units}"),  # without a normal form of MATH's
    ],
)
def test_equal_texts(answer: str, gold: str) -> None:
    assert is_equal(answer, gold)


@pytest.mark.parametrize(("answer", "gold"), [("0.50", "0.5"), ("p - q", "-q + p"), ("6", "\\frac{12}{2}"), ("", "0")])
def test_what_texts_do_not_tell(answer: str, gold: str) -> None:
    assert not is_equal(answer, gold)


def test_a_fraction_without_parts_has_no_normal_form() -> None:
    with pytest.raises(ValueError, match="nothing follows a fraction"):
        math_form("\\frac{1}{2}+\\frac")


def test_long_texts_that_repeat_themselves_are_never_equal() -> None:
    loop = "1+2+" * 30  # equal to itself with a unit by Minerva's normal form alone
    assert is_equal(f"{loop} degrees", loop)  # 128 characters
    assert not is_equal(f"{loop}3 degrees", f"{loop}3")
    assert is_equal(loop * 2, loop * 2)


@pytest.mark.parametrize("text", ["", "a", "aaaa", "abab", "banana", "mississippi", "\\frac{1}{2}+\\frac{1}{2}"])
def test_substrings_are_counted(text: str) -> None:
    every = {text[begin:end] for begin in range(len(text)) for end in range(begin + 1, len(text) + 1)}
    assert distinct_substrings(text) == len(every)


def test_wrong_answers_that_are_one() -> None:
    assert form("5.0") == form("5") and form("\\dfrac12") == form("1/2") and form("7") != form("5")
    assert form("\\text{ a } \\text{ b}") == "\\text{ a } \\text{ b}"


# The tasks


def _box(doc: dict[str, Any]) -> str:
    return f"So it is $\\boxed{{{doc['answer']}}}$."


@pytest.mark.parametrize(("group", "answers"), [("trado", 3), ("trado_static", 3), ("trado_think", 1)])
@pytest.mark.parametrize(("answer", "score"), [(_box, 1.0), (lambda doc: "\\boxed{-99}", 0.0)])
def test_all_columns(group: str, answers: int, answer: Any, score: float, offline: Path) -> None:
    results, requests = evaluate(answer, group)
    tasks = yaml.safe_load((TASKS / f"{group}.yaml").read_text())["task"]
    end = group.removeprefix("trado")
    assert tasks == [f"trado_{benchmark}{end}" for benchmark in BENCHMARKS]
    (columns,) = [columns for columns in TRADO_COLUMNS if columns[0].task == tasks[0]]
    assert [(column.task, column.metric) for column in columns] == [(task, "is_equal,last-box") for task in tasks]
    for task in tasks:
        scores = results["results"][task]
        found = {key.partition(",")[0] for key in scores if key.endswith(",last-box") and "stderr" not in key}
        several = {"pass@2", "pass@3", "majority@3", "agreement"} if answers > 1 else set()
        assert found == {"is_equal", *several}
        assert {scores[f"{name},last-box"] for name in found - {"agreement"}} == {score}
        assert results["configs"][task]["repeats"] == answers
    assert len(requests) == answers * sum(results["n-samples"][task]["effective"] for task in tasks)


@pytest.mark.parametrize(
    ("end", "generation", "decoding"),
    [
        ("", {"top_k": 0, "max_gen_toks": 2000}, {"confidence_threshold": 0.9}),
        ("_static", {"top_k": 1, "max_gen_toks": 2000}, {"remasking_strategy": "low_confidence_static"}),
        ("_think", {"top_k": 0, "max_gen_toks": 30000}, {"confidence_threshold": 0.9}),
    ],
)
def test_protocols(end: str, generation: dict[str, Any], decoding: dict[str, Any], offline: Path) -> None:
    for benchmark in BENCHMARKS:
        task = load_task(f"trado_{benchmark}{end}")
        sampled = {"until": [], "do_sample": True, "temperature": 1.0, "top_p": 1.0}
        assert task.config.generation_kwargs == sampled | generation
        dynamic = {"remasking_strategy": "low_confidence_dynamic"}
        assert task.config.metadata["sdar_decoding"] == dynamic | decoding


def test_what_it_asks(offline: Path) -> None:
    end = "\nPlease reason step by step, and put your final answer within \\boxed{}."
    problems = {
        "math500": [row["problem"] for row in miniature.MATH500],
        "gsm8k": [row["question"] for row in miniature.GSM8K],
        "aime24": [row["problem"] for row in miniature.AIME2024],
    }
    for benchmark, questions in problems.items():
        assert prompts(load_task(f"trado_{benchmark}")) == [question + end for question in questions]
        beginning = "You need to put your final answer in \\boxed{}. This is the problem:\n"
        asked = prompts(load_task(f"trado_{benchmark}_think"))
        assert [prompt.rstrip() for prompt in asked] == [f"{beginning}{question} <think>" for question in questions]


@pytest.mark.skipif(not REAL_FOLDER.is_dir(), reason=f"needs SDAR-4B-Chat's folder in {REAL_FOLDER}")
def test_the_prompt_is_dllm_rl_s(offline: Path) -> None:
    """SDAR's chat template makes of the user turn what dLLM-RL writes itself (sample/trado_sample.py)."""
    template = Prompts(Checkpoint.open(str(REAL_FOLDER)))
    (first, *_) = prompts(load_task("trado_math500"))
    assert template.as_user_turn(first) == (
        f"<|im_start|>user\n{miniature.MATH500[0]['problem']}\nPlease reason step by step, and put your final answer "
        "within \\boxed{}.<|im_end|>\n<|im_start|>assistant\n"
    )


# Beside dLLM-RL's code: DLLM_RL=…/dLLM-RL python -m pytest tests/tasks/test_trado.py

_DLLM_RL = Path(os.environ.get("DLLM_RL", ""))
_BENCH = Path(os.environ.get("SDAR_DATA_DIR") or Path(__file__).parents[3] / "shared" / "data")

needs_dllm_rl = pytest.mark.skipif(
    not (_DLLM_RL / "reward" / "math_utils.py").is_file(), reason="DLLM_RL names no checkout of Gen-Verse/dLLM-RL"
)


@pytest.fixture
def theirs() -> Any:
    """dLLM-RL's module that scores answers."""
    spec = importlib.util.spec_from_file_location("dllm_rl_math_utils", _DLLM_RL / "reward" / "math_utils.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _golds() -> list[str]:
    """The real gold answers where the machine has them, else the miniature ones."""
    found = [row["answer"] for row in (*miniature.MATH500, *miniature.AIME2024)]
    for file in ("sdar_bench/math500/test.jsonl", "sci/aime2024/train.jsonl", "sci/aime2024/test.jsonl"):
        if (_BENCH / file).is_file():
            found += [json.loads(line)["answer"] for line in (_BENCH / file).read_text().splitlines()]
    return found


_FORMS: list[Callable[[str], str]] = [
    str,
    lambda text: f"x = {text}",
    lambda text: f"${text}$",
    lambda text: f"{text}.",
    lambda text: f"{text} \\text{{ cm}}",
    lambda text: f"\\text{{{text}}}",
    lambda text: f" {text}\n",
    lambda text: f"{text}\\%",
    lambda text: f"{text}^\\circ",
    lambda text: f"\\left({text}\\right)",
    lambda text: f"{text} units",
    lambda text: text.replace("frac", "dfrac"),
    lambda text: text.replace("{", "").replace("}", ""),
    lambda text: text.replace("\\frac{1}{2}", "0.5").replace(",", ", "),
    lambda text: text[:-1],
    lambda text: text + "\\sqrt",
    lambda text: text + "\\frac",
    lambda text: text * 40,
    lambda text: f"1+{text}-1",
]


def _pairs(count: int) -> list[tuple[str, str]]:
    """Pairs of a built answer and a gold answer, many of them of one number."""
    generator, golds = random.Random(11), _golds()
    numbers = ["0.5", "\\frac12", "1/2", ".5", "-3/4", "1,000", "\\sqrt2", "2\\pi", "10^{3}", "1e3", "nan", "(1,2)", ""]
    found = [(made(gold), gold) for gold in golds for made in (_FORMS[0], generator.choice(_FORMS))]
    while len(found) < count:
        gold = generator.choice([*golds, *numbers])
        answer = generator.choice([gold, gold, generator.choice([*golds, *numbers])])
        for _ in range(generator.randrange(3)):
            answer = generator.choice(_FORMS)(answer)
        if generator.random() < 0.2 and answer:  # a slip anywhere
            place = generator.randrange(len(answer))
            answer = answer[:place] + generator.choice("0 5/{}\\,$=.") + answer[place + 1 :]
        found.append((answer, gold))
    return found


def _verdicts(theirs: Any, pairs: list[tuple[str, str]]) -> list[bool]:
    async def ask() -> list[bool]:
        with ThreadPoolExecutor(1) as executor:
            return [bool(await theirs.is_equal(answer, gold, executor)) for answer, gold in pairs]

    return asyncio.run(ask())


@needs_dllm_rl
def test_the_rule_beside_dllm_rl_s(theirs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As dLLM-RL runs with its requirements, where sympy's parser raises an ImportError."""

    def parse_latex(_: str) -> None:
        raise ImportError

    monkeypatch.setattr(theirs, "parse_latex", parse_latex)
    pairs = _pairs(6000)
    found = [is_equal(answer, gold) for answer, gold in pairs]
    assert found == _verdicts(theirs, pairs)
    assert 0.2 < sum(found) / len(found) < 0.9


@needs_dllm_rl
def test_long_answers_beside_dllm_rl_s(theirs: Any) -> None:
    generator = random.Random(5)
    for _ in range(200):
        part = "".join(generator.choice("12+x\\{}") for _ in range(generator.randint(1, 60)))
        text = (part * 300)[: generator.randint(129, 300)]
        text = "".join(generator.choice("yz") if generator.random() < 0.02 else each for each in text)
        repeated = 1 - distinct_substrings(text) / (len(text) * (len(text) + 1) / 2) > 0.2
        assert repeated == theirs.repeatness(text), text


@needs_dllm_rl
def test_boxes_beside_dllm_rl_s() -> None:
    source = (_DLLM_RL / "sample" / "trado_sample.py").read_text()
    begin = source.index("def extract_final_boxed_answer")
    names: dict[str, Any] = {}
    exec(source[begin : source.index("def extract_code")], names)
    generator = random.Random(2)
    parts = ["\\boxed{", "\\boxed", "{", "}", "5", "\\frac{1}{2}", " and ", "\n"]
    for _ in range(3000):
        response = "".join(generator.choice(parts) for _ in range(generator.randrange(9)))
        expected = names["extract_final_boxed_answer"](response)
        assert last_box(response) == (INVALID if expected == "Can not extract the answer!" else expected)


@needs_dllm_rl
def test_prompts_beside_dllm_rl_s(offline: Path) -> None:
    source = (_DLLM_RL / "sample" / "trado_sample.py").read_text()
    for benchmark in BENCHMARKS:
        for end, opening in (("", "\n"), ("_think", "<think>\n")):
            text = load_task(f"trado_{benchmark}{end}").config.doc_to_text.replace("{{question}}", "{{problem}}")
            written = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant{opening}".replace(
                "\\", "\\\\"
            ).replace("\n", "\\n")
            assert f"'''{written}'''" in source
