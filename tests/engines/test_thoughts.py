"""Thoughts on every kind of engine: they do not stop, their limit closes them, and the answer goes on behind them."""

from __future__ import annotations

import dataclasses

import pytest
from asking import ask, run
from thinking_checkpoint import END, FIVE, NEW_LINE, RE, SEVEN, START, STOP, A, C, E, X, Y, thinking_checkpoint

from sdar_lm_eval import Checkpoint, DecodingConfig, GenerationRequest
from sdar_lm_eval.demo import prompts as demo_prompts
from sdar_lm_eval.engines.adapters.requests import IN_THOUGHT, Parts
from sdar_lm_eval.engines.types import GenerationResult
from sdar_lm_eval.errors import UserError
from sdar_lm_eval.thinking import Repetition, Thinking

THINKING = Thinking("</think>", (END,), "<think>")
OPENED = dataclasses.replace(THINKING, opened=True)
STATIC = DecodingConfig(temperature=0, remasking_strategy="low_confidence_static")
WRITTEN = (START, A, E, FIVE, C, END, SEVEN, RE)  # the whole greedy answer


@pytest.fixture(scope="module")
def thinker(tmp_path_factory):
    return Checkpoint.open(str(thinking_checkpoint(tmp_path_factory.mktemp("thinker"))))


def asked(prompt, **settings):
    settings = {"max_new_tokens": 24, "stop_ids": frozenset({STOP}), "thinking": THINKING, **settings}
    return GenerationRequest(tuple(prompt), decoding=settings.pop("decoding", STATIC), **settings)


def answers(engine, requests):
    return [(result.token_ids, result.finish_reason) for result in run(engine, requests)]


PROMPTS = [[5] * length for length in (3, 4, 5, 6)]  # each place in a block


def test_stop_strings_do_not_stop_within_a_thought(open_engine, thinker):
    """One token ("e") that an engine may be told of, and a text of several ("5C"); both also behind the thought."""
    engine = open_engine(thinker)
    requests = [asked(prompt, stop_strings=("e", "5C")) for prompt in PROMPTS]
    opened = [asked([*prompt, START], stop_strings=("e",), thinking=OPENED) for prompt in PROMPTS]
    assert answers(engine, requests) == [(WRITTEN, "stop")] * 4
    assert answers(engine, opened) == [(WRITTEN[1:], "stop")] * 4
    assert answers(engine, [asked([5] * 4, stop_strings=("7",))]) == [(WRITTEN[:-1], "stop")]
    without = asked([5] * 4, stop_strings=("e",), thinking=None)
    assert answers(engine, [without]) == [((START, A, E), "stop")]


@pytest.mark.parametrize("stops", [("\n",), ("\n", "re")])
def test_white_space_behind_a_thought_completes_no_stop_string(open_engine, tmp_path, stops):
    """Chat models write `</think>\n\n` before each answer; many tasks stop at a line break. Also behind a limit."""
    engine = open_engine(Checkpoint.open(str(thinking_checkpoint(tmp_path / "blank", blank=True))))
    written = (START, A, E, FIVE, C, END, NEW_LINE, SEVEN, RE)
    requests = [asked(prompt, stop_strings=stops) for prompt in PROMPTS]
    opened = [asked([*prompt, START], stop_strings=stops, thinking=OPENED) for prompt in PROMPTS]
    assert answers(engine, requests) == [(written, "stop")] * 4
    assert answers(engine, opened) == [(written[1:], "stop")] * 4
    limited = dataclasses.replace(THINKING, max_tokens=3)
    requests = [asked(prompt, stop_strings=stops, thinking=limited) for prompt in PROMPTS]
    assert answers(engine, requests) == [((START, A, E, END, NEW_LINE, SEVEN, RE), "stop")] * 4


@pytest.mark.parametrize("most", [1, 2, 3, 4])
def test_a_thought_is_closed_at_its_limit(open_engine, thinker, most):
    """At each place of a block; the answer goes on behind the think end, and its stop strings count."""
    engine = open_engine(thinker)
    limited, opened = dataclasses.replace(THINKING, max_tokens=most), dataclasses.replace(OPENED, max_tokens=most)
    requests = [asked(prompt, thinking=limited) for prompt in PROMPTS]
    results = run(engine, requests)
    expected = (*WRITTEN[:most], END, SEVEN, RE)
    assert [(result.token_ids, result.finish_reason) for result in results] == [(expected, "stop")] * 4
    assert [result.forced_tokens for result in results] == [1] * 4
    results = run(engine, [asked([*prompt, START], thinking=opened, stop_strings=("7", "e")) for prompt in PROMPTS])
    assert [(r.token_ids, r.finish_reason) for r in results] == [((*WRITTEN[1 : most + 1], END, SEVEN), "stop")] * 4


def test_a_thought_below_its_limit_ends_by_itself(open_engine, thinker):
    engine = open_engine(thinker)
    requests = [asked(prompt, thinking=dataclasses.replace(THINKING, max_tokens=6)) for prompt in PROMPTS]
    requests += [asked([*prompt, START], thinking=dataclasses.replace(OPENED, max_tokens=5)) for prompt in PROMPTS]
    results = run(engine, requests)
    assert [r.token_ids for r in results] == [WRITTEN] * 4 + [WRITTEN[1:]] * 4
    assert not any(r.forced_tokens for r in results)


@pytest.mark.slow
def test_a_limit_that_no_thought_reaches_changes_no_answer(open_engine, demo):
    """Wherever the limit lies in a block. The think end is a token that the demo writes once in its answer so far."""
    engine = open_engine(demo)
    plain = ask(demo, demo_prompts(demo), count=3, max_new_tokens=20)
    requests, expected = [], []
    for request, result in zip(plain, run(engine, plain), strict=True):
        tokens = result.token_ids
        for place in [place for place in (5, 9, 14) if tokens[place] not in tokens[:place]]:
            for most in range(place + 1, place + 5):
                thinking = Thinking(tokens[place], (tokens[place],), None, opened=True, max_tokens=most)
                requests.append(dataclasses.replace(request, thinking=thinking))
                expected.append((tokens, result.finish_reason, 0))
    results = run(engine, requests)
    assert [(r.token_ids, r.finish_reason, r.forced_tokens) for r in results] == expected


def test_the_limit_of_new_tokens_counts_the_think_end(open_engine, thinker):
    """A limit of the thought that leaves no room for an answer is none."""
    engine = open_engine(thinker)
    limited = dataclasses.replace(THINKING, max_tokens=3)
    requests = [asked([5] * 4, thinking=limited, max_new_tokens=length) for length in (3, 4, 5, 6)]
    assert answers(engine, requests) == [
        (WRITTEN[:3], "length"),
        (WRITTEN[:4], "length"),
        ((*WRITTEN[:3], END, SEVEN), "length"),
        ((*WRITTEN[:3], END, SEVEN, RE), "length"),
    ]


def test_a_think_end_of_several_tokens_reaches_into_the_next_block(open_engine, thinker):
    engine = open_engine(thinker)
    ends = (9, 9, 9, 9, 9, END)
    requests = [asked(prompt, thinking=dataclasses.replace(THINKING, end_ids=ends, max_tokens=2)) for prompt in PROMPTS]
    results = run(engine, requests)
    assert [r.token_ids for r in results] == [(START, A, *ends, SEVEN, RE)] * 4
    assert [r.forced_tokens for r in results] == [6] * 4


def test_a_stop_token_ends_an_answer_within_its_thought(open_engine, thinker):
    engine = open_engine(thinker)
    limited = dataclasses.replace(THINKING, max_tokens=4)
    assert answers(engine, [asked([5] * 4, stop_ids=frozenset({FIVE}), thinking=limited)]) == [(WRITTEN[:3], "stop")]


def test_a_loop_ends_an_answer(open_engine, thinker):
    """The thought runs into x y x y …; JetEngine returns whole answers only."""
    engine = open_engine(thinker)
    in_loop = [asked([*prompt, X], thinking=None, repetition=Repetition(2, 3)) for prompt in PROMPTS]
    if engine.info.engine == "jetengine":
        with pytest.raises(UserError, match="stop_repetition: JetEngine returns only whole answers"):
            run(engine, in_loop)
        return
    assert answers(engine, in_loop) == [((Y, X, Y, X, Y, X), "repetition")] * 4
    longer = [asked([*prompt, X], thinking=OPENED, repetition=Repetition(3, 3)) for prompt in PROMPTS]
    assert [len(tokens) for tokens, _ in answers(engine, longer)] == [9] * 4
    other = asked([5] * 4, repetition=Repetition(3, 2))
    assert answers(engine, [other, in_loop[0]]) == [(WRITTEN, "stop"), ((Y, X, Y, X, Y, X), "repetition")]


class TestParts:
    """Of what an adapter's engine returns, a part at a time."""

    def parts(self, thinker, **settings):
        return Parts(asked([5, 5], **settings), thinker)

    def test_an_engine_that_stopped_within_the_thought_goes_on(self, thinker):
        parts = self.parts(thinker, stop_strings=("e",))
        assert parts.add(GenerationResult((START, A, E), IN_THOUGHT, 1, 3, 1, 0.5)) is None
        assert parts.next.prompt_ids == (5, 5, START, A, E)
        assert parts.next.max_new_tokens == 21
        assert parts.next.thinking == OPENED
        whole = parts.add(GenerationResult((FIVE, C, END, SEVEN, RE, A), "length", 1, 5, 2, 0.25))
        assert whole == GenerationResult(WRITTEN, "stop", 2, 8, 3, 0.75)

    def test_a_stop_string_across_parts(self, thinker):
        parts = self.parts(thinker, stop_strings=("7re",), thinking=dataclasses.replace(OPENED, max_tokens=3))
        assert parts.next.max_new_tokens == 6  # up to the end of a block, behind two tokens of the prompt
        assert parts.add(GenerationResult((A, E, FIVE, C, END, SEVEN), "length", 1, 3, 1, 0.5)) is None
        assert parts.next.prompt_ids == (5, 5, A, E, FIVE, END)
        assert parts.next.thinking is None
        parts = self.parts(thinker, stop_strings=("7re",), thinking=dataclasses.replace(OPENED, max_tokens=3))
        assert parts.add(GenerationResult((END, SEVEN), "length", 1, 3, 1, 0.5)) is None
        assert parts.next.thinking is None
        whole = parts.add(GenerationResult((RE, RE), "length", 1, 5, 2, 0.25))
        assert (whole.token_ids, whole.finish_reason) == ((END, SEVEN, RE), "stop")

    def test_parts_are_drawn_independently(self, thinker):
        parts = self.parts(thinker, stop_strings=("e",), seed=7)
        assert parts.next.seed == 7
        parts.add(GenerationResult((START, A, E), IN_THOUGHT, 1, 3, 1, 0.5))
        assert parts.next.seed not in (7, 0)
