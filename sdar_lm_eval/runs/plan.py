"""Plans a sweep on this machine: checks all combinations before any runs, and gives each evaluation a folder.

    <output>/strategy=dynamic,threshold=0.9/
        answers/                            finished answers (lm/answers.py), from which an evaluation resumes
        gsm8k_sdar-first-200/<model>/       lm_eval's results and samples files
    <output>/strategy=random/
        answers/
        gsm8k_sdar-first-200-seed-1234/     sampled answers depend on the seed
        gsm8k_sdar-first-200-seed-1235/     a repeat

`config.sdar_lm_eval.asked` of a results file has all that the results depend on: model, settings, limit, seed,
lm_eval's version, and fingerprints of the tasks' YAML files, Python files, documents, prompts and gold answers, of the
checkpoint and of this package's sources.

A folder holds the results of one model. A sweep that would add results of another model, or replace results by those of
other settings, is refused. Where only a task, lm_eval or this package's sources changed, results are replaced: the
answers stay, and are scored again.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager

from sdar_lm_eval.checkpoint import Checkpoint
from sdar_lm_eval.checks import check_limit
from sdar_lm_eval.decoding import DECODING_SETTINGS, in_words, spelled
from sdar_lm_eval.defaults import DEFAULT_CHECKPOINT, DEFAULT_SEED
from sdar_lm_eval.engines.native.strategies import STRATEGIES
from sdar_lm_eval.engines.registry import ENGINES
from sdar_lm_eval.errors import UserError, did_you_mean
from sdar_lm_eval.files import expanded, require_folders
from sdar_lm_eval.hashing import digest_of_files, hex_digest
from sdar_lm_eval.lm.jobs import Jobs
from sdar_lm_eval.lm.prompts import Prompts
from sdar_lm_eval.lm.thoughts import Thoughts
from sdar_lm_eval.report.results import Results
from sdar_lm_eval.runs.earlier import PlannedEvaluation, check_earlier, read_earlier
from sdar_lm_eval.runs.grid import Combination, combinations, without_copies
from sdar_lm_eval.runs.settings import beyond_limits, scored_by
from sdar_lm_eval.runs.shards import load_tasks, scoring_tasks, task_manager
from sdar_lm_eval.settings import Generation, ModelSettings, read_published, to_whole
from sdar_lm_eval.spellings import ALIASES, canonical, overridden

LONGEST_NAME = 200  # most characters of a folder's name; file systems allow 255 bytes


@dataclass(frozen=True)
class SweepArguments:
    """The arguments of a sweep, not yet checked.

    Attributes:
        model: name of a model of this package for `lm_eval --model`.
        model_args: name -> value, as `--model_args`.
        tasks: names of tasks and groups of tasks.
        grids: for each grid: decoding setting -> its values as text (`grid.py`).
        gen_kwargs: settings that all combinations share.
        limit: number of documents of each task, the first ones; below 1: a share of them; None: all.
        num_fewshot: few-shot examples in each prompt; None: as each task says.
        seed: seed of sampled answers; None: model_args' seed, else `DEFAULT_SEED`.
        repeats: number of evaluations of each combination with sampled answers, each with its own seed.
        output: the sweep's folder; None: a folder in `sweeps/`, named after model and tasks.
        include_path: a folder with the user's own tasks; None: none.
        confirm_run_unsafe_code: whether the user agrees that programs which the model writes are run.
        metric: "metric" or "metric,filter" that serves as accuracy; None: each task's own.
    """

    model: str
    model_args: Mapping[str, object]
    tasks: tuple[str, ...]
    grids: tuple[Mapping[str, str], ...]
    gen_kwargs: Mapping[str, object]
    limit: float | None = None
    num_fewshot: int | None = None
    seed: int | None = None
    repeats: int = 1
    output: Path | None = None
    include_path: str | None = None
    confirm_run_unsafe_code: bool = False
    metric: str | None = None

    @property
    def whole_limit(self) -> float | None:
        """The limit, as an int where it is a number of documents and no share."""
        return int(self.limit) if self.limit is not None and self.limit >= 1 else self.limit


@dataclass(frozen=True)
class Plan:
    """A sweep that was checked.

    Attributes:
        sweep: the sweep's arguments.
        model_args: the model_args of `sweep`, with the checkpoint and without the seed.
        tasks: the names of the tasks, with groups resolved into their tasks.
        manager: loads the tasks.
        output: the sweep's folder.
        evaluations: the evaluations in the order in which they run.
        earlier: all results of sweeps that the folder has.
        copies: number of combinations left out, which differ from others only in settings without effect.
    """

    sweep: SweepArguments
    model_args: Mapping[str, object]
    tasks: tuple[str, ...]
    manager: TaskManager
    output: Path
    evaluations: tuple[PlannedEvaluation, ...]
    earlier: tuple[Results, ...]
    copies: int

    @property
    def paths(self) -> list[Path]:
        """Folders with this sweep's results and no others. A combination's seeds are one run only within one folder.

        The sweep's folder alone stands for the results where it has no others, or where no folder has a combination's
        seeds alone.
        """
        found = {file.relative_to(self.output).parts[:2] for file in self.output.rglob("results_*.json")}
        own = [key for each in self.evaluations if (key := (each.folder.name, each.name)) in found]
        if found.issubset(own):
            return [self.output]
        paths = []
        for folder in dict.fromkeys(folder for folder, _ in own):
            mine, all_of_folder = ([key for key in keys if key[0] == folder] for keys in (own, found))
            if len(mine) < len(all_of_folder) and len(mine) > 1:
                return [self.output]
            paths.append(self.output.joinpath(*mine[0]) if len(mine) == 1 else self.output / folder)
        return paths


@dataclass(frozen=True)
class _Checked:
    """A combination without settings that have no effect, and the settings that decode each task's requests."""

    settings: Combination
    generations: tuple[Generation, ...]

    @property
    def key(self) -> str:
        """A key that is equal for copies."""
        of_tasks = [{**each.decoding.effective, "max_gen_toks": each.max_gen_toks} for each in self.generations]
        return hex_digest(of_tasks, digits=32)


def plan(sweep: SweepArguments) -> Plan:
    """Check a sweep, and return its plan. Nothing is evaluated; a checkpoint of the hub is downloaded.

    Raises:
        UserError: a model, a task or a setting is unknown or refused, or the folder has results of another model or of
            other settings. The message names a combination that is refused.
    """
    engine = _engine_of(sweep.model)
    _check_numbers(sweep)
    model_args: dict[str, object] = {"pretrained": DEFAULT_CHECKPOINT, **sweep.model_args}
    if "answers" in model_args:
        raise UserError(
            "model_args: answers=… is not for a sweep, which keeps answers in --output_path. Leave answers=… out."
        )
    seed = _seed(sweep, model_args.pop("seed", None))
    arguments = {name: value for name, value in model_args.items() if name != "pretrained"}
    settings = ModelSettings.read(str(model_args["pretrained"]), arguments, engine)
    if sweep.include_path is not None:
        require_folders("--include_path", sweep.include_path)
    manager = task_manager(sweep.tasks, sweep.include_path)
    loaded = load_tasks(sweep.tasks, manager)
    # lm_eval orders tasks by itself. Here the user's order comes first, then the tasks of groups.
    tasks = {name: loaded[name] for name in (*sweep.tasks, *loaded) if name in loaded}
    _check_tasks(tasks, sweep.confirm_run_unsafe_code)
    if sweep.metric is not None:
        _check_metric(tasks, sweep.metric)
    checkpoint = Checkpoint.open(settings.pretrained, settings.revision)
    prompts = Prompts(checkpoint, settings.chat_template, Thoughts.read(settings.thoughts, checkpoint))
    jobs = Jobs(checkpoint, prompts, settings.decoding, settings.max_length)
    grid = [each for texts in sweep.grids for each in combinations(texts, lambda name: f"--{name}")]
    checked = [_check(each, sweep, jobs, tasks, engine) for each in grid]
    kept = without_copies(checked, lambda each: each.key)
    output = expanded(sweep.output or Path("sweeps") / _file_name(f"{checkpoint.name}-{'+'.join(sweep.tasks)}"))
    asked = _asked(sweep, model_args, tasks, checkpoint)
    evaluations = [
        evaluation
        for combination in kept
        for evaluation in _evaluations(combination, sweep, seed, output, asked, tasks)
    ]
    earlier = read_earlier(output)
    check_earlier(output, earlier, evaluations, jobs)
    copies = len(checked) - len(kept)
    return Plan(sweep, model_args, tuple(tasks), manager, output, tuple(evaluations), earlier, copies)


def _check_numbers(sweep: SweepArguments) -> None:
    if sweep.repeats < 1:
        raise UserError(f"--repeats {sweep.repeats} is out of range: it must be 1 or more.")
    check_limit(sweep.limit)


def _asked(
    sweep: SweepArguments, model_args: Mapping[str, object], tasks: Mapping[str, Task], checkpoint: Checkpoint
) -> dict[str, object]:
    """Return what `PlannedEvaluation.asked` has in all combinations."""
    python_files = None
    if sweep.include_path is not None:  # a task's functions may call functions of other files
        python_files = digest_of_files(Path(sweep.include_path), lambda file: file.suffix == ".py")
    limit = sweep.whole_limit
    return {
        "model": sweep.model,
        "model_args": model_args,
        "tasks": {name: hex_digest(task.config.to_dict(keep_callable=True)) for name, task in tasks.items()},
        "documents": {name: _digest_of_documents(task, limit, _shots(task, sweep)) for name, task in tasks.items()},
        "python_files": python_files,
        "lm_eval": version("lm_eval"),
        "limit": limit,
        "num_fewshot": sweep.num_fewshot,
        "checkpoint": checkpoint.fingerprint,
        "scored_by": scored_by(),
    }


def _shots(task: Task, sweep: SweepArguments) -> int:
    """The number of few-shot examples in a task's prompts, by lm_eval's rule: a YAML's 0 cannot be overridden."""
    own = task.config.num_fewshot
    return int(own or 0) if own == 0 or sweep.num_fewshot is None else sweep.num_fewshot


def _evaluations(
    combination: _Checked,
    sweep: SweepArguments,
    seed: int,
    output: Path,
    asked: Mapping[str, object],
    tasks: Mapping[str, Task],
) -> Iterator[PlannedEvaluation]:
    """Yield a combination's evaluations: one where nothing is drawn, else one for each repeat's seed from `seed` on."""
    is_drawn = any(generation.is_drawn for generation in combination.generations)
    gen_kwargs = _gen_kwargs(sweep, combination.settings)
    effect = {
        task: its.as_dict() | {"num_fewshot": _shots(tasks[task], sweep)}
        for task, its in zip(tasks, combination.generations, strict=True)
    }
    name = "+".join(sweep.tasks)
    if sweep.whole_limit is not None:
        name += f"-first-{spelled(sweep.whole_limit)}"
    for used in range(seed, seed + sweep.repeats) if is_drawn else [None]:
        own = {**asked, "gen_kwargs": gen_kwargs, "seed": used}
        yield PlannedEvaluation(
            settings=combination.settings,
            seed=used,
            folder=output / _file_name(_folder_name(combination.settings)),
            name=_file_name(name if used is None else f"{name}-seed-{used}"),
            asked=json.loads(json.dumps(own, default=str)),
            effect=effect,
        )


def _engine_of(model: str) -> str:
    for spec in ENGINES.values():
        if spec.model == model:
            return spec.name
    known = [spec.model for spec in ENGINES.values()]
    raise UserError(
        f"--model {model}: a sweep varies the decoding settings of this package's models.{did_you_mean(model, known)} "
        f"Choose {', '.join(known)}."
    )


def _seed(sweep: SweepArguments, of_model: object) -> int:
    if sweep.seed is not None:
        return sweep.seed
    return DEFAULT_SEED if of_model is None else to_whole("seed", of_model)


def _check_tasks(tasks: Mapping[str, Task], confirmed: bool) -> None:
    if scored := scoring_tasks(tasks):
        raise UserError(
            f"--tasks {', '.join(scored[:5])}: scored by log-likelihoods, which decoding settings do not change. "
            "Choose tasks that generate, such as gsm8k_sdar."
        )
    unsafe = [name for name, task in tasks.items() if getattr(task, "UNSAFE_CODE", False)]
    if unsafe and not confirmed:
        raise UserError(
            f"--tasks {', '.join(unsafe[:5])}: scored by running programs that the model writes. Give "
            "--confirm_run_unsafe_code to agree. Nothing was run."
        )


def _check_metric(tasks: Mapping[str, Task], metric: str) -> None:
    for name, task in tasks.items():
        filters = [each["name"] for each in task.config.filter_list or [{"name": "none"}]]
        metrics = list(task.aggregation())
        known = [f"{each},{filter_name}" for each in metrics for filter_name in filters]
        if metric not in (*metrics, *known):
            hint = did_you_mean(metric, (*metrics, *known))
            raise UserError(f"--metric {metric}: {name} has no such metric.{hint} Choose {' or '.join(known)}.")


def _digest_of_documents(task: Task, limit: float | None, shots: int) -> str:
    """Return a hash of the documents that a task evaluates, and of those that its few-shot examples come from.

    A task's YAML names a file or a data set of the hub, whose content may change under the same name. So may a file
    that the task's Python reads for prompts and gold answers, which the hash has for each document.
    """
    first = limit if isinstance(limit, int) else None  # of a share of the documents, all count
    documents = itertools.chain(itertools.islice(task.eval_docs, first), task.fewshot_docs() if shots else ())
    return hex_digest([(doc, task.doc_to_text(doc), task.doc_to_target(doc)) for doc in documents])


def _gen_kwargs(sweep: SweepArguments, combination: Combination) -> dict[str, object]:
    """The settings of a combination, with the shared ones. A temperature of the combination decides about sampling."""
    gen_kwargs = {**canonical(sweep.gen_kwargs), **combination}
    if "temperature" in combination:
        gen_kwargs["do_sample"] = combination["temperature"] != 0
    return gen_kwargs


def _check(
    combination: Combination, sweep: SweepArguments, jobs: Jobs, tasks: Mapping[str, Task], engine: str
) -> _Checked:
    """Check a combination for all tasks, and return it; raise `UserError` where the model would refuse it."""
    gen_kwargs = _gen_kwargs(sweep, combination)
    try:
        generations = []
        for task in tasks.values():
            of_task = overridden(task.config.generation_kwargs or {}, gen_kwargs)
            its = jobs.generation_of(of_task, read_published(task.config.metadata))
            jobs.room_for_prompt(its.max_gen_toks)
            if beyond := next(beyond_limits(engine, its.decoding), None):
                name, value, allowed = beyond
                raise UserError(
                    f"{name}={value} is not for --model {sweep.model}, which takes {', '.join(map(str, allowed))}. "
                    "Choose one of these, or --model sdar."
                )
            generations.append(its)
    except UserError as error:
        raise UserError(f"{error} The sweep asks for it at {in_words(combination)}. Nothing was run.") from error
    idle = frozenset.intersection(*(its.decoding.idle for its in generations))
    settings = {name: value for name, value in combination.items() if name not in idle}
    return _Checked(settings, tuple(generations))


def _folder_name(settings: Combination) -> str:
    """Return a combination as name=value,…, with short names that gen_kwargs take, in a fixed order."""
    short = {full: name for name, full in reversed(ALIASES.items())}
    parts = []
    for name in sorted(settings, key=("remasking_strategy", *DECODING_SETTINGS).index):
        value = spelled(settings[name])
        strategy = STRATEGIES.get(value)
        parts.append(f"{short.get(name, name)}={strategy.short or value if strategy else value}")
    return ",".join(parts) or "unchanged"


def _file_name(text: str) -> str:
    """Return a file name made of a text: without path separators, and at most about `LONGEST_NAME` characters."""
    name = re.sub(r"[^\w.,=+-]+", "_", text).strip("_.") or "sweep"
    return name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}-{hex_digest(text, digits=12)}"
