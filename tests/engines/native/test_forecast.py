"""Forecasts compared with `BatchState`, which is stepped with random tokens."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from sdar_lm_eval import DecodingConfig, GenerationRequest
from sdar_lm_eval.engines.native import forecast
from sdar_lm_eval.engines.native.batch import BatchState, Outcome, unpack
from sdar_lm_eval.engines.native.forecast import Forecast
from sdar_lm_eval.engines.native.scheduler import SequenceState
from sdar_lm_eval.engines.native.strategies import STRATEGIES

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
    """The state of a batch; random tokens take the place of a model."""

    def __init__(self):
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
        self.state.advance(torch.arange(draws) % 50, torch.rand(draws), torch.rand(draws))
        return unpack(self.state.packed.numpy().copy(), SLOTS, BLOCK)


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
            known.launched()
            known.learn(device.step(*sizes))
    assert not entering
    assert known.sizes() == (0, 0)


@pytest.mark.parametrize("strategy", ["low_confidence_static", "sequential", "random"])
@pytest.mark.parametrize("whole_blocks", [True, False], ids=["whole blocks", "any limit"])
def test_steps_that_follow_a_schedule_are_predicted(strategy, whole_blocks, monkeypatch):
    """With a step in flight, the sizes of the next step are exact where every limit is the end of a block.

    A limit in the middle of a block may be reached before the block is decided: there, the sizes may be too large.
    """
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
    assert not device.state.blocks.active.any()


def test_slack_grows_where_forecasts_are_too_low(monkeypatch):
    """A step decides each block, where the forecast expected one token a step."""
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
    assert wanted[0] == (4, 12)  # the step in flight is predicted to unmask one token a slot
    assert wanted[-1] == (8, 16)


def test_an_outcome_of_a_slots_former_sequence_is_ignored():
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
