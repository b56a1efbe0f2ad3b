from __future__ import annotations

import importlib.util
import itertools
import json
import math
import pickle
import random
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import lm_eval
import miniature
import numpy as np
import pytest
from lm_eval.loggers import EvaluationTracker
from lm_eval.utils import make_table
from opencompass_code import Registry, answers, needs_opencompass
from scripted import FixedLM, evaluate, load_task, manager, prompts

from sdar_lm_eval.errors import UserError
from sdar_lm_eval.report.frames import read_run
from sdar_lm_eval.report.table import read_tables
from sdar_lm_eval.tasks import mathbench
from sdar_lm_eval.tasks.data import Archive, read_jsonl
from sdar_lm_eval.tasks.mathbench import ORDERS, PARTS, answer_of, gold, orders, score
from sdar_lm_eval.tasks.set_score import SetScore

CHOICE = {"question": "1 + 1?", "options": ["one", "two", "three", "four"], "answer": "B"}


def _choice(**changes: Any) -> Any:
    return {"stage": "college", "set": "single_choice_en", **CHOICE, **changes}


def _right(doc: dict[str, Any]) -> str:
    if not doc["options"]:
        return f"So \\boxed{{{doc['answer']}}}."
    letter = gold(doc, ORDERS[doc["request"]])  # type: ignore[arg-type]
    return f"所以答案为选项{letter}" if doc["set"].endswith("cn") else f"The correct answer is option {letter}"


def test_what_it_asks(offline: Path) -> None:
    task = load_task("mathbench_sdar_a")
    asked = prompts(task)
    assert asked[4:8] == [
        "Question: Here is a multiple-choice question about mathematics. Please reason through it step by step, and "
        'at the end, provide your answer option with "Therefore, the correct answer is option X", Where "X" is the '
        "correct option you think from A，B，C，D. Here is the question you need to answer:\n1 + 0 = ____?\n"
        f"{''.join(f'{letter}. {option}' + chr(10) for letter, option in zip('ABCD', options, strict=True))}"
        "\nLet's think step by step:\n"
        for options in (
            ["1", "$2$", "3 ", "{4}"], ["$2$", "3 ", "{4}", "1"], ["3 ", "{4}", "1", "$2$"], ["{4}", "1", "$2$", "3 "]
        )
    ]  # fmt: skip
    assert "小明有3个苹果，又买了2个。一共多少个？\n请一步一步推理，并在最后用\\boxed{}给出你的答案。\n" in asked
    settings = {"until": [], "do_sample": False, "temperature": 0.0, "max_gen_toks": 4096}
    assert all(instance.args[1] == settings for instance in task.instances)
    assert [(instance.doc_id, instance.idx) for instance in task.instances[:5]] == [
        (0, 0),
        (0, 1),
        (0, 2),
        (0, 3),
        (1, 0),
    ]
    assert (task.VERSION, task.OUTPUT_TYPE, task.config.num_fewshot) == (1.0, "generate_until", 0)


def test_a_limit_asks_of_all_sets(offline: Path) -> None:
    for part, stages in PARTS.items():
        sets = [(stage, name) for stage, names in stages.items() for name in names]
        documents = load_task(f"mathbench_sdar_{part}").eval_docs
        assert [(doc["stage"], doc["set"]) for doc in documents][: len(sets)] == sets


def test_the_letters_of_each_order() -> None:
    assert [gold(_choice(), order) for order in ORDERS] == ["B", "A", "D", "C"]
    assert [gold(_choice(answer="D"), order) for order in ORDERS] == ["D", "C", "B", "A"]
    assert gold(_choice(options=[], answer="1{,}000"), ORDERS[0]) == "1{,}000"
    assert mathbench.target(_choice()) == "B A D C" and mathbench.target(_choice(options=[], answer="5")) == "5"
    assert [len(orders(_choice(options=options))) for options in (CHOICE["options"], [])] == [4, 1]


def test_a_question_counts_only_if_all_its_answers_are_right() -> None:
    for wrong in itertools.chain.from_iterable(itertools.combinations(range(4), n) for n in range(5)):
        found = ["X" if number in wrong else letter for number, letter in enumerate("BADC")]
        scores = score(_choice(), found)
        assert (scores["exact_match"], scores["stage_mean"], scores["college"]) == (float(not wrong),) * 3
        assert scores["high"] is scores["arithmetic"] is None and "college_knowledge" not in scores
    # A model that always says B is right in one order of each question.
    assert score(_choice(), ["B"] * 4)["exact_match"] == 0.0


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"It is \boxed{1000}.", "1000"),
        (r"It is \boxed{1,000}.", "1,000"),  # no number is compared, only texts
        (r"\boxed{4} or \boxed{5}", "5"),
        ("The answer is 5 apples. Good.", "5apples"),
        ("5", "5"),
    ],
)
def test_what_answers_a_cloze_question(response: str, answer: str) -> None:
    assert answer_of(_choice(options=[]), response) == answer


def _scores(**right: list[int]) -> list[SetScore]:
    """Scores by stage and language, in turn."""
    found = [[SetScore.of(key[:-3], key[-2:], bool(value)) for value in values] for key, values in right.items()]
    return [each for group in itertools.zip_longest(*found) for each in group if each is not None]


def test_means_over_stages() -> None:
    # Stages of unequal sets count equally: ((1 + 1/4)/2 + 0)/2.
    scores = _scores(college_cn=[1, 1], college_en=[1, 0, 0, 0], arithmetic_en=[0, 0, 0])
    assert mathbench.mean_of_stages([*scores, None]) == pytest.approx(0.3125)
    assert mathbench.mean_of_stages(scores[:2]) == 1.0  # a limit left the other stages out
    assert mathbench.mean_of_stages([None]) == "N/A"
    # Of college_en alone: sqrt(.25 * .75 / 3) = .25, halved for the stage and again for the mean.
    assert mathbench.stderr_of_stages(scores) == pytest.approx(0.0625)
    assert mathbench.stderr_of_stages(_scores(college_cn=[1], college_en=[1, 0])) == "N/A"


def test_the_standard_error_is_that_of_a_bootstrap() -> None:
    """Each set is drawn anew with replacement."""
    drawn = np.random.default_rng(0)
    sets = {
        ("college", "cn"): (60, 0.7),
        ("college", "en"): (90, 0.5),
        ("high", "cn"): (40, 0.4),
        ("arithmetic", "en"): (50, 0.9),
    }
    values = {key: (drawn.random(number) < share).astype(float) for key, (number, share) in sets.items()}
    scores = _scores(**{"_".join(key): list(found) for key, found in values.items()})
    means = []
    for _ in range(4_000):
        m = {key: drawn.choice(found, len(found)).mean() for key, found in values.items()}
        means.append(((m["college", "cn"] + m["college", "en"]) / 2 + m["high", "cn"] + m["arithmetic", "en"]) / 3)
    assert mathbench.stderr_of_stages(scores) == pytest.approx(np.std(means), rel=0.05)


def test_scores_travel_between_processes() -> None:
    """lm_eval gathers scores of several ranks by pickle, and writes them as JSON.

    The task's module has a name of the sender alone: its path, or before lm_eval 0.4.12 a name that no import finds.
    """
    spec = importlib.util.spec_from_file_location("of_the_sender", mathbench.__file__)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sent = module.score(_choice(set="cn"), list("BADC"))["stage_mean"]
    received = pickle.loads(pickle.dumps(sent))
    assert (received, received.stage, received.set) == (1.0, "college", "cn")
    assert json.dumps(sent) == "1.0"


def test_an_evaluation(offline: Path, tmp_path: Path) -> None:
    """The column, its parts and errors in lm_eval's table and in ours."""

    def answer(doc: dict[str, Any]) -> str:
        wrong = (doc["stage"], doc["set"], doc["answer"], doc["request"]) in (
            ("college", "single_choice_cn", "A", 2), ("primary_knowledge", "single_choice_en", "D", 0),
            ("arithmetic", "cloze_en", "5", 0),
        )  # fmt: skip
        return "no idea" if wrong else _right(doc)

    tracker = EvaluationTracker(output_path=str(tmp_path))
    results, requests = evaluate(answer, "mathbench_sdar", evaluation_tracker=tracker, bootstrap_iters=100)
    assert len(requests) == 14 * 4 * 4 + 3 * 2
    # college: (3/4 + 1)/2; arithmetic: 1/2; primary_knowledge: (1 + 3/4)/2.
    application, theory = (0.875 + 1 + 1 + 1 + 0.5) / 5, (1 + 1 + 1 + 0.875) / 4
    found = results["results"]
    assert found["mathbench_sdar_a"]["college,opencompass"] == pytest.approx(0.875)
    assert found["mathbench_sdar_a"]["stage_mean,opencompass"] == pytest.approx(application)
    assert found["mathbench_sdar_t"]["stage_mean,opencompass"] == pytest.approx(theory)
    assert found["mathbench_sdar_t"]["exact_match,opencompass"] == pytest.approx(31 / 32)
    assert results["groups"]["mathbench_sdar"]["stage_mean,opencompass"] == pytest.approx((application + theory) / 2)
    assert results["n-samples"]["mathbench_sdar_t"]["effective"] == 32
    # 0.25 of a college set, 0.5 of arithmetic, 0.25 of a set of primary_knowledge.
    errors = [math.hypot(0.25 / 2, 0.5) / 5, 0.25 / 2 / 4]
    stderr = math.hypot(*errors) / 2
    (row,) = [line for line in make_table(results, "groups").splitlines() if "|mathbench_sdar|" in line]
    assert f"{(application + theory) / 2:.4f}|±  |" in row
    if hasattr(lm_eval.api.metrics, "unweighted_mean_stderr"):  # older harnesses weigh the errors by size
        assert f"|±  |{stderr:.4f}" in row

    samples = results.pop("samples")
    tracker.save_results_aggregated(results=results, samples=samples)
    for task in samples:
        tracker.save_results_samples(task_name=task, samples=samples[task])
    (table,) = read_tables([tmp_path])
    ours = table.scores["mathbench_sdar"]
    assert (ours.value, ours.questions) == (pytest.approx((application + theory) / 2), 62)
    assert ours.stderr == pytest.approx(stderr)
    rows = read_run(tmp_path).samples
    one = rows[(rows.task == "mathbench_sdar_a") & (rows.document == 0)]
    assert list(one.repeat) == [0, 1, 2, 3] and list(one.exact_match) == [0.0] * 4
    assert list(one.response) == ["所以答案为选项A", "所以答案为选项D", "no idea", "所以答案为选项B"]


def test_the_demo_model_s_records(offline: Path, tmp_path: Path) -> None:
    """Each order's answer has a record of how it was written."""
    results = lm_eval.simple_evaluate(
        "sdar",
        model_args="pretrained=demo",
        tasks=["mathbench_sdar_a"],
        task_manager=manager(),
        gen_kwargs={"max_gen_toks": 4},
        limit=2,
        bootstrap_iters=0,
        evaluation_tracker=(tracker := EvaluationTracker(output_path=str(tmp_path))),
        verbosity="ERROR",
    )
    assert results is not None
    samples = results.pop("samples")
    tracker.save_results_aggregated(results=results, samples=samples)
    tracker.save_results_samples(task_name="mathbench_sdar_a", samples=samples["mathbench_sdar_a"])
    run = read_run(tmp_path)
    records = {(record.document, record.repeat): record for record in run.answers.itertuples()}
    assert sorted(records) == [(document, repeat) for document in (0, 1) for repeat in range(4)]
    for sample in run.samples.itertuples():
        assert "".join(records[sample.document, sample.repeat].texts).startswith(sample.response.rstrip()[:1])


class _Reversed(FixedLM):
    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        return super().generate_until(requests[::-1])[::-1]


def test_a_model_that_answers_in_its_own_order(offline: Path) -> None:
    results = lm_eval.simple_evaluate(
        _Reversed(_right), tasks=["mathbench_sdar"], task_manager=manager(), bootstrap_iters=0
    )
    assert results is not None and results["groups"]["mathbench_sdar"]["stage_mean,opencompass"] == 1.0


def test_of_more_options_than_four_the_first_four_count(tmp_path: Path) -> None:
    """OpenCompass's orders have four."""
    row = miniature.write_jsonl(tmp_path / "x.jsonl", [CHOICE | {"options": ["a", 2, 0.5, "d", "e"]}])
    ((found,),) = [read_jsonl(mathbench.MATHBENCH, row)]
    assert found["options"] == ["a", "2", "0.5", "d"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"options": ["a", "b", "c"]}, '\'options\' is ["a", "b", "c"], not 4 strings.'),
        ({"answer": "E"}, "'answer' is 'E', not A, B, C or D."),
        ({"answer": "AB"}, "'answer' is 'AB', not A, B, C or D."),
        ({"question": " "}, "'question' is empty."),
    ],
)
def test_bad_rows(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = miniature.write_jsonl(tmp_path / "college" / "single_choice_cn.jsonl", [CHOICE, CHOICE | row])
    with pytest.raises(UserError) as raised:
        mathbench.load(part="a", mathbench_dir=str(tmp_path))
    assert str(raised.value).startswith(f"{file}, line 2: {message}")


def test_the_download(miniature_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The archive is unpacked, and another file in its place is refused."""
    import hashlib

    zipped = tmp_path / "mathbench_v1.zip"
    with zipfile.ZipFile(zipped, "w") as archive:
        for file in (miniature_data / "mathbench").rglob("*.jsonl"):
            archive.write(file, Path("mathbench_v1") / file.relative_to(miniature_data / "mathbench"))
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "EXTRACTED_DATASETS_PATH", str(tmp_path / "extracted"))
    md5 = hashlib.md5(zipped.read_bytes()).hexdigest()
    for name in ("MATHBENCH", "_CLOZE_SETS"):
        source = getattr(mathbench, name)
        monkeypatch.setitem(vars(source), "hub", Archive(str(zipped), md5))
    assert len(mathbench.load(part="a")["test"]) == 30
    monkeypatch.setitem(vars(mathbench.MATHBENCH), "hub", Archive(str(zipped), "0" * 32))
    with pytest.raises(UserError) as raised:
        mathbench.load(part="t")
    assert str(raised.value).startswith(
        f"MathBench cannot be loaded from {zipped} (ValueError: its MD5 checksum is {md5}, not {'0' * 32}). To work "
        "offline, put what http://opencompass.oss-cn-shanghai.aliyuncs.com/datasets/data/mathbench_v1.zip unpacks to "
        """in a folder and name it: --metadata '{"mathbench_dir": "/path/to/folder"}' or SDAR_MATHBENCH_DIR="""
    )


# Beside SDAR's own evaluation


@pytest.fixture
def released(opencompass: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return MathBench's configurations there, and how to load a set."""
    import contextlib
    import copy
    import os.path
    import sys

    monkeypatch.setitem(
        sys.modules,
        "released.mathbench_prompt",
        SimpleNamespace(**opencompass("configs/datasets/MathBench/mathbench_prompt.py")),
    )
    monkeypatch.setitem(sys.modules, "released", SimpleNamespace(__path__=[]))
    monkeypatch.setattr(sys.modules["mmengine.config"], "read_base", contextlib.nullcontext, raising=False)
    configs = opencompass("configs/datasets/MathBench/mathbench_2024_gen_50a320.py", __package__="released")
    names = {"json": json, "copy": copy, "osp": os.path, "LOAD_DATASET": Registry(), "BaseDataset": object}
    names |= {"Dataset": datasets.Dataset, "get_data_path": lambda path, local_mode: path}
    loader = opencompass("datasets/mathbench.py", "def get_number", "@TEXT_POSTPROCESSORS", **names)
    return SimpleNamespace(configs=configs["mathbench_datasets"], load=loader["MathBenchDataset"].load)


def _by_set(task: Any) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for prompt, instance in zip(prompts(task), task.instances, strict=True):
        found.setdefault(f"mathbench-{instance.doc['stage']}-{instance.doc['set']}", []).append(prompt)
    return found


@needs_opencompass
def test_prompts_beside_opencompass(released: Any, conversation: Any, offline: Path) -> None:
    ours = {name: asked for part in PARTS for name, asked in _by_set(load_task(f"mathbench_sdar_{part}")).items()}
    assert len(released.configs) == len(ours) == 17
    for config in released.configs:
        folder = offline / "mathbench" / Path(config["path"]).name
        rows = released.load(str(folder), config["name"], config["with_circular"])
        expected = [conversation(config, [], row) for row in rows]
        assert [[{"role": "user", "content": prompt}] for prompt in ours[config["abbr"]]] == expected


@needs_opencompass
def test_scores_beside_opencompass(released: Any, opencompass: Any, tmp_path: Path) -> None:
    """Built answers to built questions: verdicts, both parts and the column."""
    drawn = random.Random(0)
    for config in released.configs:
        rows = [
            {"question": f"{number}?", "options": ["w", "x", "y", "z"], "answer": drawn.choice("ABCD")}
            if "choice" in config["name"]
            else {"question": f"{number}?", "answer": drawn.choice(["5", "1,000", "\\frac{1}{2}"])}
            for number in range(drawn.randint(20, 60))
        ]
        miniature.write_jsonl(tmp_path / Path(config["path"]).name / f"{config['name']}.jsonl", rows)
    names = {"ICL_EVALUATORS": Registry(), "BaseEvaluator": object, "collections": __import__("collections")}
    names |= {"List": list, "HuggingfaceEvaluator": object}
    circular = opencompass("openicl/icl_evaluator/icl_circular_evaluator.py", "@ICL", **names)["CircularEvaluator"]
    circular.__init__ = lambda self: vars(self).update(cp4=list(ORDERS), cp1=["ABCD"])
    by_text = opencompass(
        "openicl/icl_evaluator/icl_hf_evaluator.py", "class AccEvaluator", "    def _postprocess", **names,
        Optional=__import__("typing").Optional, ConfigDict=dict,
    )["AccEvaluator"]  # fmt: skip
    letter = opencompass("utils/text_postprocessors.py")["first_option_postprocess"]
    math_names = opencompass("datasets/math.py", "def last_boxed_only_string", "@LOAD_DATASET", re=__import__("re"))
    cloze = opencompass("datasets/math.py", "@TEXT", "@ICL", **math_names, TEXT_POSTPROCESSORS=Registry())[
        "math_postprocess_v2"
    ]

    texts = answers(
        "A|B|C|D|C| |。|. |所以答案为选项|the correct answer is option |**|1|答案是|\\boxed{|}|5|1,000|\\n", 10**6
    )
    theirs: dict[str, dict[str, float]] = {}
    ours: dict[str, list[Any]] = {part: [] for part in PARTS}
    requests = 0
    for config in released.configs:
        abbr, name, stage = config["abbr"], config["name"], Path(config["path"]).name
        rows = released.load(str(tmp_path / stage), name, True)
        golds = [row["answer"] for row in rows]
        given = []
        for right in golds:
            if "--" in right:
                right = right.split("--")[1]
                said = (
                    f"所以答案为选项{right}"
                    if name.endswith("cn")
                    else f"Therefore, the correct answer is option {right}."
                )
            else:
                said = f"So it is $\\boxed{{{right}}}$."
            given.append(said if drawn.random() < 0.9 else next(texts))
        requests += len(given)
        if "choice" in name:
            theirs[abbr] = circular().score([letter(text, "ABCD") for text in given], golds)
        else:
            coded = by_text._preprocess(None, [cloze(text) for text in given], golds)
            equal = [a == b for a, b in zip(coded["predictions"], coded["references"], strict=True)]
            theirs[abbr] = {"accuracy": 100 * sum(equal) / len(equal)}
        part = next(part for part, stages in PARTS.items() if stage in stages)
        docs = [
            doc
            for doc in mathbench.load(part=part, mathbench_dir=str(tmp_path))["test"]
            if (doc["stage"], doc["set"]) == (stage, name)
        ]
        waiting = iter(given)
        for doc in docs:
            responses = [[next(waiting)] for _ in orders(doc)]
            found = mathbench.filter_answer(responses, [doc] * len(responses))
            ours[part].append(score(doc, [each[0] for each in found]))
        assert not list(waiting)
        accuracy = 100 * sum(each["exact_match"] for each in ours[part][-len(docs) :]) / len(docs)
        assert accuracy == pytest.approx(theirs[abbr]["perf_4" if "choice" in name else "accuracy"])
        assert 0 < accuracy < 100
    assert requests > 1_000

    groups = opencompass("configs/summarizers/groups/mathbench_v1_2024.py")["mathbench_2024_summary_groups"]
    column = {
        "name": "Mathbench",
        "subsets": ["mathbench-a (average)", "mathbench-t (average)"],
    }  # eval_sdar_lmdeploy.py
    typing = vars(__import__("typing"))
    summarizer = object.__new__(
        opencompass(
            "summarizers/default.py", "class DefaultSummarizer", "    def _format_table", ConfigDict=dict, math=math,
            functools=__import__("functools"), Optional=typing["Optional"], List=typing["List"],
        )["DefaultSummarizer"]
    )  # fmt: skip
    summarizer.summary_groups, summarizer.model_abbrs = [*groups, column], ["model"]
    metrics = {abbr: list(found) for abbr, found in theirs.items()}
    _, summary, _, _ = summarizer._calculate_group_metrics({"model": {}}, {"model": dict(theirs)}, metrics, {})
    parts = []
    for part, scores in ours.items():
        parts.append(100 * mathbench.mean_of_stages([each["stage_mean"] for each in scores]))
        assert parts[-1] == pytest.approx(summary["model"][f"mathbench-{part} (average)"]["naive_average"])
        for stage in PARTS[part]:
            mean = mathbench.mean_of_stages([each[stage] for each in scores])
            assert 100 * mean == pytest.approx(summary["model"][stage]["naive_average"])
    assert sum(parts) / 2 == pytest.approx(summary["model"]["Mathbench"]["naive_average"])
