"""A sweep on this machine, planned: which evaluations there are, each in a folder of its own; refused before any runs.

    <output>/strategy=dynamic,threshold=0.9/
        answers/                            finished answers (lm/answers.py), from which a run goes on
        gsm8k_sdar-first-200/<model>/       lm_eval's results and samples files
    <output>/strategy=random/
        answers/
        gsm8k_sdar-first-200-seed-1234/     answers that are drawn depend on the seed
        gsm8k_sdar-first-200-seed-1235/     a repeat

A results file holds what was asked: model, settings, tasks with their YAML, checkpoint, and this package's sources.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager

from sdar_lm_eval.checkpoint import Checkpoint
from sdar_lm_eval.decoding import DECODING_SETTINGS, in_words, spelled
from sdar_lm_eval.engines.native.strategies import STRATEGIES
from sdar_lm_eval.engines.registry import ENGINES
from sdar_lm_eval.errors import UserError, did_you_mean
from sdar_lm_eval.files import expanded
from sdar_lm_eval.hashing import hex_digest
from sdar_lm_eval.lm.jobs import Jobs
from sdar_lm_eval.lm.model import DEFAULT_CHECKPOINT, DEFAULT_SEED
from sdar_lm_eval.lm.prompts import Prompts
from sdar_lm_eval.report.results import Results, results_in
from sdar_lm_eval.runs.grid import Combination, combinations, without_copies
from sdar_lm_eval.runs.settings import beyond_limits, scored_by
from sdar_lm_eval.runs.shards import load_tasks, scoring_tasks, task_manager
from sdar_lm_eval.settings import ALIASES, Generation, ModelSettings, canonical, to_whole

LONGEST_NAME = 200  # characters of a folder's name; file systems allow 255 bytes


@dataclass(frozen=True)
class Question:
    """What a sweep asks: the arguments of its command.

    Attributes:
        model: lm_eval's name of a model of this package.
        model_args: as lm_eval takes them.
        tasks: tasks and groups of the harness.
        grids: each has decoding setting -> its values as text (`grid.py`).
        gen_kwargs: settings that all combinations share.
        limit: the first documents of each task, or a share of them below 1; None: all.
        num_fewshot: solved examples before each question; None: what each task says.
        seed: of what is drawn; None: model_args' seed, else lm_eval's default.
        repeats: evaluations of a combination whose answers are drawn, with a seed each.
        output: the sweep's folder; None: a folder in `sweeps/`, named by model and tasks.
        include_path: a folder with the user's own tasks.
        confirm_run_unsafe_code: the user agrees that programs of the model are run.
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


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of a sweep.

    Attributes:
        settings: the combination, without settings that have no effect.
        seed: of what is drawn.
        folder: the combination's folder.
        name: the name of the folder of results within it.
        asked: what the results depend on, as JSON.
    """

    settings: Combination
    seed: int
    folder: Path
    name: str
    asked: Mapping[str, object]

    @property
    def gen_kwargs(self) -> Mapping[str, object]:
        """The combination's settings, and those that all combinations share."""
        gen_kwargs = self.asked["gen_kwargs"]
        assert isinstance(gen_kwargs, dict)
        return gen_kwargs

    def results(self) -> Results | None:
        """Return the results of what is asked; None where there are none yet."""
        folder = self.folder / self.name
        if not any(folder.rglob("results_*.json")):
            return None
        with contextlib.suppress(UserError):  # damaged files count as missing
            newest = results_in(folder)[-1]
            if newest.ours.content.get("asked") == self.asked:
                return newest
        return None


@dataclass(frozen=True)
class Plan:
    """A sweep that was checked.

    Attributes:
        question: what is asked.
        model_args: the question's, with the checkpoint and without the seed.
        tasks: the names of the tasks, groups resolved into their tasks.
        manager: loads them.
        output: the sweep's folder.
        evaluations: in the order in which they run.
        copies: how many combinations differ from others only in settings without effect.
    """

    question: Question
    model_args: Mapping[str, object]
    tasks: tuple[str, ...]
    manager: TaskManager
    output: Path
    evaluations: tuple[Evaluation, ...]
    copies: int


@dataclass(frozen=True)
class _Checked:
    """A combination without settings that have no effect, and what each task's requests are decoded with."""

    settings: Combination
    generations: tuple[Generation, ...]

    @property
    def key(self) -> str:
        """The same for copies."""
        of_tasks = [{**each.decoding.effective, "max_gen_toks": each.max_gen_toks} for each in self.generations]
        return hex_digest(of_tasks, digits=32)


def plan(question: Question) -> Plan:
    """Check a sweep, and return its evaluations.

    Raises:
        UserError: a model, a task or a setting is unknown or refused; a combination that is refused is named.
    """
    engine = _engine_of(question.model)
    if question.repeats < 1:
        raise UserError(f"--repeats {question.repeats} is out of range: it must be 1 or more.")
    if question.limit is not None and not question.limit > 0:
        raise UserError(f"--limit {question.limit:g}: give a number of documents above 0, or a share between 0 and 1.")
    model_args: dict[str, object] = {"pretrained": DEFAULT_CHECKPOINT, **question.model_args}
    if "answers" in model_args:
        raise UserError(
            "model_args: answers=… has no say in a sweep, which keeps answers in --output_path. Leave it out."
        )
    seed = _seed(question, model_args.pop("seed", None))
    arguments = {name: value for name, value in model_args.items() if name != "pretrained"}
    settings = ModelSettings.read(str(model_args["pretrained"]), arguments, engine)
    manager = task_manager(question.tasks, question.include_path)
    tasks = load_tasks(question.tasks, manager)
    _check_tasks(tasks, question.confirm_run_unsafe_code)
    checkpoint = Checkpoint.open(settings.pretrained, settings.revision)
    prompts = Prompts(checkpoint, settings.chat_template)
    jobs = Jobs(checkpoint, prompts, settings.decoding, settings.max_length, alone=True)
    grid = [each for texts in question.grids for each in combinations(texts, lambda name: f"--{name}")]
    checked = [_check(each, question, jobs, tasks, engine) for each in grid]
    kept = without_copies(checked, lambda each: each.key)

    limit = None if question.limit is None else int(question.limit) if question.limit >= 1 else question.limit
    named = "+".join(question.tasks)
    output = expanded(question.output or Path("sweeps") / _file_name(f"{checkpoint.name}-{named}"))
    common = {
        "model": question.model,
        "model_args": model_args,
        "tasks": {name: hex_digest(json.dumps(task.dump_config(), default=str)) for name, task in tasks.items()},
        "limit": limit,
        "num_fewshot": question.num_fewshot,
        "checkpoint": checkpoint.fingerprint,
        "scored_by": scored_by(),
    }
    evaluations = []
    for combination in kept:
        is_drawn = any(generation.is_drawn for generation in combination.generations)
        gen_kwargs = _gen_kwargs(question, combination.settings)
        for used in range(seed, seed + (question.repeats if is_drawn else 1)):
            asked = {**common, "gen_kwargs": gen_kwargs, "seed": used if is_drawn else None}
            name = named + ("" if limit is None else f"-first-{spelled(limit)}") + (f"-seed-{used}" if is_drawn else "")
            evaluations.append(
                Evaluation(
                    settings=combination.settings,
                    seed=used,
                    folder=output / _file_name(_folder_name(combination.settings)),
                    name=_file_name(name),
                    asked=json.loads(json.dumps(asked, default=str)),
                )
            )
    return Plan(
        question, model_args, tuple(tasks), manager, output, tuple(evaluations), copies=len(checked) - len(kept)
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


def _seed(question: Question, of_model: object) -> int:
    if question.seed is not None:
        return question.seed
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


def _gen_kwargs(question: Question, combination: Combination) -> dict[str, object]:
    """A combination's settings with those that all share. A temperature decides whether tokens are drawn."""
    gen_kwargs = {**canonical(question.gen_kwargs), **combination}
    if "temperature" in combination:
        gen_kwargs["do_sample"] = combination["temperature"] != 0
    return gen_kwargs


def _check(
    combination: Combination, question: Question, jobs: Jobs, tasks: Mapping[str, Task], engine: str
) -> _Checked:
    """Refuse what the model would, of any task."""
    gen_kwargs = _gen_kwargs(question, combination)
    try:
        generations = []
        for task in tasks.values():
            published = (task.config.metadata or {}).get("sdar_decoding") or {}
            its = jobs.generation_of({**(task.config.generation_kwargs or {}), **gen_kwargs}, published)
            jobs.room_for_prompt(its.max_gen_toks)
            for name, value, allowed in beyond_limits(engine, its.decoding):
                raise UserError(
                    f"{name}={value} is not for --model {question.model}, which takes {', '.join(map(str, allowed))}. "
                    "Choose one of these, or --model sdar."
                )
            generations.append(its)
    except UserError as error:
        raise UserError(f"{error} The sweep asks for it at {in_words(combination)}. Nothing was run.") from error
    idle = frozenset.intersection(*(its.decoding.idle for its in generations))
    settings = {name: value for name, value in combination.items() if name not in idle}
    return _Checked(settings, tuple(generations))


def _folder_name(settings: Combination) -> str:
    """Return the settings in their short spellings, as gen_kwargs take them, in one order."""
    short = {full: name for name, full in reversed(ALIASES.items())}
    parts = []
    for name in sorted(settings, key=("remasking_strategy", *DECODING_SETTINGS).index):
        value = spelled(settings[name])
        strategy = STRATEGIES.get(value)
        parts.append(f"{short.get(name, name)}={strategy.short or value if strategy else value}")
    return ",".join(parts) or "unchanged"


def _file_name(text: str) -> str:
    """Return a text as the name of a file: without separators, and short enough."""
    name = re.sub(r"[^\w.,=+-]+", "_", text).strip("_.") or "sweep"
    return name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}-{hex_digest(text, digits=12)}"
