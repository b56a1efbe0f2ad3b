"""The books of the KV pages: which are free, which are taken. No tensors; the pages themselves are in `runner.py`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

SCRATCH_PAGE = 0  # padding rows of a batch write here; nobody owns it and nobody reads it


class PagePool:
    """A fixed number of pages of `page_size` tokens each, given out and taken back whole.

    Args:
        num_pages: pages that can be given out; the scratch page is one more.
        page_size: tokens a page.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self._free = list(range(num_pages, SCRATCH_PAGE, -1))

    @property
    def free_pages(self) -> int:
        """How many pages can be given out now."""
        return len(self._free)

    def pages_for(self, tokens: int) -> int:
        """How many pages hold so many tokens."""
        return -(-tokens // self.page_size)

    def allocate(self, count: int) -> list[int]:
        """Give out `count` pages; the caller has seen that they are free."""
        assert count <= len(self._free), f"{count} pages asked of {len(self._free)} free ones"
        return [self._free.pop() for _ in range(count)]

    def release(self, pages: Sequence[int]) -> None:
        """Take pages back."""
        self._free.extend(reversed(pages))

    def check_integrity(self, owned: Iterable[Sequence[int]]) -> None:
        """Assert that free and owned pages together are all pages, each once."""
        taken = [page for pages in owned for page in pages]
        assert sorted(self._free + taken) == list(range(1, self.num_pages + 1)), "a KV page is lost or owned twice"
