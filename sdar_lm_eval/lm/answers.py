"""Finished answers in a folder: one JSON line each, on disk immediately, so that a later run continues from the folder.

    <time>-<random>.jsonl     the answers of one process; each process begins its own file
        {"settings": …, "model": …, "started": …}     the fingerprint, facts on the engine, when the process began
        {"key": …, "task": …, "text": …, …}           an answer, or a score
        {"model": …}                                  the facts again, at the end

The last field of each line, `crc32`, is a checksum of the fields before `crc32`. Several processes may share a folder,
one after another or side by side, on one machine or several. A run finds an answer by the answer's key (`store.py`).
So neither the answer's position in a run nor the division of documents among processes matters.
"""

from __future__ import annotations

import json
import logging
import os
import stat
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdar_lm_eval.errors import UserError
from sdar_lm_eval.files import expanded, require_writable
from sdar_lm_eval.lm.store import Record, as_record, decode_line, differences, encode_line
from sdar_lm_eval.report.counts import EarlierWork

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Session:
    """What one process left behind.

    Attributes:
        path: the process's file.
        settings: the fingerprint: all that answers depend on beside what is in their keys.
        model: facts on the model and the engine, for the results file; JSON that may be of another version.
        started: when the process began to answer, in seconds since 1970.
        answers: key -> record, in the order they were finished.
    """

    path: Path
    settings: Mapping[str, object]
    model: Mapping[str, Any]
    started: float
    answers: Mapping[str, Record]

    @property
    def ended(self) -> float:
        """When the last answer was finished, in seconds since 1970."""
        return self.started + max((line["at"] for line in self.answers.values()), default=0.0)


class AnswerFolder:
    """The answers that a run can go on from, and the file that gets the run's own.

    Args:
        folder: made where it does not exist.
        settings: the fingerprint; answers made with others are ignored.
        model: called for the facts on model and engine, before the first answer is written and at the end.

    Raises:
        UserError: the folder cannot be made, read or written.
    """

    def __init__(self, folder: Path, settings: Mapping[str, object], model: Callable[[], Mapping[str, object]]) -> None:
        self.name = f"answers={folder}"
        self._folder = expanded(folder)
        require_writable(self.name, self._folder)
        self._settings: Mapping[str, object] = json.loads(json.dumps(settings))
        self._model = model
        sessions = read_sessions(self._folder)
        others = [session for session in sessions if session.settings != self._settings]
        if others:
            logger.warning(
                "%s: %d files are of other settings, and are ignored (%s).",
                self.name,
                len(others),
                differences(others[-1].settings, self._settings),
            )
        self._sessions = [session for session in sessions if session.settings == self._settings]
        self._known = united(self._sessions)
        self._file: _LineFile | None = None
        self._started = time.time()

    def begin(self) -> None:
        """Note that answering begins now."""
        if self._file is None:
            self._started = time.time()

    def get(self, key: str) -> Record | None:
        """Return the answer under the key, this process's own answers included, or None."""
        return self._known.get(key)

    def earlier(self, keys: Collection[str]) -> dict[str, EarlierWork] | None:
        """Return the work of earlier processes that computed answers; None where this process computed some."""
        known = {key for session in self._sessions for key in session.answers}
        return earlier_work(self._sessions, keys) if known.issuperset(keys) else None

    def put(self, key: str, record: Mapping[str, object]) -> None:
        """Write an answer."""
        if self._file is None:
            name = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime(self._started))}-{uuid.uuid4().hex[:12]}.jsonl"
            file = _LineFile(self._folder / name)
            file.write({"settings": self._settings, "model": self._model(), "started": self._started})
            self._file = file  # only once its first line is written: readers skip a file without it
        line = {"key": key, "at": round(time.time() - self._started, 3), **record}
        self._file.write(line)
        if (kept := as_record(line)) is not None:
            self._known[key] = kept

    def close(self) -> None:
        """Write the facts on model and engine as they are now, and close the file; later answers begin another file."""
        if self._file is not None:
            file, self._file = self._file, None
            file.write({"model": self._model()})
            file.close()


class _LineFile:
    """A new file of lines. A line that a full disk cut short is ended before the next line begins."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)
        self._cut = False

    def write(self, line: Mapping[str, object]) -> None:
        content = b"\n" * self._cut + encode_line(line)
        self._cut = True
        while content:
            content = content[os.write(self._descriptor, content) :]
        self._cut = False

    def close(self) -> None:
        os.fsync(self._descriptor)
        os.close(self._descriptor)


def read_sessions(folder: Path) -> list[Session]:
    """Return what is in a folder, in the order of the files' names.

    Damaged lines, and files without a readable first line, are skipped with a warning; good lines count.

    Raises:
        UserError: the folder cannot be read.
    """
    try:
        names = sorted(name for name in os.listdir(folder) if name.endswith(".jsonl"))  # noqa: PTH208  (glob hides errors)
    except FileNotFoundError:
        return []
    except OSError as error:
        told = f"the folder of answers {folder} cannot be read: {error.strerror}. Name a folder that can be read."
        raise UserError(told) from error
    return [session for name in names if (session := read_session(folder / name)) is not None]


def united(sessions: Iterable[Session]) -> dict[str, Record]:
    """Return key -> record; where several processes answered the same request, the first file's answer."""
    answers: dict[str, Record] = {}
    for session in sessions:
        for key, line in session.answers.items():
            answers.setdefault(key, line)
    return answers


def earlier_work(sessions: Iterable[Session], keys: Collection[str]) -> dict[str, EarlierWork]:
    """Return file name -> the work of the file's process, for sessions that have an answer under one of the keys."""
    return {
        session.path.name: EarlierWork(
            session.started,
            session.ended,
            tokens=sum(line.get("new_tokens", 0) for line in session.answers.values()),
            used=sum(line.get("new_tokens", 0) for key, line in session.answers.items() if key in keys),
        )
        for session in sessions
        if session.answers.keys() & keys
    }


def read_session(path: Path) -> Session | None:
    """Return what is in a file; None, with a warning, where its first line cannot be read."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # reading a pipe would wait for its writer
            logger.warning("%s is no regular file, and is skipped.", path)
            return None
        # Not splitlines(): a JSON string may hold U+2028 and its like.
        raw = path.read_bytes().split(b"\n")
    except OSError as error:
        logger.warning("%s cannot be read (%s), and is skipped.", path, error.strerror)
        return None
    lines: list[tuple[int, dict[str, object]]] = []
    damaged: list[int] = []
    for number, line in enumerate(raw, 1):
        try:
            if line:
                lines.append((number, decode_line(line)))
        except ValueError:
            damaged.append(number)
    head = lines[0][1] if lines else {}
    settings, model, started = head.get("settings"), head.get("model"), head.get("started")
    if not (isinstance(settings, dict) and isinstance(model, dict) and isinstance(started, (int, float))):
        if any(raw):
            logger.warning("%s begins with no readable settings, and is skipped.", path)
        return None
    answers: dict[str, Record] = {}
    for number, content in lines[1:]:
        key, later_model = content.get("key"), content.get("model")
        if isinstance(later_model, dict):
            model = later_model
        elif isinstance(key, str) and isinstance(content.get("at"), (int, float)) and (record := as_record(content)):
            answers[key] = record
        else:
            damaged.append(number)
    if damaged:
        logger.warning(
            "%s: %d damaged lines (%s) are skipped, and their answers are computed again; %d good lines count.",
            path,
            len(damaged),
            ", ".join(map(str, sorted(damaged)[:5])) + (", …" if len(damaged) > 5 else ""),
            len(answers),
        )
    return Session(path, settings, model, float(started), answers)
