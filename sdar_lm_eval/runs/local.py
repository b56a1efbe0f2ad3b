"""Runs a planned sweep on this machine: the weights are loaded once, each combination is a resumable run.

Results that are there already are not computed again; others are made from the finished answers of their combination,
and the answers that are missing. One sweep at a time works in a folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from lm_eval.api.registry import get_model

from sdar_lm_eval.decoding import in_words
from sdar_lm_eval.errors import Interrupted, SDARError, UserError
from sdar_lm_eval.files import one_line
from sdar_lm_eval.lm.model import SDARLM
from sdar_lm_eval.report.results import Results
from sdar_lm_eval.report.runs import Run
from sdar_lm_eval.runs.plan import Evaluation, Plan
from sdar_lm_eval.runs.saving import evaluate_into
from sdar_lm_eval.runs.shards import ANSWERS

logger = logging.getLogger(__name__)

LOCK = ".lock"
"""The file that a sweep locks in its folder. The lock ends with its process, however that ends."""


class Tell(Protocol):
    """Hears of each evaluation that ended."""

    def __call__(self, number: int, evaluation: Evaluation, results: Results | None, error: str | None) -> None:
        """An evaluation ended.

        Args:
            number: from 1.
            evaluation: the evaluation.
            results: its results; None where it failed.
            error: why it failed; None where it did not, or where its results were there already.
        """


@dataclass
class Outcome:
    """What a sweep found.

    Attributes:
        runs: a run for each combination that has results; repeats are several results of a task.
        failed: the evaluations without results, each with its error.
    """

    runs: list[Run] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


def run(plan: Plan, tell: Tell) -> Outcome:
    """Evaluate what has no results yet.

    Args:
        plan: the sweep.
        tell: hears of each evaluation, also of those whose results are there.

    Raises:
        UserError: another sweep works in the folder, the folder cannot be written, or the model cannot be loaded.
        EngineError: the engine cannot run.
        Interrupted: the user ended the sweep; finished answers are kept.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("A sweep runs in one process. Start it without accelerate launch or torchrun.")
    with _locked(plan.output), contextlib.ExitStack() as stack:
        found = [each.results() for each in plan.evaluations]
        errors: list[str | None] = [None] * len(found)
        lm = None
        if None in found:
            lm = stack.enter_context(_loaded(plan))
            found = [results if results is None or _is_of(lm, results) else None for results in found]
        for index, each in enumerate(plan.evaluations):
            if found[index] is None:
                assert lm is not None
                try:
                    found[index] = _evaluate(each, plan, lm)
                except KeyboardInterrupt as interrupt:
                    done = sum(results is not None for results in found)
                    raise Interrupted(
                        f"{done} of {len(found)} evaluations are finished in {plan.output}. The same command goes on."
                    ) from interrupt
                except Exception as error:
                    errors[index] = one_line(error) if isinstance(error, SDARError) else repr(error)
                    if not isinstance(error, (SDARError, OSError)):
                        logger.exception("%s failed.", in_words(each.settings))
            tell(index + 1, each, found[index], errors[index])
    of_folders: dict[Path, Run] = {}
    outcome = Outcome()
    for each, results, failure in zip(plan.evaluations, found, errors, strict=True):
        label = in_words(each.settings) or "unchanged"
        if failure is not None:
            outcome.failed[f"{label}, seed {each.seed}"] = failure
        if results is not None:
            if each.folder not in of_folders:
                of_folders[each.folder] = Run(label, each.folder, {task: [] for task in plan.tasks})
            for task in plan.tasks:
                of_folders[each.folder].of_tasks[task].append(results)
    outcome.runs = list(of_folders.values())
    return outcome


def _loaded(plan: Plan) -> SDARLM:
    lm = get_model(plan.question.model).create_from_arg_obj(dict(plan.model_args))
    assert isinstance(lm, SDARLM)
    return lm


def _is_of(lm: SDARLM, results: Results) -> bool:
    """Whether results are of this machine's precision and engine; those of a GPU's would differ from those of a CPU."""
    info = lm.engine.info
    return (results.ours.text("dtype"), results.ours.text("engine_version")) == (info.dtype, info.engine_version)


def _evaluate(evaluation: Evaluation, plan: Plan, lm: SDARLM) -> Results:
    lm.keep_answers(evaluation.folder / ANSWERS)
    evaluate_into(
        evaluation.folder / evaluation.name,
        lm,
        model=plan.question.model,
        model_args=plan.model_args,
        facts={"asked": evaluation.asked},
        tasks=list(plan.question.tasks),
        num_fewshot=plan.question.num_fewshot,
        gen_kwargs=dict(evaluation.gen_kwargs),
        limit=evaluation.asked["limit"],
        task_manager=plan.manager,
        torch_random_seed=evaluation.seed,
        confirm_run_unsafe_code=plan.question.confirm_run_unsafe_code,
    )
    results = evaluation.results()
    assert results is not None
    return results


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Make the folder of a sweep, and keep other sweeps out of it.

    Raises:
        UserError: another sweep works in the folder, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(f"--output_path {folder} cannot be a folder that is written to: {error.strerror}.") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        raise UserError(
            f"Another sweep works in {folder}. Wait until that sweep ends, or give another --output_path."
        ) from None
    except OSError as error:
        logger.warning("%s cannot be locked (%s). Start no second sweep in this folder.", folder, error.strerror)
    try:
        yield
    finally:
        os.close(file)
