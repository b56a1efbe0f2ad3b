"""Runs programs that the model wrote where the caller chooses, all programs of a task in one call.

    with run_by(run_programs):
        lm_eval.simple_evaluate(…)    filters submit their programs, scores wait for the verdicts

`run_by` replaces the runner of `tasks/programs.py`, by which tasks run programs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future

from sdar_lm_eval.tasks import programs
from sdar_lm_eval.tasks.programs import Job

RunPrograms = Callable[[Sequence[Job]], Sequence[bool]]
"""A function: programs -> whether each passes its tests."""


def run_here(jobs: Sequence[Job]) -> list[bool]:
    """Run programs in processes of this machine.

    Raises:
        UserError: this machine cannot run programs.
    """
    programs.require_runner("The task", guard=any(job.guard for job in jobs))
    programs.start(jobs)
    return [programs.passes(job) for job in jobs]


def batches(jobs: Sequence[Job], size: int) -> Iterator[list[Job]]:
    """Divide programs into lists of at most `size` characters; a larger program is a list of its own."""
    batch: list[Job] = []
    filled = 0
    for job in jobs:
        length = len(job.program) + len(job.tests)
        if batch and filled + length > size:
            yield batch
            batch, filled = [], 0
        batch.append(job)
        filled += length
    if batch:
        yield batch


@contextlib.contextmanager
def run_by(run_programs: RunPrograms) -> Iterator[None]:
    """Have `run_programs` run the tasks' programs; a call gets all programs that wait, each program once."""
    if run_programs is run_here:
        yield
        return
    before, collecting = programs.runner, _CollectingRunner(run_programs)
    programs.runner = lambda: collecting
    try:
        yield
    finally:
        programs.runner = before


class _CollectingRunner:
    """Collects programs; runs all of them when a score waits for one."""

    def __init__(self, run_programs: RunPrograms) -> None:
        self._run_programs = run_programs
        self._waiting: dict[Job, Future[bool]] = {}

    def submit(self, _run: object, job: Job, /) -> Future[bool]:
        future = self._waiting[job] = _PendingVerdict(self._run_all)
        return future

    def _run_all(self) -> None:
        waiting, self._waiting = self._waiting, {}
        for future, passed in zip(waiting.values(), self._run_programs(list(waiting)), strict=True):
            future.set_result(passed)


class _PendingVerdict(Future[bool]):
    def __init__(self, run_all: Callable[[], None]) -> None:
        super().__init__()
        self._run_all = run_all

    def result(self, timeout: float | None = None) -> bool:
        if not self.done():
            self._run_all()
        return super().result(timeout)
