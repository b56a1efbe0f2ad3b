"""Divides requests into batches within the memory's limits. Requests with equal or alike contexts stay together."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sdar_lm_eval import likelihood
from sdar_lm_eval.engines.types import LikelihoodConfig, ScoreRequest
from sdar_lm_eval.errors import UserError

Tokens = tuple[int, ...]
# Contexts are alike if their first ALIKE tokens are equal, as those of a few-shot task. A shared prefix takes a forward
# of its own, so a shorter prefix would cost more time than it saves.
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
        row_tokens: most new tokens of a row of a forward. A block that is longer is a row of its own.
    """

    cache_tokens: int
    clean_tokens: int
    noised_tokens: int
    requests: int | None
    forward_tokens: int
    seen_tokens: int
    row_tokens: int

    @classmethod
    def on(cls, device: str, cache_tokens: int, requests: int | None) -> Limits:
        """The limits for a "cpu" or "cuda" device: a forward is large enough to keep the device busy."""
        if device == "cpu":
            return cls(
                cache_tokens, min(cache_tokens, 8192), 1 << 17, requests,
                forward_tokens=1024, seen_tokens=8192, row_tokens=256,
            )  # fmt: skip
        return cls(
            cache_tokens, min(cache_tokens, 65536), 1 << 21, requests,
            forward_tokens=16384, seen_tokens=65536, row_tokens=1024,
        )  # fmt: skip


class Batch(NamedTuple):
    """Requests that are scored together, by their indices, and the tokens of KV cache that they need."""

    requests: list[int]
    clean_tokens: int


def divide(
    requests: Sequence[ScoreRequest], config: LikelihoodConfig, mask_token_id: int, limits: Limits
) -> list[Batch]:
    """Divide requests into batches, the longest requests first.

    Requests that share a context's whole blocks stay together, and so do requests whose contexts are alike. Requests of
    equal length stay in order, so that the windows of a long text finish one after the other. Requests whose
    continuations hold the mask token are left out.

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
    alike: dict[Tokens | int, list[list[int]]] = {}  # first ALIKE tokens, or an index where there are fewer -> groups
    for context, group in sorted(groups.items(), key=lambda item: -max(length_of[index] for index in item[1])):
        key = context[:ALIKE] if isinstance(context, tuple) and len(context) >= ALIKE else group[0]
        alike.setdefault(key, []).append(group)
    batches: list[Batch] = []
    indices: list[int] = []
    total = noised = 0
    for group in itertools.chain.from_iterable(alike.values()):
        counted = False
        for index in group:
            needed = own[index] + (0 if counted else shared[index])
            copies = len(requests[index].continuation_ids) * likelihood.most_patterns(config)
            if indices and (
                len(indices) == limits.requests
                or total + needed > limits.clean_tokens
                or noised + copies > limits.noised_tokens
            ):
                batches.append(Batch(indices, total))
                indices, total, noised, needed = [], 0, 0, own[index] + shared[index]
            indices.append(index)
            total, noised, counted = total + needed, noised + copies, True
    return [*batches, Batch(indices, total)] if indices else batches


def shared_prefixes(contexts: Iterable[Tokens], length: int) -> dict[Tokens, Tokens]:
    """Map each context to the prefix, in whole blocks, that all alike contexts share; to () if no other one is alike.

    Args:
        contexts: the contexts of a batch.
        length: tokens of a block.
    """
    prefixes: dict[Tokens, Tokens] = dict.fromkeys(contexts, ())
    alike: dict[Tokens, list[Tokens]] = {}  # first ALIKE tokens -> distinct contexts
    for context in prefixes:
        alike.setdefault(context[:ALIKE], []).append(context)
    for start, group in alike.items():
        if len(start) == ALIKE and len(group) > 1:
            # What the first and the last context in lexicographic order share, all contexts between them share too.
            pairs = zip(min(group), max(group), strict=False)
            shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
            prefixes |= dict.fromkeys(group, group[0][: shared // length * length])
    return prefixes
