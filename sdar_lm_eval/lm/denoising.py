"""Denoising records of an evaluation: made as each answer finishes, written when lm_eval saves the samples.

    GenerationResult -> CompactDenoising -> a line of the file (report/denoising.py)
                        CompactDenoising <-> a record of the store

An evaluation keeps the records of all answers in memory until lm_eval saves the samples. A `CompactDenoising` takes
8 bytes a token. A line takes 100, so a line is made only when the line is written.
"""

from __future__ import annotations

import glob
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, cast

import numpy as np
from numpy.typing import NDArray

from sdar_lm_eval.engines.types import GenerationResult
from sdar_lm_eval.lm.store import Record
from sdar_lm_eval.report.denoising import CONFIDENCE_SCALE, DenoisingLine, denoising_file, write_denoising

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CompactDenoising:
    """The denoising record of an answer, in memory: `Denoising` without the answer's name and texts, in small types.

    Attributes:
        token_ids, steps: (T,) as in `Denoising`.
        confidences: (T,) those of `Denoising`, times CONFIDENCE_SCALE.
        All others: see `Denoising`.
    """

    block_length: int
    prompt_tokens: int
    token_ids: NDArray[np.int32]
    steps: NDArray[np.int16] | None
    confidences: NDArray[np.int16] | None
    finish_reason: str
    forwards: Mapping[str, int]
    seconds: float
    forced_tokens: int = 0

    @classmethod
    def of_result(cls, result: GenerationResult, block_length: int, prompt_tokens: int) -> CompactDenoising:
        """Return the denoising record of an engine's result."""
        steps = confidences = None
        if result.unmasked_at is not None and result.confidences is not None:
            steps = np.array(result.unmasked_at, np.int16)
            confidences = np.rint(np.array(result.confidences, np.float32) * CONFIDENCE_SCALE).astype(np.int16)
        return cls(
            block_length=block_length,
            prompt_tokens=prompt_tokens,
            token_ids=np.array(result.token_ids, np.int32),
            steps=steps,
            confidences=confidences,
            finish_reason=result.finish_reason,
            forwards=result.forwards,
            seconds=round(result.seconds, 4),
            forced_tokens=result.forced_tokens,
        )

    @classmethod
    def of_record(cls, record: Record) -> CompactDenoising | None:
        """Return the denoising record of a stored answer; None where the store's record has none."""
        if "token_ids" not in record or "block_length" not in record:
            return None
        steps, confidences = record.get("steps"), record.get("confidences")
        return cls(
            block_length=record["block_length"],
            prompt_tokens=record["prompt_tokens"],
            token_ids=np.array(record["token_ids"], np.int32),
            steps=None if steps is None else np.array(steps, np.int16),
            confidences=None if confidences is None else np.array(confidences, np.int16),
            finish_reason=record["finish_reason"],
            forwards=record["forwards"],
            seconds=record["seconds"],
            forced_tokens=record.get("forced_tokens", 0),
        )

    def as_record(self) -> dict[str, object]:
        """Return the fields that the store's record has beside prompt_tokens, finish_reason, forwards, seconds, …"""
        return {
            "block_length": self.block_length,
            "token_ids": self.token_ids.tolist(),
            "steps": None if self.steps is None else self.steps.tolist(),
            "confidences": None if self.confidences is None else self.confidences.tolist(),
        }

    def as_line(self, document: int, repeat: int, texts: Sequence[str]) -> DenoisingLine:
        """Return the line of the denoising file; `texts` are the texts of the tokens."""
        line = {
            "document": document,
            "repeat": repeat,
            "prompt_tokens": self.prompt_tokens,
            **self.as_record(),
            "texts": texts,
            "finish_reason": self.finish_reason,
            "forwards": self.forwards,
            "seconds": self.seconds,
            **({"forced_tokens": self.forced_tokens} if self.forced_tokens else {}),
        }
        return cast("DenoisingLine", line)


@dataclass
class DenoisingRecords:
    """The denoising records of an evaluation: task -> (document, repeat) -> record."""

    of_tasks: dict[str, dict[tuple[int, int], CompactDenoising]] = field(default_factory=dict)

    def add(self, task: str, document: int, repeat: int, record: CompactDenoising) -> None:
        """Add the record of an answer; the record replaces an earlier one of the same document and repeat."""
        self.of_tasks.setdefault(task, {})[document, repeat] = record

    @classmethod
    def of_ranks(cls, ranks: Sequence[DenoisingRecords]) -> DenoisingRecords:
        """Return the records of all ranks (processes) together."""
        united = cls()
        for of_rank in ranks:
            for task, answers in of_rank.of_tasks.items():
                united.of_tasks.setdefault(task, {}).update(answers)
        return united

    def lines(self, task: str, texts: Callable[[Sequence[int]], list[str]]) -> Iterator[DenoisingLine]:
        """Yield the lines of a task's denoising file, ordered by document and repeat.

        Args:
            task: the task's name.
            texts: token ids -> the text of each token.
        """
        answers = sorted(self.of_tasks.get(task, {}).items())
        for name, record in answers:
            yield record.as_line(*name, texts(record.token_ids.tolist()))


LinesOf = Callable[[str], Iterator[DenoisingLine]]
"""Task -> the lines of its denoising file; none for a task without records."""


class Tracker(Protocol):
    """The part of lm_eval's `EvaluationTracker` that this module uses."""

    output_path: str | None

    def save_results_samples(self, task_name: str, samples: object) -> None:
        """Write a task's samples file."""


def keep_beside_samples(tracker: Tracker, lines_of: LinesOf) -> None:
    """Patch a tracker so that it writes a task's denoising file whenever it writes the task's samples file.

    Args:
        tracker: lm_eval's tracker.
        lines_of: task -> the lines of its denoising file.
    """
    save = type(tracker).save_results_samples

    def save_both(task_name: str, samples: object) -> None:
        save(tracker, task_name, samples)
        lines = lines_of(task_name)
        if tracker.output_path and (first := next(lines, None)):
            _write(tracker, task_name, itertools.chain([first], lines))

    vars(tracker)["save_results_samples"] = save_both


def leave_samples_alone(tracker: Tracker) -> None:
    """Undo `keep_beside_samples`."""
    vars(tracker).pop("save_results_samples", None)


def output_folder(tracker: Tracker) -> Path:
    """The folder into which lm_eval writes; its `--output_path` may be a file in this folder."""
    path = Path(str(tracker.output_path))
    return path.parent if path.suffix == ".json" else path


def _write(tracker: Tracker, task: str, lines: Iterable[DenoisingLine]) -> None:
    """Write a task's denoising file. A file that cannot be written is logged as an ERROR; the evaluation goes on."""
    folder = output_folder(tracker)
    names: Mapping[str, object] = vars(tracker)
    # lm_eval does not return the samples file's name, which ends in the date of the results file.
    found = sorted(folder.rglob(f"samples_{glob.escape(task)}_{names.get('date_id')}.jsonl"))
    if not found:
        logger.warning("The denoising records of %s are not kept: lm_eval wrote no samples file.", task)
        return
    file = denoising_file(found[-1])
    try:
        write_denoising(file, task, lines)
    except OSError as error:
        logger.error("%s cannot be written (%s). The run has no denoising records of %s.", file, error.strerror, task)
