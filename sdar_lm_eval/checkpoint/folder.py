"""Finds a checkpoint's folder: the user's, the bundled one, or a snapshot from the hub."""

from __future__ import annotations

import re
from pathlib import Path

from sdar_lm_eval.demo import CHECKPOINT as DEMO_CHECKPOINT
from sdar_lm_eval.errors import UserError
from sdar_lm_eval.files import one_line

DOWNLOADED = ("*.json", "*.jinja", "merges.txt", "*.safetensors")
IGNORED = ("*/*",)  # subfolders may hold other copies of the weights, and `*` in the hub's patterns matches `/` too


def resolve(name: str, revision: str | None) -> Path:
    """Return the folder of `demo`, of a path, or of a hub id. What the hub's cache lacks of a hub id is downloaded.

    Raises:
        UserError: there is no such folder or id.
    """
    try:
        folder = DEMO_CHECKPOINT if name == "demo" else Path(name).expanduser()
        is_folder, is_there = folder.is_dir(), folder.exists()
    except (OSError, RuntimeError, ValueError) as error:  # no permission, a name too long, a ~user that does not exist
        raise UserError(
            f"pretrained={name!r} cannot be looked up ({one_line(error)}). Give an existing folder, a hub id such as "
            "JetLM/SDAR-4B-Chat, or demo."
        ) from error
    if is_folder:
        if revision is not None:
            raise UserError(
                f"revision={revision!r} was given, but {name!r} is a folder; only a hub id has revisions. Leave "
                "out revision."
            )
        return folder
    if is_there or name.startswith((".", "~")) or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        why = "no such folder. Give an existing folder"
        if is_there:
            why = "not a folder. Give the folder that holds config.json"
        raise UserError(f"pretrained={name!r}: {why}, a hub id such as JetLM/SDAR-4B-Chat, or demo.")
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(name, revision=revision, allow_patterns=list(DOWNLOADED), ignore_patterns=list(IGNORED))
        )
    except Exception as error:
        at = f" at revision {revision!r}" if revision else ""
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(
            f"pretrained={name!r}{at} is no folder here and cannot be downloaded from the hub "
            f"({one_line(Exception(reason))}). Check the id and the network, or give a folder that holds the "
            "checkpoint, or demo."
        ) from error
