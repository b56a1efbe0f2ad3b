"""Forecasts compared with `BatchState`, which is stepped with random tokens."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from sdar_lm_eval import DecodingConfig, GenerationRequest
from sdar_lm_eval.engines.native import forecast
from sdar_lm_eval.engines.native.batch import BatchState, StepOutcome, unpack
from sdar_lm_eval.engines.native.forecast import Forecast
from sdar_lm_eval.engines.native.scheduler import SequenceState
from sdar_lm_eval.engines.native.strategies import STRATEGIES
from sdar_lm_eval.engines.native.transition import Drawn

SLOTS, BLOCK = 12, 8
MASK = 99


def sequences(rng, strategy, *, whole_blocks=False):
    """Sequences of random lengths. With `whole_blocks`, every answer's length limit is the end of a block."""
    made = []
    for slot in range(SLOTS):
        length = rng.choice([1, 4, 8])
        decoding = DecodingConfig(
            block_length=length, denoising_steps=rng.randint(1, length), remasking_strategy=strategy,
            confidence_threshold=0.5,
        )  # fmt: skip
        prompt = tuple(range(rng.randint(1, 20)))
        new = rng.randint(1, 40)
        new += -(len(prompt) + new) % length if whole_blocks else 0
        made.append(SequenceState(slot, GenerationRequest(prompt, new, decoding), list(prompt), slot=slot))
    return made


class Device:
    """The state of a batch; random tokens take the place of a model.

    Args:
        confidence: takes the number of draws, and returns the confidence of each drawn token.
    """

    def __init__(self, confidence=torch.rand):
        self.confidence = confidence
        self.state = BatchState(
            SLOTS, BLOCK, 0, 100, MASK, strategies=frozenset(STRATEGIES), penalized=False, device=torch.device("cpu")
        )

    def needs(self):
        blocks = self.state.blocks
        segments = int((blocks.active * (1 + blocks.uncommitted.long())).sum())
        return segments, int((blocks.masked & blocks.active[:, None]).sum())

    def step(self, segments, draws):
        self.state.segments(segments)
        self.state.masked_positions(draws)
        self.state.advance(Drawn(torch.arange(draws) % 50, self.confidence(draws), torch.rand(draws)))
        return unpack(self.state.packed.numpy().copy(), SLOTS, BLOCK)


def run_ahead(device, known, entering):
    """Run all sequences. Each step but the first two is launched before the forecast learns the step before.

    Returns:
        For each step that was launched with another one in flight: its sizes, and what the device needed.
    """
    device.state.begin(entering)
    known.begin(entering)
    steps, outcomes = [], []
    while (sizes := known.sizes())[0] or outcomes:
        if sizes[0]:
            if outcomes:
                steps.append((sizes, device.needs()))
            known.launched(*sizes)
            outcomes.append(device.step(*sizes))
        if len(outcomes) == 2 or not sizes[0] or not steps:
            known.learn(outcomes.pop(0))
            steps = steps or [(device.needs(), device.needs())]
    assert not device.state.blocks.active.any()
    return steps[1:]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("seed", range(3))
def test_without_a_step_in_flight_sizes_are_exact(strategy, seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    device, known = Device(), Forecast(SLOTS, BLOCK)
    entering = sequences(rng, strategy)
    for _ in range(200):
        if entering and rng.random() < 0.5:
            sequence = entering.pop()
            device.state.begin([sequence])
            known.begin([sequence])
        assert known.sizes() == device.needs()
        if known.sizes()[0]:
            sizes = known.sizes()
            known.launched(*sizes)
            known.learn(device.step(*sizes))
    assert not entering
    assert known.sizes() == (0, 0)


def at_least(needed):
    """The sizes of a step launched ahead: what is needed, but room for at least one slot."""
    return max(needed[0], 2), max(needed[1], BLOCK)


@pytest.mark.parametrize("strategy", ["low_confidence_static", "sequential", "random"])
def test_steps_that_follow_a_schedule_are_predicted(strategy, monkeypatch):
    monkeypatch.setattr(forecast, "FREE_ROWS", 0)
    steps = run_ahead(Device(), Forecast(SLOTS, BLOCK), sequences(random.Random(1), strategy, whole_blocks=True))
    assert len(steps) > 20
    assert [sizes for sizes, _ in steps] == [at_least(needed) for _, needed in steps]


@pytest.mark.parametrize("whole_blocks", [True, False], ids=["whole blocks", "any limit"])
def test_a_block_a_step_is_predicted_after_one_step(whole_blocks, monkeypatch):
    """The schedule has many steps a block, but the confidence of each token is above the threshold."""
    monkeypatch.setattr(forecast, "FREE_ROWS", 0)
    entering = sequences(random.Random(2), "low_confidence_dynamic", whole_blocks=whole_blocks)
    steps = run_ahead(Device(torch.ones), Forecast(SLOTS, BLOCK), entering)
    assert len(steps) > 10
    assert [sizes for sizes, _ in steps] == [at_least(needed) for _, needed in steps]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_sizes_are_right_on_average(strategy, monkeypatch):
    """Blocks are decided at random steps. `CAUTION` makes sizes a little low."""
    monkeypatch.setattr(forecast, "FREE_ROWS", 0)
    torch.manual_seed(0)
    steps = []
    for seed in range(4):
        steps += run_ahead(Device(), Forecast(SLOTS, BLOCK), sequences(random.Random(seed), strategy))
    sizes, needed = np.array([(sizes, at_least(needed)) for sizes, needed in steps]).sum(0)
    assert ((0.85 * needed < sizes) & (sizes < 1.1 * needed)).all()


def test_a_block_waits_for_a_few_steps_at_most(monkeypatch):
    """Six answers of one step each make the forecast expect that the last blocks of four others end at once.

    So the forecasts stay too low, and slot 10, the last one, waits.
    """
    monkeypatch.setattr(forecast, "FREE_ROWS", 0)
    device, known, prompt = Device(torch.ones), Forecast(SLOTS, BLOCK), tuple(range(BLOCK))
    one_step = DecodingConfig(2, remasking_strategy="low_confidence_dynamic")
    schedule = DecodingConfig(BLOCK, BLOCK, "sequential")

    def enter(slots):
        settings = [(one_step, 2) if slot < 6 else (schedule, BLOCK if slot < 10 else 800) for slot in slots]
        requests = [GenerationRequest(prompt, new, decoding) for decoding, new in settings]
        entering = [SequenceState(n, r, list(prompt), slot=n) for n, r in zip(slots, requests, strict=True)]
        device.state.begin(entering)
        known.begin(entering)

    enter(range(11))
    outcomes, waited, longest = [], 0, 0
    for step in range(400):
        sizes = known.sizes()
        if sizes[0]:
            known.launched(*sizes)
            outcomes.append(device.step(*sizes))
            waited = 0 if outcomes[-1].took_part[10] else waited + 1
            longest = max(longest, waited)
        if step == 0 or len(outcomes) == 2 or not sizes[0]:
            known.learn(done := outcomes.pop(0))
            if ended := (done.decided & ~done.goes_on).nonzero()[0].tolist():
                enter(ended)
    assert 0 < longest <= forecast.PATIENCE + 1


def one_slot(*, new_tokens):
    request = GenerationRequest((1, 2, 3), new_tokens, DecodingConfig(block_length=4))
    return [SequenceState(0, request, [1, 2, 3], slot=0)]


def outcome(*, decided, goes_on, masked):
    """The outcome of a step that the only slot took part in."""
    flags = (np.array([flag]) for flag in (True, False, decided, False, goes_on))
    return StepOutcome(None, None, None, *flags, np.array([masked]))


def test_a_slot_that_did_not_fit_has_not_advanced(monkeypatch):
    monkeypatch.setattr(forecast, "FREE_ROWS", 0)
    known = Forecast(4, 4)
    request = GenerationRequest((1, 2, 3, 4), 8, DecodingConfig(block_length=4, remasking_strategy="sequential"))
    known.begin([SequenceState(i, request, [1, 2, 3, 4], slot=i) for i in range(4)])
    known.launched(3, 11)  # room for two: the third's four masked positions are one too many
    assert known.sizes() == (4, 2 * 3 + 2 * 4)


def test_no_step_is_launched_where_every_answer_is_expected_to_end():
    known = Forecast(1, 4)
    known.begin(one_slot(new_tokens=1))
    assert known.sizes() == (1, 1)
    known.launched(1, 1)
    assert known.sizes() == (0, 0)
    known.learn(outcome(decided=True, goes_on=False, masked=0))
    assert known.sizes() == (0, 0)


def test_an_outcome_of_a_slots_former_sequence_is_ignored():
    known = Forecast(1, 4)
    known.begin(one_slot(new_tokens=40))
    known.launched(1, 1)
    known.stop([0])
    known.begin(one_slot(new_tokens=40))
    known.learn(outcome(decided=False, goes_on=False, masked=0))
    assert known.sizes() == (1, 1)
