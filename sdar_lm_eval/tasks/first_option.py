"""The letter that a response to a multiple-choice question chooses, by the released evaluation's rule.

    first_option(response)              "A", "B", "C", "D" or `INVALID`
    first_option(response, "ABCDEF")    of six options

Source: `first_option_postprocess` in opencompass/utils/text_postprocessors.py of JetAstra/SDAR at c2041a8. The order of
the rules decides scores, as do its flaws: `故选C` is no answer by itself, since two rules there are joined to one that
expects `只有…对` behind it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

from sdar_lm_eval.tasks.extraction import INVALID

LETTERS = "ABCD"

_SENTENCE = r"\s?(\S+)(?:。|$)"
_SAYS = r"[Tt]he {}:?\s+\(?@"
# Up to the next such words only: a text that repeats them without end would be read once for each of them.
_BOXES = r"[Tt]he {0}:?(?:(?![Tt]he {0}).)*?boxed{{@}}"
# In this order; @ stands for a letter. A pattern's first group, or all of the match where that group is empty, holds
# the letter; where the group holds several, the first of the alphabet counts; where it holds none, the next rule does.
_RULES = (
    *(
        rf"答案{words}\s*@"
        for words in ("是?", r"是?\s*：", r"是?\s*:", "选项应?该?是", "选项应?该?为", "应该?是", "应该?选")
    ),
    r"答案选项为?\s*：\s*@",
    r"答案选项为?\s+\(?\*?\*?@",
    r"答案选项是?\s*:\s*@",
    *(rf"{words}\s*@" for words in ("答案为", "答案选", "选择?")),
    r"故选?\s*@只有选?项?\s?[@]\s?是?对",
    *(rf"只有选?项?\s?@\s?{words}" for words in ("是?错", "不?正确", "错误")),
    *(rf"说法{words}\s?@" for words in ("不?对选?项?的?是", "不?正确选?项?的?是", "错误选?项?的?是")),
    *(rf"@\s?{words}" for words in ("是正确的", "是正确答案")),
    r"选项\s?@\s?正确",
    r"所以答\s?@",
    *(rf"{words}\s?([@][.。$]?$)" for words in ("所以", "所有")),
    *(rf"{before}@[{after}]?$" for before, after in ((r"[\s，：:,]", r"。，,\."), (r"[\s，,：:][故即]", r"。\."))),
    *(rf"{before}@[。\.]?$" for before in (r"[\s，,：:]因此", r"[是为。]\s?", r"因此\s?", r"显然\s?")),
    *(words + _SENTENCE for words in ("答案是", "答案应该是", "答案为")),
    r"(?i:answer\s*:\s*)(?i:@)",
    _SAYS.format("answer is"),
    _SAYS.format("answer is").replace("@", r"\*?\*?@"),
    *(_SAYS.format(words) for words in ("answer is option", "correct answer is", "correct answer is option")),
    *(_BOXES.format(f"correct {words} is") for words in ("answer", "option", "answer option")),
    _SAYS.format("answer to the question is"),
    r"^选项\s?@",
    r"^@\s?选?项",
    r"^@[\s。，,：:\.$]",
    r"1.\s?(.*)",
    "@:",
    "@",
)


def first_option(response: str, options: str = LETTERS) -> str:
    """Return the letter that a response chooses, or `INVALID`.

    Answers in Chinese come first; then a letter that ends the response; one after "answer:", "the answer is" and its
    variants; one that begins the response; and then, less meaningfully, the first of the alphabet after a 1, the first
    before a colon, the first anywhere.

    Args:
        response: the answer.
        options: the letters of the options, in their order.
    """
    text = response.strip()
    for rule in _rules_for(options):
        found = rule(text)
        if letters := [letter for letter in options if letter in found]:
            return letters[0]
    return INVALID


Rule = Callable[[str], str]
"""Returns the part of a text that has the letter; "" where the rule does not hold."""


@functools.cache
def _rules_for(options: str) -> tuple[Rule, ...]:
    one = f"[{options}]"
    return tuple(
        functools.partial(_sentence_behind, rule.removesuffix(_SENTENCE))
        if rule.endswith(_SENTENCE)
        else functools.partial(_found, re.compile(rule.replace("[@]", one).replace("@", f"({one})"), re.DOTALL))
        for rule in _RULES
    )


def _found(pattern: re.Pattern[str], text: str) -> str:
    match = pattern.search(text)
    return "" if match is None else match[1] or match[0]


def _sentence_behind(words: str, text: str) -> str:
    r"""Return what `words\s?(\S+)(?:。|$)` finds.

    The pattern would read a run of characters without spaces once for each `words` in the run. Where the first `words`
    in a run fail, so do the others, except for those at the end of the run, which a space follows.
    """
    for match in re.finditer(rf"{words}\s?((?:(?!{words}\s)\S)+)", text):
        if match.end() == len(text):
            return match[1]
        if (stop := match[1].rfind("。")) > 0:
            return match[1][:stop]
    return ""
