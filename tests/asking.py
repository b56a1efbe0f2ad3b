"""Putting requests to an engine, and what the engines' tests say of the results.

run(engine, requests)              results in the requests' order, each there once
tokens_of(results)                 what has to be equal where answers are the same
native(checkpoint, requests)       that of the native engine on the CPU
ask(demo, questions, …)            requests for the demo's problems; extracted, accuracy: of their answers
"""

from __future__ import annotations

import random
from collections import Counter

import torch

from sdar_lm_eval import DecodingConfig, GenerationRequest, make_engine
from sdar_lm_eval.demo import golds
from sdar_lm_eval.tasks.extraction import flexible_extract

GREEDY = DecodingConfig(temperature=0, remasking_strategy="low_confidence_static")


def run(engine, requests):
    pairs = list(engine.generate(requests))
    assert sorted(index for index, _ in pairs) == list(range(len(requests)))  # all of them, and each once
    results = dict(pairs)
    return [results[i] for i in range(len(requests))]


def tokens_of(results):
    return [(result.token_ids, result.finish_reason) for result in results]


def native(checkpoint, requests):
    return tokens_of(run(make_engine("native", checkpoint, device="cpu"), requests))


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
    theirs, ours = extracted(demo, theirs), extracted(demo, ours)
    differing = {i: (a, b) for i, (a, b) in enumerate(zip(theirs, ours, strict=True)) if a != b}
    print(f"\n{title} {accuracy(theirs)}, native {accuracy(ours)}; {len(differing)} differ: {differing}")
    return differing


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
