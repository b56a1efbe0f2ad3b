r"""The rule by which dLLM-RL scores answers to mathematical problems: it compares the text of the last box.

    last_box(response)                  the text to compare
    is_equal(answer, gold)              whether the rule's texts and numbers are equal

dLLM-RL's code also parses formulas by sympy, which takes antlr4-python3-runtime 4.11 alone. The requirements of dLLM-RL
install omegaconf, which needs 4.9: there the code compares texts, without a message. This module does the same.

Source: `extract_final_boxed_answer` in sample/trado_sample.py and `is_equal` in reward/math_utils.py of
Gen-Verse/dLLM-RL at 10b4fd1; its `is_equal` has the rules of MATH (hendrycks/math, math_equivalence.py) and Minerva.
"""

from __future__ import annotations

import re
from collections.abc import Hashable

from sdar_lm_eval.tasks.extraction import INVALID
from sdar_lm_eval.tasks.latex import (
    REMOVED,
    SUBSTITUTIONS,
    bare_value,
    braced_fractions,
    closing_brace,
    remove,
    replace,
    sub,
    through,
    unbraced,
    up_to,
    without_commas,
)

_LONG = 128  # characters; longer texts that repeat themselves are never equal
_REPEATED = 0.2  # the share of a text's substrings that occurred before, above which the text repeats itself


def last_box(response: str) -> str:
    r"""Return the text of the last `\boxed{}`; `[invalid]` where there is none, or its braces are not balanced."""
    _, box, inside = response.rpartition("\\boxed{")
    end = closing_brace(inside) if box else None
    return INVALID if end is None else inside[:end]


def is_equal(answer: str, gold: str) -> bool:
    """Return whether two texts are equal in MATH's normal form or as numbers, or else in Minerva's normal form.

    Where MATH's normal form does not exist, the texts themselves are compared.
    """
    if _is_equivalent(answer, gold):
        return True
    return not _any_repeats_itself(answer, gold) and minerva_form(answer) == minerva_form(gold)


def form(answer: str) -> Hashable:
    """Return what two wrong answers have in common if they are the same answer: the number, or MATH's normal form."""
    try:
        text = math_form(answer)
    except ValueError:
        return answer
    number = _number(text)
    return text if number is None else number


def _is_equivalent(answer: str, gold: str) -> bool:
    try:
        texts = math_form(answer), math_form(gold)
    except ValueError:
        return answer == gold
    numbers = tuple(map(_number, texts))
    return texts[0] == texts[1] if None in numbers else numbers[0] == numbers[1]


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def math_form(text: str) -> str:
    r"""Return a text in MATH's normal form, which has all commas removed.

    Raises:
        ValueError: the text has several units (`\text{ `), or ends in `\sqrt` or `\frac`.
    """
    text, *units = through(_WITHOUT_MARKUP, text).split("\\text{ ")
    if len(units) > 1:
        raise ValueError("several units")
    before, *after = through(_VALUE, text).split("\\sqrt")
    if "" in after:
        raise ValueError("nothing follows a root")
    roots = (part if part.startswith("{") else f"{{{part[0]}}}{part[1:]}" for part in after)
    text = "\\sqrt".join([before, *roots]).replace(" ", "")
    # The first fraction without two parts decides: dLLM-RL's code fails at one without any, and stops at one with one.
    if next((part for part in text.split("\\frac")[1:] if len(part) < 2 and part != "{"), None) == "":
        raise ValueError("nothing follows a fraction")
    text = braced_fractions(text)
    if text == "0.5":
        return "\\frac{1}{2}"
    whole = re.fullmatch(r"(0|-?[1-9]\d*)/(0|-?[1-9]\d*)", text, re.ASCII)
    return f"\\frac{{{whole[1]}}}{{{whole[2]}}}" if whole else text


def minerva_form(text: str) -> str:
    """Return a text in dLLM-RL's variant of Minerva's normal form (arXiv 2206.14858, appendix D.1)."""
    return through(_MINERVA, text)


def _any_repeats_itself(*texts: str) -> bool:
    return any(len(text) > _LONG and 1 - distinct_substrings(text) / (len(text) * (len(text) + 1) / 2) > _REPEATED
               for text in texts)  # fmt: skip


def distinct_substrings(text: str) -> int:
    """Return the number of different substrings of a text, without the empty one, in linear time.

    Source: A. Blumer et al., The smallest automaton recognizing the subwords of a text, Theoretical Computer Science 40
    (1985).
    """
    following: list[dict[str, int]] = [{}]  # state -> character -> state
    longest, link = [0], [-1]  # state -> length of its longest substring, state of that substring's longest suffix
    last, number = 0, 0
    for character in text:
        state = len(longest)
        following.append({})
        longest.append(longest[last] + 1)
        link.append(0)
        before = last
        while before >= 0 and character not in following[before]:
            following[before][character] = state
            before = link[before]
        if before >= 0:
            reached = following[before][character]
            if longest[before] + 1 != longest[reached]:
                copy = len(longest)
                following.append(dict(following[reached]))
                longest.append(longest[before] + 1)
                link.append(link[reached])
                link[reached] = copy
                while before >= 0 and following[before].get(character) == reached:
                    following[before][character] = copy
                    before = link[before]
                reached = copy
            link[state] = reached
        number += longest[state] - longest[link[state]]
        last = state
    return number


_WITHOUT_MARKUP = [
    *remove("\n", "\\!"),
    *replace(("\\\\", "\\"), ("tfrac", "frac"), ("dfrac", "frac")),
    *remove("\\left", "\\right", "^{\\circ}", "^\\circ", "\\$", "$", ","),
]
_VALUE = [*replace(("\\%", ""), (" .", " 0."), ("{.", "{0.")), bare_value]
_MINERVA = [
    *replace(*SUBSTITUTIONS),
    *remove(*REMOVED),
    sub(r".*?\$(.*?)\$.*", r"$\1$"),
    *map(unbraced, ("text", "textbf", "overline")),
    up_to("}", sub(r"\\boxed\{(.*)\}", r"\1")),
    sub(r"frac([^{])(.)", r"frac{\1}{\2}"),
    sub(r"sqrt([^{])", r"sqrt{\1}"),
    *remove("$"),
    without_commas,
]
