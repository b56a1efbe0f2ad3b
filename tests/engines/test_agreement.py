"""The rule of rounding: by hand, against all paths of greedy decoding, and on the demo's answers in bfloat16."""

from __future__ import annotations

import dataclasses
import itertools
import math
import types

import pytest
import torch
from asking import ask, random_prompts, run, tokens_of

from sdar_lm_eval import DecodingConfig, GenerationRequest, GenerationResult, make_engine
from sdar_lm_eval.demo import prompts
from sdar_lm_eval.engines.agreement import ROUNDING, ROUNDING_OF_FLOAT32, Float32Judge, allowed
from sdar_lm_eval.tokens import first_difference

A, B, STOP, MASK = range(4)
PROMPT = (A, A)


def plain_of(table):
    """A judge whose log-probabilities of (a, b, stop) at a block's two positions are those of a table by state."""

    def model(ids, attention_mask, position_ids):
        states = ids[0, -2:].tolist()
        logits = torch.full((1, ids.shape[1], 4), 0.0)
        logits[0, -2:, :3] = torch.tensor(table[tuple(states)])
        logits[..., MASK] = 9.0  # never drawn, however probable
        return types.SimpleNamespace(logits=logits)

    judge = object.__new__(Float32Judge)
    judge._mask, judge._model = MASK, model
    return judge


def request(strategy="low_confidence_static", most=2):
    decoding = DecodingConfig(block_length=2, remasking_strategy=strategy, temperature=0)
    return GenerationRequest(PROMPT, most, decoding, frozenset({STOP}))


def log(*probabilities):
    return [math.log(p) for p in probabilities]


# The left position is sure of a (0.6), the right one of b (0.5); then all goes on as one would think.
TABLE = {
    (MASK, MASK): [log(0.6, 0.3, 0.1), log(0.3, 0.5, 0.2)],
    (A, MASK): [log(0.6, 0.3, 0.1), log(0.1, 0.8, 0.1)],
    (MASK, B): [log(0.2, 0.7, 0.1), log(0.3, 0.5, 0.2)],
    (MASK, A): [log(0.5, 0.3, 0.2), log(0.3, 0.5, 0.2)],
    (B, MASK): [log(0.6, 0.3, 0.1), log(0.45, 0.35, 0.2)],
    (STOP, MASK): [log(0.6, 0.3, 0.1), log(0.45, 0.35, 0.2)],
    (MASK, STOP): [log(0.5, 0.3, 0.2), log(0.3, 0.5, 0.2)],
}


@pytest.mark.parametrize(
    ("strategy", "answer", "needed"),
    [
        ("low_confidence_static", (A, B), 0.0),  # greedy
        # The right position first: it falls short by log(0.6 / 0.5); then b is the left one's best.
        ("low_confidence_static", (B, B), math.log(0.6 / 0.5)),
        # By the left first: b falls short by log(2). By the right first: a by log(0.5 / 0.3), then b by as much.
        ("low_confidence_static", (B, A), math.log(5 / 3)),
        ("sequential", (B, B), math.log(2)),  # then log(0.45 / 0.35), which is less
        ("sequential", (A, A), math.log(8)),
        # A stop token on the right. By the left first it falls short by log(8), by the right first by log(0.5 / 0.2).
        ("low_confidence_static", (A,), math.log(5 / 2)),
        # One on the left, and anything on the right. By the left first: log(6); by the right first with its best token,
        # b: log(7); with a, which falls short by log(5 / 3): log(0.5 / 0.2).
        ("low_confidence_static", (), math.log(5 / 2)),
        ("sequential", (), math.log(6)),
    ],
)
def test_by_hand(strategy, answer, needed):
    assert plain_of(TABLE).roundings(request(strategy), answer, most=9) == [pytest.approx(needed, abs=1e-6)]
    if needed:
        assert plain_of(TABLE).roundings(request(strategy), answer, most=needed - 0.01) == [math.inf]


def test_a_full_answer_needs_no_stop_token():
    assert plain_of(TABLE).roundings(request(most=1), (A,)) == [0.0]


def result(tokens, reason="stop"):
    return GenerationResult(tuple(tokens), reason, 1, 1, 1, 0.1)


def test_another_reason_to_end_is_never_explained():
    judge = plain_of(TABLE)
    assert judge.divergence(0, request(), result((A, B)), result((A, B))) is None
    found = judge.divergence(3, request(), result((A, B)), result((A, B), "length"))
    assert (found.index, found.token, found.worst) == (3, 2, math.inf)


def test_the_first_difference():
    assert [first_difference(a, b) for a, b in (((1, 2), (1, 3)), ((1,), (1, 3)), ((), (4,)))] == [1, 1, 0]


def test_dtypes_are_allowed_their_rounding():
    assert (allowed("float32"), allowed("bfloat16")) == (ROUNDING_OF_FLOAT32, ROUNDING)


@pytest.fixture(scope="module")
def judge(demo):
    return Float32Judge(demo)


@torch.no_grad()
def least_of_all_paths(model, mask, request, known, block):
    """The least rounding over all orders of unmasking a block's positions, each state run by itself."""
    length, states = request.decoding.block_length, {}

    def scores(state):
        if state not in states:
            ids = torch.tensor([*known, *state])
            number = torch.arange(len(ids)) // length
            logits = model(ids[None], attention_mask=(number[:, None] >= number)[None, None]).logits[0, -length:]
            logits[:, mask] = -torch.inf
            states[state] = logits.log_softmax(-1)
        return states[state]

    least = math.inf
    orders = itertools.permutations(range(length))
    for order in [tuple(range(length))] if request.decoding.remasking_strategy == "sequential" else orders:
        state, needed = (mask,) * length, 0.0
        for position in order:
            values = scores(state)
            best = values.max(-1).values
            surest = max(best[i] for i in range(length) if state[i] == mask)
            short = 0 if request.decoding.remasking_strategy == "sequential" else surest - best[position]
            needed = max(needed, float(short), float(best[position] - values[position, block[position]]))
            state = (*state[:position], block[position], *state[position + 1 :])
        least = min(least, needed)
    return least


@pytest.mark.parametrize("strategy", ["low_confidence_static", "sequential"])
def test_the_search_finds_the_least_of_all_paths(tiny, strategy):
    """A random answer of several blocks, which are judged in one forward."""
    judge, model = Float32Judge(tiny), tiny.load_model(dtype=torch.float32, device="cpu", attention="sdpa")
    decoding = DecodingConfig(remasking_strategy=strategy, temperature=0)
    (prompt,), (answer,) = random_prompts([8], seed=1), random_prompts([12], seed=2)
    request = GenerationRequest(prompt, 12, decoding)
    found = judge.roundings(request, answer, most=1e9)
    assert len(found) == 3
    text = (*prompt, *answer)
    for number, rounding in enumerate(found):
        start = len(prompt) + 4 * number
        expected = least_of_all_paths(model, tiny.mask_token_id, request, text[:start], text[start : start + 4])
        assert rounding == pytest.approx(expected, abs=1e-4) and expected > 0.5


@pytest.mark.parametrize("strategy", ["low_confidence_static", pytest.param("sequential", marks=pytest.mark.slow)])
def test_float32_needs_no_rounding_and_bfloat16_little(demo, judge, strategy):
    decoding = DecodingConfig(temperature=0, remasking_strategy=strategy)
    requests = ask(demo, prompts(demo), decoding, count=7)
    exact, rounded = (
        run(make_engine("native", demo, device="cpu", dtype=d), requests) for d in ("float32", "bfloat16")
    )
    assert [judge.deviation(i, r, a) for i, (r, a) in enumerate(zip(requests, exact, strict=True))] == [None] * 7
    found = [judge.divergence(i, requests[i], rounded[i], exact[i]) for i in range(7)]
    differing = [i for i in range(7) if tokens_of([rounded[i]]) != tokens_of([exact[i]])]
    assert [d.index for d in found if d is not None] == differing and len(differing) > 2
    for i in differing:
        assert 0 < found[i].rounding <= found[i].worst < ROUNDING
        assert judge.deviation(i, requests[i], rounded[i]).worst == found[i].worst
        assert rounded[i].token_ids[: found[i].token] == exact[i].token_ids[: found[i].token]


def test_what_no_rounding_explains(demo, judge):
    (request,) = ask(demo, prompts(demo), DecodingConfig(temperature=0, remasking_strategy="sequential"), count=1)
    (answer,) = run(make_engine("native", demo, device="cpu"), [request])
    ids = answer.token_ids
    wrong = {
        "another token": (*ids[:20], (ids[20] + 1) % 700, *ids[21:]),
        "cut short": ids[:20],
        "two tokens changed places": (*ids[:20], ids[21], ids[20], *ids[22:]),
        "it goes on behind the stop token": (*ids, *ids[:4]),
        "the mask token": (*ids[:20], demo.mask_token_id, *ids[21:]),
    }
    for what, tokens in wrong.items():
        found = judge.divergence(0, request, dataclasses.replace(answer, token_ids=tokens), answer)
        assert found.worst == math.inf, what
        assert found.token == (len(ids) if "behind" in what else 20)
