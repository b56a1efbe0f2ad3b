"""Grids of decoding settings: texts such as "0.5:0.99" -> values -> combinations, each of which is evaluated.

    4,2,1           several values, separated by commas
    0.5:0.99        a range with both ends: 0.5, 0.6, 0.7, 0.8, 0.9, 0.99; the step is 0.1, or 1 for whole numbers
    1:8:2           a range with its own step and both ends: 1, 3, 5, 7, 8

A setting has no effect where the strategy does not read it (`DecodingConfig.idle`). Combinations that differ only in
settings without effect are copies, of which one is evaluated. This module needs the standard library only, since
Modal's flags are read where torch is missing.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Iterable, Mapping
from decimal import Decimal, InvalidOperation
from typing import TypeVar, get_type_hints

from sdar_lm_eval.decoding import DECODING_SETTINGS, DecodingConfig
from sdar_lm_eval.engines.native.strategies import full_name
from sdar_lm_eval.errors import UserError, did_you_mean
from sdar_lm_eval.settings import to_number, to_whole
from sdar_lm_eval.spellings import ALIASES

Setting = bool | int | float | str
"""A value of model_args or gen_kwargs."""

Combination = dict[str, Setting]
"""Full name of a decoding setting -> its value; only the settings that a grid gives."""

MOST_COMBINATIONS = 10_000
WHOLE_STEP, REAL_STEP = Decimal(1), Decimal("0.1")  # steps of ranges that give no step

Item = TypeVar("Item")

_KINDS = {name: kind for name, kind in get_type_hints(DecodingConfig).items() if name in DECODING_SETTINGS}

Kind = type[int] | type[float] | type[str]


def kind_of(setting: str) -> Kind:
    """Return the type of a decoding setting's values.

    Raises:
        UserError: no decoding setting has this name.
    """
    if setting not in _KINDS:
        known = (*_KINDS, *ALIASES)
        raise UserError(f"{setting!r} is no decoding setting.{did_you_mean(setting, known)} Known: {', '.join(known)}.")
    kind = _KINDS[setting]
    return next(known for known in (int, float, str) if kind == known or kind == known | None)


def parts_of(flag: str, text: str) -> list[str]:
    """Return the parts of a flag's text that commas separate.

    Raises:
        UserError: a part is empty.
    """
    parts = [part.strip() for part in str(text).split(",")]
    if not all(parts):
        raise UserError(f"{flag} {text!r} has an empty value. Give one, or several separated by commas.")
    return parts


def values_of(setting: str, text: str, flag: str | None = None) -> list[Setting]:
    """Return the values that a text gives to a setting, in order, each once.

    Args:
        setting: the setting's full name.
        text: values and ranges, separated by commas.
        flag: the setting's name in messages; default: `setting`.

    Raises:
        UserError: a value is empty or not of the setting's type, or a range is malformed. The message says what is
            allowed.
    """
    flag = flag or setting
    kind = kind_of(setting)
    values: list[Setting] = []
    for part in parts_of(flag, text):
        if kind is str:
            values.append(full_name(part))
        elif ":" in part:
            values += [kind(value) for value in _range(flag, part, whole=kind is int)]
        else:
            values.append(to_whole(flag, part) if kind is int else to_number(flag, part))
    return list(dict.fromkeys(values))


def combinations(texts: Mapping[str, str], flag_of: Callable[[str], str] = str) -> list[Combination]:
    """Return all combinations of the values of some settings; the last setting varies fastest.

    Args:
        texts: name or short name of a setting (`ALIASES` in spellings.py) -> its values as text.
        flag_of: full name of a setting -> its name in messages.

    Raises:
        UserError: as `values_of`, or there are more than `MOST_COMBINATIONS` combinations.
    """
    full = {ALIASES.get(name, name): text for name, text in texts.items()}
    values = {name: values_of(name, text, flag_of(name)) for name, text in full.items()}
    count = math.prod(map(len, values.values()))
    if count > MOST_COMBINATIONS:
        raise UserError(f"The grid has {count:,} combinations, more than {MOST_COMBINATIONS:,}. Give fewer values.")
    return [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]


def without_copies(items: Iterable[Item], key: Callable[[Item], Hashable]) -> list[Item]:
    """Return the first item of each key, in their order."""
    first: dict[Hashable, Item] = {}
    for item in items:
        first.setdefault(key(item), item)
    return list(first.values())


def _range(flag: str, text: str, *, whole: bool) -> list[Decimal]:
    """Return the values of a range, both ends included."""
    usage = f"{flag} {text!r} is no range. Write FROM:TO or FROM:TO:STEP, such as "
    usage += "1:8:2." if whole else "0.5:0.9:0.05."
    try:
        numbers = [Decimal(part.strip()) for part in text.split(":")]
    except InvalidOperation:
        raise UserError(usage) from None
    if len(numbers) not in (2, 3) or not all(number.is_finite() for number in numbers):
        raise UserError(usage)
    if whole and any(number != number.to_integral_value() for number in numbers):
        raise UserError(f"{flag} {text!r}: the ends and the step of this range must be whole numbers.")
    begin, end = numbers[:2]
    step = numbers[2] if len(numbers) == 3 else WHOLE_STEP if whole else REAL_STEP
    if step <= 0 or begin > end:
        raise UserError(f"{flag} {text!r}: a range goes from the smaller value to the larger one by a positive step.")
    count = int((end - begin) / step) + 1
    if count > MOST_COMBINATIONS:
        raise UserError(f"{flag} {text!r} has {count:,} values, more than {MOST_COMBINATIONS:,}. Give a larger step.")
    values = [begin + index * step for index in range(count)]
    return values if values[-1] == end else [*values, end]
