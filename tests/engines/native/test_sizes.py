"""The sizes of CUDA graphs. Here a function returns the times, because the CPU has no CUDA events."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdar_lm_eval.engines.native.forward.sizes import (
    FLAT,
    MOST_COST,
    MOST_COST_OF_FEW,
    MOST_MEASURED,
    candidates,
    chosen,
    grid,
    measured,
    unmeasured,
)


@given(st.integers(1, 3000), st.sampled_from([1, 3, 4, 8, 64]))
def test_candidates_lead_to_the_largest_size(most, rows):
    found = candidates(most, rows)
    assert list(found) == sorted(set(found))
    assert found[0] >= 2 and found[-1] == max(most, 2)
    for before, size in itertools.pairwise(found):
        assert (size - before) * rows <= max(48, size * rows / 16, 2 * rows)


@given(st.integers(1, 40000))
def test_a_grid_is_the_start_of_every_larger_one(most):
    assert grid(most) == grid(1 << 16)[: len(grid(most))]
    assert grid(most)[-1] >= most and (len(grid(most)) <= 2 or grid(most)[-2] < most)


def test_the_lower_limit_of_full_batches_holds_for_the_first_of_them():
    """5 would be cheap enough for a need of 2, but not for 3, which is more than half of 5."""
    assert chosen((2, 3, 5), (1.0, 1.0, 1.0625)) == (3, 5)


@given(st.lists(st.floats(1, 3), min_size=1, max_size=60), st.sampled_from([1, 4, 64]), st.data())
def test_padding_costs_little_whatever_is_needed(seconds, rows, data):
    some = sorted(data.draw(st.sets(st.integers(2, 2000), min_size=len(seconds), max_size=len(seconds))))
    found, costs = chosen(some, seconds, rows), {}
    for size, time in zip(some, seconds, strict=True):
        costs[size] = time * max(size * rows, FLAT)

    def limit(need):
        most = MOST_COST if 2 * need >= some[-1] else MOST_COST_OF_FEW
        return most * min(cost for size, cost in costs.items() if size >= need)

    for need in some:
        assert costs[next(size for size in found if size >= need)] <= limit(need)
    # Any larger size costs too much for a need that it serves.
    for before, size in itertools.pairwise([0, *found[:-1]]):
        for larger in some[some.index(size) + 1 :]:
            assert any(costs[larger] > limit(need) for need in some if before < need <= larger)


def test_a_slow_size_is_left_out_and_the_end_of_a_stair_is_chosen():
    """Times of two layers of SDAR-4B on an H200, in microseconds."""
    times = {1232: 793, 1248: 799, 1264: 828, 1280: 886, 1296: 869, 1312: 881, 1328: 882, 1344: 919}
    assert chosen(list(times), list(times.values())) == (1248, 1264, 1312, 1328, 1344)


def test_padding_that_saves_time_has_no_limit():
    """Times of all layers of SDAR-4B on an H100, in milliseconds: 320 rows take longer than 384."""
    times = {272: 4.0, 288: 4.1, 304: 5.6, 320: 5.7, 336: 4.3, 384: 4.6, 416: 5.7}
    assert chosen(list(times), list(times.values())) == (272, 288, 336, 384, 416)


def test_full_batches_have_the_densest_sizes():
    """On one stair, the rows alone count."""
    found = chosen(grid(2048), [1.0] * len(grid(2048)))
    assert found[0] // 16 * 16 == FLAT * MOST_COST_OF_FEW // 16 * 16
    for before, size in itertools.pairwise(found):
        assert size <= (MOST_COST if before >= 1024 else MOST_COST_OF_FEW) * (before + 64)
    assert sum(size > 1024 for size in found) > len(found) / 2


@pytest.mark.parametrize(("most", "rows"), [(512, 4), (128, 64), (512, 64), (16384, 1)])
def test_sizes_without_times_begin_with_few_rows_and_are_not_many(most, rows):
    """A capture takes about 27 ms with SDAR-4B."""
    found = unmeasured(most, rows)
    assert found[0] * rows <= max(16, 2 * rows)
    assert sum(size * rows <= FLAT for size in found) >= 2
    assert len(found) < 100


def test_without_times_sizes_are_chosen_all_the_same():
    """Memory can lack for a measurement."""
    assert measured(512, 4, lambda most: {}) == unmeasured(512, 4)


def test_the_measurement_is_bounded():
    """More rows would take minutes; beyond it, times are proportional to rows."""
    asked = []

    def times(most):
        asked.append(most)
        return dict.fromkeys(grid(most), 1.0)

    found = measured(1 << 14, 4, times)
    assert asked == [MOST_MEASURED]
    assert found[-1] == 1 << 14
    for before, size in itertools.pairwise(found):
        most = MOST_COST if before >= 1 << 13 else MOST_COST_OF_FEW
        if before * 4 >= MOST_MEASURED:  # the cost of proportional times grows as the square of the rows
            most **= 0.5
        assert size * 4 <= most * (before * 4 + 512)  # the next number of rows is at most 512 away
    assert len(found) < 100


def test_a_size_between_two_measured_sizes_counts_as_the_larger():
    """Sizes are multiples of 5 rows here. 1,280 rows take long, so multiples between 1,264 and 1,280 are left out."""
    slow = {size * 5 for size in range(1, 401) if 1264 < size * 5 <= 1280}
    times = {rows: 2.0 if rows == 1280 else 1.0 for rows in grid(4000)}
    assert slow and not slow & {size * 5 for size in measured(800, 5, lambda most: times)}


def test_another_error_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        measured(512, 4, lambda most: {1: 1 / 0})
