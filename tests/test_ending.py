"""Where answers that think, or run in a loop, end: the same in parts of any size."""

from __future__ import annotations

import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sdar_lm_eval.decoding import DecodingConfig
from sdar_lm_eval.ending import CLOSE, Ending, end_of_answer
from sdar_lm_eval.engines.types import GenerationRequest
from sdar_lm_eval.thinking import Repetition, Thinking

PIECES = ["a", "b", " ", "\n", "<think>", "</think>", "<th", "ink>", "</", "think", ">", "> b", "</think>\n\n", "é"]
TOKEN = {piece: i for i, piece in enumerate(PIECES)}
STOP_TOKEN = len(PIECES)
THINKING = Thinking("</think>", (TOKEN["</think>"],), "<think>")
OPENED = Thinking("</think>", (TOKEN["</think>"],), "<think>", opened=True)
BY_TOKENS = Thinking(TOKEN["</think>"], (TOKEN["</think>"],), TOKEN["<think>"])


def decode(tokens):
    return "".join(PIECES[token] for token in tokens if token != STOP_TOKEN)


def ids(*pieces):
    return [TOKEN[piece] for piece in pieces]


def asked(thinking=None, stops=(), limit=1000, repetition=None):
    return GenerationRequest(
        (0,), limit, DecodingConfig(), frozenset({STOP_TOKEN}), tuple(stops), thinking=thinking, repetition=repetition
    )


def in_parts(tokens, request, sizes):
    """The answer's tokens, what is put in included, and why it ends; parts of the sizes, over and over."""
    ending, answer, at, turn = Ending(request, decode), [], 0, 0
    while at < len(tokens):
        part = tokens[at : at + sizes[turn % len(sizes)]]
        count, reason = ending.add(part)
        answer += part[:count]
        if reason == CLOSE:
            answer += request.thinking.end_ids
            at += count
        elif reason:
            return answer, reason
        else:
            assert count == len(part)
            at += count
        turn += 1
    return answer, ""


def by_definition(tokens, request):
    """The same, token by token, from the whole text each time."""
    thinking, rule = request.thinking, request.repetition
    answer, begin = [], 0
    thinks, opened = bool(thinking and thinking.opened), 0
    tells = thinking is not None and not thinks  # whether the beginning may still open a thought
    for token in tokens:
        if token == STOP_TOKEN:
            return answer, "stop"
        answer.append(token)
        text = decode(answer)
        if tells and text.lstrip().startswith("<think>"):
            thinks, tells, opened = True, False, len(answer)
        elif tells and not "<think>".startswith(text.lstrip()):
            tells = False
        if thinks and "</think>" in text:
            thinks, begin = False, text.index("</think>") + len("</think>")
        limit = max(thinking.max_tokens, opened) if thinks and thinking.max_tokens is not None else None
        if limit is not None and limit <= len(answer) and limit + len(thinking.end_ids) < request.max_new_tokens:
            answer += thinking.end_ids
            thinks, begin = False, len(decode(answer))
            continue
        behind = text[begin:].lstrip() if begin else text  # the white space behind a thought is no answer
        if not thinks and any(stop in behind for stop in request.stop_strings):
            return answer, "stop"
        if len(answer) >= request.max_new_tokens:
            return answer, "length"
        tail = answer[-rule.tokens * rule.times :] if rule else []
        periods = range(1, rule.tokens + 1) if rule and len(tail) == rule.tokens * rule.times else ()
        if any(all(a == b for a, b in zip(tail, tail[p:], strict=False)) for p in periods):
            return answer, "repetition"
    return answer, ""


@given(
    st.lists(st.integers(0, STOP_TOKEN), max_size=30),
    st.sampled_from([None, THINKING, OPENED]),
    st.integers(1, 12) | st.none(),
    st.lists(st.sampled_from(["a", "b", "\n", "> ", ">", "k", "\n\n", "ab"]), max_size=2),
    st.integers(1, 40),
    st.sampled_from([None, Repetition(1, 3), Repetition(2, 2), Repetition(3, 2)]),
    st.lists(st.integers(1, 7), min_size=1, max_size=4),
)
@example(ids("<th", "ink>", "a", "</think>", "b"), THINKING, None, ["a"], 9, None, [1])  # the start comes in parts
@example(ids("</think>", "\n", "\n", "\n", "a", "\n"), OPENED, None, ["\n"], 9, None, [1])  # the answer is "a"
@example(ids("</", "think", "> b", " ", "a", " ", " "), OPENED, None, ["ba"], 9, None, [1])  # apart
@example([0, 0, 0, STOP_TOKEN], None, None, [], 4, Repetition(1, 3), [1, 4])  # a loop, and a stop token behind it
def test_an_answer_ends_in_the_same_place_in_parts_of_any_size(tokens, thinking, most, stops, limit, repetition, sizes):
    if thinking is not None and most is not None:
        thinking = Thinking(thinking.end, thinking.end_ids, thinking.start, thinking.opened, most)
    request = asked(thinking, stops, limit, repetition)
    expected = by_definition(tokens, request)
    assert in_parts(tokens, request, sizes) == expected
    if expected[1] and CLOSE not in (found := end_of_answer(tokens, request, decode)):
        assert (tokens[: found[0]], found[1]) == expected


@pytest.mark.parametrize("size", [1, 2, 100])
def test_marks_may_be_tokens_that_decoding_leaves_out(size):
    def decode_without_marks(tokens):
        return decode([token for token in tokens if token not in (BY_TOKENS.start, BY_TOKENS.end)])

    tokens = ids(" ", "<think>", "a", "</think>", "\n", "b", "a", "b")
    ending, found = Ending(asked(BY_TOKENS, ["a", "\n"]), decode_without_marks), []
    while not (found and found[-1][1]):
        found.append(ending.add(tokens[sum(count for count, _ in found) :][:size]))
    assert sum(count for count, _ in found) == 7 and found[-1][1] == "stop"


def test_a_long_answer_that_nearly_loops_is_followed_in_time():
    """30,000 tokens, the longest period 1,000: each token takes as long as the one before."""
    ending = Ending(asked(limit=70_000, repetition=Repetition(1000, 30)), decode)
    loop = [0] * 999 + [1]
    started = time.perf_counter()
    for _ in range(29):
        assert ending.add(loop) == (1000, "")
    assert ending.add([2] + [0] * 999) == (1000, "")
    assert time.perf_counter() - started < 5
    for _ in range(28):
        assert ending.add([0] * 1000) == (1000, "")
    assert ending.add([0] * 1002) == (1001, "repetition")


def test_white_space_behind_a_thought_may_come_byte_by_byte():
    """An ideographic space, each byte a token, and a line break are no answer: the stop string comes later."""
    pieces = [b"</think>", *(bytes([byte]) for byte in "\u3000".encode()), b"\n", b"a"]
    request = asked(OPENED, ["\n"])
    ending = Ending(request, lambda tokens: b"".join(pieces[token] for token in tokens).decode(errors="replace"))
    assert [ending.add([token]) for token in (0, 1, 2, 3, 4, 5)] == [(1, "")] * 6
    assert ending.add([4]) == (1, "stop")
