"""Runs on disk: the results files of one model with one choice of settings, whatever harness model made them.

A path that a user names may hold many results files. Two of them are one run if they are of one model, and of each task
that both have, they answered as many documents with settings that differ in nothing but seeds. Results of the same task
that differ in their seed alone are repeats: each document then has several answers. Of results that do not even differ
in their seed, the newest count.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sdar_lm_eval.errors import UserError
from sdar_lm_eval.report.results import Results, results_in

logger = logging.getLogger(__name__)

SEEDS = ("seed", "random_seed", "numpy_seed", "torch_seed", "fewshot_seed")
"""Settings in which repeats may differ."""

MOST_TOLD = 4
"""Settings in a run's label; runs that differ in more are told apart by their files."""

_OURS = (
    "engine", "engine_version", "engine_commit", "checkpoint_fingerprint", "revision", "dtype", "chat_template",
    "likelihood", "mc_samples", "max_length", "version", "answer_revision", "torch", "gpu", "device",
)  # fmt: skip
_IDENTITY = ("model", "pretrained", "checkpoint_fingerprint", "dtype", "revision")


@dataclass(frozen=True)
class Metric:
    """A task's value of a metric.

    Attributes:
        name: as the task's YAML has it.
        filter: the filter that the metric was computed of.
        value: of all documents together.
        stderr: lm_eval's standard error; None where it computed none.
        higher_is_better: None where the file does not say.
    """

    name: str
    filter: str
    value: float
    stderr: float | None
    higher_is_better: bool | None


@dataclass
class Run:
    """A run on disk.

    Attributes:
        label: how messages and tables name the run; unique among runs that are read together.
        path: what the user named.
        of_tasks: task -> its results; several where the task was evaluated again with another seed.
    """

    label: str
    path: Path
    of_tasks: dict[str, list[Results]] = field(default_factory=dict)

    @property
    def tasks(self) -> list[str]:
        """The tasks, without groups of tasks."""
        return list(self.of_tasks)

    @property
    def results(self) -> list[Results]:
        """The results files, each once."""
        return list({id(each): each for of_task in self.of_tasks.values() for each in of_task}.values())

    def results_of(self, task: str) -> Results:
        """The first results of a task."""
        return self.of_tasks[task][0]

    def settings(self, task: str) -> dict[str, object]:
        """Return what a task's answers and scores depend on, by name; as far as the results file says."""
        return settings_of(self.results_of(task), task)

    def metrics(self, task: str) -> list[Metric]:
        """Return the metrics of a task's first results."""
        return metrics_of(self.results_of(task), task)


def read_runs(paths: Iterable[Path]) -> list[Run]:
    """Return the runs in some paths, in the paths' order; those of a path by date.

    A WARNING names results that are left out since newer ones of the same settings and seed are there.

    Args:
        paths: results files of lm_eval, or folders that hold some.

    Raises:
        UserError: a path does not exist, or holds no results, or a file is not as lm_eval writes it.
    """
    runs: list[Run] = []
    for path in dict.fromkeys(paths):
        runs += _runs_in(path)
    _label(runs)
    return runs


def metrics_of(results: Results, task: str) -> list[Metric]:
    """Return the metrics that a results file has of a task or group."""
    scores = results.scores.part(task)
    better = results.content.part_or_empty("higher_is_better").part_or_empty(task).content
    found = []
    for key, value in scores.content.items():
        name, comma, filter_name = key.partition(",")
        number = _number(value)
        if not comma or name.endswith("_stderr") or number is None:
            continue
        stderr = _number(scores.content.get(f"{name}_stderr,{filter_name}"))  # "N/A" where lm_eval computed none
        higher = better.get(name)
        found.append(
            Metric(
                name=name,
                filter=filter_name,
                value=number,
                stderr=stderr if stderr is not None and math.isfinite(stderr) else None,
                higher_is_better=higher if isinstance(higher, bool) else None,
            )
        )
    return found


def settings_of(results: Results, task: str) -> dict[str, object]:
    """Return what a task's answers and scores depend on, by name; as far as the results file says."""
    config, content, ours = results.config.content, results.content, results.ours.content
    settings: dict[str, object] = {"model": config.get("model"), "pretrained": results.model}
    settings |= {name: ours[name] for name in _OURS if ours.get(name) is not None}
    if decoding := results.decoding_of(task).content:
        settings |= decoding
    else:
        settings |= _model_args(results) | dict(
            results.content.part_or_empty("configs").part_or_empty(task).part_or_empty("generation_kwargs").content
        )
    for name in ("num_fewshot", "limit", *SEEDS):
        if config.get(name) is not None:
            settings[name] = config[name]
    if ours.get("seed") is not None:
        settings["seed"] = ours["seed"]
    shots = content.part_or_empty("n-shot").content.get(task)
    settings |= {} if shots is None else {"num_fewshot": shots}
    settings |= {
        f"{name} of the task": version
        for name, version in (("version", content.part_or_empty("versions").content.get(task)),)
        if version is not None
    }
    for name in ("lm_eval_version", "transformers_version", "chat_template_sha", "system_instruction"):
        if content.content.get(name) is not None:
            settings[name] = content.content[name]
    return settings


def differing(settings: Sequence[Mapping[str, object]]) -> dict[str, list[object]]:
    """Return name -> the value in each of some settings, of those that are not the same in all; None where missing."""
    names = dict.fromkeys(name for each in settings for name in each)
    values = {name: [each.get(name) for each in settings] for name in names}
    return {name: found for name, found in values.items() if any(value != found[0] for value in found)}


def _number(value: object) -> float | None:
    """The value as a number, which may be infinite or NaN; None where it is none that a float holds."""
    try:
        return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None
    except OverflowError:
        return None


def _model_args(results: Results) -> dict[str, object]:
    given = results.config.content.get("model_args")
    if isinstance(given, str):
        given = dict(part.split("=", 1) for part in given.split(",") if "=" in part)
    return {n: v for n, v in given.items() if n != "pretrained"} if isinstance(given, dict) else {}


def _tasks_of(results: Results) -> list[str]:
    """The tasks of a results file, without groups."""
    groups = {name for name, parts in results.content.part_or_empty("group_subtasks").content.items() if parts}
    return [task for task in results.scores.content if task not in groups]


def _runs_in(path: Path) -> list[Run]:
    runs: list[Run] = []
    for results in results_in(path):
        tasks = _tasks_of(results)
        if not tasks:
            continue
        home = next((run for run in runs if _belongs(results, tasks, run)), None)
        if home is None:
            runs.append(home := Run(str(path), path))
        for task in tasks:
            earlier = home.of_tasks.setdefault(task, [])
            seed = _seeds(results, task)
            for older in [each for each in earlier if _seeds(each, task) == seed]:
                logger.warning("%s: %s is left out; %s is newer.", task, older.file, results.file.name)
                earlier.remove(older)
            earlier.append(results)
    if not runs:
        raise UserError(f"{str(path)!r} holds no results of a task. Evaluate with --output_path and --log_samples.")
    return runs


def _belongs(results: Results, tasks: Sequence[str], run: Run) -> bool:
    """Whether results are of a run's model, and of its settings in the tasks that both have."""
    one = run.results_of(run.tasks[0])
    mine, theirs = settings_of(results, tasks[0]), settings_of(one, run.tasks[0])
    if any(mine.get(name) != theirs.get(name) for name in _IDENTITY):
        return False
    shared = [task for task in tasks if task in run.of_tasks]
    # lm_eval does not write which documents --samples chose: a trial on some must not stand for a run on all.
    return all(
        _answered(results, task) == _answered(run.results_of(task), task)
        and not differing([_without_seeds(run.settings(task)), _without_seeds(settings_of(results, task))])
        for task in shared
    )


def _answered(results: Results, task: str) -> object:
    """How many documents were answered; None where the file does not say."""
    return results.content.part_or_empty("n-samples").part_or_empty(task).content.get("effective")


def _without_seeds(settings: Mapping[str, object]) -> dict[str, object]:
    return {name: value for name, value in settings.items() if name not in SEEDS}


def _seeds(results: Results, task: str) -> list[object]:
    settings = settings_of(results, task)
    return [settings.get(name) for name in SEEDS]


def _telling_apart(settings: Sequence[Mapping[str, object]]) -> dict[str, list[object]]:
    """The first settings that tell runs apart, as `differing`; nothing where `MOST_TOLD` of them do not."""
    told: dict[str, list[object]] = {}
    for name, values in differing(settings).items():
        before = len(set(map(str, zip(*told.values(), strict=True)))) if told else 1
        after = len(set(map(str, zip(*told.values(), values, strict=True))))
        if after > before:
            told[name] = values
        if after == len(settings):
            return told if len(told) <= MOST_TOLD else {}
    return {}


def _label(runs: Sequence[Run]) -> None:
    """Add to the labels of a path's runs what tells these runs apart."""
    for path in dict.fromkeys(run.path for run in runs):
        alike = [run for run in runs if run.path == path]
        if len(alike) < 2:
            continue
        told = _telling_apart([run.settings(run.tasks[0]) for run in alike])
        for number, run in enumerate(alike):
            parts = [f"{name}={values[number]}" for name, values in told.items() if values[number] is not None]
            run.label = f"{path} ({', '.join(parts)})" if parts else str(run.results_of(run.tasks[0]).file)
    for number, run in enumerate(runs):
        if any(run.label == other.label for other in runs[:number]):
            run.label = str(run.results_of(run.tasks[0]).file)
