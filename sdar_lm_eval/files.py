"""Reads files that other programs wrote: only regular files that fit in memory. Checks folders. Errors are one line."""

from __future__ import annotations

import contextlib
import json
import os
import reprlib
import stat
import tempfile
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from sdar_lm_eval.errors import UserError

MOST_BYTES = 200_000_000
"""Bytes of the largest file that is read as a whole; the largest tokenizers have 40 MB."""

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


class _Short(reprlib.Repr):
    """Short texts of values, as JSON has them: that is how users write settings. A text alone is in single quotes."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxlong = 2, 80, 40
        self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = self.maxdict = 4

    def repr_str(self, x: str, level: int) -> str:
        text = super().repr_str(x, level)
        return text if level == self.maxlevel or '"' in text else f'"{text[1:-1]}"'

    def repr_bool(self, x: bool, level: int) -> str:
        return str(x).lower()

    def repr_NoneType(self, x: None, level: int) -> str:  # noqa: N802  (reprlib's name)
        return "null"

    def repr_tuple(self, x: tuple[object, ...], level: int) -> str:
        return self.repr_list(list(x), level)

    def repr_set(self, x: Collection[object], level: int) -> str:
        return self.repr_list(sorted(x, key=str), level)

    repr_frozenset = repr_set


_SHORT = _Short()


def expanded(path: Path) -> Path:
    """Return a path with `~` replaced.

    Raises:
        UserError: the path names a user without a home folder.
    """
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise UserError(f"{str(path)!r}: {error} Write the whole path.") from error


def plain_text(value: object) -> str:
    """Return a path, a text or another value as a str. `str` alone makes "Name.MEMBER" of an enum of texts."""
    if isinstance(value, os.PathLike):
        value = os.fsdecode(value)
    return str.__str__(value) if isinstance(value, str) else str(value)


def require_folders(option: str, paths: str | Path | Sequence[str | Path]) -> None:
    """Raise unless a path, or each path of a list, is a folder that can be read. lm_eval silently skips other paths.

    Args:
        option: the option that the user gave.
        paths: the option's value.

    Raises:
        UserError: a path is no folder, or cannot be read.
    """
    for path in [paths] if isinstance(paths, (str, Path)) else paths:
        found = os.path.isdir(path)  # noqa: PTH112  (False for a name that is too long, where Path raises)
        if not found or not os.access(path, os.R_OK | os.X_OK):
            why = "the folder cannot be read" if found else "no such folder"
            raise UserError(f"{option} {path}: {why}. Give the folder that has the YAML files of your tasks.")


@contextlib.contextmanager
def writing(given: str, kind: str = "folder") -> Iterator[None]:
    """Make one clear error of an OSError in the block, which writes what the user named.

    Args:
        given: option and path, as the user gave them.
        kind: what the user should name instead: a folder or a file.

    Raises:
        UserError: the path cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"{given} cannot be written: {error.strerror}. Name another {kind}.") from error


def require_writable(given: str, folder: Path) -> None:
    """Create a folder, and check that it takes files.

    Args:
        given: the option and the value that name the folder.
        folder: the folder.

    Raises:
        UserError: it does not; the message begins with `given`.
    """
    with writing(given):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass


def write_output(path: Path, text: str) -> None:
    """Write a text into the file that `--output` named.

    Raises:
        UserError: the file cannot be written.
    """
    with writing(f"--output {path}", "file"):
        expanded(path).write_text(text, "utf-8", "surrogatepass", newline="\n")


def require_regular(path: Path) -> os.stat_result:
    """Return a file's status. Reading a pipe or a device might never end, so only regular files pass.

    Raises:
        UserError: the path is not a regular file, nor a link to one.
        OSError: the path does not exist, or its status cannot be read.
    """
    facts = path.stat()
    if not stat.S_ISREG(facts.st_mode):
        kind = _KINDS.get(stat.S_IFMT(facts.st_mode), "something else")
        raise UserError(f"{path} is not a regular file, but {kind}. Put the file itself there.")
    return facts


def read_bytes(path: Path) -> bytes:
    """Return a file's content.

    Raises:
        UserError: the path is not a regular file, or the file is larger than `MOST_BYTES`.
        OSError: the file cannot be read.
    """
    size = require_regular(path).st_size
    if size > MOST_BYTES:
        raise UserError(f"{path} has {size:,} bytes; at most {MOST_BYTES:,} are read. Download it again.")
    return path.read_bytes()


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object that a file holds.

    Raises:
        UserError: the file does not exist, cannot be read, or holds no JSON object.
    """
    try:
        content = json.loads(read_bytes(path).decode("utf-8"))
    except RecursionError:
        raise UserError(f"{path} cannot be read as JSON: its lists and objects are nested too deep.") from None
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object.")
    return content


def shown(value: object) -> str:
    """The value on one line of a message: as JSON, a text alone in single quotes, shortened where it is long."""
    return " ".join(line.strip() for line in _SHORT.repr(value).splitlines())


def one_line(error: BaseException, most: int = 300) -> str:
    """An exception's message, on one line of at most `most` characters."""
    text = " ".join(str(error)[: 10 * most].split()) or type(error).__name__
    return text if len(text) <= most else f"{text[: most - 1]}…"
