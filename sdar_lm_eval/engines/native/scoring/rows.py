"""Texts as rows of forwards: clean tokens whose KV is kept, and masked copies of blocks that branch off them.

A trunk is clean tokens behind a prefix. Its masked copies see the clean tokens before their block, and themselves. A
row of a forward is whole blocks of a trunk, or copies of a trunk's blocks side by side.
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
class Asked:
    """What one text asks of masked copies.

    Attributes:
        block: the text's block.
        patterns: (r,) which of the block's patterns.
        copies: (r,) ascending: the copy, among those of a `Copies`, that each pattern is.
        answer: number of the answer of the block's first pattern in the batch; those of the others follow.
    """

    block: likelihood.Block
    patterns: Integers
    copies: Integers
    answer: int


@dataclass
class Copies:
    """Masked copies of one block that are run, and what is asked of each.

    Attributes:
        block: the block.
        patterns: (R,) which of the block's patterns each copy is masked by.
        asked: by each text.
    """

    block: likelihood.Block
    patterns: Integers
    asked: list[Asked]


@dataclass
class Trunk:
    """Clean tokens whose KV is stored or about to be, and the masked blocks that branch off them.

    Attributes:
        prefix: KV slots of the tokens before, in order.
        tokens: own tokens, whole blocks.
        kv_slots: of the prefix and the own tokens together.
        copies: masked copies of blocks, in order of the blocks' starts.
        known: copies that several texts may ask, by their tokens: their number among which `Copies`.
    """

    prefix: list[int]
    tokens: tuple[int, ...]
    kv_slots: list[int]
    copies: list[Copies] = field(default_factory=list)
    known: dict[bytes, tuple[Copies, int]] = field(default_factory=dict)

    def add(self, block: likelihood.Block, answer: int, mask_token_id: int, *, shares: bool) -> int:
        """Have a block's masked copies run. Copies that the trunk has already are asked once more instead.

        Args:
            block: with its patterns.
            answer: number of the first pattern's answer.
            mask_token_id: stands at masked positions.
            shares: whether several texts may ask the trunk's copies.

        Returns:
            How many copies are new.
        """
        patterns = np.arange(len(block.patterns))
        if not shares:
            self.copies.append(Copies(block, patterns, [Asked(block, patterns, patterns, answer)]))
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
            numbers, asked_patterns = np.array(sorted(pairs)).T
            copies.asked.append(Asked(block, asked_patterns, numbers, answer))
        if new:
            self.copies.append(own)
        return len(new)


@dataclass(frozen=True, slots=True)
class Span:
    """Some of a trunk's masked copies, which make a row: from `begin` to `end` among all of them.

    The row's tokens are laid out when its forward is due: all of a batch's would take much memory.

    Attributes:
        stored: tokens of the trunk's KV that the row sees at most.
        length: tokens of a block.
    """

    trunk: Trunk
    begin: int
    end: int
    stored: int
    length: int

    @property
    def size(self) -> tuple[int, int]:
        """Stored tokens seen, and new tokens."""
        return self.stored, (self.end - self.begin) * self.length


@dataclass
class Row:
    """One row of a forward; arrays are (Q,) unless said.

    Attributes:
        prefix: (N,) KV slots of stored tokens.
        tokens, positions: of the new tokens.
        visible: leading tokens of the prefix that each new token sees.
        first, last: each new token sees the new ones from `first` up to, without, `last`.
        kv_slots: where the new KV goes; None: nowhere.
        asked: (3, A): an index in the row, a token, and the number of the answer that the token's probability is for.
    """

    prefix: Integers
    tokens: Integers
    positions: Integers
    visible: Integers
    first: Integers
    last: Integers
    kv_slots: Integers | None = None
    asked: Integers = field(default_factory=lambda: np.zeros((3, 0), dtype=np.int64))

    @property
    def size(self) -> tuple[int, int]:
        """Stored tokens seen, and new tokens."""
        return len(self.prefix), len(self.tokens)


def clean_rows(trunks: Iterable[Trunk], length: int, row_tokens: int) -> Iterator[list[Row]]:
    """Rows of the trunks' own tokens, as many blocks a row as it takes. Each list needs the KV of the lists before."""
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
                Row(
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
    """Divide a trunk's masked copies into rows; copies of near starts stay together."""
    step = max(row_tokens // length, 1)
    ends = list(itertools.accumulate(len(copies.patterns) for copies in trunk.copies))
    for begin in range(0, ends[-1] if ends else 0, step):
        end = min(begin + step, ends[-1])
        last = trunk.copies[bisect.bisect_left(ends, end)]
        yield Span(trunk, begin, end, last.block.start, length)


def laid_out(span: Span, mask_token_id: int) -> Row:
    """Make the row of masked copies, and what is asked of it."""
    length, trunk = span.length, span.trunk
    tokens, starts, asked = [], [], []
    begin = 0  # of the copies of a block among the trunk's
    for copies in trunk.copies:
        size = len(copies.patterns)
        some = slice(max(span.begin - begin, 0), min(span.end - begin, size))
        if some.start < some.stop:
            patterns = copies.patterns[some]
            tokens.append(copies.block.masked(patterns, mask_token_id).flatten())
            starts.append(np.full(len(patterns) * length, copies.block.start))
            for by in copies.asked:
                low, high = np.searchsorted(by.copies, (some.start, some.stop))
                index, offset, token = by.block.scored(by.patterns[low:high])
                copy = begin + by.copies[low:high][index] - span.begin  # in the row
                asked.append(np.array([copy * length + offset, token, by.answer + by.patterns[low:high][index]]))
        begin += size
    start = np.concatenate(starts)
    first = np.repeat(np.arange(span.end - span.begin) * length, length)
    return Row(
        prefix=np.array(trunk.kv_slots[: span.stored], dtype=np.int64),
        tokens=np.concatenate(tokens),
        positions=start + np.tile(np.arange(length), span.end - span.begin),
        visible=start,
        first=first,
        last=first + length,
        asked=np.concatenate(asked, axis=1),
    )


Sized = TypeVar("Sized", Row, Span)


def packed(rows: Iterable[Sized], limits: Limits) -> Iterator[list[Sized]]:
    """Put rows of like size into forwards within the limits; a single row always passes."""
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
