"""The package's exceptions.

    SDARError(Exception)
    ├── UserError(SDARError, ValueError)       a wrong input; the message says what is allowed and what to do
    └── EngineError(SDARError, RuntimeError)   an engine failed; finished answers are kept
        └── OtherRankError(EngineError)        another process of the run ended
    Interrupted(KeyboardInterrupt)             Ctrl-C during generation; the message says how many answers are kept

On lm_eval's command line, an SDARError prints as one line, without a traceback (`SDAR_LM_EVAL_TRACEBACK=1` shows it).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class SDARError(Exception):
    """Base class of everything this package raises on purpose."""


class UserError(SDARError, ValueError):
    """A value, file or combination given by the user cannot be used."""


class EngineError(SDARError, RuntimeError):
    """An engine cannot run, or stopped."""


class OtherRankError(EngineError):
    """Another process of a data parallel run ended. The message of that process has the cause."""


class Interrupted(KeyboardInterrupt):
    """The user ended a run that had answers."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the closest known name, or "" where none is close.

    A name that holds the given one, or is held by it, comes before one that is only spelled alike.
    """
    names = list(known)
    nearly = difflib.get_close_matches(name, names, n=1, cutoff=0.85)
    parts = [each for each in names if len(name) > 2 and (name in each or (len(each) > 2 and each in name))]
    close = nearly or difflib.get_close_matches(name, parts, n=1, cutoff=0.0)
    close = close or difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""


def listed(values: Sequence[object], most: int = 8) -> str:
    """Return the first `most` values with commas between them, and the number of the others."""
    more = f" and {len(values) - most:,} more" if len(values) > most else ""
    return ", ".join(map(str, values[:most])) + more
