"""Operating points: accuracy and speed of each run, the Pareto front of the points, and their curves.

Tokens per forward is the number of returned tokens, divided by the number of denoising and commit forwards. Forwards
are counted for each sequence. Tokens per second is the number of returned tokens, divided by the time of generation;
both are of all tasks that were evaluated together. The counts include answers that came from a store.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from sdar_lm_eval.decoding import DECODING_SETTINGS, DecodingConfig, in_words, spelled
from sdar_lm_eval.engines.native.strategies import STRATEGIES
from sdar_lm_eval.errors import UserError
from sdar_lm_eval.report.columns import main_metric
from sdar_lm_eval.report.fields import Fields
from sdar_lm_eval.report.pairing import document_values, over_seeds
from sdar_lm_eval.report.runs import IDENTITY, Metric, Run, differing
from sdar_lm_eval.report.speed import speed_of
from sdar_lm_eval.report.statistics import FloatArray

DEFAULTS = DecodingConfig(temperature=0.0).as_dict()
OF_CURVES = (*IDENTITY, "num_fewshot", "limit")
"""Settings, beside decoding settings, in which the points of one curve are equal."""


@dataclass(frozen=True)
class Point:
    """A run's accuracy and speed in a task.

    Attributes:
        label: the run's label.
        model: the checkpoint.
        settings: the decoding settings that have an effect; empty for models that report none.
        accuracy: the accuracy in per cent; the metric's value where values are not shares; NaN if the run lacks it.
        stderr: standard error of the accuracy, in its unit; None where it is unknown.
        tokens_per_forward: the speed by forwards; None where it is unknown.
        tokens_per_second: the speed by time; None where it is unknown.
        documents: number of documents that were scored; None where it is unknown.
        repeats: number of evaluations in the run, each with its own seed.
        note: why a speed is unknown; "" where both are known.
        identity: the settings of `OF_CURVES` that are known.
        higher_is_better: False where lower values of the accuracy's metric are better.
    """

    label: str
    model: str
    settings: Mapping[str, object]
    accuracy: float
    stderr: float | None
    tokens_per_forward: float | None
    tokens_per_second: float | None
    documents: int | None
    repeats: int
    note: str
    identity: Mapping[str, object] = field(default_factory=dict)
    higher_is_better: bool = True

    @property
    def strategy(self) -> str:
        """The remasking strategy; the checkpoint where the run reports no strategy."""
        return str(self.settings.get("remasking_strategy", self.model))

    def as_dict(self) -> dict[str, object]:
        """Return field -> value, None for an accuracy that is NaN or infinite, which JSON lacks."""
        return asdict(self) | ({} if math.isfinite(self.accuracy) else {"accuracy": None})


Speed = Callable[[Point], float | None]
"""Returns the speed of a point; None where it is unknown."""


@dataclass(frozen=True)
class Curve:
    """Points of one strategy that differ in one setting, the dial, such as the strategy's threshold.

    Attributes:
        name: the strategy, and the settings other than the dial that tell the curve from other curves.
        points: the points, in the order of the runs.
    """

    name: str
    points: tuple[Point, ...]


def metric_of(run: Run, task: str, name: str | None = None) -> Metric:
    """Return the metric of a task that serves as its accuracy.

    Args:
        run: a run of the task.
        task: the task's name.
        name: "metric" or "metric,filter"; None: the published column's metric, else the task's first.

    Raises:
        UserError: the task has no such metric. The message lists the metrics of the task.
    """
    metrics = run.metrics(task)
    if name is None and (chosen := main_metric(task, metrics)) is not None:
        return chosen
    for metric in metrics:
        if name in (metric.name, metric.key.in_results):
            return metric
    known = ", ".join(metric.key.in_results for metric in metrics)
    asked = "any metric" if name is None else f"a metric {name!r}"
    raise UserError(f"{task} of {run.label} does not have {asked}. Known: {known or 'none'}.")


def points_of(runs: Sequence[Run], task: str, metric: str | None = None) -> list[Point]:
    """Return a point for each run that has the task, in the order of the runs.

    Args:
        runs: the runs; those without the task are left out.
        task: the task's name.
        metric: as for `metric_of`.

    Raises:
        UserError: a run has no such metric, or its files are not as lm_eval writes them.
    """
    chosen = [(run, metric_of(run, task, metric)) for run in runs if task in run.of_tasks]
    scale = _scale(chosen)
    return [_point(run, task, each, scale) for run, each in chosen]


def scores_of(runs: Sequence[Run], task: str, metric: str | None = None) -> list[FloatArray]:
    """Return the scores of the points of `points_of`, in the same order, document by document.

    Args:
        runs, task, metric: as for `points_of`.

    Returns:
        For each point (n,) scores of the same n documents, whose mean is the point's accuracy. Empty where some run has
        no scores of documents, or where runs have other documents.
    """
    chosen = [(run, metric_of(run, task, metric)) for run in runs if task in run.of_tasks]
    values = [document_values(run, task).get(each.key) for run, each in chosen]
    known = [its for its in values if its is not None]
    if len(known) < len(values) or any(its.keys() != known[0].keys() for its in known):
        return []
    return [_scale(chosen) * np.array([its[document] for document in known[0]]) for its in known]


def _scale(chosen: Sequence[tuple[Run, Metric]]) -> float:
    """What a value is multiplied by: 100 where all values are shares."""
    return 100.0 if all(0 <= each.value <= 1 for _, each in chosen if math.isfinite(each.value)) else 1.0


def curves_of(points: Sequence[Point]) -> list[Curve]:
    """Return the curves of points: one for each model, each strategy and each choice of settings other than the dial.

    The dial is the first setting that differs between the strategy's points, in this order: the strategy's own setting,
    such as a threshold; the steps; the other decoding settings. Where every curve would have one point, all points of
    the strategy are one curve.
    """
    curves: list[Curve] = []
    of_points = _telling(points)
    models = _models(points)
    for model, strategy in dict.fromkeys((models[i], point.strategy) for i, point in enumerate(points)):
        mine = [i for i, point in enumerate(points) if (models[i], point.strategy) == (model, strategy)]
        own = _own_setting(strategy)
        settings = [of_points[i] for i in mine]
        dials = [name for name in (own, "denoising_steps", *DECODING_SETTINGS) if name and _varies(name, settings)]
        groups: dict[str, list[Point]] = {}
        for i, its in zip(mine, settings, strict=True):
            told = {name: its.get(name) for name in dict.fromkeys(dials[1:]) if name != dials[0]}
            groups.setdefault(in_words(told), []).append(points[i])
        if all(len(group) == 1 for group in groups.values()):
            groups = {"": [points[i] for i in mine]}
        prefix = f"{model}: " if len(set(models)) > 1 and model != strategy else ""
        for words, group in groups.items():
            curves.append(Curve(prefix + strategy + (f", {words}" if words else ""), tuple(group)))
    return curves


def _models(points: Sequence[Point]) -> list[str]:
    """Each point's checkpoint, with those settings of `OF_CURVES` that tell points of one checkpoint apart."""
    found = []
    for point in points:
        told = differing([each.identity for each in points if each.model == point.model])
        words = ", ".join(f"{name}={spelled(point.identity.get(name))[:12]}" for name in told)
        found.append(f"{point.model} ({words})" if words else point.model)
    return found


def settings_in_words(points: Sequence[Point]) -> list[str]:
    """Return for each point, in words, the settings that tell it from other points.

    These are the settings that differ within the point's strategy, and the settings that are not the default and differ
    between strategies. A single point has all settings that are not the default. A point without such settings has its
    strategy's own setting, or its steps.
    """
    told = []
    settings = _telling(points)
    for point, its in zip(points, settings, strict=True):
        alike = [other for at, other in zip(points, settings, strict=True) if at.strategy == point.strategy]
        chosen = {}
        for name, value in its.items():
            default = its.get("block_length") if name == "denoising_steps" else DEFAULTS.get(name)
            of_others = len(points) == 1 or any(other.get(name, value) != value for other in settings)
            if name != "remasking_strategy" and (_varies(name, alike) or (of_others and value != default)):
                chosen[name] = value
        own = _own_setting(point.strategy) or "denoising_steps"
        told.append(in_words(chosen or {name: value for name, value in point.settings.items() if name == own}))
    return told


def _own_setting(strategy: str) -> str | None:
    """The setting that a strategy's rules read; None for a strategy without one, and for other models."""
    return STRATEGIES[strategy].setting if strategy in STRATEGIES else None


def _telling(points: Sequence[Point]) -> list[Mapping[str, object]]:
    """The points' settings; without the steps where each point has the default, as many steps as a block has tokens."""
    lengths = [(each.settings.get("denoising_steps"), each.settings.get("block_length")) for each in points]
    if any(steps not in (None, length) for steps, length in lengths):
        return [point.settings for point in points]
    return [{n: value for n, value in point.settings.items() if n != "denoising_steps"} for point in points]


def _varies(name: str, settings: Sequence[Mapping[str, object]]) -> bool:
    values = [each.get(name) for each in settings]  # JSON: some may be lists
    return any(value != values[0] for value in values)


def pareto_front(points: Sequence[Point], speed: Speed) -> list[Point]:
    """Return the points on the Pareto front, the slowest first.

    A point is on the front if no other point dominates the point. A point dominates another if the point is at least as
    fast and at least as accurate, and better in one of the two. Points of unknown speed, and points whose accuracy is
    not a number, are not on the front.
    """
    finite = [point for point in points if math.isfinite(point.accuracy)]
    gains = [point.accuracy if point.higher_is_better else -point.accuracy for point in finite]
    known = [
        (fast, gain, point) for point, gain in zip(finite, gains, strict=True) if (fast := speed(point)) is not None
    ]
    front = [
        (fast, point)
        for fast, gain, point in known
        if not any(f >= fast and g >= gain and (f, g) != (fast, gain) for f, g, _ in known)
    ]
    return [point for _, point in sorted(front, key=lambda pair: pair[0])]


def _point(run: Run, task: str, metric: Metric, scale: float) -> Point:
    of_task = run.of_tasks[task]
    metric = next(each for each in over_seeds(run, task) if each.key == metric.key)
    accuracy, stderr = metric.value, metric.stderr
    speed = speed_of(run, task)
    return Point(
        label=run.label,
        model=of_task[0].model or run.label,
        settings=_effective(of_task[0].decoding_of(task)),
        accuracy=scale * accuracy,
        stderr=None if stderr is None else scale * stderr,
        tokens_per_forward=speed.tokens_per_forward,
        tokens_per_second=speed.tokens_per_second,
        documents=of_task[0].answered(task),
        repeats=len(of_task),
        note=speed.note,
        identity={name: value for name, value in run.settings(task).items() if name in OF_CURVES},
        higher_is_better=metric.higher_is_better is not False,
    )


def _effective(decoding: Fields) -> Mapping[str, object]:
    known: dict[str, Any] = {name: value for name, value in decoding.content.items() if name in DECODING_SETTINGS}
    try:
        return DecodingConfig(**known).effective if known else {}
    except UserError:  # settings of another version of this package
        return known
