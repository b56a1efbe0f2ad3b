"""The columns of SDAR-30B-A3B-Sci's table: prompts, rules, protocols."""

from __future__ import annotations

import json
import os
import random
import re
import time
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import miniature
import pytest
from opencompass_code import Registry, answers, needs_opencompass
from scripted import TASKS, evaluate, load_task, manager, prompts

from sdar_lm_eval.errors import UserError
from sdar_lm_eval.report.columns import SCI_COLUMNS
from sdar_lm_eval.tasks import competitions, lettered
from sdar_lm_eval.tasks.data import documents
from sdar_lm_eval.tasks.first_option import INVALID
from sdar_lm_eval.tasks.lettered import letter_of
from sdar_lm_eval.tasks.math500 import is_equal
from sdar_lm_eval.tasks.thoughts import without_thoughts

CATEGORIES = sorted({row["category"] for row in miniature.MMLU_PRO})
_SCI = Path(os.environ.get("SDAR_DATA_DIR") or Path(__file__).parents[3] / "shared" / "data" / "sci")


@pytest.fixture
def sci(monkeypatch: pytest.MonkeyPatch, _no_folder_from_outside: None) -> Path:
    """Let tasks read the real data, where the machine has it, and return its folder."""
    if not (_SCI / "mmlu_pro" / "test.jsonl").is_file():
        pytest.skip(f"needs the data sets of SDAR-30B-A3B-Sci's table in $SDAR_DATA_DIR or {_SCI}")
    monkeypatch.setenv("SDAR_DATA_DIR", str(_SCI))
    return _SCI


@pytest.mark.parametrize(
    ("response", "rest"),
    [
        ("<think>A? B?</think>\n\nANSWER: B ", "ANSWER: B"),
        ("A? B?</think>ANSWER: B", "ANSWER: B"),
        ("x</think>y</think> z", "z"),
        ("<think>a</think>b<think>c</think>d", "bd"),
        ("<think>a</think>b</think>c", "b</think>c"),
        ("<think>Is it A", "<think>Is it A"),
        (" no thought ", "no thought"),
    ],
)
def test_what_is_left_of_thoughts(response: str, rest: str) -> None:
    assert without_thoughts(response) == rest


@pytest.mark.parametrize("text", ["{}", "<think>{}", "A</think>{}", "<think>A</think>{}"])
def test_a_model_that_only_begins_thoughts_is_scored_at_once(text: str) -> None:
    """As many beginnings as an answer has tokens: the verdict took half a minute."""
    begun = "<think>" * 32_768
    start = time.perf_counter()
    assert without_thoughts(text.format(begun)).endswith(begun)
    assert time.perf_counter() - start < 10  # what is quadratic takes half a minute


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("ANSWER: C", "C"),
        ("so\nAnswer : J.", "J"),
        ("answer:B, or ANSWER: C", "B"),
        ("**ANSWER: A**", "A"),
        ("ANSWER: b", "b"),  # no right answer: letters are compared as they are
        ("ANSWER: $C", INVALID),
        ("<think>ANSWER: A</think> ANSWER: D", "D"),
        ("The answer is C", INVALID),
        ("ANSWER: Q", INVALID),
        ("", INVALID),
    ],
)
def test_the_letter_behind_answer(response: str, letter: str) -> None:
    assert letter_of(response, "P") == letter


def test_gpqa_knows_four_letters() -> None:
    assert letter_of("ANSWER: J? ANSWER: B", "D") == "B"
    assert letter_of("ANSWER: J? ANSWER: B", "P") == "J"


def _right(doc: dict[str, Any]) -> str:
    if "starter_code" in doc:
        (code,) = [r["solution"] for r in miniature.LIVECODEBENCH if r["question_id"] == doc["question_id"]]
        return f"<think>```\nNo.\n```</think>Here:\n```python\n{code}\n```\nand a test:\n```\n1/0\n```"
    if "options" in doc:
        return f"<think>ANSWER: A, or is it B?</think>It is so.\n\nANSWER: {doc['answer']}"
    return f"<think>Is it \\boxed{{1}}?</think>So $\\boxed{{{doc['answer'].strip('$')}}}$."


@pytest.mark.parametrize("group", ["sdar_sci", "sdar_sci_s"])
@pytest.mark.parametrize(("answer", "score"), [(_right, 1.0), (lambda doc: "<think>Hm", 0.0)])
def test_all_columns(group: str, answer: Any, score: float, offline: Path) -> None:
    results, requests = evaluate(answer, group, confirm_run_unsafe_code=True)
    found = results.get("groups", {}) | results["results"]
    columns = [column for column in SCI_COLUMNS if column.task.endswith("_s") == (group == "sdar_sci_s")]
    assert {column.task: found[column.task][column.metric] for column in columns} == {
        column.task: score for column in columns
    }
    repeats = {task: results["configs"][task]["repeats"] for task in results["configs"]}
    documents = {task: results["n-samples"][task]["effective"] for task in repeats}
    assert len(requests) == sum(repeats[task] * documents[task] for task in repeats)
    for task, number in repeats.items():
        published = 32 if task.startswith(("aime", "livemath")) else 8 if task.startswith("gpqa") else 1
        assert number == (published if group == "sdar_sci_s" else 1), task


def test_the_groups_have_the_columns_of_the_table() -> None:
    names = []
    for group in ("sdar_sci", "sdar_sci_s"):
        lines = (TASKS / f"{group}.yaml").read_text().splitlines()
        names += [line[4:] for line in lines if line.startswith("  - ")]
    assert sorted(names) == sorted(column.task for column in SCI_COLUMNS)


def test_protocols(offline: Path) -> None:
    """Greedy, and sampled at temperature 1, each with the published length, and nothing else differs."""
    both = {"until": [], "max_gen_toks": 32768}
    for name in ("aime2024_sdar", "gpqa_diamond_sdar", "mmlu_pro_law_sdar", "proteinlmbench_sdar_rule"):
        greedy, sampled = load_task(name), load_task(f"{name}_s")
        assert prompts(greedy) == prompts(sampled)
        assert greedy.config.generation_kwargs == both | {"do_sample": False, "temperature": 0.0}
        assert sampled.config.generation_kwargs == both | {
            "do_sample": True,
            "temperature": 1.0,
            "top_p": 1.0,
            "top_k": 0,
        }
        for task in (greedy, sampled):
            assert task.config.metadata["sdar_decoding"] == {"remasking_strategy": "low_confidence_static"}
            assert (task.VERSION, task.OUTPUT_TYPE, task.config.num_fewshot) == (1.0, "generate_until", 0)


def test_a_score_is_the_mean_of_a_question_s_answers(offline: Path) -> None:
    """The standard error counts questions, not answers."""
    given: dict[str, int] = {}

    def answer(doc: dict[str, Any]) -> str:
        place = given[doc["question"]] = given.get(doc["question"], -1) + 1
        return _right(doc) if place < (8 if doc["answer"] == "003" else 32) else "I give up."

    results, requests = evaluate(answer, "aime2024_sdar_s", bootstrap_iters=10)
    scores = results["results"]["aime2024_sdar_s"]
    assert len(requests) == 2 * 32 and len(set(map(str, requests))) == 2
    assert scores["math_verify,opencompass"] == pytest.approx((8 / 32 + 1) / 2)
    assert scores["math_verify_stderr,opencompass"] == pytest.approx(0.375)  # of 0.25 and 1: sd .53, over sqrt(2)
    assert [sample["math_verify"] for sample in results["samples"]["aime2024_sdar_s"]] == [0.25, 1.0]
    assert len(results["samples"]["aime2024_sdar_s"][0]["resps"][0]) == 32


def test_the_demo_model_draws_each_repeat_anew(offline: Path) -> None:
    results = lm_eval.simple_evaluate(
        "sdar",
        model_args="pretrained=demo",
        tasks=["gpqa_diamond_sdar_s"],
        task_manager=manager(),
        gen_kwargs={"max_gen_toks": 8},
        limit=1,
        bootstrap_iters=0,
        verbosity="ERROR",
    )
    assert results is not None
    (sample,) = results["samples"]["gpqa_diamond_sdar_s"]
    assert len(sample["resps"][0]) == 8 and len(set(sample["resps"][0])) > 4
    (settings,) = results["config"]["sdar_lm_eval"]["decoding_of_tasks"].values()
    assert (settings["temperature"], settings["top_k"], settings["top_p"]) == (1.0, 0, 1.0)
    assert settings["remasking_strategy"] == "low_confidence_static"


def test_where_gpqa_s_right_option_stands(offline: Path) -> None:
    # By OpenCompass's rows, from 1, modulo 4; the fourth question has "Ceres" twice.
    questions = lettered.load_gpqa()["test"]
    assert [question["answer"] for question in questions] == ["D", "C", "B", "A", "D"]
    assert questions[0]["options"] == ["Ceres", "Pluto, really", "Sedna\n", "Mercury"]


def test_a_category_without_questions(tmp_path: Path) -> None:
    miniature.write_jsonl(tmp_path / "test.jsonl", miniature.MMLU_PRO[:4])
    with pytest.raises(UserError) as raised:
        lettered.load_mmlu_pro(category="law", mmlu_pro_dir=str(tmp_path))
    assert str(raised.value) == (
        "MMLU-Pro has no questions of category 'law' here, only of biology, business. Complete the data."
    )


def test_the_folder_of_mmlu_pro_is_no_misspelt_one_of_mmlu(offline: Path) -> None:
    from sdar_lm_eval.tasks.mmlu import MMLU

    assert documents(MMLU, "dev", {"mmlu_pro_dir": "x"}, "virology")
    with pytest.raises(UserError, match="Did you mean 'mmlu_dir'"):
        documents(MMLU, "dev", {"mmlu_folder": "x"}, "virology")


@pytest.mark.parametrize(
    ("source", "rows", "message"),
    [
        (lettered.MMLU_PRO, [miniature.MMLU_PRO[0] | {"answer": "Q"}], "'answer' is 'Q', not a letter from A to P."),
        (
            lettered.MMLU_PRO,
            [miniature.MMLU_PRO[0] | {"options": ["a", 2]}],
            "'options' is [\"a\", 2], not a list of at",
        ),
        (
            lettered.PROTEINLMBENCH,
            [miniature.PROTEINLMBENCH[0] | {"answer": "B"}],
            "'answer' is 'B', not such as 'option 1'.",
        ),
        (competitions.AIME2025, [{"question": "?", "answer": ""}], "'answer' is empty."),
    ],
)
def test_bad_rows(source: Any, rows: list[Any], message: str, tmp_path: Path) -> None:
    file = miniature.write_jsonl(tmp_path / "test.jsonl", rows)
    with pytest.raises(UserError) as raised:
        documents(source, "test", {source.key: str(tmp_path)})
    assert str(raised.value).startswith(f"{file}, line 1: {message}")


def test_a_row_whose_answer_is_no_option_is_never_right(tmp_path: Path) -> None:
    miniature.write_jsonl(tmp_path / "train.jsonl", [miniature.PROTEINLMBENCH[0] | {"answer": "option 7"}])
    (doc,) = lettered.load_proteinlmbench(proteinlmbench_dir=str(tmp_path))["test"]
    ((letters,),) = [lettered.filter_first_option([["Answer: G"]], [doc])]
    assert (doc["answer"], letters, lettered.score(doc, [letters])) == ("G", ["A"], {"exact_match": 0.0})


def test_broken_csv(tmp_path: Path) -> None:
    file = tmp_path / "gpqa_diamond.csv"
    for content, message in (
        (b"Question,Correct Answer\nx,y\n", ", row 1: no 'Incorrect Answer 1', only 'Correct Answer', 'Question'"),
        (b'Question,"Correct\n', ": not a CSV file that can be read ("),
        (b"\xff\xfe", ": not a CSV file that can be read ("),
    ):
        file.write_bytes(content)
        with pytest.raises(UserError) as raised:
            lettered.load_gpqa(gpqa_dir=str(tmp_path))
        assert str(raised.value).startswith(f"{file}{message}") and "\n" not in str(raised.value)


def test_both_halves_of_aime_2025_come_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(path: str, name: str | None, split: str) -> list[miniature.Row]:
        return [{"question": f"{path} {name} {split}", "answer": "1"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert [doc["question"] for doc in competitions.load(competition="aime2025")["test"]] == [
        "opencompass/AIME2025 AIME2025-I test",
        "opencompass/AIME2025 AIME2025-II test",
    ]


# Beside SDAR's own evaluation


def _user(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


def _config(opencompass: Any, monkeypatch: pytest.MonkeyPatch, file: str, name: str, **names: Any) -> Any:
    import contextlib
    import sys

    monkeypatch.setattr(sys.modules["mmengine.config"], "read_base", contextlib.nullcontext, raising=False)
    return opencompass(f"configs/datasets/{file}.py", **names)[name]


def _check_competitions(opencompass: Any, conversation: Any, monkeypatch: pytest.MonkeyPatch, rows: Any) -> None:
    for task, file, name in (
        ("aime2024_sdar", "aime2024/aime2024_cascade_eval_gen_5e9f4f", "aime2024_datasets"),
        ("aime2025_sdar", "aime2025/aime2025_cascade_eval_gen_5e9f4f", "aime2025_datasets"),
        ("livemathbench_hard_cn_sdar", "livemathbench/livemathbench_hard_custom_cascade_eval_gen_4bce59",
         "livemathbench_datasets"),
    ):  # fmt: skip
        if task in rows:
            config = _config(opencompass, monkeypatch, file, name)[0]
            expected = [conversation(config, [], row) for row in rows[task]]
            assert [_user(prompt) for prompt in prompts(load_task(task))] == expected


def _check_lettered(opencompass: Any, conversation: Any, monkeypatch: pytest.MonkeyPatch, rows: Any) -> None:
    file = "mmlu_pro/mmlu_pro_0shot_cot_gen_08c1de"
    import sys
    from types import SimpleNamespace

    categories = opencompass("configs/datasets/mmlu_pro/mmlu_pro_categories.py")["categories"]
    assert sorted(categories) == CATEGORIES
    monkeypatch.setitem(sys.modules, "released", SimpleNamespace(__path__=[]))
    monkeypatch.setitem(sys.modules, "released.mmlu_pro_categories", SimpleNamespace(categories=categories))
    configs = _config(opencompass, monkeypatch, file, "mmlu_pro_datasets", __package__="released")
    parse = opencompass("datasets/mmlu_pro.py", "CHOICES=", "@LOAD_DATASET")["_parse"]
    for config in configs:
        expected = [parse(dict(row)) for row in rows["mmlu_pro"] if row["category"] == config["category"]]
        task = load_task(f"mmlu_pro_{config['category'].replace(' ', '_')}_sdar")
        assert [_user(prompt) for prompt in prompts(task)] == [conversation(config, [], row) for row in expected]
        assert [doc["answer"] for doc in task.eval_docs] == [row["answer"] for row in expected]
    (config,) = _config(opencompass, monkeypatch, "ProteinLMBench/ProteinLMBench_gen_a67965", "proteinlmbench_datasets")
    parse = opencompass("datasets/ProteinLMBench.py", "def _parse", "@LOAD_DATASET")["_parse"]
    parsed = [parse(dict(row)) for row in rows["proteinlmbench"]]
    task = load_task("proteinlmbench_sdar_rule")
    assert [_user(prompt) for prompt in prompts(task)] == [conversation(config, [], row) for row in parsed]
    assert [doc["answer"] for doc in task.eval_docs] == [row["label"] for row in parsed]


@needs_opencompass
def test_prompts_beside_opencompass(
    opencompass: Any, conversation: Any, offline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    aime2024 = [{"question": row["problem"], "answer": row["answer"]} for row in miniature.AIME2024]
    rows = {"aime2024_sdar": aime2024, "aime2025_sdar": miniature.AIME2025}
    rows |= {"livemathbench_hard_cn_sdar": miniature.LIVEMATHBENCH, "mmlu_pro": miniature.MMLU_PRO}
    rows |= {"proteinlmbench": miniature.PROTEINLMBENCH}
    _check_competitions(opencompass, conversation, monkeypatch, rows)
    _check_lettered(opencompass, conversation, monkeypatch, rows)

    import csv

    names = {"csv": csv, "os": os, "LOAD_DATASET": Registry(), "BaseDataset": object, "Dataset": datasets.Dataset}
    names |= {"get_data_path": lambda path, local_mode: path}
    load = opencompass("datasets/gpqa.py", "@LOAD_DATASET", "class GPQAEvaluator", **names)["GPQADataset"].load
    for file in ("gpqa/gpqa_cascade_eval_gen_772ea0", "gpqa/gpqa_0shot_nocot_gen_772ea0"):
        (config,) = _config(opencompass, monkeypatch, file, "gpqa_datasets")
        theirs = load(str(offline / "gpqa"), "gpqa_diamond.csv")
        task = load_task("gpqa_diamond_sdar")
        assert [_user(prompt) for prompt in prompts(task)] == [conversation(config, [], row) for row in theirs]
        assert [doc["answer"] for doc in task.eval_docs] == theirs["answer"]


@needs_opencompass
def test_real_prompts_beside_opencompass(
    opencompass: Any, conversation: Any, sci: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rows_of(name: str) -> list[Any]:
        return [json.loads(line) for line in (sci / name / "test.jsonl").open(encoding="utf-8")]

    rows = {f"{name}_sdar": rows_of(name) for name in ("aime2024", "aime2025")}
    for row in rows["aime2024_sdar"]:
        row["question"] = row["problem"]
    rows |= {name: rows_of(name) for name in ("mmlu_pro", "proteinlmbench")}
    _check_competitions(opencompass, conversation, monkeypatch, rows)
    _check_lettered(opencompass, conversation, monkeypatch, rows)


_PIECES = (
    "ANSWER: |Answer:|answer : |A|B|C|D|E|F|J|P|Q|b| |\\n|**|$|<think>|</think>|</think>|The answer is |option |1|. |"
    ": |so|\\boxed{|}|5"
)


@needs_opencompass
def test_letters_beside_opencompass(opencompass: Any) -> None:
    names = opencompass("utils/text_postprocessors.py")
    cut, match = names["extract_non_reasoning_content"], names["match_answer_pattern"]
    gpqa = opencompass("datasets/gpqa.py", "@TEXT", re=re, TEXT_POSTPROCESSORS=Registry())[
        "GPQA_Simple_Eval_postprocess"
    ]
    evaluators = {"BaseEvaluator": object, "first_option_postprocess": names["first_option_postprocess"]}
    protein = opencompass("datasets/ProteinLMBench.py", "class ProteinLMBenchEvaluator", **evaluators)
    said = list(answers(_PIECES, 20_000))
    for text in said:
        assert without_thoughts(text) == cut(text), text
        assert letter_of(text, "P") == (match(cut(text), r"(?i)ANSWER\s*:\s*([A-P])") or INVALID), text
        letter = letter_of(text, "D")
        assert letter == (match(cut(text), r"(?i)ANSWER\s*:\s*([A-D])") or INVALID), text
        for right in "ABCD":
            doc: Any = {"options": ["w", "x", "y", "z"], "answer": right}
            assert lettered.score(doc, [[letter]])["exact_match"] == (gpqa(cut(text)) == right), text
    drawn = random.Random(0)
    docs: list[Any] = [
        {"options": ["x"] * (number := drawn.randint(2, 10)), "answer": "ABCDEFGHIJ"[drawn.randrange(number)]}
        for _ in said
    ]
    theirs = protein["ProteinLMBenchEvaluator"]().score(
        [cut(text) for text in said], [doc["answer"] for doc in docs], {"options": [doc["options"] for doc in docs]}
    )
    found = lettered.filter_first_option([[text] for text in said], docs)
    ours = [bool(lettered.score(doc, [letters])["exact_match"]) for doc, letters in zip(docs, found, strict=True)]
    assert ours == [detail["correct"] for detail in theirs["details"]]
    assert 2_000 < sum(ours) < 18_000


@needs_opencompass
def test_formulas_beside_opencompass(opencompass: Any) -> None:
    """The rule's verdicts on answers to AIME and LiveMathBench."""
    names = {"ICL_EVALUATORS": Registry(), "BaseEvaluator": object}
    evaluator = opencompass("evaluator/math_evaluator.py", "@ICL", "if __name__", **names)["MATHVerifyEvaluator"]()
    evaluator.is_num_equal = lambda *_: None
    cut = opencompass("utils/text_postprocessors.py")["extract_non_reasoning_content"]
    golds = ["025", "204", "336^\\circ", "$\\sqrt{2}$", "\\frac{1}{2}", "$[1, 2)$", "(1,2)"]
    pieces = (
        "\\boxed{25}|\\boxed{025}|\\boxed{204}|$\\boxed{336^\\circ}$|\\boxed{336}|\\boxed{\\sqrt{2}}|\\boxed{\\sqrt2}|"
        "\\boxed{\\frac{1}{2}}|\\boxed{0.5}|\\boxed{\\frac12}|\\boxed{[1,2)}|"
        "\\boxed{(1,2)}|<think>|</think>|So |The answer is $204$.|25|\\n|\\boxed{"
    )
    right = 0
    for number, text in enumerate(answers(pieces, 2_000)):
        gold = golds[number % len(golds)]
        theirs = evaluator.score([cut(text)], [gold])["accuracy"] == 100
        ((found,),) = competitions.filter_thoughts([[text]], [])
        doc: Any = {"question": "?", "answer": gold}
        assert competitions.score(doc, [[found]])["math_verify"] == theirs, (text, gold)
        right += theirs
    assert right > 80


def test_gold_answers_of_aime_are_read(sci: Path) -> None:
    for year in ("2024", "2025"):
        for doc in load_task(f"aime{year}_sdar").eval_docs:
            assert is_equal(f"So $\\boxed{{{doc['answer'].lstrip('0')}}}$.", doc["answer"]), doc
