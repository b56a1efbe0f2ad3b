"""Speculation compared with decoding without guesses: tokens, steps and confidences are the same."""

from __future__ import annotations

import dataclasses
import itertools
import random

import asking
import pytest
import torch
from asking import tokens_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import random_checkpoint

from sdar_lm_eval import Checkpoint, DecodingConfig, GenerationRequest, UserError, make_engine
from sdar_lm_eval.demo import prompts as demo_prompts
from sdar_lm_eval.engines.native import engine as native_engine
from sdar_lm_eval.engines.native import forecast, speculation
from sdar_lm_eval.engines.native.batch import BatchState
from sdar_lm_eval.engines.native.depth import Depths
from sdar_lm_eval.engines.native.forward.graphs import Graphs, rounded_up
from sdar_lm_eval.engines.native.strategies import STRATEGIES
from sdar_lm_eval.engines.native.transition import Blocks, Changes, Drawn
from sdar_lm_eval.thinking import Repetition, Thinking

LEVELS = (1, 2, 3, 4)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return Checkpoint.open(str(random_checkpoint(tmp_path_factory.mktemp("tiny"))))


@pytest.fixture(scope="module")
def questions(demo):
    return demo_prompts(demo)


class Engines:
    """Engines on the CPU by their options, each opened once; and what requests get without guesses, computed once."""

    def __init__(self):
        self._opened, self._answered = {}, {}

    def __call__(self, checkpoint, speculate=False, **options):
        key = checkpoint.name, speculate, *sorted(options.items())
        if key not in self._opened:
            self._opened[key] = make_engine("native", checkpoint, device="cpu", speculate=speculate, **options)
        return self._opened[key]

    def plain(self, checkpoint, requests):
        key = checkpoint.name, tuple(requests)
        if key not in self._answered:
            self._answered[key] = asking.run(self(checkpoint), requests)
        return self._answered[key]


@pytest.fixture(scope="module")
def engines():
    return Engines()


def check_equal(results, expected):
    """Assert that the answers are the same; return passes, steps, guesses and right guesses of all answers."""
    assert tokens_of(results) == tokens_of(expected)
    for ours, plain in zip(results, expected, strict=True):
        assert ours.unmasked_at == plain.unmasked_at
        assert ours.confidences == pytest.approx(plain.confidences, rel=1e-5, abs=1e-5)
        assert ours.forced_tokens == plain.forced_tokens
        assert plain.speculation is None
    done = [result.speculation for result in results]
    steps = sum(result.denoising_forwards for result in results)
    passes, guesses, right = (sum(column) for column in zip(*map(dataclasses.astuple, done), strict=True))
    assert passes + right == steps
    assert right <= guesses
    return passes, steps, guesses, right


def check_forwards(results, expected):
    """Assert that the forwards are counted as without speculation; not so after a preemption."""
    for ours, plain in zip(results, expected, strict=True):
        assert (ours.prefill_forwards, ours.denoising_forwards, ours.commit_forwards) == (
            plain.prefill_forwards, plain.denoising_forwards, plain.commit_forwards,
        )  # fmt: skip


def recorded(prompts, decoding, *, limit=24, **settings):
    return [
        GenerationRequest(prompt, limit, decoding, seed=i, record_steps=True, **settings)
        for i, prompt in enumerate(prompts)
    ]


KINDS = [
    {"temperature": 0},
    {"temperature": 1.0},
    {"temperature": 1.0, "repetition_penalty": 1.4},
    *(
        pytest.param(kind, marks=pytest.mark.slow)
        for kind in (
            {"temperature": 0, "repetition_penalty": 1.4},
            {"temperature": 0.8, "top_k": 4},
            {"temperature": 1.2, "top_p": 0.8},
        )
    ),
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_demo_answers_the_same(demo, questions, engines, kind):
    """Sequences of all strategies side by side, four of each."""
    found = dict.fromkeys(STRATEGIES, (0, 0, 0, 0))
    for steps, all_levels in ((1, [2]), (2, [3]), (4, [1, 4])):
        requests = {
            strategy: recorded(
                questions[:4], DecodingConfig(4, steps, strategy, **kind), stop_ids=frozenset(demo.stop_ids)
            )
            for strategy in STRATEGIES
        }
        together = list(itertools.chain(*requests.values()))
        expected = engines.plain(demo, together)
        for levels in all_levels:
            results = asking.run(engines(demo, levels), together)
            check_forwards(results, expected)
            for i, strategy in enumerate(STRATEGIES):
                counts = check_equal(results[4 * i : 4 * i + 4], expected[4 * i : 4 * i + 4])
                found[strategy] = tuple(a + b for a, b in zip(found[strategy], counts, strict=True))
    for strategy, (*_, guesses, right) in found.items():
        assert 0 < right < guesses, strategy  # some guesses are wrong


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_strategy_alone_answers_the_same(demo, questions, engines, strategy):
    """A batch of one strategy computes no other's choice."""
    decoding = DecodingConfig(4, 4, strategy, temperature=1.0, repetition_penalty=1.4)
    requests = recorded(questions[:4], decoding, stop_ids=frozenset(demo.stop_ids))
    *_, guesses, right = check_equal(asking.run(engines(demo, 4), requests), asking.run(engines(demo), requests))
    assert 0 < right < guesses


@pytest.mark.parametrize(("block", "levels"), [(4, 1), (4, 4), (8, 2), (16, 3)])
def test_random_models_answer_the_same(tiny, engines, block, levels):
    """Sequences of all strategies side by side, with limits within a block."""
    requests = [
        GenerationRequest(
            tuple(range(1 + i, 4 + 3 * i)),
            2 * block + 3 * i,
            DecodingConfig(
                block, steps, strategy, 0.3, 3.0, temperature=temperature, repetition_penalty=1.2 if i % 2 else 1.0
            ),
            frozenset({7 * i, 7 * i + 3}),
            seed=i,
            record_steps=True,
        )
        for i, (strategy, (steps, temperature)) in enumerate(
            itertools.product(STRATEGIES, ((block, 0), (block // 2, 1.0)))
        )
    ]
    expected = engines.plain(tiny, requests)
    results = asking.run(engines(tiny, levels), requests)
    *_, guesses, right = check_equal(results, expected)
    check_forwards(results, expected)
    assert 0 < right < guesses


def in_flight(monkeypatch, engine):
    """Two steps in flight, with sizes padded as CUDA graphs pad them."""
    monkeypatch.setattr(engine, "steps_in_flight", 2)
    monkeypatch.setattr(Graphs, "__call__", lambda self, size, *others: self.run(rounded_up(self.sizes, size), *others))


@pytest.mark.parametrize(
    ("most", "free_rows"), [(3, 0), (3, forecast.FREE_ROWS), (speculation.MOST_GUESSES, forecast.FREE_ROWS)]
)
def test_as_on_a_gpu(demo, questions, engines, monkeypatch, most, free_rows):
    """Guesses that do not fit are discarded. With FREE_ROWS = 0, true blocks wait as well."""
    kinds = itertools.product(STRATEGIES, (0, 1.0))
    requests = [
        dataclasses.replace(recorded([prompt], DecodingConfig(4, None, strategy, temperature=temperature))[0], seed=i)
        for i, (prompt, (strategy, temperature)) in enumerate(zip(questions, kinds, strict=False))
    ]
    expected = engines.plain(demo, requests)
    engine = make_engine("native", demo, device="cpu", speculate=3, max_active=6)
    monkeypatch.setattr(forecast, "FREE_ROWS", free_rows)
    monkeypatch.setattr(speculation, "MOST_GUESSES", most)
    in_flight(monkeypatch, engine)
    passes, _, guesses, right = check_equal(asking.run(engine, requests), expected)
    assert right > 0
    assert guesses <= most * passes


@pytest.mark.parametrize("ahead", [False, True], ids=["one step in flight", "two"])
def test_preempted_sequences_lose_nothing(tiny, engines, monkeypatch, ahead):
    decodings = [DecodingConfig(4, None, s, temperature=t) for t in (0, 1.0) for s in STRATEGIES]
    requests = [
        dataclasses.replace(recorded([tuple(range(1, 9 + i))], decoding, limit=34)[0], seed=i)
        for i, decoding in enumerate(decodings)
    ]
    expected = engines.plain(tiny, requests)
    engine = make_engine("native", tiny, device="cpu", speculate=3, max_active=8, kv_pages=11)
    if ahead:
        in_flight(monkeypatch, engine)
    results = asking.run(engine, requests)
    assert engine.info.extra["preemptions"] > 0
    check_equal_after_preemption(results, expected)


def check_equal_after_preemption(results, expected):
    for ours, plain in zip(results, expected, strict=True):
        assert (ours.token_ids, ours.unmasked_at) == (plain.token_ids, plain.unmasked_at)
        assert ours.confidences == pytest.approx(plain.confidences, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("page", [4, 6, 16])
def test_prompts_that_share_their_beginning(demo, questions, monkeypatch, page):
    """Pages of other sizes: a guess's block begins at any offset in a page, and ends in the next page."""
    monkeypatch.setattr(native_engine, "PAGE_SIZE", page)
    common = questions[0]
    for block in (4, 8):
        decoding = DecodingConfig(block, None, "low_confidence_static", temperature=1.0)
        requests = recorded([common + other[:length] for length, other in enumerate(questions[1:7])], decoding)
        plain, engine = (make_engine("native", demo, device="cpu", speculate=s) for s in (False, 3))
        expected = asking.run(plain, requests)
        *_, right = check_equal(asking.run(engine, requests), expected)
        assert right > 0
        shared = plain.info.extra["shared_prompt_tokens"]
        assert engine.info.extra["shared_prompt_tokens"] == shared > 0


@pytest.mark.parametrize("ahead", [False, True], ids=["one step in flight", "two"])
def test_stop_strings_and_limits(demo, questions, engines, monkeypatch, ahead):
    """An answer may end at the first of several steps of a forward."""
    decoding = DecodingConfig(4, None, "sequential", temperature=0)
    whole = engines.plain(demo, recorded(questions[:8], decoding, limit=40))
    requests = [
        dataclasses.replace(request, stop_strings=(demo.decode(result.token_ids[5 + i : 7 + i]),))
        for i, (request, result) in enumerate(zip(recorded(questions[:8], decoding, limit=40), whole, strict=True))
    ]
    requests += [recorded([questions[i]], decoding, limit=limit)[0] for i, limit in enumerate(range(1, 14))]
    expected = engines.plain(demo, requests)
    assert sum(result.finish_reason == "stop" for result in expected) >= 8
    engine = make_engine("native", demo, device="cpu", speculate=3, max_active=5)
    if ahead:
        in_flight(monkeypatch, engine)
    passes, steps, *_ = check_equal(asking.run(engine, requests), expected)
    assert passes < steps / 1.3


@pytest.mark.parametrize("ahead", [False, True], ids=["one step in flight", "two"])
def test_closed_thoughts_and_loops(demo, questions, engines, monkeypatch, ahead):
    """The host puts tokens in behind a step; later steps of the same forward are discarded."""
    thinking = Thinking("</think>", (11, 12, 13), "<think>", opened=True, max_tokens=9)
    requests = [
        GenerationRequest(
            prompt, 40, DecodingConfig(4, None, strategy, temperature=1.0), seed=i, record_steps=True,
            thinking=thinking if i % 2 else None, repetition=Repetition(4, 2),
        )
        for i, (prompt, strategy) in enumerate(zip(questions, (*STRATEGIES, *STRATEGIES), strict=False))
    ]  # fmt: skip
    expected = engines.plain(demo, requests)
    assert sum(result.forced_tokens for result in expected) >= 9
    engine = make_engine("native", demo, device="cpu", speculate=3)
    if ahead:
        in_flight(monkeypatch, engine)
    check_equal(asking.run(engine, requests), expected)


@pytest.mark.parametrize("part", ["_guess", "_committed", "copy"])
@pytest.mark.parametrize("ahead", [False, True], ids=["one step in flight", "two"])
def test_out_of_memory_within_a_step_loses_no_step(demo, questions, engines, monkeypatch, part, ahead):
    decoding = DecodingConfig(4, 4, "sequential", temperature=1.0, repetition_penalty=1.3)
    requests = recorded(questions[:3], decoding)
    expected = engines.plain(demo, requests)
    engine = make_engine("native", demo, device="cpu", speculate=3)
    if ahead:
        in_flight(monkeypatch, engine)
    place = engine.runner.cache if part == "copy" else speculation
    work, calls = getattr(place, part), itertools.count(1)

    def fails_once(*given):
        if next(calls) == 6:  # `copy` runs twice a step: before the forward, and behind it
            raise torch.OutOfMemoryError
        return work(*given)

    monkeypatch.setattr(place, part, fails_once)
    check_equal_after_preemption(asking.run(engine, requests), expected)
    assert next(calls) > 6


def test_each_step_is_shown(demo, questions, engines):
    decoding = DecodingConfig(4, None, "low_confidence_static", temperature=1.0)
    requests = recorded(questions[:5], decoding)
    seen = []
    for levels in (False, 3):
        steps = {}
        dict(engines(demo, levels).generate_watched(requests, lambda s, to=steps: to.setdefault(s.index, []).append(s)))
        seen.append(steps)
    plain, ours = seen
    for index, steps in plain.items():
        assert [dataclasses.replace(s, confidences=()) for s in ours[index]] == [
            dataclasses.replace(s, confidences=()) for s in steps
        ]


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
def test_any_settings_answer_the_same(demo, questions, engines, data):
    block = data.draw(st.sampled_from([1, 2, 3, 4, 8]))
    kinds = st.builds(
        DecodingConfig,
        block_length=st.just(block),
        denoising_steps=st.integers(1, block),
        remasking_strategy=st.sampled_from(sorted(STRATEGIES)),
        confidence_threshold=st.floats(0.2, 0.95),
        eb_threshold=st.floats(0.05, 2),
        temperature=st.sampled_from([0, 0.5, 1.0]),
        top_k=st.sampled_from([0, 0, 5]),
        top_p=st.sampled_from([1.0, 1.0, 0.8]),
        repetition_penalty=st.sampled_from([1.0, 1.3]),
    )
    requests = [
        GenerationRequest(
            questions[data.draw(st.integers(0, 199))][: data.draw(st.integers(1, 60))],
            data.draw(st.integers(1, 20)),
            data.draw(kinds),
            frozenset(demo.stop_ids),
            seed=data.draw(st.integers(0, 2**64 - 1)),
            record_steps=True,
        )
        for _ in range(data.draw(st.integers(1, 4)))
    ]
    results = asking.run(engines(demo, data.draw(st.sampled_from(LEVELS))), requests)
    check_equal(results, asking.run(engines(demo), requests))


@pytest.mark.parametrize(
    ("strategy", "temperature", "least"),
    [("low_confidence_static", 0, 2.0), ("low_confidence_static", 1.0, 2.0), ("sequential", 0, 2.4)],
)
def test_passes_are_saved(demo, questions, engines, strategy, temperature, least):
    """A pass makes at least twice the tokens; passes are counted where the model runs."""
    decoding = DecodingConfig(4, 4, strategy, temperature=temperature)
    requests = recorded(questions[:1], decoding, limit=64, stop_ids=frozenset(demo.stop_ids))
    passes, answers = [], []
    for levels in (False, 3):
        engine = engines(demo, levels)
        hook = engine.model.model.register_forward_hook(lambda *_, to=passes: to.append(True))
        before = len(passes)
        answers.append(asking.run(engine, requests))
        passes[before:] = [len(passes) - before - answers[-1][0].prefill_forwards]
        hook.remove()
    plain, ours = passes
    assert plain == answers[0][0].denoising_forwards == answers[1][0].denoising_forwards
    assert ours == answers[1][0].speculation.passes
    assert plain >= least * ours


def test_a_request_whose_guess_is_not_finite_is_answered(demo, questions, engines, monkeypatch):
    """A request is repeated without guesses: a guess may be at fault, though no true state is."""
    requests = recorded(questions[:3], DecodingConfig(4, 4, "low_confidence_static", temperature=0))
    expected = engines.plain(demo, requests)
    engine = make_engine("native", demo, device="cpu", speculate=2)
    collect = engine.runner.collect

    def spoilt():
        outcome = collect()
        for step in outcome.later:
            step.stuck[:] |= step.took_part
        return outcome

    monkeypatch.setattr(engine.runner, "collect", spoilt)
    results = asking.run(engine, requests)
    assert tokens_of(results) == tokens_of(expected)


def test_a_slots_next_sequence_has_no_guesses_of_the_former_one(tiny, engines):
    requests = [GenerationRequest((1, 2, 3 + i), 3 + i % 6, DecodingConfig(temperature=0), seed=i) for i in range(12)]
    engine = make_engine("native", tiny, device="cpu", speculate=4, max_active=2)
    begin, collect, entered, seen = engine.runner.begin, engine.runner.collect, [], []

    def beginning(sequences):
        entered[:] = [sequence.slot for sequence in sequences]
        begin(sequences)

    def collecting():
        outcome = collect()
        seen.extend(level.ran[entered] for level in outcome.guesses)
        return outcome

    engine.runner.begin, engine.runner.collect = beginning, collecting
    assert tokens_of(asking.run(engine, requests)) == tokens_of(asking.run(engines(tiny), requests))
    assert sum(map(len, seen)) == 4 * len(requests)
    assert not any(ran.any() for ran in seen)


def mixed(questions, count, **settings):
    kinds = itertools.islice(itertools.product((0, 1.0), STRATEGIES), count)
    return [
        dataclasses.replace(recorded([prompt], DecodingConfig(4, None, strategy, temperature=t), **settings)[0], seed=i)
        for i, (prompt, (t, strategy)) in enumerate(zip(questions, kinds, strict=False))
    ]


@pytest.mark.parametrize("ahead", [False, True], ids=["one step in flight", "two"])
def test_the_depth_may_change_at_every_step(demo, questions, engines, monkeypatch, ahead):
    """speculate=auto on a GPU, which measures no time here: the depths are random."""
    requests = mixed(questions, 8, stop_ids=frozenset(demo.stop_ids))
    expected = engines.plain(demo, requests)
    rng, taken = random.Random(0), set()

    def any_depth(self, active):
        taken.add(depth := rng.randrange(5))
        return depth, False

    monkeypatch.setattr(Depths, "next", any_depth)
    engine = make_engine("native", demo, device="cpu", speculate=4, max_active=5)
    monkeypatch.setattr(engine.runner, "_chosen", True)
    if ahead:
        in_flight(monkeypatch, engine)
    results = asking.run(engine, requests)
    assert taken == {0, 1, 2, 3, 4}
    check_equal_after_preemption(results, expected)
    assert sum(result.speculation.right for result in results) > 0


def test_without_a_step_in_flight_every_guess_runs(demo, questions):
    """The host knows the sizes of the next step's guesses."""
    engine = make_engine("native", demo, device="cpu", speculate=3, max_active=4)
    collect, wanted, ran = engine.runner.collect, [], []

    def noting():
        outcome = collect()
        ran.append([level.ran for level in outcome.guesses])
        wanted.append([level.segments > 0 for level in outcome.guesses])
        return outcome

    engine.runner.collect = noting
    asking.run(engine, mixed(questions, 4))
    assert len(ran) > 10
    for before, now in itertools.pairwise(zip(wanted, ran, strict=True)):
        assert all((a == b).all() for a, b in zip(before[0], now[1], strict=True))


def test_without_it_nothing_is_allocated_or_counted(demo, questions, engines):
    engine = engines(demo)
    (result,) = asking.run(engine, recorded(questions[:1], DecodingConfig()))
    assert result.speculation is None
    assert "speculate" not in engine.info.extra
    assert len(engine.runner.cache.table) == engine.runner.batch.slots + 1


def test_memory_that_guesses_fill_is_named(tiny, monkeypatch):
    """The pages of guesses take all memory, and more."""
    request = GenerationRequest((1, 2, 3), 8, DecodingConfig(64))
    engine = make_engine("native", tiny, device="cpu", speculate=4, max_active=8)
    monkeypatch.setattr(native_engine, "CPU_CACHE_BYTES", 50 * engine.runner.cache.bytes_per_page)
    with pytest.raises(
        UserError, match=r"there are 0, 0\.0 MiB\..* Guesses take 72 pages more, .* MiB: a smaller speculate,"
    ):
        asking.run(engine, [request])
    plain = make_engine("native", tiny, device="cpu", max_active=8)
    assert len(asking.run(plain, [request])[0].token_ids) == 8
    assert len(asking.run(make_engine("native", tiny, device="cpu", speculate=1), [request])[0].token_ids) == 8


@pytest.mark.parametrize("given", [5, -1, True, "yes", 1.5, ""])
def test_other_values_are_refused(demo, given):
    with pytest.raises(UserError, match=r"^speculate=.* is unknown; choose false, auto, or 1 to 4\.$"):
        make_engine("native", demo, device="cpu", speculate=given)


@pytest.mark.parametrize("given", [2, "2"])
def test_text_is_read(demo, given):
    assert make_engine("native", demo, device="cpu", speculate=given).info.extra["speculate"] == 2


@pytest.mark.slow
def test_compiled_it_is_the_same(tiny, engines, monkeypatch):
    """torch's front end takes each part as a whole, once for all levels and for steps of any size above 1."""
    requests = recorded([(1, 2, 3), (4, 5, 6, 7, 8)], DecodingConfig(4, 4, "low_confidence_static", temperature=0))
    expected = engines.plain(tiny, requests)
    compilations = []

    def counting(graph, inputs):
        compilations.append(graph)
        return graph.forward

    engine = make_engine("native", tiny, device="cpu", speculate=4)
    engine.runner.compile(counting)
    in_flight(monkeypatch, engine)
    check_equal(asking.run(engine, requests), expected)
    assert len(compilations) == 4


def test_a_state_that_differs_is_no_guess():
    """The whole state counts: tokens, masks, the block before, and where the block begins."""
    batch = BatchState(2, 4, 1, 50, 49, strategies=frozenset(STRATEGIES), penalized=False, device=torch.device("cpu"))
    batch.uncommitted[1] = batch.active[:2] = True
    rows, truth = batch.slots + 1, batch.blocks
    drawn = Drawn(*(torch.zeros(rows, 4, dtype=dtype) for dtype in (torch.int64, torch.float32, torch.float32)))
    _, changes = batch.transition(truth, batch.settings, batch.active & False, drawn)
    both = Changes(*(torch.cat([field, field]) for field in changes))

    def leads_to(guess):
        after, blocks = (Blocks(*map(torch.cat, zip(truth, other, strict=True))) for other in (truth, guess))
        return speculation._leads_to(after, both, blocks, rows).tolist()[:2]

    assert leads_to(truth) == [True, True]
    unequal = {"tokens": 3, "masked": True, "start": 4, "uncommitted": False, "previous": 5}
    for name, value in unequal.items():
        other = getattr(truth, name).clone()
        other[:2].reshape(2, -1)[:, -1] = value  # of a block, its last position
        assert leads_to(truth._replace(**{name: other})) == [name in ("previous", "uncommitted"), False], name
