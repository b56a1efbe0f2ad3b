"""Reads what lm_eval wrote: results files, and the samples files beside them."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

from sdar_lm_eval.errors import UserError
from sdar_lm_eval.files import expanded, read_bytes, require_regular, shown
from sdar_lm_eval.report.denoising import Denoising, denoising_file, read_denoising
from sdar_lm_eval.report.fields import Fields
from sdar_lm_eval.report.samples import Sample, sample_of

logger = logging.getLogger(__name__)

PARTS = {"results", "config", "date"}
"""Keys that a JSON file needs to be a results file."""


class Results:
    """A results file.

    Attributes:
        file: the file.
        date: when the evaluation began, in seconds since 1970.
        content: the whole file.
    """

    def __init__(self, file: Path, date: float, content: Mapping[str, object]) -> None:
        self.file, self.date, self.content = file, date, Fields(content, file)
        self._warned: set[str] = set()  # tasks whose samples files were said to lack documents

    @property
    def scores(self) -> Fields:
        """Task or group -> its metrics, each named `metric,filter`."""
        return self.content.part("results")

    @property
    def configs(self) -> Fields:
        """Task -> its YAML, as lm_eval read it."""
        return self.content.part("configs")

    @property
    def config(self) -> Fields:
        """The arguments of the call of lm_eval."""
        return self.content.part("config")

    @property
    def ours(self) -> Fields:
        """The facts that a model of this package reports (`config.sdar_lm_eval`); empty for other models."""
        return self.config.part_or_empty("sdar_lm_eval")

    def decoding_of(self, task: str) -> Fields:
        """Return the decoding settings of a task that a model of this package reports; empty for other models."""
        return self.ours.part_or_empty("decoding_of_tasks").part_or_empty(task)

    @property
    def model(self) -> str | None:
        """The checkpoint, as the user named it; None where the file does not say."""
        return self.ours.text("pretrained") or self.model_args.text("pretrained") or self.content.text("model_name")

    @property
    def model_args(self) -> Fields:
        """The user's model_args by name; lm_eval writes them as a mapping or as the text "name=value,name=value"."""
        given = self.config.content.get("model_args")
        if not isinstance(given, str):
            return self.config.part_or_empty("model_args")
        arguments = dict(part.split("=", 1) for part in given.split(",") if "=" in part)
        return Fields(arguments, self.file, "config.model_args.")

    @property
    def groups(self) -> dict[str, list[str]]:
        """Group of tasks -> the tasks and groups in it, for each group that has some."""
        found = self.content.part_or_empty("group_subtasks").content
        return {group: list(map(str, parts)) for group, parts in found.items() if isinstance(parts, list) and parts}

    def answered(self, task: str) -> int | None:
        """Return how many documents of a task were evaluated; None where the file does not say."""
        return self.content.part_or_empty("n-samples").part_or_empty(task).whole("effective")

    def samples(self, task: str) -> list[Sample]:
        """Return the samples of a task; none where there is no samples file.

        Raises:
            UserError: the samples file cannot be read, or is not as lm_eval writes it.
        """
        return list(self.each_sample(task))

    def each_sample(self, task: str) -> Iterator[Sample]:
        """Yield the samples of a task one at a time: the prompts of a samples file may take much memory.

        A WARNING names a samples file that lacks documents.

        Raises:
            UserError: as `samples`.
        """
        file = self.samples_file(task)
        if not file.exists():
            return
        number_of = dict.fromkeys(self._filters(task), 0)
        for line in read_lines(file):
            sample = sample_of(line)
            number_of[sample.filter] = number_of.get(sample.filter, 0) + 1
            yield sample
        self._warn_of_lost_lines(task, file, number_of)

    def has_all_samples(self, task: str) -> bool:
        """Return whether a task has scores, and a samples file with a line for each document and filter.

        The run has to be one of all documents or of the first ones: of a run with `--samples`, lm_eval before 0.4.13
        counts all documents.

        Raises:
            UserError: the samples file cannot be read.
        """
        filters, file = set(self._filters(task)), self.samples_file(task)
        if not filters or not file.exists():
            return False
        lines = sum(line.endswith("\n") for line in _text_lines(file, whole=True))
        return lines >= (self.answered(task) or 0) * len(filters)

    def _filters(self, task: str) -> list[str]:
        """The filters whose output a task scored."""
        names = (key.partition(",") for key in self.scores.part_or_empty(task).content)
        return [filter_name for _, comma, filter_name in names if comma]

    def _warn_of_lost_lines(self, task: str, file: Path, number_of: Mapping[str, int]) -> None:
        """Warn once of a samples file that lacks documents: a full disk, or a copy that was cut, loses lines.

        lm_eval before 0.4.13 counts all documents of a run with `--samples`, so the file may be whole.

        Args:
            task: the task.
            file: the samples file.
            number_of: filter -> number of documents in the samples file.
        """
        expected = self.answered(task) or 0
        filter_name = min(number_of, key=number_of.__getitem__, default="")
        if number_of.get(filter_name, 0) < expected and task not in self._warned:
            self._warned.add(task)
            logger.warning(
                "%s has %d of %d documents of the filter %s. If --samples did not choose these, the file lost lines: "
                "copy the whole file, or evaluate again.",
                file,
                number_of.get(filter_name, 0),
                expected,
                filter_name,
            )

    def samples_file(self, task: str) -> Path:
        """Return the path of a task's samples file, which need not exist."""
        # results_<date>.json, or what --output_path named with _<date>; the samples are beside it, with the same date.
        return self.file.with_name(f"samples_{task}_{self.file.stem.rpartition('_')[2]}.jsonl")

    def denoising(self, task: str) -> list[Denoising]:
        """Return the denoising records of a task; none where there is no denoising file.

        Raises:
            UserError: the denoising file cannot be read.
        """
        file = denoising_file(self.samples_file(task))
        return read_denoising(file) if file.exists() else []


def results_in(path: Path, *parts: str) -> list[Results]:
    """Return the results files in a folder, or the one results file that the path names; the oldest first.

    A WARNING names each file of the folder that cannot be read.

    Args:
        path: the path that `--output_path` named, or a file.
        parts: further keys that a file needs to be counted as a results file.

    Raises:
        UserError: the path does not exist, or is a file that cannot be read, or holds no results file.
    """
    path = expanded(path)
    try:
        exists = path.exists()
    except OSError as error:  # a name that is too long
        raise UserError(f"{shown(str(path))} cannot be read ({error.strerror}). Give the folder of a run.") from error
    if not exists:
        raise UserError(f"{str(path)!r} does not exist. Give what lm_eval's --output_path named.")
    found = []
    files = [path] if path.suffix == ".json" and path.is_file() else path.rglob("*.json")
    for file in sorted(file for file in files if file.is_file()):
        try:
            content = json.loads(read_bytes(file).decode("utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            if file == path:
                raise UserError(f"{file} cannot be read ({error}). Give the folder of a run of lm_eval.") from error
            logger.warning("%s cannot be read (%s), and is skipped.", file, error)
            continue
        if isinstance(content, dict) and content.keys() >= {*PARTS, *parts}:
            date = content["date"]
            if isinstance(date, (int, float)):
                found.append(Results(file, date, content))
    if not found:
        raise UserError(f"{str(path)!r} holds no results file of lm_eval. Give what --output_path named.")
    return sorted(found, key=lambda results: (results.date, str(results.file)))


def read_lines(file: Path, whole: bool = True) -> Iterator[Fields]:
    """Yield the objects of a JSONL file.

    Args:
        file: the file.
        whole: whether the file must be intact. If False, a file that cannot be read is skipped with a WARNING, and a
            line that is not JSON (a killed process leaves one) is skipped silently.

    Raises:
        UserError: `whole` is true, and the file cannot be read or a line is not JSON.
    """
    for number, line in enumerate(_text_lines(file, whole), 1):
        if not line.strip():
            continue
        try:
            content = json.loads(line)
        except (ValueError, RecursionError) as error:
            if not whole:
                continue
            raise UserError(
                f"{file}, line {number}: not JSON ({error}). Copy the whole file, or evaluate again."
            ) from error
        if isinstance(content, dict):
            yield Fields(content, file, f"line {number}: ")


def _text_lines(file: Path, whole: bool) -> Iterator[str]:
    """The lines of a file, read one at a time; `whole` as `read_lines`."""
    try:
        require_regular(file)  # opening a pipe would wait for its writer
        # newline="\n": a JSON string may hold U+2028 and its like, which end lines elsewhere.
        with file.open(encoding="utf-8", newline="\n") as lines:
            yield from lines
    except (OSError, ValueError) as error:
        if whole:
            raise UserError(f"{file} cannot be read ({error}). Evaluate again with --log_samples.") from error
        logger.warning("%s cannot be read (%s), and is skipped.", file, error)
