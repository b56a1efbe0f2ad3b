from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdar_lm_eval.engines.native.pages import SCRATCH_PAGE, PagePool


def test_pages_for_rounds_up():
    pool = PagePool(4, page_size=16)
    assert [pool.pages_for(n) for n in (1, 16, 17, 32, 33)] == [1, 1, 2, 2, 3]


def test_the_scratch_page_is_never_given_out():
    assert SCRATCH_PAGE not in PagePool(5, 16).allocate(5)


def test_integrity_notices_a_lost_and_a_doubled_page():
    pool = PagePool(4, 16)
    mine = pool.allocate(2)
    pool.check_integrity([mine])
    with pytest.raises(AssertionError, match="lost or owned twice"):
        pool.check_integrity([mine[:1]])
    with pytest.raises(AssertionError, match="lost or owned twice"):
        pool.check_integrity([mine, mine])


@given(st.lists(st.integers(0, 4), max_size=30))
def test_books_balance_whatever_comes_and_goes(asks):
    pool, owners = PagePool(10, 16), []
    for ask in asks:
        if ask <= pool.free_pages and ask:
            owners.append(pool.allocate(ask))
        elif owners:
            pool.release(owners.pop(0))
        pool.check_integrity(owners)
        assert pool.free_pages == 10 - sum(map(len, owners))
