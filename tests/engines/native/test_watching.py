"""Watched denoising steps: replayed, they are the results, token by token; who watches changes nothing."""

from __future__ import annotations

import dataclasses
import itertools
from collections import defaultdict

import pytest
from asking import GREEDY, random_prompts, run

from sdar_lm_eval import DecodingConfig, GenerationRequest, make_engine
from sdar_lm_eval.demo import prompts
from sdar_lm_eval.engines.native.strategies import STRATEGIES
from sdar_lm_eval.engines.types import Watchable
from sdar_lm_eval.errors import EngineError
from sdar_lm_eval.thinking import Thinking


def watched(checkpoint, requests, ahead=False, **options):
    """The steps by request, and the results in order."""
    engine = make_engine("native", checkpoint, device="cpu", **options)
    engine.steps_in_flight = 1 + ahead
    steps = defaultdict(list)
    pairs = dict(engine.generate_watched(requests, lambda step: steps[step.index].append(step)))
    return steps, [pairs[i] for i in range(len(requests))], engine


def replay(steps, mask):
    """What the steps of one request come to: (tokens, unmasked_at, confidences). A preempted block begins again."""
    written, before = ([], [], []), None
    for step in steps:
        assert step.start == len(written[0])  # no block is passed over
        masked = [token == mask for token in step.token_ids]
        assert masked == [at == -1 for at in step.unmasked_at]
        assert all(
            confidence == 1 if is_masked else 0 < confidence <= 1
            for confidence, is_masked in zip(step.confidences, masked, strict=True)
        )
        at = max(step.unmasked_at, default=0)
        begins = before is None or before.decided or (at == 0 and not step.decided)
        # The step that decides a block may have unmasked the stop token, which is not shown.
        assert begins or step.decided or at == max(before.unmasked_at) + 1
        if not begins:  # what was unmasked stays
            kept = [i for i, at in enumerate(before.unmasked_at[: len(step.token_ids)]) if at >= 0]
            assert [(step.token_ids[i], step.unmasked_at[i], step.confidences[i]) for i in kept] == [
                (before.token_ids[i], before.unmasked_at[i], before.confidences[i]) for i in kept
            ]
        if step.decided:
            assert not any(masked)
            for column, values in zip(written, (step.token_ids, step.unmasked_at, step.confidences), strict=True):
                column += values
        assert step is steps[-1] or not step.finished
        before = step
    assert before.finished and before.decided
    return tuple(map(tuple, written))


def check(checkpoint, requests, ahead=False, **options):
    """Assert that the replayed steps are the results, and that the results are those that nobody watches."""
    requests = [dataclasses.replace(request, record_steps=True) for request in requests]
    steps, results, engine = watched(checkpoint, requests, ahead, **options)
    for i, result in enumerate(results):
        recorded = result.token_ids, result.unmasked_at, result.confidences
        assert replay(steps[i], checkpoint.mask_token_id) == recorded
        assert len(steps[i]) == result.denoising_forwards
    unwatched = make_engine("native", checkpoint, device="cpu", **options)
    unwatched.steps_in_flight = 1 + ahead
    again = [dataclasses.replace(result, seconds=0) for result in run(unwatched, requests)]
    assert [dataclasses.replace(result, seconds=0) for result in results] == again
    return steps, engine


@pytest.fixture(scope="module")
def requests(tiny):
    """Every strategy, greedy and sampled, prompts that end in the middle of a block, penalties, stop tokens."""
    return [
        GenerationRequest(
            prompt,
            9 + i,
            DecodingConfig(
                remasking_strategy=name,
                temperature=i % 2,
                confidence_threshold=0.4,
                eb_threshold=2.0,
                denoising_steps=(4, 2, 3)[i % 3],
                repetition_penalty=(1.0, 1.3)[i // len(STRATEGIES)],
            ),
            stop_ids=frozenset(range(0, 700, 20)),
            seed=i,
        )
        for i, (name, prompt) in enumerate(
            zip(itertools.cycle(STRATEGIES), random_prompts(range(3, 3 + 2 * len(STRATEGIES)), seed=3), strict=False)
        )
    ]


@pytest.mark.parametrize("ahead", [False, True])
def test_the_steps_replay_to_the_results(tiny, requests, ahead):
    check(tiny, requests, ahead=ahead, max_active=4)


@pytest.mark.parametrize("ahead", [False, True])
def test_steps_of_a_preempted_block_begin_again(tiny, ahead):
    requests = [GenerationRequest(prompt, 24, GREEDY) for prompt in random_prompts([20] * 6, seed=5)]
    _, engine = check(tiny, requests, ahead=ahead, kv_pages=8)
    assert engine.info.extra["preemptions"] > 0


@pytest.mark.parametrize("ahead", [False, True])
def test_prompts_that_share_their_beginning(tiny, ahead):
    (front,) = random_prompts([40], seed=7)
    requests = [GenerationRequest((*front, i), 10, GREEDY) for i in range(4)]
    _, engine = check(tiny, requests, ahead=ahead, max_active=2)
    assert engine.info.extra["shared_prompt_tokens"] > 0


@pytest.mark.parametrize("ahead", [False, True])
def test_a_stop_string_ends_the_steps(demo, ahead):
    """The step after the string, which a device with a step in flight runs, is not shown."""
    stop = frozenset(demo.stop_ids)
    requests = [GenerationRequest(p, 64, GREEDY, stop, stop_strings=(" so", "###")) for p in prompts(demo)[:4]]
    steps, _ = check(demo, requests, ahead=ahead)
    for i in range(len(requests)):
        text = demo.decode([token for step in steps[i] if step.decided for token in step.token_ids])
        assert steps[i][-1].finished and (" so" in text or "###" in text)


def test_a_watcher_that_raises_ends_the_run_and_frees_the_engine(tiny, requests):
    engine = make_engine("native", tiny, device="cpu")

    def refuse(step):
        raise InterruptedError

    with pytest.raises(InterruptedError):
        list(engine.generate_watched(requests, refuse))
    assert len(list(engine.generate(requests))) == len(requests)


def test_engines_that_show_steps_say_so(tiny):
    engine = make_engine("native", tiny, device="cpu")
    assert isinstance(engine, Watchable)
    engine.close()
    with pytest.raises(EngineError, match="is closed"):
        list(engine.generate_watched([], print))


@pytest.mark.parametrize("ahead", [False, True])
def test_closed_thoughts(demo, ahead):
    """The steps replay to the results, the think end included, in any batch, with preemptions and sampled tokens."""
    ends = tuple(demo.tokenizer.encode("</think>", add_special_tokens=False))
    asked = [
        GenerationRequest(
            tuple(demo.tokenizer.encode(f"{i} + {i} =", add_special_tokens=False)), 28, DecodingConfig(), seed=i,
            record_steps=True, thinking=Thinking("</think>", ends, "<think>", opened=True, max_tokens=3 + i),
        )
        for i in range(4)
    ]  # fmt: skip
    steps, results, _ = watched(demo, asked, ahead)
    for i, result in enumerate(results):
        assert result.token_ids[3 + i : 3 + i + len(ends)] == ends
        assert (result.forced_tokens, len(result.token_ids)) == (len(ends), 28)
        told = [[*column] for column in ((), (), ())]
        for step in steps[i]:
            if step.decided:
                assert step.start == len(told[0])
                for column, values in zip(told, (step.token_ids, step.unmasked_at, step.confidences), strict=True):
                    column += values
        assert tuple(map(tuple, told)) == (result.token_ids, result.unmasked_at, result.confidences)
        first, length = 3 + i, asked[i].decoding.block_length
        position = len(asked[i].prompt_ids) + first  # of the think end, whose step follows the block's kept tokens
        kept = result.unmasked_at[max(0, first - position % length) : first] if position % length else ()
        assert result.unmasked_at[first] == max(kept, default=-1) + 1
        assert result.confidences[first : first + len(ends)] == (1,) * len(ends)
    for options in ({"max_active": 1}, {"kv_pages": 8, "max_active": 8}, {"share_prefixes": False}):
        steps, again, engine = watched(demo, asked, ahead, **options)
        assert [r.token_ids for r in again] == [r.token_ids for r in results]
        assert [r.unmasked_at for r in again] == [r.unmasked_at for r in results]
        assert engine.info.extra["preemptions"] > 0 or "kv_pages" not in options
