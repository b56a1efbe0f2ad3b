"""Divides requests into batches within the memory's limits. Requests with equal or alike contexts stay together."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sdar_lm_eval import likelihood
from sdar_lm_eval.engines.types import LikelihoodConfig, ScoreRequest
from sdar_lm_eval.errors import UserError
from sdar_lm_eval.tokens import first_difference

Tokens = tuple[int, ...]
# Contexts are alike if their first ALIKE tokens are equal, as those of a few-shot task.
ALIKE = 64


@dataclass(frozen=True)
class Limits:
    """The limits of a batch and of a forward.

    Attributes:
        cache_tokens: most tokens that the KV cache has memory for. A batch keeps the KV of its clean tokens.
        clean_tokens: most clean tokens of a batch of several requests.
        noised_tokens: about the most noised tokens of a batch of several requests. The limit bounds the host's memory,
            and the work that a crash loses.
        requests: most requests of a batch; None: no limit.
        forward_tokens: most new tokens of a forward, padding included.
        seen_tokens: most prefix tokens and new tokens of a forward, padding included: the limit of the gathered KV.
        row_tokens: most new tokens of a row of masked copies. A block that is longer is a row of its own.
        clean_row_tokens: most new tokens of a row of clean tokens. A block that is longer is a row of its own.
        least_saved: fewest tokens that the shared prefixes of a batch must save: the prefixes take one more forward.
    """

    cache_tokens: int
    clean_tokens: int
    noised_tokens: int
    requests: int | None
    forward_tokens: int
    seen_tokens: int
    row_tokens: int
    clean_row_tokens: int
    least_saved: int

    @classmethod
    def on(cls, device: str, cache_tokens: int, requests: int | None, *, fused: bool = False) -> Limits:
        """The limits for a "cpu" or "cuda" device: a forward is large enough to keep the device busy.

        Args:
            device: the type of the device.
            cache_tokens: see the attribute.
            requests: see the attribute.
            fused: whether the fused decoder runs, which gathers no KV and launches fewer kernels.
        """
        if device == "cpu":
            return cls(
                cache_tokens, min(cache_tokens, 8192), 1 << 17, requests,
                forward_tokens=1024, seen_tokens=8192, row_tokens=256, clean_row_tokens=256, least_saved=64,
            )  # fmt: skip
        of_forward = (
            {"seen_tokens": 1 << 40, "clean_row_tokens": 16384, "least_saved": 2048}
            if fused
            else {"seen_tokens": 65536, "clean_row_tokens": 1024, "least_saved": 4096}
        )
        return cls(
            cache_tokens, min(cache_tokens, 65536), 1 << 21, requests, forward_tokens=16384, row_tokens=1024,
            **of_forward,
        )  # fmt: skip


class Batch(NamedTuple):
    """Requests that are scored together, by their indices, and the tokens of KV cache that they need."""

    requests: list[int]
    clean_tokens: int


def divide(
    requests: Sequence[ScoreRequest], config: LikelihoodConfig, mask_token_id: int, limits: Limits
) -> list[Batch]:
    """Divide requests into batches, the longest requests first.

    Requests that share a context's whole blocks stay together. Alike contexts stay together too, and among alike
    contexts those that share more tokens. Requests of equal length stay in order, so that the windows of a long text
    finish one after the other. Requests whose continuations hold the mask token are left out.

    Raises:
        UserError: the KV cache cannot hold a single request.
    """
    length = config.block_length
    groups: dict[Tokens | int, list[int]] = {}  # shared context, or index where there is none -> indices
    shared, own, length_of = {}, {}, {}  # index -> clean tokens of the context, other clean tokens, all tokens
    for index, request in enumerate(requests):
        if mask_token_id in request.continuation_ids:
            continue
        length_of[index] = len(request.context_ids) + len(request.continuation_ids)
        shared[index] = len(request.context_ids) // length * length
        own[index] = (length_of[index] - 1) // length * length - shared[index]
        if shared[index] + own[index] > limits.cache_tokens:
            raise UserError(
                f"a request of {length_of[index]:,} tokens (context and continuation) needs "
                f"{shared[index] + own[index]:,} tokens of KV cache; there is room for {limits.cache_tokens:,}. Lower "
                "max_length, or give a larger kv_pages where there is memory for it."
            )
        groups.setdefault(request.context_ids[: shared[index]] or index, []).append(index)
    longest_first = sorted(groups.items(), key=lambda item: -max(length_of[index] for index in item[1]))
    contexts = [(context if isinstance(context, tuple) else (), group) for context, group in longest_first]
    batches: list[Batch] = []
    indices: list[int] = []
    tally = _Tally(length, limits.least_saved)
    noised = 0
    for context, group in _with_neighbours(contexts, ALIKE):
        counted = False
        for index in group:
            copies = len(requests[index].continuation_ids) * likelihood.most_patterns(config)
            more = (tally if counted else tally.with_context(context)).with_tokens(own[index])
            if indices and (
                len(indices) == limits.requests
                or more.clean_tokens > limits.clean_tokens
                or noised + copies > limits.noised_tokens
            ):
                batches.append(Batch(indices, tally.clean_tokens))
                indices, noised = [], 0
                more = _Tally(length, limits.least_saved).with_context(context).with_tokens(own[index])
            indices.append(index)
            tally, noised, counted = more, noised + copies, True
    return [*batches, Batch(indices, tally.clean_tokens)] if indices else batches


class _Tally(NamedTuple):
    """An upper bound of the clean tokens of a batch that gets one context after the other.

    Attributes:
        length: tokens of a block.
        least_saved: fewest tokens that shared prefixes must save.
        unshared: clean tokens if no contexts shared a prefix.
        saved: tokens that earlier groups of alike contexts save, if each group shares one prefix.
        prefix: the leading tokens that all contexts of the last group share.
        alike: number of contexts of the last group.
    """

    length: int
    least_saved: int
    unshared: int = 0
    saved: int = 0
    prefix: Tokens = ()
    alike: int = 0

    @property
    def _saved_by_last(self) -> int:
        shared = len(self.prefix) // self.length * self.length
        return (self.alike - 1) * shared if shared >= ALIKE and self.alike else 0

    @property
    def clean_tokens(self) -> int:
        """The bound. `shared_prefixes` saves at least as many tokens as the bound leaves out."""
        saved = self.saved + self._saved_by_last
        return self.unshared - (saved if saved >= self.least_saved else 0)

    def with_tokens(self, count: int) -> _Tally:
        """Count clean tokens of a continuation."""
        return self._replace(unshared=self.unshared + count)

    def with_context(self, context: Tokens) -> _Tally:
        """Count a context that the batch does not have."""
        more = self.with_tokens(len(context))
        if context[:ALIKE] != self.prefix[:ALIKE] or len(context) < ALIKE:
            return more._replace(saved=self.saved + self._saved_by_last, prefix=context, alike=1)
        return more._replace(prefix=self.prefix[: first_difference(self.prefix, context)], alike=self.alike + 1)


def _with_neighbours(contexts: list[tuple[Tokens, list[int]]], size: int) -> Iterator[tuple[Tokens, list[int]]]:
    """Yield contexts with their requests: after each context, the contexts with the same first `size` tokens.

    Of these contexts, those with the same first 2 * `size` tokens follow each other, and so on. A system prompt makes
    the contexts of all tasks alike, and the contexts of one task share more.
    """
    alike: dict[Tokens | int, list[tuple[Tokens, list[int]]]] = {}
    for number, (context, group) in enumerate(contexts):
        alike.setdefault(context[:size] if len(context) >= size else number, []).append((context, group))
    for some in alike.values():
        yield from _with_neighbours(some, 2 * size) if len(some) > 1 else some


def shared_prefixes(contexts: Iterable[Tokens], length: int, least_saved: int) -> dict[Tokens, Tokens]:
    """Map each context to the prefix, in whole blocks, that it shares with others; to () if it shares none.

    A context has at most one shared prefix. If contexts of two tasks have one system prompt, each task's longer prefix
    is chosen if the longer prefixes save more tokens than the system prompt does.

    Args:
        contexts: the contexts of a batch.
        length: tokens of a block.
        least_saved: fewest tokens that the prefixes must save.
    """
    distinct = sorted(set(contexts))
    saved, prefixes = _best_prefixes(distinct, 0, length)
    return prefixes if saved >= least_saved else dict.fromkeys(distinct, ())


def _best_prefixes(contexts: list[Tokens], known: int, length: int) -> tuple[int, dict[Tokens, Tokens]]:
    """Return how many tokens the shared prefixes save, and each context's prefix.

    Args:
        contexts: distinct contexts, sorted. All contexts have the first `known` tokens in common.
        known: a multiple of `length`.
        length: tokens of a block.
    """
    if len(contexts) < 2:
        return 0, dict.fromkeys(contexts, ())
    # What the first and the last context in lexicographic order share, all contexts between them share too.
    first, last = contexts[0], contexts[-1]
    known += first_difference(first[known:], last[known:]) // length * length
    saved, prefixes = 0, dict[Tokens, Tokens]()
    for _, part in itertools.groupby(contexts, key=lambda context: context[known : known + length]):
        tokens, found = _best_prefixes(list(part), known, length)
        saved += tokens
        prefixes.update(found)
    if known >= ALIKE:
        others = [context for context, prefix in prefixes.items() if not prefix]
        if (len(contexts) - 1) * known >= saved + max(len(others) - 1, 0) * known:
            others, saved = contexts, 0
        if len(others) > 1:
            saved += (len(others) - 1) * known
            prefixes |= dict.fromkeys(others, first[:known])
    return saved, prefixes
