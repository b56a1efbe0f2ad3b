"""A hash of what a checkpoint's answers depend on: every byte of its weights, configuration, tokenizer and template.

A weight file is read once. `sha256.json` in the user's cache folder remembers its sha256 by path, size, times and
inode. The hub's cache names a file by its sha256, so such a file is not read at all.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import logging
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from sdar_lm_eval.cores import own_cores
from sdar_lm_eval.files import read_bytes, require_regular
from sdar_lm_eval.user_cache import keep_cached, read_cached

logger = logging.getLogger(__name__)

CACHE_FILE = "sha256.json"
REMEMBERED = 1000  # files
SETTLED_S = 5  # seconds; a file that changed more recently may change again in the same tick of the file system's clock
LARGE = 2_000_000_000  # bytes; from this size on the user is told

Facts = tuple[int, int, int, int]
"""A file's size, mtime, ctime (ns) and inode: one of them is another when the file was written."""


def fingerprint(config: Mapping[str, object], files: Sequence[Path], weights: Sequence[Path]) -> str:
    """Return 16 hexadecimal digits, which differ where the config, a file's name or one of its bytes differs.

    Args:
        config: `config.json`.
        files: small files, read each time.
        weights: large files, read once.

    Raises:
        UserError: a path is not a regular file.
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
            if entry is not None and entry[0] == fact:
                known[path] = entry[1]
    if unread := {path: fact for path, fact in facts.items() if path not in known}:
        known |= _hashed(unread)
    return [known[path] for path in paths]


def _hashed(facts: Mapping[Path, Facts]) -> dict[Path, str]:
    """Read files, and remember their sha256, except of files that changed just before or meanwhile."""
    if (size := sum(fact[0] for fact in facts.values())) > LARGE:
        logger.info("Hashing %.1f GB of weights, once: stored answers carry the hash.", size / 1e9)
    begun = time.time()
    with concurrent.futures.ThreadPoolExecutor(min(len(facts), own_cores(), 8)) as threads:
        found = dict(zip(facts, threads.map(_read_sha256, facts), strict=True))
    settled = [p for p, fact in facts.items() if _facts(p) == fact and fact[1] / 1e9 < begun - SETTLED_S]
    _remember({str(path.resolve()): (facts[path], found[path]) for path in settled})
    return found


def _name_at_hub(path: Path) -> str | None:
    """The sha256 by which the hub's cache names a file. Snapshots link to `blobs/…`; names of 40 digits are git's."""
    blob = path.resolve()
    is_named = path.is_symlink() and blob.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", blob.name)
    return blob.name if is_named else None


def _facts(path: Path) -> Facts:
    found = require_regular(path)
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


def _read_sha256(path: Path) -> str:
    with path.open("rb") as file:
        if hasattr(hashlib, "file_digest"):
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest, buffer = hashlib.sha256(), memoryview(bytearray(2**20))  # Python 3.10
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
        return digest.hexdigest()


def _remembered() -> dict[str, tuple[Facts, str]]:
    """Path -> its facts and its sha256."""
    entries = read_cached(CACHE_FILE)
    return {path: known for path, entry in entries.items() if (known := _entry(entry)) is not None}


def _entry(value: object) -> tuple[Facts, str] | None:
    """An entry as the file has it: [size, mtime, ctime, inode, sha256]. None: a damaged one."""
    match value:
        case [int(size), int(mtime), int(ctime), int(inode), str(sha256)] if re.fullmatch(r"[0-9a-f]{64}", sha256):
            return (size, mtime, ctime, inode), sha256
    return None


def _remember(new: Mapping[str, tuple[Facts, str]]) -> None:
    """Add entries, and drop the oldest beyond `REMEMBERED`."""
    if not new:
        return
    entries = {path: entry for path, entry in _remembered().items() if path not in new} | dict(new)
    kept = list(entries.items())[-REMEMBERED:]
    keep_cached(CACHE_FILE, {path: [*facts, sha256] for path, (facts, sha256) in kept})
