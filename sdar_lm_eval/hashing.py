"""Hashes of JSON content, for keys of stored answers and seeds of draws. A hash is the same on every machine."""

from __future__ import annotations

import hashlib
import json


def hex_digest(content: object, digits: int = 16) -> str:
    """Return the first hexadecimal digits of the SHA-256 of content as JSON, with the keys of mappings sorted."""
    return hashlib.sha256(_json(content)).hexdigest()[:digits]


def seed_from(content: object) -> int:
    """Return the first 64 bits of the SHA-256 of content as JSON, as a number."""
    return int.from_bytes(hashlib.sha256(_json(content)).digest()[:8], "little")


def _json(content: object) -> bytes:
    return json.dumps(content, sort_keys=True, default=str).encode()
