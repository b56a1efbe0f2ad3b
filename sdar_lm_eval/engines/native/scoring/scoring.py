"""Log-likelihoods on the device: requests -> plans -> batches -> clean forwards, noised forwards -> results.

A batch is a number of questions, each a context with the continuations asked of it. Its clean tokens run first, whole
blocks under the block-causal mask, and their KV is kept: the contexts, once for all their continuations, then the
continuations up to their last blocks. Then all masked copies of all blocks run, each seeing its clean prefix and
itself, and only positions that count go through the LM head. A copy's tokens are laid out when its forward is due.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch

from sdar_lm_eval import likelihood
from sdar_lm_eval.engines.base import LikelihoodConfig, ScoreRequest, ScoreResult, not_finite
from sdar_lm_eval.engines.native.scoring.branches import BranchBatch, sight
from sdar_lm_eval.engines.runs import Failures
from sdar_lm_eval.errors import UserError

SCRATCH_PLACE = 0  # of the KV cache: padding is read from and written to here
LOGITS_BUDGET_BYTES = 1 << 30


@dataclass(frozen=True)
class Limits:
    """What bounds a batch and a forward.

    Attributes:
        room: most clean tokens of a batch, whose KV is kept: what memory holds.
        clean_tokens: of a batch of several requests.
        noised_tokens: of a batch of several requests, about: bounds what the host lays out, and what a crash loses.
        requests: of a batch; None: no bound.
        forward_tokens: of a forward, padding included.
        seen_tokens: prefixes and new tokens of a forward's rows together: bounds the gathered KV.
        row_tokens: new tokens of one row of a forward; or one block, where that is longer.
    """

    room: int
    clean_tokens: int
    noised_tokens: int
    requests: int | None
    forward_tokens: int
    seen_tokens: int
    row_tokens: int

    @classmethod
    def on(cls, device: str, room: int, requests: int | None) -> Limits:
        """Those of a "cpu" or "cuda" device, where a forward is large enough to keep it busy."""
        if device == "cpu":
            return cls(room, min(room, 8192), 1 << 17, requests, forward_tokens=1024, seen_tokens=8192, row_tokens=256)
        return cls(room, min(room, 65536), 1 << 21, requests, forward_tokens=16384, seen_tokens=65536, row_tokens=1024)


@dataclass
class Trunk:
    """Clean tokens whose KV is stored or about to be, and the masked blocks that branch off them.

    Attributes:
        prefix: places of the tokens before, in order.
        tokens: own tokens, whole blocks.
        places: of `prefix` and own tokens together.
        copies: masked copies of blocks, in order of their starts.
        known: those that may be shared, by their tokens: with which number among which copies.
    """

    prefix: list[int]
    tokens: tuple[int, ...]
    places: list[int]
    copies: list[Copies] = field(default_factory=list)
    known: dict[bytes, tuple[Copies, int]] = field(default_factory=dict)


@dataclass
class Copies:
    """Masked copies of one block that are run, and what is asked of each.

    Attributes:
        block: the block.
        rows: (R,) int64, with which of its patterns.
        asked: those who ask: a block; which of its patterns, (r,) int64; of which copy here, (r,) int64 ascending; the
            number of the first pattern's answer in the batch.
    """

    block: likelihood.Block
    rows: Any
    asked: list[tuple[likelihood.Block, Any, Any, int]]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a stretch of masked copies is to be found: from `begin` to `end` among all copies of a trunk."""

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
class Stretch:
    """New tokens of one row of a forward; arrays are (Q,).

    Attributes:
        prefix: (N,) places of stored tokens.
        places: where the new KV goes; None: nowhere.
        asked: (3, A) int64: place in the stretch, token there, number of the answer.
    """

    prefix: Any
    tokens: Any
    positions: Any
    visible: Any
    first: Any
    last: Any
    places: Any = None
    asked: Any = None

    @property
    def size(self) -> tuple[int, int]:
        """Stored tokens seen, and new tokens."""
        return len(self.prefix), len(self.tokens)


Sized = TypeVar("Sized", Stretch, Place)


class Scoring:
    """Scores requests with one model.

    Args:
        model: transformers' Qwen3ForCausalLM or Qwen3MoeForCausalLM with the paged attention.
        mask_token_id: never part of a text's probability.
        limits: of batches and forwards.
    """

    def __init__(self, model: Any, mask_token_id: int, limits: Limits) -> None:
        self._model = model
        self._mask_token_id = mask_token_id
        self._limits = limits
        self._device = model.device

    def run(
        self, requests: Sequence[ScoreRequest], config: LikelihoodConfig, failures: Failures
    ) -> Iterator[tuple[int, ScoreResult]]:
        """See `Scorer.score`; `failures` gets the requests whose scores are not numbers."""
        batches = self._batches(requests, config)
        for index, request in enumerate(requests):
            if self._mask_token_id in request.continuation_ids:
                yield index, ScoreResult(log_likelihood=-math.inf, is_greedy=False)
        cache = self._allocate(max((tokens for _, tokens in batches), default=0))
        for indices, _ in batches:
            plans = [likelihood.plan(requests[index], config, self._mask_token_id) for index in indices]
            unscored = []
            results = self._run_batch(plans, config.block_length, cache)
            for index, single, result in zip(indices, plans, results, strict=True):
                if result is None:
                    unscored.append((index, single))
                else:
                    yield index, result
            # Alone once more: numbers that are none spread to what shares a forward, where they are masked (0 * NaN).
            for index, single in unscored:
                cache.zero_()
                (result,) = self._run_batch([single], config.block_length, cache) if len(plans) > 1 else (None,)
                if result is None:
                    failures.add(index, not_finite(str(self._model.dtype)))
                else:
                    yield index, result
            if unscored:
                cache.zero_()

    # Batches

    def _batches(self, requests: Sequence[ScoreRequest], config: LikelihoodConfig) -> list[tuple[list[int], int]]:
        """Divide requests into batches: their indices, with the number of clean tokens. The longest come first.

        Requests with a context's whole blocks in common stay together. Those of one length stay in order, so that the
        windows of a long text finish one after the other.

        Raises:
            UserError: a request alone is too long.
        """
        length, limits = config.block_length, self._limits
        groups: dict[Any, list[int]] = {}
        shared, own, whole = {}, {}, {}
        for index, request in enumerate(requests):
            if self._mask_token_id in request.continuation_ids:
                continue
            whole[index] = len(request.context_ids) + len(request.continuation_ids)
            shared[index] = len(request.context_ids) // length * length
            own[index] = (whole[index] - 1) // length * length - shared[index]
            if shared[index] + own[index] > limits.room:
                raise UserError(
                    f"a request of {whole[index]:,} tokens (context and continuation) needs "
                    f"{shared[index] + own[index]:,} tokens of KV cache; there is room for {limits.room:,}. Lower "
                    "max_length, or give a larger kv_pages where there is memory for it."
                )
            groups.setdefault(request.context_ids[: shared[index]] or index, []).append(index)
        batches: list[tuple[list[int], int]] = []
        indices: list[int] = []
        total = noised = 0
        for group in sorted(groups.values(), key=lambda group: -max(whole[index] for index in group)):
            counted = False
            for index in group:
                needed = own[index] + (0 if counted else shared[index])
                copies = len(requests[index].continuation_ids) * likelihood.most_patterns(config)
                if indices and (
                    len(indices) == limits.requests
                    or total + needed > limits.clean_tokens
                    or noised + copies > limits.noised_tokens
                ):
                    batches.append((indices, total))
                    indices, total, noised, needed = [], 0, 0, own[index] + shared[index]
                indices.append(index)
                total, noised, counted = total + needed, noised + copies, True
        return [*batches, (indices, total)] if indices else batches

    def _allocate(self, tokens: int) -> torch.Tensor:
        config = self._model.config
        shape = (config.num_hidden_layers, 2, tokens + 1, config.num_key_value_heads, config.head_dim)
        return torch.zeros(shape, dtype=self._model.dtype, device=self._device)

    def _run_batch(self, plans: list[likelihood.Plan], length: int, cache: torch.Tensor) -> list[ScoreResult | None]:
        """Run one batch; results in the order of the plans, None where they are not numbers."""
        contexts: dict[tuple[int, ...], Trunk] = {}
        continuations: list[Trunk] = []
        plans_of = Counter(plan.context for plan in plans)
        clean = answers = 0
        counts, ranges = [], []
        free = SCRATCH_PLACE + 1
        for plan in plans:
            before, begin = clean, answers
            context = contexts.get(plan.context)
            if context is None:
                places = list(range(free, free + len(plan.context)))
                context = contexts[plan.context] = Trunk([], plan.context, places)
                free, clean = free + len(plan.context), clean + len(plan.context)
            places = list(range(free, free + len(plan.clean)))
            continuation = Trunk(context.places, plan.clean, context.places + places)
            continuations.append(continuation)
            free, clean = free + len(plan.clean), clean + len(plan.clean)
            noised = 0
            for block in plan.blocks:
                # The first block's copies see the context alone, so that continuations may have them in common.
                first = block.start == len(plan.context)
                trunk = context if first else continuation
                noised += length * self._add(trunk, block, answers, shares=first and plans_of[plan.context] > 1)
                answers += len(block.patterns)
            ranges.append((begin, answers))
            counts.append((clean - before, noised))

        for trunks in (contexts.values(), continuations):
            self._store([trunk for trunk in trunks if trunk.tokens], length, cache)
        sums = np.zeros(answers)
        is_argmax = np.zeros(answers, dtype=bool)
        copies = [place for trunk in (*contexts.values(), *continuations) for place in self._noised(trunk, length)]
        for packed in self._pack(copies):
            stretches = [self._lay_out(place) for place in packed]
            self._ask(stretches, self._forward(stretches, cache), sums, is_argmax)
        return [
            plan.result(sums[begin:end], is_argmax[begin:end], clean_tokens=clean_tokens, noised_tokens=noised_tokens)
            if np.isfinite(sums[begin:end]).all()
            else None
            for plan, (begin, end), (clean_tokens, noised_tokens) in zip(plans, ranges, counts, strict=True)
        ]

    def _add(self, trunk: Trunk, block: likelihood.Block, answer: int, *, shares: bool) -> int:
        """Have a block's masked copies run; those that a trunk has already only get asked more. Returns how many more.

        Args:
            trunk: what the copies see before themselves.
            block: with its patterns.
            answer: the number of the first pattern's answer; those of the others follow.
            shares: whether the trunk's copies may be asked by several.
        """
        rows = np.arange(len(block.patterns))
        if not shares:
            trunk.copies.append(Copies(block, rows, [(block, rows, rows, answer)]))
            return len(rows)
        tokens = [copy.tobytes() for copy in block.masked(rows, self._mask_token_id)]
        new = [row for row in rows.tolist() if tokens[row] not in trunk.known]
        own = Copies(block, np.array(new, dtype=np.int64), [])
        trunk.known.update((tokens[row], (own, number)) for number, row in enumerate(new))
        asked: dict[int, tuple[Copies, list[tuple[int, int]]]] = {}
        for row in rows.tolist():
            copies, number = trunk.known[tokens[row]]
            asked.setdefault(id(copies), (copies, []))[1].append((number, row))
        for copies, pairs in asked.values():
            numbers, of = np.array(sorted(pairs)).T
            copies.asked.append((block, of, numbers, answer))
        if new:
            trunk.copies.append(own)
        return len(new)

    # Forwards

    def _store(self, trunks: list[Trunk], length: int, cache: torch.Tensor) -> None:
        """Run clean tokens, stretch by stretch, and keep their KV."""
        step = max(self._limits.row_tokens // length, 1) * length
        for start in range(0, max((len(trunk.tokens) for trunk in trunks), default=0), step):
            stretches = []
            for trunk in trunks:
                tokens = np.array(trunk.tokens[start : start + step], dtype=np.int64)
                if not len(tokens):
                    continue
                stored = len(trunk.prefix) + start
                block = np.arange(len(tokens)) // length
                stretches.append(
                    Stretch(
                        prefix=np.array(trunk.places[:stored], dtype=np.int64),
                        tokens=tokens,
                        positions=stored + np.arange(len(tokens)),
                        visible=np.full(len(tokens), stored),
                        first=np.zeros(len(tokens), dtype=np.int64),
                        last=(block + 1) * length,
                        places=np.array(trunk.places[stored : stored + len(tokens)], dtype=np.int64),
                    )
                )
            for packed in self._pack(stretches):
                self._forward(packed, cache)

    def _noised(self, trunk: Trunk, length: int) -> Iterator[Place]:
        """Lay a trunk's masked copies side by side, as many as a row of a forward takes; near starts together."""
        step = max(self._limits.row_tokens // length, 1)
        ends = list(itertools.accumulate(len(copies.rows) for copies in trunk.copies))
        for begin in range(0, ends[-1] if ends else 0, step):
            end = min(begin + step, ends[-1])
            last = trunk.copies[bisect.bisect_left(ends, end)]
            yield Place(trunk, begin, end, last.block.start, length)

    def _lay_out(self, place: Place) -> Stretch:
        """Make the tokens of masked copies, and what is asked of them."""
        length, trunk = place.length, place.trunk
        tokens, starts, asked = [], [], []
        begin = 0  # of the copies of a block among the trunk's
        for copies in trunk.copies:
            size = len(copies.rows)
            some = slice(max(place.begin - begin, 0), min(place.end - begin, size))
            if some.start < some.stop:
                rows = copies.rows[some]
                tokens.append(copies.block.masked(rows, self._mask_token_id).flatten())
                starts.append(np.full(len(rows) * length, copies.block.start))
                for block, of, numbers, answer in copies.asked:
                    low, high = np.searchsorted(numbers, (some.start, some.stop))
                    index, at, token = block.scored(of[low:high])
                    copy = begin + numbers[low:high][index] - place.begin  # in the stretch
                    asked.append(np.array([copy * length + at, token, answer + of[low:high][index]]))
            begin += size
        start = np.concatenate(starts)
        first = np.repeat(np.arange(place.end - place.begin) * length, length)
        return Stretch(
            prefix=np.array(trunk.places[: place.stored], dtype=np.int64),
            tokens=np.concatenate(tokens),
            positions=start + np.tile(np.arange(length), place.end - place.begin),
            visible=start,
            first=first,
            last=first + length,
            asked=np.concatenate(asked, axis=1),
        )

    def _pack(self, stretches: Iterable[Sized]) -> Iterator[list[Sized]]:
        """Put stretches of like size into forwards within the limits; a stretch alone always passes."""
        packed: list[Sized] = []
        stored = new = 0
        for stretch in sorted(stretches, key=lambda s: s.size, reverse=True):
            prefix, own = stretch.size
            wider = max(new, own)
            rows = len(packed) + 1
            if packed and (
                rows * wider > self._limits.forward_tokens or rows * (stored + wider) > self._limits.seen_tokens
            ):
                yield packed
                packed, stored, wider = [], 0, own
            packed.append(stretch)
            stored, new = max(stored, prefix), wider
        if packed:
            yield packed

    @torch.no_grad()
    def _forward(self, stretches: list[Stretch], cache: torch.Tensor) -> torch.Tensor:
        """Run stretches through the model; returns the last hidden states (B, Q, hidden size)."""
        stored, new = (max(sizes) for sizes in zip(*(stretch.size for stretch in stretches), strict=True))
        b, config = len(stretches), self._model.config
        stored += -(stored + new) % 8  # CUDA kernels want rows of the bias aligned, or copy it in every layer
        prefix = np.full((b, stored), SCRATCH_PLACE)
        # Padding sees itself and nothing else.
        tokens, positions, visible = (np.zeros((b, new), dtype=np.int64) for _ in range(3))
        first = np.tile(np.arange(new), (b, 1))
        last = first + 1
        places = np.full((b, new), SCRATCH_PLACE)
        for i, stretch in enumerate(stretches):
            n, q = stretch.size
            prefix[i, :n] = stretch.prefix
            tokens[i, :q], positions[i, :q], visible[i, :q] = stretch.tokens, stretch.positions, stretch.visible
            first[i, :q], last[i, :q] = stretch.first, stretch.last
            if stretch.places is not None:
                places[i, :q] = stretch.places
        batch = BranchBatch(
            cache,
            prefix=self._to_device(prefix),
            bias=sight(
                self._to_device(visible),
                self._to_device(first),
                self._to_device(last),
                stored,
                config.num_attention_heads // config.num_key_value_heads,
                self._model.dtype,
            ),
            places=None if stretches[0].places is None else self._to_device(places),
        )
        hidden: torch.Tensor = self._model.model(
            input_ids=self._to_device(tokens),
            position_ids=self._to_device(positions),
            # Four-dimensional, so that every transformers version hands it through untouched; nobody reads it.
            attention_mask=torch.empty(b, 1, 1, 1, dtype=self._model.dtype, device=self._device),
            batch=batch,
            use_cache=False,
        ).last_hidden_state
        return hidden

    @torch.no_grad()
    def _ask(self, stretches: list[Stretch], hidden: torch.Tensor, sums: Any, is_argmax: Any) -> None:
        """Read what is asked of a forward: each answer's sum, and whether its first token is the most probable one."""
        of = np.repeat(np.arange(len(stretches)), [s.asked.shape[1] for s in stretches])
        place, token, number = np.concatenate([s.asked for s in stretches], axis=1)
        at = np.stack([of, place], axis=1)  # (A, 2)
        at, which = np.unique(at, axis=0, return_inverse=True)  # several answers may ask at one position
        which = which.reshape(-1)
        order = np.argsort(which, kind="stable")
        token, number, which = token[order], number[order], which[order]
        log_probabilities, hits = np.zeros(len(which)), np.zeros(len(which), dtype=bool)
        chunk = max(1, LOGITS_BUDGET_BYTES // (4 * self._model.config.vocab_size))
        for start in range(0, len(at), chunk):
            row, column = self._to_device(at[start : start + chunk]).unbind(1)
            logits = self._model.lm_head(hidden[row, column]).float()  # (R, V)
            logits[:, self._mask_token_id] = -torch.inf
            begin, end = np.searchsorted(which, (start, start + chunk))
            position, asked = self._to_device(which[begin:end] - start), self._to_device(token[begin:end])
            values = logits[position, asked] - logits.logsumexp(dim=-1)[position]
            hit = logits.argmax(dim=-1)[position] == asked
            log_probabilities[begin:end] = values.double().cpu().numpy()
            hits[begin:end] = hit.cpu().numpy()
        log_probabilities[~np.isfinite(log_probabilities)] = np.nan  # whose sum is no number, nor an error
        order = np.argsort(number, kind="stable")  # by answer, then by place
        numbers, firsts = np.unique(number[order], return_index=True)
        is_argmax[numbers] = hits[order][firsts]
        values = log_probabilities[order].tolist()
        ends = [*firsts[1:].tolist(), len(values)]
        sums[numbers] = [math.fsum(values[i:j]) for i, j in zip(firsts.tolist(), ends, strict=True)]

    def _to_device(self, array: Any) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device)
