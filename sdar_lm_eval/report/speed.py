"""The speed of a run in one task, by forwards and by time, from the counts in its results files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sdar_lm_eval.report.fields import Fields
from sdar_lm_eval.report.results import Results
from sdar_lm_eval.report.runs import Run


@dataclass(frozen=True)
class RunSpeed:
    """The speed of a run in one task; None where a number is unknown.

    Attributes:
        tokens_per_forward: answer tokens divided by denoising and commit forwards, counted for each sequence.
        tokens_per_second: answer tokens of all tasks divided by the time of generation.
        note: why a number is unknown; empty where none is.
    """

    tokens_per_forward: float | None
    tokens_per_second: float | None
    note: str


def speed_of(run: Run, task: str) -> RunSpeed:
    """Return the speed of a run that has the task, over all its results files."""
    works = [work_of(results, task) for results in run.of_tasks[task]]
    return RunSpeed(
        tokens_per_forward=ratio([(work.tokens, work.forwards) for work in works]),
        tokens_per_second=ratio([(work.tokens_of_all, work.seconds) for work in works]),
        note="; ".join(dict.fromkeys(work.note for work in works if work.note)),
    )


@dataclass(frozen=True)
class Work:
    """Tokens, forwards and time of a results file's answers, stored ones too; None where a number is unknown.

    Attributes:
        tokens: returned tokens of the task that were drawn.
        forwards: denoising and commit forwards of the task.
        tokens_of_all: returned tokens of all tasks.
        seconds: time of generation of all tasks.
        note: why a number is unknown.
    """

    tokens: int | None
    forwards: int | None
    tokens_of_all: int | None
    seconds: float | None
    note: str = ""


def work_of(results: Results, task: str) -> Work:
    """Return what a results file says of the work in a task."""
    run = results.ours.part_or_empty("run")
    of_task = run.part_or_empty("tasks").part_or_empty(task) if run.content.get("tasks") else run
    if not run.content:
        return Work(None, None, None, None, "the model reports no forwards and times")
    stored, stored_of_task = run.part_or_empty("stored"), of_task.part_or_empty("stored")
    forwards = of_task.part_or_empty("forwards")
    computed = (forwards.whole("denoising") or 0) + (forwards.whole("commit") or 0)
    tokens, tokens_of_all = of_task.whole("new_tokens") or 0, run.whole("new_tokens") or 0
    tokens -= of_task.part_or_empty("thoughts").whole("forced_tokens") or 0  # those of stored answers too
    seconds = run.number("generation_seconds") or 0.0
    if not run.whole("stored_requests"):
        return Work(tokens, computed, tokens_of_all, seconds)
    unknown = [name for name in ("new_tokens", "forwards", "seconds") if stored.content.get(name) is None]
    return Work(
        _plus(tokens, stored_of_task.whole("new_tokens"), of_task),
        _plus(computed, stored_of_task.whole("forwards"), of_task),
        None if unknown else tokens_of_all + (stored.whole("new_tokens") or 0),
        None if unknown else seconds + (stored.number("seconds") or 0.0),
        "some answers came from a store that has no tokens, forwards or times for them" if unknown else "",
    )


def _plus(computed: int, stored: int | None, counts: Fields) -> int | None:
    if not counts.whole("stored_requests"):
        return computed
    return None if stored is None else computed + stored


def ratio(parts: Sequence[tuple[float | None, float | None]]) -> float | None:
    """Sum of the first numbers / sum of the second; None where a number is unknown, or the second sum is 0."""
    above, below = 0.0, 0.0
    for numerator, denominator in parts:
        if numerator is None or denominator is None:
            return None
        above, below = above + numerator, below + denominator
    return above / below if below else None
