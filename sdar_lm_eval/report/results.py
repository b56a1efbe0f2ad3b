"""Reads what lm_eval wrote: its results files."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdar_lm_eval.errors import UserError

Json = dict[str, Any]

logger = logging.getLogger(__name__)

PARTS = {"results", "config", "date"}
"""Keys by which a results file is told from other JSON."""


def results_in(path: Path, *parts: str) -> list[tuple[Path, Json]]:
    """Return the results files in a folder, or the one that is named, with their content; the oldest run first.

    A WARNING names a file of the folder that cannot be read.

    Args:
        path: what `--output_path` named, or a file.
        parts: further keys that a file needs to count.

    Raises:
        UserError: the path does not exist, or is a file that cannot be read, or holds no results file.
    """
    path = path.expanduser()
    if not path.exists():
        raise UserError(f"{str(path)!r} does not exist. Give what lm_eval's --output_path named.")
    found = []
    for file in [path] if path.is_file() else sorted(file for file in path.rglob("*.json") if file.is_file()):
        try:
            content = json.loads(file.read_text("utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            if file == path:
                raise UserError(f"{file} cannot be read ({error}). Give the folder of a run of lm_eval.") from error
            logger.warning("%s cannot be read (%s), and is passed over.", file, error)
            continue
        if (
            isinstance(content, dict)
            and content.keys() >= {*PARTS, *parts}
            and isinstance(content["date"], (int, float))
        ):
            found.append((file, content))
    if not found:
        raise UserError(f"{str(path)!r} holds no results file of lm_eval. Give what --output_path named.")
    return sorted(found, key=lambda run: (run[1]["date"], str(run[0])))


def model_of(results: Mapping[str, Any]) -> str | None:
    """Return the checkpoint that a run was of, as the user named it, or None where the file does not say."""
    config = results["config"]
    ours = config.get("sdar_lm_eval") or {}
    given = config.get("model_args")
    if isinstance(given, str):
        given = dict(part.split("=", 1) for part in given.split(",") if "=" in part)
    return ours.get("pretrained") or (given or {}).get("pretrained") or results.get("model_name")
