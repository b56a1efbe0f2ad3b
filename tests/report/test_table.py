from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdar_lm_eval.commands import main
from sdar_lm_eval.errors import UserError
from sdar_lm_eval.report.columns import COLUMNS, SCI_COLUMNS, TABLES, TRADO_COLUMNS
from sdar_lm_eval.report.published import PUBLISHED, SIZES, published, published_as
from sdar_lm_eval.report.table import Score, difference, read_tables, render
from sdar_lm_eval.report.text_table import escaped

MMLU, GSM8K, HUMANEVAL = COLUMNS[0], COLUMNS[1], COLUMNS[3]
DIFFERENCE = re.compile(r"[+-]\d+\.\d ± \d+\.\d, (within|LARGER than) chance")
PAPER_SETTINGS = {
    "block_length": 4,
    "denoising_steps": 4,
    "remasking_strategy": "low_confidence_static",
    "confidence_threshold": 0.85,
    "temperature": 0.0,
    "max_gen_toks": 4096,
}


def _results(scores: dict[str, float], questions: dict[str, int], **more: Any) -> dict[str, Any]:
    """A results file as lm_eval writes it, by column's task or a group's."""
    metrics = {column.task: column.metric for column in COLUMNS}
    return {
        "results": {
            task: {"alias": task, metrics.get(task, metrics["mmlu_sdar"]): score, "other,none": 0.5}
            for task, score in scores.items()
        },
        "group_subtasks": {task: [] for task in scores},
        "n-samples": {task: {"original": 9999, "effective": number} for task, number in questions.items()},
        "date": 1.0,
        "model_name": "JetLM/SDAR-4B-Chat",
        "config": {"model": "hf", "model_args": {"pretrained": "JetLM/SDAR-4B-Chat"}},
    } | more


def _write(folder: Path, *results: dict[str, Any]) -> Path:
    for number, content in enumerate(results):
        file = folder / f"model{number}" / "results_2026-01-01T00-00-00.json"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(content))
    (folder / "model0" / "samples_gsm8k_2026-01-01.jsonl").write_text("{}\n")
    (folder / "notes.json").write_text("[1]")
    return folder


def scores_of(folder: Path) -> dict[str, Score]:
    (table,) = read_tables([folder])
    return dict(table.scores)


def test_the_published_table() -> None:
    # JetAstra/SDAR's report, as its README and arXiv 2510.06303 have it; two of its rows in full.
    rows = {size: PUBLISHED[name].scores for size, name in SIZES.items()}
    assert [rows["1.7B"][column.task] for column in COLUMNS] == [62.9, 80.1, 63.2, 61.6, 61.1, 43.4, 63.6]
    assert [rows["30B-A3B"][column.task] for column in COLUMNS] == [82.8, 91.4, 77.8, 87.2, 71.6, 60.6, 79.3]
    tasks = {column.task for columns in TABLES for column in columns}
    assert all(tasks >= row.scores.keys() and row.source for row in PUBLISHED.values())
    assert [column.questions for column in COLUMNS] == [14042, 1319, 500, 164, 257, 541, 3709]


def test_the_published_table_of_the_science_model() -> None:
    # JetAstra/SDAR's README, part II, without the columns that no task reproduces.
    rows = {
        "SDAR-30B-A3B-Sci-greedy": ("G", [78.1, 76.7, 60.0, 60.7, 40.7, 42.3, 66.7, 59.9]),
        "SDAR-30B-A3B-Sci-sampled": ("S", [77.9, 73.4, 59.2, 58.7, 49.1, 51.4, 66.0, 59.6]),
    }
    for name, (protocol, scores) in rows.items():
        columns = [column for column in SCI_COLUMNS if column.title.endswith(f"({protocol})")]
        assert [PUBLISHED[name].scores[column.task] for column in columns] == scores
        assert all(column.task.endswith("_s") == (protocol == "S") for column in columns)
        assert PUBLISHED[name].scores.keys() == {column.task for column in columns}
    ar = PUBLISHED["AR-30B-A3B-Sci"].scores
    assert [ar[column.task] for column in SCI_COLUMNS] == [78.3, 74.9, 60.7, 55.4, 51.5, 46.3, 61.2, 59.5] * 2


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("JetLM/SDAR-4B-Chat", "4B"),
        ("/models/sdar-1.7b-chat/", "1.7B"),
        ("JetLM/SDAR-30B-A3B-Chat", "30B-A3B"),
        ("JetLM/SDAR-8B-Chat-b32", None),
        ("Qwen/Qwen3-4B", None),
        ("demo", None),
    ],
)
def test_which_model_a_name_says(name: str, model: str | None) -> None:
    own = [row for row in published_as(name) if not row.foreign]
    assert own == ([] if model is None else [PUBLISHED[SIZES[model]]])


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("JetLM/SDAR-4B-Chat", ["SDAR-4B-Chat", "dLLM-RL:SDAR-4B-Chat-static", "dLLM-RL:SDAR-4B-Chat-dynamic"]),
        ("Gen-Verse/TraDo-8B-Instruct", ["dLLM-RL:TraDo-8B-Instruct-static", "dLLM-RL:TraDo-8B-Instruct-dynamic"]),
        ("/models/trado-8b-thinking/", ["dLLM-RL:TraDo-8B-Thinking"]),
        ("Gen-Verse/TraDo-8B-Instruct-GGUF", []),
    ],
)
def test_rows_of_dllm_rl_s_table(name: str, rows: list[str]) -> None:
    assert [row.name for row in published_as(name)] == rows


def test_dllm_rl_s_table() -> None:
    # Gen-Verse/dLLM-RL's README at 10b4fd1.
    dynamic, static, thinking = TRADO_COLUMNS
    for name, columns, scores in (
        ("SDAR-4B-Chat-dynamic", dynamic, [67.4, 88.9, 8.2]),
        ("TraDo-8B-Instruct-static", static, [78.5, 92.3, 13.3]),
        ("TraDo-8B-Thinking", thinking, [87.4, 94.2, 35.5]),
    ):
        row = PUBLISHED[f"dLLM-RL:{name}"]
        assert [row.scores[column.task] for column in columns] == scores
        assert row.scores.keys() - row.foreign == {column.task for column in columns}


def test_the_science_model_has_a_row_for_each_protocol() -> None:
    both = [PUBLISHED["SDAR-30B-A3B-Sci-greedy"], PUBLISHED["SDAR-30B-A3B-Sci-sampled"]]
    assert published_as("JetLM/SDAR-30B-A3B-Sci") == both
    assert published_as("JetLM/SDAR-30B-A3B-Sci-b8") == []


def test_a_difference() -> None:
    found = difference(Score(0.879, 0.0089, 1319), GSM8K, 89.9)
    assert found.points == pytest.approx(-2.0)
    # of 89.9 % in 1,319 questions: sqrt(.899 * .101 / 1318) = 0.83 points
    assert found.stderr == pytest.approx(math.hypot(0.89, 0.8300), abs=1e-3)
    assert found.verdict == "within chance"
    assert difference(Score(0.874, 0.0089, 1319), GSM8K, 89.9).verdict == "LARGER than chance"
    assert difference(Score(0.924, 0.0089, 1319), GSM8K, 89.9).verdict == "LARGER than chance"
    assert difference(Score(1.0, None, 1), GSM8K, 89.9).verdict == "unknown"


def test_a_few_answers_that_are_all_right_prove_nothing() -> None:
    # Of 72 % in 2 questions, both are right every other time: sqrt(.72 * .28 / 1) = 44.9 points.
    found = difference(Score(1.0, 0.0, 2), HUMANEVAL, 72.0)
    assert found.stderr == pytest.approx(math.hypot(44.9, 3.52), abs=0.01)
    assert found.verdict == "within chance"
    assert difference(Score(0.0, 0.0, 20), HUMANEVAL, 72.0).verdict == "LARGER than chance"


def test_a_mean_of_subjects_is_as_uncertain_in_the_published_run() -> None:
    """Two runs on different questions of 57 subjects, whose sizes are about those of MMLU's."""
    rng = np.random.default_rng(0)
    sizes = np.repeat([100, 150, 300, 800, 1534], [24, 15, 14, 3, 1])  # (57,)
    right = np.clip(rng.normal(0.75, 0.13, 57), 0.3, 0.97)
    larger = 0
    for _ in range(4000):
        own, published = (rng.binomial(sizes, right) / sizes for _ in range(2))
        stderr = math.sqrt((own * (1 - own) / (sizes - 1)).sum()) / 57
        score = Score(own.mean(), stderr, sizes.sum())
        column = dataclasses.replace(MMLU, questions=sizes.sum())
        larger += difference(score, column, 100 * published.mean()).verdict == "LARGER than chance"
    assert 0.04 <= larger / 4000 <= 0.06


def test_standard_errors_are_the_harness_s(tmp_path: Path) -> None:
    from lm_eval.api.metrics import mean_stderr

    folder = _write(tmp_path, _results({"gsm8k_sdar_paper": 0.75}, {"gsm8k_sdar_paper": 8}))
    score = scores_of(folder)["gsm8k_sdar_paper"]
    assert (score.value, score.questions) == (0.75, 8)
    assert score.stderr == pytest.approx(mean_stderr([1] * 6 + [0] * 2))


def test_a_group_is_the_mean_of_its_subjects(tmp_path: Path) -> None:
    results = _results(
        {"mmlu_sdar": 0.123, "mmlu_sdar_anatomy": 0.5, "mmlu_sdar_virology": 0.8},
        {"mmlu_sdar_anatomy": 5, "mmlu_sdar_virology": 101},
    )
    results["group_subtasks"]["mmlu_sdar"] = ["mmlu_sdar_anatomy", "mmlu_sdar_virology"]
    score = scores_of(_write(tmp_path, results))["mmlu_sdar"]
    assert (score.value, score.questions) == (pytest.approx(0.65), 106)
    assert score.stderr == pytest.approx(math.hypot(0.25, 0.04) / 2)


def test_a_group_s_weighted_mean_has_the_harness_s_error(tmp_path: Path) -> None:
    """MathBench's parts are means over stages: the number of questions says nothing about their errors."""
    metric = COLUMNS[-1].metric
    results = _results(
        {"mathbench_sdar_a": 0.7, "mathbench_sdar_t": 0.8}, {"mathbench_sdar_a": 9, "mathbench_sdar_t": 8}
    )
    results["group_subtasks"]["mathbench_sdar"] = ["mathbench_sdar_a", "mathbench_sdar_t"]
    results["results"]["mathbench_sdar"] = {"alias": "mathbench_sdar", metric: 0.75}
    for task, stderr in (("mathbench_sdar_a", 0.03), ("mathbench_sdar_t", 0.04)):
        results["results"][task] |= {metric: results["results"][task]["exact_match,first-option"]}
        results["results"][task] |= {metric.replace(",", "_stderr,"): stderr}
    score = scores_of(_write(tmp_path / "known", results))["mathbench_sdar"]
    assert (score.value, score.questions) == (pytest.approx(0.75), 17)
    assert score.stderr == pytest.approx(0.025)
    results["results"]["mathbench_sdar_t"][metric.replace(",", "_stderr,")] = "N/A"
    assert scores_of(_write(tmp_path / "unknown", results))["mathbench_sdar"].stderr is None


def test_questions_with_several_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The error is lm_eval's, which counts questions; the published score is as uncertain as the run's."""
    aime = next(column for column in SCI_COLUMNS if column.task == "aime2024_sdar_s")
    results = _results({"aime2024_sdar_s": 0.7}, {"aime2024_sdar_s": 30})
    results["results"]["aime2024_sdar_s"] |= {aime.metric: 0.7, aime.metric.replace(",", "_stderr,"): 0.06}
    results["configs"] = {"aime2024_sdar_s": {"repeats": 32}}
    results["config"]["model_args"] = {"pretrained": "JetLM/SDAR-30B-A3B-Sci"}
    folder = _write(tmp_path, results)
    score = scores_of(folder)["aime2024_sdar_s"]
    assert (score.answers, score.stderr) == (32, 0.06)
    assert difference(score, aime, 73.4).stderr == pytest.approx(100 * math.hypot(0.06, 0.06))
    # Answers that are all alike say nothing about how questions differ: 73.4 % of 30, sqrt(.734 * .266 / 29).
    assert difference(Score(1.0, 0.0, 30, answers=32), aime, 73.4).stderr == pytest.approx(
        8.205 * math.sqrt(2), abs=2e-3
    )
    assert main(["table", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("beside SDAR-30B-A3B-Sci-sampled (JetAstra/SDAR's README, part II)")
    rows = {line.split("  ")[0]: re_spaced(line) for line in lines[3:11]}
    assert rows["AIME 2024 (S)"] == "AIME 2024 (S) aime2024_sdar_s 30 70.0 ± 6.0 73.4 -3.4 ± 8.5, within chance"
    assert list(rows) == [column.title for column in SCI_COLUMNS[8:]]
    assert "aime2024_sdar_s: mean of 32 answers to each question; the error is over questions" in lines


def _sampled_run(folder: Path, task: str, metrics: dict[str, float], repeats: int, questions: int, model: str) -> Path:
    """A run of a task with several answers a question, whose standard errors are all 0.05."""
    results = _results({task: 0.0}, {task: questions})
    results["results"][task] = {"alias": task}
    filter_name = "last-box" if task.startswith("trado") else "opencompass"
    for name, value in metrics.items():
        results["results"][task] |= {f"{name},{filter_name}": value, f"{name}_stderr,{filter_name}": 0.05}
    results["configs"] = {task: {"repeats": repeats}}
    results["config"]["model_args"] = {"pretrained": model}
    return _write(folder, results)


def test_what_several_answers_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = {
        "math_verify": 0.7,
        "agreement": 0.6,
        "majority@32": 0.75,
        "pass@16": 0.8,
        "pass@2": 0.72,
        "pass@32": 0.9,
    }
    folder = _sampled_run(tmp_path, "aime2024_sdar_s", metrics, 32, 30, "JetLM/SDAR-30B-A3B-Sci")
    assert main(["table", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    (head,) = [number for number, line in enumerate(lines) if line.startswith("several answers")]
    assert re_spaced(lines[head]) == "several answers n pass@2, % pass@16, % pass@32, % agreement, % majority@n, %"
    values = "72.0 ± 5.0 80.0 ± 5.0 90.0 ± 5.0 60.0 ± 5.0 75.0 ± 5.0"
    assert re_spaced(lines[head + 1]) == f"aime2024_sdar_s 32 {values}"
    assert not any(line.startswith("not in a published table") for line in lines)
    assert main(["table", str(folder), "--json"]) == 0
    (table,) = json.loads(capsys.readouterr().out)
    (column,) = [column for column in table["columns"] if column["task"] == "aime2024_sdar_s"]
    assert column["answers"] == 32
    assert {each["name"]: each["value"] for each in column["several"]} == {
        name: value for name, value in metrics.items() if name != "math_verify"
    }


def test_a_trado_run_beside_the_published_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = {"is_equal": 0.7, "pass@3": 0.8, "majority@3": 0.74, "agreement": 0.6}
    folder = _sampled_run(tmp_path, "trado_math500", metrics, 3, 100, "JetLM/SDAR-4B-Chat")
    assert main(["table", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "SDAR-4B-Chat (arXiv" not in lines[0] and "dLLM-RL:SDAR-4B-Chat-dynamic (Gen-Verse/dLLM-RL's" in lines[0]
    (row,) = [re_spaced(line) for line in lines if line.startswith("MATH500 (dynamic)")]
    # The published score is as uncertain as the run's on 500 questions: 5 points * sqrt(100 / 500).
    stderr = math.hypot(5, 5 / math.sqrt(5))
    assert row == f"MATH500 (dynamic) trado_math500 100 70.0 ± 5.0 67.4 +2.6 ± {stderr:.1f}, within chance"
    assert "trado_math500 beside dLLM-RL:SDAR-4B-Chat-dynamic: 100 of 500 questions" in lines
    assert "trado_math500: mean of 3 answers to each question; the error is over questions" in lines


def test_runs_are_put_together(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of results of one model and the same settings the newest count; other models and settings are other tables."""
    first = _results({"gsm8k_sdar_paper": 0.1, "humaneval_sdar": 0.2}, {"gsm8k_sdar_paper": 10, "humaneval_sdar": 5})
    newer = _results({"gsm8k_sdar_paper": 0.05}, {"gsm8k_sdar_paper": 10}, date=2.0)
    ours = {"model": "sdar", "model_args": "dtype=float16", "sdar_lm_eval": {"pretrained": "JetLM/SDAR-8B-Chat"}}
    other = _results({"gsm8k_sdar_paper": 0.3}, {"gsm8k_sdar_paper": 30}, config=ours)
    as_text = {"model": "hf", "model_args": "pretrained=JetLM/SDAR-4B-Chat,dtype=float16"}
    oldest = _results({"gsm8k_sdar_paper": 0.4}, {"gsm8k_sdar_paper": 40}, config=as_text, date=0.5)
    tables = read_tables([_write(tmp_path, newer, first, other, oldest)])
    assert [(table.model, {task: s.value for task, s in table.scores.items()}) for table in tables] == [
        ("JetLM/SDAR-4B-Chat", {"gsm8k_sdar_paper": 0.4}),
        ("JetLM/SDAR-4B-Chat", {"gsm8k_sdar_paper": 0.05, "humaneval_sdar": 0.2}),
        ("JetLM/SDAR-8B-Chat", {"gsm8k_sdar_paper": 0.3}),
    ]
    assert len({table.title for table in tables}) == 3
    (told,) = caplog.messages
    assert re.fullmatch(r"gsm8k_sdar_paper: \S+model1/\S+ is left out; results_\S+ is newer\.", told)


def test_seeds_are_a_mean(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = []
    for seed, score in ((1, 0.5), (2, 0.7)):
        config = {"model": "sdar", "sdar_lm_eval": {"pretrained": "JetLM/SDAR-4B-Chat", "seed": seed}}
        of_tasks = {"gsm8k_sdar_paper": score, "mine": score}
        runs.append(_results(of_tasks, dict.fromkeys(of_tasks, 10), config=config))
    folder = _write(tmp_path, *runs)
    assert scores_of(folder)["gsm8k_sdar_paper"].value == pytest.approx(0.6)
    assert main(["table", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "gsm8k_sdar_paper: mean of 2 seeds; the error is that of one seed" in out  # there are no samples
    assert "mine: mean of 2 seeds; the error is unknown" in out  # the task is in no published table
    assert next(re_spaced(line) for line in out.splitlines() if line.startswith("mine ")).endswith(" 10 60.0")


def test_what_is_left_out_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = _results({"gsm8k_sdar_paper": 0.5, "hellaswag": 0.4}, {"gsm8k_sdar_paper": 10, "hellaswag": 9})
    assert main(["table", str(_write(tmp_path, results))]) == 0
    out = capsys.readouterr().out
    assert "not in a published table" in out and re_spaced(out.splitlines()[-5]).startswith(
        "hellaswag other none 9 50.0"
    )


def test_a_run_without_a_column(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`make demo` makes one."""
    folder = _write(tmp_path, _results({"gsm8k_sdar_demo": 0.5}, {"gsm8k_sdar_demo": 10}))
    assert main(["table", str(folder)]) == 0
    out = capsys.readouterr().out
    title, _, told, *_, row, _, legend = out.splitlines()
    assert title.endswith(f", {folder}") and told == (
        "No task of the run is a column of a published table. The groups sdar_bench, sdar_sci, sdar_sci_s, trado, "
        "trado_static and trado_think have the columns."
    )
    assert "gsm8k_sdar_demo" in row and legend == "± is one standard error." and "chance" not in out
    assert main(["table", str(folder), "--format", "markdown"]) == 0
    heading, _, paragraph, *_ = capsys.readouterr().out.splitlines()
    assert heading == f"## {escaped(title)}" and paragraph == escaped(told)


def test_what_json_lacks_is_null(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = _write(tmp_path, _results({"hellaswag": math.inf}, {"hellaswag": 9}))
    assert main(["table", str(folder), "--json"]) == 0
    (table,) = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert [(each["value"], each["questions"]) for each in table["others"]] == [(None, 9), (0.5, 9)]


def test_rows_of_other_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = _results({"gsm8k_sdar_paper": 0.85}, {"gsm8k_sdar_paper": 1319})
    results["config"]["sdar_lm_eval"] = {"decoding_of_tasks": {"gsm8k_sdar_paper": PAPER_SETTINGS}}
    words = [
        "table",
        str(_write(tmp_path, results)),
        "--published",
        "8B",
        "--published",
        "dLLM-RL:SDAR-8B-Chat-dynamic",
    ]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "91.3" in out and "90.4" in out
    (note,) = [line for line in out.splitlines() if line.startswith("gsm8k_sdar_paper beside dLLM-RL")]
    assert "temperature=0 (published: 1)" in note and "the source used other prompts and scorers" in note
    assert main([*words, "--json"]) == 0
    (table,) = json.loads(capsys.readouterr().out)
    gsm8k = next(column for column in table["columns"] if column["task"] == "gsm8k_sdar_paper")
    assert (gsm8k["score"], [row["score"] for row in gsm8k["published"]]) == (85.0, [91.3, 90.4])
    assert gsm8k["published"][0]["difference"] == pytest.approx(-6.3)


def test_what_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {
        "model": "sdar",
        "model_args": {},
        "sdar_lm_eval": {
            "pretrained": "JetLM/SDAR-4B-Chat",
            "decoding_of_tasks": {
                "gsm8k_sdar_paper": PAPER_SETTINGS
                | {"max_gen_toks": 512, "block_length": 8, "repetition_penalty": 1.2},
                "ifeval_sdar": PAPER_SETTINGS,
            },
        },
    }
    results = _results(
        {"gsm8k_sdar_paper": 0.85, "humaneval_sdar": 0.7, "ifeval_sdar": 0.57},
        {"gsm8k_sdar_paper": 1319, "humaneval_sdar": 20, "ifeval_sdar": 541},
        config=config,
    ) | {"n-shot": {"gsm8k_sdar_paper": 0, "humaneval_sdar": 3}}
    folder = _write(tmp_path, results)
    for width in (80, 60):
        text = render(read_tables([folder])[0], width)
        table = [line for line in text.splitlines()[1:] if not line.startswith(("gsm8k_sdar_paper", "humaneval_sdar"))]
        assert max(map(len, table)) <= width and text.count("LARGER than chance") == 1
    rows = [published("4B"), published("8B")]
    for width in (60, 80, 100):  # each verdict stands beside its difference, under the name of the published row
        text = render(read_tables([folder], rows)[0], width)
        for block in text.split("\n\n")[1:-1]:
            head, *body = block.splitlines()
            for line in body:
                assert all(
                    head[found.start() :].startswith("difference from SDAR-") for found in DIFFERENCE.finditer(line)
                )
        assert len(DIFFERENCE.findall(text)) == 6
    assert main(["table", str(folder), "--format", "markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "| column | task | questions | this run, % | SDAR-4B-Chat, % | difference |"
    assert lines[5] == "| GSM8K | gsm8k_sdar_paper | 1,319 | 85.0 ± 1.0 | 89.9 | -4.9 ± 1.3, LARGER than chance |"
    assert {line.count("|") for line in lines[2:11]} == {7} and lines[12].startswith(
        "- gsm8k_sdar_paper beside SDAR-4B"
    )
    assert main(["table", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"JetLM/SDAR-4B-Chat, {folder} beside SDAR-4B-Chat (arXiv 2510.06303, table 1)"
    rows = {line.split("  ")[0]: re_spaced(line) for line in lines[2:10]}
    assert rows["column"] == "column task questions this run, % SDAR-4B-Chat, % difference"
    assert rows["GSM8K"] == "GSM8K gsm8k_sdar_paper 1,319 85.0 ± 1.0 89.9 -4.9 ± 1.3, LARGER than chance"
    assert rows["HumanEval"] == "HumanEval humaneval_sdar 20 70.0 ± 10.5 72.0 -2.0 ± 11.1, within chance"
    assert rows["MATH500"] == "MATH500 math500_sdar not run 72.8"
    assert rows["MathBench"] == "MathBench mathbench_sdar not run 74.7"
    assert lines[11:13] == [
        "gsm8k_sdar_paper beside SDAR-4B-Chat: block_length=8 (published: 4); repetition_penalty=1.2 (published: 1); "
        "max_gen_toks=512 (published: 4096)",
        "humaneval_sdar beside SDAR-4B-Chat: 20 of 164 questions; num_fewshot=3 (published: 0)",
    ]
    assert lines[13] == "" and lines[14].startswith("± is one standard error.")
    assert "chance calls 1 of 20 differences LARGER" in " ".join(lines[14:])


def test_a_run_without_the_column_s_metric_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The published GSM8K column is scored by the released evaluation's rule, which older runs did not apply."""
    assert GSM8K.metric == "exact_match,opencompass"
    caplog.set_level("WARNING")
    older = _results({"gsm8k_sdar_paper": 0.5, "humaneval_sdar": 0.7}, {"gsm8k_sdar_paper": 9, "humaneval_sdar": 9})
    older["results"]["gsm8k_sdar_paper"] = {"exact_match,strict-match": 0.5}
    assert list(scores_of(_write(tmp_path, older))) == ["humaneval_sdar"]
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage().endswith(
        "has no exact_match,opencompass of gsm8k_sdar_paper, which the table needs. Evaluate the task again."
    )
    older["results"]["gsm8k_sdar_paper"] = {"bypass,strict-match": 999}
    scores_of(_write(tmp_path / "unscored", older))
    assert caplog.records[-1].getMessage().endswith("Evaluate the task again, without --predict_only.")


def re_spaced(line: str) -> str:
    return " ".join(line.split())


def test_a_model_that_is_not_published(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = _results({"gsm8k_sdar_paper": 0.85}, {"gsm8k_sdar_paper": 1319})
    results["config"]["model_args"] = {"pretrained": "/models/mine"}
    folder = str(_write(tmp_path, results))
    assert main(["table", folder]) == 0
    out = capsys.readouterr().out
    told = "No published model is named /models/mine. --published NAME compares with a published model."
    assert out.startswith(f"/models/mine, {folder}\n\n{told}\n")
    assert "85.0 ± 1.0" in out and "89.9" not in out
    assert main(["table", folder, "--published", "8B"]) == 0
    assert "91.3" in capsys.readouterr().out


def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def error_of(*words: str) -> str:
        assert main(["table", *words]) == 1
        return capsys.readouterr().err

    missing = str(tmp_path / "missing")
    assert error_of(missing) == (
        f"sdar_lm_eval: error: {missing!r} does not exist. Give what lm_eval's --output_path named.\n"
    )
    assert "holds no results file of lm_eval" in error_of(str(tmp_path))
    assert "'4' is unknown; choose 1.7B, 4B, 8B, 30B-A3B, SDAR-1.7B-Chat," in error_of("x", "--published", "4")
    (tmp_path / "samples.jsonl").write_text("{}\n{}\n")
    assert "samples.jsonl' holds no results file of lm_eval. Give what" in error_of(str(tmp_path / "samples.jsonl"))
    (tmp_path / "broken.json").write_text("{")
    assert "broken.json cannot be read" in error_of(str(tmp_path / "broken.json"))


def test_a_stray_file_blocks_no_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What cannot be read is named and passed over, unless the user named it; what is no file is never opened."""
    folder = _write(tmp_path, _results({"gsm8k_sdar_paper": 0.5}, {"gsm8k_sdar_paper": 10}))
    expected = scores_of(folder)
    for name, content in (("a", b"{"), ("b", b"\xff"), ("c", b"[" * 100_000), ("d", b'{"a": ' + b"9" * 5000 + b"}")):
        (folder / f"{name}.json").write_bytes(content)
    (folder / "e.json").write_text(json.dumps(_results({"gsm8k_sdar_paper": 0.1}, {}, date="yesterday")))
    (folder / "f.json").mkdir()
    os.mkfifo(folder / "g.json")
    caplog.clear()
    assert scores_of(folder) == expected
    assert [message.split(" cannot be read (")[0] for message in caplog.messages] == [
        str(folder / f"{name}.json") for name in "abcd"
    ]
    assert all(message.endswith("and is skipped.") for message in caplog.messages)
    for name in "abcd":
        with pytest.raises(UserError, match=f"{name}.json cannot be read"):
            read_tables([folder / f"{name}.json"])


@pytest.mark.parametrize(
    ("part", "content"),
    [
        ("n-samples", {}),
        ("config", None),
        ("results", {"gsm8k_sdar_paper": {GSM8K.metric: "N/A"}}),
    ],
)
def test_a_results_file_that_is_not_the_harness_s(part: str, content: Any, tmp_path: Path) -> None:
    results = _results({"gsm8k_sdar_paper": 0.5}, {"gsm8k_sdar_paper": 10}) | {part: content}
    with pytest.raises(UserError, match=r"model0.results_\S+\.json is not as lm_eval writes it .*Evaluate again"):
        read_tables([_write(tmp_path, results)])


def test_what_the_harness_writes_is_read(tmp_path: Path) -> None:
    """A real run of a column's task: its metric and filter are where the table looks for them."""
    import lm_eval
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.tasks import TaskManager

    import sdar_lm_eval.tasks

    data = tmp_path / "data"
    data.mkdir()
    (data / "test.jsonl").write_text('{"question": "1 + 1?", "answer": "#### 2"}\n' * 2)
    manager = TaskManager(
        include_path=str(Path(sdar_lm_eval.tasks.__file__).parent),
        include_defaults=False,
        metadata={"gsm8k_dir": str(data)},
    )
    tracker = EvaluationTracker(output_path=str(tmp_path / "out"))
    results = lm_eval.simple_evaluate(
        "sdar",
        model_args="pretrained=demo",
        tasks=["gsm8k_sdar_paper"],
        task_manager=manager,
        gen_kwargs={"max_gen_toks": 4},
        evaluation_tracker=tracker,
        log_samples=False,
    )
    tracker.save_results_aggregated(results=results, samples=None)
    (table,) = read_tables([tmp_path / "out"])
    scores, score = table.scores, table.scores["gsm8k_sdar_paper"]
    assert (table.model, list(scores), score.value, score.questions) == ("demo", ["gsm8k_sdar_paper"], 0.0, 2)
    assert (score.settings["max_gen_toks"], score.settings["denoising_steps"]) == (4, 4)
