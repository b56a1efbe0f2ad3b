from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sdar_lm_eval.engines.native.pages import SCRATCH_PAGE, PagePool


def admit(pool, prompt, block_length=4, more=0):
    """The pages of a prompt, and `more`; those that it shares first."""
    pages = pool.find(prompt, block_length)
    pool.hold(pages)
    pages = pages + pool.allocate(pool.pages_for(len(prompt)) + more - len(pages))
    pool.announce(prompt, block_length, pages)
    return pages


def store(pool, prompt, block_length=4):
    """Have a prompt written and finished: its pages are idle."""
    pages = admit(pool, prompt, block_length)
    pool.written(pages)
    pool.release(pages)
    pool.check_integrity([])
    return pages


def test_pages_for_rounds_up():
    pool = PagePool(4, page_size=16)
    assert [pool.pages_for(n) for n in (1, 16, 17, 32, 33)] == [1, 1, 2, 2, 3]


def test_the_scratch_page_is_never_given_out():
    assert SCRATCH_PAGE not in PagePool(5, 16).allocate(5)


def test_integrity_notices_a_lost_a_doubled_and_a_miscounted_page():
    pool = PagePool(4, 16)
    mine = pool.allocate(2)
    pool.check_integrity([mine])
    for holders in ([mine[:1]], [mine, mine], []):
        with pytest.raises(AssertionError, match="held more or less often than the books say"):
            pool.check_integrity(holders)
    pool._free.append(mine[0])
    with pytest.raises(AssertionError, match="free and taken at once"):
        pool.check_integrity([mine])


def test_integrity_notices_stretches_out_of_order():
    pool, prompt = PagePool(4, 4), (1,) * 8
    first, last = store(pool, prompt)
    pool._unwritten.add(last)
    with pytest.raises(AssertionError, match="nobody is going to write"):
        pool.check_integrity([])
    pool.written([last])
    pool.hold([last])
    with pytest.raises(AssertionError, match="held without what it follows"):
        pool.check_integrity([[last]])
    pool.release([last])
    with pytest.raises(AssertionError, match="forgotten too late"):
        pool.hold([first, last])
        pool.release([last, first])
        pool.check_integrity([])
    pool._forget(pool._key_of[first])
    with pytest.raises(AssertionError, match="forgotten before it"):
        pool.check_integrity([])


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


@pytest.mark.parametrize(
    ("block_length", "shared"), [(1, 112), (4, 112), (16, 112), (32, 96), (64, 64), (24, 96), (3, 96), (5, 80), (63, 0)]
)
def test_what_is_shared_is_whole_pages_and_whole_blocks(block_length, shared):
    pool, prompt = PagePool(20, 16), tuple(range(120))
    pages = store(pool, prompt, block_length)
    assert pool.find(prompt, block_length) == pages[: shared // 16]
    assert shared % block_length == 0


def test_a_beginning_is_found_by_its_tokens_and_its_block_length():
    pool, prompt = PagePool(20, 4), tuple(range(16))
    pages = store(pool, prompt)
    assert pool.find(prompt, 4) == pages
    assert pool.find(prompt[:9], 4) == pages[:2]
    assert pool.find((*prompt, 7, 7, 7, 7), 4) == pages
    assert pool.find((*prompt[:7], 99, *prompt[8:]), 4) == pages[:1]  # the same page behind another one is another
    assert pool.find((99, *prompt[1:]), 4) == []
    assert pool.find(prompt, 2) == []


def test_tokens_of_equal_hash_are_not_mixed_up():
    assert hash((-1,) * 4) == hash((-2,) * 4)
    pool = PagePool(20, 4)
    first, second = store(pool, (-1,) * 4), store(pool, (-2,) * 4)
    assert first != second
    assert pool.find((-1,) * 4, 4) == first


def test_idle_pages_count_as_free_and_the_longest_unused_go_first():
    pool = PagePool(4, 4)
    a, b = store(pool, (1,) * 8), store(pool, (2,) * 8)
    assert pool.free_pages == 4
    pool.hold(a)
    pool.release(a)
    assert pool.allocate(1) == b[1:]  # the end of what was unused the longest
    assert pool.find((1,) * 8, 4) == a
    assert pool.find((2,) * 8, 4) == b[:1]
    pool.allocate(3)
    assert pool.find((1,) * 8, 4) == []


def test_what_is_held_is_kept_whoever_else_lets_go():
    pool = PagePool(3, 4)
    pages = admit(pool, (1,) * 8)
    pool.written(pages)
    assert admit(pool, (1,) * 8) == pages
    pool.release(pages)
    assert pool.free_pages == 1
    assert pool.idle(pages) == 0
    pool.check_integrity([pages])
    pool.release(pages)
    assert pool.free_pages == 3
    assert pool.idle(pages) == 2


def test_a_stretch_that_was_never_wholly_written_is_forgotten():
    pool, prompt = PagePool(8, 4), tuple(range(16))
    pages = admit(pool, prompt, block_length=8)  # stretches of two pages
    pool.written(pages[:3])
    assert [pool.is_written(page) for page in pages] == [True, True, True, False]
    pool.release(pages)
    assert pool.find(prompt, 8) == pages[:2]
    pool.check_integrity([])


def test_only_pages_that_nobody_reads_may_be_written():
    pool = PagePool(8, 4)
    first, last, own = pages = admit(pool, (1,) * 8, more=1)
    assert all(map(pool.may_write, pages))
    pool.written([first])
    assert [pool.may_write(page) for page in pages] == [False, True, True]
    pool.written([last])
    assert not pool.may_write(last)
    assert pool.may_write(own)


class Books(RuleBasedStateMachine):
    """Sequences come, write, finish, are preempted; the pages of a beginning that is found always hold its KV.

    Blocks and pages of 4 tokens and others, prompts of two tokens, few pages: most of it is shared, and evicted.
    """

    PAGE, PAGES = 4, 12

    def __init__(self):
        super().__init__()
        self.pool = PagePool(self.PAGES, self.PAGE)
        self.running = []  # [prompt, block length, pages, tokens stored or shared]
        self.content = {}  # what a page's KV follows from

    def source(self, prompt, block_length, page):
        """What the KV of a prompt's page follows from: its place, and all that its last token sees."""
        return block_length, page, prompt[: math.ceil((page + 1) * self.PAGE / block_length) * block_length]

    def is_right(self, prompt, block_length, page, number):
        return self.content.get(number) == self.source(prompt, block_length, page)

    def may_share(self, prompt, block_length):
        length = math.lcm(self.PAGE, block_length)
        return len(prompt) // length * length // self.PAGE

    @rule(
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=30).map(tuple),
        block_length=st.sampled_from([1, 4, 6, 8]),
        more=st.integers(0, 2),
    )
    def admit(self, prompt, block_length, more):
        pool = self.pool
        shared = pool.find(prompt, block_length)
        own = pool.pages_for(len(prompt)) + more - len(shared)
        if pool.free_pages < own + pool.idle(shared):
            return
        assert len(shared) <= self.may_share(prompt, block_length)
        waited_for = {page for _, _, pages, _ in self.running for page in pages}
        for page, number in enumerate(shared):
            assert self.is_right(prompt, block_length, page, number) or number in waited_for
        for other, length, pages, _ in self.running:
            if length == block_length:
                alike = next((i for i, (a, b) in enumerate(zip(prompt, other, strict=False)) if a != b), 99)
                alike = min(alike, len(prompt), len(other))
                same = self.may_share(prompt[:alike], length)
                assert pages[:same] == shared[:same]
        before = pool.free_pages
        pages = admit(pool, prompt, block_length, more)
        assert pages[: len(shared)] == shared
        assert before - pool.free_pages == len(set(pages) - waited_for)
        assert not waited_for & set(pages[len(shared) :])
        for number in pages[len(shared) :]:
            self.content[number] = None
        self.running.append([prompt, block_length, pages, len(shared) * self.PAGE])

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def write(self, data):
        """A block or more of one that does not wait; then what follows the prompt, too, is written as in denoising."""
        ready = [s for s in self.running if s[3] < self.PAGE or self.pool.is_written(s[2][s[3] // self.PAGE - 1])]
        sequence = data.draw(st.sampled_from(ready))
        prompt, length, pages, stored = sequence
        blocks = (len(prompt) - stored) // length
        end = stored + length * data.draw(st.integers(0, blocks))
        shared = self.may_share(prompt, length)
        for number in pages[stored // self.PAGE : self.pool.pages_for(end)] + pages[shared:]:
            assert self.pool.may_write(number)
            self.content[number] = None
        for page in range(stored // self.PAGE, end // self.PAGE):
            self.content[pages[page]] = self.source(prompt, length, page)
        self.pool.written(pages[: end // self.PAGE])
        sequence[3] = end
        for page in range(min(end // self.PAGE, shared)):
            assert self.is_right(prompt, length, page, pages[page])

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def finish(self, data):
        done = [s for s in self.running if s[3] == len(s[0]) // s[1] * s[1] and all(map(self.pool.is_written, s[2]))]
        if done:
            sequence = data.draw(st.sampled_from(done))
            self.running.remove(sequence)
            self.pool.release(sequence[2])

    @precondition(lambda self: self.running)
    @rule()
    def preempt_the_youngest(self):
        self.pool.release(self.running.pop()[2])

    @invariant()
    def books_balance(self):
        self.pool.check_integrity(pages for _, _, pages, _ in self.running)

    @invariant()
    def what_is_written_stays(self):
        for prompt, length, pages, _ in self.running:
            for page in range(self.may_share(prompt, length)):
                assert self.is_right(prompt, length, page, pages[page]) == self.pool.is_written(pages[page])


TestBooks = Books.TestCase
TestBooks.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
