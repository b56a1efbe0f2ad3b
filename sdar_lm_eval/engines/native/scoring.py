"""Log-likelihoods on the device: requests -> plans -> batches -> clean forwards, noised forwards -> results.

A batch is a number of questions, each a context with the continuations asked of it. Its clean tokens run first, whole
blocks under the block-causal mask, and their KV is kept: the contexts, once for all their continuations, then the
continuations up to their last blocks. Then all masked copies of all blocks run at once, each seeing its clean prefix
and itself, and only positions that count go through the LM head.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from sdar_lm_eval import likelihood
from sdar_lm_eval.engines.base import LikelihoodConfig, ScoreRequest, ScoreResult
from sdar_lm_eval.engines.native.branches import BranchBatch, sight
from sdar_lm_eval.errors import EngineError, UserError

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
        rows: masked blocks to be run once: (start, tokens) -> what is asked of them, (place in the block, token there,
            number of the answer's slot).
    """

    prefix: list[int]
    tokens: tuple[int, ...]
    places: list[int]
    rows: dict[tuple[int, tuple[int, ...]], list[tuple[int, int, int]]] = field(default_factory=dict)


@dataclass
class Stretch:
    """New tokens of one row of a forward; arrays are (Q,).

    Attributes:
        prefix: (N,) places of stored tokens.
        places: where the new KV goes; None: nowhere.
        asked: (place in the stretch, token there, number of the answer's slot).
    """

    prefix: Any
    tokens: Any
    positions: Any
    visible: Any
    first: Any
    last: Any
    places: Any = None
    asked: list[tuple[int, int, int]] = field(default_factory=list)

    @property
    def size(self) -> tuple[int, int]:
        """Stored tokens seen, and new tokens."""
        return len(self.prefix), len(self.tokens)


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

    def run(self, requests: Sequence[ScoreRequest], config: LikelihoodConfig) -> Iterator[tuple[int, ScoreResult]]:
        """See `Scorer.score`."""
        batches = self._batches(requests, config)
        for index, request in enumerate(requests):
            if self._mask_token_id in request.continuation_ids:
                yield index, ScoreResult(log_likelihood=-math.inf, is_greedy=False)
        cache = self._allocate(max((tokens for _, tokens in batches), default=0))
        for indices, _ in batches:
            plans = [likelihood.plan(requests[index], config, self._mask_token_id) for index in indices]
            yield from zip(indices, self._run_batch(plans, config.block_length, cache), strict=True)

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

    def _run_batch(self, plans: list[likelihood.Plan], length: int, cache: torch.Tensor) -> list[ScoreResult]:
        """Run one batch; results in the order of the plans."""
        contexts: dict[tuple[int, ...], Trunk] = {}
        continuations: list[Trunk] = []
        slots = clean = 0
        counts, ranges = [], []
        free = SCRATCH_PLACE + 1
        for plan in plans:
            before = clean
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
            begin = slots
            for row in plan.rows:
                # The first block's copies see the context alone, so that continuations may have them in common.
                rows = (context if row.start == len(plan.context) else continuation).rows
                noised += 0 if (row.start, row.tokens) in rows else length
                asked = rows.setdefault((row.start, row.tokens), [])
                for place, token in row.scored:
                    asked.append((place, token, slots))
                    slots += 1
            ranges.append((begin, slots))
            counts.append((clean - before, noised))

        for trunks in (contexts.values(), continuations):
            self._store([trunk for trunk in trunks if trunk.tokens], length, cache)
        log_probabilities = np.zeros(slots)
        is_argmax = np.zeros(slots, dtype=bool)
        noised_stretches = [
            stretch for trunk in (*contexts.values(), *continuations) for stretch in self._noised(trunk, length)
        ]
        for stretches in self._pack(noised_stretches):
            self._ask(stretches, self._forward(stretches, cache), log_probabilities, is_argmax)
        if not np.isfinite(log_probabilities).all():
            raise EngineError(
                f"the model's logits are not finite numbers (dtype {str(self._model.dtype).removeprefix('torch.')}). "
                "float16 overflows in some models: use dtype=bfloat16 or float32. Else the weights are bad."
            )
        return [
            plan.result(
                log_probabilities[begin:end].tolist(),
                is_argmax[begin:end].tolist(),
                clean_tokens=clean_tokens,
                noised_tokens=noised_tokens,
            )
            for plan, (begin, end), (clean_tokens, noised_tokens) in zip(plans, ranges, counts, strict=True)
        ]

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

    def _noised(self, trunk: Trunk, length: int) -> Iterator[Stretch]:
        """Lay a trunk's masked blocks side by side, as many as a row of a forward takes; near starts together."""
        ordered = sorted(trunk.rows.items(), key=lambda item: item[0][0])
        step = max(self._limits.row_tokens // length, 1)
        for place in range(0, len(ordered), step):
            part = ordered[place : place + step]
            starts = np.repeat([start for (start, _), _ in part], length)
            offsets = np.tile(np.arange(length), len(part))
            first = np.repeat(np.arange(len(part)) * length, length)
            yield Stretch(
                prefix=np.array(trunk.places[: part[-1][0][0]], dtype=np.int64),
                tokens=np.array([tokens for (_, tokens), _ in part], dtype=np.int64).flatten(),
                positions=starts + offsets,
                visible=starts,
                first=first,
                last=first + length,
                asked=[
                    (i * length + at, token, slot) for i, (_, asked) in enumerate(part) for at, token, slot in asked
                ],
            )

    def _pack(self, stretches: Iterable[Stretch]) -> Iterator[list[Stretch]]:
        """Put stretches of like size into forwards within the limits; a stretch alone always passes."""
        packed: list[Stretch] = []
        stored = new = 0
        for stretch in sorted(stretches, key=lambda s: s.size, reverse=True):
            wider = max(new, len(stretch.tokens))
            rows = len(packed) + 1
            if packed and (
                rows * wider > self._limits.forward_tokens or rows * (stored + wider) > self._limits.seen_tokens
            ):
                yield packed
                packed, stored, wider = [], 0, len(stretch.tokens)
            packed.append(stretch)
            stored, new = max(stored, len(stretch.prefix)), wider
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
    def _ask(self, stretches: list[Stretch], hidden: torch.Tensor, log_probabilities: Any, is_argmax: Any) -> None:
        """Read what is asked of a forward into the slots of its answers, arrays over a batch."""
        at = np.array([(i, place) for i, s in enumerate(stretches) for place, _, _ in s.asked])  # (A, 2)
        token = np.array([t for s in stretches for _, t, _ in s.asked])
        slot = np.array([number for s in stretches for _, _, number in s.asked])
        at, which = np.unique(at, axis=0, return_inverse=True)  # several answers may ask at one position
        which = which.reshape(-1)
        order = np.argsort(which, kind="stable")
        token, slot, which = token[order], slot[order], which[order]
        chunk = max(1, LOGITS_BUDGET_BYTES // (4 * self._model.config.vocab_size))
        for start in range(0, len(at), chunk):
            row, column = self._to_device(at[start : start + chunk]).unbind(1)
            logits = self._model.lm_head(hidden[row, column]).float()  # (R, V)
            logits[:, self._mask_token_id] = -torch.inf
            begin, end = np.searchsorted(which, (start, start + chunk))
            position, asked = self._to_device(which[begin:end] - start), self._to_device(token[begin:end])
            values = logits[position, asked] - logits.logsumexp(dim=-1)[position]
            hit = logits.argmax(dim=-1)[position] == asked
            log_probabilities[slot[begin:end]] = values.double().cpu().numpy()
            is_argmax[slot[begin:end]] = hit.cpu().numpy()

    def _to_device(self, array: Any) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device)
