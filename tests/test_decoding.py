from __future__ import annotations

import dataclasses
import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdar_lm_eval.checks import at_least_one, check_number
from sdar_lm_eval.decoding import DecodingConfig, in_words
from sdar_lm_eval.ending import end_of_answer
from sdar_lm_eval.engines.native.strategies import STRATEGIES
from sdar_lm_eval.engines.registry import make_engine
from sdar_lm_eval.engines.types import GenerationRequest
from sdar_lm_eval.errors import UserError
from sdar_lm_eval.files import shown
from sdar_lm_eval.settings import to_whole


def test_defaults_are_generate_pys():
    config = DecodingConfig()
    assert config.as_dict().items() >= {
        "block_length": 4, "denoising_steps": 4, "remasking_strategy": "low_confidence_dynamic",
        "confidence_threshold": 0.85, "eb_threshold": 0.35, "temperature": 1.0, "top_k": 0, "top_p": 1.0,
        "repetition_penalty": 1.0,
    }.items()  # fmt: skip


@pytest.mark.parametrize(
    ("length", "steps", "quotas"),
    [(4, 4, (1, 1, 1, 1)), (4, 3, (2, 1, 1)), (4, 1, (4,)), (10, 4, (3, 3, 2, 2)), (1, 1, (1,))],
)
def test_quotas(length, steps, quotas):
    assert DecodingConfig(block_length=length, denoising_steps=steps).quotas == quotas


@given(st.integers(1, 200), st.data())
def test_quotas_unmask_the_block_exactly(length, data):
    config = DecodingConfig(block_length=length, denoising_steps=data.draw(st.integers(1, length)))
    assert sum(config.quotas) == length
    assert len(config.quotas) == config.steps
    assert max(config.quotas) - min(config.quotas) <= 1
    assert min(config.quotas) >= 1


def test_steps_default_to_the_block_length():
    assert DecodingConfig(block_length=16).steps == 16


def test_numbers_of_another_type_become_the_setting_s():
    config = DecodingConfig(block_length=np.int64(8), top_k=5.0, temperature=1, top_p=np.float32(0.5))
    assert config == DecodingConfig(8, top_k=5, temperature=1.0, top_p=0.5)
    assert [type(value) for value in (config.block_length, config.top_k, config.temperature, config.top_p)] == [
        int, int, float, float,
    ]  # fmt: skip


@pytest.mark.parametrize("value", ["8", True, 2.5, math.inf, [8]])
def test_text_is_no_number_here(value):
    with pytest.raises(UserError, match=rf"block_length={re.escape(shown(value))} is not a whole number"):
        DecodingConfig(block_length=value)


def test_large_whole_numbers_keep_every_digit():
    assert check_number("seed", 2**53 + 1, whole=True) == to_whole("seed", f"{2**53 + 1}") == 2**53 + 1
    with pytest.raises(UserError, match="is not a number"):
        check_number("top_p", 10**400, whole=False)


def test_it_is_frozen_and_hashable():
    config = DecodingConfig()
    assert hash(config) == hash(DecodingConfig())
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.temperature = 0


@pytest.mark.parametrize(("settings", "greedy"), [({}, False), ({"temperature": 0}, True), ({"top_k": 1}, True)])
def test_greedy(settings, greedy):
    assert DecodingConfig(**settings).greedy is greedy


@pytest.mark.parametrize(
    ("settings", "idle"),
    [
        ({}, {"eb_threshold"}),
        ({"temperature": 0}, {"eb_threshold", "top_k", "top_p"}),
        ({"top_k": 1}, {"eb_threshold", "temperature", "top_p"}),
        ({"remasking_strategy": "entropy_bounded"}, {"confidence_threshold", "denoising_steps"}),
    ],
)
def test_settings_that_nothing_reads_are_idle(settings, idle):
    shared = {"eb_threshold", "confidence_threshold", "denoising_steps", "temperature", "top_k", "top_p"}
    assert DecodingConfig(**settings).idle & shared == idle  # a strategy of one's own may add a setting of its own


def test_settings_are_told_as_users_write_them():
    told = in_words({"temperature": 1.0, "top_p": 0.95, "steps": None, "name": "x", "until": ["é", {"a": True}]})
    assert told == 'temperature=1, top_p=0.95, steps=none, name=x, until=["é", {"a": true}]'


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("block_length", 0, "block_length=0 is out of range: it must be a whole number from 1 to 1024"),
        ("block_length", 4.5, "block_length=4.5 is not a whole number"),
        ("remasking_strategy", ["static", None], 'remasking_strategy=["static", null] is unknown'),
        ("block_length", True, "block_length=true is not a whole number"),
        (
            "denoising_steps",
            5,
            "denoising_steps=5 is out of range: it must be a whole number from 1 to block_length (4)",
        ),
        ("denoising_steps", 0, "denoising_steps=0"),
        ("confidence_threshold", 1.5, "confidence_threshold=1.5 is out of range: it must be a probability"),
        ("confidence_threshold", "high", "confidence_threshold='high' is not a number"),
        ("eb_threshold", -1, "eb_threshold=-1.0"),
        ("temperature", -0.1, "temperature=-0.1"),
        ("temperature", 1e-40, "0 (greedy), or from 0.0001 to 10,000"),
        ("repetition_penalty", 1e39, "from 0.01 to 100"),
        ("eb_threshold", 1e39, "from 0 to 1,000,000"),
        ("temperature", math.nan, "temperature=nan is not a number"),
        ("temperature", math.inf, "is not a number"),
        ("temperature", None, "temperature=null is not a number"),
        ("top_k", -1, "top_k=-1"),
        ("top_p", 0, "top_p=0.0 is out of range: it must be above 0"),
        ("top_p", 1.1, "top_p=1.1"),
        ("repetition_penalty", 0, "repetition_penalty=0.0"),
        ("remasking_strategy", "sequental", "Did you mean 'sequential'?"),
        ("remasking_strategy", 3, "choose one of entropy_bounded (or entropy), "),
    ],
)
def test_what_is_out_of_range_is_named(name, value, message):
    with pytest.raises(UserError) as error:
        DecodingConfig(**{name: value})
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_every_strategy_is_accepted():
    for strategy in STRATEGIES:
        assert DecodingConfig(remasking_strategy=strategy).remasking_strategy == strategy


def test_a_request_needs_a_prompt_and_room_for_an_answer():
    with pytest.raises(UserError, match="at least one prompt token"):
        GenerationRequest((), 4, DecodingConfig())
    with pytest.raises(UserError, match="max_new_tokens=0"):
        GenerationRequest((1,), 0, DecodingConfig())


def test_an_unknown_engine_is_named():
    with pytest.raises(UserError, match=r"engine 'vllm' is unknown; known: .*native"):
        make_engine("vllm", None)


def test_an_answer_may_end_in_the_middle_of_a_block_behind_others():
    """A stop string begins in earlier tokens; the limit counts them."""
    letters = "abcdefgh"

    def decode(tokens):
        return "".join(letters[token] for token in tokens)

    request = GenerationRequest((0,), 6, DecodingConfig(), frozenset({7}), stop_strings=("cde",))
    assert end_of_answer([4, 5], request, decode, earlier=[1, 2, 3]) == (1, "stop")
    assert end_of_answer([5, 5], request, decode, earlier=[1, 2, 3]) == (2, "")
    assert end_of_answer([5, 5, 5, 5], request, decode, earlier=[1, 2, 3]) == (3, "length")
    assert end_of_answer([5, 7, 4], request, decode, earlier=[1, 2, 3]) == (1, "stop")


@given(
    st.text("ab日本é😀\n", max_size=12),
    st.lists(st.text("ab日é😀\n", min_size=1, max_size=3), min_size=1, max_size=2),
    st.integers(1, 8),
    st.integers(1, 40),
    st.lists(st.integers(1, 4), min_size=40, max_size=40),
)
def test_an_answer_ends_in_the_same_place_in_blocks_and_as_a_whole(text, stops, block, limit, sizes):
    """Tokens of 1 to 4 bytes, which cut characters anywhere."""
    data, pieces = text.encode(), []
    for size in sizes:
        pieces.append(data[:size])
        data = data[size:]
    pieces = [piece for piece in pieces if piece] or [b"a"]
    request = GenerationRequest((0,), limit, DecodingConfig(), stop_strings=tuple(stops))

    def decode(tokens):
        return b"".join(pieces[token] for token in tokens).decode(errors="replace")

    tokens = list(range(len(pieces)))
    ends = [n for n in range(1, min(limit, len(tokens)) + 1) if any(stop in decode(tokens[:n]) for stop in stops)]
    expected = (ends[0], "stop") if ends else (limit, "length") if limit <= len(tokens) else (len(tokens), "")
    assert end_of_answer(tokens, request, decode) == expected
    for begin in range(0, len(tokens), block):
        count, reason = end_of_answer(tokens[begin : begin + block], request, decode, tokens[:begin])
        if reason or begin + block >= len(tokens):
            assert (begin + count, reason) == expected
            break


@pytest.mark.parametrize(
    ("value", "reason"), [(0, "n=0 is out of range: it must be 1 or more"), ("x", "'x' is not a whole")]
)
def test_at_least_one(value, reason):
    assert at_least_one("n", 3) == 3
    with pytest.raises(UserError, match=reason):
        at_least_one("n", value)
