r"""Finds the number that a response gives as its answer, and writes the number in a canonical form.

The canonical form is `str` of a `fractions.Fraction` (`1000`, `-5`, `1/2`), so two strings are equal exactly where the
numbers are. Every public function returns a canonical number, or `INVALID` where there is no answer, and never raises.

Two marks announce an answer, `\boxed{…}` and `#### …`. The last one that holds a number counts:

- A box delimits the answer, so it must hold one number: `18 \text{ dollars}` and `x = 9 + 9 = 18` do,
  `3 \text{ and } 4` is `INVALID`. Picking either of the two would score luck.
- `####` is followed by the answer, and whatever comes after that is comment: `#### 18 (9 eggs)` is 18. Markdown uses
  the same four signs for headings: `#### Step 3` and `#### 3. Total` are not answers.

A verbatim copy of the question is no part of the answer: it is removed first.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from fractions import Fraction

from sdar_lm_eval.tasks.latex import closing_brace

INVALID = "[invalid]"

# A longer number is no answer but noise, such as one digit repeated up to the length limit.
MAX_CHARACTERS = 1000

# Thin, narrow and other no-break spaces group digits in print, as apostrophes do in Switzerland; a plain space
# separates two numbers.
_THIN = "\u2009"
_GROUP = rf"[,'’{_THIN}\u00a0\u2007\u202f]"
_INTEGER = rf"""(?:
      [0-9]{{1,3}} (?:{_GROUP}[0-9]{{3}})+ (?![0-9])                # 1,234,567
    | [0-9]{{1,2}} (?:{_GROUP}[0-9]{{2}})+ {_GROUP}[0-9]{{3}} (?![0-9])    # 12,34,567, as in India
    | [0-9]+
)"""
_DECIMAL = rf"""(?:
    (?:
        [0-9]{{1,3}} (?:\.[0-9]{{3}}){{2,}} (?![0-9]|\.[0-9])           # 1.234.567: of two points none is a decimal one
      | {_INTEGER} (?:\.[0-9]+)?
      | (?<![0-9A-Za-z.]) \.[0-9]+
    )
    (?:[eE][+-]?[0-9]{{1,3}}(?![0-9A-Za-z]))?
)"""
_NUMBER = rf"""
    (?P<minus>(?<![0-9A-Za-z)\]}}%-])-)?          # in 10-5, x-5 and (2)-5 the sign is an operator
    (?:(?P<whole>[0-9]+)\s(?=[0-9]+/[0-9]))?      # 1 1/2
    (?P<number>{_DECIMAL})
    (?:\s?/\s?(?P<denominator>{_DECIMAL}))?
"""
_ONE_NUMBER = re.compile(_NUMBER, re.VERBOSE)
# Digits behind a letter belong to a name: the 2 of x2, CO2 or H2O is not a number.
_NUMBER_OR_NAME = re.compile(rf"[A-Za-z][0-9A-Za-z_]*|{_NUMBER}", re.VERBOSE)

# The backslash is optional: it is lost where a response went through an escaping step.
_BOX = re.compile(r"(?:boxed|fbox)\s*\{")
_HASHES = re.compile(r"(?<!#)####(?!#)([^#\n]*)")
_HASHES_LEAD = re.compile(r"[^0-9A-Za-z.-]*(?:(?:the |final )*answer(?: is)?[^0-9A-Za-z.-]*)?", re.IGNORECASE)
_HEADING_REST = re.compile(r"\s*[.):]\s\W*[^\W\d_]")
_CALCULATION = re.compile(r"(?:[-0-9\s.,+*/()%x×÷]*=)+\s*")
_EQUALS = re.compile(r"=|≈|\\approx")
_SPACED_MINUS = re.compile(r"(?:^|(?<=[=:]))([\s*({]{0,8})-\s+(?=[0-9.])")

# Two numbers side by side make no sense in a box, so `80 000` is one there.
_SPACE_GROUP = re.compile(r"(?<=[0-9]) (?=[0-9]{3}(?![0-9]))")

# LaTeX.
_REMARK = re.compile(r"\\(?:text|textrm|mathrm|mbox)\s*\{[^{}]*\}(?:\s?\^\s?(?:\{[^{}]*\}|[0-9]))?")
_SPACE = re.compile(r"\\[,;: ]")
_PART = r"\s*(?:\{\s*(-?[0-9][0-9.,]*)\s*\}|([0-9]))"
_FRACTION = re.compile(rf"\\[dtc]?frac{_PART}{_PART}")
_SCRIPT = re.compile(r"_\{[^{}]*\}|(?<=[A-Za-z}])\^\s*(?:\{[^{}]*\}|[0-9]+)")
_COMMAND = re.compile(r"\\[A-Za-z]+")

_CHARACTERS = list(map(chr, range(0x20000)))
_CURRENCIES = "".join(sign for sign in _CHARACTERS if unicodedata.category(sign) == "Sc")
_CURRENCY = re.compile(rf"\\?[{_CURRENCIES}]")
_MINUS_CURRENCY = re.compile(rf"(?<=-)\\?[{_CURRENCIES}]\s?(?=[.0-9])")
_VULGAR_FRACTION = re.compile(r"[¼-¾⅐-⅞]")
_ASCII_FORMS = str.maketrans(
    {code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}  # full-width signs, letters and digits
    | {digit: str(unicodedata.decimal(digit)) for digit in _CHARACTERS if unicodedata.category(digit) == "Nd"}
    | dict.fromkeys("\u2010\u2011\u2012\u2013\u2212\ufe63", "-")
    | {"\u066c": ",", "\u066b": ".", "\u2044": "/", "\u2215": "/"}  # Arabic separators, fraction and division slash
)


def strict_match(response: str, question: str = "") -> str:
    r"""Return the number in the last `\boxed{}` or after the last `####`, whichever comes later."""
    return _marked_number(_clean(response, question))


def flexible_extract(response: str, question: str = "") -> str:
    """Return what `strict_match` does, and where that is `INVALID`, the last number of the response."""
    text = _clean(response, question)
    marked = _marked_number(text)
    if marked != INVALID:
        return marked
    numbers = list(_numbers(_without_latex(text)))
    return _canonical(numbers[-1]) if numbers else INVALID


def gold_number(answer: str) -> str:
    """Return the number after the last `####` of a GSM8K answer."""
    lines = _HASHES.findall(_clean(answer))
    return (_announced_number(lines[-1]) if lines else None) or INVALID


def _marked_number(text: str) -> str:
    marks = [(start, _boxed_number(content)) for start, content in _boxes(text)]
    marks += [(match.start(), _announced_number(match[1])) for match in _HASHES.finditer(text)]
    return max(((start, number) for start, number in marks if number), default=(0, INVALID))[1]


def _boxes(text: str) -> Iterator[tuple[int, str]]:
    """Yield each box's start and content.

    A box ends at its closing brace, or where another box starts inside it. A box that is never closed, since the
    response was cut, ends with its line.
    """
    starts = list(_BOX.finditer(text))
    limits = [*(start.start() for start in starts[1:]), len(text)]
    for start, limit in zip(starts, limits, strict=False):  # limits are one more where there is no box
        inside = text[start.end() : limit]
        end = closing_brace(inside)
        yield start.start(), inside.lstrip().partition("\n")[0] if end is None else inside[:end]


def _boxed_number(content: str) -> str | None:
    """Return the one number of a box, `INVALID` where there are several, None where there is none."""
    content = _SPACE_GROUP.sub(_THIN, content)
    # What stands in \text{} is a unit or remark, unless the number itself does.
    for kept in (_REMARK.sub(" ", content), content):
        # Of `9 + 9 = 18` the right side is the answer, of `18 = 9 + 9` the left one.
        sides = [_SPACED_MINUS.sub(r"\1-", side) for side in reversed(_EQUALS.split(kept))]
        numbers = [list(_numbers(_without_latex(side))) for side in sides]
        for on_side in numbers:
            if len(on_side) == 1:
                return _canonical(on_side[0])
        if any(numbers):
            return INVALID
    return None


def _announced_number(line: str) -> str | None:
    """Return the number that follows `####` directly, or after a calculation; None where there is none."""
    line = _SPACED_MINUS.sub(r"\1-", _without_latex(line))
    lead = _HASHES_LEAD.match(line)
    number = _ONE_NUMBER.match(line, lead.end() if lead else 0)
    if number is None or _HEADING_REST.match(line, number.end()):
        return None
    calculation = _CALCULATION.match(line, number.start())
    result = _ONE_NUMBER.match(line, calculation.end()) if calculation else None
    return _canonical(result or number)


def _clean(text: str, question: str = "") -> str:
    """Return the text without verbatim copies of the question, and with digits and signs as ASCII has them."""
    if question.strip():
        text = text.replace(question.strip(), "\n")
    return _VULGAR_FRACTION.sub(_spell_fraction, text.translate(_ASCII_FORMS))


def _spell_fraction(match: re.Match[str]) -> str:
    numerator, _, denominator = unicodedata.normalize("NFKC", match[0]).partition("\u2044")
    return _after_digit(match) + f"{numerator}/{denominator}"


def _without_latex(text: str) -> str:
    """Return the text with its numbers in plain notation, and without LaTeX commands and currency signs."""
    text = text.replace("{,}", ",").replace("\\!", "")
    text = _SPACE.sub(_THIN, text)
    text = _FRACTION.sub(lambda m: f"{_after_digit(m)}{m[1] or m[2]}/{m[3] or m[4]}", text)
    text = _SCRIPT.sub("", text)
    text = _COMMAND.sub(" ", text)
    return _CURRENCY.sub(" ", _MINUS_CURRENCY.sub("", text))


def _after_digit(match: re.Match[str]) -> str:
    """Return a space where a fraction follows a digit, as in `1½`, else ""."""
    return " " if match.string[match.start() - 1 : match.start()].isdigit() else ""


def _numbers(text: str) -> Iterator[re.Match[str]]:
    return (match for match in _NUMBER_OR_NAME.finditer(text) if match["number"])


def _canonical(number: re.Match[str]) -> str:
    if len(number[0]) > MAX_CHARACTERS:
        return INVALID
    value, whole, denominator = (
        _value(number[part] or default) for part, default in (("number", "0"), ("whole", "0"), ("denominator", "1"))
    )
    if denominator == 0:
        return INVALID
    value = whole + value / denominator
    canonical = str(-value if number["minus"] else value)
    return canonical if len(canonical) <= MAX_CHARACTERS else INVALID


def _value(decimal: str) -> Fraction:
    digits = re.sub(_GROUP, "", decimal)
    return Fraction(digits.replace(".", "") if digits.count(".") > 1 else digits)
