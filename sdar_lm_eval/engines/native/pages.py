"""The allocator of KV pages, and the prefix cache over these pages. No tensors: `forward/cache.py` has those.

Prompts with a common prefix share the KV pages of this prefix. The prefix cache is a tree. A node holds as many tokens
as the fewest whole pages that are also whole blocks. A token sees its whole block and no later one, so the KV of a node
depends on three things only: the node's tokens, the tokens before them, and the block length. The key of a node
consists of the tokens themselves, so a hash collision cannot return another prefix.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

SCRATCH_PAGE = 0  # padding rows of a batch write here; no sequence holds or reads this page

# Block length, last page of the parent node (SCRATCH_PAGE: no parent), tokens. The parent's page stands for all tokens
# before: a node is evicted before its parent, so while a node exists, its parent's page holds the same KV.
Key = tuple[int, int, tuple[int, ...]]


class PagePool:
    """A fixed number of pages of `page_size` tokens each, held by any number of sequences.

    A node that no sequence holds stays in the prefix cache until its pages are needed. The least recently used node is
    evicted first.

    Args:
        num_pages: pages that can be allocated; the scratch page is one more.
        page_size: tokens a page.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self._free = list(range(num_pages, SCRATCH_PAGE, -1))  # pages that no sequence holds and no node has
        self._holders: dict[int, int] = {}  # held page -> number of sequences that hold it
        self._nodes: dict[Key, tuple[int, ...]] = {}  # key of a node -> its pages
        self._key_of_page: dict[int, Key] = {}  # page of a node -> the node's key
        self._unwritten: set[int] = set()  # pages of nodes whose KV is not stored yet
        self._idle: dict[Key, None] = {}  # nodes that no sequence holds, the least recently used first

    @property
    def free_pages(self) -> int:
        """Number of pages that can be allocated now: no sequence holds them."""
        return self.num_pages - len(self._holders)

    def pages_for(self, tokens: int) -> int:
        """Number of pages that hold this many tokens."""
        return -(-tokens // self.page_size)

    def allocate(self, count: int) -> list[int]:
        """Allocate `count` pages. The caller has checked `free_pages`."""
        assert count <= self.free_pages, f"{count} pages asked of {self.free_pages} free ones"
        while len(self._free) < count:
            self._evict(next(iter(self._idle)))
        pages = [self._free.pop() for _ in range(count)]
        self._holders.update(dict.fromkeys(pages, 1))
        return pages

    def release(self, pages: Sequence[int]) -> None:
        """Release all pages of one sequence. Pages that another sequence holds stay held."""
        for page in reversed(pages):  # so that a node becomes idle before its parent, and is evicted before it
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            del self._holders[page]
            key = self._key_of_page.get(page)
            if key is None:
                self._free.append(page)
            elif page == self._nodes[key][0]:
                self._idle[key] = None
                if not self._unwritten.isdisjoint(self._nodes[key]):
                    self._evict(key)

    def match_prefix(self, prompt: tuple[int, ...], block_length: int) -> list[int]:
        """The pages of a prompt's longest cached prefix. The caller does not hold them yet: see `hold`."""
        pages: list[int] = []
        for tokens in self._node_tokens(prompt, block_length):
            node = self._nodes.get((block_length, pages[-1] if pages else SCRATCH_PAGE, tokens))
            if node is None:
                break
            pages += node
        return pages

    def idle(self, pages: Iterable[int]) -> int:
        """Number of these pages that no sequence holds. Holding the pages lowers `free_pages` by this number."""
        return sum(page not in self._holders for page in pages)

    def hold(self, pages: Sequence[int]) -> None:
        """Hold the pages that `match_prefix` returned for one more sequence."""
        for page in pages:
            self._holders[page] = self._holders.get(page, 0) + 1
            self._idle.pop(self._key_of_page[page], None)

    def insert_prefix(self, prompt: tuple[int, ...], block_length: int, pages: Sequence[int]) -> None:
        """Add the nodes of a prompt to the prefix cache before their KV is stored. The KV has to be stored in order.

        Args:
            prompt: tokens.
            block_length: tokens denoised together.
            pages: the prompt's pages; the first of them are those of `match_prefix`.
        """
        end = 0
        for tokens in self._node_tokens(prompt, block_length):
            key = (block_length, pages[end - 1] if end else SCRATCH_PAGE, tokens)
            begin, end = end, end + len(tokens) // self.page_size
            if key not in self._nodes:
                self._nodes[key] = node = tuple(pages[begin:end])
                self._key_of_page.update(dict.fromkeys(node, key))
                self._unwritten.update(node)

    def written(self, pages: Iterable[int]) -> None:
        """Take note that the KV of pages is stored."""
        self._unwritten.difference_update(pages)

    def is_written(self, page: int) -> bool:
        """Whether the KV of a node's page is stored."""
        return page not in self._unwritten

    def may_write(self, page: int) -> bool:
        """Whether a held page may be written: its KV is still to be stored, or only one sequence uses the page."""
        return page in self._unwritten or (self._holders[page] == 1 and page not in self._key_of_page)

    def evict_idle(self) -> None:
        """Evict every node that no sequence holds."""
        for key in list(self._idle):  # in this order, a node is evicted before its parent
            self._evict(key)

    def _node_tokens(self, prompt: tuple[int, ...], block_length: int) -> Iterator[tuple[int, ...]]:
        """The tokens of each node of a prompt, from the root on. Tokens that fill no whole node are left out."""
        length = math.lcm(self.page_size, block_length)
        return (prompt[end - length : end] for end in range(length, len(prompt) + 1, length))

    def _evict(self, key: Key) -> None:
        """Evict one node that no sequence holds, and free its pages. Its children have to be evicted before."""
        del self._idle[key]
        pages = self._nodes.pop(key)
        for page in pages:
            del self._key_of_page[page]
        self._unwritten.difference_update(pages)
        self._free.extend(reversed(pages))

    def check_integrity(self, holders: Iterable[Sequence[int]]) -> None:
        """Assert that the pool's books are consistent.

        Args:
            holders: the pages of each sequence that holds some.
        """
        held = Counter(page for pages in holders for page in pages)
        assert held == self._holders, "a KV page is lost, or held more or less often than the books say"
        idle = [page for key in self._idle for page in self._nodes[key]]
        everything = sorted([*self._free, *idle, *held])
        assert everything == list(range(1, self.num_pages + 1)), "a KV page is lost, or free and taken at once"
        assert self._key_of_page == {page: key for key, pages in self._nodes.items() for page in pages}
        assert self._unwritten <= self._key_of_page.keys() & held.keys(), "no sequence is going to write a page"
        eviction = {key: rank for rank, key in enumerate(self._idle)}
        for key, pages in self._nodes.items():
            assert len({held[page] for page in pages}) == 1, "a node is held in part"
            assert (key in self._idle) == (not held[pages[0]]), "a node is idle and held"
            if key[1] != SCRATCH_PAGE:
                parent = self._key_of_page.get(key[1])
                assert parent is not None, "a node was evicted before its child"
                assert held[pages[0]] <= held[key[1]], "a node is held without its parent"
                assert eviction.get(key, -1) < eviction.get(parent, len(eviction)), "a node would be evicted too late"
