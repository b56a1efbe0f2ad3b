"""Putting requests to an engine, and what the engines' tests say of the results.

run(engine, requests)              results in the requests' order, each there once
tokens_of(results)                 what has to be equal where answers are the same
native(checkpoint, requests)       that of the native engine on the CPU, which is asked once for all who compare
prompts(checkpoint, lengths)       random prompts; random_prompts: without special tokens of the demo's tokenizer
ask(demo, questions, …)            requests for the demo's problems; extracted, accuracy: of their answers
"""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch
from support import random_checkpoint, read_weights, write_weights

from sdar_lm_eval import Checkpoint, DecodingConfig, GenerationRequest, UserError, make_engine
from sdar_lm_eval.demo import golds
from sdar_lm_eval.engines.agreement import Float32Judge
from sdar_lm_eval.tasks.extraction import flexible_extract

SHORT = 7  # the demo's problem with the shortest answer, of 36 tokens by greedy static decoding
GREEDY = DecodingConfig(temperature=0, remasking_strategy="low_confidence_static")


def run(engine, requests):
    pairs = list(engine.generate(requests))
    assert sorted(index for index, _ in pairs) == list(range(len(requests)))  # all of them, and each once
    results = dict(pairs)
    return [results[i] for i in range(len(requests))]


def tokens_of(results):
    return [(result.token_ids, result.finish_reason) for result in results]


def native(checkpoint, requests):
    key = id(checkpoint), tuple(requests)
    if key not in _native:
        results = tokens_of(run(make_engine("native", checkpoint, device="cpu"), requests))
        _native[key] = checkpoint, results  # which keeps the checkpoint's id its own
    return _native[key][1]


_native = {}


def prompts(checkpoint, lengths, seed=0):
    """Random prompts of any tokens of a checkpoint but the mask token."""
    rng = random.Random(seed)
    allowed = [t for t in range(checkpoint.config["vocab_size"]) if t != checkpoint.mask_token_id]
    return [tuple(rng.choices(allowed, k=length)) for length in lengths]


def random_prompts(lengths, seed=0):
    """Of the demo's tokenizer, without special tokens."""
    rng = random.Random(seed)
    return [tuple(rng.choices(range(700), k=length)) for length in lengths]


def ask(demo, questions, decoding=GREEDY, count=200, **settings):
    settings = {"max_new_tokens": 128, "stop_ids": frozenset(demo.stop_ids), **settings}
    return [GenerationRequest(p, decoding=decoding, seed=i, **settings) for i, p in enumerate(questions[:count])]


def extracted(demo, results):
    return [flexible_extract(demo.decode(result.token_ids)) for result in results]


def accuracy(answers):
    share = sum(a == g for a, g in zip(answers, golds(), strict=True)) / len(answers)
    return f"{100 * share:.1f} ± {100 * (share * (1 - share) / (len(answers) - 1)) ** 0.5:.1f}"


def differing_answers(demo, theirs, ours, title):
    """Which of the demo's problems two engines' results end in different numbers for; prints both accuracies."""
    numbers = extracted(demo, theirs), extracted(demo, ours)
    differing = [i for i, (a, b) in enumerate(zip(*numbers, strict=True)) if a != b]
    told = ", ".join(f"{i} ({numbers[0][i]}, {numbers[1][i]})" for i in differing)
    print(f"\n{title} {accuracy(numbers[0])}, native {accuracy(numbers[1])}; {len(differing)} differ: {told}")
    return differing


def check_agreement(demo, requests, theirs, ours, title):
    """Of 200 greedy answers 190 at least are the same numbers, and rounding explains the others, which are printed."""
    differing = differing_answers(demo, theirs, ours, title)
    assert len(differing) <= 10
    if requests[0].decoding.remasking_strategy != "low_confidence_dynamic":
        check_rounding(demo, requests, theirs, ours, differing)


def check_rounding(demo, requests, theirs, ours, differing):
    """Differing results (by index) part where rounding to bfloat16 explains it; greedy static and sequential ones."""
    judge = Float32Judge(demo)
    for i in differing:
        found = judge.divergence(i, requests[i], theirs[i], ours[i])
        print(f"{i}: from token {found.token} on, {found.rounding:.4f} nats; the answer {found.worst:.4f}")
        assert found.rounding <= 0.1


def check_odd_tokens(demo, engine, odd, questions):
    """Odd tokens inside a prompt are read like others: rounding to bfloat16 explains each block of the answers."""
    judge = Float32Judge(demo)
    requests = [GenerationRequest((*question[:9], *odd, *question), 40, GREEDY) for question in questions[:8]]
    worst = [
        max(judge.roundings(request, answer.token_ids))
        for request, answer in zip(requests, run(engine, requests), strict=True)
    ]
    print("\nodd tokens, nats of rounding:", ", ".join(f"{nats:.4f}" for nats in worst))
    assert max(worst) <= 0.1


def check_mixture_of_experts(folder, name, **options):
    """An engine beside the native one, with random weights in the layout of SDAR-30B-A3B: 128 experts, 8 a token."""
    random_checkpoint(
        folder, moe=True, head_dim=128, hidden_size=512, moe_intermediate_size=192, num_attention_heads=8,
        num_key_value_heads=4, num_experts=128, num_experts_per_tok=8,
    )  # fmt: skip
    weights = read_weights(folder)
    weights["lm_head.weight"][Checkpoint.open(str(folder)).mask_token_id] = 0
    write_weights(folder, weights)
    checkpoint = Checkpoint.open(str(folder))
    requests = [GenerationRequest(tuple(range(10, 30 + i)), 32, GREEDY) for i in range(32)]
    with make_engine(name, checkpoint, dtype="bfloat16", **options) as engine:
        theirs = run(engine, requests)
    ours = run(make_engine("native", checkpoint, dtype="bfloat16"), requests)
    assert [len(result.token_ids) for result in theirs] == [32] * 32
    same = sum(a.token_ids[:1] == b.token_ids[:1] for a, b in zip(theirs, ours, strict=True))
    print(f"\nmixture of experts: {same} of 32 begin alike")
    assert same >= 26


def check_refusals(engine, prompt, *more):
    """An adapter refuses what its engine would answer wrongly. `more` are an engine's own: (request, reason)."""
    for request, reason in [
        (GenerationRequest(prompt, 4000, GREEDY), "tokens in whole blocks"),
        (GenerationRequest(prompt, 8, DecodingConfig(repetition_penalty=1.1)), "repetition_penalty"),
        *more,
    ]:
        with pytest.raises(UserError, match=reason):
            run(engine, [request])


def check_refusals_of_jetengine(engine, checkpoint, prompt):
    masked = GenerationRequest((*prompt[:8], checkpoint.mask_token_id), 8, GREEDY)
    check_refusals(engine, prompt, (masked, "mask token"))


def check_refusals_of_lmdeploy(engine, prompt):
    check_refusals(
        engine,
        prompt,
        (GenerationRequest(prompt, 8, DecodingConfig(remasking_strategy="random")), "is not in LMDeploy"),
    )


def drawn_frequencies(demo, results):
    """(V,) of the results' first tokens."""
    drawn = torch.zeros(demo.config["vocab_size"])
    for token, times in Counter(result.token_ids[0] for result in results if result.token_ids).items():
        drawn[token] = times / len(results)
    return drawn


def first_token_logits(demo, prompt):
    """(V,) behind a prompt of whole blocks of 4, at the first step; from the weights by transformers, on the GPU."""
    model = demo.load_model(dtype=torch.bfloat16, device="cuda", attention="sdpa")
    ids = torch.tensor([*prompt, *[demo.mask_token_id] * 4], device="cuda")
    block = torch.arange(len(ids), device="cuda") // 4
    mask = torch.zeros(len(ids), len(ids), device="cuda", dtype=torch.bfloat16)
    mask.masked_fill_(block[:, None] < block, -torch.inf)
    return model(ids[None], attention_mask=mask[None, None]).logits[0, len(prompt)].float().cpu()


def check_frequencies(drawn, logits, settings, count):
    """Frequencies (V,) of `count` draws are softmax(logits / T), within top_k; prints by how much they are not."""
    logits = logits / settings.temperature
    if settings.top_k:
        logits[logits < logits.topk(settings.top_k).values[-1]] = -torch.inf
    expected = logits.softmax(-1)
    distance = float((drawn - expected).abs().sum() / 2)
    noise = float((expected * (1 - expected) / count).sqrt().sum() / 2)  # about what chance alone makes of it
    print(f"\ntotal variation {distance:.3f}, by chance {noise:.3f}; most probable {expected.max():.2f}")
    assert distance < 2 * noise + 0.02
    assert int((drawn > 0).sum()) > 1
