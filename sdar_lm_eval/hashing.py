"""Hashes of JSON content, for keys of stored answers and seeds of draws. A hash is the same on every machine.

A function or a class counts by its name and the content of the file that defines it. Other objects count by their text,
without the memory address that Python's default text has.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def hex_digest(content: object, digits: int = 16) -> str:
    """Return the first hexadecimal digits of the SHA-256 of content as JSON, with the keys of mappings sorted."""
    return hashlib.sha256(_json(content)).hexdigest()[:digits]


def digest_of_files(folder: Path, is_wanted: Callable[[Path], bool]) -> str:
    """Return 16 hexadecimal digits of the SHA-256 of a folder's wanted files: their paths and contents."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        if is_wanted(file):
            digest.update(file.relative_to(folder).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def seed_from(content: object) -> int:
    """Return the first 64 bits of the SHA-256 of content as JSON, as a number."""
    return int.from_bytes(hashlib.sha256(_json(content)).digest()[:8], "little")


def _json(content: object) -> bytes:
    return json.dumps(content, sort_keys=True, default=_jsonable).encode()


def _jsonable(value: object) -> object:
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    if callable(value):
        named = value if hasattr(value, "__qualname__") else type(value)
        return [named.__qualname__, _source(named)]
    return _ADDRESS.sub("", str(value))


def _source(defined: object) -> str | None:
    """The SHA-256 of the file that defines a function or a class; None where neither code nor inspect names a file."""
    try:
        return hashlib.sha256(Path(inspect.getfile(_code_of(defined))).read_bytes()).hexdigest()
    except (TypeError, OSError):
        return None


def _code_of(defined: Any) -> Any:
    """A function, or of a class a function of its own file; of a class without functions the class, else its base.

    Inspect finds a class's file by the name of its module. Some versions of lm_eval do not register the modules that
    `!function` loads, so inspect would find no file, or that of another module with the same name.
    """
    if not inspect.isclass(defined):
        return inspect.unwrap(defined)
    for each in defined.__mro__:
        members = (inspect.unwrap(getattr(member, "__func__", member)) for member in vars(each).values())
        functions = (member for member in members if inspect.isfunction(member))
        own = (member for member in functions if member.__module__ == each.__module__)
        if found := next((member for member in own if Path(member.__code__.co_filename).is_file()), None):
            return found
        outermost = each.__qualname__.partition(".")[0]
        if hasattr(sys.modules.get(each.__module__), outermost):
            return each
    return defined
