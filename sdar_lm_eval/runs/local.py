"""Runs a planned sweep on this machine. The weights are loaded once, and each combination is a resumable run.

Evaluations that have results are not repeated. An evaluation without results takes the finished answers of its
combination, and computes only the missing answers. A lock admits one sweep at a time to a folder.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from filelock import FileLock, Timeout
from lm_eval.api.registry import get_model

from sdar_lm_eval.defaults import DEFAULT_SEED
from sdar_lm_eval.errors import EngineError, Interrupted, SDARError, UserError
from sdar_lm_eval.files import one_line, require_writable, writing
from sdar_lm_eval.lm.model import SDARLM
from sdar_lm_eval.report.results import Results
from sdar_lm_eval.report.runs import Run
from sdar_lm_eval.revision import ANSWER_REVISION
from sdar_lm_eval.runs.earlier import PlannedEvaluation, refuse_differences
from sdar_lm_eval.runs.plan import Plan
from sdar_lm_eval.runs.saving import evaluate_into
from sdar_lm_eval.runs.shards import ANSWERS

logger = logging.getLogger(__name__)

LOCK = ".lock"
"""The file in a sweep's folder that the sweep locks. The lock ends with the process, even after SIGKILL."""


class Tell(Protocol):
    """A function that is called after each evaluation."""

    def __call__(self, number: int, evaluation: PlannedEvaluation, results: Results | None, error: str | None) -> None:
        """Report an evaluation.

        Args:
            number: number of the evaluation in the plan, from 1.
            evaluation: the evaluation.
            results: the evaluation's results; None where it failed.
            error: the evaluation's error; None where it did not fail.
        """


@dataclass
class Outcome:
    """The results of a sweep.

    Attributes:
        runs: a run for each combination that has results; repeats are several results of one task.
        failed: title of an evaluation that failed -> its error.
    """

    runs: list[Run] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


def run(plan: Plan, tell: Tell) -> Outcome:
    """Run the evaluations of a plan that have no results yet, and return all results.

    An evaluation that fails does not end the sweep. Its error is in `Outcome.failed`.

    Args:
        plan: the sweep.
        tell: called after each evaluation, and for each evaluation whose results are there already.

    Raises:
        UserError: another sweep works in the folder, the folder cannot be written or has results of another precision,
            the model cannot be loaded, or the process is one of several (torchrun).
        EngineError: the engine cannot run here.
        Interrupted: the user ended the sweep; finished answers are kept.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("A sweep runs in one process. Start it without accelerate launch or torchrun.")
    with _locked(plan.output), contextlib.ExitStack() as stack:
        found = [each.results() for each in plan.evaluations]
        errors: list[str | None] = [None] * len(found)
        lm: SDARLM | None = None
        if None in found:
            lm = stack.enter_context(_loaded(plan))
            _check_precision(plan, lm)
        for index, each in enumerate(plan.evaluations):
            if found[index] is None:
                try:
                    lm = lm or stack.enter_context(_loaded(plan))
                    found[index] = _evaluate(each, plan, lm)
                except KeyboardInterrupt as interrupt:
                    raise _interrupted(found, plan) from interrupt
                except Exception as error:
                    errors[index] = _told(error, each)
                    if isinstance(error, EngineError) and lm is not None:  # the engine may be unusable: load it anew
                        with contextlib.suppress(EngineError):
                            lm.close()
                        lm = None
            tell(index + 1, each, found[index], errors[index])
    return _outcome(plan, found, errors)


def _interrupted(found: Sequence[Results | None], plan: Plan) -> Interrupted:
    finished = sum(results is not None for results in found)
    return Interrupted(
        f"Interrupted. {finished} of {len(found)} evaluations are finished in {plan.output}, and the answers so far "
        "are kept. Run the same command again to compute the others."
    )


def _told(error: Exception, evaluation: PlannedEvaluation) -> str:
    """Return an evaluation's error in one line; an error that nobody raised on purpose is logged with its traceback."""
    if not isinstance(error, (SDARError, OSError)):
        logger.error("%s failed.", evaluation.title, exc_info=error)
    return one_line(error) if isinstance(error, SDARError) else repr(error)


def _outcome(plan: Plan, found: Sequence[Results | None], errors: Sequence[str | None]) -> Outcome:
    """Return the evaluations of each combination as one run, and the errors."""
    of_folders: dict[Path, Run] = {}
    outcome = Outcome()
    for each, results, failure in zip(plan.evaluations, found, errors, strict=True):
        if failure is not None:
            outcome.failed[each.title] = failure
        if results is not None:
            if each.folder not in of_folders:
                of_folders[each.folder] = Run(each.label, each.folder, {task: [] for task in plan.tasks})
            for task in plan.tasks:
                of_folders[each.folder].of_tasks[task].append(results)
    outcome.runs = list(of_folders.values())
    return outcome


def _loaded(plan: Plan) -> SDARLM:
    lm = get_model(plan.sweep.model).create_from_arg_obj(dict(plan.model_args))
    assert isinstance(lm, SDARLM)
    return lm


def _check_precision(plan: Plan, lm: SDARLM) -> None:
    """Refuse a folder whose results differ from the loaded model's by rounding, or by another way to answer."""
    info = lm.engine.info
    mine = {
        "dtype": info.dtype,
        "engine_version": info.engine_version,
        "engine_commit": info.engine_commit,
        "answer_revision": ANSWER_REVISION,
    }
    for results in plan.earlier:
        refuse_differences(plan.output, {name: results.ours.content.get(name) for name in mine}, mine)


def _evaluate(evaluation: PlannedEvaluation, plan: Plan, lm: SDARLM) -> Results:
    lm.keep_answers(evaluation.folder / ANSWERS)
    evaluate_into(
        evaluation.folder / evaluation.name,
        lm,
        model=plan.sweep.model,
        model_args=plan.model_args,
        facts={"asked": evaluation.asked},
        tasks=list(plan.sweep.tasks),
        num_fewshot=plan.sweep.num_fewshot,
        gen_kwargs=dict(evaluation.gen_kwargs),
        limit=evaluation.asked["limit"],
        task_manager=plan.manager,
        torch_random_seed=DEFAULT_SEED if evaluation.seed is None else evaluation.seed,
        confirm_run_unsafe_code=plan.sweep.confirm_run_unsafe_code,
    )
    results = evaluation.results()
    assert results is not None
    return results


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Make the folder of a sweep, and lock it against other sweeps.

    Raises:
        UserError: another sweep works in the folder, or the folder cannot be written.
    """
    given = f"--output_path {folder}"
    require_writable(given, folder)
    lock = FileLock(folder / LOCK)
    with writing(given):  # the lock file may be another user's
        try:
            lock.acquire(blocking=False)
        except Timeout:
            raise UserError(
                f"Another sweep works in {folder}. Wait until that sweep ends, or give another --output_path."
            ) from None
        except NotImplementedError:  # the folder's file system has no locks
            logger.warning("%s cannot be locked. Start no second sweep in this folder.", folder)
    try:
        yield
    finally:
        lock.release()
