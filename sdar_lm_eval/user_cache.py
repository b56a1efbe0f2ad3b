"""JSON files in the user's cache folder. They only save time: what a file does not hold is made again.

The folder is `sdar_lm_eval` in $XDG_CACHE_HOME, or by default in ~/.cache (on Windows in %LOCALAPPDATA%).
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdar_lm_eval.files import read_json

logger = logging.getLogger(__name__)


def cache_file(name: str) -> Path:
    """The path of a file.

    Raises:
        RuntimeError: the user has no home folder.
    """
    own = os.environ.get("LOCALAPPDATA") if os.name == "nt" else None
    return Path(os.environ.get("XDG_CACHE_HOME") or own or "~/.cache").expanduser() / "sdar_lm_eval" / name


def read_cached(name: str) -> dict[str, Any]:
    """The JSON object that a file holds; {} where no such file can be read."""
    try:
        path = cache_file(name)
        return read_json(path) if path.exists() else {}
    except (OSError, RuntimeError, ValueError) as error:
        logger.info("The cache file %s is ignored: %s", name, error)
        return {}


def keep_cached(name: str, content: Mapping[str, object]) -> None:
    """Write a file as a whole. Of two processes at once, the later one's file stays; an error is logged only."""
    try:
        file = cache_file(name)
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, prefix=f"{file.stem}-", delete=False) as written:
            try:
                written.write(json.dumps(content))
                written.close()
                Path(written.name).replace(file)
            except BaseException:
                Path(written.name).unlink(missing_ok=True)
                raise
    except (OSError, RuntimeError) as error:
        logger.info("The cache file %s cannot be written: %s", name, error)
