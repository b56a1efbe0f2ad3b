"""The native engine on a GPU, against itself on the CPU. `python -m pytest tests/gpu` on a machine with CUDA."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from asking import ask, run
from scipy.stats import binomtest
from support import random_checkpoint, read_weights, write_weights

from sdar_lm_eval import Checkpoint, DecodingConfig, EngineError, GenerationRequest, make_engine
from sdar_lm_eval.demo import golds
from sdar_lm_eval.engines.agreement import Float32Judge
from sdar_lm_eval.engines.native.forward.fused import FusedForward
from sdar_lm_eval.engines.native.forward.graphs import Graphs
from sdar_lm_eval.engines.native.forward.timings import Timings
from sdar_lm_eval.engines.native.strategies import STRATEGIES
from sdar_lm_eval.engines.types import LikelihoodConfig, ScoreRequest
from sdar_lm_eval.thinking import Thinking

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")


KERNELS = pytest.mark.parametrize("kernels", [False, True], ids=["modules", "kernels"])


def requests(demo, questions, **settings):
    return ask(demo, questions, DecodingConfig(**{"temperature": 0, **settings}))


def tokens(demo, wanted, **options):
    return [result.token_ids for result in run(make_engine("native", demo, **options), wanted)]


@pytest.fixture(scope="module")
def on_cpu(demo):
    """Answers of the engine on the CPU, each asked for once."""
    known = {}

    def answers(wanted):
        key = tuple(wanted)
        if key not in known:
            known[key] = tokens(demo, wanted, device="cpu")
        return known[key]

    return answers


def check_ties(demo, wanted, on_gpu, on_cpu, most):
    """At most so many answers differ, each by a rounding of float32 at a tie."""
    differing = [i for i, (ours, cpus) in enumerate(zip(on_gpu, on_cpu, strict=True)) if ours != cpus]
    assert len(differing) <= most
    judge = Float32Judge(demo) if differing else None
    for i in differing:
        assert max(judge.roundings(wanted[i], on_gpu[i])) <= 1e-4


def right(demo, answers):
    return [demo.decode(a).endswith(f"#### {gold}") for a, gold in zip(answers, golds(), strict=True)]


@pytest.mark.parametrize("strategy", STRATEGIES)
@KERNELS
def test_float32_answers_are_the_cpus(demo, questions, on_cpu, strategy, kernels):
    wanted = requests(demo, questions, remasking_strategy=strategy)
    on_gpu = tokens(demo, wanted, device="cuda", dtype="float32", kernels=kernels)
    # Question 42 meets a tie: rounding of 1e-5 turns it.
    check_ties(demo, wanted, on_gpu, on_cpu(wanted), most=int(strategy == "sequential"))


@KERNELS
def test_closed_thoughts_are_the_cpus(demo, questions, on_cpu, kernels):
    """A sequence enters the batch again while a step with its former tokens is in flight; some end by stop strings."""
    end_ids = tuple(demo.tokenizer.encode("</think>", add_special_tokens=False))
    plain = requests(demo, questions, remasking_strategy="low_confidence_static")
    thoughts = [Thinking("</think>", end_ids, "<think>", opened=True, max_tokens=5 + i % 9) for i in range(len(plain))]
    wanted = [
        dataclasses.replace(request, thinking=thinking, stop_strings=(".",) * (i % 2))
        for i, (request, thinking) in enumerate(zip(plain, thoughts, strict=True))
    ]
    expected = on_cpu(wanted)
    assert all(answer[5 + i % 9 : 5 + i % 9 + len(end_ids)] == end_ids for i, answer in enumerate(expected))
    for options in ({}, {"max_active": 32, "kv_pages": 100}):
        on_gpu = tokens(demo, wanted, device="cuda", dtype="float32", kernels=kernels, **options)
        assert [i for i, (a, b) in enumerate(zip(on_gpu, expected, strict=True)) if a != b] == []


@pytest.mark.parametrize("settings", [{"temperature": 1.0}, {"temperature": 0.8, "top_k": 5, "top_p": 0.9}], ids=str)
@KERNELS
def test_draws_are_the_cpus(demo, questions, on_cpu, settings, kernels):
    wanted = requests(demo, questions[:50], remasking_strategy="sequential", **settings)
    on_gpu = tokens(demo, wanted, device="cuda", dtype="float32", kernels=kernels)
    # A draw that falls on the border between two tokens may go either way by rounding.
    assert sum(a == b for a, b in zip(on_gpu, on_cpu(wanted), strict=True)) >= 49


@pytest.mark.parametrize("strategy", ["low_confidence_static", "low_confidence_dynamic", "sequential"])
@KERNELS
def test_bfloat16_is_right_as_often_as_float32(demo, questions, on_cpu, strategy, kernels):
    """The table of accuracy moves by rounding alone: up to 6 of 200 answers on the CPU, to either side."""
    wanted = requests(demo, questions, remasking_strategy=strategy)
    exact = right(demo, on_cpu(wanted))
    rounded = right(demo, tokens(demo, wanted, device="cuda", dtype="bfloat16", kernels=kernels))
    lost, won = (sum(a > b for a, b in zip(*pair, strict=True)) for pair in ((exact, rounded), (rounded, exact)))
    print(f"{strategy}: float32 on the CPU {sum(exact)}, bfloat16 on the GPU {sum(rounded)}: {lost} lost, {won} won")
    assert lost + won <= 16
    assert binomtest(lost, max(lost + won, 1)).pvalue > 0.01


@KERNELS
def test_few_pages_and_few_slots_change_nothing(demo, questions, kernels):
    wanted = requests(demo, questions[:40])
    options = {"device": "cuda", "dtype": "float32", "kernels": kernels}
    whole = tokens(demo, wanted, **options)
    assert tokens(demo, wanted, **options, kv_pages=40) == whole
    assert tokens(demo, wanted, **options, max_active=3) == whole


@pytest.mark.parametrize("length", [1, 8, 32, 64])
def test_other_block_lengths(demo, questions, on_cpu, length):
    wanted = requests(demo, questions[:20], block_length=length, denoising_steps=max(length // 2, 1))
    on_gpu = tokens(demo, wanted, device="cuda", dtype="float32", kernels=True)
    # The checkpoint was not trained for blocks of one token: it is sure of little.
    check_ties(demo, wanted, on_gpu, on_cpu(wanted), most=int(length == 1))


def test_block_lengths_mix(demo, questions, on_cpu):
    wanted = [
        request
        for i, length in enumerate([4, 16, 1, 8, 4, 32])
        for request in requests(demo, questions[i : i + 1], block_length=length, denoising_steps=length)
    ]
    assert tokens(demo, wanted, device="cuda", dtype="float32", kernels=True) == on_cpu(wanted)


def test_a_long_context(demo, questions, on_cpu):
    """Of several splits: prompts of thousands of tokens, beside short ones."""
    long = tuple(token for question in questions[:40] for token in question)
    assert len(long) > 2000
    wanted = requests(demo, [long[-1500:], questions[0], long[-2000:], long[:600]])
    assert tokens(demo, wanted, device="cuda", dtype="float32", kernels=True) == on_cpu(wanted)


@KERNELS
def test_prompts_that_share_their_beginning(demo, questions, on_cpu, kernels):
    front = tuple(token for question in questions[:10] for token in question)[:600]
    wanted = requests(demo, [(*front, *question) for question in questions[:40]])
    options = {"device": "cuda", "dtype": "float32", "kernels": kernels}
    assert tokens(demo, wanted, **options) == tokens(demo, wanted, **options, share_prefixes=False) == on_cpu(wanted)


@pytest.mark.parametrize(
    "settings", [{}, {"top_k": 50}, {"repetition_penalty": 1.2, "temperature": 0}], ids=["plain", "top-k", "penalty"]
)
@pytest.mark.parametrize(
    ("products", "vocabulary"),
    [("of fixed size", 711), ("of fixed size", 1501), ("by the kernel for Hopper GPUs", 720)],
)
def test_reproducible_to_the_bit(demo, questions, products, vocabulary, settings, tmp_path):
    """In bfloat16, where what runs beside a request would show in its confidences; one has a context of two splits.

    711 is the demo's own: no multiple of 8, which the kernel asks for, so that products have one size.
    """
    checkpoint = demo
    if vocabulary != 711:
        sizes = {"vocab_size": vocabulary, "head_dim": 64, "hidden_size": 256, "intermediate_size": 512}
        checkpoint = Checkpoint.open(str(random_checkpoint(tmp_path, **sizes)))
    if products != "of fixed size" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("takes a Hopper GPU")
    long = tuple(token for question in questions[:20] for token in question)[:600]
    wanted = ask(checkpoint, [long, *questions], DecodingConfig(**settings), record_steps=True)

    def answers(order, **options):
        engine = make_engine("native", checkpoint, device="cuda", dtype="bfloat16", **options)
        if options.get("reproducible"):
            assert engine.runner.forward.fixed_rows == (products == "of fixed size")
        results = run(engine, order)
        return {request.seed: (r.token_ids, r.confidences) for request, r in zip(order, results, strict=True)}

    together = answers(wanted, reproducible=True)
    assert answers(wanted[::-1], reproducible=True, max_active=7) == together
    assert answers(wanted, reproducible=True, kv_pages=100, share_prefixes=False) == together
    alone = answers(wanted[5:6], reproducible=True)
    assert alone == {5: together[5]}
    if not settings:
        assert answers(wanted) != answers(wanted[::-1], max_active=7)


EXPERTS = {
    "moe": True, "head_dim": 64, "hidden_size": 256, "moe_intermediate_size": 128, "num_experts": 16,
    "num_experts_per_tok": 4, "num_hidden_layers": 3, "mlp_only_layers": [1],
}  # fmt: skip


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7, "remasking_strategy": "random"}], ids=str)
def test_experts_float32_answers_are_the_cpus(questions, settings, tmp_path):
    checkpoint = Checkpoint.open(str(random_checkpoint(tmp_path, **EXPERTS)))
    wanted = ask(checkpoint, questions[:24], DecodingConfig(**{"temperature": 0, **settings}))
    expected = tokens(checkpoint, wanted, device="cpu")
    for options in ({"kernels": False}, {}, {"max_active": 3}, {"kv_pages": 60}, {"reproducible": True}):
        got = tokens(checkpoint, wanted, device="cuda", dtype="float32", **options)
        # A draw that falls on the border between two tokens may go either way by rounding.
        differing = sum(ours != cpus for ours, cpus in zip(got, expected, strict=True))
        assert differing <= (1 if settings else 0), options


def test_experts_reproducible_to_the_bit(questions, tmp_path):
    """In bfloat16, alone and beside others; a preempted sequence's decided blocks are prefilled."""
    checkpoint = Checkpoint.open(str(random_checkpoint(tmp_path, **EXPERTS, vocab_size=1000)))
    wanted = ask(checkpoint, questions[:80], DecodingConfig(), record_steps=True)

    def answers(order, **options):
        engine = make_engine("native", checkpoint, device="cuda", dtype="bfloat16", reproducible=True, **options)
        results = run(engine, order)
        return {request.seed: (r.token_ids, r.confidences) for request, r in zip(order, results, strict=True)}

    together = answers(wanted)
    assert answers(wanted[::-1], max_active=7) == together
    assert answers(wanted, kv_pages=100, share_prefixes=False) == together
    assert answers(wanted[5:6]) == {5: together[5]}


@KERNELS
def test_sampled_frequencies_follow_the_softmax(demo, questions, kernels):
    """20,000 draws of one token against softmax(logits / T): top-k off is really off."""
    from scipy.stats import chisquare

    decoding = DecodingConfig(block_length=1, temperature=1.5)
    prompt = requests(demo, questions[:1])[0].prompt_ids
    wanted = [GenerationRequest(prompt, 1, decoding, seed=i) for i in range(20_000)]
    drawn = torch.tensor([t[0] for t in tokens(demo, wanted, device="cuda", dtype="float32", kernels=kernels)])
    model = demo.load_model(dtype=torch.float32, device="cuda", attention="sdpa")
    ids = torch.tensor([[*prompt, demo.mask_token_id]], device="cuda")
    causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device="cuda").tril()[None, None]
    with torch.no_grad():
        logits = model(ids, attention_mask=causal).logits[0, -1].cpu()
    logits[demo.mask_token_id] = -torch.inf
    expected = (logits / 1.5).softmax(-1).double() * len(drawn)
    counts = torch.bincount(drawn, minlength=len(expected)).double()
    common = expected >= 5
    observed = torch.cat([counts[common], counts[~common].sum()[None]])
    wanted_counts = torch.cat([expected[common], expected[~common].sum()[None]])
    assert chisquare(observed, wanted_counts * observed.sum() / wanted_counts.sum()).pvalue > 1e-3


def test_kernels_and_graphs_are_there_before_the_first_request(demo, questions):
    """What compiling takes is part of loading: `prepare` runs short requests, and the first real ones are no slower."""
    engine = make_engine("native", demo, device="cuda", kernels=True)
    wanted = requests(demo, questions[:64])
    engine.prepare(wanted)
    assert engine.runner._forward_graphs._graphs
    assert engine.runner._draw_graphs._graphs
    assert engine.info.extra["shared_prompt_tokens"] == 0
    fresh = make_engine("native", demo, device="cuda", kernels=True)
    assert [r.token_ids for r in run(engine, wanted)] == [r.token_ids for r in run(fresh, wanted)]


@KERNELS
def test_one_request_with_nan_costs_the_others_nothing(tmp_path, kernels):
    clean = random_checkpoint(tmp_path / "clean", head_dim=64)
    generator = torch.Generator().manual_seed(0)
    decoding = DecodingConfig(temperature=0)
    prompts = torch.randint(5, 600, (32, 20), generator=generator).tolist()
    wanted = [GenerationRequest(tuple(prompt), 24, decoding) for prompt in prompts]
    expected = tokens(Checkpoint.open(str(clean)), wanted, device="cuda", dtype="float32", kernels=kernels)
    bad = next(t for t in range(600, 700) if all(t not in answer for answer in expected))

    spoilt = random_checkpoint(tmp_path / "spoilt", head_dim=64)
    weights = read_weights(spoilt)
    weights["model.embed_tokens.weight"][bad] = torch.nan
    write_weights(spoilt, weights)
    engine = make_engine("native", Checkpoint.open(str(spoilt)), device="cuda", dtype="float32", kernels=kernels)
    poisoned = dataclasses.replace(wanted[0], prompt_ids=(bad, *wanted[0].prompt_ids))
    results = {}
    with pytest.raises(EngineError, match=r"1 of 33 requests have no answer.*Number 7: "):
        results.update(engine.generate([*wanted[:7], poisoned, *wanted[7:]]))
    assert [results[i].token_ids for i in sorted(results)] == expected


def test_a_rule_that_reads_a_value_on_the_host_is_an_error(demo, questions, monkeypatch):
    """A CUDA graph would replay what the rule read once."""

    def reads(candidates):
        return candidates.quota + int(candidates.quota.max())

    strategy = dataclasses.replace(STRATEGIES["sequential"], count=reads)
    monkeypatch.setitem(STRATEGIES, "sequential", strategy)
    wanted = requests(demo, questions[:4], remasking_strategy="sequential")
    with pytest.raises(RuntimeError, match="captur"):
        tokens(demo, wanted, device="cuda", kernels=True)


@KERNELS
def test_watched_steps_come_to_the_results(demo, questions, kernels):
    """Each step is shown while the next one runs."""
    wanted = [dataclasses.replace(request, record_steps=True) for request in requests(demo, questions[:40])]
    engine = make_engine("native", demo, device="cuda", dtype="float32", kernels=kernels)
    steps = {i: [] for i in range(len(wanted))}
    results = dict(engine.generate_watched(wanted, lambda step: steps[step.index].append(step)))
    for i, result in results.items():
        decided = [step for step in steps[i] if step.decided]
        assert tuple(token for step in decided for token in step.token_ids) == result.token_ids
        assert tuple(at for step in decided for at in step.unmasked_at) == result.unmasked_at
        assert tuple(sure for step in decided for sure in step.confidences) == result.confidences
        assert len(steps[i]) == result.denoising_forwards and steps[i][-1].finished
    unwatched = tokens(demo, wanted, device="cuda", dtype="float32", kernels=kernels)
    assert [results[i].token_ids for i in range(len(wanted))] == unwatched


def test_python_collects_no_earlier_graph_during_a_capture():
    """An earlier engine in a reference cycle waits for Python's garbage collector."""
    x = torch.zeros(4, device="cuda")
    earlier = Graphs(lambda size: x.mul_(1), (4,), enabled=True)
    earlier(4)
    cycle = [earlier]
    cycle.append(cycle)
    waiting = [cycle]
    del earlier, cycle

    def add(size):
        if torch.cuda.is_current_stream_capturing():
            waiting.clear()
            assert [[] for _ in range(100_000)]  # enough objects to start collections of all generations
        x.add_(1)

    graphs = Graphs(add, (4,), enabled=True)
    graphs(4)  # runs, then captures
    graphs(4)  # replays
    assert x.tolist() == [2.0] * 4


def test_times_are_measured_once(demo, questions, monkeypatch, tmp_path):
    """Another engine reads the times. Fewer slots need no other times; with or without them, the answers are equal."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    measured, names = Timings._measured, []

    def counted(self, run, rows):
        names.append({name.split(",")[0] for name in rows})
        times = measured(self, run, rows)
        assert all(0 < seconds < 1 for own in times.values() for seconds in own.values())
        return times

    monkeypatch.setattr(Timings, "_measured", counted)
    wanted = requests(demo, questions[:40])
    first, again, few = (tokens(demo, some, device="cuda", dtype="float32") for some in (wanted, wanted, wanted[:9]))
    assert names == [{"products"}, {"the products of two layers"}, {"drawing"}]
    assert first == again and few == first[:9]


@pytest.mark.parametrize("moe", [False, True])
def test_every_kernel_of_a_product_gives_nearly_the_same_scores(tmp_path, moe):
    """In 16 bits, where experts have tiles of several sizes. The order of the kernels' sums differs."""
    sizes = {"vocab_size": 711, "head_dim": 64, "hidden_size": 256, "intermediate_size": 512}
    checkpoint = Checkpoint.open(str(random_checkpoint(tmp_path, **sizes, **({"moe": True} if moe else {}))))
    engine = make_engine("native", checkpoint, device="cuda")
    wanted = [ScoreRequest((1, 2, 3), tuple(range(4, 4 + n))) for n in (3, 9, 400)]

    def scores():
        results = dict(engine.score(wanted, LikelihoodConfig()))
        return [results[i].log_likelihood for i in range(len(wanted))]

    expected = scores()
    for choice in engine.runner.forward.decoder.choices.values():
        for wanted_kernel in choice.kernels if choice.measured else ():
            choice.choose({
                kernel: dict.fromkeys(rows, 1.0 if kernel == wanted_kernel else 2.0)
                for kernel, rows in choice.measured.items()
            })  # fmt: skip
            assert scores() == pytest.approx(expected, rel=0.02)


def test_reproducible_kernels_are_not_chosen_by_times(demo, monkeypatch):
    """Two processes may measure different times."""
    monkeypatch.setattr(FusedForward, "choose_kernels", lambda self: pytest.fail("chosen by times"))
    make_engine("native", demo, device="cuda", reproducible=True).close()
