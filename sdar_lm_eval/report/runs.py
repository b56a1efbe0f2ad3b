"""Runs on disk. A run is the results files of one model, which may be any of the harness, with one choice of settings.

A path that a user names may hold many results files. Two results files belong to one run if they have one model and, in
each task that both have, the same number of documents, and settings that differ in seeds only. Results of one task with
different seeds are repeats: each document then has several answers. Of results of one task with equal seeds, only the
newest count.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from sdar_lm_eval.decoding import spelled
from sdar_lm_eval.errors import UserError
from sdar_lm_eval.report.results import Results, results_in
from sdar_lm_eval.report.several import is_better_when_higher

logger = logging.getLogger(__name__)

SEEDS = ("seed", "random_seed", "numpy_seed", "torch_seed", "fewshot_seed")
"""Settings in which the repeats of a run may differ."""

NOT_SCORED = "bypass"
"""The metric of a run with `--predict_only`. lm_eval writes the value 999."""

MOST_TOLD = 4
"""Most settings in a run's label. Where more are needed to tell runs apart, labels are file names."""

_OURS = (
    "engine", "engine_version", "engine_commit", "checkpoint_fingerprint", "revision", "dtype", "chat_template",
    "likelihood", "mc_samples", "max_length", "version", "answer_revision", "torch", "gpu", "device", "kernels",
    "reproducible", "tensor_parallel_size",
)  # fmt: skip
IDENTITY = ("model", "pretrained", "checkpoint_fingerprint", "dtype", "revision")
"""Settings in which the results files of one run are equal."""


class MetricKey(NamedTuple):
    """Identifies a metric of a task. As text, "exact_match of strict-match".

    Attributes:
        name: the metric's name in the task's YAML file.
        filter: the filter whose output was scored.
    """

    name: str
    filter: str

    def __str__(self) -> str:
        return f"{self.name} of {self.filter}"

    @property
    def in_results(self) -> str:
        """The metric as results files and options spell it: "exact_match,strict-match"."""
        return f"{self.name},{self.filter}"


@dataclass(frozen=True)
class Metric:
    """The value of a metric of a task.

    Attributes:
        name: the metric's name in the task's YAML file.
        filter: the filter whose output was scored.
        value: the value over all documents; NaN if the run did not score (`--predict_only`).
        stderr: lm_eval's standard error; None where it computed none.
        higher_is_better: whether higher values are better; None where neither results file nor name says.
    """

    name: str
    filter: str
    value: float
    stderr: float | None
    higher_is_better: bool | None

    @property
    def key(self) -> MetricKey:
        """The metric's name and filter."""
        return MetricKey(self.name, self.filter)


@dataclass
class Run:
    """A run on disk.

    Attributes:
        label: the run's name in messages and tables; unique among runs that are read together.
        path: the path that the user named.
        of_tasks: task -> its results, the oldest first; several where the task was evaluated with several seeds.
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
        """The run's results files, each once."""
        return list({id(each): each for of_task in self.of_tasks.values() for each in of_task}.values())

    def results_of(self, task: str) -> Results:
        """Return the first results of a task."""
        return self.of_tasks[task][0]

    def settings(self, task: str) -> dict[str, object]:
        """Return the settings that a task's answers and scores depend on: name -> value, for those in the file."""
        return settings_of(self.results_of(task), task)

    def told(self, task: str) -> dict[str, object]:
        """Return the settings of a task; of seeds that differ between repeats, the values of all repeats as text."""
        repeats = [settings_of(each, task) for each in self.of_tasks[task]]
        return repeats[0] | {name: ", ".join(map(spelled, values)) for name, values in differing(repeats).items()}

    def metrics(self, task: str) -> list[Metric]:
        """Return the metrics of a task's first results."""
        return metrics_of(self.results_of(task), task)

    def is_scored(self, task: str) -> bool:
        """Return whether the run has more than a task's answers (`--predict_only`)."""
        return any(metric.name != NOT_SCORED for metric in self.metrics(task))

    def require_scores(self, task: str) -> None:
        """Raise unless the run scored a task.

        Raises:
            UserError: the run did not.
        """
        if not self.is_scored(task):
            raise UserError(f"{self.label} has no score of {task}. Evaluate again, without --predict_only.")


def read_runs(paths: Iterable[Path]) -> list[Run]:
    """Return the runs in some paths, in the order of the paths; within a path, the oldest run first.

    A WARNING names results that are left out, since the path has newer results of the same settings and seed.

    Args:
        paths: results files of lm_eval, or folders that hold some.

    Raises:
        UserError: a path does not exist, or holds no results, or a file is not as lm_eval writes it.
    """
    runs: list[Run] = []
    for path in dict.fromkeys(paths):
        runs += _runs_in(path)
    _label(runs)
    kept: list[Run] = []
    for run in runs:
        files = {each.file.resolve() for each in run.results}
        if any(files <= {each.file.resolve() for each in other.results} for other in kept):
            logger.warning("%s is named twice, and counts once.", run.label)
        else:
            kept.append(run)
    return kept


def read_one_run(path: Path) -> Run:
    """Return the run in a path.

    Raises:
        UserError: as `read_runs`, or the path holds several runs.
    """
    runs = read_runs([path])
    if len(runs) > 1:
        named = "".join(f"\n  {each.label}: {each.results[0].file}" for each in runs)
        raise UserError(f"{str(path)!r} holds {len(runs)} runs. Name the results file or the folder of one:{named}")
    return runs[0]


def metrics_of(results: Results, task: str) -> list[Metric]:
    """Return the metrics of a task, or of a group of tasks, in a results file."""
    scores = results.scores.part(task)
    better = results.content.part_or_empty("higher_is_better").part_or_empty(task).content
    found = []
    for key, value in scores.content.items():
        name, comma, filter_name = key.partition(",")
        number = _number(value)
        if not comma or name.endswith("_stderr") or number is None:
            continue
        stderr = _number(scores.content.get(f"{name}_stderr,{filter_name}"))  # "N/A" where lm_eval computed none
        found.append(
            Metric(
                name=name,
                filter=filter_name,
                value=math.nan if name == NOT_SCORED else number,
                stderr=stderr if stderr is not None and math.isfinite(stderr) else None,
                higher_is_better=is_better_when_higher(name, better.get(name)),
            )
        )
    return found


def mean_value(repeats: Sequence[Results], task: str, key: tuple[str, str]) -> float:
    """Return the mean of a metric's value over repeats.

    Args:
        repeats: results files with the metric; one has it at least.
        task: the task, or the group of tasks.
        key: the metric's name and filter (`MetricKey`).
    """
    return fmean(each.value for results in repeats for each in metrics_of(results, task) if each.key == key)


def settings_of(results: Results, task: str) -> dict[str, object]:
    """Return the settings that a task's answers and scores depend on: name -> value, for those in the file."""
    config, content, ours = results.config.content, results.content, results.ours
    of_task = content.part_or_empty("configs").part_or_empty(task)
    settings: dict[str, object] = {"model": config.get("model"), "pretrained": results.model}
    settings |= _present(ours.content, _OURS)
    settings |= ours.part_or_empty("answer_options").content
    if decoding := results.decoding_of(task).content:
        settings |= decoding
    elif "decoding_of_tasks" in ours.content:  # a task of log-likelihoods: other model_args are in `_OURS`
        settings |= _present(ours.part_or_empty("decoding").content, ("block_length",))
    else:
        named = ("model", "pretrained")  # two spellings of the checkpoint; `model` above is the engine's
        settings |= {name: value for name, value in results.model_args.content.items() if name not in named}
        settings |= of_task.part_or_empty("generation_kwargs").content
    settings |= _present(config, ("num_fewshot", "limit", *SEEDS))
    settings |= ours.part_or_empty("thinking").content  # model_args on thoughts, as the user gave them
    if of_task.content.get("repeats") not in (None, 1):
        settings["repeats"] = of_task.content["repeats"]
    if of_task.content.get("metric_list") == [
        {"metric": NOT_SCORED}
    ]:  # such results must not replace those with scores
        settings["predict_only"] = True
    settings |= _present(ours.content, ("seed",))
    for name, part in (("num_fewshot", "n-shot"), ("version of the task", "versions")):
        if (value := content.part_or_empty(part).content.get(task)) is not None:
            settings[name] = value
    if settings.get("num_fewshot") and content.content.get("fewshot_as_multiturn") is False:
        settings["fewshot_as_multiturn"] = False  # lm_eval writes true or null for the default
    names = ("lm_eval_version", "transformers_version", "chat_template_sha", "system_instruction")
    return settings | _present(content.content, names)


def _present(content: Mapping[str, object], names: Iterable[str]) -> dict[str, object]:
    return {name: content[name] for name in names if content.get(name) is not None}


def differing(settings: Sequence[Mapping[str, object]]) -> dict[str, list[object]]:
    """Return the settings that differ: name -> the value in each of `settings`, None where the setting is missing."""
    names = dict.fromkeys(name for each in settings for name in each)
    values = {name: [each.get(name) for each in settings] for name in names}
    return {name: found for name, found in values.items() if any(value != found[0] for value in found)}


def _number(value: object) -> float | None:
    """The value as a number, which may be infinite or NaN; None where it is none that a float holds."""
    try:
        return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None
    except OverflowError:
        return None


def _tasks_of(results: Results) -> list[str]:
    """The tasks of a results file, without groups."""
    groups = results.groups
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
    """Whether results have a run's model and, in the tasks that both have, the run's settings except for seeds."""
    one = run.results_of(run.tasks[0])
    mine, theirs = settings_of(results, tasks[0]), settings_of(one, run.tasks[0])
    if any(mine.get(name) != theirs.get(name) for name in IDENTITY):
        return False
    shared = [task for task in tasks if task in run.of_tasks]
    # lm_eval does not write which documents --samples chose: a trial on some must not stand for a run on all.
    return all(
        results.answered(task) == run.results_of(task).answered(task)
        and not differing([_without_seeds(run.settings(task)), _without_seeds(settings_of(results, task))])
        for task in shared
    )


def _without_seeds(settings: Mapping[str, object]) -> dict[str, object]:
    return {name: value for name, value in settings.items() if name not in SEEDS}


def _seeds(results: Results, task: str) -> list[object]:
    settings = settings_of(results, task)
    return [settings.get(name) for name in SEEDS]


def _folders(runs: Sequence[Run]) -> list[Path]:
    """The folders below a path that tell the runs in it apart, as a sweep's do; nothing where folders do not.

    The files of a run with several seeds may be in folders of their own, below the run's folder.
    """
    parts = [[each.file.parent.relative_to(run.path.expanduser()).parts for each in run.results] for run in runs]
    for depth in range(1, max(len(each) for of_run in parts for each in of_run) + 1):
        of_runs = [{Path(*each[:depth]) for each in of_run} for of_run in parts]
        folders = [folder for of_run in of_runs for folder in of_run]
        if len(folders) == len(set(folders)) == len(runs):
            return folders
    return []


def _telling_apart(settings: Sequence[Mapping[str, object]]) -> dict[str, list[object]]:
    """The first settings that tell all runs apart, as `differing`; none where that takes more than `MOST_TOLD`."""
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
    """Give the runs of each path labels that tell them apart."""
    for path in dict.fromkeys(run.path for run in runs):
        alike = [run for run in runs if run.path == path]
        if len(alike) < 2:
            continue
        folders = _folders(alike)
        if folders:
            for run, folder in zip(alike, folders, strict=True):
                run.label = str(path / folder)
            continue
        told = _telling_apart([run.settings(run.tasks[0]) for run in alike])
        for number, run in enumerate(alike):
            parts = [f"{name}={spelled(values[number])}" for name, values in told.items() if values[number] is not None]
            run.label = f"{path} ({', '.join(parts)})" if parts else str(run.results_of(run.tasks[0]).file)
    for number, run in enumerate(runs):
        if any(run.label == other.label for other in runs[:number]):
            run.label = str(run.results_of(run.tasks[0]).file)
