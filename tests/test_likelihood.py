"""Log-likelihoods: the patterns worked by hand, the engine against an oracle, and both against generation itself."""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import math
import random
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare
from support import block_causal, random_checkpoint, read_weights, reference_logits

from sdar_lm_eval import Checkpoint, DecodingConfig, GenerationRequest, UserError, make_engine
from sdar_lm_eval.engines.native.engine import NativeEngine
from sdar_lm_eval.engines.native.scoring import batches
from sdar_lm_eval.engines.native.scoring.batches import Limits
from sdar_lm_eval.engines.native.scoring.forwards import ModulesRows
from sdar_lm_eval.engines.native.scoring.rows import ForwardRow
from sdar_lm_eval.engines.native.scoring.scoring import Scoring
from sdar_lm_eval.engines.types import LikelihoodConfig, ScoreRequest, ScoreResult
from sdar_lm_eval.errors import EngineError
from sdar_lm_eval.likelihood import all_patterns, chain_patterns, most_patterns, plan, sampled_patterns

MASK = 5  # of the small vocabulary 0..5
SMALL = {"vocab_size": 6, "mask_token_id": MASK}


class Oracle:
    """The definitions once more, as plainly as they can be written: no cache, no batch, no transformers.

    Every forward runs the whole text up to the end of the block, under a dense mask.
    """

    def __init__(self, folder: Path, mask: int) -> None:
        checkpoint = Checkpoint.open(str(folder))
        self.weights, self.config, self.mask = read_weights(folder), checkpoint.config, mask
        self.log_p = functools.lru_cache(maxsize=None)(self._log_p)

    def _log_p(self, before: tuple[int, ...], block: tuple[int, ...]) -> torch.Tensor:
        """Log-probabilities (L, V) at each position of a block, of which some tokens are masked."""
        ids = torch.tensor(before + block)
        logits = reference_logits(self.weights, self.config, ids, block_causal(len(ids), len(block)))[len(before) :]
        logits[:, self.mask] = -torch.inf
        return logits.log_softmax(-1)

    def in_order(self, text: Sequence[int], places: Sequence[int], length: int) -> tuple[float, bool]:
        """Decide the places of one block one after the other; the block's other places from the first on are masked."""
        start = places[0] // length * length
        known = {p: text[p] for p in range(start, min(start + length, len(text))) if p not in places}
        total, greedy = 0.0, True
        for place in places:
            block = tuple(known.get(p, self.mask) for p in range(start, start + length))
            log_p = self.log_p(tuple(text[:start]), block)[place - start]
            total += float(log_p[text[place]])
            greedy = greedy and int(log_p.argmax()) == text[place]
            known[place] = text[place]
        return total, greedy

    def blocks(self, request: ScoreRequest, length: int) -> tuple[list[int], list[list[int]]]:
        """The text, and the continuation's places block by block."""
        text = [*request.context_ids, *request.continuation_ids]
        places = range(len(request.context_ids), len(text))
        return text, [list(group) for _, group in itertools.groupby(places, key=lambda p: p // length)]

    def chain(self, request: ScoreRequest, length: int) -> tuple[float, bool]:
        text, blocks = self.blocks(request, length)
        parts = [self.in_order(text, places, length) for places in blocks]
        return sum(total for total, _ in parts), all(greedy for _, greedy in parts)

    def over_orders(self, request: ScoreRequest, length: int) -> tuple[float, float]:
        """Sum over blocks of the mean log-probability over all orders, and of the log of the mean probability."""
        text, blocks = self.blocks(request, length)
        mean = log_of_mean = 0.0
        for places in blocks:
            totals = [self.in_order(text, order, length)[0] for order in itertools.permutations(places)]
            mean += math.fsum(totals) / len(totals)
            log_of_mean += math.log(math.fsum(map(math.exp, totals)) / len(totals))
        return mean, log_of_mean


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint(tmp_path_factory.mktemp("small"), **SMALL)


@pytest.fixture(scope="module")
def oracle(folder: Path) -> Oracle:
    return Oracle(folder, MASK)


@pytest.fixture(scope="module")
def engine(folder: Path) -> NativeEngine:
    return open_engine(folder)


def open_engine(folder: Path | str, **options: object) -> NativeEngine:
    opened = make_engine("native", Checkpoint.open(str(folder)), device="cpu", **options)
    assert isinstance(opened, NativeEngine)
    return opened


def score(
    engine: NativeEngine, requests: list[ScoreRequest], length: int, method: str = "chain", **settings: int
) -> list[ScoreResult]:
    results = dict(engine.score(requests, LikelihoodConfig(method, block_length=length, **settings)))
    assert sorted(results) == list(range(len(requests)))
    return [results[i] for i in range(len(requests))]


def change_limits(monkeypatch: pytest.MonkeyPatch, **changed: int) -> Limits:
    """Change some limits of every engine; return the limits of an engine on the CPU without a limit of requests."""
    on = Limits.on

    def narrower(*args: Any, **kwargs: Any) -> Limits:
        return dataclasses.replace(on(*args, **kwargs), **changed)

    monkeypatch.setattr(Limits, "on", narrower)
    return narrower("cpu", 1 << 20, None)


def some(rng: random.Random, count: int, below: int = MASK) -> tuple[int, ...]:
    return tuple(rng.choices(range(below), k=count))


def requests_of(lengths: Sequence[tuple[int, int]], seed: int = 0) -> list[ScoreRequest]:
    rng = random.Random(seed)
    return [ScoreRequest(some(rng, context), some(rng, continuation)) for context, continuation in lengths]


# Patterns


def test_patterns_by_hand() -> None:
    assert [(p.masked, p.scored, p.weight) for p in chain_patterns(3)] == [
        ((0, 1, 2), (0,), 1.0), ((1, 2), (1,), 1.0), ((2,), (2,), 1.0)
    ]  # fmt: skip
    assert [(p.masked, p.scored) for p in all_patterns(2)] == [((0,), (0,)), ((1,), (1,)), ((0, 1), (0, 1))]
    assert [(p.masked, p.weight) for p in all_patterns(2)] == [((0,), 0.5), ((1,), 0.5), ((0, 1), 0.5)]
    weights = {len(p.masked): p.weight for p in all_patterns(4)}
    assert weights == pytest.approx({1: 1 / 4, 2: 1 / 12, 3: 1 / 12, 4: 1 / 4})
    assert len(all_patterns(4)) == 15


@pytest.mark.parametrize("m", [1, 3, 4, 8])
def test_weights_are_the_integrals_over_the_noise_level(m: int) -> None:
    steps = 20_000
    for k in range(1, m + 1):
        levels = ((i + 0.5) / steps for i in range(steps))
        integral = sum(t ** (k - 1) * (1 - t) ** (m - k) for t in levels) / steps
        assert next(p.weight for p in all_patterns(m) if len(p.masked) == k) == pytest.approx(integral, rel=1e-5)


def test_sampled_patterns_have_the_mean_of_all() -> None:
    m, mean = 5, collections.Counter[tuple[int, ...]]()
    for seed in range(400):
        patterns, pairs = sampled_patterns(m, 16, random.Random(seed))
        assert len({p.masked for p in patterns}) == len(patterns)
        assert {p.masked for p in chain_patterns(m)} <= {p.masked for p in patterns}
        assert sum(p.weight * len(p.masked) for p in patterns) == pytest.approx(m)
        assert len(pairs) == 8
        mean.update({p.masked: p.weight / 400 for p in patterns})
    for pattern in all_patterns(m):
        assert mean[pattern.masked] == pytest.approx(pattern.weight, rel=0.25)


@pytest.mark.parametrize(("m", "samples"), [(1, 8), (5, 16), (8, 200), (9, 300), (32, 100), (70, 64)])
def test_sampled_patterns_are_counted_one_by_one(m: int, samples: int) -> None:
    """Weights to the bit, since sums of them depend on the order."""
    rng = random.Random(m)
    weights: dict[tuple[int, ...], float] = {}
    draws = []
    for i in range(samples):
        k = min(int((i // 2 + rng.random()) / (samples // 2) * m), m - 1) + 1
        masked = tuple(sorted(rng.sample(range(m), k)))
        weights[masked] = weights.get(masked, 0.0) + m / k / samples
        draws.append((masked, m / k / samples))
    numbers = {masked: i for i, masked in enumerate(weights)}
    patterns, pairs = sampled_patterns(m, samples, random.Random(m))
    of_chain = [p.masked for p in chain_patterns(m) if p.masked not in weights]
    assert [(p.masked, p.scored, p.weight) for p in patterns] == [
        *((masked, masked, weight) for masked, weight in weights.items()), *((p, p[:1], 0.0) for p in of_chain)
    ]  # fmt: skip
    assert pairs.rows.flatten().tolist() == [numbers[masked] for masked, _ in draws]
    assert pairs.weights.flatten().tolist() == [weight for _, weight in draws]
    assert patterns.suffixes().tolist() == [p.masked == tuple(range(p.masked[0], m)) for p in patterns]


def test_many_masks_take_little_memory(engine: NativeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask takes about a hundred bytes. As objects, a million masks took 11.8 GB."""
    monkeypatch.setattr(ModulesRows, "run", lambda *_: None)
    monkeypatch.setattr(
        ModulesRows, "logits", lambda self, row, column: torch.zeros(len(row), engine.model.config.vocab_size)
    )
    (request,) = requests_of([(32, 32)])
    peaks = []
    for samples in (2**11, 2**13):
        tracemalloc.start()
        score(engine, [request], 32, "nelbo", mc_samples=samples)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert (peaks[1] - peaks[0]) / (2**13 - 2**11) < 400


def test_the_answers_of_a_question_meet_the_same_masks() -> None:
    context = tuple(range(9))

    def masks(context: tuple[int, ...], continuation: tuple[int, ...], **changed: int) -> list[tuple[int, ...]]:
        settings = LikelihoodConfig("nelbo", **({"mc_samples": 16, "block_length": 8} | changed))
        blocks = plan(ScoreRequest(context, continuation), settings, mask_token_id=99).blocks
        rows = [row for block in blocks for row in block.masked(np.arange(len(block.patterns)), 99).tolist()]
        return [tuple(place for place, token in enumerate(row) if token == 99) for row in rows]

    assert masks(context, (1,) * 7) == masks(context, (2,) * 7)
    assert masks(context, (1,) * 7) != masks((*context[:-1], 50), (1,) * 7)
    assert masks(context, (1,) * 7) != masks(context, (1,) * 7, seed=1)


# Against the oracle


@pytest.mark.parametrize("length", [1, 4, 8])
def test_chain_equals_the_oracle(engine: NativeEngine, oracle: Oracle, length: int) -> None:
    """Every context length modulo the block; continuations within a block, up to its end, and over several."""
    contexts = range(1, 2 * length + 1)
    requests = requests_of([(n, m) for n in contexts for m in sorted({1, 2, length, 2 * length + 1})])
    for request, result in zip(requests, score(engine, requests, length), strict=True):
        expected, greedy = oracle.chain(request, length)
        assert result.log_likelihood == pytest.approx(expected, rel=1e-5, abs=1e-5)
        assert result.is_greedy == greedy
        assert result.standard_error == 0


@pytest.mark.parametrize(
    ("length", "lengths"),
    [
        (1, [(1, 1), (2, 3)]),
        (4, [(n, m) for n in (1, 2, 3, 4) for m in (1, 2, 3, 4, 6)]),
        (8, [(3, 5), (8, 5), (12, 7)]),
    ],
)
def test_nelbo_is_the_mean_over_orders_and_a_bound(
    engine: NativeEngine, oracle: Oracle, length: int, lengths: list[tuple[int, int]]
) -> None:
    requests = requests_of(lengths, seed=1)
    chain = score(engine, requests, length)
    for request, result, of_chain in zip(requests, score(engine, requests, length, "nelbo"), chain, strict=True):
        mean, log_of_mean = oracle.over_orders(request, length)
        assert result.log_likelihood == pytest.approx(mean, rel=1e-5, abs=1e-5)
        assert result.log_likelihood <= log_of_mean + 1e-5
        assert result.is_greedy == of_chain.is_greedy == oracle.chain(request, length)[1]
        assert result.standard_error == 0
        if length == 1 or len(request.continuation_ids) == 1:
            assert result.log_likelihood == pytest.approx(of_chain.log_likelihood, abs=1e-5)


def test_moe(tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path / "moe", moe=True, **SMALL)
    oracle, requests = Oracle(folder, MASK), requests_of([(1, 4), (3, 6), (6, 3)])
    for request, result in zip(requests, score(open_engine(folder), requests, 4), strict=True):
        assert result.log_likelihood == pytest.approx(oracle.chain(request, 4)[0], rel=1e-5, abs=1e-5)


# Against generation


@pytest.mark.parametrize("context", [1, 2, 3, 4])
def test_probabilities_of_all_continuations_sum_to_one(engine: NativeEngine, context: int) -> None:
    prompt = some(random.Random(context), context)
    requests = [ScoreRequest(prompt, answer) for answer in itertools.product(range(MASK), repeat=3)]
    results = score(engine, requests, 4)
    assert sum(math.exp(result.log_likelihood) for result in results) == pytest.approx(1, abs=1e-5)
    assert sum(result.is_greedy for result in results) == 1
    other = score(engine, [ScoreRequest(some(random.Random(9), context), r.continuation_ids) for r in requests], 4)
    assert [r.log_likelihood for r in other] != pytest.approx([r.log_likelihood for r in results], abs=0.1)


def drawn(engine: NativeEngine, prompt: tuple[int, ...], strategy: str, length: int, count: int, draws: int):
    decoding = DecodingConfig(length, length, strategy, temperature=1.0)
    requests = [GenerationRequest(prompt, count, decoding, seed=seed) for seed in range(draws)]
    return collections.Counter(result.token_ids for _, result in engine.generate(requests))


def p_value(found: collections.Counter, expected: dict[tuple[int, ...], float], draws: int) -> float:
    """Of a chi-square test; answers expected less than 5 times count together."""
    common = [answer for answer, probability in expected.items() if probability * draws >= 5]
    observed = [found[answer] for answer in common]
    hoped = [expected[answer] * draws for answer in common]
    return float(chisquare([*observed, draws - sum(observed)], [*hoped, draws - sum(hoped)]).pvalue)


@pytest.mark.parametrize("context", [3, 5])
def test_sequential_decoding_draws_what_chain_says(engine: NativeEngine, context: int) -> None:
    """Three tokens: over a block's end to the middle of the next, and from inside a block to its end."""
    prompt, draws = some(random.Random(context), context), 2000
    answers = list(itertools.product(range(MASK), repeat=3))
    results = score(engine, [ScoreRequest(prompt, answer) for answer in answers], 4)
    expected = {answer: math.exp(result.log_likelihood) for answer, result in zip(answers, results, strict=True)}
    found = drawn(engine, prompt, "sequential", 4, 3, draws)
    assert p_value(found, expected, draws) > 0.001
    bound = score(engine, [ScoreRequest(prompt, answer) for answer in answers], 4, "nelbo")
    other = {answer: math.exp(result.log_likelihood) for answer, result in zip(answers, bound, strict=True)}
    total = sum(other.values())
    assert p_value(found, {a: p / total for a, p in other.items()}, draws) < 1e-6  # the test can tell
    best = DecodingConfig(4, 4, "sequential", temperature=0)
    ((_, greedy),) = engine.generate([GenerationRequest(prompt, 3, best)])
    assert [a for a, r in zip(answers, results, strict=True) if r.is_greedy] == [greedy.token_ids]


def test_random_decoding_draws_what_nelbo_bounds(engine: NativeEngine, oracle: Oracle) -> None:
    prompt, draws = some(random.Random(5), 4), 2000
    answers = list(itertools.product(range(MASK), repeat=2))
    expected = {answer: math.exp(oracle.over_orders(ScoreRequest(prompt, answer), 2)[1]) for answer in answers}
    assert sum(expected.values()) == pytest.approx(1, abs=1e-5)
    assert p_value(drawn(engine, prompt, "random", 2, 2, draws), expected, draws) > 0.001


# Monte Carlo


def test_sampled_masks_agree_with_all_of_them_within_their_standard_error(engine: NativeEngine) -> None:
    (request,) = requests_of([(11, 18)])  # 5 tokens of a block, a whole one, and 5 of the last
    (exact,) = score(engine, [request], 8, "nelbo")
    (chain,) = score(engine, [request], 8)
    deviations = []
    for seed in range(40):
        (sampled,) = score(engine, [request], 8, "nelbo", mc_samples=30, seed=seed)
        assert sampled.standard_error > 0
        assert sampled.is_greedy == chain.is_greedy
        deviations.append((sampled.log_likelihood - exact.log_likelihood) / sampled.standard_error)
    assert abs(sum(deviations) / 40) < 3 / 40**0.5
    assert 0.7 < math.sqrt(sum(d * d for d in deviations) / 40) < 1.4
    again = score(engine, [request], 8, "nelbo", mc_samples=30, seed=3)
    assert again == score(engine, [request], 8, "nelbo", mc_samples=30, seed=3)


def test_long_blocks_have_smaller_errors_with_more_samples(engine: NativeEngine) -> None:
    (request,) = requests_of([(3, 40)])
    (few,) = score(engine, [request], 32, "nelbo", mc_samples=8)
    (many,) = score(engine, [request], 32, "nelbo", mc_samples=256)
    assert many.standard_error < few.standard_error / 3
    assert abs(few.log_likelihood - many.log_likelihood) < 4 * few.standard_error


# Batches


@pytest.mark.parametrize("method", ["chain", "nelbo"])
@pytest.mark.parametrize("length", [3, 4, 32])
def test_scores_do_not_depend_on_the_batch(folder: Path, monkeypatch: pytest.MonkeyPatch, length: int, method: str):
    rng = random.Random(length)
    contexts = [some(rng, n) for n in (1, 7, 40, 41)]
    requests = [ScoreRequest(c, some(rng, m)) for c in contexts for m in (1, 1, 2, 5, 33)]
    rng.shuffle(requests)
    settings = {"mc_samples": 14} if method == "nelbo" else {}
    engine, forwards, run = open_engine(folder), collections.Counter[str](), ModulesRows.run

    def counted(name: str, engine: NativeEngine) -> list[ScoreResult]:
        def count(self: ModulesRows, rows: Sequence[ForwardRow]) -> None:
            forwards[name] += 1
            run(self, rows)

        monkeypatch.setattr(ModulesRows, "run", count)
        return score(engine, requests, length, method, **settings)

    alone = [score(engine, [request], length, method, **settings)[0] for request in requests]
    together = counted("together", engine)
    few = counted("few", open_engine(folder, max_active=3))
    change_limits(
        monkeypatch, cache_tokens=128, clean_tokens=100, noised_tokens=999, forward_tokens=24, seen_tokens=130,
        row_tokens=8, clean_row_tokens=8,
    )  # fmt: skip
    parts = counted("parts", engine)
    for other in (alone, few, parts):
        for ours, theirs in zip(together, other, strict=True):
            assert ours.log_likelihood == pytest.approx(theirs.log_likelihood, rel=1e-5, abs=1e-5)
            assert ours.standard_error == pytest.approx(theirs.standard_error, rel=1e-3, abs=1e-5)
            assert ours.is_greedy == theirs.is_greedy
    assert sum(r.clean_tokens for r in together) < sum(r.clean_tokens for r in alone)
    assert forwards["together"] < forwards["few"] < forwards["parts"]


@pytest.mark.parametrize("method", ["chain", "nelbo"])
@pytest.mark.parametrize("length", [4, 5, 16])
def test_the_prefix_of_alike_contexts_is_computed_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch, length: int, method: str
) -> None:
    """Four contexts share 21 tokens, as in a few-shot task. Three of them share more, and one is the prefix alone."""
    change_limits(monkeypatch, least_saved=0)
    monkeypatch.setattr(batches, "ALIKE", 8)
    rng = random.Random(length)
    front, more = some(rng, 21), some(rng, 9)
    contexts = [front, (*front, *more), *((*front, *more[:5], *some(rng, n)) for n in (3, 30)), some(rng, 33), (1,)]
    requests = [ScoreRequest(context, some(rng, m)) for context in contexts for m in (1, 1, 6)]
    rng.shuffle(requests)
    settings = {"mc_samples": 14} if method == "nelbo" else {}
    engine = open_engine(folder)
    together = score(engine, requests, length, method, **settings)
    alone = [score(engine, [request], length, method, **settings)[0] for request in requests]
    few = score(open_engine(folder, max_active=4), requests, length, method, **settings)
    for other in (alone, few):
        for ours, theirs in zip(together, other, strict=True):
            assert ours.log_likelihood == pytest.approx(theirs.log_likelihood, rel=1e-5, abs=1e-5)
            assert ours.is_greedy == theirs.is_greedy
    whole = {context: len(context) // length * length for context in contexts}
    shared = 21 // length * length
    rests = sum(tokens - shared for context, tokens in whole.items() if context[:21] == front)
    others = sum(tokens for context, tokens in whole.items() if context[:21] != front)
    own = sum((len(r.context_ids) + len(r.continuation_ids) - 1) // length * length for r in requests)
    continuations = own - 3 * sum(whole.values())
    assert sum(r.clean_tokens for r in together) == shared + rests + others + continuations


@given(contexts=st.lists(st.lists(st.integers(0, 1), max_size=12).map(tuple), max_size=12), length=st.integers(1, 4))
def test_shared_prefixes(contexts: list[tuple[int, ...]], length: int) -> None:
    """Shared prefixes save at least as many tokens as the one prefix of any set of contexts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "ALIKE", 3)
        found = batches.shared_prefixes(contexts, length, least_saved=0)
        none = batches.shared_prefixes(contexts, length, least_saved=1000)
    assert set(found) == set(contexts) == set(none)
    assert not any(none.values())
    for context, prefix in found.items():
        assert context[: len(prefix)] == prefix
        assert len(prefix) % length == 0 and (not prefix or len(prefix) >= 3)
    saved = sum(map(len, found.values())) - sum(map(len, set(found.values())))
    for n in range(-(-3 // length) * length, 13, length):
        holders = collections.Counter(context[:n] for context in found if len(context) >= n)
        assert all((count - 1) * n <= saved for count in holders.values())


def test_tasks_with_one_system_prompt_share_prefixes_of_their_own(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one batch, and in two: the contexts of a task are neighbours, whatever their lengths."""
    monkeypatch.setattr(batches, "ALIKE", 8)
    rng = random.Random(0)
    system = some(rng, 16)
    tasks = [(*system, task, *some(rng, 63)) for task in (0, 1)]
    requests = [ScoreRequest((*tasks[i % 2], *some(rng, 4 * i + 4)), (1,)) for i in range(8)]
    rests = sum(4 * i + 4 for i in range(8))
    for options in ({}, {"max_active": 4}):
        found = score(open_engine(folder, **options), requests, 4)
        assert sum(result.clean_tokens for result in found) == 2 * 80 + rests


def test_few_alike_contexts_take_no_forward_of_their_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward for 8 tokens of 2 contexts costs more than the contexts' 8 tokens twice."""
    monkeypatch.setattr(batches, "ALIKE", 8)
    rng = random.Random(0)
    front = some(rng, 8)
    for count, shared in ((2, False), (9, True)):
        requests = [ScoreRequest((*front, i % 5, i // 5, *some(rng, 2)), (1,)) for i in range(count)]
        found = score(open_engine(folder), requests, 4)
        assert sum(result.clean_tokens for result in found) == (8 + 4 * count if shared else 12 * count)


@given(
    texts=st.lists(st.tuples(st.lists(st.integers(0, 1), min_size=1, max_size=12), st.integers(1, 5)), max_size=14),
    length=st.integers(1, 4),
    room=st.integers(16, 60),
    least_saved=st.sampled_from([0, 4, 10]),
)
def test_a_batch_needs_no_more_clean_tokens_than_it_says(
    texts: list[tuple[list[int], int]], length: int, room: int, least_saved: int
) -> None:
    requests = [ScoreRequest(tuple(context), (1,) * count) for context, count in texts]
    limits = dataclasses.replace(Limits.on("cpu", room, None), clean_tokens=room, least_saved=least_saved)
    config = LikelihoodConfig("chain", 2, length)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "ALIKE", 3)
        made = batches.divide(requests, config, MASK, limits)
        for batch in made:
            plans = [plan(requests[index], config, MASK) for index in batch.requests]
            prefixes = batches.shared_prefixes((each.context for each in plans), length, least_saved)
            rests = sum(len(context) - len(prefix) for context, prefix in prefixes.items())
            needed = sum(map(len, set(prefixes.values()))) + rests + sum(len(each.clean) for each in plans)
            assert needed <= batch.clean_tokens <= room
    assert sorted(index for batch in made for index in batch.requests) == list(range(len(requests)))


@pytest.mark.parametrize("seed", range(6))
def test_a_batch_has_as_many_alike_contexts_as_memory_holds(
    folder: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """The KV cache has exactly the batch's clean tokens, so a token without memory would be an IndexError."""
    monkeypatch.setattr(batches, "ALIKE", 8)
    narrow = change_limits(
        monkeypatch, cache_tokens=128, clean_tokens=100, forward_tokens=64, seen_tokens=256, row_tokens=16,
        clean_row_tokens=16, least_saved=4,
    )  # fmt: skip
    rng = random.Random(seed)
    fronts = [some(rng, 40), some(rng, 20), ()]
    requests = [
        ScoreRequest((*rng.choice(fronts), *some(rng, rng.randint(1, 20))), some(rng, rng.randint(1, 6)))
        for _ in range(30)
    ]
    config = LikelihoodConfig("chain", 2, 4)
    made = batches.divide(requests, config, MASK, narrow)
    assert sorted(index for batch in made for index in batch.requests) == list(range(30))
    assert all(batch.clean_tokens <= 100 for batch in made)
    # Without sharing, most batches of the longest contexts would hold one or two requests.
    longest = [batch for batch in made if any(requests[i].context_ids[:40] == fronts[0] for i in batch.requests)]
    assert sum(len(batch.requests) for batch in longest) / len(longest) > 3
    together = score(open_engine(folder), requests, 4)
    monkeypatch.undo()
    alone = open_engine(folder)
    for request, result in zip(requests, together, strict=True):
        assert result.log_likelihood == pytest.approx(score(alone, [request], 4)[0].log_likelihood, rel=1e-5, abs=1e-5)


def test_alike_contexts_are_in_one_batch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The batches still begin with the longest request."""
    monkeypatch.setattr(batches, "ALIKE", 8)
    engine = open_engine(folder, max_active=3)
    rng = random.Random(0)
    fronts = some(rng, 8), some(rng, 8)
    requests = [ScoreRequest((*fronts[i % 2], *some(rng, 4 + i)), (1,)) for i in range(6)]
    order = [index for index, _ in engine.score(requests, LikelihoodConfig())]
    assert order == [5, 3, 1, 4, 2, 0]


def test_a_context_is_computed_once_for_all_its_answers(engine: NativeEngine) -> None:
    """And so is the block of masks that answers of one token have in common."""
    rng = random.Random(0)
    questions = [some(rng, n) for n in (22, 40)]
    letters = score(engine, [ScoreRequest(q, (a,)) for q in questions for a in range(4)], 4)
    assert [r.clean_tokens for r in letters] == [20, 0, 0, 0, 40, 0, 0, 0]
    assert [r.noised_tokens for r in letters] == [4, 0, 0, 0, 4, 0, 0, 0]
    longer = score(engine, [ScoreRequest(questions[0], (a, 1, 2, 3, 4, 0)) for a in range(4)], 4)
    assert sum(r.clean_tokens for r in longer) == 20 + 4 * 4
    # Two tokens in the first block (with nothing else than the first masked in common), four in the second.
    assert sum(r.noised_tokens for r in longer) == (1 + 4) * 4 + 4 * 4 * 4


@pytest.mark.parametrize(("length", "method", "samples"), [(4, "chain", 2), (4, "nelbo", 16), (8, "nelbo", 20)])
def test_a_block_has_as_many_patterns_as_a_batch_is_laid_out_for(length: int, method: str, samples: int) -> None:
    config = LikelihoodConfig(method, samples, length)
    (request,) = requests_of([(length, length)])
    rows = plan(request, config, MASK).num_rows
    assert most_patterns(config) - length < rows <= most_patterns(config)


def test_batches_are_bounded_by_what_they_lay_out(engine: NativeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each request has 16 continuation tokens, and a masked copy of 4 tokens for each."""
    change_limits(monkeypatch, noised_tokens=150)
    sizes, run_batch = [], Scoring._run_batch

    def record(self: Scoring, plans: list[Any], *arguments: Any) -> list[ScoreResult]:
        sizes.append(len(plans))
        return run_batch(self, plans, *arguments)

    monkeypatch.setattr(Scoring, "_run_batch", record)
    score(engine, requests_of([(4, 16)] * 5), 4)
    assert sizes == [2, 2, 1]


def test_requests_finish_group_by_group_long_ones_first(folder: Path) -> None:
    """A crash then leaves whole texts and whole questions behind."""
    engine = open_engine(folder, max_active=2)
    rng = random.Random(0)
    windows = [ScoreRequest(some(rng, 1), some(rng, 11)) for _ in range(4)]
    question = some(rng, 8)
    answers = [ScoreRequest(question, some(rng, 2)) for _ in range(3)]
    mixed = [answers[0], *windows[:2], answers[1], *windows[2:], answers[2], ScoreRequest(some(rng, 2), (1,))]
    order = [index for index, _ in engine.score(mixed, LikelihoodConfig())]
    assert order == [1, 2, 4, 5, 0, 3, 6, 7]


def test_generation_and_scoring_take_turns(engine: NativeEngine) -> None:
    prompts = [GenerationRequest((1, 2, 3), 6, DecodingConfig(4, temperature=0))] * 2
    requests = requests_of([(5, 4)])
    first = [r.token_ids for _, r in engine.generate(prompts)], score(engine, requests, 4)
    assert first == ([r.token_ids for _, r in engine.generate(prompts)], score(engine, requests, 4))


def test_bfloat16(folder: Path, engine: NativeEngine) -> None:
    requests = requests_of([(5, 8), (30, 3)])
    for low, high in zip(
        score(open_engine(folder, dtype="bfloat16"), requests, 4), score(engine, requests, 4), strict=True
    ):
        assert low.log_likelihood == pytest.approx(high.log_likelihood, rel=0.1)
        assert low.log_likelihood != high.log_likelihood


# Limits and mistakes


def test_the_mask_token_has_no_probability_but_may_stand_in_a_context(engine: NativeEngine, oracle: Oracle) -> None:
    held = ScoreRequest((1, MASK, 2), (3, 4))
    never, given = score(engine, [ScoreRequest((1, 2), (3, MASK)), held], 4)
    assert (never.log_likelihood, never.is_greedy) == (-math.inf, False)
    assert given.log_likelihood == pytest.approx(oracle.chain(held, 4)[0], abs=1e-5)
    assert score(engine, [ScoreRequest((1,), (MASK,))], 4)[0].log_likelihood == -math.inf


def test_nothing_to_score(engine: NativeEngine) -> None:
    assert score(engine, [], 4) == []


def test_a_request_that_no_cache_holds_is_refused_before_anything_runs(folder: Path) -> None:
    engine = open_engine(folder, kv_pages=2)
    assert score(engine, requests_of([(32, 4), (30, 6)]), 4)
    with pytest.raises(UserError, match=r"a request of 37 tokens .* needs 36 tokens of KV cache; there is room for 32"):
        next(engine.score(requests_of([(4, 4), (33, 4)]), LikelihoodConfig()))


def test_out_of_memory_keeps_what_is_finished(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, whole = open_engine(folder, max_active=1), Scoring._run_batch
    batches = itertools.count()

    def run_batch(self: Scoring, *args: object) -> list[ScoreResult]:
        if next(batches) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Scoring, "_run_batch", run_batch)
    finished = []
    with pytest.raises(EngineError, match=r"out of memory on cpu while scoring.* max_active"):
        finished.extend(engine.score(requests_of([(4, 4)] * 4), LikelihoodConfig()))
    assert len(finished) == 2


def test_logits_that_are_not_numbers(folder: Path) -> None:
    engine = open_engine(folder)
    engine.model.lm_head.weight[:] = torch.nan
    with pytest.raises(EngineError, match="logits are not finite numbers"):
        score(engine, requests_of([(4, 4)]), 4)


@pytest.mark.parametrize("alike", [False, True])
@pytest.mark.parametrize("method", ["chain", "nelbo"])
def test_one_text_with_nan_costs_the_others_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, method: str, alike: bool
) -> None:
    """The others share the text's context, batch and forwards. Two texts whose context has NaN fail too.

    Alike contexts also share the KV of a prefix.
    """
    monkeypatch.setattr(batches, "ALIKE", 8)
    change_limits(monkeypatch, least_saved=0)
    engine, bad = open_engine(folder), 4
    rng = random.Random(0)
    front = some(rng, 8, below=bad) if alike else ()
    contexts = [(*front, *some(rng, n, below=bad)) for n in (4, 9, 30)]
    good = [ScoreRequest(c, some(rng, m, below=bad)) for c in contexts for m in (1, 3, 6)]
    expected = score(engine, good, 4, method)
    engine.model.model.embed_tokens.weight[bad] = torch.nan
    tainted = [ScoreRequest(contexts[0], (1, bad, 2, 3)), ScoreRequest((bad, *contexts[1]), (1,))]
    tainted.append(ScoreRequest((bad, *contexts[1]), (2, 3)))
    results = {}
    with pytest.raises(EngineError, match=r"^3 of 12 requests .*Number 0, 4, 11: the model's logits are not finite"):
        results.update(
            engine.score([tainted[0], *good[:3], tainted[1], *good[3:], tainted[2]], LikelihoodConfig(method))
        )
    order = [1, 2, 3, 5, 6, 7, 8, 9, 10]
    assert sorted(results) == order
    for i, wanted in zip(order, expected, strict=True):
        assert results[i].log_likelihood == pytest.approx(wanted.log_likelihood, rel=1e-5, abs=1e-5)
        assert results[i].is_greedy == wanted.is_greedy
    assert [r.log_likelihood for r in score(engine, good, 4, method)] == [r.log_likelihood for r in expected]


def test_a_run_inside_another_is_refused(engine: NativeEngine) -> None:
    requests = requests_of([(4, 4), (5, 3), (40, 40)])
    generation = [GenerationRequest((1, 2, 3), new, DecodingConfig(4, temperature=0)) for new in (2, 40)]
    for first in (engine.score(requests, LikelihoodConfig()), engine.generate(generation)):
        next(first)  # type: ignore[call-overload]
        for second in (engine.score(requests, LikelihoodConfig()), engine.generate(generation)):
            with pytest.raises(EngineError, match="in the middle of another run"):
                next(second)  # type: ignore[call-overload]
        first.close()  # type: ignore[attr-defined]
    assert len(score(engine, requests, 4)) == 3


def test_the_cpus_own_error_is_out_of_memory_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        torch.empty(1 << 60, dtype=torch.uint8)

    monkeypatch.setattr(ModulesRows, "run", fails)
    with pytest.raises(EngineError, match="out of memory on cpu while scoring"):
        score(open_engine(folder), requests_of([(4, 4)]), 4)


def test_empty_requests_are_refused() -> None:
    for context, continuation in [((), (1,)), ((1,), ())]:
        with pytest.raises(UserError, match="needs at least one token"):
            ScoreRequest(context, continuation)


@pytest.mark.parametrize("samples", [0, 1, 7, -2, 2**21])
def test_sample_counts_out_of_range(samples: int) -> None:
    with pytest.raises(UserError, match=f"mc_samples={samples} is out of range: it must be an even number from 2"):
        LikelihoodConfig("nelbo", mc_samples=samples)
