"""Rows of forwards: clean tokens whose KV is stored, and masked copies of blocks that branch off the clean tokens.

A trunk is clean tokens after a prefix. A masked copy of a block sees the clean tokens before the block, and itself. A
row of a forward holds whole blocks of a trunk, or masked copies of a trunk's blocks side by side.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from sdar_lm_eval import likelihood
from sdar_lm_eval.engines.native.scoring.batches import Limits

Integers = NDArray[np.int64]


@dataclass
class Query:
    """The log-probabilities that one text needs from some masked copies.

    Attributes:
        block: the text's block.
        patterns: (r,) indices of the block's patterns.
        copies: (r,) ascending: each pattern's copy, an index among the copies of a `Copies`.
        answer: index of the answer of the block's first pattern in the batch; those of its other patterns follow.
    """

    block: likelihood.Block
    patterns: Integers
    copies: Integers
    answer: int


@dataclass
class Copies:
    """Masked copies of one block, and the queries to these copies.

    Attributes:
        block: the block.
        patterns: (R,) the index of each copy's pattern among the block's patterns.
        queries: one of each text that needs some of the copies.
    """

    block: likelihood.Block
    patterns: Integers
    queries: list[Query]


@dataclass
class Trunk:
    """Clean tokens whose KV is stored, and the masked blocks that branch off them.

    Attributes:
        prefix: KV slots of the tokens before the trunk, in order.
        tokens: the trunk's own tokens, whole blocks.
        kv_slots: KV slots of the prefix and of the own tokens.
        copies: masked copies of blocks, in order of the blocks' starts.
        known: tokens of a copy that several texts may need -> its `Copies`, and its index among these.
    """

    prefix: list[int]
    tokens: tuple[int, ...]
    kv_slots: list[int]
    copies: list[Copies] = field(default_factory=list)
    known: dict[bytes, tuple[Copies, int]] = field(default_factory=dict)

    def add(self, block: likelihood.Block, answer: int, mask_token_id: int, *, shares: bool) -> int:
        """Add the masked copies of a block. A copy that the trunk already has only gets one more query.

        Args:
            block: the block with its patterns.
            answer: index of the first pattern's answer.
            mask_token_id: the token at masked positions.
            shares: whether several texts may need the trunk's copies.

        Returns:
            The number of new copies.
        """
        patterns = np.arange(len(block.patterns))
        if not shares:
            self.copies.append(Copies(block, patterns, [Query(block, patterns, patterns, answer)]))
            return len(patterns)
        tokens = [copy.tobytes() for copy in block.masked(patterns, mask_token_id)]
        new = [pattern for pattern in patterns.tolist() if tokens[pattern] not in self.known]
        own = Copies(block, np.array(new, dtype=np.int64), [])
        self.known.update((tokens[pattern], (own, number)) for number, pattern in enumerate(new))
        found: dict[int, tuple[Copies, list[tuple[int, int]]]] = {}
        for pattern in patterns.tolist():
            copies, number = self.known[tokens[pattern]]
            found.setdefault(id(copies), (copies, []))[1].append((number, pattern))
        for copies, pairs in found.values():
            indices, own_patterns = np.array(sorted(pairs)).T
            copies.queries.append(Query(block, own_patterns, indices, answer))
        if new:
            self.copies.append(own)
        return len(new)


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive masked copies of a trunk that make a row: begin <= index < end among all of its copies.

    The tokens of all rows of a batch would take much memory, so a row's tokens are laid out just before its forward.

    Attributes:
        stored: most tokens of the trunk's KV that a copy of the row sees.
        length: tokens of a block.
    """

    trunk: Trunk
    begin: int
    end: int
    stored: int
    length: int

    @property
    def size(self) -> tuple[int, int]:
        """Numbers of stored tokens that the row sees, and of new tokens."""
        return self.stored, (self.end - self.begin) * self.length


@dataclass
class ForwardRow:
    """One row of a forward; arrays are (Q,) unless another shape is given.

    Attributes:
        prefix: (N,) KV slots of stored tokens.
        tokens, positions: the new tokens, and their positions in the text.
        visible: leading tokens of the prefix that each new token sees.
        first, last: each new token sees the row's new tokens first <= index < last.
        kv_slots: the KV slot of each new token; None: the KV is not stored.
        queries: (3, A): an index in the row, a token, and the index of the answer that needs the token's probability.
    """

    prefix: Integers
    tokens: Integers
    positions: Integers
    visible: Integers
    first: Integers
    last: Integers
    kv_slots: Integers | None = None
    queries: Integers = field(default_factory=lambda: np.zeros((3, 0), dtype=np.int64))

    @property
    def size(self) -> tuple[int, int]:
        """Numbers of stored tokens that the row sees, and of new tokens."""
        return len(self.prefix), len(self.tokens)


def clean_rows(trunks: Iterable[Trunk], length: int, row_tokens: int) -> Iterator[list[ForwardRow]]:
    """Rows of the trunks' own tokens. Each list of rows needs the KV of the lists before."""
    trunks = list(trunks)
    step = max(row_tokens // length, 1) * length
    for start in range(0, max((len(trunk.tokens) for trunk in trunks), default=0), step):
        rows = []
        for trunk in trunks:
            tokens = np.array(trunk.tokens[start : start + step], dtype=np.int64)
            if not len(tokens):
                continue
            stored = len(trunk.prefix) + start
            rows.append(
                ForwardRow(
                    prefix=np.array(trunk.kv_slots[:stored], dtype=np.int64),
                    tokens=tokens,
                    positions=stored + np.arange(len(tokens)),
                    visible=np.full(len(tokens), stored),
                    first=np.zeros(len(tokens), dtype=np.int64),
                    last=(np.arange(len(tokens)) // length + 1) * length,
                    kv_slots=np.array(trunk.kv_slots[stored : stored + len(tokens)], dtype=np.int64),
                )
            )
        yield rows


def spans(trunk: Trunk, length: int, row_tokens: int) -> Iterator[Span]:
    """Divide a trunk's masked copies into rows, in order of the blocks' starts."""
    step = max(row_tokens // length, 1)
    ends = list(itertools.accumulate(len(copies.patterns) for copies in trunk.copies))
    for begin in range(0, ends[-1] if ends else 0, step):
        end = min(begin + step, ends[-1])
        last = trunk.copies[bisect.bisect_left(ends, end)]
        yield Span(trunk, begin, end, last.block.start, length)


def laid_out(span: Span, mask_token_id: int) -> ForwardRow:
    """Lay out the row of a span: its tokens, and the queries to its copies."""
    length, trunk = span.length, span.trunk
    tokens, starts, queries = [], [], []
    begin = 0  # index of a block's first copy among the trunk's copies
    for copies in trunk.copies:
        size = len(copies.patterns)
        some = slice(max(span.begin - begin, 0), min(span.end - begin, size))
        if some.start < some.stop:
            patterns = copies.patterns[some]
            tokens.append(copies.block.masked(patterns, mask_token_id).flatten())
            starts.append(np.full(len(patterns) * length, copies.block.start))
            for query in copies.queries:
                low, high = np.searchsorted(query.copies, (some.start, some.stop))
                index, offset, token = query.block.scored(query.patterns[low:high])
                copy = begin + query.copies[low:high][index] - span.begin  # index of the copy in the row
                answer = query.answer + query.patterns[low:high][index]
                queries.append(np.array([copy * length + offset, token, answer]))
        begin += size
    start = np.concatenate(starts)
    first = np.repeat(np.arange(span.end - span.begin) * length, length)
    return ForwardRow(
        prefix=np.array(trunk.kv_slots[: span.stored], dtype=np.int64),
        tokens=np.concatenate(tokens),
        positions=start + np.tile(np.arange(length), span.end - span.begin),
        visible=start,
        first=first,
        last=first + length,
        queries=np.concatenate(queries, axis=1),
    )


Sized = TypeVar("Sized", ForwardRow, Span)


def packed(rows: Iterable[Sized], limits: Limits) -> Iterator[list[Sized]]:
    """Pack rows of similar size into forwards within the limits. A row above the limits gets its own forward."""
    forward: list[Sized] = []
    stored = new = 0
    for row in sorted(rows, key=lambda row: row.size, reverse=True):
        prefix, own = row.size
        wider = max(new, own)
        count = len(forward) + 1
        if forward and (count * wider > limits.forward_tokens or count * (stored + wider) > limits.seen_tokens):
            yield forward
            forward, stored, wider = [], 0, own
        forward.append(row)
        stored, new = max(stored, prefix), wider
    if forward:
        yield forward
