"""`sdar_lm_eval compare` on runs that lm_eval made: of this package's models, and of a small one of transformers."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import random
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from run_files import evaluate, write_run
from scipy import stats
from scipy.stats import binomtest
from support import DEMO_CHECKPOINT, ROOT
from transformers import Qwen2Config, Qwen2ForCausalLM

from sdar_lm_eval.autoload import TASKS
from sdar_lm_eval.commands import main
from sdar_lm_eval.demo import PROBLEMS

DEMO = "gsm8k_sdar_demo"


def small_model(folder: Path, seed: int) -> Path:
    """A random model of transformers over the demo's tokenizer."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=1024, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, eos_token_id=0, bos_token_id=0,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(DEMO_CHECKPOINT / name, folder / name)
    return folder


def write_questions(folder: Path) -> None:
    """The data of arc_demo, wikitext_demo and the group mmlu_demo in tests/likelihood_tasks."""
    rng, problems = random.Random(0), [json.loads(line) for line in PROBLEMS.read_text().splitlines()][:60]
    for name in ("arc", "wikitext", "mmlu_two_steps", "mmlu_three_steps"):
        (folder / name).mkdir()
    for steps, number in (("two", 30), ("three", 20)):
        rows = []
        for problem in problems[:number]:
            choices = [f"{rng.randrange(100)} things" for _ in range(4)]
            rows.append(json.dumps({"question": problem["question"], "choices": choices, "answer": rng.randrange(4)}))
        for split in ("test", "validation"):
            (folder / f"mmlu_{steps}_steps" / f"{split}.jsonl").write_text("\n".join(rows))
    with (folder / "arc" / "test.jsonl").open("w") as arc, (folder / "wikitext" / "test.jsonl").open("w") as wikitext:
        for problem in problems:
            choices = {"text": [f"{rng.randrange(100)} things" for _ in range(4)], "label": ["A", "B", "C", "D"]}
            document = {"question": problem["question"], "choices": choices, "answerKey": rng.choice("ABCD")}
            arc.write(json.dumps(document) + "\n")
            wikitext.write(json.dumps({"page": problem["answer"]}) + "\n")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs by lm_eval, a folder each: 40 of the demo's problems at two thresholds, and small models of transformers."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lm_eval.evaluator.add_env_info", lambda _: None)  # slow, and of no interest here
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "datasets")
        for threshold in (0.2, 0.85):
            arguments = {"pretrained": "demo", "confidence_threshold": threshold}
            evaluate(folder / f"sdar-{threshold}", "sdar", arguments, limit=40)
        patch.chdir(folder)
        write_questions(folder)
        for seed in (0, 1):
            model = small_model(folder / "models" / str(seed), seed)
            arguments = {"pretrained": str(model), "dtype": "float32", "device": "cpu", "max_length": 512}
            short = {"limit": 10, "gen_kwargs": "max_gen_toks=4"}
            evaluate(folder / f"hf-{seed}", "hf", arguments, **short)
            scored = {"tasks": ["arc_demo", "wikitext_demo", "mmlu_demo"], "limit": None, "bootstrap_iters": 0}
            evaluate(
                folder / f"scores-{seed}",
                "hf",
                arguments,
                tasks_of=[TASKS, str(ROOT / "tests/likelihood_tasks")],
                **scored,
            )
    return folder


def told(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert main(["compare", *map(str, words)]) == 0
    return capsys.readouterr().out


def json_of(capsys: pytest.CaptureFixture[str], *words: object) -> list[dict[str, Any]]:
    content = json.loads(told(capsys, *words, "--json"))
    assert isinstance(content, list)
    return content


def test_two_thresholds_of_the_demo(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = runs / "sdar-0.2", runs / "sdar-0.85"
    (comparison,) = json_of(capsys, a, b, "--list")
    assert comparison["settings"] == {"confidence_threshold": {"a": 0.2, "b": 0.85}} and not comparison["warnings"]
    (found,) = comparison["differences"]
    only_a, only_b = found["only_a"], found["only_b"]
    assert (found["documents"], found["test"]) == (40, "exact McNemar") and only_b > 15 > 3 > only_a
    exact = binomtest(only_a, only_a + only_b).pvalue
    assert found["p"] == found["p_holm"] == pytest.approx(exact)
    assert found["b"] - found["a"] == pytest.approx((only_b - only_a) / 40)
    assert found["equal_filters"] == ["flexible-extract"] and len(found["changed"]) == only_a + only_b
    right = [(each["filtered_a"] == each["target"], each["filtered_b"] == each["target"]) for each in found["changed"]]
    assert sorted(right) == [(False, True)] * only_b + [(True, False)] * only_a
    text = told(capsys, a, b, "--list")
    assert f"A: {a}\nB: {b}\n" in text and "  confidence_threshold  0.2  0.85\n" in text
    other_way = f"{only_a or 'none'} the other way (p < 0.0001)."
    assert f"{DEMO}: B is better: {only_b} documents changed from wrong to right, {other_way}" in text
    assert sum("only B" in line and line.startswith("  ") for line in text.splitlines()) == only_b
    back = told(capsys, a, b, "--baseline", 2)
    assert f"B is worse: {only_b} documents changed from right to wrong, {other_way}" in back


def test_a_run_of_transformers_and_one_of_sdar(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (comparison,) = json_of(capsys, runs / "hf-0", runs / "sdar-0.85")
    paired, prompts = comparison["warnings"]
    assert paired == f"{DEMO}: 10 documents are in both runs and are compared; 30 only in run B."
    assert prompts == f"{DEMO}: the prompts of 10 of 10 documents differ."
    assert comparison["settings"]["model"] == {"a": "hf", "b": "sdar"}
    assert comparison["settings"]["confidence_threshold"] == {"a": None, "b": 0.85}
    (found,) = comparison["differences"]
    assert (found["a"], found["only_a"], found["documents"]) == (0.0, 0, 10)
    assert found["only_b"] == round(10 * found["b"]) > 6
    assert found["p"] == pytest.approx(2 * 0.5 ** found["only_b"])


def test_log_likelihoods(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = runs / "scores-0", runs / "scores-1"
    (comparison,) = json_of(capsys, a, b, "--list")
    found = {(each["task"], each["metric"]): each for each in comparison["differences"]}
    files = [next((runs / name).rglob("samples_arc_demo*")) for name in ("scores-0", "scores-1")]
    for metric in ("acc", "acc_norm"):
        each = found["arc_demo", metric]
        scores = [[json.loads(line)[metric] for line in file.read_text().splitlines()] for file in files]
        pairs = list(zip(*scores, strict=True))
        only_a, only_b = pairs.count((1.0, 0.0)), pairs.count((0.0, 1.0))
        assert (each["only_a"], each["only_b"], each["documents"]) == (only_a, only_b, 60) and only_a and only_b
        assert each["p"] == pytest.approx(stats.binomtest(only_a, only_a + only_b).pvalue)
        assert len(each["changed"]) == only_a + only_b
        assert all(one["filtered_a"].endswith("things") for one in each["changed"])
    for metric in ("word_perplexity", "byte_perplexity", "bits_per_byte"):
        each = found["wikitext_demo", metric]
        assert each["p"] is None and each["test"] == "the metric is not a mean over documents"
        assert each["difference"] == pytest.approx(each["b"] - each["a"]) != 0
    text = told(capsys, a, b)
    assert "wikitext_demo, word_perplexity: No test: the metric is not a mean over documents." in text
    assert "p (Holm)" in text
    assert "p (Holm)" not in told(capsys, a, b, "--tasks", "arc_demo", "--metric", "acc")


def test_a_group_of_tasks(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = runs / "scores-0", runs / "scores-1"
    (comparison,) = json_of(capsys, a, b, "--tasks", "mmlu_demo")
    (group,), tasks = comparison["groups"], comparison["differences"]
    assert group["task"] == "mmlu_demo" and sorted(each["documents"] for each in tasks) == [20, 30]
    for name in ("documents", "only_a", "only_b"):
        assert group[name] == sum(each[name] for each in tasks)
    assert group["a"] == pytest.approx(sum(each["a"] * each["documents"] for each in tasks) / 50)
    assert group["p"] == pytest.approx(stats.binomtest(group["only_a"], group["only_a"] + group["only_b"]).pvalue)
    assert group["p_holm"] == group["p"] and [each["family"] for each in tasks] == ["mmlu_demo"] * 2
    assert min(each["p_holm"] for each in tasks) == pytest.approx(min(1, 2 * min(each["p"] for each in tasks)))
    text = told(capsys, a, b, "--tasks", "mmlu_demo")
    assert text.index("mmlu_demo  ") < text.index("mmlu_demo_t")
    shutil.copytree(a, tmp_path / "a")
    (file,) = (tmp_path / "a").rglob("results*.json")
    content = json.loads(file.read_text())
    content["results"]["mmlu_demo"]["acc,none"] += 0.01
    file.write_text(json.dumps(content))
    why = "the group's value is a mean neither over documents nor over tasks"
    assert f"mmlu_demo: No test: {why}." in told(capsys, tmp_path / "a", b)


def test_a_group_that_weighs_its_tasks_equally(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("scores-0", "scores-1"):
        shutil.copytree(runs / name, tmp_path / name)
        (file,) = (tmp_path / name).rglob("results*.json")
        content = json.loads(file.read_text())
        tasks = content["group_subtasks"]["mmlu_demo"]
        content["results"]["mmlu_demo"]["acc,none"] = np.mean([content["results"][t]["acc,none"] for t in tasks])
        file.write_text(json.dumps(content))
    (comparison,) = json_of(capsys, tmp_path / "scores-0", tmp_path / "scores-1", "--tasks", "mmlu_demo")
    (group,), tasks = comparison["groups"], comparison["differences"]
    assert group["test"] == "paired t" and group["documents"] == 50
    for name in ("a", "b", "difference"):
        assert group[name] == pytest.approx(np.mean([each[name] for each in tasks]))
    for name in ("a_stderr", "b_stderr"):
        assert group[name] == pytest.approx(math.hypot(*(each[name] for each in tasks)) / 2)
    assert group["low"] < group["difference"] < group["high"]
    monkeypatch.setattr("sdar_lm_eval.report.compare.FEWEST_IN_STRATUM", 21)
    text = told(capsys, tmp_path / "scores-0", tmp_path / "scores-1", "--tasks", "mmlu_demo")
    assert re.search(
        r"mmlu_demo: No test: the group weighs its tasks equally, and mmlu_demo_t\S* has only 20 doc", text
    )


def test_all_runs_of_a_folder(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As a sweep leaves them: the first is the baseline, or the one that is named."""
    for name in ("sdar-0.2", "sdar-0.85", "hf-0"):
        shutil.copytree(runs / name, tmp_path / name)
    text = told(capsys, tmp_path)
    assert text.startswith(f"A: {tmp_path / 'sdar-0.2'}\n") and "\nB1: " in text and "\nB2: " in text
    assert "  setting " in text and "B2, gsm8k_sdar_demo: " in text and "p (Holm)" in text
    first, second = json_of(capsys, tmp_path, "--baseline", "sdar-0.85")
    assert "0.85" in first["a"] == second["a"]
    tests = [each["p"] for comparison in (first, second) for each in comparison["differences"]]
    adjusted = [each["p_holm"] for comparison in (first, second) for each in comparison["differences"]]
    assert adjusted[tests.index(min(tests))] == pytest.approx(2 * min(tests))


def test_formats(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = runs / "hf-0", runs / "sdar-0.85"
    text = told(capsys, a, b, "--format", "csv")
    (row,) = csv.DictReader(io.StringIO(text))
    (comparison,) = json_of(capsys, a, b)
    (found,) = comparison["differences"]
    assert (row["run_a"], row["run_b"], row["task"]) == (str(a), str(b), DEMO)
    assert (float(row["p"]), float(row["difference"])) == (found["p"], found["difference"])
    markdown = told(capsys, a, b, "--format", "markdown", "--list")
    rows = [line for line in markdown.splitlines() if line.startswith("|")]
    assert f"| {DEMO} | exact_match |" in markdown and "- Warning: gsm8k" in markdown
    assert len(rows) > 3 and all(line.endswith((" |", "---|")) for line in rows)
    monkeypatch.setenv("HOME", str(tmp_path))  # the shell leaves the ~ of --output=~/out.csv
    said = told(capsys, a, b, "--format", "csv", "--output=~/out.csv")
    assert (tmp_path / "out.csv").read_text() == text and said.endswith("Written to ~/out.csv.\n")


def test_mistakes(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = runs / "sdar-0.2", runs / "sdar-0.85"

    def error_of(*words: object) -> str:
        assert main(["compare", *map(str, words)]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert "is one run, and compare takes two or more. Name another" in error_of(a)
    assert "is one run" in error_of(a, a)
    assert "--baseline 3 is no run; choose 1: " in error_of(a, b, "--baseline", 3)
    assert "--baseline sdar fits several runs; choose 1: " in error_of(a, b, "--baseline", "sdar")
    assert "--tasks gsm8k: the runs do not share this task; choose gsm8k_sdar_demo." in error_of(
        a, b, "--tasks", "gsm8k"
    )
    assert "--metric acc: the runs share no such score; choose from exact_match of" in error_of(a, b, "--metric", "acc")
    assert "--list has no CSV form" in error_of(a, b, "--list", "--format", "csv")
    assert "cannot be written" in error_of(a, b, "--output", tmp_path / "no" / "out")
    assert "does not exist" in error_of(a, tmp_path / "missing")
    assert "share no task" in error_of(a, runs / "scores-0")


def test_folders_that_hold_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Half-written, foreign and huge files: one line each, and a run beside them is read."""
    good = write_run(tmp_path / "good", {"task": {"acc,none": [0, 1]}})
    cases = {"cut": '{"results": {"task": {"acc,no', "foreign": '[{"results": 1}]', "other": '{"a": 1}', "binary": "\0"}
    for name, text in cases.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "results_2026.json").write_text(text)
        assert main(["compare", str(good), str(tmp_path / name)]) == 1
        assert "holds no results file of lm_eval" in capsys.readouterr().err
    huge = tmp_path / "other" / "huge.json"
    with huge.open("w") as file:
        file.truncate(10**12)  # a hole: takes no space
    assert main(["compare", str(good), str(huge)]) == 1
    assert "1,000,000,000,000 bytes" in capsys.readouterr().err
    os.mkfifo(tmp_path / "pipe.json")
    assert main(["compare", str(good), str(tmp_path / "pipe.json")]) == 1
    other = write_run(tmp_path / "other", {"task": {"acc,none": [1, 1]}})
    assert "2 documents cannot show one" in told(capsys, good, other)


def test_only_a_terminal_has_a_width(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, scores in (("a", [1, 0]), ("b", [1, 1])):
        write_run(tmp_path / name, {"task": {"acc,none": scores}})
    monkeypatch.setenv("COLUMNS", "80")
    words = ["compare", str(tmp_path / "a"), str(tmp_path / "b")]
    assert main(words) == 0
    in_file = capsys.readouterr().out
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert main(words) == 0
    in_terminal = capsys.readouterr().out
    assert "metric  filter  documents" in in_file and "metric        acc\n" in in_terminal
    file = tmp_path / "comparison.txt"
    assert main([*words, "--output", str(file)]) == 0 and file.read_text("utf-8") == in_file
