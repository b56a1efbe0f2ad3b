from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sdar_lm_eval.engines.native.pages import SCRATCH_PAGE, PagePool


def admit(pool, prompt, block_length=4, more=0):
    """Allocate the pages of a prompt and `more` pages; return the shared pages first."""
    pages = pool.match_prefix(prompt, block_length)
    pool.hold(pages)
    pages = pages + pool.allocate(pool.pages_for(len(prompt)) + more - len(pages))
    pool.insert_prefix(prompt, block_length, pages)
    return pages


def store(pool, prompt, block_length=4):
    """Store a prompt and release its pages, which are idle from then on."""
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
    pool.num_pages += 1  # a page that is neither free nor held
    with pytest.raises(AssertionError, match="a KV page is lost, or free and taken at once"):
        pool.check_integrity([mine])


def test_integrity_notices_a_node_that_no_sequence_writes():
    pool = PagePool(4, 4)
    pool.insert_prefix((1,) * 8, 4, [1, 2])  # no sequence holds these pages
    with pytest.raises(AssertionError, match="no sequence is going to write"):
        pool.check_integrity([])


def test_integrity_notices_a_child_without_its_parent():
    pool, prompt = PagePool(4, 4), (1,) * 8
    parent, child = store(pool, prompt)
    pool.hold([child])
    with pytest.raises(AssertionError, match="a node is held without its parent"):
        pool.check_integrity([[child]])
    pool.release([child])
    pool.hold([parent, child])
    pool.release([child, parent])
    with pytest.raises(AssertionError, match="a node would be evicted too late"):
        pool.check_integrity([])
    pages = pool.allocate(3)  # one more than are free: the parent is evicted
    with pytest.raises(AssertionError, match="a node was evicted before its child"):
        pool.check_integrity([pages])


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
    assert pool.match_prefix(prompt, block_length) == pages[: shared // 16]
    assert shared % block_length == 0


def test_a_prefix_is_matched_by_its_tokens_and_its_block_length():
    pool, prompt = PagePool(20, 4), tuple(range(16))
    pages = store(pool, prompt)
    assert pool.match_prefix(prompt, 4) == pages
    assert pool.match_prefix(prompt[:9], 4) == pages[:2]
    assert pool.match_prefix((*prompt, 7, 7, 7, 7), 4) == pages
    # Equal tokens behind another prefix are another node.
    assert pool.match_prefix((*prompt[:7], 99, *prompt[8:]), 4) == pages[:1]
    assert pool.match_prefix((99, *prompt[1:]), 4) == []
    assert pool.match_prefix(prompt, 2) == []


def test_tokens_of_equal_hash_are_not_mixed_up():
    assert hash((-1,) * 4) == hash((-2,) * 4)
    pool = PagePool(20, 4)
    first, second = store(pool, (-1,) * 4), store(pool, (-2,) * 4)
    assert first != second
    assert pool.match_prefix((-1,) * 4, 4) == first


def test_idle_pages_count_as_free_and_the_least_recently_used_are_evicted_first():
    pool = PagePool(4, 4)
    a, b = store(pool, (1,) * 8), store(pool, (2,) * 8)
    assert pool.free_pages == 4
    pool.hold(a)
    pool.release(a)
    assert pool.allocate(1) == b[1:]  # the leaf of the least recently used prefix
    assert pool.match_prefix((1,) * 8, 4) == a
    assert pool.match_prefix((2,) * 8, 4) == b[:1]
    pool.allocate(3)
    assert pool.match_prefix((1,) * 8, 4) == []


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


def test_a_node_that_was_never_wholly_written_is_evicted():
    pool, prompt = PagePool(8, 4), tuple(range(16))
    pages = admit(pool, prompt, block_length=8)  # nodes of two pages
    pool.written(pages[:3])
    assert [pool.is_written(page) for page in pages] == [True, True, True, False]
    pool.release(pages)
    assert pool.match_prefix(prompt, 8) == pages[:2]
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
    """Sequences are admitted, write, finish, and are preempted. The pages of a matched prefix always hold its KV.

    Prompts are made of two token ids and there are few pages, so most pages are shared, and most nodes are evicted.
    Some block lengths are equal to the page size, others are not.
    """

    PAGE, PAGES = 4, 12

    def __init__(self):
        super().__init__()
        self.pool = PagePool(self.PAGES, self.PAGE)
        self.running = []  # [prompt, block length, pages, tokens stored or shared]
        self.content = {}  # page -> what its KV depends on

    def source(self, prompt, block_length, page):
        """What the KV of a prompt's page depends on: the page's index, and all tokens that its last token sees."""
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
        shared = pool.match_prefix(prompt, block_length)
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
        """Store blocks of a sequence that does not wait, and write to the pages behind its prompt as denoising does."""
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
