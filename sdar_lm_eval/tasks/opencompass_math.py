r"""The rule by which SDAR's released evaluation scores GSM8K: it compares normal forms of the answer and the gold one.

    best_form(response, gold)    `gold` where the rule finds a response right, else the answer's normal form

Source: `math_postprocess_v2`, `normalize_final_answer` and `MATHEvaluator(version="v2")` in
opencompass/datasets/math.py of JetAstra/SDAR at c2041a8, as configs/datasets/gsm8k/gsm8k_0shot_v2_gen_17d799.py chooses
them. Each step below is a step there, and the order of the steps decides scores: `18.` and `18 dollars` are 18, but
`18 eggs` is not.
"""

from __future__ import annotations

import re

from sdar_lm_eval.tasks.latex import (
    REMOVED,
    SUBSTITUTIONS,
    Step,
    bare_value,
    braced_fractions,
    closing_brace,
    last,
    remove,
    replace,
    sub,
    through,
    unbraced,
    up_to,
    without_commas,
)


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
    _, box, after = response.rpartition("\\boxed")
    end = closing_brace(after[1:]) if box and after.startswith("{") else None
    if end is None:
        return None
    inside = after[1 : 1 + end]
    doubled = re.match(r"\{(.*)\}$", inside)
    return doubled[1] if doubled else inside


def normal_form(text: str) -> str:
    """Return a text in the form of `normalize_final_answer`, after Minerva's (arXiv 2206.14858, appendix D.1)."""
    return through(_NORMAL_FORM, text)


def stripped(text: str) -> str:
    """Return a text in the form of `MATHEvaluator._strip_string_v2`.

    Raises:
        ValueError: the text has one slash, and no whole numbers on both sides of it.
    """
    return through(_STRIPPED, text.strip())


def _without_unit(text: str) -> str:
    unit = text.find("\\text{")
    return (text[:unit] if unit >= 0 and text.endswith("}") else text).strip() or text


def _infinity(text: str) -> str:
    text = text.replace("infinity", "\\infty")
    return text if "\\infty" in text else text.replace("inf", "\\infty")


def _imaginary(text: str) -> str:
    return text if "i" in text else text.replace("j", "i")


def _slash(text: str) -> str:
    if text.count("/") != 1:
        return text
    above, below = map(int, text.split("/"))
    return f"\\frac{{{above}}}{{{below}}}" if text == f"{above}/{below}" else text


def _latex_fraction(text: str) -> str:
    return text if "\\frac" in text else text.replace("rac", "\\frac")


_NORMAL_FORM: list[Step] = [
    *replace(*SUBSTITUTIONS, ("\\le", "<")),
    *remove(*REMOVED, "\n", "\r", "\f"),
    up_to(")}", sub(r"\\text\{\((.*?)\)\}", r"\1")),
    *map(unbraced, ("text", "textbf", "overline")),
    up_to("}", sub(r"\\boxed\{(.*)\}", r"\1")),
    last(r"finalansweris(.*)"),
    last(r"answer?is:?(.*)"),
    last(r"oxed\{(.*?)\}", end="}"),
    last(r"\$(.*?)\$"),
    str.strip,
    _latex_fraction,
    sub(r"frac([^{])(.)", r"frac{\1}{\2}"),
    sub(r"sqrt([^{])", r"sqrt{\1}"),
    *remove("$"),
    without_commas,
]
_STRIPPED: list[Step] = [
    *remove("\n"),
    lambda text: text.rstrip("."),
    *remove("\\!", "\\ "),
    *replace(("\\\\", "\\"), ("\\\\", "\\"), ("tfrac", "frac"), ("dfrac", "frac")),
    *remove("\\left", "\\right"),
    _without_unit,
    *remove("^{\\circ}", "^\\circ", "\\$", "$", "\\text", "x\\in", "\\%", "%"),
    *replace((" .", " 0."), ("{.", "{0.")),
    *remove("\\cdot"),
    _infinity,
    *replace(("+\\inity", "\\infty")),
    *remove("and", "\\mathbf"),
    up_to("}", sub(r"\\mbox{.*?}", "")),
    _imaginary,
    # A match begins with a run of digits: inside of a long run, each digit would read the rest of the run.
    sub(r"(?<!\d)(\d+)\.0+([^\d])", r"\1\2"),
    sub(r"(?<!\d)(\d+)\.0+$", r"\1"),
    bare_value,
    sub(r"\\sqrt(\w+)", r"\\sqrt{\1}"),
    *remove(" "),
    braced_fractions,
    _slash,
]
