"""Runs and comparisons as data frames."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from run_files import DATE, write_run
from support import environment

import sdar_lm_eval
from sdar_lm_eval import UserError, compare, read_run
from sdar_lm_eval.commands import main
from sdar_lm_eval.report.denoising import DenoisingLine, write_denoising
from sdar_lm_eval.report.frames import ANSWER_COLUMNS

A = {"task": {"acc,strict": [1, 0, 0], "acc,flexible": [1, 1, 0], "f1,strict": [0.5, 0.25, 1.0]}}
B = {"task": {"acc,strict": [1, 1, 0], "acc,flexible": [1, 1, 1], "f1,strict": [0.5, 0.5, 0.5]}}


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    return write_run(tmp_path / "a", A, beams=1), write_run(tmp_path / "b", B, beams=4, prompt="Please: ")


def test_scores(folders: tuple[Path, Path]) -> None:
    scores = read_run(folders[0]).scores.set_index(["task", "metric", "filter"])
    assert scores.loc[("task", "acc", "flexible"), "value"] == pytest.approx(2 / 3)
    assert list(scores["documents"]) == [3, 3, 3] and bool(scores["higher_is_better"].all())


def test_samples(folders: tuple[Path, Path]) -> None:
    run = read_run(str(folders[0]))
    samples = run.samples
    assert list(samples.columns[:7]) == ["task", "document", "filter", "repeat", "doc_hash", "acc", "f1"]
    strict = samples[samples["filter"] == "strict"]
    assert list(strict["acc"]) == [1, 0, 0] and list(strict["document"]) == [0, 1, 2]
    assert list(strict["response"]) == ["answer 1", "answer 0", "answer 0"] == list(strict["filtered"])
    assert samples.groupby("filter")["acc"].mean().to_dict() == pytest.approx({"strict": 1 / 3, "flexible": 2 / 3})
    assert list(strict["f1"]) == [0.5, 0.25, 1.0]
    assert samples["target"].unique() == ["gold"] and strict["prompt"].iloc[2] == "Question 2?"
    assert run.samples is samples
    assert "task" in repr(run) and "<table" in run._repr_html_()


def test_a_row_for_each_answer(tmp_path: Path) -> None:
    """Several answers in a line, and those of runs with other seeds."""
    for seed in (0, 1):
        folder = write_run(tmp_path, {"task": {"acc,none": [[1, 0], [1, 1]]}}, date=f"2026-01-0{seed + 1}T0", seed=seed)
        (file,) = folder.glob(f"samples_task_2026-01-0{seed + 1}*")
        lines = [json.loads(line) | {"resps": [["one", "two"]]} for line in file.read_text().splitlines()]
        file.write_text("\n".join(map(json.dumps, lines)))
    samples = read_run(tmp_path).samples
    first = samples[samples["document"] == 0]
    assert list(first["repeat"]) == [0, 1, 2, 3] and list(first["response"]) == ["one", "two"] * 2
    assert list(first["acc"]) == [1, 0, 1, 0]


def test_answers_have_how_they_were_written(folders: tuple[Path, Path]) -> None:
    line: DenoisingLine = {
        "document": 1, "repeat": 0, "block_length": 4, "prompt_tokens": 6, "token_ids": [7, 8, 9, 4, 5, 6],
        "texts": list("abcdef"), "steps": [0, 1, 0, 0, 2, 1], "confidences": [10000, 5000, 10000, 10000, 2000, 4000],
        "finish_reason": "stop", "forwards": {"prefill": 1, "denoising": 5, "commit": 2}, "seconds": 0.5,
    }  # fmt: skip
    assert read_run(folders[0]).answers.empty
    write_denoising(folders[0] / f"denoising_task_{DATE}.jsonl.gz", "task", [line])
    answers = read_run(folders[0]).answers
    assert tuple(answers.columns) == ANSWER_COLUMNS
    (row,) = answers.to_dict("records")
    assert (row["document"], row["tokens"], row["blocks"], row["denoising_steps"]) == (1, 6, 2, 5)
    assert (row["mean_confidence"], row["min_confidence"]) == pytest.approx((4.1 / 6, 0.2))
    assert (row["forwards_denoising"], row["finish_reason"], row["texts"]) == (5, "stop", tuple("abcdef"))


def test_answers_and_samples_number_repeats_alike(tmp_path: Path) -> None:
    """The first seed's answers came from a store without records, or are greedy and have one record for both."""
    for seed in (0, 1):
        folder = write_run(tmp_path, {"task": {"acc,none": [[1, 0]]}}, date=f"2026-01-0{seed + 1}T0", seed=seed)
        (file,) = folder.glob(f"samples_task_2026-01-0{seed + 1}*")
        line = json.loads(file.read_text()) | {"resps": [["one", "two"]]}
        line["arguments"] = {"gen_args_0": {"arg_0": "?", "arg_1": {}}}
        file.write_text(json.dumps(line) + "\n")
    record = dict.fromkeys(("steps", "confidences")) | {
        "document": 0, "block_length": 4, "prompt_tokens": 6, "token_ids": [7], "texts": ["a"], "finish_reason": "stop",
        "forwards": {"prefill": 1, "denoising": 5, "commit": 2}, "seconds": 0.5,
    }  # fmt: skip
    last = folder / file.name.replace("samples", "denoising").replace("jsonl", "jsonl.gz")
    write_denoising(last, "task", [{**record, "repeat": repeat} for repeat in (0, 1)])  # type: ignore[typeddict-item]
    assert list(read_run(tmp_path).answers["repeat"]) == [2, 3]


def test_commands_agree_on_a_run_of_several_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores = np.array([[1, 1, 0, 0, 1, 0, 1, 1], [1, 1, 0, 1, 1, 0, 1, 1], [1, 0, 0, 0, 1, 0, 1, 1]])
    tasks = {"gsm8k_sdar_paper": "exact_match,opencompass", "mine": "acc,none"}
    for seed, row in enumerate(scores):
        of_tasks = {task: {metric: row.tolist()} for task, metric in tasks.items()}
        write_run(tmp_path, of_tasks, date=f"2026-01-0{seed + 1}T0", seed=seed)
    of_documents = pd.Series(scores.mean(axis=0))
    value, stderr = of_documents.mean(), of_documents.sem()
    frame = read_run(tmp_path).scores
    assert list(frame["value"]) == pytest.approx([value] * 2) and list(frame["stderr"]) == pytest.approx([stderr] * 2)
    assert main(["table", str(tmp_path), "--published", "4B"]) == 0
    shown = f"{100 * value:.1f} ± {100 * stderr:.1f}"
    out = capsys.readouterr().out
    assert out.count(shown) == 2
    assert all(f"{task}: mean of 3 seeds; the error is over questions" in out for task in tasks)
    assert main(["show", str(tmp_path), "--task", "mine"]) == 0
    assert f"acc of none {shown}%; 8 of 8 documents" in capsys.readouterr().out


def test_a_comparison(folders: tuple[Path, Path]) -> None:
    found = compare(*folders)
    table = found.table.set_index(["metric", "filter"])
    assert table.loc[("acc", "strict"), "difference"] == pytest.approx(1 / 3)
    assert list(table["test"]) == ["exact McNemar", "exact McNemar", "paired t"]
    assert found.settings.loc["beams"].to_dict() == {"a": 1, "b": 4}
    assert found.warnings == ("task: the prompts of 3 of 3 documents differ.",)
    text, page = repr(found), found._repr_html_()
    for part in ("beams", "prompts of 3 of 3", "No difference shown: 3 documents cannot show one."):
        assert part in text and part in page
    assert "± is one standard error." in page and "detectable: the smallest true difference" in page
    assert list(found.changed()["document_a"]) == [1]
    assert list(found.changed(filter="flexible")["document_a"]) == [2]
    assert list(found.changed(metric="f1")["b"]) == [0.5, 0.5]
    assert list(compare(read_run(folders[0]), folders[1], metrics="f1").table["metric"]) == ["f1"]
    with pytest.raises(UserError, match="has no score f2"):
        found.changed(metric="f2")


def test_labels_are_no_html(tmp_path: Path) -> None:
    a, b = write_run(tmp_path / "<b>&", A), write_run(tmp_path / "b", B)
    assert "&lt;b&gt;&amp;" in compare(a, b)._repr_html_() and "<b>&" not in compare(a, b)._repr_html_()


def test_a_folder_of_several_runs(tmp_path: Path) -> None:
    write_run(tmp_path, A, date="2026-01-01T0", beams=1)
    write_run(tmp_path, A, date="2026-01-02T0", beams=4)
    with pytest.raises(
        UserError, match=r"holds 2 runs. Give label= a part of one of these: .*\(beams=1\); .*\(beams=4\)"
    ):
        read_run(tmp_path)
    with pytest.raises(UserError, match="holds no runs with label 'beams=5'"):
        read_run(tmp_path, "beams=5")
    with pytest.raises(UserError, match="holds 2 runs with label 'beams'"):
        read_run(tmp_path, "beams")
    assert compare(read_run(tmp_path, "beams=1"), read_run(tmp_path, "beams=4")).settings.loc["beams", "b"] == 4


def test_the_package_has_both_and_loads_pandas_only_for_them() -> None:
    assert {"compare", "read_run"} <= set(sdar_lm_eval.__all__)
    code = "import sys, sdar_lm_eval.commands.compare; print({'pandas', 'torch', 'lm_eval'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_each_of_several_answers_has_what_was_extracted_from_it(tmp_path: Path) -> None:
    folder = write_run(tmp_path, {"task": {"acc,all": [[1, 0]], "acc,first": [1]}})
    (file,) = folder.glob("samples*")
    kept = {"all": [["1", "2"]], "first": ["1"]}
    lines = [json.loads(line) | {"resps": [["one", "two"]]} for line in file.read_text().splitlines()]
    file.write_text("\n".join(json.dumps(each | {"filtered_resps": kept[each["filter"]]}) for each in lines))
    filtered = read_run(tmp_path).samples.fillna({"filtered": "missing"}).groupby("filter")["filtered"].apply(list)
    assert filtered.to_dict() == {"all": ["1", "2"], "first": ["1", "missing"]}
