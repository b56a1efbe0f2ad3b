"""Checks of typed values. A check returns the value, or raises one clear error. `settings.py` reads text."""

from __future__ import annotations

import contextlib
import math
import operator
from collections.abc import Callable
from typing import SupportsFloat, SupportsIndex, TypeVar

from sdar_lm_eval.errors import UserError
from sdar_lm_eval.files import shown

Given = TypeVar("Given")
Taken = TypeVar("Taken")


def check_range(given: str, allowed: bool, what: str) -> None:
    """Raise unless a value is allowed. The message says what was `given` ("top_k=-1") and `what` is ("0 or more").

    Raises:
        UserError: the value is out of range.
    """
    if not allowed:
        raise UserError(f"{given} is out of range: it must be {what}.")


def check_unicode(what: str, text: str) -> None:
    """Raise unless a text is Unicode: a tokenizer takes no surrogates, which JSON and command lines can hold.

    Raises:
        UserError: the text has a surrogate. The message says `what` the text is ("the prompt").
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{what} {shown(text)} is no Unicode text: {error.reason}.") from error


def check_number(name: str, value: object, *, whole: bool) -> int | float:
    """Return a number: an int if `whole`, else a finite float.

    Raises:
        UserError: the value is no such number.
    """
    if whole and isinstance(value, SupportsIndex) and not isinstance(value, bool):
        return operator.index(value)  # float would round large ints
    number = math.nan
    if isinstance(value, SupportsFloat) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):
            number = float(value)
    if not math.isfinite(number) or (whole and number != int(number)):
        raise UserError(f"{name}={value!r} is not {'a whole number' if whole else 'a number'}.")
    return int(number) if whole else number


def at_least_one(name: str, value: object) -> int:
    """Return a whole number of 1 or more.

    Raises:
        UserError: the value is no such number.
    """
    number = int(check_number(name, value, whole=True))
    check_range(f"{name}={number}", number >= 1, "1 or more")
    return number


def check_bool(name: str, value: object) -> bool:
    """Return a bool. No other type is converted.

    Raises:
        UserError: the value is no bool.
    """
    if not isinstance(value, bool):
        raise UserError(f"{name}={value!r} is neither true nor false. Give one of them.")
    return value


def if_given(check: Callable[[str, Given], Taken], name: str, value: Given | None) -> Taken | None:
    """Check an option with a function such as `at_least_one`; None, an option that is not given, stays None."""
    return None if value is None else check(name, value)
