"""Checks of typed values. A check returns the value, or raises one clear error. `settings.py` reads text.

`checks_types` and `check_arguments` check the arguments of public functions by the functions' annotations.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import math
import operator
import types
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import (
    Any,
    ParamSpec,
    SupportsFloat,
    SupportsIndex,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from sdar_lm_eval.errors import UserError
from sdar_lm_eval.files import shown

Given = TypeVar("Given")
Taken = TypeVar("Taken")
Parameters = ParamSpec("Parameters")
Returned = TypeVar("Returned")

MOST_CHECKED = 100  # elements of a container: a user's mistake is in the first ones


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
        raise UserError(f"{what} {shown(text)} is no Unicode text: {error.reason}. Give text in UTF-8.") from error


def plain(value: object) -> object:
    """Return a scalar of NumPy or torch as Python's own value, and any other value unchanged."""
    scalar: Any = value
    return scalar.item() if getattr(scalar, "ndim", None) == 0 and hasattr(scalar, "item") else value


def check_number(name: str, value: object, *, whole: bool) -> int | float:
    """Return a number: an int if `whole`, else a finite float.

    Raises:
        UserError: the value is no such number.
    """
    value, number = plain(value), math.nan
    if not isinstance(value, bool):
        with contextlib.suppress(OverflowError, TypeError, ValueError):  # as `fits` says of arrays
            if whole and isinstance(value, SupportsIndex):
                return operator.index(value)  # float would round large ints
            if isinstance(value, SupportsFloat):
                number = float(value)
    if not math.isfinite(number) or (whole and number != int(number)):
        raise UserError(f"{name}={shown(value)} is not {'a whole number' if whole else 'a number'}.")
    return int(number) if whole else number


def at_least_one(name: str, value: object) -> int:
    """Return a whole number of 1 or more.

    Raises:
        UserError: the value is no such number.
    """
    number = int(check_number(name, value, whole=True))
    check_range(f"{name}={number}", number >= 1, "1 or more")
    return number


def check_limit(limit: object) -> None:
    """Raise unless `--limit` is a number of documents, a share of them, or None.

    Raises:
        UserError: the limit is no number above 0.
    """
    if limit is not None and not (isinstance(limit, (int, float)) and limit > 0):
        shown_limit = f"{limit:g}" if isinstance(limit, float) else limit
        raise UserError(f"--limit {shown_limit}: give a number of documents above 0, or a share between 0 and 1.")


def check_bool(name: str, value: object) -> bool:
    """Return a bool. No other type is converted, except a bool of NumPy or torch.

    Raises:
        UserError: the value is no bool.
    """
    value = plain(value)
    if not isinstance(value, bool):
        raise UserError(f"{name}={shown(value)} is neither true nor false. Give one of them.")
    return value


def if_given(check: Callable[[str, Given], Taken], name: str, value: Given | None) -> Taken | None:
    """Check an option with a function such as `at_least_one`; None, an option that is not given, stays None."""
    return None if value is None else check(name, value)


def checks_types(function: Callable[Parameters, Returned]) -> Callable[Parameters, Returned]:
    """Let a function refuse arguments of other types than those in its annotations, by a `UserError`.

    Settings that a function takes as `**settings` have checks of their own.
    """

    @functools.wraps(function)
    def checked(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Returned:
        check_arguments(function, *args, **kwargs)
        return function(*args, **kwargs)

    return checked


def check_arguments(function: Callable[..., object], *args: object, **kwargs: object) -> None:
    """Raise unless the arguments of a call have the types in the annotations of a function, or of a class's `__init__`.

    An int passes for a float, and numbers of NumPy pass for int and float. Any iterable passes for a sequence, such as
    a column of a data frame. An array with rows does not pass, nor does a data frame, whose elements are its columns.

    Raises:
        UserError: an argument has another type. The message says which type the argument takes.
    """
    hints, given = _hints(function), dict[str, object]()
    with contextlib.suppress(TypeError):  # Python's own error names arguments that are missing or too many
        given = _signature(function).bind(*args, **kwargs).arguments
    for name, value in given.items():
        if name in hints:
            check_type(name, value, hints[name])


def check_type(name: str, value: object, kind: Any) -> None:
    """Raise unless a value has a type, as `check_arguments`.

    Raises:
        UserError: the value has another type. The message says which type the argument takes.
    """
    if not fits(value, kind):
        given = "None" if value is None else shown(value)
        raise UserError(f"{name}={given} is of type {type(value).__name__}. Give {_words(kind)}.")


class _PublicNames(dict[str, object]):
    """The package's public names, which an annotation may use without an import at run time."""

    def __missing__(self, name: str) -> object:
        import sdar_lm_eval

        if name in sdar_lm_eval.__all__:
            return getattr(sdar_lm_eval, name)
        raise KeyError(name)


_signature = functools.cache(inspect.signature)


@functools.cache
def _hints(function: Callable[..., object]) -> Mapping[str, Any]:
    """Name -> type of the parameters, without those of `*args` and `**kwargs`."""
    bare: Any = function
    bare = inspect.unwrap(inspect.getattr_static(bare, "__init__") if isinstance(bare, type) else bare)
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    names = [each.name for each in inspect.signature(bare).parameters.values() if each.kind not in several]
    annotations = {name: bare.__annotations__[name] for name in names if name in bare.__annotations__}
    return get_type_hints(types.SimpleNamespace(__annotations__=annotations), bare.__globals__, _PublicNames())


def fits(value: object, kind: Any) -> bool:
    """Whether a value has a type, as `check_arguments`; True for a protocol, which no value can be checked for."""
    if type(value) is kind:  # the most frequent case
        return True
    value = plain(value)
    origin, parts = get_origin(kind) or kind, get_args(kind)
    if origin in (Union, types.UnionType):
        return any(fits(value, part) for part in parts)
    if origin in (int, float):
        is_number = isinstance(value, SupportsIndex if kind is int else SupportsFloat) and not isinstance(value, bool)
        return is_number and not hasattr(value, "ndim")  # an array has the methods of a number, too
    if origin is Sequence and not isinstance(value, (Mapping, set, frozenset)):
        origin = Iterable
    try:
        if not isinstance(value, origin):
            return False
    except TypeError:
        return True
    if origin in (Iterable, Collection) and (isinstance(value, bytes) or getattr(value, "ndim", 1) != 1):
        return False
    if not _holds_plain(kind) or not isinstance(value, Iterable) or isinstance(value, Iterator):
        return True  # an iterator's elements can be read only once
    inner = parts[0]
    return all(type(each) is inner or fits(each, inner) for each in itertools.islice(value, MOST_CHECKED))


def _holds_plain(kind: Any) -> bool:
    """Whether a type is that of a container of texts or whole numbers. Other elements have checks of their own."""
    origin = get_origin(kind)
    return isinstance(origin, type) and issubclass(origin, Collection) and get_args(kind)[0] in (str, int)


def _words(kind: Any) -> str:
    """The values of a type in words: "str, PathLike or None", "list of str"."""
    origin, parts = get_origin(kind) or kind, get_args(kind)
    if origin in (Union, types.UnionType):
        *first, last = dict.fromkeys(map(_words, parts))
        return f"{', '.join(first)} or {last}" if first else last
    if origin is type(None):
        return "None"
    if origin is Callable:
        return "a function"
    if origin in (Sequence, Iterable, Collection):
        name = "list, tuple or array" if int in parts else "list"
    else:
        name = str(origin.__name__)
    return name + (f" of {parts[0].__name__}" if _holds_plain(kind) else "")
