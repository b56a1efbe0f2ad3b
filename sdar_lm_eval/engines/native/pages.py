"""The books of the KV pages: which are free, which are held, what is in them. No tensors; those are in `runner.py`.

Prompts that begin alike share the pages of their beginning, stretch by stretch. A stretch is the fewest whole pages
that are whole blocks too: a token sees all of its own block and nothing behind it, so that the KV of a stretch follows
from its tokens, those before them and the block length. A stretch is told by exactly these, never by a hash alone.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

SCRATCH_PAGE = 0  # padding rows of a batch write here; nobody holds it and nobody reads it

# Block length, last page of the stretch before (SCRATCH_PAGE: none), tokens. That page stands for all tokens before: a
# stretch is forgotten before the one it follows.
Key = tuple[int, int, tuple[int, ...]]


class PagePool:
    """A fixed number of pages of `page_size` tokens each, held by any number of sequences.

    Stretches that nobody holds any more stay to be found until their pages are needed: the longest unused go first.

    Args:
        num_pages: pages that can be given out; the scratch page is one more.
        page_size: tokens a page.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self._free = list(range(num_pages, SCRATCH_PAGE, -1))  # with nothing in them that could be found
        self._holders: dict[int, int] = {}  # of each page that is held, how many
        self._stretches: dict[Key, tuple[int, ...]] = {}
        self._key_of: dict[int, Key] = {}  # of each page of a stretch
        self._unwritten: set[int] = set()  # pages of stretches whose KV is still to come
        self._idle: dict[Key, None] = {}  # stretches that nobody holds, the longest unused first

    @property
    def free_pages(self) -> int:
        """How many pages can be given out now: nobody holds them."""
        return self.num_pages - len(self._holders)

    def pages_for(self, tokens: int) -> int:
        """How many pages hold so many tokens."""
        return -(-tokens // self.page_size)

    def allocate(self, count: int) -> list[int]:
        """Give out `count` pages; the caller has seen that they are free."""
        assert count <= self.free_pages, f"{count} pages asked of {self.free_pages} free ones"
        while len(self._free) < count:
            self._forget(next(iter(self._idle)))
        pages = [self._free.pop() for _ in range(count)]
        self._holders.update(dict.fromkeys(pages, 1))
        return pages

    def release(self, pages: Sequence[int]) -> None:
        """Take the pages of a sequence back, all of them; those that others hold stay theirs."""
        for page in reversed(pages):  # so that a stretch is idle before the one it follows, and forgotten before it
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            del self._holders[page]
            key = self._key_of.get(page)
            if key is None:
                self._free.append(page)
            elif page == self._stretches[key][0]:
                self._idle[key] = None
                if not self._unwritten.isdisjoint(self._stretches[key]):
                    self._forget(key)

    def find(self, prompt: tuple[int, ...], block_length: int) -> list[int]:
        """The pages of the longest beginning of a prompt that is known. Nobody holds them for it yet: see `hold`."""
        pages: list[int] = []
        for tokens in self._cut(prompt, block_length):
            stretch = self._stretches.get((block_length, pages[-1] if pages else SCRATCH_PAGE, tokens))
            if stretch is None:
                break
            pages += stretch
        return pages

    def idle(self, pages: Iterable[int]) -> int:
        """How many of the pages nobody holds: holding them makes so many fewer free."""
        return sum(page not in self._holders for page in pages)

    def hold(self, pages: Sequence[int]) -> None:
        """Hold what `find` found for one more sequence."""
        for page in pages:
            self._holders[page] = self._holders.get(page, 0) + 1
            self._idle.pop(self._key_of[page], None)

    def announce(self, prompt: tuple[int, ...], block_length: int, pages: Sequence[int]) -> None:
        """Let a prompt's beginning be found, before it is written: what is new of it is going to be, in order.

        Args:
            prompt: tokens.
            block_length: tokens denoised together.
            pages: of the prompt; they begin with what `find` finds.
        """
        end = 0
        for tokens in self._cut(prompt, block_length):
            key = (block_length, pages[end - 1] if end else SCRATCH_PAGE, tokens)
            begin, end = end, end + len(tokens) // self.page_size
            if key not in self._stretches:
                self._stretches[key] = stretch = tuple(pages[begin:end])
                self._key_of.update(dict.fromkeys(stretch, key))
                self._unwritten.update(stretch)

    def written(self, pages: Iterable[int]) -> None:
        """Take note that the KV of pages is stored."""
        self._unwritten.difference_update(pages)

    def is_written(self, page: int) -> bool:
        """Whether the KV of a page that was found is stored."""
        return page not in self._unwritten

    def may_write(self, page: int) -> bool:
        """Whether its holder may write to a page: nobody reads it, or not before it is written."""
        return page in self._unwritten or (self._holders[page] == 1 and page not in self._key_of)

    def forget_idle(self) -> None:
        """Let nothing be found of what nobody holds."""
        for key in list(self._idle):  # in this order, a stretch goes before the one it follows
            self._forget(key)

    def _cut(self, prompt: tuple[int, ...], block_length: int) -> Iterator[tuple[int, ...]]:
        """The tokens of a prompt's whole stretches."""
        length = math.lcm(self.page_size, block_length)
        return (prompt[end - length : end] for end in range(length, len(prompt) + 1, length))

    def _forget(self, key: Key) -> None:
        """Free the pages of an idle stretch."""
        del self._idle[key]
        pages = self._stretches.pop(key)
        for page in pages:
            del self._key_of[page]
        self._unwritten.difference_update(pages)
        self._free.extend(reversed(pages))

    def check_integrity(self, holders: Iterable[Sequence[int]]) -> None:
        """Assert that the books are right.

        Args:
            holders: the pages of each sequence that holds some.
        """
        held = Counter(page for pages in holders for page in pages)
        assert held == self._holders, "a KV page is lost, or held more or less often than the books say"
        idle = [page for key in self._idle for page in self._stretches[key]]
        everything = sorted([*self._free, *idle, *held])
        assert everything == list(range(1, self.num_pages + 1)), "a KV page is lost, or free and taken at once"
        assert self._key_of == {page: key for key, pages in self._stretches.items() for page in pages}
        assert self._unwritten <= self._key_of.keys() & held.keys(), "nobody is going to write a page"
        order = {key: place for place, key in enumerate(self._idle)}
        for key, pages in self._stretches.items():
            assert len({held[page] for page in pages}) == 1, "a stretch is held in part"
            assert (key in self._idle) == (not held[pages[0]]), "a stretch is idle and held"
            if key[1] != SCRATCH_PAGE:
                before = self._key_of.get(key[1])
                assert before is not None, "what a stretch follows was forgotten before it"
                assert held[pages[0]] <= held[key[1]], "a stretch is held without what it follows"
                assert order.get(key, -1) < order.get(before, len(order)), "a stretch would be forgotten too late"
