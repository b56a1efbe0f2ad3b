"""The native engine on a GPU, against itself on the CPU. `python -m pytest tests/gpu` on a machine with CUDA."""

from __future__ import annotations

import json

import pytest
import torch

from sdar_lm_eval import Checkpoint, DecodingConfig, GenerationRequest, make_engine
from sdar_lm_eval.demo import PROBLEMS
from sdar_lm_eval.demo.make import PROMPT
from sdar_lm_eval.engines.base import STRATEGIES

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")


@pytest.fixture(scope="module")
def demo():
    return Checkpoint.open("demo")


@pytest.fixture(scope="module")
def problems():
    return [json.loads(line) for line in PROBLEMS.read_text().splitlines()]


def requests(demo, problems, **settings):
    render = demo.tokenizer.apply_chat_template
    texts = [
        render([{"role": "user", "content": PROMPT.format(**p)}], tokenize=False, add_generation_prompt=True)
        for p in problems
    ]
    decoding = DecodingConfig(**{"temperature": 0, **settings})
    return [
        GenerationRequest(
            tuple(demo.tokenizer.encode(t, add_special_tokens=False)), 128, decoding, frozenset(demo.stop_ids), seed=i
        )
        for i, t in enumerate(texts)
    ]


def run(demo, wanted, **options):
    results = dict(make_engine("native", demo, **options).generate(wanted))
    return [results[i].token_ids for i in range(len(wanted))]


def accuracy(demo, problems, answers):
    golds = [problem["answer"].split("#### ")[1] for problem in problems]
    return sum(demo.decode(a).endswith(f"#### {g}") for a, g in zip(answers, golds, strict=True)) / len(golds)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_float32_answers_are_the_cpus(demo, problems, strategy):
    wanted = requests(demo, problems, remasking_strategy=strategy)
    on_gpu = run(demo, wanted, device="cuda", dtype="float32")
    on_cpu = run(demo, wanted, device="cpu")
    differing = [i for i, (a, b) in enumerate(zip(on_gpu, on_cpu, strict=True)) if a != b]
    assert not differing


@pytest.mark.parametrize("settings", [{"temperature": 1.0}, {"temperature": 0.8, "top_k": 5, "top_p": 0.9}], ids=str)
def test_draws_are_the_cpus(demo, problems, settings):
    wanted = requests(demo, problems[:50], remasking_strategy="sequential", **settings)
    on_gpu = run(demo, wanted, device="cuda", dtype="float32")
    on_cpu = run(demo, wanted, device="cpu")
    # A draw that falls on the border between two tokens may go either way by rounding.
    assert sum(a == b for a, b in zip(on_gpu, on_cpu, strict=True)) >= 49


@pytest.mark.parametrize("strategy", ["low_confidence_static", "low_confidence_dynamic", "sequential"])
def test_bfloat16_is_within_a_point_or_two_of_float32(demo, problems, strategy):
    wanted = requests(demo, problems, remasking_strategy=strategy)
    exact = accuracy(demo, problems, run(demo, wanted, device="cpu"))
    rounded = accuracy(demo, problems, run(demo, wanted, device="cuda", dtype="bfloat16"))
    print(f"{strategy}: float32 on the CPU {exact:.3f}, bfloat16 on the GPU {rounded:.3f}")
    assert abs(exact - rounded) <= 0.02


def test_few_pages_and_few_slots_change_nothing(demo, problems):
    wanted = requests(demo, problems[:40])
    whole = run(demo, wanted, device="cuda", dtype="float32")
    assert run(demo, wanted, device="cuda", dtype="float32", kv_pages=40) == whole
    assert run(demo, wanted, device="cuda", dtype="float32", max_active=3) == whole


def test_sampled_frequencies_follow_the_softmax(demo, problems):
    """20,000 draws of one token against softmax(logits / T): top-k off is really off."""
    from scipy.stats import chisquare

    decoding = DecodingConfig(block_length=1, temperature=1.5)
    prompt = requests(demo, problems[:1])[0].prompt_ids
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
