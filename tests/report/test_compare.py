"""Comparisons of runs whose scores are known, in files of lm_eval's format."""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from run_files import write_run
from scipy import stats
from statsmodels.stats.multitest import multipletests
from written_runs import write_answers

from sdar_lm_eval.errors import UserError
from sdar_lm_eval.report.changed import changed_documents
from sdar_lm_eval.report.compare import Comparison, Difference, adjusted, compare_runs
from sdar_lm_eval.report.runs import Run, read_runs

ACC = "acc,none"
A = [1, 1, 0, 0, 1, 0, 1, 1, 0, 0]
B = [1, 1, 1, 1, 0, 0, 1, 1, 1, 0]


def compared(a: Path, b: Path, **chosen: Any) -> Comparison:
    one, other = read_runs([a, b])
    return compare_runs(one, other, **chosen)


def only(comparison: Comparison) -> Difference:
    (difference,) = comparison.differences
    return difference


def two(tmp_path: Path, a: Any, b: Any, of_a: Any = None, of_b: Any = None, **both: Any) -> Comparison:
    """Compare runs of a task with these scores."""
    first = write_run(tmp_path / "a", {"task": a}, **(of_a or {}), **both)
    return compared(first, write_run(tmp_path / "b", {"task": b}, **(of_b or {}), **both))


def test_right_and_wrong(tmp_path: Path) -> None:
    found = only(two(tmp_path, {ACC: A}, {ACC: B}))
    assert (found.a, found.b, found.difference) == pytest.approx((0.5, 0.7, 0.2))
    assert (found.only_a, found.only_b, found.documents, found.test) == (1, 3, 10, "exact McNemar")
    assert found.p == found.p_holm == pytest.approx(stats.binomtest(1, 4).pvalue)
    assert found.a_stderr == pytest.approx(stats.sem(A))
    assert found.low is not None and found.high is not None and found.low < 0 < found.high


def test_booleans_and_numpy_s_text_are_right_and_wrong_too(tmp_path: Path) -> None:
    """lm_eval writes what json does not know, such as NumPy's booleans, as text."""
    plain = only(two(tmp_path, {ACC: A}, {ACC: B}))
    same = {"aggregated": {ACC: 0.5}}, {"aggregated": {ACC: 0.7}}
    assert only(two(tmp_path, {ACC: list(map(bool, A))}, {ACC: [str(bool(x)) for x in B]}, *same)) == plain


def test_where_lower_is_better_a_1_is_wrong(tmp_path: Path) -> None:
    found = only(two(tmp_path, {ACC: A}, {ACC: B}, better={"acc": False}))
    assert (found.only_a, found.only_b, found.higher_is_better) == (3, 1, False)


def test_other_scores(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.random(20), rng.random(20)
    found = only(two(tmp_path, {"f1,none": list(a)}, {"f1,none": list(b)}))
    expected = stats.ttest_rel(b, a)
    interval = expected.confidence_interval()
    assert (found.p, found.low, found.high) == pytest.approx((expected.pvalue, interval.low, interval.high))
    assert (found.test, found.only_a, found.only_b) == ("paired t", None, None)


def test_several_answers_of_a_document_are_one_value(tmp_path: Path) -> None:
    a, b = [[0, 1], [1, 1], [0, 0], [1, 0]], [[1, 1], [1, 1], [0, 1], [1, 1]]
    found = only(two(tmp_path, {ACC: a}, {ACC: b}))
    assert found.test == "paired t" and found.documents == 4
    assert found.difference == pytest.approx(0.375)
    assert found.a_stderr == pytest.approx(stats.sem([0.5, 1, 0, 0.5]))


def test_a_mean_over_answers_is_compared_as_one(tmp_path: Path) -> None:
    """As IFEval's instructions: a document has one to three, and each instruction counts the same."""
    a, b = [[0], [1, 1, 0], [0, 0], [1]], [[1], [1, 1, 1], [0, 0], [1]]
    means = {"aggregated": {ACC: 3 / 7}}, {"aggregated": {ACC: 5 / 7}}
    found = only(two(tmp_path, {ACC: a}, {ACC: b}, *means))
    assert (found.a, found.b) == pytest.approx((3 / 7, 5 / 7)) and found.test == "paired t"


def test_repeats_are_answers_of_the_same_documents(tmp_path: Path) -> None:
    for seed, scores in enumerate([[1, 0, 0, 1], [1, 1, 0, 0], [1, 1, 0, 1]]):
        write_run(tmp_path / "a", {"task": {ACC: scores}}, date=f"2026-01-0{seed + 1}T00-00-00.0", seed=seed)
    b = write_run(tmp_path / "b", {"task": {ACC: [1, 1, 1, 1]}})
    runs = read_runs([tmp_path / "a"])
    assert len(runs) == 1 and len(runs[0].of_tasks["task"]) == 3
    found = only(compared(tmp_path / "a", b))
    assert (found.a, found.documents, found.test) == (pytest.approx(7 / 12), 4, "paired t")
    assert found.difference == pytest.approx(5 / 12)


def test_few_shot_examples_that_differ_between_repeats_are_told(tmp_path: Path) -> None:
    """Examples change all documents at once, which no error over documents contains."""
    for seed, prompt in enumerate(["Example 1. ", "Example 2. "]):
        date = f"2026-01-0{seed + 1}T00-00-00.0"
        write_run(tmp_path / "a", {"task": {ACC: A}}, date=date, seed=seed, prompt=prompt)
    for seed in range(2):
        date = f"2026-01-0{seed + 1}T00-00-00.0"
        write_run(tmp_path / "b", {"task": {ACC: B}}, date=date, seed=seed, prompt="Example 1. ")
    (told,) = compared(tmp_path / "a", tmp_path / "b").warnings
    assert told.startswith("task: the prompts of 10 documents differ between the repeats of run A. Interval and p are")


def test_documents_are_paired_by_what_they_are(tmp_path: Path) -> None:
    """Both runs have document 3 and two equal ones, 7; each at another place."""
    of_a, of_b = {"documents": [1, 3, 7, 7]}, {"documents": [7, 7, 3, 9]}
    comparison = two(tmp_path, {ACC: [0, 0, 1, 0]}, {ACC: [1, 1, 1, 0]}, of_a, of_b)
    found = only(comparison)
    assert (found.documents, found.only_a, found.only_b) == (3, 0, 2)
    warning = "task: 3 documents are in both runs and are compared; 1 only in run A and 1 only in run B."
    assert comparison.warnings == (warning,)


def test_files_without_hashes_are_paired_by_index_and_gold_answer(tmp_path: Path) -> None:
    assert only(two(tmp_path, {ACC: A}, {ACC: B}, hashes=False)).documents == 10
    assert only(two(tmp_path, {ACC: A}, {ACC: B}, {"hashes": False})).documents == 10
    with pytest.raises(UserError, match="answered no common document"):
        two(tmp_path, {ACC: A}, {ACC: B}, {"hashes": False, "target": "other"})


def test_what_differs_in_what_was_asked_is_told(tmp_path: Path) -> None:
    comparison = two(tmp_path, {ACC: A}, {ACC: B}, None, {"prompt": "Please: ", "version": 2.0, "target": "other"})
    assert comparison.warnings == (
        "task: the prompts of 10 of 10 documents differ.",
        "task: the gold answers of 10 of 10 documents differ.",
        "task: the task's versions differ (1.0 and 2.0).",
    )
    assert not two(tmp_path, {ACC: A}, {ACC: B}, {"hashes": False}, {"hashes": False}).warnings
    (told,) = two(tmp_path, {ACC: A}, {ACC: B}, {"hashes": False}, {"hashes": False, "prompt": "Please: "}).warnings
    assert "prompts of 10 of 10" in told


def test_prompts_that_a_server_puts_into_a_template_are_not_called_different(tmp_path: Path) -> None:
    """lm_eval's API models write chat messages, and their model_args name the checkpoint `model`."""
    served = write_answers(tmp_path / "served", [["7"]] * 3, model="local-chat-completions", messages=True)
    whole = write_answers(tmp_path / "whole", [["7"]] * 3)
    (a, b), told = read_runs([served, whole]), "gsm8k_sdar: run {} sent chat messages, and its server put them into a"
    for pair, name in (((a, b), "A"), ((b, a), "B")):
        comparison = compare_runs(*pair)
        (warning,) = comparison.warnings
        assert warning.startswith(told.format(name))
        assert set(comparison.settings["model"]) == {"local-chat-completions", "sdar"}
        assert "pretrained" not in comparison.settings
    other = write_answers(tmp_path / "other", [["7"]] * 3, model="local-chat-completions", messages=True)
    assert not compare_runs(a, *read_runs([other])).warnings


def test_settings_that_differ_in_all_tasks_are_told_once(tmp_path: Path) -> None:
    scores = {"one": {ACC: A}, "two": {ACC: A}}
    a = write_run(tmp_path / "a", scores, threshold=0.5, dtype="float32")
    b = write_run(tmp_path / "b", scores, threshold=0.9, dtype="float32", beams=4)
    content = json.loads((b / "results_2026-01-02T03-04-05.678901.json").read_text())
    content["n-shot"]["two"] = 5
    (b / "results_2026-01-02T03-04-05.678901.json").write_text(json.dumps(content))
    comparison = compared(a, b)
    assert comparison.settings == {"threshold": (0.5, 0.9), "beams": (None, 4), "num_fewshot (two)": (0, 5)}


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ([[-10.0, 3], [-20.0, 5]], "the metric is not a mean over documents"),
        ([["a", "b"], ["c", "d"]], "the samples' values are not numbers"),
        ([{"x": 1}, {"x": 2}], "the samples' values are not numbers"),
        ([10**400, 1], "the samples' values are not numbers"),
        ([math.nan, 1.0], "some of the samples' values are infinite or not a number"),
        ([math.inf, 1.0], "some of the samples' values are infinite or not a number"),
        ([0.25, 0.5], "the metric is not a mean over documents"),
    ],
)
def test_metrics_without_a_test(tmp_path: Path, values: Any, told: str) -> None:
    found = only(two(tmp_path, {ACC: values}, {ACC: values}, {"aggregated": {ACC: 8.5}}, {"aggregated": {ACC: 9.0}}))
    assert (found.a, found.b, found.difference, found.test) == (8.5, 9.0, 0.5, told)
    assert (found.p, found.p_holm, found.low, found.high, found.detectable) == (None,) * 5


def test_values_over_other_documents_have_no_difference(tmp_path: Path) -> None:
    """A mean is taken over the common documents; another metric has the value over all documents of each run."""
    whole = {ACC: A, "perplexity,none": [[-1.0, 2]] * len(A)}
    a = write_run(tmp_path / "a", {"task": whole}, aggregated={ACC: 0.5, "perplexity,none": 8.5})
    part = {name: values[:4] for name, values in whole.items()}
    mean_of_part = sum(A[:4]) / 4
    b = write_run(tmp_path / "b", {"task": part}, aggregated={ACC: mean_of_part, "perplexity,none": 9.0})
    mean, other = compared(a, b).differences
    assert (mean.documents, mean.difference, mean.test) == (4, 0.0, "exact McNemar")
    assert (other.a, other.b) == (8.5, 9.0) and math.isnan(other.difference)
    assert other.test == "the metric is not a mean over documents, and the values are over different documents"


def test_a_samples_file_that_lost_lines_has_no_test(tmp_path: Path) -> None:
    a, b = (write_run(tmp_path / name, {"task": {ACC: A}}) for name in "ab")
    (file,) = b.glob("samples*")
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:6]))
    assert only(compared(a, b)).test == "the samples file has 6 of 10 documents"


def test_filters_that_score_alike_are_one_row(tmp_path: Path) -> None:
    scores = {"m,strict": A, "m,flexible": A, "m,other": B}
    comparison = two(tmp_path, scores, {"m,strict": B, "m,flexible": B, "m,other": B})
    assert [(each.filter, each.equal_filters) for each in comparison.differences] == [
        ("strict", ("flexible",)),
        ("other", ()),
    ]
    assert comparison.differences[1].p == 1.0 and comparison.differences[1].detectable is not None


def test_holm_is_over_all_tests(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    scores = [{f"task{i}": {ACC: list(map(int, rng.random(60) < share))} for i in range(4)} for share in (0.5, 0.8)]
    a, b = (write_run(tmp_path / name, each) for name, each in zip("ab", scores, strict=True))
    found = compared(a, b).differences
    expected = multipletests([each.p for each in found], method="holm")[1]
    assert [each.p_holm for each in found] == pytest.approx(list(expected))
    chosen = only(compared(a, b, tasks=["task2"]))
    assert chosen.p_holm == chosen.p == found[2].p


def with_groups(folder: Path, groups: dict[str, list[str]], tasks: dict[str, list[str]], scores: dict[str, Any]) -> Any:
    """A run of several tasks, and groups (name -> its parts) whose scores are means over the documents of `tasks`."""
    write_run(folder, {task: {"acc,none": values} for task, values in scores.items()})
    (file,) = folder.rglob("results_*.json")
    content = json.loads(file.read_text())
    for group, parts in tasks.items():
        content["results"][group] = {"acc,none": np.mean(np.concatenate([scores[part] for part in parts]))}
    content["group_subtasks"] = groups
    file.write_text(json.dumps(content))
    return folder


def test_a_metric_that_a_task_of_the_group_lacks_has_no_test(tmp_path: Path) -> None:
    runs = []
    for name, value in (("a", 0.0), ("b", 1.0)):
        scores = {task: [value, 1.0] for task in ("s1", "s2")}
        runs.append(with_groups(tmp_path / name, {"stem": ["s1", "s2"]}, {"stem": ["s1", "s2"]}, scores))
        (file,) = runs[-1].rglob("results_*.json")
        content = json.loads(file.read_text())
        content["results"]["s2"]["f1,none"] = content["results"]["s2"].pop("acc,none")  # the group's value is s1's
        file.write_text(json.dumps(content))
    (group,) = compared(*runs).groups
    assert group.p is None and group.test == "some of the group's tasks do not have this metric"


def test_tasks_of_a_group_are_a_family_of_their_own(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    names = {"alone": 15, "s1": 12, "s2": 14, "h1": 11, "h2": 13, "h3": 10}
    groups = {"mmlu": ["stem", "humanities"], "stem": ["s1", "s2"], "humanities": ["h1", "h2", "h3"]}
    tasks = {**groups, "mmlu": ["s1", "s2", "h1", "h2", "h3"]}
    runs = []
    for name, share in (("a", 0.3), ("b", 0.8)):
        scores = {task: (rng.random(number) < share).astype(float).tolist() for task, number in names.items()}
        runs.append(with_groups(tmp_path / name, groups, tasks, scores))
    found = compared(*runs)
    rows = (*found.groups, *found.differences)
    families: dict[str, list[Difference]] = {}
    for each in rows:
        families.setdefault(each.family, []).append(each)
    assert {family: sorted(each.task for each in its) for family, its in families.items()} == {
        "": ["alone", "mmlu"], "mmlu": ["humanities", "stem"], "stem": ["s1", "s2"], "humanities": ["h1", "h2", "h3"],
    }  # fmt: skip
    for its in families.values():
        assert [each.p_holm for each in its] == pytest.approx(multipletests([e.p for e in its], method="holm")[1])
    (subject,) = compared(*runs, tasks=["h2"]).differences  # the user asks for this task alone
    assert (subject.family, subject.p_holm) == ("", subject.p)
    untested = json.loads((file := next((tmp_path / "a").rglob("results_*.json"))).read_text())
    untested["results"]["stem"]["acc,none"] += 0.01
    file.write_text(json.dumps(untested))
    again = compared(*runs)
    assert {each.task: each.family for each in again.differences if each.task in ("s1", "h1")} == {
        "s1": "mmlu", "h1": "humanities",
    }  # fmt: skip


def test_the_familywise_error_with_a_group_of_57_tasks() -> None:
    """The group and two tasks decide: at most 5% of tables err there, and 5% in the group, with power for the group."""
    rng = np.random.default_rng(11)
    nothing = Difference("", "acc", "none", 0, 0, 0, 0, 0, 0, 0, 0, 0, "", 9, 0, 0, None, True)  # type: ignore[arg-type]
    run = Run("", Path())

    def table(p: Any) -> tuple[list[float], list[float]]:
        rows = [dataclasses.replace(nothing, p=each, family="" if i < 3 else "mmlu") for i, each in enumerate(p)]
        (found,) = adjusted([Comparison(run, run, {}, (), tuple(rows[1:]), tuple(rows[:1]))])
        holm = [float(each.p_holm or 0) for each in (*found.groups, *found.differences)]
        return holm[:3], holm[3:]

    tables = [table(p) for p in rng.random((1500, 60))]
    for part in (0, 1):
        assert 0.035 <= np.mean([min(each[part]) < 0.05 for each in tables]) <= 0.065
    shown = rng.random(60)
    shown[0] = 0.01
    decisive, of_group = table(shown)
    assert decisive == pytest.approx(multipletests(shown[:3], method="holm")[1]) and decisive[0] == pytest.approx(0.03)
    assert of_group == pytest.approx(multipletests(shown[3:], method="holm")[1])
    assert multipletests(shown, method="holm")[1][0] > 0.5  # one family of 60


def test_changed_documents(tmp_path: Path) -> None:
    comparison = two(tmp_path, {ACC: A}, {ACC: B}, None, {"documents": [*range(1, 10), 0]})
    changed = changed_documents(comparison.a, comparison.b, "task", "acc", "none")
    of_b = dict(zip([*range(1, 10), 0], B, strict=True))
    assert [each.document_a for each in changed] == [i for i in range(10) if A[i] != of_b[i]]
    first = changed[0]
    assert (first.question, first.target) == (f"Question {first.document_a}?", "gold")
    assert (first.filtered_a, first.filtered_b) == (f"answer {int(first.a)}", f"answer {int(first.b)}")
    with pytest.raises(UserError, match="has no f1 of none in task; choose acc of none"):
        changed_documents(comparison.a, comparison.b, "task", "f1", "none")


def test_a_choice_is_shown_by_its_text(tmp_path: Path) -> None:
    a, b = (write_run(tmp_path / name, {"task": {ACC: [value]}}) for name, value in (("a", 0), ("b", 1)))
    for folder, likelihoods in ((a, ["-9.5", "-10.0"]), (b, ["-3.0", "-2.0"])):
        (file,) = folder.glob("samples*")
        line = json.loads(file.read_text())
        line["arguments"] = {
            f"gen_args_{i}": {"arg_0": "Q", "arg_1": f" {text}"} for i, text in enumerate(("no", "yes"))
        }
        line["filtered_resps"] = [[each, "False"] for each in likelihoods]
        file.write_text(json.dumps(line))
    one, other = read_runs([a, b])
    (changed,) = changed_documents(one, other, "task", "acc", "none")
    assert (changed.filtered_a, changed.filtered_b) == ("no", "yes")


def test_runs_that_cannot_be_compared(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", {"task": {ACC: A}, "more": {ACC: A}})
    with pytest.raises(UserError, match=r"b has no samples of task. Evaluate again with --log_samples."):
        compared(a, write_run(tmp_path / "b", {"task": {ACC: A}}, samples=False))
    with pytest.raises(UserError, match=r"share no task: the first has task, more, the second another."):
        compared(a, write_run(tmp_path / "c", {"another": {ACC: A}}))
    with pytest.raises(UserError, match=r"task: .*a and .*d answered no common document"):
        compared(a, write_run(tmp_path / "d", {"task": {ACC: A}}, documents=range(20, 30)))
    with pytest.raises(UserError, match=r"task: .* share no metric: the first has acc of none, the second f1 of none"):
        compared(a, write_run(tmp_path / "e", {"task": {"f1,none": A}}))
    unscored, other = (write_run(tmp_path / n, {"task": {"bypass,none": [999] * len(A)}}) for n in ("g", "h"))
    for runs in ((a, unscored), (unscored, a), (unscored, other)):
        with pytest.raises(UserError, match=r"g has no score of task\. Evaluate again, without --predict_only\."):
            compared(*runs, metrics=["acc"])
    with pytest.raises(UserError, match=r"--tasks tusk: the runs do not share this task; choose task, more. Did you"):
        compared(a, write_run(tmp_path / "f", {"task": {ACC: A}, "more": {ACC: A}}), tasks=["tusk"])
    with pytest.raises(
        UserError, match=r"--metric f1 and --filter x: the runs share no such score; choose from acc of n"
    ):
        compared(a, tmp_path / "f", metrics=["f1"], filters=["x"])


def test_a_task_that_cannot_be_compared_leaves_the_others(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", {"task": {ACC: A}, "more": {ACC: A}, "other": {ACC: A}, "alone": {ACC: A}})
    b = write_run(tmp_path / "b", {"task": {ACC: B}, "more": {ACC: A}, "other": {"f1,none": A}})
    next(b.glob("samples_more*")).write_text('{"doc_id": 0, "fil')
    comparison = compared(a, b)
    assert only(comparison).task == "task"
    alone, broken, other = comparison.warnings
    assert "share no metric: the first has acc of none, the second f1 of none." in other
    assert (
        alone == "Run A alone has alone." and "line 1: not JSON" in broken and broken.endswith("The task is left out.")
    )


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["a", "arg_0", "task", "acc,none"]), inner, max_size=2)
    ),
    max_leaves=6,
)
LINE_KEYS = (
    "doc_id",
    "doc",
    "target",
    "arguments",
    "resps",
    "filtered_resps",
    "filter",
    "doc_hash",
    "prompt_hash",
    "acc",
)
FILE_KEYS = (
    "results",
    "configs",
    "versions",
    "n-shot",
    "n-samples",
    "higher_is_better",
    "config",
    "date",
    "model_name",
    "group_subtasks",
)


@given(st.dictionaries(st.sampled_from(LINE_KEYS), JSON, max_size=3), st.dictionaries(st.sampled_from(FILE_KEYS), JSON))
def test_whatever_the_files_hold_is_a_comparison_or_a_message_of_one_line(line: Any, content: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        a, b = (write_run(Path(folder) / name, {"task": {ACC: A}}) for name in "ab")
        (samples,), (results,) = b.glob("samples*"), b.glob("results*")
        lines = [json.loads(each) for each in samples.read_text().splitlines()]
        lines[3] |= line
        samples.write_text("\n".join(map(json.dumps, lines)))
        results.write_text(json.dumps(json.loads(results.read_text()) | content))
        try:
            comparison = compared(a, b)
            changed_documents(comparison.a, comparison.b, "task", "acc", "none")
        except UserError as error:
            assert "\n" not in str(error)


def test_a_trial_on_some_documents_does_not_stand_for_a_run_on_all(tmp_path: Path) -> None:
    """lm_eval does not write which documents --samples chose."""
    every = write_run(tmp_path, {"task": {ACC: A}}, date="2026-01-01T0")
    some = write_run(tmp_path, {"task": {ACC: [1, 0]}}, date="2026-01-02T0", documents=[3, 7])
    runs = read_runs([tmp_path])
    assert every == some and [len(run.of_tasks["task"]) for run in runs] == [1, 1]
    assert len({run.label for run in runs}) == 2
    assert only(compare_runs(*runs)).documents == 2


def test_numbers_that_no_float_holds_are_no_scores(tmp_path: Path) -> None:
    folder = write_run(tmp_path, {"task": {ACC: [1], "f1,none": [1]}}, aggregated={ACC: 10**400, "f1,none": math.nan})
    (run,) = read_runs([folder])
    assert [(metric.name, math.isnan(metric.value)) for metric in run.metrics("task")] == [("f1", True)]
