r"""What the rules of several releases for answers in LaTeX have in common: steps that change a text, braces, fractions.

through([*remove("$"), braced_fractions], "$\frac12$")     the text after each step: \frac{1}{2}
closing_brace("2}+x")                                      where the braces before the text close: 1
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import partial

Step = Callable[[str], str]
"""A change of a text."""


def through(steps: Iterable[Step], text: str) -> str:
    """Return a text after each of some steps, in their order."""
    for step in steps:
        text = step(text)
    return text


def replace(*pairs: tuple[str, str]) -> list[Step]:
    """Return steps of which each puts a new text in the place of an old one: (old, new)."""
    return [partial(_replaced, old=old, new=new) for old, new in pairs]


def _replaced(text: str, old: str, new: str) -> str:
    return text.replace(old, new)


def remove(*words: str) -> list[Step]:
    """Return steps of which each removes a text."""
    return replace(*((word, "") for word in words))


def sub(pattern: str, new: str) -> Step:
    """Return the step that replaces all matches of a pattern."""
    return partial(re.compile(pattern).sub, new)


def up_to(end: str, step: Step) -> Step:
    """Return a step for the text up to the last `end`, with which each match of the step's pattern ends.

    Behind the last `end`, a text in a loop would be read once for each beginning of a match.
    """

    def change(text: str) -> str:
        length = text.rfind(end) + len(end) if end in text else 0
        return step(text[:length]) + text[length:]

    return change


def unbraced(command: str) -> Step:
    """Return the step that replaces `command{…}` by what is inside, up to the first closing brace."""
    return up_to("}", sub(rf"\\{command}\{{(.*?)\}}", r"\1"))


def last(pattern: str, end: str = "") -> Step:
    """Return the step that reduces a text to the group of the pattern's last match; a text without a match stays.

    Args:
        pattern: the pattern.
        end: what each match ends with, as for `up_to`.
    """
    found = re.compile(pattern).findall
    return lambda text: (found(text[: text.rfind(end) + len(end)]) or [text])[-1]


def closing_brace(text: str) -> int | None:
    """Return the index of the brace that closes a brace before the text; None where the text does not close it."""
    depth = 1
    for brace in re.finditer("[{}]", text):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return brace.start()
    return None


def braced_fractions(text: str) -> str:
    r"""Put braces around both parts of `\frac12` and `\frac1{72}`; a text with a fraction of one part stays."""
    before, *after = text.split("\\frac")
    if any(len(part) < 2 for part in after if not part.startswith("{")):
        return text
    braced = (
        part
        if part.startswith("{")
        else f"{{{part[0]}}}" + (part[1:] if part[1] == "{" else f"{{{part[1]}}}{part[2:]}")
        for part in after
    )
    return "\\frac".join([before, *braced])


def bare_value(text: str) -> str:
    """Return a text without a name of at most two characters in front, as in `x=5`, and `.5` as `0.5`."""
    if text.startswith("."):
        text = "0" + text
    left, equals, right = text.partition("=")
    return right if equals and "=" not in right and len(left) <= 2 else text


def without_commas(text: str) -> str:
    """Return a number without its commas; any other text stays."""
    digits = text.replace(",", "")
    return digits if digits.isdigit() else text


# fmt: off
SUBSTITUTIONS = (
    ("an ", ""), ("a ", ""), (".$", "$"), ("\\$", ""), ("\\ ", ""), (" ", ""), ("mbox", "text"), (",\\text{and}", ","),
    ("\\text{and}", ","), ("\\text{m}", "\\text{}"),
)
"""What Minerva's normal form replaces first (arXiv 2206.14858, appendix D.1)."""

REMOVED = (
    "square", "ways", "integers", "dollars", "mph", "inches", "ft", "hours", "km", "units", "\\ldots", "sue", "points",
    "feet", "minutes", "digits", "cents", "degrees", "cm", "gm", "pounds", "meters", "meals", "edges", "students",
    "childrentickets", "multiples", "\\text{s}", "\\text{.}", "\\text{\ns}", "\\text{}^2", "\\text{}^3", "\\text{\n}",
    "\\text{}", "\\mathrm{th}", "^\\circ", "^{\\circ}", "\\;", ",\\!", "{,}", '"', "\\dots",
)
"""What Minerva's normal form removes then, in this order."""
# fmt: on
