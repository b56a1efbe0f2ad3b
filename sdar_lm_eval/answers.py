"""Finished answers in a folder: one JSON line each, on disk at once, so that a run goes on where another one stopped.

    <time>-<random>.jsonl     what one process answered; a process begins a new file, so each has one writer
        {"settings": …, "model": …, "started": …}     all that changes answers, facts on the engine, when it began
        {"key": …, "task": …, "text": …, …}           an answer
        {"model": …}                                  the facts again, at the end

Any number of processes may share a folder, one after another or side by side, on one machine or several. An answer is
found by what it answers (task, prompt, generation settings, repeat), so neither its place in a run, nor how the
documents are divided among processes, nor how many of them there are, makes a difference.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from sdar_lm_eval.errors import UserError

logger = logging.getLogger(__name__)

Line = dict[str, Any]


@dataclass(frozen=True)
class Session:
    """What one process left behind.

    Attributes:
        settings: all that changes answers beside what is in their keys.
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
        settings: all that changes answers beside what is in their keys; answers made with others are left alone.
        model: called for the facts on model and engine when the first answer is there, and at the end.

    Raises:
        UserError: the folder cannot be made or read.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], model: Callable[[], Mapping[str, Any]]) -> None:
        self._folder = folder.expanduser()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"answers={str(folder)!r} cannot be made a folder: {error.strerror}.") from error
        self._settings: Mapping[str, Any] = json.loads(json.dumps(settings))
        self._model = model
        sessions = read_sessions(self._folder)
        others = [session for session in sessions if session.settings != self._settings]
        if others:
            logger.warning(
                "answers=%s: %d files were made with other settings and are left alone (%s).",
                folder,
                len(others),
                differences(others[-1].settings, self._settings),
            )
        self._known = united(session for session in sessions if session.settings == self._settings)
        self._file: TextIO | None = None
        self._started = time.time()

    def begin(self) -> None:
        """Note that answering begins now."""
        if self._file is None:
            self._started = time.time()

    def recall(self, instance: Any, repeat: int) -> str | None:
        """Return the answer that is there already, or None."""
        line = self._known.get(key_of(instance, repeat))
        return None if line is None else str(line["text"])

    def keep(self, instance: Any, repeat: int, line: Mapping[str, Any]) -> None:
        """Write an answer; `line` has its `text` and what is known of how it was made."""
        if self._file is None:
            name = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime(self._started))}-{uuid.uuid4().hex[:12]}.jsonl"
            self._file = (self._folder / name).open("x", encoding="utf-8")
            self._write({"settings": self._settings, "model": self._model(), "started": self._started})
        at = round(time.time() - self._started, 3)
        self._write({"key": key_of(instance, repeat), "at": at, **line})

    def finish(self) -> None:
        """Write down what is known of model and engine now, and close the file; later answers begin another one."""
        if self._file is not None:
            self._write({"model": self._model()})
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None

    def _write(self, line: Mapping[str, Any]) -> None:
        assert self._file is not None
        self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._file.flush()


def key_of(instance: Any, repeat: int) -> str:
    """Return what an answer is found by: a hash of its task, prompt, generation settings and repeat."""
    content = json.dumps([instance.task_name, *instance.args[:2], repeat], sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def read_sessions(folder: Path) -> list[Session]:
    """Return what is in a folder, in the order of the files' names.

    A line that a killed process did not finish is passed over.

    Raises:
        UserError: a file is no file of answers.
    """
    return [session for path in sorted(folder.glob("*.jsonl")) if (session := _read(path)) is not None]


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


def differences(theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> str:
    """Return in words where two settings differ."""
    return "; ".join(
        f"{name} was {theirs.get(name)!r}, is {mine.get(name)!r}"
        for name in {**theirs, **mine}
        if theirs.get(name) != mine.get(name)
    )


def _read(path: Path) -> Session | None:
    try:
        # Not splitlines(): a JSON string may hold U+2028 and its like.
        lines = path.read_bytes().split(b"\n")
        unfinished = lines.pop()
        if unfinished:
            logger.warning("%s: its last line was not finished, and is passed over.", path)
        if not lines:
            return None
        head, *rest = (json.loads(line) for line in lines)
        model = [line["model"] for line in rest if "model" in line]
        return Session(
            path=path,
            settings=head["settings"],
            model=model[-1] if model else head["model"],
            started=float(head["started"]),
            answers={line["key"]: line for line in rest if "key" in line},
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no file of answers ({type(error).__name__}: {error}). Move it away.") from error
