"""AUP, the accuracy under parallelism of a curve of operating points, with its 95% interval.

The interval is a paired bootstrap's (B. Efron, The Annals of Statistics 7 (1979) 1). Documents are drawn with
replacement, the same documents for all points. Each draw has its own accuracies, and its own points that count. The
interval reaches from the 2.5% quantile of the draws' AUPs to the 97.5% quantile. All draws have the runs' tokens per
forward, and the same y_max: the best of noisy accuracies is too high, and higher in draws than in the runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from sdar_lm_eval.report.points import Curve, Point
from sdar_lm_eval.report.statistics import FloatArray

ALPHA = 3.0
"""The weight's exponent in `aup`."""
TOLERANCE = 5.0
"""Percentage points of accuracy that a point may lose against its curve's slowest point, so as to count in AUP."""
DRAWS = 2_000
"""Draws of documents."""

Interval = tuple[float, float]


def aup(curve: Sequence[tuple[float, float]], y_max: float) -> float:
    """Return the accuracy under parallelism (AUP) of a curve, in per cent times tokens per forward.

    Sort the points by tokens per forward r, with accuracies y, and let W(y) = min(exp(-3 (1 - y / y_max)), 1). AUP is
    r_1 y_1 + sum over i >= 2 of (r_i - r_{i-1}) (y_i W(y_i) + y_{i-1} W(y_{i-1})) / 2. Points whose accuracy is more
    than 5 percentage points below y_1 are left out.

    Source: d3LLM (hao-ai-lab/d3LLM at e5bfcac), AUP_leaderboard/aup_utils.py.

    Args:
        curve: (tokens per forward, above 0; accuracy in per cent), in any order.
        y_max: the best accuracy of all curves that are compared, in per cent.

    Raises:
        ValueError: there is no point, a number of tokens per forward or y_max is not above 0, or the fastest point's
            accuracy is more than 5 percentage points below the slowest point's.
    """
    if not curve or y_max <= 0 or any(speed <= 0 for speed, _ in curve):
        raise ValueError("AUP needs points, with tokens per forward and y_max above 0.")
    ordered = sorted(curve, key=lambda point: point[0])
    floor = ordered[0][1] - TOLERANCE
    if ordered[-1][1] < floor:
        raise ValueError(
            f"The fastest point's accuracy, {ordered[-1][1]:g}, is more than {TOLERANCE:g} below the slowest point's, "
            f"{ordered[0][1]:g}: AUP is defined for curves that end within these {TOLERANCE:g}."
        )
    kept = [(speed, y) for speed, y in ordered if y >= floor]
    weighted = [y * min(math.exp(-ALPHA * (1 - y / y_max)), 1.0) for _, y in kept]
    area = kept[0][0] * kept[0][1]
    for i in range(1, len(kept)):
        area += (kept[i][0] - kept[i - 1][0]) * (weighted[i] + weighted[i - 1]) / 2
    return area


@dataclass(frozen=True)
class CurveValue:
    """The AUP of a curve.

    Attributes:
        name: the curve's name.
        aup: the AUP of the points that count (`aup`); None where no point's tokens per forward is known, where all
            answers are wrong, and where lower values of the metric are better.
        points: number of points that count.
        left_out: number of points left out, whose accuracy is more than 5 percentage points below the slowest point's.
        interval: the 95% interval of the AUP; None where it is unknown, as where all documents have the same score.
        ahead: the AUP minus that of the first curve with an interval; None for this curve, and without an interval.
        ahead_interval: the paired 95% interval of `ahead`; None where `ahead` is None.
    """

    name: str
    aup: float | None
    points: int
    left_out: int
    interval: Interval | None = None
    ahead: float | None = None
    ahead_interval: Interval | None = None

    def as_dict(self) -> dict[str, object]:
        """Return field -> value; `curve` is the name."""
        return {"curve" if name == "name" else name: value for name, value in asdict(self).items()}


def value_of(curve: Curve, y_max: float) -> CurveValue:
    """Return the AUP of a curve's points that lose at most 5 percentage points against the slowest point.

    `aup` refuses a curve whose fastest point lost more. A sweep includes such points on purpose, so `value_of` leaves
    them out before it calls `aup`, and counts them.
    """
    known = [(speed, point.accuracy) for speed, point in _by_speed(curve)]
    kept = _counted(known)
    value = aup(kept, y_max) if kept and y_max > 0 else None
    return CurveValue(curve.name, value, len(kept), len(known) - len(kept))


def values_of(curves: Sequence[Curve], y_max: float, scores: Mapping[int, FloatArray]) -> list[CurveValue]:
    """Return the AUP of some curves with intervals, and the differences from the first curve that has an interval.

    Args:
        curves: the curves.
        y_max: as for `aup`.
        scores: `id` of each point of the curves -> (n,) the scores of n documents, in per cent, whose mean is the
            point's accuracy. All points have the same documents. Empty: there are no intervals.
    """
    values = [value_of(curve, y_max) for curve in curves]
    if not scores:
        return values
    found: list[CurveValue] = []
    first: tuple[float, FloatArray] | None = None
    for value, draws in zip(values, _draws(curves, y_max, scores), strict=True):
        interval = _interval(draws)
        if value.aup is None or interval is None:
            found.append(value)
        elif first is None:
            first = value.aup, draws
            found.append(replace(value, interval=interval))
        else:
            ahead, of_draws = value.aup - first[0], draws - first[1]
            found.append(replace(value, interval=interval, ahead=ahead, ahead_interval=_interval(of_draws)))
    return found


def _draws(curves: Sequence[Curve], y_max: float, scores: Mapping[int, FloatArray]) -> Iterator[FloatArray]:
    """Yield for each curve the AUPs of the draws of documents, (DRAWS,); 0 where a curve has no AUP."""
    row_of = {point: row for row, point in enumerate(scores)}
    of_points = np.stack(list(scores.values()))
    documents = of_points.shape[1]
    counts = np.random.default_rng(0).multinomial(documents, np.full(documents, 1 / documents), size=DRAWS)
    accuracies = (counts @ of_points.T / documents).tolist()  # of each draw, of each point
    for curve in curves:
        known = [(speed, row_of[id(point)]) for speed, point in _by_speed(curve)]
        of_draws = (_counted([(speed, of_draw[row]) for speed, row in known]) for of_draw in accuracies)
        yield np.array([aup(kept, y_max) if kept and y_max > 0 else 0.0 for kept in of_draws])


def _by_speed(curve: Curve) -> list[tuple[float, Point]]:
    """The points whose tokens per forward and accuracy are known, the slowest first; none where lower is better."""
    finite = [point for point in curve.points if math.isfinite(point.accuracy) and point.higher_is_better]
    return sorted(((p.tokens_per_forward, p) for p in finite if p.tokens_per_forward), key=lambda pair: pair[0])


def _counted(curve: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points of a curve, in the order of their speed, that lose at most `TOLERANCE` against the first."""
    return [(speed, y) for speed, y in curve if y >= curve[0][1] - TOLERANCE]


def _interval(draws: FloatArray) -> Interval | None:
    """The 95% interval; None where all draws are equal, since equal scores say nothing of other documents."""
    low, high = np.quantile(draws, [0.025, 0.975]).tolist()
    return None if np.allclose(draws, draws[0], rtol=1e-9) else (low, high)
