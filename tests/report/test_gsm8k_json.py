from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from run_files import evaluate

from sdar_lm_eval.commands import main
from sdar_lm_eval.report.gsm8k_json import convert


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lm_eval.evaluator.add_env_info", lambda _: None)
        patch.setattr("lm_eval.evaluator.add_tokenizer_info", lambda *_: None)  # dummy's is on the hub
        (folder / "ours").mkdir()
        trace = {"pretrained": "demo", "trace": str(folder / "ours" / "trace.jsonl"), "confidence_threshold": 0.7}
        ours = evaluate(folder / "ours", "sdar", trace, gen_kwargs="max_gen_toks=40")
        evaluate(folder / "dummy", "dummy", {})
        evaluate(folder / "silent", "dummy", {}, log_samples=False)
        two = ["gsm8k_sdar_demo", "gsm8k_sdar_hash"]
        data = folder / "data"
        data.mkdir()
        (data / "test.jsonl").write_text('{"question": "1 + 1?", "answer": "#### 2"}\n' * 2)
        patch.setenv("SDAR_GSM8K_DIR", str(data))
        evaluate(folder / "two", "dummy", {}, tasks=two)
    return folder, ours


def test_a_run_of_ours(runs: Any) -> None:
    folder, results = runs
    content = convert(folder / "ours")
    scores = results["results"]["gsm8k_sdar_demo"]
    metrics = content["metrics"]
    assert metrics["accuracy"] == scores["exact_match,flexible-extract"] == metrics["correct"] / 6
    assert metrics["stderr"] == scores["exact_match_stderr,flexible-extract"]
    assert (metrics["total"], metrics["filter"]) == (6, "flexible-extract")
    assert metrics["percentage"] == f"{100 * metrics['correct'] / 6:.2f}%"
    assert metrics["by_filter"]["strict-match"]["accuracy"] == scores["exact_match,strict-match"]
    config = content["config"]
    assert (config["model_name"], config["engine"], config["task"]) == ("demo", "native", "gsm8k_sdar_demo")
    assert (config["max_gen_length"], config["confidence_threshold"], config["temperature"]) == (40, 0.7, 0.0)
    assert config["versions"].keys() >= {"sdar_lm_eval", "lm_eval", "torch", "transformers", "python"}
    assert config["gpu"] is None
    assert content["performance"]["tokens_per_second"] > 0
    first = content["results"][0]
    assert set(first) == {
        "idx", "question", "ground_truth", "generated_text", "predicted_answer", "correct", "generation_time",
        "tokens_per_second",
    }  # fmt: skip
    assert [result["idx"] for result in content["results"]] == list(range(6))
    assert sum(result["correct"] for result in content["results"]) == metrics["correct"]
    _, *lines = map(json.loads, (folder / "ours" / "trace.jsonl").open())
    traced = {line["document"]: line for line in lines}
    for result in content["results"]:
        line = traced[result["idx"]]
        assert (result["generated_text"], result["generation_time"]) == (line["text"], line["seconds"])
        assert result["tokens_per_second"] == pytest.approx(line["new_tokens"] / line["seconds"], abs=0.06)
        assert result["correct"] == (result["predicted_answer"] == result["ground_truth"])


def test_stored_answers_count_as_computed_ones_do(runs: Any, tmp_path: Path) -> None:
    whole = convert(runs[0] / "ours")["performance"]
    ours = {"pretrained": "demo", "confidence_threshold": 0.7, "answers": str(tmp_path / "answers")}
    for limit in (2, 6):
        evaluate(tmp_path / str(limit), "sdar", ours, gen_kwargs="max_gen_toks=40", limit=limit)
    resumed = convert(tmp_path / "6")["performance"]
    assert resumed["new_tokens"] == whole["new_tokens"]
    assert resumed["tokens_per_forward"] == whole["tokens_per_forward"]
    assert resumed["total_seconds"] > 0
    assert resumed["seconds_per_question"] == pytest.approx(resumed["total_seconds"] / 6, abs=0.01)


def test_another_model_s_run_has_what_lm_eval_knows(runs: Any) -> None:
    content = convert(runs[0] / "dummy", filter_name="strict-match")
    assert content["metrics"]["accuracy"] == 0.0 and content["metrics"]["filter"] == "strict-match"
    assert (content["config"]["engine"], content["config"]["max_gen_length"]) == ("dummy", 128)
    assert (content["config"]["block_length"], content["config"]["temperature"]) == (None, 0.0)
    assert content["results"][0]["generation_time"] is None and content["performance"]["tokens_per_second"] is None
    json.dumps(content, allow_nan=False)


def test_a_time_of_another_answer_is_not_taken(runs: Any, tmp_path: Path) -> None:
    """A trace that a run with other settings went on writing to."""
    folder = tmp_path / "run"
    for path in (runs[0] / "dummy").rglob("*.json*"):
        (folder / path.name).parent.mkdir(exist_ok=True)
        (folder / path.name).write_bytes(path.read_bytes())
    line = {"task": "gsm8k_sdar_demo", "document": 0, "repeat": 0, "text": "other", "seconds": 1.0, "new_tokens": 5}
    (folder / "trace.jsonl").write_text(json.dumps(line) + "\n")
    assert convert(folder)["results"][0]["generation_time"] is None
    line["text"] = convert(folder)["results"][0]["generated_text"]
    (folder / "trace.jsonl").write_text(json.dumps(line) + "\n")
    assert convert(folder)["results"][0]["tokens_per_second"] == 5.0


def test_the_command(runs: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(runs[0] / "ours")
    assert main(["gsm8k-json", folder]) == 0
    assert json.loads(capsys.readouterr().out) == convert(Path(folder))
    output = tmp_path / "out.json"
    assert main(["gsm8k-json", folder, "--output", str(output)]) == 0
    metrics = convert(Path(folder))["metrics"]
    assert capsys.readouterr().out == f"{output}: {metrics['percentage']} ({metrics['correct']}/6)\n"
    assert json.loads(output.read_text()) == convert(Path(folder))
    assert main(["gsm8k-json", str(runs[0] / "two"), "--task", "gsm8k_sdar_hash"]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"]["total"] == 2


def test_mistakes(runs: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = runs[0]

    def error_of(*words: str) -> str:
        assert main(["gsm8k-json", *words]) == 1
        return capsys.readouterr().err

    assert "does not exist. Give what" in error_of(str(tmp_path / "missing"))
    assert "holds no results file of lm_eval" in error_of(str(tmp_path))
    assert "has no samples (--log_samples): the run was of gsm8k_sdar_demo" in error_of(str(folder / "silent"))
    two = str(folder / "two")
    assert "has several tasks of GSM8K; give --task gsm8k_sdar_demo or gsm8k_sdar_hash." in error_of(two)
    assert "has no task 'gsm8k_sdar_demi' of GSM8K" in error_of(two, "--task", "gsm8k_sdar_demi")
    told = error_of(str(folder / "ours"), "--filter", "strict")
    assert "choose strict-match, flexible-extract. Did you mean 'strict-match'?" in told
    for name in ("ours", "dummy"):
        shutil.copytree(folder / name, tmp_path / "mixed" / name)
    assert "mixed' holds 2 runs. Name the results file or the folder of one:" in error_of(str(tmp_path / "mixed"))
    told = error_of(str(folder / "ours"), "--output", str(tmp_path / "no" / "out.json"))
    assert "cannot be written: No such file or directory. Name another file." in told


def test_a_line_that_a_killed_run_left_unfinished(runs: Any, tmp_path: Path) -> None:
    folder, _ = runs
    whole = convert(folder / "ours")
    shutil.copytree(folder / "ours", tmp_path / "ours")
    with (tmp_path / "ours" / "trace.jsonl").open("a") as trace:
        trace.write('{"task": "gsm8k_sdar_demo", "docu')
    assert convert(tmp_path / "ours") == whole


def test_a_reader_that_has_seen_enough(runs: Any) -> None:
    folder, _ = runs
    command = [sys.executable, "-m", "sdar_lm_eval", "gsm8k-json", str(folder / "ours")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0
