"""Forecasts beside what the device does: the state of the batch, stepped with any tokens."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from sdar_lm_eval import DecodingConfig, GenerationRequest
from sdar_lm_eval.engines.native import forecast
from sdar_lm_eval.engines.native.batch import BatchState, Outcome
from sdar_lm_eval.engines.native.forecast import Forecast
from sdar_lm_eval.engines.native.scheduler import SequenceState
from sdar_lm_eval.engines.native.strategies import STRATEGIES

SLOTS, BLOCK = 12, 8
MASK = 99


def sequences(rng, strategy, *, whole_blocks=False):
    """Some in need of few tokens, some of many; with whole blocks, no answer ends in the middle of one."""
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
    """The state of a batch, with random tokens for a model."""

    def __init__(self):
        self.state = BatchState(
            SLOTS, BLOCK, 0, 100, MASK, strategies=frozenset(STRATEGIES), penalized=False, device=torch.device("cpu")
        )

    def needs(self):
        state = self.state
        segments = int((state.active * (1 + state.uncommitted.long())).sum())
        return segments, int((state.masked & state.active[:, None]).sum())

    def step(self, segments, places):
        self.state.segments(segments)
        self.state.masked_positions(places)
        self.state.advance(torch.arange(places) % 50, torch.rand(places), torch.rand(places))
        return self.state.unpack(self.state.packed)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("seed", range(3))
def test_with_nothing_under_way_it_is_what_the_step_needs(strategy, seed):
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
            known.launched()
            known.learn(device.step(*sizes))
    assert not entering
    assert known.sizes() == (0, 0)


@pytest.mark.parametrize("strategy", ["low_confidence_static", "sequential", "random"])
@pytest.mark.parametrize("whole_blocks", [True, False], ids=["whole blocks", "any limit"])
def test_what_follows_a_schedule_is_foreseen(strategy, whole_blocks, monkeypatch):
    """With a step under way: the one after it has room for exactly what it needs, or more where an answer's limit is in
    the middle of a block, which may be reached before the block is decided."""
    monkeypatch.setattr(forecast, "FREE_ROWS", 0)
    device, known = Device(), Forecast(SLOTS, BLOCK)
    entering = sequences(random.Random(1), strategy, whole_blocks=whole_blocks)
    device.state.begin(entering)
    known.begin(entering)
    outcomes, expected = [], []
    while (sizes := known.sizes())[0] or outcomes:
        if sizes[0]:
            expected.append(sizes)
            needed = device.needs()
            if outcomes:
                needed = (max(needed[0], 2), max(needed[1], BLOCK))
            if whole_blocks:
                assert sizes == needed
            else:
                assert sizes[0] >= needed[0] and sizes[1] >= needed[1]
            known.launched()
            outcomes.append(device.step(*sizes))
        if len(outcomes) == 2 or not sizes[0]:
            known.learn(outcomes.pop(0))
    assert len(expected) > 20
    assert not device.state.active.any()


def test_what_was_not_foreseen_is_made_room_for_later(monkeypatch):
    """All is above the threshold, where a token a step was expected."""
    monkeypatch.setattr(forecast, "FREE_ROWS", 0)
    known = Forecast(4, 4)
    decoding = DecodingConfig(block_length=4)
    request = GenerationRequest((1, 2, 3, 4), 4000, decoding)
    known.begin([SequenceState(i, request, [1, 2, 3, 4], slot=i) for i in range(4)])
    everywhere = np.ones(4, dtype=bool)
    decided = Outcome(None, None, None, everywhere, None, everywhere, ~everywhere, everywhere, np.zeros(4, dtype=int))
    known.sizes()
    known.launched()
    wanted = []
    for _ in range(30):
        wanted.append(known.sizes())
        known.launched()
        known.learn(decided)
    assert wanted[0] == (4, 12)  # in their first blocks, a token less masked
    assert wanted[-1] == (8, 16)


def test_a_slot_that_is_taken_over_is_not_told_of_its_former_owner():
    known = Forecast(1, 4)
    request = GenerationRequest((1, 2, 3), 40, DecodingConfig(block_length=4))
    first, second = (SequenceState(i, request, [1, 2, 3], slot=0) for i in (0, 1))
    known.begin([first])
    known.launched()
    known.stop([0])
    known.begin([second])
    nothing, one = np.zeros(1, dtype=bool), np.ones(1, dtype=bool)
    known.learn(Outcome(None, None, None, one, nothing, one, nothing, nothing, np.zeros(1, dtype=int)))
    assert known.sizes() == (1, 1)
