"""Log-likelihoods of a block-diffusion model: the forwards that a text's score needs, and the score from the forwards.

The text is context + continuation. The first block of L tokens begins at the context's first token, as in generation.
So the continuation may begin inside a block; that block's context tokens are given. The continuation may also end
inside a block. The positions after the end are then masked in every forward, as the positions to the right are masked
when `sequential` decodes a block. A block's m continuation tokens x_1..x_m are scored given the whole text before the
block:

    chain  log p = sum over j of log p(x_j | x_1..x_{j-1} clean, the rest masked)

    nelbo  bound = sum over S of w(|S|) * sum over j in S of log p(x_j | S masked, the rest of x_1..x_m clean)
           over all non-empty subsets S, with w(k) = (k - 1)! (m - k)! / m!

Every p is the softmax at temperature 1 over the vocabulary without the mask token, which is never drawn.

`chain` is exact: exp(log p) is the probability that decoding by `sequential` at temperature 1, one token a step
(denoising_steps = L), begins its answer with the continuation. The probabilities of all continuations of one length
sum to 1.

`nelbo` is the evidence lower bound of masked diffusion (the NELBO with its sign turned), with noise level t ~ U(0, 1)
and weight 1 / t. The integral of t^(k-1) (1-t)^(m-k) is w(k), so no noise level is sampled. The bound equals the mean
of the `chain` log-likelihood over all m! orders of the m tokens. The mean probability over these orders is the
probability that decoding in a random order (the positions after the end last), one token a step, yields the text. By
Jensen's inequality, the bound is never above the log of that probability. The bound may be above `chain`, the
log-probability for one of the orders. If a block has more subsets than `mc_samples`, subsets are sampled. The estimate
has the same mean, and a standard error.

Sources: Block Diffusion, arXiv 2503.09573, section 3; the weights by integrating its continuous-time bound; the orders
from Autoregressive Diffusion Models, arXiv 2110.02037.

An engine runs the rows of a `ScorePlan`, and passes the sums of the rows' log-probabilities to `ScorePlan.result`. A
block may have a million rows, so a `ScorePlan` stores rows as packed bits, and expands a few rows at a time to tokens.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
from numpy.typing import NDArray

from sdar_lm_eval.engines.types import LikelihoodConfig, ScoreRequest, ScoreResult
from sdar_lm_eval.hashing import seed_from

ROWS_AT_ONCE = 1 << 14  # unpacked together


@dataclass(frozen=True)
class Pattern:
    """A choice of a block's m scored tokens to mask.

    Attributes:
        masked: indices of the masked tokens among 0..m-1, ascending.
        scored: the positions of `masked` whose log-probabilities count.
        weight: factor of the sum of their log-probabilities.
    """

    masked: tuple[int, ...]
    scored: tuple[int, ...]
    weight: float


@dataclass(frozen=True, eq=False)
class Patterns(Sequence[Pattern]):
    """R different patterns of a block with m scored tokens, in ceil(m / 8) + 8 bytes each.

    Attributes:
        m: scored tokens of the block.
        bits: (R, ceil(m / 8)) uint8, one bit a token, the first token's in the lowest bit of the first byte.
        weights: (R,) float64, each pattern's `Pattern.weight`.
        whole: the first `whole` patterns score all masked tokens; the others score the first masked token.
    """

    m: int
    bits: NDArray[np.uint8]
    weights: NDArray[np.float64]
    whole: int

    @classmethod
    def of(cls, m: int, masked: bytes, weights: NDArray[np.float64], whole: int) -> Patterns:
        """Make patterns from the bytes of `bits`, row after row."""
        bits = np.frombuffer(masked, dtype=np.uint8).reshape(-1, _bytes_of(m))
        return cls(m, bits, weights, whole)

    def __len__(self) -> int:
        return len(self.bits)

    @overload
    def __getitem__(self, i: int) -> Pattern: ...
    @overload
    def __getitem__(self, i: slice) -> list[Pattern]: ...
    def __getitem__(self, i: int | slice) -> Pattern | list[Pattern]:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        i = range(len(self))[i]
        masked, scored = (tuple(array[0].nonzero()[0].tolist()) for array in self.unpacked(np.array([i])))
        return Pattern(masked, scored, float(self.weights[i]))

    def unpacked(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """For the patterns of these rows (r,): which tokens are masked, and which are scored; (r, m) bool each."""
        masked = np.unpackbits(self.bits[rows], axis=1, count=self.m, bitorder="little").astype(bool)
        first = np.zeros_like(masked)
        first[np.arange(len(masked)), masked.argmax(axis=1)] = True
        return masked, np.where((rows < self.whole)[:, None], masked, first)

    def suffixes(self) -> NDArray[np.bool_]:
        """Which patterns mask a token and all after it, and nothing before, as sequential decoding does; (R,) bool."""
        parts = [np.zeros(0, dtype=bool)]
        for start in range(0, len(self), ROWS_AT_ONCE):
            masked, _ = self.unpacked(np.arange(start, min(start + ROWS_AT_ONCE, len(self))))
            parts.append(masked.sum(axis=1) == self.m - masked.argmax(axis=1))
        return np.concatenate(parts)


@dataclass(frozen=True, eq=False)
class Pairs:
    """Pairs of draws, each pair from one stratum of the noise level.

    Attributes:
        rows: (P, 2) int64, each draw's row in the patterns.
        weights: (P, 2) float64, each draw's weight.
    """

    rows: NDArray[np.int64]
    weights: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True, eq=False)
class Block:
    """A block with scored tokens, to be run once with each pattern.

    Attributes:
        start: position of the block's first token in the text.
        tokens: (L,) int64, the clean tokens; mask tokens after the text's end.
        given: number of leading tokens that belong to the context.
        patterns: masks of the continuation's tokens.
        pairs: the draws, where the patterns were sampled.
    """

    start: int
    tokens: NDArray[np.int64]
    given: int
    patterns: Patterns
    pairs: Pairs | None = None

    def masked(self, rows: NDArray[np.int64], mask_token_id: int) -> NDArray[np.int64]:
        """The block's tokens with the patterns of these rows (r,) masked: (r, L) int64."""
        tokens = np.tile(self.tokens, (len(rows), 1))
        masked, _ = self.patterns.unpacked(rows)
        tokens[:, self.given : self.given + self.patterns.m][masked] = mask_token_id
        return tokens

    def scored(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """The scored tokens of these rows (r,): (index into `rows`, position in the block, true token), (s,) each."""
        _, scored = self.patterns.unpacked(rows)
        index, position = scored.nonzero()
        position = position + self.given
        return index, position, self.tokens[position]


@dataclass(frozen=True, eq=False)
class ScorePlan:
    """The forwards that one request's score needs.

    Attributes:
        context: the clean tokens of the context's whole blocks.
        clean: the clean tokens after `context` and before the last scored block: whole blocks.
        blocks: the scored blocks, each run given all clean tokens before it.
    """

    context: tuple[int, ...]
    clean: tuple[int, ...]
    blocks: tuple[Block, ...]

    @property
    def num_rows(self) -> int:
        """How many masked blocks are run."""
        return sum(len(block.patterns) for block in self.blocks)

    def result(
        self, sums: NDArray[np.float64], is_argmax: NDArray[np.bool_], *, clean_tokens: int, noised_tokens: int
    ) -> ScoreResult:
        """Compute the score.

        Args:
            sums: (rows,) float64, the sum of each row's scored log-probabilities in nats, block after block.
            is_argmax: (rows,) bool, whether each row's first scored token is the most probable one at its position.
            clean_tokens, noised_tokens: see `ScoreResult`.
        """
        assert len(sums) == len(is_argmax) == self.num_rows
        products, squares, greedy, end = [], [], True, 0
        for block in self.blocks:
            begin, end = end, end + len(block.patterns)
            of_block = sums[begin:end]
            products.append(block.patterns.weights * of_block)
            greedy = greedy and bool(is_argmax[begin:end][block.patterns.suffixes()].all())
            if block.pairs is not None:
                first, second = (block.pairs.weights * of_block[block.pairs.rows]).T
                squares.append(first - second)
        return ScoreResult(
            log_likelihood=math.fsum(_floats(products)),
            is_greedy=greedy,
            standard_error=math.sqrt(math.fsum(difference**2 for difference in _floats(squares))),
            clean_tokens=clean_tokens,
            noised_tokens=noised_tokens,
        )


def plan(request: ScoreRequest, config: LikelihoodConfig, mask_token_id: int) -> ScorePlan:
    """Return the forwards that score a request."""
    length = config.block_length
    tokens = request.context_ids + request.continuation_ids
    begin = len(request.context_ids)
    first, last = begin // length * length, (len(tokens) - 1) // length * length
    blocks = []
    for start in range(first, last + 1, length):
        block = tokens[start : start + length]
        given = max(begin - start, 0)
        m = len(block) - given
        pairs: Pairs | None = None
        if config.method == "chain":
            patterns = chain_patterns(m)
        elif 2**m - 1 <= config.mc_samples:
            patterns = all_patterns(m)
        else:
            # The seed is of the context alone, so that all continuations of a question get the same masks.
            seed = seed_from([config.seed, request.context_ids, start, m])
            patterns, pairs = sampled_patterns(m, config.mc_samples, random.Random(seed))
        padded = np.array([*block, *[mask_token_id] * (length - len(block))], dtype=np.int64)
        blocks.append(Block(start, padded, given, patterns, pairs))
    return ScorePlan(tokens[:first], tokens[first:last], tuple(blocks))


def most_patterns(config: LikelihoodConfig) -> int:
    """Return how many patterns a block has at most: a block's cost in forwards of one block."""
    length, samples = config.block_length, config.mc_samples
    if config.method == "chain":
        return length
    return 2**length - 1 if 2**length - 1 <= samples else samples + length


@functools.cache
def chain_patterns(m: int) -> Patterns:
    """Return the m patterns of `chain`: the j-th masks the j-th token and all after it."""
    return Patterns.of(m, b"".join(_packed(range(j, m), m) for j in range(m)), np.ones(m), 0)


@functools.lru_cache(maxsize=64)
def all_patterns(m: int) -> Patterns:
    """Return the 2^m - 1 patterns of `nelbo`."""
    subsets = (s for k in range(1, m + 1) for s in itertools.combinations(range(m), k))
    counts = [math.comb(m, k) for k in range(1, m + 1)]
    weights = np.repeat([1 / (k * count) for k, count in enumerate(counts, 1)], counts)
    return Patterns.of(m, b"".join(_packed(s, m) for s in subsets), weights, 2**m - 1)


def sampled_patterns(m: int, samples: int, rng: random.Random) -> tuple[Patterns, Pairs]:
    """Return sampled patterns of `nelbo`, and those of `chain` at weight 0, which tell whether the text is greedy.

    The noise level is divided into samples / 2 equal strata with two draws in each. The estimate is unbiased, and its
    variance is at most that of independent draws. The differences within the strata estimate the variance, also where
    there are fewer samples than noise levels.

    Args:
        m: scored tokens of the block.
        samples: an even number.
        rng: source of the draws.

    Returns:
        Different patterns, each with the summed weights of its draws; and the pairs of draws, as rows of the patterns.
    """
    drawn = bytearray()
    masked = np.zeros(samples, dtype=np.int64)  # how many tokens each draw masks
    for i in range(samples):
        level = (i // 2 + rng.random()) / (samples // 2)
        masked[i] = k = min(int(level * m), m - 1) + 1  # uniform on 1..m
        drawn += _packed(rng.sample(range(m), k), m)
    rows = np.frombuffer(drawn, dtype=np.uint8).reshape(samples, -1)
    # The different draws, in the order of their first occurrence, and each draw's index among them.
    _, first, which = np.unique(_as_keys(rows), return_index=True, return_inverse=True)
    order = first.argsort()
    number = np.empty_like(order)
    number[order] = np.arange(len(order))
    which = number[which.reshape(-1)]
    of_draw = m / masked / samples
    weights = np.bincount(which, weights=of_draw, minlength=len(order))
    unlike = rows[first[order]]

    chain = chain_patterns(m).bits
    chain = chain[~np.isin(_as_keys(chain), _as_keys(unlike))]
    patterns = Patterns(
        m, np.concatenate([unlike, chain]), np.concatenate([weights, np.zeros(len(chain))]), len(unlike)
    )
    return patterns, Pairs(which.reshape(-1, 2), of_draw.reshape(-1, 2))


def _bytes_of(m: int) -> int:
    return -(-m // 8)


def _packed(masked: Iterable[int], m: int) -> bytes:
    """One row of `Patterns.bits`."""
    return sum(1 << j for j in masked).to_bytes(_bytes_of(m), "little")


def _as_keys(rows: NDArray[np.uint8]) -> NDArray[np.generic]:
    """Rows of bytes (R, W) as R values that numpy can sort and compare."""
    width = rows.shape[1]
    keys = np.zeros((len(rows), max(width, 8) if width <= 8 else width), dtype=np.uint8)
    keys[:, :width] = rows
    return keys.view(np.uint64 if width <= 8 else np.dtype((np.void, width))).reshape(-1)


def _floats(arrays: Iterable[NDArray[np.float64]]) -> Iterator[float]:
    """The arrays' numbers as Python floats, converted a few at a time: floats take more memory than arrays."""
    for array in arrays:
        for start in range(0, len(array), ROWS_AT_ONCE):
            yield from array[start : start + ROWS_AT_ONCE].tolist()
