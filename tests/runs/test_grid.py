"""Texts become values, values combinations, and copies one run."""

from __future__ import annotations

import itertools
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdar_lm_eval.decoding import DECODING_SETTINGS, DecodingConfig
from sdar_lm_eval.engines.native.strategies import STRATEGIES
from sdar_lm_eval.errors import UserError
from sdar_lm_eval.runs.grid import combinations, values_of, without_copies


@pytest.mark.parametrize(
    ("setting", "text", "values"),
    [
        ("confidence_threshold", "0.5:0.99", [0.5, 0.6, 0.7, 0.8, 0.9, 0.99]),
        ("confidence_threshold", "0.7:1", [0.7, 0.8, 0.9, 1.0]),
        ("confidence_threshold", "0.9:0.95:0.01", [0.9, 0.91, 0.92, 0.93, 0.94, 0.95]),
        ("confidence_threshold", "0.5, 0.8:0.9,0.85,0.5", [0.5, 0.8, 0.9, 0.85]),
        ("temperature", "0:1:0.5", [0.0, 0.5, 1.0]),
        ("eb_threshold", "1e-1:0.3", [0.1, 0.2, 0.3]),
        ("denoising_steps", "1:4", [1, 2, 3, 4]),
        ("denoising_steps", "1:8:3", [1, 4, 7, 8]),
        ("block_length", "4", [4]),
        ("top_k", "0,50", [0, 50]),
        ("top_p", "0.9:0.9", [0.9]),
        ("repetition_penalty", "1.0:1.2", [1.0, 1.1, 1.2]),
        ("remasking_strategy", "static,dynamic,entropy,low_confidence_static,random",
         ["low_confidence_static", "low_confidence_dynamic", "entropy_bounded", "random"]),
    ],
)  # fmt: skip
def test_values(setting: str, text: str, values: list[Any]) -> None:
    found = values_of(setting, text)
    assert found == values and [type(value) for value in found] == [type(value) for value in values]


@pytest.mark.parametrize(
    ("setting", "text", "message"),
    [
        ("confidence_threshold", "0.5,,0.6", "--x '0.5,,0.6' has an empty value"),
        ("confidence_threshold", "high", "--x='high' is not a number"),
        ("confidence_threshold", "0.5:", "--x '0.5:' is no range. Write FROM:TO or FROM:TO:STEP, such as 0.5:0.9:0.05"),
        ("confidence_threshold", "0.1:0.2:0.3:0.4", "is no range"),
        ("confidence_threshold", "nan:1", "is no range"),
        ("confidence_threshold", "0.9:0.5", "from the smaller value to the larger one by a positive step"),
        ("confidence_threshold", "0.5:0.9:0", "by a positive step"),
        ("confidence_threshold", "0:1:1e-9", "has 1,000,000,001 values, more than 10,000. Give a larger step"),
        ("denoising_steps", "1:4:0.5", "the ends and the step of this range must be whole numbers"),
        ("denoising_steps", "2.5", "--x=2.5 is not a whole number"),
        ("treshold", "1", "'treshold' is no decoding setting. Did you mean 'threshold'"),
    ],
)
def test_mistakes(setting: str, text: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        values_of(setting, text, "--x")
    assert message in str(error.value)


@given(st.integers(0, 1000), st.integers(0, 300), st.integers(1, 100))
def test_a_range_has_both_ends_and_equal_steps(begin: int, width: int, step: int) -> None:
    first, last, by = (Decimal(number) / 100 for number in (begin, begin + width, step))
    values = values_of("eb_threshold", f"{first}:{last}:{by}")
    assert values[0] == float(first) and values[-1] == float(last)
    assert values == sorted(set(values))
    exact = [Decimal(str(value)) for value in values]  # each is the float nearest to its decimal
    assert all(after - before == by for before, after in itertools.pairwise(exact[:-1]))
    assert len(exact) == 1 or 0 < exact[-1] - exact[-2] <= by


def test_all_combinations_the_last_setting_fastest() -> None:
    assert combinations({"strategy": "static,random", "steps": "4,2"}) == [
        {"remasking_strategy": "low_confidence_static", "denoising_steps": 4},
        {"remasking_strategy": "low_confidence_static", "denoising_steps": 2},
        {"remasking_strategy": "random", "denoising_steps": 4},
        {"remasking_strategy": "random", "denoising_steps": 2},
    ]
    assert combinations({"block": "4", "threshold": "0.5"}) == [{"block_length": 4, "confidence_threshold": 0.5}]
    with pytest.raises(UserError, match=r"The grid has 1,000,000 combinations, more than 10,000\. Give fewer values"):
        combinations({"top_k": "1:1000", "block_length": "1:1000"})


SETTINGS = st.builds(
    DecodingConfig,
    block_length=st.just(4),
    denoising_steps=st.integers(1, 4),
    remasking_strategy=st.sampled_from(list(STRATEGIES)),
    confidence_threshold=st.sampled_from([0.5, 0.85]),
    eb_threshold=st.sampled_from([0.1, 0.35]),
    temperature=st.sampled_from([0.0, 1.0]),
    top_k=st.sampled_from([0, 1, 5]),
    top_p=st.sampled_from([0.9, 1.0]),
)


@given(SETTINGS, SETTINGS)
def test_copies_differ_in_idle_settings_alone(one: DecodingConfig, other: DecodingConfig) -> None:
    """What is idle follows from who reads it, and which of two settings' settings differ."""
    assert one.effective.keys() | one.idle >= set(DECODING_SETTINGS) and not one.effective.keys() & one.idle
    strategy = STRATEGIES[one.remasking_strategy]
    assert (strategy.setting in one.effective) == (strategy.setting is not None)
    assert ("denoising_steps" in one.idle) == (one.remasking_strategy == "entropy_bounded")
    differing = {name for name in DECODING_SETTINGS if getattr(one, name) != getattr(other, name)}
    kept = without_copies([one, other], key=lambda each: tuple(each.effective.items()))
    assert (len(kept) == 1) == (differing <= one.idle and one.idle == other.idle)
    assert kept[0] is one


def test_idle_settings_change_no_answer() -> None:
    """By the engine itself: the answers of copies are the same tokens, those of others are not."""
    from sdar_lm_eval.checkpoint import Checkpoint
    from sdar_lm_eval.engines.registry import make_engine
    from sdar_lm_eval.engines.types import GenerationRequest

    checkpoint = Checkpoint.open("demo")
    prompt = tuple(checkpoint.tokenizer.encode("Tom has 3 apples and buys 4 more. How many apples does Tom have?"))
    base: dict[str, Any] = {"temperature": 0.0}
    varied: dict[str, Any] = {
        "confidence_threshold": 0.1, "eb_threshold": 50.0, "denoising_steps": 1, "top_k": 3, "top_p": 0.2
    }  # fmt: skip
    pairs = []  # two choices of settings, and whether they are copies
    for name in STRATEGIES:
        one = {**base, "remasking_strategy": name}
        pairs += [(one, {**one, idle: varied[idle]}, True) for idle in DecodingConfig(**one).idle]
        own = STRATEGIES[name].setting
        pairs += [] if own is None else [(one, {**one, own: varied[own]}, False)]
    pairs.append(({"temperature": 1.0, "top_k": 1}, {"temperature": 0.3, "top_k": 1, "top_p": 0.5}, True))
    requests = [
        GenerationRequest(prompt, 24, DecodingConfig(block_length=4, **settings), seed=5)
        for one, other, _ in pairs
        for settings in (one, other)
    ]
    with make_engine("native", checkpoint, device="cpu", dtype="float32", max_active=len(requests)) as engine:
        found = dict(engine.generate(requests))
    written = [(found[i].token_ids, found[i].denoising_forwards) for i in range(len(requests))]
    assert [written[2 * i] == written[2 * i + 1] for i in range(len(pairs))] == [same for _, _, same in pairs]
