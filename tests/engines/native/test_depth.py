"""The depth of guesses that `Depths` chooses, for GPUs whose forwards take made-up times."""

from __future__ import annotations

import pytest

from sdar_lm_eval.engines.native import depth as depths
from sdar_lm_eval.engines.native.depth import Depths

LEVELS, BLOCK = 3, 4


def forwards(chosen, active, steps, seconds, count):
    """The depths of `count` forwards; `steps` and `seconds` are those of a forward by its depth."""
    taken = []
    for _ in range(count):
        depth, counts = chosen.next(active)
        taken.append(depth)
        if counts:
            chosen.measured(active, depth, steps[depth], seconds[depth])
    return taken


STEPS = (1, 1.6, 1.9, 2.3)


@pytest.mark.parametrize(
    ("seconds", "best"),
    [
        ((1, 1, 1, 1), 3),  # rows cost nothing
        ((1, 1.7, 2.4, 3.1), 0),  # a row costs as much as a step saves, or more
        ((1, 1.1, 1.9, 2.9), 1),
        ((1, 1.59, 1.9, 2.3), 0),  # no gain that noise could not explain
    ],
)
def test_the_fastest_depth_is_taken(seconds, best):
    chosen = Depths(LEVELS, BLOCK)
    taken = forwards(chosen, 8, STEPS, seconds, 3000)
    measuring = (LEVELS + 1) * depths.PHASE
    assert set(taken[:measuring]) == {0, 1, 2, 3}
    others = sum(depth != best for depth in taken[measuring:])
    assert 0 < others <= (3000 - measuring) * depths.PHASE / depths.PERIOD


def test_it_follows_a_change():
    chosen = Depths(1, BLOCK)
    assert forwards(chosen, 8, (1, 1.6), (1, 1.1), 200)[-1] == 1
    assert forwards(chosen, 8, (1, 1.05), (1, 1.1), 200)[-1] == 0
    assert forwards(chosen, 8, (1, 1.6), (1, 1.1), 4 * depths.PERIOD)[-1] == 1


def test_large_batches_have_no_guesses():
    chosen = Depths(LEVELS, BLOCK)
    most = depths.MOST_ROWS // BLOCK
    assert set(forwards(chosen, most + 1, STEPS, (1, 1, 1, 1), 3000)) == {0}
    assert forwards(chosen, most, STEPS, (1, 1, 1, 1), 3000)[-1] == 3


def test_a_batch_of_another_size_begins_with_what_is_known():
    chosen = Depths(LEVELS, BLOCK)
    forwards(chosen, 8, STEPS, (1, 1, 1, 2), 200)  # depth 2 is best
    assert set(forwards(chosen, 4, STEPS, (1, 1, 1, 2), 200)) == {0, 2}
    assert forwards(chosen, 8, STEPS, (1, 1, 1, 2), 1) == [2]  # and this size is not forgotten


def test_the_first_forwards_of_a_phase_do_not_count():
    """The first one has no guesses yet."""
    chosen = Depths(1, BLOCK)
    counts = [chosen.next(4)[1] for _ in range(depths.PHASE)]
    assert counts == [False] * depths.UNMEASURED + [True] * (depths.PHASE - depths.UNMEASURED)
