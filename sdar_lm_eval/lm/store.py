"""Finished answers and scores under one key, in the harness's cache file, in a folder, or in both.

    key          a hash of the request: tokens, settings, and the seed of a sampled answer
    fingerprint  engine, weights, tokenizer, precision, and the revision of this package's decoding
    record       {"text": …} or {"log_likelihood": …, "is_greedy": …}, with counts, and with the answer's thought

A model ignores records of another fingerprint, so one file or folder may hold the records of several models.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import os
import sqlite3
import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypedDict, cast

from sdar_lm_eval.errors import UserError
from sdar_lm_eval.files import shown
from sdar_lm_eval.hashing import hex_digest
from sdar_lm_eval.report.counts import EarlierWork

logger = logging.getLogger(__name__)


class Record(TypedDict, total=False):
    """A finished answer (it has `text`) or score (it has `log_likelihood`), as a place returns it.

    Places write whatever mapping they are given; these are the names that are read back. `key` and `at`, the seconds
    since answering began, are the folder's.
    """

    key: str
    at: float
    task: str
    document: int
    repeat: int
    text: str
    thought: str
    thought_ended: bool
    prompt_tokens: int
    new_tokens: int
    forwards: Mapping[str, int]
    seconds: float
    finish_reason: str
    forced_tokens: int
    block_length: int
    token_ids: list[int]
    steps: list[int] | None
    confidences: list[int] | None
    log_likelihood: float
    is_greedy: bool
    standard_error: float


def key_of(kind: str, content: object) -> str:
    """Return a hash of what is answered: the kind of request, and its content as JSON."""
    return hex_digest([kind, content], digits=32)


def fields_of(request: object) -> dict[str, Any]:
    """Return a request's fields by name, and those of its settings. No value is copied: a prompt has many tokens."""
    return {name: vars(value) if dataclasses.is_dataclass(value) else value for name, value in vars(request).items()}


def differences(theirs: Mapping[str, object], mine: Mapping[str, object]) -> str:
    """Return in words where two settings differ."""
    found = []
    for name in {**theirs, **mine}:
        was, now = theirs.get(name), mine.get(name)
        if isinstance(was, Mapping) and isinstance(now, Mapping):
            found.append(differences(was, now))
        elif was != now:
            before, after = ("not given" if value is None else shown(value) for value in (was, now))
            found.append(f"{name} was {before}, is {after}")
    return "; ".join(filter(None, found))


def as_record(content: object) -> Record | None:
    """Return a finished answer or score without the names that only another version knows; None for a damaged one."""
    if not isinstance(content, dict):
        return None
    score = content.get("log_likelihood")
    if isinstance(content.get("text"), str) or (isinstance(score, float) and not math.isnan(score)):
        return cast("Record", {name: value for name, value in content.items() if name in Record.__annotations__})
    return None


CHECKSUM = b', "crc32": "'


def encode_line(line: Mapping[str, object]) -> bytes:
    """Return a line: JSON, its checksum, the line's end."""
    body = json.dumps(line, ensure_ascii=False).encode("utf-8", "surrogatepass")[:-1]
    return body + CHECKSUM + b'%08x"}\n' % zlib.crc32(body)


def decode_line(line: bytes) -> dict[str, object]:
    """Return a line's content.

    Raises:
        ValueError: the line is damaged.
    """
    body, found, checksum = line.rpartition(CHECKSUM)
    if not found or checksum != b'%08x"}' % zlib.crc32(body):
        raise ValueError("its checksum is wrong")
    content: dict[str, object] = json.loads(body + b"}")
    return content


class Place(Protocol):
    """Where records are kept."""

    name: str
    """The place's name in messages."""

    def get(self, key: str) -> Record | None:
        """Return what is kept under the key."""

    def earlier(self, keys: Collection[str]) -> Mapping[str, EarlierWork] | None:
        """Return the work of earlier processes that made the records of these keys; None where it is unknown."""

    def put(self, key: str, record: Mapping[str, object]) -> None:
        """Keep a record. The record survives a process that is killed after `put` returns.

        Raises:
            OSError, sqlite3.Error: the record cannot be written.
        """

    def begin(self) -> None:
        """Begin a round of records."""

    def close(self) -> None:
        """End a round of records; another may begin."""


class Store:
    """The places of a run. A place that cannot be written any more is given up, and the run goes on without it.

    Args:
        places: the first that has a record counts; each gets all new ones.
    """

    def __init__(self, places: Sequence[Place]) -> None:
        self._places = list(places)
        self._writable = list(places)
        self._partial: list[Place] = []
        """Places that lack a record of another place."""

    def get(self, key: str) -> Record | None:
        """Return what is kept under the key, or None."""
        records = [place.get(key) for place in self._places]
        found = next((record for record in records if record is not None), None)
        if found is not None:
            lacking = (place for place, record in zip(self._places, records, strict=True) if record is None)
            self._partial += [place for place in lacking if place not in self._partial]
        return found

    def earlier(self, keys: Collection[str]) -> Mapping[str, EarlierWork] | None:
        """Return the work of earlier processes that made the records of these keys; None where it is unknown."""
        known = (place.earlier(keys) for place in self._places)
        return next((work for work in known if work is not None), None)

    def put(self, key: str, record: Mapping[str, object]) -> None:
        """Keep a record in each place that can be written."""
        for place in list(self._writable):
            try:
                place.put(key, record)
            except (OSError, sqlite3.Error) as error:
                self._give_up(place, error)

    def begin(self) -> None:
        """Begin a round of records."""
        for place in self._writable:
            place.begin()

    def close(self) -> None:
        """End a round of records."""
        for place in list(self._writable):
            try:
                place.close()
            except (OSError, sqlite3.Error) as error:
                self._give_up(place, error)

    @property
    def kept_in(self) -> str:
        """The names of the places that have all records of the run; "" where there are none."""
        return _names(place for place in self._writable if place not in self._partial)

    def _give_up(self, place: Place, error: Exception) -> None:
        self._writable.remove(place)
        logger.error(
            "%s cannot be written (%s). Its answers so far are kept, and later answers are kept in %s.",
            place.name,
            error,
            _names(self._writable) or "memory alone, until the results are written",
        )


def _names(places: Iterable[Place]) -> str:
    return " and ".join(place.name for place in places)


class CacheFile:
    """A table of this package's own in the file of `--use_cache`.

    The harness's table is keyed by prompt and gen_kwargs. Its keys hold neither model, task, seed nor repeat, and empty
    answers of borrowed documents go there too, so the harness's reads and writes are bypassed (`bypass`).

    Args:
        path: the file.
        fingerprint: all that answers depend on beside what is in their keys.

    Raises:
        UserError: the file cannot be read.
    """

    def __init__(self, path: str, fingerprint: Mapping[str, object]) -> None:
        self.name = f"--use_cache {path}"
        text = json.dumps(fingerprint, sort_keys=True)
        self._fingerprint = hex_digest(fingerprint)
        try:
            self._file = sqlite3.connect(path, isolation_level=None)
            self._file.execute("PRAGMA synchronous = OFF")  # a killed process loses nothing; a power cut may
            # Another process may be making the tables at this moment.
            self._file.execute(
                "CREATE TABLE IF NOT EXISTS sdar_records (made_by TEXT, key TEXT, record BLOB, UNIQUE (made_by, key))"
            )
            self._file.execute("CREATE TABLE IF NOT EXISTS sdar_fingerprints (made_by TEXT UNIQUE, settings TEXT)")
            self._warn_of_others(fingerprint)
            self._file.execute("INSERT OR IGNORE INTO sdar_fingerprints VALUES (?, ?)", (self._fingerprint, text))
        except (sqlite3.Error, ValueError) as error:
            raise _unusable(path, error) from error

    def _warn_of_others(self, fingerprint: Mapping[str, object]) -> None:
        """Warn where the file has only records of other fingerprints."""
        others = self._file.execute(
            "SELECT settings FROM sdar_fingerprints WHERE made_by != ? ORDER BY rowid", (self._fingerprint,)
        ).fetchall()
        known = self._file.execute("SELECT 1 FROM sdar_records WHERE made_by = ?", (self._fingerprint,)).fetchone()
        if others and known is None:
            changed = differences(json.loads(others[-1][0]), fingerprint)
            logger.warning("%s has answers of other settings, which are ignored (%s).", self.name, changed)

    def get(self, key: str) -> Record | None:
        """Return what is kept under the key; a damaged record counts as missing."""
        query = "SELECT record FROM sdar_records WHERE made_by = ? AND key = ?"
        try:
            found = self._file.execute(query, (self._fingerprint, key)).fetchone()
            record = None if found is None else decode_line(found[0])
        except (sqlite3.Error, ValueError, TypeError, AttributeError) as error:
            logger.warning("%s: a record cannot be read (%s), and is computed again.", self.name, error)
            return None
        return as_record(record)

    def earlier(self, keys: Collection[str]) -> None:
        """Return None: the file has no times at which records were kept."""

    def put(self, key: str, record: Mapping[str, object]) -> None:
        """Keep a record."""
        line = encode_line(record)[:-1]
        self._file.execute("INSERT OR REPLACE INTO sdar_records VALUES (?, ?, ?)", (self._fingerprint, key, line))

    def begin(self) -> None:
        """Do nothing: the file is open."""

    def close(self) -> None:
        """Do nothing: each record is on disk already."""


def check_cache_file(path: str) -> None:
    """Refuse a file of `--use_cache` that cannot be used, before the harness opens it.

    Raises:
        UserError: the file is no SQLite file, or cannot be made, read or written.
    """
    file = Path(path)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.exists() and not file.is_file():
            raise OSError("it is no regular file")
        if not os.access(file if file.exists() else file.parent, os.W_OK):
            raise OSError("it cannot be written")
        with contextlib.closing(sqlite3.connect(path)) as database:
            database.execute("SELECT name FROM sqlite_master").fetchall()
            database.execute("BEGIN IMMEDIATE")  # fails where another process has locked the file
    except (OSError, sqlite3.Error) as error:
        raise _unusable(path, error) from error


def _unusable(path: str, error: Exception) -> UserError:
    reason = f"{error.strerror}: {error.filename}" if isinstance(error, OSError) and error.strerror else error
    return UserError(
        f"--use_cache {path} cannot be used ({reason}). End the program that uses the file, give another path, or "
        "delete the file."
    )


class HarnessCache(Protocol):
    """What is used of lm_eval's `SqliteDict`."""

    filename: str


def bypass(harness_cache: HarnessCache) -> str:
    """Have the harness's cache find nothing and keep nothing; return its file."""
    kind = type(harness_cache)
    if not hasattr(kind, "bypassed"):
        methods = {"bypassed": True, "__contains__": lambda *_: False, "__setitem__": lambda *_: None}
        harness_cache.__class__ = type("BypassedCache", (kind,), methods)
    return str(Path(harness_cache.filename).absolute())
