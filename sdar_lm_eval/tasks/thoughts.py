"""The part of a response that the released evaluation scores: what a model writes beside its thoughts."""

from __future__ import annotations

import re

from sdar_lm_eval.thinking import END, START

_PAIRS = re.compile(f"{START}.*?{END}", re.DOTALL)


def without_thoughts(response: str) -> str:
    """Return a response without its thoughts and the white space around it.

    A model whose prompt opens the thought writes only its end: what follows the last end counts. Else each thought from
    its beginning to its end is left out. A thought that does not end stays: so an answer that was cut off while the
    model thought is scored whole. Source: `extract_non_reasoning_content` in opencompass/utils/text_postprocessors.py
    of JetAstra/SDAR at c2041a8.

    The models of this package cut thoughts themselves (`sdar_lm_eval/thinking.py`), and return no text for a thought
    that does not end. Their answers hold no thought, so they stay as they are.
    """
    until_last_end, last_end, rest = response.rpartition(END)
    if START in response:  # behind the last end, the pattern would search the whole rest for each beginning
        rest = _PAIRS.sub("", until_last_end + last_end) + rest
    return rest.strip()
