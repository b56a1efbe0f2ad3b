"""One-line messages for errors on lm_eval's command line, in runs of this package's models.

`autoload.py` calls `message_of` when a process ends with an exception. This package's errors are one-line messages
already. The harness prints a traceback for a mistyped model, task or flag; `message_of` makes one line of the error.
"""

from __future__ import annotations

import os
import re
import sys
import time
import traceback
from pathlib import Path

from sdar_lm_eval.engines.registry import MODELS
from sdar_lm_eval.errors import Interrupted, OtherRankError, SDARError, did_you_mean


def message_of(error: BaseException) -> str | None:
    """Return what to print in the place of a traceback, or None where the traceback is to be printed."""
    if isinstance(error, (SDARError, Interrupted)):
        return str(error)
    text = str(error)
    unknown = re.match(r"Attempted to load model '(.*?)', but no model", text)
    if not _names_our_models() and not unknown:
        return None
    if isinstance(error, KeyboardInterrupt):
        # A launcher repeats the signal of Ctrl-C. The second signal may interrupt the handling of the first signal.
        first = error.__context__
        return str(first) if isinstance(first, Interrupted) else "Interrupted while no answers were made."
    if unknown:
        theirs = text.partition("Supported model names: ")[2].split(", ")
        nearly = did_you_mean(unknown[1], {*MODELS, *theirs})
        return (
            f"--model {unknown[1]} is unknown.{nearly} This package's: {', '.join(MODELS)}. "
            "--model_args pretrained=… names the checkpoint."
        )
    if found := re.match(r"Tasks not found: (.*)", text):
        ours = [path.stem for path in Path(__file__).with_name("tasks").rglob("*.yaml")]
        hints = "".join(dict.fromkeys(did_you_mean(name.strip(), ours) for name in found[1].split(",")))
        return f"--tasks: {found[1]} is unknown.{hints} `lm_eval ls tasks` lists all."
    if found := re.match(r"Attempted to run task: (\S+) which is marked as unsafe", text):
        return f"--tasks: {found[1]} runs programs that the model wrote. --confirm_run_unsafe_code allows them."
    last = traceback.extract_tb(error.__traceback__)[-1:]
    is_of_flags = bool(last) and not {"_cli", "config"}.isdisjoint(Path(last[0].filename).parts)
    return text.splitlines()[0] if isinstance(error, ValueError) and is_of_flags else None


LEAD = 2.0
"""Seconds that the first process of a machine has to print an error, before the machine's other processes do."""


def is_first_of_machine() -> bool:
    """Whether the launcher started no process before this one on this machine."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def let_others_speak(error: BaseException) -> None:
    """Wait while another process of a data parallel run may print this error, or the error's cause.

    Once a process has ended with an error, the launcher ends the others: a mistake that all processes meet is printed
    once, and a process that lost another one stays silent.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or isinstance(error, KeyboardInterrupt):
        return
    is_ours = isinstance(error, SDARError) or _names_our_models()
    if is_ours and (isinstance(error, OtherRankError) or not is_first_of_machine()):
        time.sleep(LEAD + int(os.environ.get("LOCAL_RANK", "0")))  # one after the other


def _names_our_models() -> bool:
    """Whether the command line has `--model sdar…`."""
    words = sys.argv[1:]
    given = [words[i + 1] for i, word in enumerate(words[:-1]) if word in ("--model", "-M")]
    given += [word.removeprefix("--model=") for word in words if word.startswith("--model=")]
    return any(name.startswith("sdar") for name in given)
