"""Answers a machine's share of a run's documents, into the run's folder of answers."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager, get_task_dict
from lm_eval.utils import setup_logging

from sdar_lm_eval.autoload import manager_of_ours
from sdar_lm_eval.errors import SDARError, UserError, did_you_mean
from sdar_lm_eval.lm.task_methods import samples_are_a_share
from sdar_lm_eval.runs.settings import RUN_PROGRAMS, RunSettings

ANSWERS = "answers"
"""Name of the folder of answers in a run's folder."""


TaskTree = Mapping[object, "Task | TaskTree"]
"""Tasks by name, and by the names of their groups."""


class _AnsweredError(Exception):
    """Ends an evaluation whose answers are there."""


def answer_shard(run: RunSettings, folder: Path, shard: int, shards: int, **model_args: str | None) -> None:
    """Answer a share of a run's documents, except those whose answers are in the folder already.

    Nothing is filtered or scored, so no program of the model runs here.

    Args:
        run: the evaluation.
        folder: the run's; this process adds a file to its `answers`.
        shard: this machine's number, 1 to `shards`.
        shards: number of machines that share the documents.
        model_args: further model_args.

    Raises:
        UserError: the run asks for something that the model or the task refuses.
        EngineError: the engine stopped; finished answers are in the folder.
    """
    setup_logging("INFO")
    manager = task_manager(run.tasks)
    call = run.harness_call(**model_args, answers=str(folder / ANSWERS))
    share: dict[str, list[int]] | None = None
    if shards > 1:
        share = share_of(document_counts(run.tasks, run.num_samples, manager), shard, shards)
        if not share:
            return
    lm = get_model(call["model"]).create_from_arg_obj(call["model_args"])
    generate = lm.generate_until

    def answer(requests: Sequence[Instance], **settings: bool) -> None:
        generate(requests, **settings)
        raise _AnsweredError  # the harness would filter and score returned answers

    lm.generate_until = answer
    with contextlib.suppress(_AnsweredError), samples_are_a_share():
        lm_eval.simple_evaluate(
            lm,
            tasks=call["tasks"] if share is None else list(share),
            samples=share,
            limit=call["limit"] if share is None else None,
            gen_kwargs=call["gen_kwargs"],
            task_manager=manager,
            confirm_run_unsafe_code=True,  # lm_eval asks for it, though no program runs here
        )


def task_manager(tasks: Sequence[str], include_path: str | None = None) -> TaskManager:
    """Return a manager that knows these tasks.

    Where all are this package's it knows no others: reading the harness's thousands takes seconds of a GPU's time.

    Args:
        tasks: names of tasks and groups.
        include_path: a folder with the user's own tasks; None: there is none.
    """
    if include_path is not None:
        return TaskManager(include_path=include_path)
    return manager_of_ours(tasks) or TaskManager()


def document_counts(
    tasks: Sequence[str], num_samples: int | None, manager: TaskManager | None = None
) -> dict[str, int]:
    """Return how many documents of each task are evaluated, groups resolved into their tasks.

    Raises:
        UserError: a task is unknown, asks for log-likelihoods, cannot be loaded, or is one of the harness's own that
            runs programs of the model.
    """
    found = load_tasks(tasks, manager or task_manager(tasks))
    scored = scoring_tasks(found)
    if scored:
        raise UserError(
            f"--tasks {', '.join(scored[:5])}: ask for log-likelihoods, which this runner does not keep. "
            "Run them by `lm_eval --model sdar`, or choose tasks that generate, such as gsm8k_sdar."
        )
    unsafe = [name for name, task in found.items() if getattr(task, "UNSAFE_CODE", False) and name not in RUN_PROGRAMS]
    if unsafe:
        raise UserError(
            f"--tasks {', '.join(unsafe[:5])}: the harness runs the programs of these tasks where all answers are. "
            f"Choose {' or '.join(RUN_PROGRAMS[:2])}, whose programs run apart, or use `lm_eval --model sdar`."
        )
    return {
        name: len(task.eval_docs) if num_samples is None else min(num_samples, len(task.eval_docs))
        for name, task in found.items()
    }


def load_tasks(tasks: Sequence[str], manager: TaskManager) -> dict[str, Task]:
    """Return name -> task, groups resolved into their tasks.

    Raises:
        UserError: a task is unknown or cannot be loaded.
    """
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        hints = "".join(dict.fromkeys(did_you_mean(task, manager.all_tasks) for task in unknown))
        raise UserError(f"--tasks {', '.join(unknown)}: unknown to the harness.{hints} `lm_eval ls tasks` lists all.")
    try:
        return _leaves(get_task_dict(list(tasks), manager))
    except SDARError:
        raise
    except (OSError, ValueError) as error:  # of the hub, of datasets, of the harness's metric that runs programs
        lines = [line.strip() for line in str(error).splitlines() if line.strip("# ")] or [type(error).__name__]
        raise UserError(
            f"--tasks {', '.join(tasks)}: cannot be loaded ({lines[0]}). Check the network and try again; gated data "
            "needs HF_TOKEN."
        ) from error


def scoring_tasks(tasks: Mapping[str, Task]) -> list[str]:
    """Return the names of the tasks that ask for log-likelihoods."""
    return [name for name, task in tasks.items() if task.OUTPUT_TYPE != "generate_until"]


def share_of(documents: Mapping[str, int], shard: int, shards: int) -> dict[str, list[int]]:
    """Return task -> numbers of the documents of one shard. A task without a document in the shard is left out.

    The shards take all tasks' documents in turn, so their sizes differ by one at most.
    """
    shares, before = {}, 0
    for task, number in documents.items():
        share = [place for place in range(number) if (before + place) % shards == shard - 1]
        if share:  # lm_eval evaluates all documents where the list is empty
            shares[task] = share
        before += number
    return shares


def _leaves(found: TaskTree) -> dict[str, Task]:
    """Return the tasks of nested groups by name."""
    leaves: dict[str, Task] = {}
    for name, value in found.items():
        if isinstance(value, Mapping):
            leaves |= _leaves(value)
        else:
            leaves[str(name)] = value
    return leaves
