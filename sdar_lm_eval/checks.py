"""Checks of values that are typed already: one clear error, or the value. `settings.py` reads text."""

from __future__ import annotations

import contextlib
import math
import operator
from collections.abc import Callable
from typing import SupportsFloat, SupportsIndex, TypeVar

from sdar_lm_eval.errors import UserError

Given = TypeVar("Given")
Taken = TypeVar("Taken")


def check_range(given: str, allowed: bool, what: str) -> None:
    """Refuse a value that is not allowed; `given` ("top_k=-1") and `what` ("0 or more") make the message.

    Raises:
        UserError: the value is out of range.
    """
    if not allowed:
        raise UserError(f"{given} is out of range: it must be {what}.")


def check_number(name: str, value: object, *, whole: bool) -> int | float:
    """Take a finite number, or a whole one: an int where `whole`, else a float.

    Raises:
        UserError: the value is something else.
    """
    if whole and isinstance(value, SupportsIndex) and not isinstance(value, bool):
        return operator.index(value)  # not by way of float, which has no room for large ones
    number = math.nan
    if isinstance(value, SupportsFloat) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):
            number = float(value)
    if not math.isfinite(number) or (whole and number != int(number)):
        raise UserError(f"{name}={value!r} is not {'a whole number' if whole else 'a number'}.")
    return int(number) if whole else number


def at_least_one(name: str, value: object) -> int:
    """Take a whole number above 0.

    Raises:
        UserError: the value is something else.
    """
    number = int(check_number(name, value, whole=True))
    check_range(f"{name}={number}", number >= 1, "1 or more")
    return number


def check_bool(name: str, value: object) -> bool:
    """Take true or false, and nothing that stands for them.

    Raises:
        UserError: it is neither.
    """
    if not isinstance(value, bool):
        raise UserError(f"{name}={value!r} is neither true nor false. Give one of them.")
    return value


def if_given(check: Callable[[str, Given], Taken], name: str, value: Given | None) -> Taken | None:
    """Check an option by a function of its name and value, such as `at_least_one`; None, not given, stays None."""
    return None if value is None else check(name, value)
