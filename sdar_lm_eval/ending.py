"""Where an answer ends (a stop token, a stop string, a loop, the limit of new tokens), and where the thought ends.

This module holds no tensor and does not import torch.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Protocol

from sdar_lm_eval.thinking import Decode, Loops, Repetition, Thinking
from sdar_lm_eval.tokens import BYTES

CLOSE = "close"
"""The reason that ends no answer: its thought has reached its limit, and is closed."""

CHUNK = 64  # tokens that are read at a time of a whole answer, so that no long text is decoded again and again


class Ends(Protocol):
    """The fields of a request that end an answer; `GenerationRequest` has them."""

    @property
    def max_new_tokens(self) -> int:
        """Most tokens of the answer."""

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end the answer."""

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """Texts that end the answer, outside of its thought."""

    @property
    def thinking(self) -> Thinking | None:
        """The rule that finds the answer's thought; None: the answer has no thought."""

    @property
    def repetition(self) -> Repetition | None:
        """The rule that ends an answer in a loop; None: no rule."""


class Ending:
    """Follows one answer, part by part, and finds its end. Parts of any size give the same end.

    Args:
        request: has what ends the answer.
        decode: token ids -> text.
        earlier: tokens of the answer before the first part; in these tokens the answer neither ends nor thinks.

    Attributes:
        thinks: whether the tokens so far end in a thought; None: the answer's beginning does not tell yet.
    """

    def __init__(self, request: Ends, decode: Decode, earlier: Sequence[int] = ()) -> None:
        self._request, self._decode = request, decode
        self._tokens = list(earlier)
        self._loops = None if request.repetition is None else Loops(request.repetition, self._tokens)
        self.thinks: bool | None = False
        if request.thinking is not None:
            self.thinks = True if request.thinking.opened else None
        self._blank = 0  # leading tokens that are white space
        self._opened = 0  # tokens up to and with the one by which the answer opened its thought
        # Stop strings are looked for in the tokens from `_begin` on, behind the text `_lead`: the last part of the
        # token that completes the think end. Behind a thought, the white space before the answer proper is passed over.
        self._begin, self._lead = 0, ""
        self._behind_thought = False
        self._bare = False

    def add(self, new: Sequence[int]) -> tuple[int, str]:
        """Take the answer's next tokens, which may go on after its end.

        Returns:
            (number of new tokens that belong to the answer, "stop", "repetition" or "length"); (len(new), "") where
            the answer does not end in them. The answer excludes a stop token, and includes the token that completes a
            stop string. (number, CLOSE): the thought reaches its limit after `number` new tokens. The think end's
            tokens (`Thinking.end_ids`), which this object has taken already, follow; the tokens of the next `add`
            follow those.
        """
        request, tokens, known = self._request, self._tokens, len(self._tokens)
        remaining = request.max_new_tokens - known
        count, reason = (remaining, "length") if remaining <= len(new) else (len(new), "")
        for index, token in enumerate(new[:count]):
            if token in request.stop_ids:
                count, reason = index, "stop"
                break
        tokens += new[:count]
        if (looped := self._loop(known)) is not None and (looped < len(tokens) or reason != "length"):
            del tokens[looped:]
            reason = "repetition"
        if self.thinks is None:
            self._read_beginning(known)
        if self.thinks:
            ended = self._end_of_thought(known)
            limit = self.thought_limit
            if limit is not None and len(tokens) >= limit and (ended is None or ended > limit):
                self._close(limit)
                return limit - known, CLOSE
            if ended is not None:
                self._end_thought(ended, self._lead)
        if self._bare:
            self._pass_over_blank()
        if not self.thinks and (stopped := self._stop_string(known, len(tokens))) is not None:
            del tokens[stopped:]
            reason = "stop"
        return len(tokens) - known, reason

    @property
    def bare(self) -> bool:
        """Whether the thought has ended, and nothing but white space follows it yet."""
        return self._bare

    @property
    def thought_limit(self) -> int | None:
        """Tokens after which the thought is closed; None where no token would have room behind the think end."""
        thinking = self._request.thinking
        if thinking is None or thinking.max_tokens is None:
            return None
        limit = max(thinking.max_tokens, self._opened)
        return limit if limit + len(thinking.end_ids) < self._request.max_new_tokens else None

    def _close(self, limit: int) -> None:
        assert self._request.thinking is not None
        self._tokens[limit:] = self._request.thinking.end_ids
        if self._request.repetition is not None:
            self._loops = Loops(self._request.repetition, self._tokens)
        self._end_thought(len(self._tokens), "")

    def _end_thought(self, begin: int, lead: str) -> None:
        self.thinks, self._behind_thought, self._bare = False, True, True
        self._begin, self._lead = begin, lead.lstrip()

    def _pass_over_blank(self) -> None:
        """Move `_begin` to the first token behind the thought that has more than white space."""

        def is_bare(length: int) -> bool:
            # A replacement character at the end may be the beginning of white space, of at most four tokens.
            text = self._lead + self._decode(self._tokens[self._begin : length])
            return not (text.rstrip("\ufffd") if length - self._begin <= BYTES else text).strip()

        def is_blank(length: int) -> bool:
            return not (self._lead + self._decode(self._tokens[self._begin : length])).strip()

        lengths = range(self._begin, len(self._tokens) + 1)
        self._bare = is_bare(len(self._tokens))
        first = bisect.bisect_left(lengths, True, key=lambda length: not is_bare(length))
        self._begin = next((length for length in reversed(lengths[:first]) if is_blank(length)), self._begin)

    def _loop(self, known: int) -> int | None:
        """The number of the first tokens that end in a loop, above `known`; None where none do."""
        loops, tokens = self._loops, self._tokens
        if loops is None:
            return None
        return next((length for length in range(known + 1, len(tokens) + 1) if loops.add(tokens[length - 1])), None)

    def _read_beginning(self, known: int) -> None:
        """Find out whether the answer opens a thought. A stop string that is complete before that ends the answer."""
        thinking, tokens = self._request.thinking, self._tokens
        assert thinking is not None

        def begins(length: int) -> bool | None:
            return thinking.begins(tokens[self._blank : length], self._decode)

        self.thinks = begins(len(tokens))
        if self.thinks is None and not self._decode(tokens[self._blank :]).strip():
            self._blank = len(tokens)
        if self.thinks:
            self._opened = next(length for length in range(self._blank + 1, len(tokens) + 1) if begins(length))
            self.thinks = self._stop_string(known, self._opened - 1) is None

    def _end_of_thought(self, known: int) -> int | None:
        """The number of tokens up to and with the one that completes the think end; None where none does.

        Args:
            known: tokens that are known not to complete it.
        """
        thinking, tokens = self._request.thinking, self._tokens
        assert thinking is not None
        if isinstance(end := thinking.end, int):
            return tokens.index(end, known) + 1 if end in tokens[known:] else None
        begin = max(known - len(end.encode(errors="surrogatepass")), 0)

        def ended(length: int) -> bool:
            return end in self._decode(tokens[begin:length])

        if not ended(len(tokens)):
            return None
        found = known + bisect.bisect_left(range(known, len(tokens)), True, key=ended)
        self._lead = self._decode(tokens[begin:found]).partition(end)[2]
        return found

    def _stop_string(self, known: int, end: int) -> int | None:
        """The number of tokens up to and with the one that completes a stop string; None where none does.

        Args:
            known: tokens that are known not to complete one.
            end: the tokens behind these are not looked at.
        """
        strings, tokens = self._request.stop_strings, self._tokens
        known = max(known, self._begin)
        if not strings or end < known:
            return None
        # A token with text has at least one byte, so a stop string of n bytes begins at most n tokens earlier.
        window = max(len(string.encode(errors="surrogatepass")) for string in strings)
        begin = max(known - window, self._begin)
        lead = self._lead if begin == self._begin else ""

        def stopped(length: int) -> bool:
            text = lead + self._decode(tokens[begin:length])
            text = text.lstrip() if self._behind_thought and begin == self._begin else text
            return any(string in text for string in strings)

        return known + bisect.bisect_left(range(known, end), True, key=stopped) if stopped(end) else None


def end_of_answer(tokens: Sequence[int], request: Ends, decode: Decode, earlier: Sequence[int] = ()) -> tuple[int, str]:
    """Find the end of an answer in new tokens; an engine may have generated tokens after the end.

    Args:
        tokens: new tokens, which may go on after the answer's end.
        request: has what ends the answer.
        decode: token ids -> text.
        earlier: as for `Ending`.

    Returns:
        What `Ending.add` returns of all tokens together.
    """
    ending = Ending(request, decode, earlier)
    if request.thinking is None:
        return ending.add(tokens)
    count = 0
    for begin in range(0, len(tokens), CHUNK):
        added, reason = ending.add(tokens[begin : begin + CHUNK])
        count += added
        if reason:
            return count, reason
    return count, ""
