"""Finished answers in a folder: one JSON line each, on disk at once, so that a run goes on where another one stopped.

    <time>-<random>.jsonl     what one process answered; a process begins a new file, so each has one writer
        {"settings": …, "model": …, "started": …}     the fingerprint, facts on the engine, when the process began
        {"key": …, "task": …, "text": …, …}           an answer, or a score
        {"model": …}                                  the facts again, at the end

Each line ends with a checksum of what stands before it, as its last field `crc32`. Any number of processes may share a
folder, one after another or side by side, on one machine or several. An answer is found by its key (`store.py`), so
neither its place in a run, nor how the documents are divided among processes, makes a difference.
"""

from __future__ import annotations

import json
import logging
import os
import stat
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdar_lm_eval.errors import UserError
from sdar_lm_eval.lm.evaluation import differences
from sdar_lm_eval.lm.store import Record, decode_line, encode_line, is_record

logger = logging.getLogger(__name__)

Line = dict[str, Any]


@dataclass(frozen=True)
class Session:
    """What one process left behind.

    Attributes:
        settings: the fingerprint: all that changes answers beside what is in their keys.
        model: facts on the model and the engine, for the results file.
        started: when it began to answer, in seconds since 1970.
        answers: key -> line, in the order they were finished.
    """

    path: Path
    settings: Mapping[str, Any]
    model: Mapping[str, Any]
    started: float
    answers: Mapping[str, Line]

    @property
    def ended(self) -> float:
        """When its last answer was finished."""
        return self.started + max((line["at"] for line in self.answers.values()), default=0.0)


class AnswerFolder:
    """The answers a run can go on from, and the file that gets its own.

    Args:
        folder: made if it is not there.
        settings: the fingerprint; answers made with others are left alone.
        model: called for the facts on model and engine when the first answer is there, and at the end.

    Raises:
        UserError: the folder cannot be made, read or written.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], model: Callable[[], Mapping[str, Any]]) -> None:
        self.name = f"answers={folder}"
        self._folder = expanded(folder)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self._folder):
                pass
        except OSError as error:
            raise UserError(f"{self.name} cannot be a folder that is written to: {error.strerror}.") from error
        self._settings: Mapping[str, Any] = json.loads(json.dumps(settings))
        self._model = model
        sessions = read_sessions(self._folder)
        others = [session for session in sessions if session.settings != self._settings]
        if others:
            logger.warning(
                "%s: %d files were made with other settings and are left alone (%s).",
                self.name,
                len(others),
                differences(others[-1].settings, self._settings),
            )
        self._known = united(session for session in sessions if session.settings == self._settings)
        self._file: _Lines | None = None
        self._started = time.time()

    def begin(self) -> None:
        """Note that answering begins now."""
        if self._file is None:
            self._started = time.time()

    def get(self, key: str) -> Record | None:
        """Return the answer that is there already, this process's own included, or None."""
        return self._known.get(key)

    def put(self, key: str, record: Mapping[str, Any]) -> None:
        """Write an answer."""
        if self._file is None:
            name = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime(self._started))}-{uuid.uuid4().hex[:12]}.jsonl"
            file = _Lines(self._folder / name)
            file.write({"settings": self._settings, "model": self._model(), "started": self._started})
            self._file = file  # once its first line is there: without one, nobody can read the others
        line = {"key": key, "at": round(time.time() - self._started, 3), **record}
        self._file.write(line)
        self._known[key] = line

    def close(self) -> None:
        """Write down what is known of model and engine now, and close the file; later answers begin another one."""
        if self._file is not None:
            file, self._file = self._file, None
            file.write({"model": self._model()})
            file.close()


class _Lines:
    """A new file that gets whole lines: what a full disk cut short is ended before the next line begins."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)
        self._cut = False

    def write(self, line: Mapping[str, Any]) -> None:
        content = b"\n" * self._cut + encode_line(line)
        self._cut = True
        while content:
            content = content[os.write(self._descriptor, content) :]
        self._cut = False

    def close(self) -> None:
        os.fsync(self._descriptor)
        os.close(self._descriptor)


def expanded(path: Path) -> Path:
    """Return a path with `~` replaced.

    Raises:
        UserError: it names a user without a home folder.
    """
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise UserError(f"{str(path)!r}: {error} Write the whole path.") from error


def read_sessions(folder: Path) -> list[Session]:
    """Return what is in a folder, in the order of the files' names.

    Damaged lines, and files without a readable first line, are skipped and named; good lines count.

    Raises:
        UserError: the folder cannot be read.
    """
    try:
        names = sorted(name for name in os.listdir(folder) if name.endswith(".jsonl"))  # noqa: PTH208  (glob hides errors)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"the folder of answers {folder} cannot be read: {error.strerror}.") from error
    return [session for name in names if (session := _read(folder / name)) is not None]


def united(sessions: Iterable[Session]) -> dict[str, Line]:
    """Return key -> line; where several processes answered the same, the first file's answer."""
    answers: dict[str, Line] = {}
    for session in sessions:
        for key, line in session.answers.items():
            answers.setdefault(key, line)
    return answers


def busy_seconds(sessions: Iterable[Session]) -> float:
    """Return how long at least one of the sessions was answering: those side by side count once, pauses do not."""
    total, reached = 0.0, 0.0
    for session in sorted(sessions, key=lambda session: session.started):
        total += max(0.0, session.ended - max(reached, session.started))
        reached = max(reached, session.ended)
    return total


def _read(path: Path) -> Session | None:
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would be waited for
            logger.warning("%s is no regular file, and is passed over.", path)
            return None
        # Not splitlines(): a JSON string may hold U+2028 and its like.
        raw = path.read_bytes().split(b"\n")
    except OSError as error:
        logger.warning("%s cannot be read (%s), and is passed over.", path, error.strerror)
        return None
    lines, damaged = [], []
    for number, line in enumerate(raw, 1):
        try:
            if line:
                lines.append((number, decode_line(line)))
        except ValueError:
            damaged.append(number)
    head = lines[0][1] if lines else {}
    if not (isinstance(head.get("settings"), dict) and isinstance(head.get("model"), dict) and "started" in head):
        if any(raw):
            logger.warning("%s begins with no readable settings, and is passed over.", path)
        return None
    answers, model = {}, head["model"]
    for number, content in lines[1:]:
        if isinstance(content.get("model"), dict):
            model = content["model"]
        elif isinstance(content.get("key"), str) and isinstance(content.get("at"), (int, float)) and is_record(content):
            answers[content["key"]] = content
        else:
            damaged.append(number)
    if damaged:
        logger.warning(
            "%s: %d damaged lines (%s) are passed over, and their answers made again; %d good ones count.",
            path,
            len(damaged),
            ", ".join(map(str, sorted(damaged)[:5])) + (", …" if len(damaged) > 5 else ""),
            len(answers),
        )
    return Session(path, head["settings"], model, float(head["started"]), answers)
