"""Triton kernels that draw tokens from logits, without a copy of the logits in float32."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def summarize_logits_kernel(
    logits, temperature, parts, mask_token, vocabulary, chunks, BLOCK: tl.constexpr, ENTROPY: tl.constexpr
):
    """A program computes maximum, sum of exponentials and entropy term of one chunk of a row."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    x, inside, _ = _logits_of(logits, temperature, row, chunk, mask_token, vocabulary, BLOCK)
    most = tl.max(x)
    shift = tl.where(most == -float("inf"), 0.0, most)
    weights = tl.exp(x - shift)
    # The maximum may ignore NaN, but the sum does not: a row with NaN has a sum of NaN.
    part = parts + (row * chunks + chunk) * 3
    tl.store(part, most)
    tl.store(part + 1, tl.sum(weights))
    if ENTROPY:
        tl.store(part + 2, tl.sum(tl.where(inside & (weights > 0), weights * (x - shift), 0.0)))


@triton.jit
def _logits_of(logits, temperature, row, chunk, mask_token, vocabulary, BLOCK: tl.constexpr):
    column = chunk * BLOCK + tl.arange(0, BLOCK)
    inside = (column < vocabulary) & (column != mask_token)
    x = tl.load(logits + row * vocabulary + column, mask=inside, other=-float("inf")).to(tl.float32)
    return x / tl.load(temperature + row), inside, column


@triton.jit
def choose_token_kernel(
    logits, temperature, number, greedy, parts, token_out, confidence_out, entropy_out, mask_token, vocabulary,
    chunks, BLOCK: tl.constexpr, CHUNKS: tl.constexpr, ENTROPY: tl.constexpr,
):  # fmt: skip
    """A program draws one row's token from the summaries of the row's chunks."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.arange(0, CHUNKS)
    real_chunk = chunk < chunks
    part = parts + (row * chunks + chunk) * 3
    mosts = tl.load(part, mask=real_chunk, other=-float("inf"))
    most = tl.max(mosts)
    rescale = tl.where(real_chunk, tl.exp(mosts - most), 0.0)
    sums = tl.load(part + 1, mask=real_chunk, other=0.0) * rescale
    total = tl.sum(sums)
    if ENTROPY:
        # With p = exp(x - most) / total, the entropy is log(total) - sum p (x - most).
        slopes = tl.load(part + 2, mask=real_chunk, other=0.0) * rescale + sums * tl.where(
            rescale > 0, mosts - most, 0.0
        )
        tl.store(entropy_out + row, tl.log(total) - tl.sum(slopes) / total)
    if tl.load(greedy + row):
        best = tl.min(tl.where(real_chunk & (mosts == most), chunk, chunks - 1))
        x, inside, column = _logits_of(logits, temperature, row, best, mask_token, vocabulary, BLOCK)
        token = tl.min(tl.where(inside & (x == most), column, vocabulary - 1))
        tl.store(token_out + row, token.to(tl.int64))
        tl.store(confidence_out + row, 1.0 / total)
    else:
        # First the chunk in which the cumulative sum passes the target, then the token in this chunk. Where rounding
        # leaves the total below the target, the last chunk with a positive sum is taken.
        ends = tl.cumsum(sums)
        target = tl.load(number + row) * total
        last = tl.max(tl.where(sums > 0, chunk, 0))
        chosen = tl.minimum(tl.sum(((ends <= target) & real_chunk).to(tl.int32)), last)
        before = tl.sum(tl.where(chunk < chosen, sums, 0.0))
        x, inside, column = _logits_of(logits, temperature, row, chosen, mask_token, vocabulary, BLOCK)
        weights = tl.exp(x - most)
        within = before + tl.cumsum(weights)
        passed = tl.min(tl.where((within > target) & (weights > 0), column, vocabulary))
        fallback = tl.max(tl.where(weights > 0, column, 0))
        token = tl.where(passed < vocabulary, passed, fallback)
        tl.store(token_out + row, token.to(tl.int64))
        tl.store(confidence_out + row, tl.sum(tl.where(column == token, weights, 0.0)) / total)


def draw(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    number: torch.Tensor,
    greedy: torch.Tensor,
    mask_token: int,
    *,
    entropies: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw a token a row, never the mask token: the most probable one, or by inverting the cumulative distribution.

    The reference is `unmasking.draw_greedy`, and `draw_sampled` of softmax(logits / temperature). The kernels read the
    logits twice, without a copy in float32.

    Args:
        logits: (M, V).
        temperature: (M,), 1 for greedy rows.
        number: (M,) in [0, 1).
        greedy: (M,) bool.
        mask_token: the token that is left out of the distribution.
        entropies: whether to compute entropies.

    Returns:
        Tokens (M,) int64, their probabilities (M,) float32, and the distributions' entropies in nats (M,) float32, or
        zeros.
    """
    rows, vocabulary = logits.shape
    block = 4096 if vocabulary > 4096 else triton.next_power_of_2(vocabulary)
    chunks = triton.cdiv(vocabulary, block)
    parts = torch.empty(rows, chunks, 3, dtype=torch.float32, device=logits.device)
    token = torch.empty(rows, dtype=torch.int64, device=logits.device)
    confidence = torch.empty(rows, dtype=torch.float32, device=logits.device)
    entropy = torch.zeros(rows, dtype=torch.float32, device=logits.device)
    summarize_logits_kernel[(rows, chunks)](
        logits, temperature, parts, mask_token, vocabulary, chunks, block, entropies
    )
    choose_token_kernel[(rows,)](
        logits, temperature, number, greedy, parts, token, confidence, entropy, mask_token, vocabulary, chunks, block,
        max(triton.next_power_of_2(chunks), 2), entropies,
    )  # fmt: skip
    return token, confidence, entropy
