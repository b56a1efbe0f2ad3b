"""Thoughts of a thinking model: which part of the generated text is the thought, and where the scored answer begins.

A thinking model writes a thought, the think end (`</think>`), and then the answer that is scored. The generated text
begins with a thought if the prompt ends in `<think>`, or if the text itself begins with `<think>`. The text before a
think end is always a thought, because some chat templates open a thought without `<think>`.

This module holds no tensor and does not import torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

START, END = "<think>", "</think>"
"""The marks of the Qwen family, which SDAR comes from."""

Decode = Callable[[Sequence[int]], str]
"""Token ids -> text, without special tokens."""


@dataclass(frozen=True)
class Thinking:
    """How the thought of an answer is found, and how long it may be.

    Attributes:
        end: the think end's text; or its token, where decoding leaves that token out.
        end_ids: the think end's tokens, which are inserted behind a thought that reached `max_tokens`.
        start: the text that opens a thought; or its token, where decoding leaves that token out; None where the
            think end names no start: then `opened` is true.
        opened: whether the prompt has opened the thought.
        max_tokens: tokens of the answer after which its thought is closed; None: no limit.
    """

    end: str | int
    end_ids: tuple[int, ...]
    start: str | int | None
    opened: bool = False
    max_tokens: int | None = None

    def begins(self, tokens: Sequence[int], decode: Decode) -> bool | None:
        """Return whether an answer's first tokens open a thought, behind white space; None: more tokens decide."""
        if isinstance(self.start, int):
            first = next((token for token in tokens if token == self.start or decode([token]).strip()), None)
            return None if first is None else first == self.start
        if self.start is None:
            return False
        text = decode(tokens).lstrip()
        if text.startswith(self.start):
            return True
        return None if self.start.startswith(text) else False


@dataclass(frozen=True)
class Thought:
    """The thought of an answer.

    Attributes:
        text: the text before the last think end; the whole answer where the thought has no end.
        ended: whether the thought has an end. An answer whose thought has none is no answer: its text is empty.
    """

    text: str
    ended: bool

    def as_record(self) -> dict[str, object]:
        """Return the fields of a stored answer and of a trace's line."""
        return {"thought": self.text, "thought_ended": self.ended}

    def as_dict(self) -> dict[str, object]:
        """Return the value of the samples file."""
        return {"text": self.text, "ended": self.ended}


@dataclass(frozen=True)
class Repetition:
    """The rule that ends an answer in a loop: its last `tokens * times` tokens repeat with a period of <= `tokens`.

    Attributes:
        tokens: the longest period.
        times: least number of times that a period of this length occurs.
    """

    tokens: int
    times: int

    @property
    def size(self) -> int:
        """Tokens that a loop has at least."""
        return self.tokens * self.times


class Loops:
    """Finds where a sequence ends in a loop, in time proportional to the longest period for each token.

    Args:
        rule: says what a loop is.
        earlier: tokens that were there before; they do not end in a loop.
    """

    def __init__(self, rule: Repetition, earlier: Sequence[int] = ()) -> None:
        import numpy as np  # here: only answers with this rule need it

        periods = np.arange(1, rule.tokens + 1)
        self._matches = rule.size - periods  # (N,) how many such tokens make a loop, see `_runs`
        self._runs = np.zeros_like(periods)  # (N,) how many of the last tokens equal those a period before them
        self._last = np.full_like(periods, -1)  # (N,) the last tokens, the newest first
        for token in earlier[-rule.size :]:
            self.add(token)

    def add(self, token: int) -> bool:
        """Take the next token; return whether the tokens now end in a loop."""
        self._runs += 1
        self._runs *= self._last == token
        self._last[1:] = self._last[:-1]
        self._last[0] = token
        return bool((self._runs >= self._matches).any())


def read(token_ids: Sequence[int], thinking: Thinking | None, decode: Decode) -> tuple[Thought | None, str]:
    """Read an answer's tokens: (its thought, or None; the text behind the thought).

    The text begins behind the last think end and the white space that follows it, as in lm_eval's own models
    (`postprocess_generated_text` in lm_eval/models/utils.py).
    """
    if thinking is None:
        return None, decode(token_ids)
    if isinstance(thinking.end, int):
        ids = list(token_ids)
        if thinking.end in ids:
            at = len(ids) - 1 - ids[::-1].index(thinking.end)
            return Thought(decode(ids[:at]), ended=True), decode(ids[at + 1 :]).lstrip()
    text = decode(token_ids)
    return read_text(text, thinking, begins=bool(thinking.begins(token_ids, decode)))


def read_text(text: str, thinking: Thinking, *, begins: bool | None = None) -> tuple[Thought | None, str]:
    """Read an answer's text, as `read` does.

    Args:
        text: the whole answer.
        thinking: the marks of a thought.
        begins: whether the answer opens a thought; None: as its text says.
    """
    if isinstance(thinking.end, str) and thinking.end in text:
        before, _, after = text.rpartition(thinking.end)
        return Thought(before, ended=True), after.lstrip()
    if begins is None:
        begins = isinstance(thinking.start, str) and text.lstrip().startswith(thinking.start)
    return (Thought(text, ended=False), "") if thinking.opened or begins else (None, text)


def is_open(begun: str, start: str, end: str) -> bool:
    """Return whether the given beginning of an answer ends within a thought."""
    return begun.rfind(start) > begun.rfind(end)
