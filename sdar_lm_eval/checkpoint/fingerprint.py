"""A hash of what a checkpoint's answers depend on: every byte of its weights, configuration, tokenizer and template.

A weight file is read once. Its sha256 is remembered, by path, size, times and inode, in `sha256.json` in the user's
cache folder; a file of the hub's cache has its sha256 for a name.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import json
import logging
import os
import re
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sdar_lm_eval.files import read_bytes, read_json, require_regular

logger = logging.getLogger(__name__)

REMEMBERED = 1000  # files
SETTLED_S = 5  # a file that changed later than so many seconds ago may change again within one tick of its clock
LARGE = 2_000_000_000  # bytes, of which the user is told


def fingerprint(config: Mapping[str, Any], files: Sequence[Path], weights: Sequence[Path]) -> str:
    """Return 16 hexadecimal digits that are others wherever config, a file's name or one of its bytes is another.

    Args:
        config: `config.json`.
        files: small ones, which are read each time.
        weights: large ones, which are read once.

    Raises:
        UserError: a file is no regular file.
    """
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for path in files:
        digest.update(path.name.encode() + read_bytes(path))
    for path, content in zip(weights, _sha256_of(weights), strict=True):
        digest.update(f"{path.name}:{content}".encode())
    return digest.hexdigest()[:16]


def _sha256_of(paths: Sequence[Path]) -> list[str]:
    """The sha256 of each file, as hexadecimal digits."""
    known = {path: name for path in paths if (name := _name_at_hub(path))}
    facts = {path: _facts(path) for path in paths if path not in known}
    if facts:
        remembered = _remembered()
        for path, fact in facts.items():
            entry = remembered.get(str(path.resolve()))
            if entry is not None and entry[:-1] == fact:
                known[path] = entry[-1]
    unread = [path for path in paths if path not in known]
    if unread:
        if (size := sum(facts[path][0] for path in unread)) > LARGE:
            logger.info("Hashing %.1f GB of weights, once: answers are kept by them.", size / 1e9)
        begun = time.time()
        with concurrent.futures.ThreadPoolExecutor(min(len(unread), os.cpu_count() or 1, 8)) as threads:
            known |= zip(unread, threads.map(_read_sha256, unread), strict=True)
        _remember(
            {
                str(path.resolve()): [*facts[path], known[path]]
                for path in unread
                if _facts(path) == facts[path] and facts[path][1] / 1e9 < begun - SETTLED_S
            }
        )
    return [known[path] for path in paths]


def _name_at_hub(path: Path) -> str | None:
    """The sha256 that the hub's cache names a file by: snapshots link to `blobs/…`, of which git's have 40 digits."""
    blob = path.resolve()
    is_named = path.is_symlink() and blob.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", blob.name)
    return blob.name if is_named else None


def _facts(path: Path) -> list[int]:
    """What is another when a file was written: its size, mtime, ctime and inode."""
    found = require_regular(path)
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def _read_sha256(path: Path) -> str:
    with path.open("rb") as file:
        if hasattr(hashlib, "file_digest"):
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest, buffer = hashlib.sha256(), memoryview(bytearray(2**20))  # Python 3.10
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
        return digest.hexdigest()


# What is remembered never matters but for time: whatever is wrong with the file, the weights are read instead.


def _cache_file() -> Path:
    own = os.environ.get("LOCALAPPDATA") if os.name == "nt" else None
    folder = Path(os.environ.get("XDG_CACHE_HOME") or own or "~/.cache").expanduser()
    return folder / "sdar_lm_eval" / "sha256.json"


def _remembered() -> dict[str, list[Any]]:
    """Path -> its facts and its sha256."""
    try:
        entries = read_json(_cache_file())
    except (OSError, RuntimeError, ValueError):
        return {}
    return {path: entry for path, entry in entries.items() if _is_entry(entry)}


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, list) and len(entry) == 5 and bool(re.fullmatch(r"[0-9a-f]{64}", str(entry[-1])))


def _remember(new: Mapping[str, list[Any]]) -> None:
    """Add entries, the oldest leaving; another process may do so at the same time, and then one of the two counts."""
    if not new:
        return
    with contextlib.suppress(OSError, RuntimeError, ValueError):
        file = _cache_file()
        entries = {path: entry for path, entry in _remembered().items() if path not in new} | dict(new)
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, prefix="sha256-", delete=False) as written:
            written.write(json.dumps(dict(list(entries.items())[-REMEMBERED:])))
        try:
            Path(written.name).replace(file)
        except OSError:
            Path(written.name).unlink()
            raise
