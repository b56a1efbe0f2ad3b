"""Reads files that somebody else made: regular ones alone, of a size that fits in memory; what is wrong is one line."""

from __future__ import annotations

import json
import os
import reprlib
import stat
from pathlib import Path
from typing import Any

from sdar_lm_eval.errors import UserError

MOST_BYTES = 200_000_000
"""Largest file that is read as a whole; the largest tokenizers have 40 MB."""

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxlong = 2, 80, 40
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = 4


def require_regular(path: Path) -> os.stat_result:
    """Return what the system knows of a file; a pipe or a device would be read without end.

    Raises:
        UserError: the path is not a regular file, nor a link to one.
        OSError: nothing is there, or it cannot be looked at.
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
        UserError: the file is not there, cannot be read, or holds no JSON object.
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
    """The value as messages show it: its repr, long ones shortened."""
    return _SHORT.repr(value)


def one_line(error: BaseException, most: int = 300) -> str:
    """What an exception says, on one line of at most `most` characters."""
    text = " ".join(str(error)[: 10 * most].split()) or type(error).__name__
    return text if len(text) <= most else f"{text[: most - 1]}…"
