"""The native engine on a GPU, against itself on the CPU. `python -m pytest tests/gpu` on a machine with CUDA."""

from __future__ import annotations

import pytest
import torch

from sdar_lm_eval import DecodingConfig, GenerationRequest, make_engine
from sdar_lm_eval.demo import golds
from sdar_lm_eval.engines.base import STRATEGIES

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")


def requests(demo, questions, **settings):
    decoding = DecodingConfig(**{"temperature": 0, **settings})
    return [
        GenerationRequest(prompt, 128, decoding, frozenset(demo.stop_ids), seed=i) for i, prompt in enumerate(questions)
    ]


def run(demo, wanted, **options):
    results = dict(make_engine("native", demo, **options).generate(wanted))
    return [results[i].token_ids for i in range(len(wanted))]


def accuracy(demo, answers):
    right = [demo.decode(a).endswith(f"#### {gold}") for a, gold in zip(answers, golds(), strict=True)]
    return sum(right) / len(right)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_float32_answers_are_the_cpus(demo, questions, strategy):
    wanted = requests(demo, questions, remasking_strategy=strategy)
    on_gpu = run(demo, wanted, device="cuda", dtype="float32")
    on_cpu = run(demo, wanted, device="cpu")
    differing = [i for i, (a, b) in enumerate(zip(on_gpu, on_cpu, strict=True)) if a != b]
    assert not differing


@pytest.mark.parametrize("settings", [{"temperature": 1.0}, {"temperature": 0.8, "top_k": 5, "top_p": 0.9}], ids=str)
def test_draws_are_the_cpus(demo, questions, settings):
    wanted = requests(demo, questions[:50], remasking_strategy="sequential", **settings)
    on_gpu = run(demo, wanted, device="cuda", dtype="float32")
    on_cpu = run(demo, wanted, device="cpu")
    # A draw that falls on the border between two tokens may go either way by rounding.
    assert sum(a == b for a, b in zip(on_gpu, on_cpu, strict=True)) >= 49


@pytest.mark.parametrize("strategy", ["low_confidence_static", "low_confidence_dynamic", "sequential"])
def test_bfloat16_is_within_a_point_or_two_of_float32(demo, questions, strategy):
    wanted = requests(demo, questions, remasking_strategy=strategy)
    exact = accuracy(demo, run(demo, wanted, device="cpu"))
    rounded = accuracy(demo, run(demo, wanted, device="cuda", dtype="bfloat16"))
    print(f"{strategy}: float32 on the CPU {exact:.3f}, bfloat16 on the GPU {rounded:.3f}")
    assert abs(exact - rounded) <= 0.02


def test_few_pages_and_few_slots_change_nothing(demo, questions):
    wanted = requests(demo, questions[:40])
    whole = run(demo, wanted, device="cuda", dtype="float32")
    assert run(demo, wanted, device="cuda", dtype="float32", kv_pages=40) == whole
    assert run(demo, wanted, device="cuda", dtype="float32", max_active=3) == whole


def test_sampled_frequencies_follow_the_softmax(demo, questions):
    """20,000 draws of one token against softmax(logits / T): top-k off is really off."""
    from scipy.stats import chisquare

    decoding = DecodingConfig(block_length=1, temperature=1.5)
    prompt = requests(demo, questions[:1])[0].prompt_ids
    wanted = [GenerationRequest(prompt, 1, decoding, seed=i) for i in range(20_000)]
    tokens = torch.tensor([t[0] for t in run(demo, wanted, device="cuda", dtype="float32")])
    model = demo.load_model(dtype=torch.float32, device="cuda", attention="sdpa")
    ids = torch.tensor([[*prompt, demo.mask_token_id]], device="cuda")
    causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device="cuda").tril()[None, None]
    with torch.no_grad():
        logits = model(ids, attention_mask=causal).logits[0, -1].cpu()
    logits[demo.mask_token_id] = -torch.inf
    expected = (logits / 1.5).softmax(-1).double() * len(tokens)
    counts = torch.bincount(tokens, minlength=len(expected)).double()
    common = expected >= 5
    observed = torch.cat([counts[common], counts[~common].sum()[None]])
    wanted_counts = torch.cat([expected[common], expected[~common].sum()[None]])
    assert chisquare(observed, wanted_counts * observed.sum() / wanted_counts.sum()).pvalue > 1e-3
