r"""The rule by which SDAR's released evaluation scores GSM8K: it compares normal forms of the answer and the gold one.

    best_form(response, gold)    `gold` where the rule finds a response right, else the answer's normal form

Source: `math_postprocess_v2`, `normalize_final_answer` and `MATHEvaluator(version="v2")` in
opencompass/datasets/math.py of JetAstra/SDAR at c2041a8, as configs/datasets/gsm8k/gsm8k_0shot_v2_gen_17d799.py chooses
them. Each step below is a step there, and the order of the steps decides scores: `18.` and `18 dollars` are 18, but
`18 eggs` is not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import partial

Step = Callable[[str], str]


def _replace(*pairs: tuple[str, str]) -> list[Step]:
    return [partial(_replaced, old=old, new=new) for old, new in pairs]


def _replaced(text: str, old: str, new: str) -> str:
    return text.replace(old, new)


def _remove(*words: str) -> list[Step]:
    return _replace(*((word, "") for word in words))


def _sub(pattern: str, new: str) -> Step:
    return partial(re.compile(pattern).sub, new)


def _up_to(end: str, step: Step) -> Step:
    """Apply a step to the text up to the last `end`, with which each match of the step's pattern ends.

    Behind it, a text in a loop would be read once for each beginning of a match.
    """

    def up_to(text: str) -> str:
        length = text.rfind(end) + len(end) if end in text else 0
        return step(text[:length]) + text[length:]

    return up_to


def _unbraced(command: str) -> Step:
    """Replace `command{…}` by what is inside."""
    return _up_to("}", _sub(rf"\\{command}\{{(.*?)\}}", r"\1"))


def _last(pattern: str) -> Step:
    """Reduce a text to the group of the pattern's last match; a text without a match stays."""
    found = re.compile(pattern).findall
    return lambda text: (found(text) or [text])[-1]


def _last_box_inside(text: str) -> str:
    found = re.findall(r"oxed\{(.*?)\}", text[: text.rfind("}") + 1])
    return found[-1] if found else text


def _through(steps: Iterable[Step], text: str) -> str:
    for step in steps:
        text = step(text)
    return text


def prediction(response: str) -> str:
    r"""Return the answer that a response gives: the text of its last `\boxed{}`.

    Where that box is not closed, or empty, or there is none: the normal form of the first sentence with "answer is" or
    "final answer", else of the first sentence. A sentence ends at any full stop, even a decimal point.
    """
    if box := _last_box(response):
        return box
    sentences = response.split(".")
    return normal_form(next((s for s in sentences if re.search("final answer|answer is", s.lower())), sentences[0]))


def best_form(response: str, gold: str) -> str:
    """Return `gold` where the rule finds a response right, else the answer's normal form.

    The rule compares four forms of an answer with the same forms of the gold one, and one match is enough. So no fixed
    form represents an answer in the harness's comparison of texts; `gold` stands for the form that matches.
    """
    answer = prediction(response)
    forms: tuple[Step, ...] = (stripped, lambda text: normal_form(stripped(text)), normal_form, str)
    for form in forms:
        try:
            if form(answer) == form(gold):
                return gold
        except ValueError:  # a slash between texts that are no numbers; the rule tries the next form
            continue
    return normal_form(answer)


def _last_box(response: str) -> str | None:
    start = response.rfind("\\boxed")
    if start < 0:
        return None
    depth = 0
    for brace in re.finditer("[{}]", response[start:]):
        depth += 1 if brace[0] == "{" else -1
        if brace[0] == "}" and depth == 0:
            box = response[start : start + brace.end()]
            break
    else:
        return None
    if not box.startswith("\\boxed{"):
        return None
    inside = box[len("\\boxed{") : -1]
    doubled = re.match(r"\{(.*)\}$", inside)
    return doubled[1] if doubled else inside


def normal_form(text: str) -> str:
    """Return a text in the form of `normalize_final_answer`, after Minerva's (arXiv 2206.14858, appendix D.1)."""
    return _through(_NORMAL_FORM, text)


def stripped(text: str) -> str:
    """Return a text in the form of `MATHEvaluator._strip_string_v2`.

    Raises:
        ValueError: the text has one slash, and no whole numbers on both sides of it.
    """
    text = _through(_STRIPPED, text.strip())
    if not text:
        return text
    if text.startswith("."):
        text = "0" + text
    left, equals, right = text.partition("=")
    if equals and "=" not in right and len(left) <= 2:
        text = right
    return _through(_STRIPPED_AT_LAST, text)


def _without_unit(text: str) -> str:
    unit = text.find("\\text{")
    return (text[:unit] if unit >= 0 and text.endswith("}") else text).strip() or text


def _infinity(text: str) -> str:
    text = text.replace("infinity", "\\infty")
    return text if "\\infty" in text else text.replace("inf", "\\infty")


def _imaginary(text: str) -> str:
    return text if "i" in text else text.replace("j", "i")


def _braced_fractions(text: str) -> str:
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


def _slash(text: str) -> str:
    if text.count("/") != 1:
        return text
    above, below = map(int, text.split("/"))
    return f"\\frac{{{above}}}{{{below}}}" if text == f"{above}/{below}" else text


def _latex_fraction(text: str) -> str:
    return text if "\\frac" in text else text.replace("rac", "\\frac")


def _without_commas(text: str) -> str:
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

_NORMAL_FORM: list[Step] = [
    *_replace(*SUBSTITUTIONS, ("\\le", "<")),
    *_remove(*REMOVED, "\n", "\r", "\f"),
    _up_to(")}", _sub(r"\\text\{\((.*?)\)\}", r"\1")),
    *map(_unbraced, ("text", "textbf", "overline")),
    _up_to("}", _sub(r"\\boxed\{(.*)\}", r"\1")),
    _last(r"finalansweris(.*)"),
    _last(r"answer?is:?(.*)"),
    _last_box_inside,
    _last(r"\$(.*?)\$"),
    str.strip,
    _latex_fraction,
    _sub(r"frac([^{])(.)", r"frac{\1}{\2}"),
    _sub(r"sqrt([^{])", r"sqrt{\1}"),
    *_remove("$"),
    _without_commas,
]
_STRIPPED: list[Step] = [
    *_remove("\n"),
    lambda text: text.rstrip("."),
    *_remove("\\!", "\\ "),
    *_replace(("\\\\", "\\"), ("\\\\", "\\"), ("tfrac", "frac"), ("dfrac", "frac")),
    *_remove("\\left", "\\right"),
    _without_unit,
    *_remove("^{\\circ}", "^\\circ", "\\$", "$", "\\text", "x\\in", "\\%", "%"),
    *_replace((" .", " 0."), ("{.", "{0.")),
    *_remove("\\cdot"),
    _infinity,
    *_replace(("+\\inity", "\\infty")),
    *_remove("and", "\\mathbf"),
    _up_to("}", _sub(r"\\mbox{.*?}", "")),
    _imaginary,
    # A match begins with a run of digits: inside of a long run, each digit would read the rest of the run.
    _sub(r"(?<!\d)(\d+)\.0+([^\d])", r"\1\2"),
    _sub(r"(?<!\d)(\d+)\.0+$", r"\1"),
]
_STRIPPED_AT_LAST: list[Step] = [_sub(r"\\sqrt(\w+)", r"\\sqrt{\1}"), *_remove(" "), _braced_fractions, _slash]
