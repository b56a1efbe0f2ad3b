"""Log-likelihoods of a block-diffusion model: which forwards a text's score is made of, and how it is made of them.

The text is context + continuation. Blocks of L tokens are counted from the context's first token, as in generation, so
the continuation may begin inside a block, whose context tokens are then given, and may end inside one, whose positions
after the end are masked in every forward: nothing is known of them, as when `sequential` decoding decides a block from
the left. A block's m continuation tokens x_1..x_m are scored given the whole text before the block:

    chain  log p = sum over j of log p(x_j | x_1..x_{j-1} clean, the rest masked)

    nelbo  bound = sum over S of w(|S|) * sum over j in S of log p(x_j | S masked, the rest of x_1..x_m clean)
           over all non-empty subsets S, with w(k) = (k - 1)! (m - k)! / m!

Every p is the softmax at temperature 1 over the vocabulary without the mask token, which is never drawn.

`chain` is exact: exp(log p) is the probability that decoding by `sequential` at temperature 1, one token a step
(denoising_steps = L), begins its answer with the continuation. The probabilities of all continuations of one length
sum to 1.

`nelbo` is the negated evidence lower bound of masked diffusion, with noise level t ~ U(0, 1) and weight 1 / t: w(k) is
the integral of t^(k-1) (1-t)^(m-k), so no noise level is sampled. It equals the mean of the `chain` log-likelihood over
all m! orders of the m tokens. By Jensen's inequality it is never above the log of the mean probability over those
orders, that is, of the probability that decoding in a random order (the positions after the end last), one token a
step, yields the text. It need not be below `chain`, which is the log-probability for one of the orders.
Blocks with more subsets than `mc_samples` are sampled; the estimate has the same mean, and a standard error.

Sources: Block Diffusion, arXiv 2503.09573, section 3; the weights by integrating its continuous-time bound; the orders
from Autoregressive Diffusion Models, arXiv 2110.02037.

Plain Python: an engine runs the rows of a `Plan` and hands their log-probabilities to `Plan.result`.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from sdar_lm_eval.engines.base import LikelihoodConfig, ScoreRequest, ScoreResult

# Two draws of one stratum: (position among the patterns or rows, weight of the draw), twice.
Pair = tuple[tuple[int, float], tuple[int, float]]


@dataclass(frozen=True)
class Pattern:
    """Some of a block's m scored tokens masked.

    Attributes:
        masked: which of 0..m-1, ascending.
        scored: those of `masked` whose log-probabilities count.
        weight: of their sum.
    """

    masked: tuple[int, ...]
    scored: tuple[int, ...]
    weight: float


@dataclass(frozen=True)
class Row:
    """One block with some of its tokens masked, to be run once.

    Attributes:
        start: position of the block's first token.
        tokens: the block, (L,), with the mask token where it is masked.
        scored: (place in the block, the true token there), by place.
        weight: of the sum of the log-probabilities of `scored`.
        is_suffix: whether all from the first of `scored` on is masked and nothing before: what sequential decoding sees
            when it decides that token.
    """

    start: int
    tokens: tuple[int, ...]
    scored: tuple[tuple[int, int], ...]
    weight: float
    is_suffix: bool


@dataclass(frozen=True)
class Plan:
    """The forwards that one request's score is made of.

    Attributes:
        context: the clean tokens of the context's whole blocks.
        clean: the tokens after them up to the last scored block: whole blocks.
        rows: what is run given the clean tokens before it.
        pairs: the draws of sampled blocks, by position in `rows`.
    """

    context: tuple[int, ...]
    clean: tuple[int, ...]
    rows: tuple[Row, ...]
    pairs: tuple[Pair, ...] = ()

    def result(
        self,
        log_probabilities: Sequence[float],
        is_argmax: Sequence[bool],
        *,
        clean_tokens: int,
        noised_tokens: int,
    ) -> ScoreResult:
        """Put the score together.

        Args:
            log_probabilities: of each row's scored tokens, row after row, in nats.
            is_argmax: whether each of them is the most probable token there.
            clean_tokens, noised_tokens: see `ScoreResult`.
        """
        sums, greedy, place = [], True, 0
        for row in self.rows:
            sums.append(math.fsum(log_probabilities[place : place + len(row.scored)]))
            greedy = greedy and (not row.is_suffix or bool(is_argmax[place]))
            place += len(row.scored)
        assert place == len(log_probabilities) == len(is_argmax)
        variance = math.fsum((v * sums[a] - w * sums[b]) ** 2 for (a, v), (b, w) in self.pairs)
        return ScoreResult(
            log_likelihood=math.fsum(row.weight * total for row, total in zip(self.rows, sums, strict=True)),
            is_greedy=greedy,
            standard_error=math.sqrt(variance),
            clean_tokens=clean_tokens,
            noised_tokens=noised_tokens,
        )


def plan(request: ScoreRequest, config: LikelihoodConfig, mask_token_id: int) -> Plan:
    """Lay out the forwards that score a request."""
    length = config.block_length
    tokens = request.context_ids + request.continuation_ids
    begin = len(request.context_ids)
    first, last = begin // length * length, (len(tokens) - 1) // length * length
    rows: list[Row] = []
    pairs: list[Pair] = []
    for start in range(first, last + 1, length):
        block = tokens[start : start + length]
        given = max(begin - start, 0)
        m = len(block) - given
        of_block: tuple[Pair, ...] = ()
        if config.method == "chain":
            patterns = chain_patterns(m)
        elif 2**m - 1 <= config.mc_samples:
            patterns = all_patterns(m)
        else:
            # By the context and not the continuation, so that a question's answers meet the same masks.
            seed = _seed_of(config.seed, request.context_ids, start, m)
            patterns, of_block = sampled_patterns(m, config.mc_samples, random.Random(seed))
        pairs += (((len(rows) + a, v), (len(rows) + b, w)) for (a, v), (b, w) in of_block)
        for pattern in patterns:
            row = list(block) + [mask_token_id] * (length - len(block))
            for j in pattern.masked:
                row[given + j] = mask_token_id
            scored = tuple((given + j, block[given + j]) for j in pattern.scored)
            rows.append(Row(start, tuple(row), scored, pattern.weight, len(pattern.masked) == m - pattern.masked[0]))
    return Plan(tokens[:first], tokens[first:last], tuple(rows), tuple(pairs))


def most_patterns(config: LikelihoodConfig) -> int:
    """How many patterns a block has at most: times a block's tokens, what it costs."""
    length, samples = config.block_length, config.mc_samples
    if config.method == "chain":
        return length
    return 2**length - 1 if 2**length - 1 <= samples else samples + length


@functools.cache
def chain_patterns(m: int) -> tuple[Pattern, ...]:
    """Patterns of `chain`: for each token, itself and all after it masked."""
    return tuple(Pattern(tuple(range(j, m)), (j,), 1.0) for j in range(m))


@functools.lru_cache(maxsize=64)
def all_patterns(m: int) -> tuple[Pattern, ...]:
    """Patterns of `nelbo`, all 2^m - 1 of them."""
    subsets = (s for k in range(1, m + 1) for s in itertools.combinations(range(m), k))
    return tuple(Pattern(s, s, 1 / (len(s) * math.comb(m, len(s)))) for s in subsets)


def sampled_patterns(m: int, samples: int, rng: random.Random) -> tuple[tuple[Pattern, ...], tuple[Pair, ...]]:
    """Patterns of `nelbo` drawn by the noise level, and those of `chain` at weight 0, for what is greedy.

    The noise level is divided into samples / 2 equal strata with two draws in each: the estimate is unbiased, its
    variance is at most that of independent draws, and the differences within the strata estimate it, also where there
    are fewer samples than noise levels.

    Args:
        m: scored tokens of the block.
        samples: an even number.
        rng: drawn from.

    Returns:
        Different patterns with the weights of all their draws; and the pairs of draws, by position in the former.
    """
    weights: dict[tuple[int, ...], float] = {}
    draws = []
    for i in range(samples):
        level = (i // 2 + rng.random()) / (samples // 2)
        k = min(int(level * m), m - 1) + 1  # uniform on 1..m
        masked = tuple(sorted(rng.sample(range(m), k)))
        weights[masked] = weights.get(masked, 0.0) + m / k / samples
        draws.append((masked, m / k / samples))
    position = {masked: i for i, masked in enumerate(weights)}
    patterns = [Pattern(masked, masked, weight) for masked, weight in weights.items()]
    patterns += [Pattern(p.masked, p.scored, 0.0) for p in chain_patterns(m) if p.masked not in weights]
    numbered = [(position[masked], weight) for masked, weight in draws]
    return tuple(patterns), tuple(zip(numbered[::2], numbered[1::2], strict=True))


def _seed_of(seed: int, context: tuple[int, ...], start: int, m: int) -> int:
    return int.from_bytes(hashlib.sha256(json.dumps([seed, context, start, m]).encode()).digest()[:8], "little")
