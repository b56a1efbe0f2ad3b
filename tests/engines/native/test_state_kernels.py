"""The kernels of the batch's state beside `BatchState`: the same batches, step after step, and the same tokens drawn.

On the CPU through Triton's interpreter, on a GPU as they are.
"""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch

state_kernels = pytest.importorskip("sdar_lm_eval.engines.native.state_kernels", exc_type=ImportError)

from sdar_lm_eval import DecodingConfig, GenerationRequest  # noqa: E402
from sdar_lm_eval.engines.native.random_numbers import DRAW, uniform  # noqa: E402
from sdar_lm_eval.engines.native.scheduler import Sequence  # noqa: E402
from sdar_lm_eval.engines.native.state import BatchState  # noqa: E402
from sdar_lm_eval.engines.native.strategies import STRATEGIES  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VOCABULARY, MASK, PAGE = 100, 99, 4
IMPLEMENTED = tuple(name for name, strategy in STRATEGIES.items() if strategy.has_kernel)
STEPS = 40 if DEVICE.type == "cuda" else 10  # the interpreter is slow


def random_sequence(rng, number, slot, block, strategies):
    length = rng.choice([n for n in (1, 2, 4, 8, block) if n <= block])
    decoding = DecodingConfig(
        block_length=length,
        denoising_steps=rng.randint(1, length),
        remasking_strategy=rng.choice(strategies),
        confidence_threshold=rng.random(),
        eb_threshold=3 * rng.random(),
        temperature=rng.choice([0, 0.5, 1.0]),
    )
    prompt = tuple(rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 3 * block)))
    stops = frozenset(rng.sample([*range(VOCABULARY), *[MASK] * 22], rng.randint(0, 3)))
    request = GenerationRequest(prompt, rng.randint(1, 5 * block), decoding, stops, seed=rng.getrandbits(64))
    return Sequence(number, request, list(prompt), slot=slot)


def columns(state):
    return {name: value for name, value in vars(state).items() if isinstance(value, torch.Tensor)}


def check_equal(ours, reference):
    scratch = ("wants", "segment_of", "draw_of")
    for name, expected in columns(reference).items():
        if name not in scratch:
            torch.testing.assert_close(columns(ours)[name], expected, rtol=0, atol=0, equal_nan=True, msg=name)


@pytest.mark.parametrize(
    ("slots", "block", "strategies", "paired"),
    [
        (7, 4, IMPLEMENTED, True),
        (1, 1, IMPLEMENTED, True),
        (5, 12, IMPLEMENTED, False),
        (2, 2, ("low_confidence_static",), True),
        (3, 16, ("entropy_bounded", "random"), False),
    ],
    ids=str,
)
def test_step_after_step(slots, block, strategies, paired):
    rng = random.Random(slots)
    torch.manual_seed(slots)
    reference, ours = (
        BatchState(
            slots, block, 3, VOCABULARY, MASK, strategies=frozenset(strategies), penalized=False, uniform=uniform,
            device=DEVICE,
        )
        for _ in range(2)
    )  # fmt: skip
    pages = -(-(3 * block + 5 * block + 2 * block) // PAGE)
    table = torch.randint(1, 1000, (slots + 1, pages), device=DEVICE)
    table[slots] = 0
    packed = reference.pack_nothing()
    waited = decided = stopped = 0
    for step in range(STEPS):
        free = [slot for slot in range(slots) if not reference.active[slot]]
        entering = [random_sequence(rng, step, slot, block, strategies) for slot in free if rng.random() < 0.7]
        if entering:
            reference.begin(entering)
            ours.begin(copy.deepcopy(entering))
        segments, places = rng.randint(2, 2 * slots + 2), rng.randint(block, slots * block + 3)

        expected = reference.segments(segments)
        got = state_kernels.lay_out(ours, table, PAGE, segments, paired=paired)
        assert torch.equal(got.slot, expected.slot)
        assert torch.equal(got.count, expected.following * block if paired else expected.length)
        assert torch.equal(got.tokens.view(-1, block), expected.tokens)
        real = reference.offsets < expected.length[:, None]
        positions = torch.where(real, expected.start[:, None] + reference.offsets, 0)
        assert torch.equal(got.positions.view(-1, block), positions)
        assert torch.equal(
            got.visible.view(-1, block), torch.where(real, (expected.start + expected.length)[:, None], 0)
        )
        where = table[expected.slot].gather(1, positions // PAGE) * PAGE + positions % PAGE
        assert torch.equal(got.kv_slots.view(-1, block), torch.where(real, where, 0))

        place, row = reference.masked_positions(places)
        drawing = state_kernels.masked_positions(ours, places)
        there = place // block < slots
        slot = place // block
        assert torch.equal(drawing.row[there], row[there])
        assert int(drawing.row.min()) >= 0 and int(drawing.row.max()) < segments * block
        assert torch.equal(drawing.temperature, reference.temperature[slot])
        assert torch.equal(drawing.greedy, reference.greedy[slot])
        numbers = uniform(reference.seed[slot], reference.start[slot] + place % block, reference.step[slot], DRAW)
        assert torch.equal(drawing.number[there], numbers[there])

        token = torch.randint(0, VOCABULARY - 1, place.shape, device=DEVICE)
        confidence, entropy = torch.rand(2, len(place), device=DEVICE)
        if step % 10 == 7:
            confidence[0] = torch.nan
        if step % 3 == 0:
            confidence = (4 * confidence).round() / 4  # many that are equal
        outcome = reference.advance(place, token, confidence, entropy)
        packed.random_()
        state_kernels.advance(ours, token, confidence, entropy, packed)
        check_equal(ours, reference)
        assert torch.equal(packed, outcome)
        learned = reference.unpack(outcome.cpu())
        waited += int((~learned.took_part).sum())
        decided += int(learned.decided.sum())
        stopped += int((learned.decided & ~learned.goes_on).sum())
        assert not np.any(learned.decided & ~learned.took_part)
    assert decided > stopped > 0
    assert waited > 0 or slots == 1
