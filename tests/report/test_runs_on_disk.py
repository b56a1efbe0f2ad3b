"""Which results files are one run, how runs are called, and what is told of their seeds."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from sdar_lm_eval.report.columns import main_metric
from sdar_lm_eval.report.compare import compare_runs
from sdar_lm_eval.report.page.overview import settings_rows
from sdar_lm_eval.report.runs import Metric, read_runs

TASK = "riddles"


def write(folder: Path, seed: int = 1, right: tuple[int, ...] = (1, 0, 1), **decoding: Any) -> Path:
    folder.mkdir(parents=True)
    ours = {"pretrained": "demo", "seed": seed, "decoding_of_tasks": {TASK: decoding}}
    results = {
        "results": {TASK: {"acc,none": sum(right) / len(right), "acc_stderr,none": 0.1}},
        "n-samples": {TASK: {"effective": len(right)}}, "date": float(seed),
        "config": {"model": "sdar", "random_seed": seed, "sdar_lm_eval": ours},
    }  # fmt: skip
    (folder / "results_1.json").write_text(json.dumps(results))
    lines = [
        {"doc_id": i, "doc": {}, "target": "", "filter": "none", "resps": [["x"]], "filtered_resps": ["x"],
         "doc_hash": str(i), "prompt_hash": "p", "acc": score}
        for i, score in enumerate(right)
    ]  # fmt: skip
    (folder / f"samples_{TASK}_1.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_folders_name_runs_that_they_tell_apart(tmp_path: Path) -> None:
    for threshold in (0.5, 0.9):
        write(tmp_path / f"threshold={threshold}" / "demo", confidence_threshold=threshold)
    assert [run.label for run in read_runs([tmp_path])] == [str(tmp_path / f"threshold={t}") for t in (0.5, 0.9)]


def test_seeds_below_a_run_s_folder_leave_the_run_its_name(tmp_path: Path) -> None:
    """As a sweep with --repeats leaves them: only drawn answers have several seeds."""
    write(tmp_path / "static" / "riddles", temperature=0.0)
    for seed in (1, 2, 3):
        write(tmp_path / "random" / f"riddles-seed-{seed}", seed, temperature=1.0)
    runs = read_runs([tmp_path])
    assert {run.label: len(run.results) for run in runs} == {str(tmp_path / "static"): 1, str(tmp_path / "random"): 3}


def test_settings_name_runs_of_one_folder(tmp_path: Path) -> None:
    write(tmp_path / "demo", confidence_threshold=0.5)
    other = write(tmp_path / "other", confidence_threshold=0.9)
    for file in other.iterdir():
        shutil.move(file, tmp_path / "demo" / file.name.replace("_1.", "_2."))
    other.rmdir()
    labels = [run.label for run in read_runs([tmp_path])]
    assert labels == [f"{tmp_path} (confidence_threshold={t})" for t in (0.5, 0.9)]


def test_seeds_are_pooled_and_told(tmp_path: Path) -> None:
    for seed in (1, 2, 3):
        write(tmp_path / "sampled" / str(seed), seed, temperature=1.0)
    (a,), (b,) = read_runs([write(tmp_path / "greedy", 1234, temperature=0.0)]), read_runs([tmp_path / "sampled"])
    assert len(b.of_tasks[TASK]) == 3 and b.told(TASK)["seed"] == "1, 2, 3"
    settings = compare_runs(a, b).settings
    assert settings == {"seed": (1234, "1, 2, 3"), "temperature": (0.0, 1.0)}


def test_seeds_that_all_repeats_share_do_not_differ(tmp_path: Path) -> None:
    """lm_eval has four seeds, and a sweep repeats with other values of one of them."""
    for seed in (1, 2):
        write(tmp_path / "sampled" / str(seed), seed)
    write(tmp_path / "once")
    for file in tmp_path.rglob("results*.json"):
        content = json.loads(file.read_text())
        content["config"] |= {"numpy_seed": 5, "fewshot_seed": 6}
        file.write_text(json.dumps(content))
    (a,), (b,) = read_runs([tmp_path / "once"]), read_runs([tmp_path / "sampled"])
    assert compare_runs(a, b).settings == {"seed": (1, "1, 2")}
    differing, _ = settings_rows([a, b], [TASK])
    assert ("seed", ("1", "1, 2")) in [(row.name, row.of_runs) for row in differing]


def test_a_metric_that_is_no_mean_is_pooled_over_seeds_too(tmp_path: Path) -> None:
    for seed in (1, 2):
        file = write(tmp_path / "sampled" / str(seed), seed) / "results_1.json"
        content = json.loads(file.read_text())
        content["results"][TASK] = {"acc,none": float(seed), "acc_stderr,none": 0.1}
        file.write_text(json.dumps(content))
    (a,), (b,) = read_runs([write(tmp_path / "once")]), read_runs([tmp_path / "sampled"])
    (row,) = compare_runs(a, b).differences
    assert (row.p, row.b, row.b_stderr) == (None, 1.5, None)


def test_seeds_of_another_model_are_told_by_lm_evals_name(tmp_path: Path) -> None:
    for seed in (1, 2):
        file = write(tmp_path / str(seed), seed) / "results_1.json"
        content = json.loads(file.read_text())
        del content["config"]["sdar_lm_eval"]
        file.write_text(json.dumps(content))
    (run,) = read_runs([tmp_path])
    told = run.told(TASK)
    assert told["random_seed"] == "1, 2" and "seed" not in told


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("kernels", (False, True)),
        ("reproducible", (False, True)),
        ("dtype", ("float32", "float16")),
        ("tensor_parallel_size", (1, 2)),
        ("answer_options", ({"quantization": "fp8"}, {"quantization": "int4"})),
    ],
)
def test_engine_options_are_no_repeats(option: str, values: tuple[Any, Any], tmp_path: Path) -> None:
    """Results of two options in one folder are two runs, whatever their seeds."""
    for seed, value in zip((1, 2), values, strict=True):
        (file,) = write(tmp_path / str(seed), seed, temperature=1.0).glob("results*")
        content = json.loads(file.read_text())
        content["config"]["sdar_lm_eval"][option] = value
        file.write_text(json.dumps(content))
    assert [len(run.of_tasks[TASK]) for run in read_runs([tmp_path])] == [1, 1]


def written_with(folder: Path, **content: Any) -> Path:
    """A run whose results file has other content, and whose model has other model_args or facts of its own."""
    (file,) = write(folder, temperature=0.0).glob("results*")
    written = json.loads(file.read_text())
    written["config"] |= content.pop("config", {})
    written["config"]["sdar_lm_eval"] |= content.pop("ours", {})
    file.write_text(json.dumps(written | content))
    return folder


@pytest.mark.parametrize(("shots", "runs"), [(5, 2), (0, 1)])
def test_examples_in_one_turn_or_in_several_are_two_runs(shots: int, runs: int, tmp_path: Path) -> None:
    for name, several in (("a", None), ("b", True), ("c", False)):
        written_with(tmp_path / name, **{"n-shot": {TASK: shots}, "fewshot_as_multiturn": several})
    assert len(read_runs([tmp_path])) == runs


def test_model_args_beside_the_scores_are_no_settings_of_log_likelihoods(tmp_path: Path) -> None:
    runs = [
        written_with(
            tmp_path / name,
            config={"model_args": {"pretrained": "demo", "answers": name, "batch_size": len(name)}},
            ours={"decoding_of_tasks": {}, "decoding": {"block_length": length, "max_gen_toks": 5}},
        )
        for name, length in (("a", 4), ("bb", 4), ("ccc", 8))
    ]
    a, b, c = (read_runs([run])[0] for run in runs)
    assert compare_runs(a, b).settings == {}
    assert compare_runs(a, c).settings == {"block_length": (4, 8)}


def test_results_of_predict_only_do_not_replace_scores(tmp_path: Path) -> None:
    write(tmp_path / "scored", temperature=0.0)
    (file,) = write(tmp_path / "predicted", temperature=0.0).glob("results*")
    predicted = {"results": {TASK: {"bypass,none": 999}}, "configs": {TASK: {"metric_list": [{"metric": "bypass"}]}}}
    file.write_text(json.dumps(json.loads(file.read_text()) | predicted | {"date": 2.0}))
    (scored,), (predicted,) = (run.metrics(TASK) for run in read_runs([tmp_path]))
    assert (scored.name, predicted.name) == ("acc", "bypass") and math.isnan(predicted.value)  # 999 is no score


def test_a_run_that_is_named_twice_counts_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "a", temperature=0.0)
    write(tmp_path / "b", temperature=1.0)
    assert len(read_runs([tmp_path, tmp_path / "b"])) == 2
    assert "is named twice, and counts once." in caplog.text


def test_the_metric_that_counts() -> None:
    """The published column's, else the task's first; not the one that live accuracy shows."""
    found = [
        Metric("exact_match", name, 0.5, None, True) for name in ("strict-match", "flexible-extract", "opencompass")
    ]
    for task, name in (("gsm8k_sdar_paper", "opencompass"), ("gsm8k_sdar_demo", "strict-match")):
        metric = main_metric(task, found)
        assert metric is not None and metric.filter == name
    assert main_metric(TASK, []) is None
