"""The spellings of a setting: short names, and the names that other models of lm_eval have for the limit of tokens."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from typing import overload

from sdar_lm_eval.decoding import spelled
from sdar_lm_eval.engines.native.strategies import full_name

logger = logging.getLogger(__name__)

MAX_TOKENS_SPELLINGS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
ALIASES = {
    "strategy": "remasking_strategy",
    "threshold": "confidence_threshold",
    "steps": "denoising_steps",
    "block": "block_length",
    "block_size": "block_length",
}
"""Short name -> setting."""


@overload
def canonical(settings: Mapping[str, str]) -> Mapping[str, str]: ...
@overload
def canonical(settings: Mapping[str, object]) -> Mapping[str, object]: ...
def canonical(settings: Mapping[str, object]) -> Mapping[str, object]:
    """Return settings by their full names; of two spellings of a setting the later one counts."""
    full: dict[str, object] = {}
    for name, value in settings.items():
        setting = ALIASES.get(name, name)
        if setting == "remasking_strategy":
            value = full_name(value) if isinstance(value, str) else value
        earlier = full.pop(setting, None)
        if earlier is not None and str(earlier) != str(value):  # as texts: a mistaken value may be an array
            warn_once_of_two_spellings(f"{name}={spelled(settings[name])}", f"{setting}={spelled(earlier)}")
        full[setting] = value
        log_alias_once(f"{name}={spelled(settings[name])}", f"{setting}={spelled(value)}")
    return full


def overridden(own: Mapping[str, object], given: Mapping[str, object]) -> dict[str, object]:
    """Return a task's settings with those that the user gives, however the two spell a setting.

    lm_eval merges `--gen_kwargs` into a task's settings by `dict.update`. A user's `max_gen_toks` then loses to the
    `max_new_tokens` of a task that has both, and a user's `strategy` is beside the task's `remasking_strategy`.
    """
    names = set(map(_meaning, given))
    return {**{name: value for name, value in own.items() if _meaning(name) not in names}, **given}


def _meaning(name: str) -> str:
    """The one name of a setting's spellings."""
    return MAX_TOKENS_SPELLINGS[0] if name in MAX_TOKENS_SPELLINGS else ALIASES.get(name, name)


@functools.cache
def warn_once_of_two_spellings(used: str, unused: str) -> None:
    """Warn, the first time, that one place gives a setting two values."""
    logger.warning("%s overrides %s, which is given in the same place. Give the setting once.", used, unused)


@functools.cache
def log_alias_once(given: str, full: str) -> None:
    """Log, the first time, what a setting in a short form is read as."""
    if given != full:
        logger.info("%s is read as %s.", given, full)
