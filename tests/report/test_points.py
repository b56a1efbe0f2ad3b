"""Points of runs on disk, and the front."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import statsmodels.api as sm
from hypothesis import given
from hypothesis import strategies as st
from run_files import write_run

from sdar_lm_eval.errors import UserError
from sdar_lm_eval.report.aup import aup
from sdar_lm_eval.report.by_task import by_task
from sdar_lm_eval.report.curve import by_forward, by_second, summarized, table
from sdar_lm_eval.report.points import (
    Point,
    curves_of,
    pareto_front,
    points_of,
    scores_of,
    settings_in_words,
)
from sdar_lm_eval.report.results import results_in
from sdar_lm_eval.report.runs import Run, read_runs


def point(forward: float | None = 1.0, accuracy: float = 50.0, second: float | None = None, **settings: Any) -> Point:
    return Point("run", "demo", settings, accuracy, 1.0, forward, second, 200, 1, "")


CLOUD = st.lists(st.tuples(st.integers(1, 6), st.integers(0, 6)), max_size=12)


@given(CLOUD)
def test_the_front_by_its_definition(cloud: list[tuple[int, int]]) -> None:
    points = [point(float(speed), float(y)) for speed, y in cloud] + [point(None, 99.0)]
    front = pareto_front(points, by_forward)
    assert [p.tokens_per_forward for p in front] == sorted(p.tokens_per_forward or 0 for p in front)
    assert all(a.accuracy >= b.accuracy for a, b in itertools.pairwise(front))
    for each in points[:-1]:
        beaten = any(
            other is not each
            and (other.tokens_per_forward or 0) >= (each.tokens_per_forward or 0)
            and other.accuracy >= each.accuracy
            and (other.tokens_per_forward, other.accuracy) != (each.tokens_per_forward, each.accuracy)
            for other in points[:-1]
        )
        assert beaten == all(each is not kept for kept in front)


@given(CLOUD, st.randoms())
def test_the_front_does_not_depend_on_the_order(cloud: list[tuple[int, int]], chance: random.Random) -> None:
    points = [point(float(speed), float(y)) for speed, y in cloud]
    shuffled = chance.sample(points, len(points))
    of = [[(p.tokens_per_forward, p.accuracy) for p in pareto_front(some, by_forward)] for some in (points, shuffled)]
    assert of[0] == of[1]


def test_a_line_a_strategy_and_a_choice_of_other_settings() -> None:
    dynamic = [
        point(remasking_strategy="low_confidence_dynamic", confidence_threshold=t, temperature=heat, block_length=4)
        for heat in (0.0, 1.0)
        for t in (0.5, 0.9)
    ]
    static = [
        point(remasking_strategy="low_confidence_static", block_length=b, denoising_steps=b, temperature=0.0)
        for b in (4, 8)
    ]
    assert {curve.name: len(curve.points) for curve in curves_of([*dynamic, *static])} == {
        "low_confidence_dynamic, temperature=0": 2,
        "low_confidence_dynamic, temperature=1": 2,
        "low_confidence_static": 2,
    }
    assert settings_in_words(static) == ["block_length=4", "block_length=8"]
    entropy = point(remasking_strategy="entropy_bounded", block_length=4, eb_threshold=0.1)
    assert settings_in_words([*static, entropy])[:2] == ["block_length=4", "block_length=8"]


def test_a_point_of_other_settings_is_a_curve_beside_a_line() -> None:
    dynamic = {"remasking_strategy": "low_confidence_dynamic", "temperature": 0.0}
    choices = ((0.5, 4), (0.9, 4), (0.9, 8))
    points = [point(**dynamic, confidence_threshold=t, block_length=length) for t, length in choices]
    assert {curve.name: len(curve.points) for curve in curves_of(points)} == {
        "low_confidence_dynamic, block_length=4": 2,
        "low_confidence_dynamic, block_length=8": 1,
    }


def test_points_of_two_models_are_two_curves(tmp_path: Path) -> None:
    def write_at(name: str, threshold: float, **facts: Any) -> Path:
        folder = write(tmp_path / name, COMPUTED, confidence_threshold=threshold)
        content = json.loads((folder / "results_2026.json").read_text())
        content["config"]["sdar_lm_eval"] |= facts
        (folder / "results_2026.json").write_text(json.dumps(content))
        return folder

    folders = [write_at(f"{t}", t, dtype="float32") for t in (0.5, 0.9)]
    assert [curve.name for curve in curves_of(points_of(read_runs(folders), "t"))] == ["low_confidence_dynamic"]
    folders += [write_at(f"other {t}", t, dtype="bfloat16", checkpoint_fingerprint="0123456789abcdef") for t in (0.5,)]
    assert {curve.name: len(curve.points) for curve in curves_of(points_of(read_runs(folders), "t"))} == {
        "demo (dtype=float32, checkpoint_fingerprint=none): low_confidence_dynamic": 2,
        "demo (dtype=bfloat16, checkpoint_fingerprint=0123456789ab): low_confidence_dynamic": 1,
    }


def test_settings_that_tell_points_apart() -> None:
    points = [
        point(remasking_strategy="low_confidence_static", block_length=4, denoising_steps=4),
        point(remasking_strategy="low_confidence_static", block_length=4, denoising_steps=2),
        point(remasking_strategy="sequential", block_length=4, denoising_steps=2),
        point(remasking_strategy="low_confidence_dynamic", block_length=4, denoising_steps=4, confidence_threshold=0.5),
        point(remasking_strategy="low_confidence_dynamic", block_length=4, denoising_steps=4, confidence_threshold=0.9),
    ]
    assert settings_in_words(points) == [
        "denoising_steps=4", "denoising_steps=2", "denoising_steps=2",
        "confidence_threshold=0.5", "confidence_threshold=0.9",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"remasking_strategy": "low_confidence_static", "denoising_steps": 4}, "denoising_steps=4"),
        ({"remasking_strategy": "low_confidence_dynamic", "confidence_threshold": 0.85}, "confidence_threshold=0.85"),
    ],
)
def test_a_point_with_defaults_only_has_its_strategys_setting(settings: dict[str, Any], told: str) -> None:
    """An evaluation is greedy by default, so temperature 0 tells no point from another."""
    others = {"block_length": 4, "denoising_steps": 4, "temperature": 0.0}
    assert settings_in_words([point(**{**others, **settings})]) == [told]
    sampled = {**others, **settings, "temperature": 1.0}
    assert settings_in_words([point(**sampled)]) == ["temperature=1"]


DECODING = {
    "block_length": 4, "denoising_steps": 4, "remasking_strategy": "low_confidence_dynamic",
    "confidence_threshold": 0.5, "eb_threshold": 0.35, "temperature": 1.0, "top_k": 0, "top_p": 1.0,
    "repetition_penalty": 1.0, "max_gen_toks": 64, "until": [],
}  # fmt: skip


def write(
    folder: Path, counts: Mapping[str, object] | None, scores: list[float] | None = None, seed: int = 0, **decoding: Any
) -> Path:
    """A results file of task t, with a samples file where there are scores."""
    values = scores or [1.0, 0.0]
    mean = sum(values) / len(values)
    ours = {} if counts is None else {"seed": seed, "decoding_of_tasks": {"t": DECODING | decoding}, "run": counts}
    content = {
        "results": {"t": {"alias": "t", "right,none": mean, "right_stderr,none": 0.125, "other,none": 7.0}},
        "config": {"model": "sdar", "model_args": {"pretrained": "demo"}, "sdar_lm_eval": ours},
        "date": 1.0 + seed,
        "configs": {"t": {}},
        "n-samples": {"t": {"original": 200, "effective": len(values)}},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results_2026.json").write_text(json.dumps(content))
    if scores is not None:
        lines = [
            json.dumps(
                {"doc_id": i, "filter": "none", "doc": {"q": i}, "target": "", "right": score, "doc_hash": f"h{i}"}
            )
            for i, score in enumerate(scores)
        ]
        (folder / "samples_t_2026.jsonl").write_text("\n".join(lines) + "\n")
    return folder


WORK = {"new_tokens": 300, "forwards": {"prefill": 9, "denoising": 150, "commit": 50}}
COMPUTED = {
    "requests": 2,
    "stored_requests": 0,
    **WORK,
    "generation_seconds": 2.0,
    "tasks": {"t": {"requests": 2, **WORK}},
}


def of(folder: Path, **settings: Any) -> Point:
    (point,) = points_of(read_runs([folder]), "t", **settings)
    return point


def test_a_run_says_whether_lower_is_better(tmp_path: Path) -> None:
    file = write(tmp_path, COMPUTED) / "results_2026.json"
    content = json.loads(file.read_text())
    for higher in (True, False):
        content["higher_is_better"] = {"t": {"right": higher}}
        file.write_text(json.dumps(content))
        assert of(tmp_path).higher_is_better is higher


def test_a_run_on_disk(tmp_path: Path) -> None:
    found = of(write(tmp_path, COMPUTED))
    assert (found.accuracy, found.stderr, found.documents, found.repeats) == (50.0, 12.5, 2, 1)
    assert (found.tokens_per_forward, found.tokens_per_second, found.note) == (1.5, 150.0, "")
    assert found.strategy == "low_confidence_dynamic"
    assert found.settings["confidence_threshold"] == 0.5 and "eb_threshold" not in found.settings
    assert of(tmp_path, metric="other").accuracy == of(tmp_path, metric="other,none").accuracy == 7.0
    with pytest.raises(UserError, match=r"does not have a metric 'wrong'\. Known: right,none, other,none"):
        of(tmp_path, metric="wrong")


def test_a_results_file_of_version_0_1_counts_no_tasks(tmp_path: Path) -> None:
    counts = {name: value for name, value in COMPUTED.items() if name != "tasks"}
    assert of(write(tmp_path, counts)).tokens_per_forward == 1.5


def stored(work: Mapping[str, object], seconds: float | None = 3.0) -> dict[str, object]:
    """Counts of a resumed run: half of the answers from a store."""
    return {
        **COMPUTED, "requests": 1, "stored_requests": 1, "stored": {**work, "seconds": seconds},
        "tasks": {"t": {"requests": 1, "stored_requests": 1, **WORK, "stored": work}},
    }  # fmt: skip


def test_a_resumed_run_has_the_speed_of_all_its_answers_or_none(tmp_path: Path) -> None:
    known = of(write(tmp_path / "known", stored({"new_tokens": 100, "forwards": 50})))
    assert known.tokens_per_forward == 400 / 250 and known.tokens_per_second == 400 / 5
    nothing_computed = stored({"new_tokens": 400, "forwards": 200}) | {"generation_seconds": None, "new_tokens": 0}
    assert of(write(tmp_path / "all", nothing_computed)).tokens_per_second == 400 / 3
    untimed = of(write(tmp_path / "untimed", stored({"new_tokens": 100, "forwards": 50}, None)))
    assert untimed.tokens_per_forward == 400 / 250 and untimed.tokens_per_second is None
    assert untimed.note == "some answers came from a store that has no tokens, forwards or times for them"
    old = dict(stored({}))
    del old["stored"]
    unknown = of(write(tmp_path / "old", {**old, "tasks": {"t": {"requests": 1, "stored_requests": 1, **WORK}}}))
    assert unknown.tokens_per_forward is unknown.tokens_per_second is None and unknown.note
    other = of(write(tmp_path / "other", None))
    assert (other.strategy, other.tokens_per_second) == ("demo", None) and "reports no forwards" in other.note
    assert by_second(other) is None


def repeated(folder: Path, scores: np.ndarray) -> Run:
    """A run evaluated with several seeds; scores (seeds, documents)."""
    files = [write(folder / str(seed), COMPUTED, list(map(float, row)), seed) for seed, row in enumerate(scores)]
    return Run("run", folder, {"t": [results_in(file)[0] for file in files]})


def test_errors_of_repeats_are_clustered_by_document(tmp_path: Path) -> None:
    """Against statsmodels: cluster-robust errors of a mean, but for its factors for few clusters."""
    chance = np.random.default_rng(1)
    difficulty = chance.random(40)
    scores = (chance.random((5, 40)) < difficulty).astype(float)
    (found,) = points_of([repeated(tmp_path, scores)], "t")
    documents = np.tile(np.arange(40), 5)
    fit = sm.OLS(scores.ravel(), np.ones(200)).fit(
        cov_type="cluster", cov_kwds={"groups": documents, "use_correction": False}
    )
    assert found.accuracy == pytest.approx(100 * fit.params[0])
    assert found.stderr == pytest.approx(100 * fit.bse[0] * math.sqrt(40 / 39))
    naive = 100 * scores.std(ddof=1) / math.sqrt(200)
    assert found.stderr is not None and found.stderr > 1.3 * naive
    assert (found.repeats, found.documents) == (5, 40)
    assert found.tokens_per_forward == 1.5 and found.tokens_per_second == 150.0


def test_repeats_and_single_runs_have_intervals_of_aup_together(tmp_path: Path) -> None:
    """As a sweep with --repeats has them; where one run has no samples, no curve has an interval."""
    chance = np.random.default_rng(1)
    shares = [(chance.random((seeds, 40)) < 0.7).astype(float) for seeds in (3, 1)]
    sampled, greedy = (repeated(tmp_path / str(len(its)), its) for its in shares)
    points, scores = points_of([sampled, greedy], "t"), scores_of([sampled, greedy], "t")
    for point_, its, of_point in zip(points, shares, scores, strict=True):
        assert of_point == pytest.approx(100 * its.mean(0)) and point_.accuracy == pytest.approx(of_point.mean())
    points[1] = dataclasses.replace(points[1], settings={"remasking_strategy": "random"})
    found = [summarized(task, "right,none", points, None, scores) for task in ("t", "u")]
    _, first, second = json.loads(json.dumps(found[0].as_dict()))["aup"]
    assert first["interval"][0] < first["aup"] < first["interval"][1]
    assert second["ahead_interval"][0] < second["ahead"] < second["ahead_interval"][1]
    assert "minus low_confidence_dynamic" in table(found[0]) and "± " in by_task(found)
    for file in greedy.path.rglob("samples_*"):
        file.unlink()
    (greedy,) = read_runs([greedy.path])
    assert scores_of([sampled, greedy], "t") == []
    without = summarized("t", "right,none", points_of([sampled, greedy], "t"), None, [])
    assert all(value.interval is None for value in without.values) and "95% interval" not in table(without)


def test_repeats_of_a_mean_over_answers_are_a_mean_over_answers(tmp_path: Path) -> None:
    """As IFEval's instructions: a document has one to three, and each instruction counts the same."""
    for seed, scores in enumerate([[[0], [1, 1, 0], [1, 1]], [[0], [1, 1, 1], [1, 1]]]):
        mean = float(np.mean([value for each in scores for value in each]))
        date = f"2026-01-0{seed + 1}T00-00-00.0"
        write_run(tmp_path, {"t": {"acc,none": scores}}, date=date, aggregated={"acc,none": mean}, seed=seed)
    (found,) = points_of(read_runs([tmp_path]), "t")
    assert (found.repeats, found.accuracy) == (2, pytest.approx(100 * 9 / 12))


def test_repeats_whose_samples_are_not_there(tmp_path: Path) -> None:
    run = repeated(tmp_path, np.array([[1.0, 1.0], [0.0, 1.0]]))
    for file in tmp_path.rglob("samples_*"):
        file.unlink()
    (found,) = points_of([run], "t")
    assert (found.accuracy, found.stderr) == (75.0, None)


def test_an_accuracy_that_is_not_a_number_leaves_the_others_as_they_are(tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path / name, {"t": {"acc,none": [value]}}, samples=False)
        for name, value in (("a", 0.5), ("b", math.nan), ("c", 0.75))
    ]
    points = points_of(read_runs(folders), "t")
    assert [each.accuracy for each in points[::2]] == [50.0, 75.0] and math.isnan(points[1].accuracy)
    points = [dataclasses.replace(each, tokens_per_forward=speed) for speed, each in enumerate(points, 1)]
    for order in itertools.permutations(points):
        found = summarized("t", "acc,none", order)
        assert found.fronts["tokens per forward"] == (points[2],) and found.y_max == 75.0
        (value,) = [each for each in found.values if each.name != "Pareto front"]
        assert (value.aup, value.points) == (aup([(1, 50.0), (3, 75.0)], 75.0), 2)
        assert "nan" not in table(found) + by_task([found, found])
        assert "NaN" not in json.dumps(found.as_dict())


def test_settings_may_be_lists() -> None:
    points = [point(1.0, top_k=[1]), point(2.0, top_k=[2])]
    assert [len(curve.points) for curve in curves_of(points)] == [2]
