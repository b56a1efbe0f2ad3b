"""AUP is the published function; its intervals are those of scipy's bootstrap, and hold the true value."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from scipy import stats

from sdar_lm_eval.report import aup as module
from sdar_lm_eval.report.aup import aup, value_of, values_of
from sdar_lm_eval.report.points import Curve, Point
from sdar_lm_eval.report.statistics import FloatArray

SPEEDS = (1.0, 1.3, 1.7, 2.2)
TRUE = (0.92, 0.92, 0.91, 0.895)

# AUP_leaderboard/aup_utils.py of hao-ai-lab/d3LLM at e5bfcac, run with these points.
WORKED = [
    ([(1, 80), (2, 79), (3, 77), (4, 76)], 80, 297.60625783145287),
    ([(3, 77), (1, 80), (4, 76), (2, 79)], 80, 297.60625783145287),
    ([(1, 80), (2, 79), (3, 77), (4, 76)], 90, 237.16336090727282),
    ([(1, 80), (2, 82), (3, 74), (4, 76)], 80, 308.4138062083044),
    ([(1, 80), (2, 82)], 80, 161.0),
    ([(2.5, 80)], 90, 200.0),
]


@pytest.mark.parametrize(("curve", "y_max", "value"), WORKED)
def test_aup_is_the_published_function(curve: list[tuple[float, float]], y_max: float, value: float) -> None:
    assert aup(curve, y_max) == pytest.approx(value, rel=1e-12, abs=1e-12)


def test_where_aup_is_not_defined() -> None:
    with pytest.raises(ValueError, match=r"The fastest point's accuracy, 74\.9, is more than 5 below .* point's, 80"):
        aup([(1, 80), (2, 78), (3, 74.9)], 80)
    for curve, y_max in (([], 80), ([(1, 80)], 0), ([(0, 80)], 80)):
        with pytest.raises(ValueError, match="AUP needs points"):
            aup(curve, y_max)
    assert aup([(1, 80), (2, 78), (3, 75)], 80) > 0  # exactly 5 below


def point(forward: float | None, accuracy: float) -> Point:
    return Point("run", "demo", {}, accuracy, 1.0, forward, None, 200, 1, "")


def test_a_curve_counts_up_to_where_it_loses_too_much() -> None:
    curve = Curve("c", tuple(point(speed, y) for speed, y in [(3, 74.9), (1, 80), (2, 78)]))
    value = value_of(curve, 80.0)
    assert (value.points, value.left_out) == (2, 1)
    assert value.aup == aup([(1, 80), (2, 78)], 80)
    assert value_of(Curve("c", (point(None, 50.0),)), 80.0).aup is None


def drawn(documents: int, seed: int) -> FloatArray:
    """Scores of two curves with the true accuracies `TRUE`, (8, documents), in per cent. Some documents are harder."""
    rng = np.random.default_rng(seed)
    latent = rng.standard_normal(documents) + rng.standard_normal((2 * len(TRUE), documents))
    limits = np.sqrt(2) * stats.norm.ppf(TRUE * 2)
    return 100.0 * (latent < limits[:, None])


def curves_of(scores: FloatArray) -> tuple[list[Curve], dict[int, FloatArray]]:
    points = [point(speed, float(of_point.mean())) for speed, of_point in zip(SPEEDS * 2, scores, strict=True)]
    curves = [Curve("first", tuple(points[:4])), Curve("second", tuple(points[4:]))]
    return curves, {id(each): of_point for each, of_point in zip(points, scores, strict=True)}


def test_intervals_are_those_of_scipy() -> None:
    scores = drawn(documents=200, seed=1)

    def value(index: Any, curve: int) -> float:
        of_curve = scores[4 * curve : 4 * curve + 4, index.astype(int)].mean(1)
        return aup([(s, y) for s, y in zip(SPEEDS, of_curve, strict=True) if y >= of_curve[0] - 5], 95.0)

    def interval(statistic: Any) -> Any:
        found = stats.bootstrap(
            (np.arange(200),), statistic, vectorized=False, method="percentile", n_resamples=2_000, batch=100,
            random_state=np.random.default_rng(2),
        )  # fmt: skip
        return pytest.approx(tuple(found.confidence_interval), abs=4)  # 2,000 draws leave the ends uncertain

    curves, of_points = curves_of(scores)
    first, second = values_of(curves, 95.0, of_points)
    assert first.interval == interval(lambda index: value(index, 0))
    assert second.interval == interval(lambda index: value(index, 1))
    assert second.ahead_interval == interval(lambda index: value(index, 1) - value(index, 0))
    assert first.aup is not None and second.aup is not None and second.ahead == second.aup - first.aup
    assert (first.ahead, first.ahead_interval) == (None, None)


def test_intervals_hold_the_true_value(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two equal strategies. The best of noisy accuracies is too high: it is the y_max of draws and truth alike."""
    monkeypatch.setattr(module, "DRAWS", 200)
    held, none = 0, 0
    for seed in range(100):
        scores = drawn(documents=200, seed=seed)
        curves, of_points = curves_of(scores)
        best = scores.mean(1).max()
        true = aup([(speed, 100 * accuracy) for speed, accuracy in zip(SPEEDS, TRUE, strict=True)], best)
        _, second = values_of(curves, best, of_points)
        assert second.interval is not None and second.ahead_interval is not None
        held += second.interval[0] <= true <= second.interval[1]
        none += second.ahead_interval[0] <= 0 <= second.ahead_interval[1]
    assert held >= 88 and none >= 92


def test_curves_without_speeds_or_scores_have_no_interval() -> None:
    scores = drawn(documents=20, seed=0)
    curves, of_points = curves_of(scores)
    unknown = Curve("unknown", (point(None, 90.0),))
    found = values_of([unknown, *curves], 95.0, of_points)
    assert [value.interval is None for value in found] == [True, False, False]
    assert [value.ahead is None for value in found] == [True, True, False]
    assert all(value.interval is None for value in values_of(curves, 95.0, {}))
    nothing = {each: 0 * of_point for each, of_point in of_points.items()}
    curves = [Curve(curve.name, tuple(point(p.tokens_per_forward, 0.0) for p in curve.points)) for curve in curves]
    nothing = dict(zip((id(p) for curve in curves for p in curve.points), nothing.values(), strict=True))
    assert [value.aup for value in values_of(curves, 0.0, nothing)] == [None, None]


def test_documents_with_one_score_give_no_interval() -> None:
    """Answers that are all right say nothing of the answers that other documents would get."""
    curves, of_points = curves_of(drawn(documents=20, seed=0))
    right = Curve("right", (point(1.0, 100.0), point(2.0, 100.0)))
    of_points |= {id(each): np.full(20, 100.0) for each in right.points}
    found = values_of([right, *curves], 100.0, of_points)
    assert [(value.interval is None, value.ahead is None) for value in found] == [
        (True, True), (False, True), (False, False),
    ]  # fmt: skip
    assert found[0].aup == pytest.approx(200.0)
    one = {each: its[:1] for each, its in of_points.items()}
    assert all(value.interval is None for value in values_of([right, *curves], 100.0, one))


def test_a_metric_of_which_lower_is_better_has_no_aup() -> None:
    curves, of_points = curves_of(drawn(documents=20, seed=0))
    errors = [
        Curve(curve.name, tuple(dataclasses.replace(each, higher_is_better=False) for each in curve.points))
        for curve in curves
    ]
    scores = dict(zip((id(each) for curve in errors for each in curve.points), of_points.values(), strict=True))
    assert [(value.aup, value.interval) for value in values_of(errors, 95.0, scores)] == [(None, None)] * 2
