"""Statistics of two runs on the same documents: tests, intervals, and the smallest differences that tests can find.

The functions take arrays and counts, and read no files. A difference is run b's value minus run a's value.

Scores of 0 and 1 (wrong and right) have McNemar's exact test, which uses only the discordant documents, those that one
run alone has right. Their interval is Tango's score interval. Other scores have the paired t test. Documents are taken
to be independent of each other. Several answers to one document are not independent, so they form one cluster.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import optimize, stats

FloatArray = npt.NDArray[np.float64]

ALPHA = 0.05
"""A test finds a difference where p is below this level."""

POWER = 0.8
"""`detectable_share` and `detectable_mean` return the true difference that a test finds with this probability."""

FEWEST_DISCORDANT = 6
"""Fewest discordant documents with which the exact test finds a difference: five one way give p = 2 / 2**5 = 0.0625."""

FEWEST_IN_STRATUM = 20
"""Fewest documents of a stratum with which the interval of a mean of strata's means is reliable.

In simulations of 1,000 documents beside 20 others, the interval covered the true difference in 94% to 98% of cases.
With 500 beside 5, the interval covered it in 76% of cases.
"""


@dataclass(frozen=True)
class PairedTest:
    """What the paired values of two runs say about their difference.

    Attributes:
        difference: mean of run b's values minus mean of run a's.
        low: lower end of the 95% interval of the difference; None where the values determine no interval.
        high: upper end of that interval.
        p: two-sided p of the test.
        detectable: smallest true difference that the test finds with probability `POWER` in as many documents; None
            where the test cannot find any, or where the values do not determine it.
    """

    difference: float
    low: float | None
    high: float | None
    p: float
    detectable: float | None


def compare_shares(only_a: int, only_b: int, documents: int) -> PairedTest:
    """Compare the shares of documents that two runs have right.

    Args:
        only_a: number of documents that run a alone has right.
        only_b: number of documents that run b alone has right.
        documents: number of paired documents, at least 1.
    """
    low, high = tango_interval(only_a, only_b, documents)
    return PairedTest(
        difference=(only_b - only_a) / documents,
        low=low,
        high=high,
        p=exact_mcnemar(only_a, only_b),
        detectable=detectable_share(documents, (only_a + only_b) / documents),
    )


def compare_means(a: FloatArray, b: FloatArray) -> PairedTest:
    """Compare the means of two runs by the paired t test.

    The interval is the t interval. Hazard: with few documents whose differences are skewed, the interval covers the
    true difference in less than 95% of cases; with 20 lognormal differences, in 86%.

    Hazard: among many zeros, the t test alone would find a difference in four equal differences. So p is at least
    2 / 2**m, where m documents differ: the p of the exact sign test for m differences of one sign.

    Args:
        a: (n,) run a's value of each document, finite.
        b: (n,) run b's values of the same documents, finite.

    Returns:
        The test. Its interval and `detectable` are None for a single document, and where all differences are equal.
    """
    differences = b - a  # (n,)
    n, mean = len(differences), float(differences.mean())
    differ = int(np.count_nonzero(differences))
    fewest = min(1.0, 2.0 * 0.5**differ)
    stderr = mean_stderr(differences)
    # Rounding gives equal differences of floating-point numbers a tiny standard deviation above 0.
    if stderr is None or stderr <= 1e-12 * max(float(np.abs(a).max()), float(np.abs(b).max())):
        return PairedTest(mean, None, None, fewest, None)
    half = float(stats.t.ppf(1 - ALPHA / 2, n - 1)) * stderr
    p = max(float(2 * stats.t.sf(abs(mean) / stderr, n - 1)), fewest)
    size = float(np.abs(differences).sum()) / differ
    return PairedTest(mean, mean - half, mean + half, p, detectable_mean(n, stderr * math.sqrt(n), size))


def exact_mcnemar(only_a: int, only_b: int) -> float:
    """Return the two-sided p of McNemar's exact test, whose null is that either run alone is right equally often."""
    discordant = only_a + only_b
    return float(stats.binomtest(only_b, discordant, 0.5).pvalue) if discordant else 1.0


def tango_interval(only_a: int, only_b: int, documents: int, level: float = 1 - ALPHA) -> tuple[float, float]:
    """Return Tango's interval of the difference of two paired shares: the differences that a score test accepts.

    The interval has a width even where no document is discordant.

    Source: T. Tango, Equivalence test and confidence interval for the difference in proportions for the paired-sample
    design, Statistics in Medicine 17 (1998), equations 7 and 8; recommended by M. Fagerland, S. Lydersen, P. Laake,
    Statistics in Medicine 33 (2014).

    Args:
        only_a: number of documents that run a alone has right.
        only_b: number of documents that run b alone has right.
        documents: number of paired documents, at least 1.
        level: nominal coverage of the interval, 0 to 1.

    Returns:
        (lower end, upper end), each from -1 to 1.
    """
    n, estimate = documents, (only_b - only_a) / documents
    z = float(stats.norm.ppf((1 + level) / 2))

    def score(difference: float, bound: float) -> float:
        """(score statistic - `bound`) * the statistic's denominator, which is finite at differences of -1 and 1."""
        # The share of documents that a alone has right, if the true difference is `difference`: root of a quadratic.
        linear = (2 * n - only_b + only_a) * difference - only_b - only_a
        constant = -only_a * difference * (1 - difference)
        share = (math.sqrt(max(linear * linear - 8 * n * constant, 0.0)) - linear) / (4 * n)
        variance = n * (2 * share + difference * (1 - difference))
        return only_b - only_a - n * difference - bound * math.sqrt(max(variance, 0.0))

    # At -1 and 1 the statistic is beyond the bound, or, where one of them is the estimate, `score` is 0 there.
    # At other estimates the statistic may be 0 / 0, so the search stops short of them.
    off = 1e-9
    low = optimize.brentq(score, -1.0, estimate - off, args=(z,), xtol=1e-10)
    high = optimize.brentq(score, estimate + off, 1.0, args=(-z,), xtol=1e-10)
    return float(low), float(high)


@functools.lru_cache(maxsize=1024)  # pages and simulations ask again for the same numbers of documents
def detectable_share(documents: int, discordance: float) -> float | None:
    """Return the smallest true difference of shares that McNemar's exact test finds with probability `POWER`.

    The true discordance is taken to be the observed one, or the difference where the difference is larger: a difference
    cannot exceed the discordance. So the result is at least `FEWEST_DISCORDANT` / `documents`, even where two runs
    agree in all documents.

    Args:
        documents: number of paired documents.
        discordance: observed share of discordant documents, 0 to 1.

    Returns:
        0 to 1; None for fewer than `FEWEST_DISCORDANT` documents, in which the test finds no difference.
    """
    if documents < FEWEST_DISCORDANT:
        return None
    counts = np.arange(documents + 1)  # (n + 1,), of discordant documents
    most = _most_the_other_way(counts)

    def power(difference: float) -> float:
        share = max(discordance, difference)
        likely = stats.binom.pmf(counts, documents, share)
        called = stats.binom.cdf(most, counts, (share - difference) / (2 * share))
        return float(likely @ np.where(most < 0, 0.0, called))

    found = float(optimize.brentq(lambda difference: power(difference) - POWER, 1e-9, 1.0, xtol=1e-7))
    return max(found, FEWEST_DISCORDANT / documents)  # `found` is smaller only for six documents, all discordant


def _most_the_other_way(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """For each number of discordant documents, the most that may go the other way while p < ALPHA; -1: p never is."""
    most: npt.NDArray[np.int64] = stats.binom.ppf(ALPHA / 2, counts, 0.5).astype(np.int64)
    most -= 2 * stats.binom.cdf(most, counts, 0.5) >= ALPHA
    return most


def detectable_mean(documents: int, deviation: float, size: float = 0.0) -> float | None:
    """Return the smallest true difference of means that `compare_means` finds with probability `POWER`.

    `compare_means` finds no difference where fewer than `FEWEST_DISCORDANT` documents differ. So the result is at least
    the mean at which enough documents differ, each by `size`. The t test alone would promise too much where few
    documents differ: with 10 documents of which one differs by 0.25, the difference 0.08.

    Args:
        documents: number of paired documents.
        deviation: standard deviation of the documents' differences, above 0.
        size: mean absolute difference of the documents that differ; 0: unknown.

    Returns:
        The difference, in the unit of `deviation`; None for fewer than `FEWEST_DISCORDANT` documents, in which
        `compare_means` finds no difference.
    """
    share = detectable_share(documents, 0.0)
    if share is None:
        return None
    return max(_shown_noncentrality(documents) * deviation / math.sqrt(documents), share * size)


@functools.cache
def _shown_noncentrality(documents: int) -> float:
    """The noncentrality of t at which the test finds a difference with probability `POWER`."""
    bound = float(stats.t.ppf(1 - ALPHA / 2, documents - 1))

    def power(noncentrality: float) -> float:
        return float(stats.nct.sf(bound, documents - 1, noncentrality))

    # At a noncentrality of 2 * bound + 2 the power is above 0.9, for any number of documents.
    return float(optimize.brentq(lambda noncentrality: power(noncentrality) - POWER, 0.0, 2 * bound + 2))


def mean_stderr(values: FloatArray) -> float | None:
    """Return the standard error of the mean of independent values (n,); None for a single value.

    The standard error is clustered by document where `values` are `cluster_values` of documents with several answers.
    """
    return float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None


def cluster_values(answers: Sequence[FloatArray], weigh_answers: bool = False) -> FloatArray:
    """Return one value for each document, such that the values' mean is the metric.

    If each document counts the same, a document's value is the mean of its answers. If each answer counts the same, the
    metric is a ratio of two sums over documents. A document's value is then the ratio plus the document's linear
    contribution to the ratio's error, so the standard error of the values is the cluster-robust one.

    Source: E. Miller, Adding error bars to evals, arXiv 2411.00640, section 2.2, except for the factor n / (n - 1).

    Args:
        answers: for each of the n documents the values of its answers, at least one.
        weigh_answers: True: each answer counts the same; False: each document counts the same.

    Returns:
        (n,) the values.
    """
    if not weigh_answers:
        return np.array([each.mean() for each in answers])
    sums = np.array([each.sum() for each in answers])
    counts = np.array([len(each) for each in answers])
    ratio = float(sums.sum() / counts.sum())
    values: FloatArray = ratio + (sums - ratio * counts) * (len(answers) / counts.sum())
    return values


def weights_of_strata(strata: Sequence[str]) -> FloatArray:
    """Return one weight for each document, so that the mean of weighted values is the mean of the strata's means.

    Weighted differences of two runs suit `compare_means`. Where the strata's true differences differ, the standard
    error of the weighted differences is a little too large.

    Args:
        strata: (n,) each document's stratum.
    """
    sizes = Counter(strata)
    return np.array([len(strata) / (len(sizes) * sizes[each]) for each in strata])


def stratified_stderr(values: FloatArray, strata: Sequence[str]) -> float | None:
    """Return the standard error of the mean of the strata's means; None where a stratum has a single document.

    Args:
        values: (n,) one value for each document.
        strata: (n,) each document's stratum.
    """
    names = np.array(strata)
    parts = [mean_stderr(values[names == each]) for each in dict.fromkeys(strata)]
    known = [each for each in parts if each is not None]
    return math.hypot(*known) / len(parts) if len(known) == len(parts) else None


def holm(p: Sequence[float]) -> list[float]:
    """Return p-values after Holm's adjustment, in the order of `p`.

    If each test finds a difference where the adjusted p is below alpha, the probability of any false finding is at most
    alpha.

    Source: S. Holm, A simple sequentially rejective multiple test procedure, Scandinavian Journal of Statistics 6
    (1979).
    """
    adjusted, largest = [0.0] * len(p), 0.0
    for rank, index in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        largest = max(largest, min(1.0, (len(p) - rank) * p[index]))
        adjusted[index] = largest
    return adjusted
