"""The reference of block diffusion decoding in plain Python: no cache, no batch, no pages.

Every step runs the whole sequence through the model under the block-causal mask, and Python decides one token at a
time. The oracle is slow. It shares only the random numbers with the engine; the engine must return the same results.
"""

from __future__ import annotations

import torch

from sdar_lm_eval.engines.native.random_numbers import DRAW, ORDER, uniform
from sdar_lm_eval.engines.types import GenerationRequest

STRATEGIES = ("low_confidence_static", "low_confidence_dynamic", "sequential", "entropy_bounded", "random")
"""The strategies whose rules `keep` has."""


def block_causal_mask(length: int, block: int) -> torch.Tensor:
    """True where position i (row) sees position j (column): (1, 1, length, length)."""
    at = torch.arange(length)
    return (at[:, None] // block >= at[None, :] // block)[None, None]


@torch.no_grad()
def generate(model, mask_id: int, request: GenerationRequest, decode=None):
    """Return (new tokens, finish reason, unmasked_at, confidences, denoising forwards)."""
    decoding = request.decoding
    block = decoding.block_length
    prompt = list(request.prompt_ids)
    tokens = list(prompt)
    unmasked_at, confidences, forwards = [], [], 0
    while True:
        start = len(tokens) // block * block
        current = tokens[start:] + [mask_id] * (start + block - len(tokens))
        masked = [offset >= len(tokens) - start for offset in range(block)]
        given = block - sum(masked)
        when, how_sure = [-1] * block, [1.0] * block
        step = 0
        while any(masked):
            candidates = {}
            logits = _logits(model, tokens[:start] + current, block)[start:]
            forwards += 1
            seen = set(tokens) | {t for t, m in zip(current, masked, strict=True) if not m}
            for offset in range(block):
                if masked[offset]:
                    candidates[offset] = _draw(logits[offset], mask_id, request, start + offset, step, seen)
            for offset in keep(candidates, request, start, step):
                token, confidence, _ = candidates[offset]
                current[offset], masked[offset] = token, False
                when[offset], how_sure[offset] = step, confidence
            step += 1
        for offset in range(given, block):
            token = current[offset]
            new = len(tokens) - len(prompt)
            if token in request.stop_ids:
                return tokens[len(prompt) :], "stop", unmasked_at, confidences, forwards
            tokens.append(token)
            unmasked_at.append(when[offset])
            confidences.append(how_sure[offset])
            text = decode(tokens[len(prompt) :]) if request.stop_strings else ""
            if any(stop in text for stop in request.stop_strings):
                return tokens[len(prompt) :], "stop", unmasked_at, confidences, forwards
            if new + 1 == request.max_new_tokens:
                return tokens[len(prompt) :], "length", unmasked_at, confidences, forwards


def _logits(model, tokens: list[int], block: int) -> torch.Tensor:
    ids = torch.tensor([tokens])
    mask = block_causal_mask(len(tokens), block)
    return model(ids, attention_mask=mask, position_ids=torch.arange(len(tokens))[None]).logits[0].float()


def _draw(logits, mask_id, request, position, step, seen):
    """(token, confidence, entropy) for one position."""
    decoding = request.decoding
    logits = logits.clone()
    logits[mask_id] = -torch.inf
    if decoding.repetition_penalty != 1:
        for token in seen:
            factor = decoding.repetition_penalty
            logits[token] = logits[token] / factor if logits[token] > 0 else logits[token] * factor
    if decoding.greedy:
        probabilities = logits.softmax(-1)
        token = int(logits.argmax())
        return token, float(probabilities[token]), _entropy(probabilities)
    probabilities = (logits / decoding.temperature).softmax(-1)
    of = probabilities.tolist()
    ranked = sorted(range(len(of)), key=lambda t: (-of[t], t))
    if decoding.top_k:
        least = of[ranked[min(decoding.top_k, len(ranked)) - 1]]
        ranked = [t for t in ranked if of[t] >= least]
    total = sum(of[t] for t in ranked)
    if decoding.top_p < 1:
        before, allowed = 0.0, []
        for token in ranked:
            if before / total > decoding.top_p:
                break
            allowed.append(token)
            before += of[token]
        ranked = allowed
    total = sum(of[t] for t in ranked)
    number = float(_uniform(request.seed, position, step, DRAW)) * total
    for token in sorted(ranked):
        number -= of[token]
        if number < 0:
            break
    return token, of[token] / total, _entropy(probabilities[sorted(ranked)] / total)


def keep(candidates, request, start, step):
    """The offsets in the block whose tokens this step keeps."""
    decoding = request.decoding
    quota = min(decoding.quotas[step] if step < decoding.steps else 1, len(candidates))
    surest = sorted(candidates, key=lambda offset: (-candidates[offset][1], offset))
    if decoding.remasking_strategy == "low_confidence_static":
        return surest[:quota]
    if decoding.remasking_strategy == "low_confidence_dynamic":
        sure = [offset for offset in surest if candidates[offset][1] > decoding.confidence_threshold]
        return sure if len(sure) >= quota else surest[:quota]
    if decoding.remasking_strategy == "sequential":
        return sorted(candidates)[:quota]
    if decoding.remasking_strategy == "random":
        return sorted(candidates, key=lambda p: (float(_uniform(request.seed, start + p, step, ORDER)), p))[:quota]
    assert decoding.remasking_strategy == "entropy_bounded"
    plainest = sorted(candidates, key=lambda offset: (candidates[offset][2], offset))
    kept, total = [], 0.0
    for offset in plainest:
        total += candidates[offset][2]
        if kept and total >= decoding.eb_threshold:
            break
        kept.append(offset)
    return kept


def _entropy(probabilities: torch.Tensor) -> float:
    return float(-(probabilities * probabilities.clamp_min(1e-30).log()).sum())


def _uniform(seed, position, step, purpose):
    as_signed = seed - 2**64 if seed >= 2**63 else seed
    return uniform(torch.tensor(as_signed), torch.tensor(position), torch.tensor(step), purpose)
