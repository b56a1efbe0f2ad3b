"""`BatchState` compared with plain Python that serves one slot after the other, and with its compiled methods.

On a GPU `torch.compile` compiles kernels. On the CPU only its front end runs, which refuses what cannot be compiled.
"""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from asking import run

from sdar_lm_eval import DecodingConfig, GenerationRequest, make_engine
from sdar_lm_eval.engines.native.batch import BatchState, unpack
from sdar_lm_eval.engines.native.compiling import compiled
from sdar_lm_eval.engines.native.random_numbers import DRAW, uniform
from sdar_lm_eval.engines.native.scheduler import SequenceState
from sdar_lm_eval.engines.native.strategies import STRATEGIES
from sdar_lm_eval.engines.native.transition import Drawn

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BACKEND = "inductor" if DEVICE.type == "cuda" else "eager"
VOCABULARY, MASK = 100, 99
STEPS = 25


def random_sequence(rng, number, slot, block):
    length = rng.choice([n for n in (1, 2, 4, 8, block) if n <= block])
    decoding = DecodingConfig(
        block_length=length,
        denoising_steps=rng.randint(1, length),
        remasking_strategy=rng.choice(list(STRATEGIES)),
        confidence_threshold=rng.random(),
        eb_threshold=3 * rng.random(),
        temperature=rng.choice([0, 0.5, 1.0]),
        repetition_penalty=1.2,
    )
    prompt = tuple(rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 3 * block)))
    stops = frozenset(rng.sample([*range(VOCABULARY), *[MASK] * 22], rng.randint(0, 3)))
    request = GenerationRequest(prompt, rng.randint(1, 5 * block), decoding, stops, seed=rng.getrandbits(64))
    return SequenceState(number, request, list(prompt), slot=slot)


def make(slots, block):
    return BatchState(
        slots, block, 3, VOCABULARY, MASK, strategies=frozenset(STRATEGIES), penalized=True, device=DEVICE
    )


def entering(rng, step, state):
    free = [slot for slot in range(state.slots) if not state.blocks.active[slot]]
    return [random_sequence(rng, step, slot, state.block) for slot in free if rng.random() < 0.7]


def drawn(count, step):
    confidence, entropy = torch.rand(2, count, device=DEVICE)
    if step % 10 == 7:
        confidence[0] = torch.nan
    if step % 3 == 0:
        confidence = (4 * confidence).round() / 4  # many equal values
    return Drawn(torch.randint(0, VOCABULARY - 1, (count,), device=DEVICE), confidence, entropy)


def tensors(state):
    fields = {**state.blocks._asdict(), **state.settings._asdict(), **state.room._asdict()}
    return {name: value.clone() for name, value in {**fields, "seen": state.seen, "packed": state.packed}.items()}


@pytest.mark.parametrize("slots", [1, 7, 33])
@pytest.mark.parametrize("block", [4, 8])
def test_which_slots_fit_into_a_step(slots, block):
    """Segments and draws belong to the slots before the first slot that does not fit."""
    rng = random.Random(slots)
    torch.manual_seed(slots)
    state = make(slots, block)
    waited = 0
    for step in range(STEPS):
        if new := entering(rng, step, state):
            state.begin(new)
        before = {name: value.cpu() for name, value in tensors(state).items()}
        segments, draws = rng.randint(2, 2 * slots + 2), rng.randint(block, slots * block + 3)
        found, positions = state.segments(segments), state.masked_positions(draws)

        expected, fitting, full = [], [], False
        for slot in range(slots):
            if not before["active"][slot]:
                continue
            length, start = int(before["length"][slot]), int(before["start"][slot])
            own = [(slot, start, length, 1, before["tokens"][slot].tolist())]
            if before["uncommitted"][slot]:
                own = [
                    (slot, start - length, length, 2, before["previous"][slot].tolist()),
                    (*own[0][:3], 0, own[0][4]),
                ]
            full = full or len(expected) + len(own) > segments
            if not full:
                expected += own
                fitting.append((slot, len(expected) - 1))
        got = [tuple(column[i].tolist() for column in found) for i in range(segments)]
        assert got[: len(expected)] == expected
        assert all((slot, length, following) == (slots, 0, 0) for slot, _, length, following, _ in got[len(expected) :])

        wanted, took_part, full = [], [], False
        for slot, segment in fitting:
            columns = before["masked"][slot].nonzero()[:, 0].tolist()
            full = full or len(wanted) + len(columns) > draws
            if not full:
                wanted += [(slot, column, segment * block + column) for column in columns]
                took_part.append(slot)
        assert positions.slot.tolist()[: len(wanted)] == [slot for slot, _, _ in wanted]
        assert positions.row.tolist()[: len(wanted)] == [row for _, _, row in wanted]
        assert set(positions.slot.tolist()[len(wanted) :]) <= {slots}
        assert int(positions.row.min()) >= 0 and int(positions.row.max()) < segments * block
        for index, (slot, column, _) in enumerate(wanted):
            counter = (before["seed"][slot], before["start"][slot] + column, before["step"][slot])
            assert float(positions.number[index]) == float(uniform(*counter, DRAW))
            assert float(positions.temperature[index]) == float(before["temperature"][slot])
        assert state.room.fits.nonzero()[:, 0].tolist() == took_part
        waited += int(before["active"].sum()) - len(took_part)
        state.advance(drawn(draws, step))
    assert waited > 0 or slots == 1


@pytest.mark.parametrize(("slots", "block"), [pytest.param(1, 4, marks=pytest.mark.slow), (33, 8)])
def test_compiled_it_is_the_same(slots, block):
    rng = random.Random(slots)
    torch.manual_seed(slots)
    plain, fast = make(slots, block), make(slots, block)
    segments_of, positions_of = compiled(BatchState.segments, BACKEND), compiled(BatchState.masked_positions, BACKEND)
    advance = compiled(BatchState.advance, BACKEND)
    decided = stopped = 0
    for step in range(STEPS):
        if new := entering(rng, step, plain):
            plain.begin(new)
            fast.begin(copy.deepcopy(new))
        segments, draws = rng.randint(2, 2 * slots + 2), rng.randint(block, slots * block + 3)
        for one, other in zip(plain.segments(segments), segments_of(fast, segments), strict=True):
            assert torch.equal(one, other)
        for one, other in zip(plain.masked_positions(draws), positions_of(fast, draws), strict=True):
            assert torch.equal(one, other)
        given = drawn(draws, step)
        plain.advance(given)
        advance(fast, given)
        ours = tensors(fast)
        for name, value in tensors(plain).items():
            assert torch.equal(ours[name].nan_to_num(7), value.nan_to_num(7)), name
        outcome = unpack(plain.packed.cpu().numpy(), slots, block)
        decided += int(outcome.decided.sum())
        stopped += int((outcome.decided & ~outcome.goes_on).sum())
        assert not np.any(outcome.decided & ~outcome.took_part)
    assert decided > stopped > 0


@pytest.mark.slow
def test_runs_of_any_size_compile_once(tiny):
    """One sequence or several, with and without stop tokens, in blocks of 4 and 8: the same code."""
    compilations = []

    def counting(graph, inputs):
        compilations.append(graph)
        return graph.forward

    for max_active in (3, 1):
        engine = make_engine("native", tiny, device="cpu", max_active=max_active)
        engine.runner.compile(counting)
        for stops in (frozenset(), frozenset({1, 2, 3})):
            for block in (4, 8):
                decoding = DecodingConfig(block, temperature=0)
                run(engine, [GenerationRequest(tuple(range(3, 8 + i)), 9, decoding, stops) for i in range(max_active)])
    assert len(compilations) == 3 * 2  # the three parts of a step, each for a count of 1 as well
