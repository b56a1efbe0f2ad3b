"""What comparisons say in words and tables."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import written_runs
from run_files import write_run

from sdar_lm_eval.report.changed import ChangedDocument, changed_documents
from sdar_lm_eval.report.compare import Comparison, Difference, compare_runs
from sdar_lm_eval.report.compare_text import as_json, as_markdown, as_text, sentences, table, verdict
from sdar_lm_eval.report.runs import Run, differing, read_runs

CALLED = Difference(
    task="task", metric="acc", filter="none", a=0.5, a_stderr=0.02, b=0.55, b_stderr=0.02, difference=0.05, low=0.01,
    high=0.09, p=0.012, p_holm=0.012, test="exact McNemar", documents=1000, only_a=100, only_b=150, detectable=0.045,
    higher_is_better=True,
)  # fmt: skip
MEANS: dict[str, Any] = {"only_a": None, "only_b": None, "test": "paired t"}
RUNS = (Run("a", Path("a")), Run("b", Path("b")))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "B is better: 150 documents changed from wrong to right, 100 the other way (p = 0.012)."),
        (
            {"p_holm": 0.036},
            "B is better: 150 documents changed from wrong to right, 100 the other way (p = 0.012; 0.036 after Holm's "
            "adjustment).",
        ),
        (
            {"p_holm": 0.036, "family": "mmlu"},
            "B is better: 150 documents changed from wrong to right, 100 the other way (p = 0.012; 0.036 after Holm's "
            "adjustment; exploratory, within mmlu).",
        ),
        (
            {"p_holm": 0.12},
            "B may be better: 150 documents changed from wrong to right, 100 the other way (p = 0.012; 0.12 after "
            "Holm's adjustment for the number of tests).",
        ),
        (
            {"difference": -0.05, "only_a": 8, "only_b": 0, "p": 1e-9, "p_holm": 1e-9},
            "B is worse: 8 documents changed from right to wrong, none the other way (p < 0.0001).",
        ),
        (
            {"higher_is_better": False, "only_a": 150, "only_b": 100},
            "B is worse: 150 documents changed from right to wrong, 100 the other way (p = 0.012).",
        ),
        (MEANS, "B is better: by 5.0 points (p = 0.012)."),
        ({**MEANS, "higher_is_better": False}, "B is worse: by 5.0 points (p = 0.012)."),
        ({"higher_is_better": None}, "B is higher: by 5.0 points (p = 0.012)."),
        ({**MEANS, "a": 12.5, "b": 15.0, "difference": 2.5}, "B is better: by 2.5 (p = 0.012)."),
        (
            {"p": 0.2, "p_holm": 0.2},
            "No difference shown: with 1,000 documents, a true difference of 4.5 points has p below 0.05 in 80% of "
            "cases.",
        ),
        ({"p": 1.0, "p_holm": 1.0, "documents": 5, "detectable": None},
         "No difference shown: 5 documents cannot show one."),
        ({**MEANS, "p": 1.0, "p_holm": 1.0, "detectable": None},
         "No difference shown: both runs have the same score in each of 1,000 documents."),
        ({"p": None, "p_holm": None, "test": "the reason"}, "No test: the reason."),
    ],
)  # fmt: skip
def test_verdicts(changes: dict[str, Any], expected: str) -> None:
    assert verdict(dataclasses.replace(CALLED, **changes)) == expected


def comparison(*differences: Difference, **settings: tuple[object, object]) -> Comparison:
    return Comparison(*RUNS, settings, (), differences)


def test_many_tests_that_call_nothing_share_a_sentence() -> None:
    silent = [dataclasses.replace(CALLED, task=f"task{i}", p=0.5, p_holm=1.0) for i in range(9)]
    first, second = sentences([comparison(CALLED, *silent)])
    assert first.startswith("task: B is better") and second == (
        "9 of 10 scores: No difference shown after Holm's adjustment."
    )


def test_a_sentence_names_what_tells_it_apart() -> None:
    f1, strict = dataclasses.replace(CALLED, metric="f1"), dataclasses.replace(CALLED, filter="strict")
    starts = [line.partition(":")[0] for line in sentences([comparison(CALLED, f1, strict)])]
    assert starts == ["task, acc, none", "task, f1", "task, acc, strict"]


def test_columns_that_say_something() -> None:
    assert "p (Holm)" not in table([comparison(CALLED)])[0]
    assert table([comparison(CALLED, CALLED)])[0].index("p (Holm)") == 9
    whole, part = CALLED, dataclasses.replace(CALLED, family="mmlu")
    assert [row[10] for row in table([comparison(whole, part)])] == ["family", "", "mmlu"]
    assert "family: the group within which a test is exploratory." in as_text([comparison(whole, part)])
    assert "family" not in as_text([comparison(whole, whole)])
    head, *rows = table([comparison(CALLED), comparison(CALLED)])
    assert head[0] == "run" and [row[0] for row in rows] == ["B1", "B2"]
    assert rows[0][5:10] == ["50.0 ± 2.0", "55.0 ± 2.0", "+5.0", "+1.0 to +9.0", "0.012"]


@pytest.mark.parametrize("test", [{}, MEANS])
def test_an_interval_without_0_where_the_test_calls_nothing_is_explained(test: dict[str, Any]) -> None:
    stricter = "The test is stricter than the interval"
    assert stricter in as_text([comparison(dataclasses.replace(CALLED, p=0.06, p_holm=0.06, **test))])
    assert stricter not in as_text([comparison(dataclasses.replace(CALLED, **test))])


def test_what_the_numbers_do_not_allow_is_said() -> None:
    """Selection and optional stopping make small p; Holm's adjustment leaves the other columns as they are."""
    for text in (as_text([comparison(CALLED)]), as_markdown([comparison(CALLED)])):
        assert "The best of many runs looks better than it is" in text and "extended until p is small" in text
        assert "are not adjusted" not in text and "not in per cent" not in text
    assert "intervals and detectable differences are not adjusted" in as_text([comparison(CALLED, CALLED)])
    untested = dataclasses.replace(CALLED, p=None, p_holm=None, low=None, high=None, test="the reason")
    text = as_text([comparison(CALLED, untested)])
    assert "0.5 ± 0.02" in text and "Scores without a test are not in per cent." in text


def test_numbers_end_at_the_right_in_markdown_too() -> None:
    lines = as_markdown([comparison(CALLED, threshold=(0.5, 0.9))]).splitlines()
    assert lines[lines.index("| setting | A | B |") + 1] == "| --- | --- | --- |"
    assert "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |" in lines


def test_few_settings_of_many_runs_are_a_row_each() -> None:
    many = [comparison(CALLED, threshold=(0.5, share)) for share in (0.6, 0.7)]
    assert "  run  threshold\n  A    0.5\n  B1   0.6\n  B2   0.7\n" in as_text(many)
    lines = as_text([comparison(CALLED, x=(1, 2), y=(1, None), z=(1, 3)), comparison(CALLED, x=(1, 5))]).splitlines()
    assert lines[lines.index("Settings that differ:") + 1 :][:4] == [
        "  setting  A  B1  B2",
        "  x        1  2   5",
        "  y        1      1",
        "  z        1  3   1",
    ]


def test_settings_that_one_model_alone_has_are_a_line() -> None:
    """Two lm_eval models share few settings; a page of half-empty rows would hide those that they share."""
    ours = {"engine": ("native", None), "steps": (4, None), "threshold": (0.9, None)}
    served = comparison(CALLED, model=("sdar", "vllm"), limit=(None, 5), url=(None, "u"), **ours)
    lines = as_text([served]).splitlines()
    assert lines[lines.index("Settings that differ:") + 1 :][:6] == [
        "  setting  A     B",
        "  model    sdar  vllm",
        "",
        "Only the files of A name: engine=native, steps=4, threshold=0.9.",
        "Only the files of B name: limit=5, url=u.",
        "",
    ]
    assert "- Only the files of B name: limit=5, url=u." in as_markdown([served])
    assert json.loads(as_json([served]))[0]["settings"]["engine"] == {"a": "native", "b": None}

    another = comparison(CALLED, threshold=(0.9, 0.8), steps=(4, None))  # of one model: each difference is a choice
    other_url = comparison(CALLED, model=("sdar", "vllm"), url=(None, "v"), **ours)
    lines = as_text([served, another, other_url]).splitlines()
    assert lines[lines.index("Settings that differ:") + 1 :][:9] == [
        "  setting    A     B1    B2    B3",
        "  model      sdar  vllm  sdar  vllm",
        "  url              u           v",
        "  steps      4",
        "  threshold  0.9         0.8",
        "",
        "Only the files of A and B2 name: engine=native.",
        "Only the files of B1 name: limit=5.",
        "",
    ]
    assert "Only the files of A, B2 and B3 name: engine=native." in as_text([served, another, another]).splitlines()


def test_markdown_and_json_hold_whatever_labels_and_documents_say(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", {"ta|sk": {"acc,no*ne": [0, 1, float("nan")]}}, beams=[1])
    b = write_run(tmp_path / "b", {"ta|sk": {"acc,no*ne": [0, 1, float("inf")]}}, beams=[2])
    found = compare_runs(*read_runs([a, b]))
    assert r"| ta\|sk | acc | no\*ne | 3 |" in as_markdown([found])
    (content,) = json.loads(as_json([found]), parse_constant=lambda name: pytest.fail(name))
    assert content["differences"][0]["a"] is None and content["settings"]["beams"] == {"a": [1], "b": [2]}


def test_nothing_acts_in_the_terminal(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / f"{i}\x1b[2J", {"task": {"acc,none": [i, 1]}}, target="\x1b[2J") for i in (0, 1)]
    a, b = read_runs(folders)
    found = [compare_runs(a, b)]
    documents = {(0, 0): changed_documents(a, b, "task", "acc", "none")}
    for text in (as_text(found, documents), as_markdown(found, documents)):
        assert "\x1b" not in text and text.count("␛") >= 3


def test_runs_without_a_setting_that_differs(tmp_path: Path) -> None:
    runs = read_runs([write_run(tmp_path / name, {"task": {"acc,none": [1, 0]}}) for name in "ab"])
    for render in (as_text, as_markdown):
        assert "No setting that the files name differs." in render([compare_runs(*runs)])


def test_limits_of_thoughts_are_settings(tmp_path: Path) -> None:
    for limit in (100, 200):
        folder = write_run(tmp_path / str(limit), {"t": {"exact_match,none": [1.0, 0.0]}})
        (file,) = folder.rglob("results_*.json")
        results = json.loads(file.read_text("utf-8"))
        results["config"]["sdar_lm_eval"] = {"thinking": {"max_thinking_toks": limit}}
        file.write_text(json.dumps(results), "utf-8")
    settings = [run.settings("t") for run in read_runs([tmp_path / "100", tmp_path / "200"])]
    assert differing(settings) == {"max_thinking_toks": [100, 200]}


def test_how_many_tokens_a_forward_gives(tmp_path: Path) -> None:
    """A run of another model reports none, and has no sentence."""
    folders = [written_runs.write_answers(tmp_path / name, [["7"]] * 3, task="t") for name in "ab"]
    (path,) = folders[1].glob("results_*.json")
    content = json.loads(path.read_text())
    content["config"]["sdar_lm_eval"]["run"]["forwards"]["denoising"] = 20
    path.write_text(json.dumps(content))
    found = [compare_runs(*read_runs(folders))]
    said = "t: tokens per forward 1.50 (A) and 3.00 (B), 2.00 times."
    assert said in as_text(found).splitlines() and f"- {said}" in as_markdown(found).splitlines()
    (speeds,) = (each["speeds"]["t"] for each in json.loads(as_json(found)))
    assert (speeds["a"]["tokens_per_second"], speeds["b"]["tokens_per_forward"]) == (900.0, 3.0)

    longer = written_runs.write_answers(tmp_path / "longer", [["7"]] * 4, task="t")  # over other documents
    found = [compare_runs(*read_runs([folders[0], longer]))]
    assert "per forward" not in as_text(found) and json.loads(as_json(found))[0]["speeds"] == {}

    other = written_runs.write_answers(tmp_path / "c", [["7"]] * 3, task="t", model="hf")
    found = [compare_runs(*read_runs([folders[0], other]))]
    assert "per forward" not in as_text(found) and json.loads(as_json(found))[0]["speeds"]["t"]["b"]["note"]


def test_each_column_of_figures_is_explained() -> None:
    _, _, notes = as_text([comparison(CALLED)]).rpartition("\n\n")
    assert all(name in notes for name in ("±", "B - A", "interval", "p ", "only A", "only B", "detectable"))


def test_a_table_wider_than_the_terminal_is_a_list_of_a_single_row() -> None:
    wide, narrow = (as_text([comparison(CALLED)], width=width) for width in (None, 80))
    assert wide == as_text([comparison(CALLED)], width=200) and wide != narrow
    listed = """
task          task
metric        acc
filter        none
documents     1,000
A             50.0 ± 2.0
B             55.0 ± 2.0
B - A         +5.0
95% interval  +1.0 to +9.0
p             0.012
only A        100
only B        150
detectable    4.5

task: B is better"""
    assert listed in narrow


def test_a_table_wider_than_the_terminal_is_split_and_repeats_only_names_that_differ() -> None:
    other = dataclasses.replace(CALLED, task="another_task", b=0.6, difference=0.1, low=0.06, high=0.14, only_b=200)
    split = """
metric      acc
filter      none
documents   1,000
A           50.0 ± 2.0
p           0.012
p (Holm)    0.012
only A      100
detectable  4.5

task                   B  B - A   95% interval
task          55.0 ± 2.0   +5.0   +1.0 to +9.0
another_task  60.0 ± 2.0  +10.0  +6.0 to +14.0

task          only B
task             150
another_task     200

task: B is better"""
    assert split in as_text([comparison(CALLED, other)], width=50)
    alike = as_text([comparison(CALLED), comparison(CALLED)], width=50)
    assert "detectable    4.5\n\nB1, task: B1 is better" in alike  # no table of the runs' names alone


def test_questions_are_shorter_in_a_narrow_terminal() -> None:
    of_documents = {(0, 0): [ChangedDocument(3, 3, "Why? " * 20, "42", 0.0, 1.0, "41", "42")]}
    wide, narrow = (as_text([comparison(CALLED)], of_documents, width).splitlines()[-2:] for width in (None, 80))
    assert len(wide[0]) > len(narrow[0]) == 80
    assert narrow[1].split() == ["3", "only", "B", *["Why?"] * 5, "Why?…", "41", "42", "42"]
