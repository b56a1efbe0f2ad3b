"""Metrics of several answers are told by their names, as tasks/repeated.py makes them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from scipy import stats
from written_runs import write_answers

from sdar_lm_eval.commands import main
from sdar_lm_eval.report.compare import compare_runs
from sdar_lm_eval.report.runs import read_runs
from sdar_lm_eval.report.several import is_better_when_higher, is_of_several, smaller_passes
from sdar_lm_eval.tasks.repeated import metrics


def test_names_are_those_of_the_tasks() -> None:
    for n in (2, 3, 8, 32):
        names = list(metrics("acc", [1.0] * n, ["x"] * n))
        assert [name for name in names if is_of_several(name)] == names[1:]
        assert smaller_passes(names) == {f"pass@{k}" for k in (2, 4, 8, 16) if k < n}
        assert [name for name in names if is_better_when_higher(name, None) is None] == ["acc", "agreement"]
        assert is_better_when_higher("agreement", True) is None and is_better_when_higher("acc", False) is False
    assert not is_of_several("pass@1") and not smaller_passes(["pass@1", "pass@2"])


def _with_several(folder: Path, scores: list[list[float]], seed: int) -> Path:
    """A run whose documents have these scores of several answers, as the tasks write them."""
    write_answers(folder, [["7"] * len(of_doc) for of_doc in scores], settings={"seed": seed})
    (file,) = folder.rglob("results_*.json")
    results = json.loads(file.read_text())
    (samples,) = folder.rglob("samples_*.jsonl")
    found = [metrics("exact_match", of_doc, ["5" if score == 0 else "7" for score in of_doc]) for of_doc in scores]
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    for line in lines:
        line.update(found[line["doc_id"]])
    samples.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    of_task = results["results"]["gsm8k_sdar"]
    for name in found[0]:
        for filter_name in ("strict-match", "flexible-extract"):
            of_task[f"{name},{filter_name}"] = sum(each[name] for each in found) / len(found)
            of_task[f"{name}_stderr,{filter_name}"] = 0.05
    file.write_text(json.dumps(results))
    return folder


A = [[1, 1, 0, 1], [0, 0, 0, 1], [1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 1, 0], [1, 1, 1, 0], [0, 1, 0, 0], [1, 1, 1, 1]]
B = [[1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0], [0, 1, 1, 0], [0, 1, 0, 0], [1, 0, 1, 1]]


def test_compare_pairs_the_documents(tmp_path: Path) -> None:
    """A document's answers are one value, so the test is scipy's paired t test over documents."""
    for name, scores in (("a", A), ("b", B)):
        _with_several(tmp_path / name, [list(map(float, each)) for each in scores], 1)
    a, b = read_runs([tmp_path / "a", tmp_path / "b"])
    found = {each.metric: each for each in compare_runs(a, b).differences}
    assert list(found) == ["exact_match", "pass@4", "majority@4", "agreement"]
    for name in ("exact_match", "agreement"):
        values = [[metrics("exact_match", of_doc, of_doc)[name] for of_doc in scores] for scores in (A, B)]
        test = stats.ttest_rel(values[1], values[0])
        differ = sum(x != y for x, y in zip(*values, strict=True))
        assert found[name].p == pytest.approx(max(test.pvalue, 2 / 2**differ))  # as `compare_means` says
        assert (found[name].low, found[name].high) == pytest.approx(tuple(test.confidence_interval()))
        assert found[name].a_stderr == pytest.approx(stats.sem(values[0]))
    assert found["pass@4"].only_a == 1 and found["pass@4"].only_b == 0  # 0 or 1: McNemar's test
    assert found["majority@4"].higher_is_better and found["agreement"].higher_is_better is None
    (smaller,) = compare_runs(a, b, metrics=["pass@2"]).differences
    assert smaller.metric == "pass@2" and smaller.documents == 8


def test_runs_of_more_and_of_fewer_answers_are_compared_by_the_largest_pass_of_both(tmp_path: Path) -> None:
    for name, number in (("a", 4), ("b", 2)):
        _with_several(tmp_path / name, [list(map(float, each[:number])) for each in A], 1)
    a, b = read_runs([tmp_path / "a", tmp_path / "b"])
    assert [each.metric for each in compare_runs(a, b).differences] == ["exact_match", "pass@2", "agreement"]


def test_the_report_and_the_table_show_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _with_several(tmp_path / "a", [list(map(float, each)) for each in A], 1)
    assert main(["table", str(tmp_path / "a")]) == 0
    assert "pass@4" in capsys.readouterr().out
    assert main(["report", str(tmp_path / "a"), "-o", str(tmp_path / "report.html")]) == 0
    assert all(name in (tmp_path / "report.html").read_text() for name in ("pass@4", "majority@4", "agreement"))


def test_thoughts_and_the_number_of_answers_are_settings(tmp_path: Path) -> None:
    """Runs that differ in them are told apart: none stands for the other, and none is a repeat of the other."""
    for date, (thinking, repeats) in enumerate([({}, 1), ({"max_thinking_toks": 4096}, 1), ({}, 8)], 1):
        folder = write_answers(tmp_path / "runs" / str(date), [["7"] * repeats, ["5"] * repeats], date=date)
        (file,) = folder.rglob("results_*.json")
        content = json.loads(file.read_text())
        content["config"]["sdar_lm_eval"] |= {"thinking": thinking} if thinking else {}
        content["configs"]["gsm8k_sdar"]["repeats"] = repeats
        file.write_text(json.dumps(content))
    plain, limited, several = read_runs([tmp_path / "runs"])
    assert compare_runs(plain, limited).settings == {"max_thinking_toks": (None, 4096)}
    assert compare_runs(plain, several).settings == {"repeats": (None, 8)}
