"""Statistics against scipy's and statsmodels' values, published ones, and simulations with fixed seeds."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import statsmodels.api as sm
from hypothesis import example, given
from hypothesis import strategies as st
from scipy import optimize, stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower

from sdar_lm_eval.report.statistics import (
    ALPHA,
    FEWEST_DISCORDANT,
    PairedTest,
    cluster_values,
    compare_means,
    compare_shares,
    detectable_mean,
    detectable_share,
    exact_mcnemar,
    holm,
    mean_stderr,
    stratified_stderr,
    tango_interval,
    weights_of_strata,
)

COUNTS = st.integers(0, 60)


@given(COUNTS, COUNTS)
def test_exact_mcnemar_is_that_of_statsmodels(only_a: int, only_b: int) -> None:
    expected = mcnemar([[5, only_a], [only_b, 7]], exact=True).pvalue
    assert exact_mcnemar(only_a, only_b) == pytest.approx(min(1.0, expected))


def test_eight_documents_one_way() -> None:
    found = compare_shares(0, 8, 200)
    assert found.p == 2 / 2**8
    assert found.difference == 0.04 and found.low is not None and found.low > 0
    assert found.detectable == detectable_share(200, 8 / 200)
    assert compare_shares(2, 8, 200).detectable == detectable_share(200, 10 / 200)


def test_a_published_interval() -> None:
    """Airway hyper-responsiveness before and after transplantation: Fagerland, Lydersen and Laake (2014), table 3."""
    assert tango_interval(7, 1, 21) == pytest.approx((-0.517, -0.026), abs=5e-4)


def _score_p(only_a: int, only_b: int, n: int, difference: float) -> float:
    """p of the score test of a difference; the nuisance share by numeric maximum likelihood."""

    def cost(share: float) -> float:  # of documents that only a has right
        parts = ((only_a, share), (only_b, share + difference), (n - only_a - only_b, 1 - 2 * share - difference))
        return -sum(count * np.log(part) for count, part in parts if count)

    low, high = max(0.0, -difference), (1 - difference) / 2
    share = optimize.minimize_scalar(cost, bounds=(low, high), method="bounded", options={"xatol": 1e-12}).x
    variance = (2 * share + difference - difference**2) / n
    return float(2 * stats.norm.sf(abs((only_b - only_a) / n - difference) / variance**0.5))


@pytest.mark.parametrize("counts", [(3, 9, 40), (0, 8, 200), (40, 20, 160), (1, 1, 10)])
def test_the_interval_s_ends_are_where_the_score_test_s_p_is_the_level(counts: tuple[int, int, int]) -> None:
    for end in tango_interval(*counts):
        assert _score_p(*counts, end) == pytest.approx(ALPHA, abs=1e-4)


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 40))
@example(0, 6, 0)  # each document goes one way: the interval ends at 1
def test_the_interval_holds_the_difference_and_is_never_a_point(only_a: int, only_b: int, others: int) -> None:
    n = only_a + only_b + others
    if n:
        low, high = tango_interval(only_a, only_b, n)
        assert -1 <= low <= (only_b - only_a) / n <= high <= 1 and high - low > 1e-3
        assert tango_interval(only_b, only_a, n) == pytest.approx((-high, -low), abs=1e-7)


def test_the_t_test_is_that_of_scipy() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.normal(0, 1, 30), rng.normal(0.4, 1, 30)
    found, expected = compare_means(a, b), stats.ttest_rel(b, a)
    interval = expected.confidence_interval()
    assert (found.difference, found.p) == pytest.approx(((b - a).mean(), expected.pvalue))
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert mean_stderr(a) == pytest.approx(stats.sem(a))


def test_few_documents_that_differ_do_not_make_a_difference() -> None:
    a, b = np.zeros(100), np.zeros(100)
    b[:4] = 0.25
    assert stats.ttest_rel(b, a).pvalue < 0.05
    assert compare_means(a, b).p == exact_mcnemar(0, 4) == 0.125
    same = compare_means(a, a)
    assert same == PairedTest(0.0, None, None, 1.0, None)
    assert compare_means(a, a + 0.1).p == 2 / 2**100  # no deviation, and each document differs
    assert compare_means(a[:1], b[:1]).low is None


@pytest.mark.parametrize("tests", [1, 2, 7, 40])
def test_holm_is_that_of_statsmodels(tests: int) -> None:
    p = np.random.default_rng(tests).beta(0.3, 1, tests).round(3).tolist()  # some of them equal
    assert holm(p) == pytest.approx(list(multipletests(p, method="holm")[1]))


def test_holm_of_nothing() -> None:
    assert holm([]) == []


def test_the_error_of_several_answers_is_the_cluster_robust_one() -> None:
    rng = np.random.default_rng(2)
    answers = [rng.normal(rng.normal(), 1, rng.integers(1, 6)) for _ in range(40)]
    flat, groups = np.concatenate(answers), np.repeat(np.arange(40), [len(each) for each in answers])
    fit = sm.OLS(flat, np.ones(len(flat))).fit(cov_type="cluster", cov_kwds={"groups": groups})
    values = cluster_values(answers, weigh_answers=True)
    assert (values.mean(), mean_stderr(values)) == pytest.approx((flat.mean(), fit.bse[0]))
    assert cluster_values(answers) == pytest.approx([each.mean() for each in answers])
    assert mean_stderr(np.ones(1)) is None


# Simulations.


def _simulated(n: int, discordance: float, difference: float, times: int, seed: int) -> list[tuple[int, int]]:
    """(only a, only b) in comparisons of runs whose documents are discordant, and differ, with these probabilities."""
    shares = [(discordance - difference) / 2, (discordance + difference) / 2, 1 - discordance]
    counts = np.random.default_rng(seed).multinomial(n, shares, times)
    return [(int(a), int(b)) for a, b, _ in counts]


def _called_by_mcnemar(counts: list[tuple[int, int]]) -> float:
    p = functools.cache(exact_mcnemar)
    return float(np.mean([p(*each) < ALPHA for each in counts]))


def _called(found: list[PairedTest]) -> float:
    return float(np.mean([each.p < ALPHA for each in found]))


def _covered(intervals: list[tuple[float | None, float | None]], difference: float) -> float:
    return float(
        np.mean([low <= difference <= high for low, high in intervals if low is not None and high is not None])
    )


def test_without_a_difference_one_in_twenty_is_called() -> None:
    """With many discordant documents: the exact test's level is below 5% for few, as p takes few values there."""
    assert 0.04 <= _called_by_mcnemar(_simulated(2000, 0.4, 0.0, 2000, seed=3)) <= 0.06
    assert _called_by_mcnemar(_simulated(200, 0.04, 0.0, 2000, seed=4)) <= 0.04


@pytest.mark.parametrize(
    ("n", "discordance", "difference"),
    [(200, 0.04, 0.0), (200, 0.04, 0.036), (200, 0.05, 0.02), (50, 0.3, 0.1), (1000, 0.1, 0.05), (1319, 0.06, 0.01)],
)
def test_score_intervals_cover(n: int, discordance: float, difference: float) -> None:
    interval = functools.cache(tango_interval)
    intervals = [interval(*each, n) for each in _simulated(n, discordance, difference, 10_000, seed=5)]
    assert 0.935 <= _covered(intervals, difference) <= 0.965


def _repeats(n: int, repeats: int, gain: float, times: int, seed: int) -> list[PairedTest]:
    """Comparisons of sampled runs: a document is right with a probability of its own, which b raises for some."""
    rng = np.random.default_rng(seed)
    share = rng.beta(0.5, 0.5, (times, n))
    raised = share + gain * (1 - share)
    answers_a = rng.random((repeats, times, n)) < share
    answers_b = rng.random((repeats, times, n)) < raised
    return [compare_means(a, b) for a, b in zip(answers_a.mean(0), answers_b.mean(0), strict=True)]


def _intervals(found: list[PairedTest]) -> list[tuple[float | None, float | None]]:
    return [(each.low, each.high) for each in found]


def test_several_answers_a_document() -> None:
    assert 0.04 <= _called(_repeats(200, 4, 0.0, 2000, seed=6)) <= 0.06
    # The mean share is 1/2, so the difference is half of the gain.
    assert 0.935 <= _covered(_intervals(_repeats(200, 4, 0.1, 1500, seed=7)), 0.05) <= 0.965
    assert 0.935 <= _covered(_intervals(_repeats(30, 8, 0.1, 1500, seed=8)), 0.05) <= 0.965


def test_answers_are_not_taken_for_documents() -> None:
    """The t test of all answers, as if they were independent, calls far too often."""
    rng = np.random.default_rng(9)
    wrong = 0
    for _ in range(400):
        share_a, share_b = rng.beta(0.5, 0.5, (2, 50))
        answers = [(rng.random((8, 50)) < share).astype(float) for share in (share_a, share_b)]
        wrong += stats.ttest_rel(answers[0].ravel(), answers[1].ravel()).pvalue < ALPHA
    assert wrong > 80


def test_holm_s_family_wise_error() -> None:
    """Five tests without a difference, and five where three differ."""
    rng = np.random.default_rng(10)
    p = rng.random((4000, 5))
    assert 0.04 <= np.mean([min(holm(list(row))) < ALPHA for row in p]) <= 0.06
    p[:, :3] = 0.0
    assert 0.04 <= np.mean([min(holm(list(row))[3:]) < ALPHA for row in p]) <= 0.06


@pytest.mark.parametrize(("n", "discordance"), [(200, 0.0), (200, 0.04), (200, 0.15), (1319, 0.05), (30, 0.3)])
def test_the_detectable_difference_is_shown_four_times_in_five(n: int, discordance: float) -> None:
    difference = detectable_share(n, discordance)
    assert difference is not None
    found = _simulated(n, max(discordance, difference), difference, 5000, seed=11)
    assert _called_by_mcnemar(found) == pytest.approx(0.8, abs=0.03)


@example(6, 1.0)
@given(st.integers(1, 400), st.floats(0, 1))
def test_the_detectable_difference_is_never_smaller_than_six_documents(n: int, discordance: float) -> None:
    difference = detectable_share(n, discordance)
    if n < FEWEST_DISCORDANT:
        assert difference is None
        assert exact_mcnemar(0, n) >= ALPHA
    else:
        assert difference is not None and FEWEST_DISCORDANT / n <= difference <= 1


@pytest.mark.parametrize("n", [6, 20, 500])
def test_the_detectable_mean_is_that_of_statsmodels(n: int) -> None:
    expected = TTestPower().solve_power(nobs=n, alpha=ALPHA, power=0.8, alternative="larger", effect_size=None)
    two_sided = TTestPower().power(detectable_mean(n, 1.0), n, ALPHA)
    assert two_sided == pytest.approx(0.8, abs=1e-3)
    difference = detectable_mean(n, 2.0)
    assert difference is not None and difference > 2 * expected


def test_the_detectable_mean_is_shown_four_times_in_five() -> None:
    difference = detectable_mean(40, 1.5)
    assert difference is not None and detectable_mean(5, 1.5) is None
    b = np.random.default_rng(12).normal(difference, 1.5, (3000, 40))
    assert _called([compare_means(np.zeros(40), each) for each in b]) == pytest.approx(0.8, abs=0.03)


@pytest.mark.parametrize(("n", "differ", "size"), [(10, 1, 0.25), (50, 2, 0.5), (200, 2, 0.25), (200, 20, 0.25)])
def test_few_documents_that_differ_do_not_promise_a_difference(n: int, differ: int, size: float) -> None:
    """Documents differ by `size` either way, as do means of four answers. The t test's own value is found in 6%, 22%,
    21% and 85% of cases."""
    observed = np.zeros(n)
    observed[:differ] = size
    observed[: differ // 2] = -size
    difference = compare_means(np.zeros(n), observed).detectable
    assert difference is not None
    share = max(differ / n, difference / size)  # of documents that differ
    counts = _simulated(n, share, difference / size, 800, seed=13)
    differences = [np.repeat([-size, size, 0.0], [down, up, n - down - up]) for down, up in counts]
    assert 0.77 <= _called([compare_means(np.zeros(n), each) for each in differences]) <= 0.88


def test_weights_of_strata_give_the_mean_of_means() -> None:
    strata, values = ["a"] * 30 + ["b"] * 50 + ["c"] * 20, np.random.default_rng(0).normal(size=100)
    means = [values[:30].mean(), values[30:80].mean(), values[80:].mean()]
    assert (weights_of_strata(strata) * values).mean() == pytest.approx(np.mean(means))
    errors = [stats.sem(part) for part in (values[:30], values[30:80], values[80:])]
    assert stratified_stderr(values, strata) == pytest.approx(math.sqrt(sum(each**2 for each in errors)) / 3)
    assert stratified_stderr(values[:31], strata[:31]) is None
