"""Whether an engine's greedy answer is float32's up to rounding.

Engines that compute in another dtype, or in another order, get logits that differ by rounding. Where two choices of
greedy decoding are nearly as probable, rounding turns the choice over, and the rest of the answer follows from it. So
equal tokens are too much to ask for. The rule here: an answer is explained by a rounding of r nats if log-probabilities
in float32, changed by at most r, let greedy decoding write the answer.

The log-probabilities come from transformers' forward of the whole text under SDAR's mask, without cache, batch or
kernels. The rule is for low_confidence_static and sequential with one token a step (`denoising_steps` is
`block_length`), where a step's choice is one position and its token.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from sdar_lm_eval.checkpoint import Checkpoint
from sdar_lm_eval.engines.types import GenerationRequest, GenerationResult

if TYPE_CHECKING:
    from transformers import PreTrainedModel

JUDGED = ("low_confidence_static", "sequential")
"""Strategies whose answers the rule is for."""
ROUNDING = 0.1
"""Nats that rounding to 16 bits explains: choices between probabilities within 10% of each other. The demo's answers in
bfloat16 on the CPU, 400 of them, need up to 0.078."""
ROUNDING_OF_FLOAT32 = 0.001
"""Nats that another order of sums in float32 explains."""
MOST_FORWARDS = 500
"""Most states of a block that a search visits; a search that needs more finds no explanation."""

Block = tuple[int, ...]
"""A block's tokens, with the mask token at masked positions."""
Wanted = Sequence[frozenset[int] | None]
"""For each position of a block the tokens that fit an answer; None: any, since the answer ends before."""


@dataclass(frozen=True)
class Divergence:
    """An answer that is not the reference's, or not float32's.

    Attributes:
        index: position of the answer's request.
        token: index of the first token that differs, or of the first block that needs rounding.
        rounding: the least rounding in nats that explains the first block that differs; infinite where none of up to
            `ROUNDING` does.
        worst: the same for the answer's other blocks too: the largest of all.
    """

    index: int
    token: int
    rounding: float
    worst: float


class Plain:
    """The checkpoint's weights in transformers' model class, in float32 on the CPU: what answers are judged by.

    Args:
        checkpoint: the checkpoint whose answers are judged.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._mask = checkpoint.mask_token_id
        self._model: PreTrainedModel = checkpoint.load_model(dtype=torch.float32, device="cpu", attention="sdpa")

    def divergence(
        self, index: int, request: GenerationRequest, answer: GenerationResult, reference: GenerationResult
    ) -> Divergence | None:
        """Compare an answer with the reference's; None where the answers are equal.

        Args:
            index: position of the request.
            request: greedy, by a strategy of `JUDGED`, one token a step, without stop strings.
            answer: an engine's.
            reference: the answer to compare with.
        """
        theirs, ours = answer.token_ids, reference.token_ids
        token = first_difference(theirs, ours)
        if theirs == ours:
            same = answer.finish_reason == reference.finish_reason
            return None if same else Divergence(index, token, math.inf, math.inf)
        roundings = self.roundings(request, theirs)
        at = (len(request.prompt_ids) + token) // request.decoding.block_length
        first = len(request.prompt_ids) // request.decoding.block_length
        return Divergence(index, token, roundings[at - first], max(roundings))

    def deviation(self, index: int, request: GenerationRequest, answer: GenerationResult) -> Divergence | None:
        """Judge an answer by itself; None where float32 writes it, up to `ROUNDING_OF_FLOAT32`.

        Args:
            index: position of the request.
            request, answer: as for `divergence`.
        """
        roundings = self.roundings(request, answer.token_ids)
        block = next((i for i, rounding in enumerate(roundings) if rounding > ROUNDING_OF_FLOAT32), None)
        if block is None:
            return None
        length, given = request.decoding.block_length, len(request.prompt_ids)
        token = max((given // length + block) * length - given, 0)
        return Divergence(index, token, roundings[block], max(roundings))

    def roundings(self, request: GenerationRequest, answer: Sequence[int], most: float = ROUNDING) -> list[float]:
        """Return for each block of an answer the least rounding by which greedy decoding writes the block.

        Args:
            request: see `divergence`.
            answer: the answer's tokens, without a stop token.
            most: the largest rounding that is looked for.

        Returns:
            Nats; infinite where no rounding of up to `most` does.
        """
        length, prompt = request.decoding.block_length, request.prompt_ids
        text = (*prompt, *answer)
        end = len(text) + (len(answer) < request.max_new_tokens)  # the stop token behind the answer
        starts = range(len(prompt) // length * length, end, length)
        searches = [_search(request, text, start, self._mask, most) for start in starts]
        found = dict[int, float]()
        states = dict(enumerate(map(next, searches)))
        while states:
            scores = self._scores(text, {i: (starts[i], block) for i, block in states.items()}, length)
            for i in list(states):
                try:
                    states[i] = searches[i].send(scores[i])
                except StopIteration as ended:
                    found[i] = ended.value
                    del states[i]
        return [found[i] for i in range(len(starts))]

    @torch.no_grad()
    def _scores(
        self, text: Sequence[int], states: dict[int, tuple[int, Block]], length: int
    ) -> dict[int, torch.Tensor]:
        """Log-probabilities (L, V) in nats at the positions of several states of blocks, in one forward.

        The states stand behind the text, each at its block's positions. A state sees itself, and the text's blocks
        before. Source: the layout of SDAR's training, in which a text and its noised blocks share a forward.

        Args:
            text: prompt and answer.
            states: any name -> (position of the block's first token, the block).
            length: L.
        """
        blocks = list(states.values())
        ids = torch.tensor([*text, *itertools.chain.from_iterable(block for _, block in blocks)])
        offsets = torch.arange(length)
        positions = torch.cat([torch.arange(len(text)), *(start + offsets for start, _ in blocks)])
        number = positions // length  # of the token's block
        owner = torch.cat([torch.zeros(len(text)), torch.arange(1, len(blocks) + 1).repeat_interleave(length)])
        of_text = owner == 0
        sees = torch.where(of_text[:, None], number[:, None] >= number, number[:, None] > number) & of_text
        sees |= ~of_text & (owner[:, None] == owner)
        logits: torch.Tensor = self._model(
            ids[None], attention_mask=sees[None, None], position_ids=positions[None]
        ).logits[0, len(text) :].float()  # fmt: skip
        logits[:, self._mask] = -math.inf
        return dict(zip(states, logits.log_softmax(-1).view(len(blocks), length, -1), strict=True))


def allowed(dtype: str) -> float:
    """Return the rounding in nats that a dtype of weights and activations explains."""
    return ROUNDING_OF_FLOAT32 if dtype == "float32" else ROUNDING


def first_difference(a: Sequence[int], b: Sequence[int]) -> int:
    """Return the index of the first token that differs: the shorter length where one answer begins with the other."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _search(
    request: GenerationRequest, text: Sequence[int], start: int, mask: int, most: float
) -> Generator[Block, torch.Tensor, float]:
    """Find the least rounding by which greedy decoding writes the block of a text at `start`.

    A state is the block with some positions masked. A step unmasks one position. The step needs as much rounding as its
    position and its token fall short of the best ones; a path needs the most of its steps. The search extends the state
    that needs least, so the first state with all wanted tokens ends a best path: Dijkstra's algorithm, with the maximum
    in the place of the sum.

    Args:
        request: see `Plain.divergence`.
        text: prompt and answer.
        start: position of the block's first token.
        mask: the mask token.
        most: the largest rounding that is looked for.

    Yields:
        A state, for which the log-probabilities (L, V) are sent back.

    Returns:
        Nats; infinite where no rounding of up to `most` does.
    """
    length = request.decoding.block_length
    wanted = _wanted(request, text, start)
    given = tuple(request.prompt_ids[start:])
    begin: Block = (*given, *[mask] * (length - len(given)))
    least: dict[Block, float] = {begin: 0.0}
    queue: list[tuple[float, int, Block]] = [(0.0, 0, begin)]
    visited = 0
    while queue and visited < MOST_FORWARDS:
        rounding, masked, block = heapq.heappop(queue)
        if rounding > least[block]:
            continue
        if all(token != mask for token, fits in zip(block, wanted, strict=True) if fits is not None):
            return rounding
        visited += 1
        scores = yield block
        for position, token, needed in _steps(request, block, mask, scores, wanted, most):
            following = (*block[:position], token, *block[position + 1 :])
            needed = max(needed, rounding)
            if needed < least.get(following, math.inf):
                least[following] = needed
                heapq.heappush(queue, (needed, masked - 1, following))  # of equal ones, the one with fewest masks
    return math.inf


def _wanted(request: GenerationRequest, text: Sequence[int], start: int) -> Wanted:
    """What fits at each position of the block at `start`: the text's token, a stop token behind it, then anything.

    An answer below its limit was ended by a stop token.
    """
    stopped = len(text) - len(request.prompt_ids) < request.max_new_tokens

    def fitting(position: int) -> frozenset[int] | None:
        if position < len(text):
            return frozenset({text[position]})
        return request.stop_ids if stopped and position == len(text) else None

    return [fitting(start + i) for i in range(request.decoding.block_length)]


def _steps(
    request: GenerationRequest, block: Block, mask: int, scores: torch.Tensor, wanted: Wanted, most: float
) -> list[tuple[int, int, float]]:
    """The steps that lead on to wanted tokens: (position, token, rounding that the step needs, up to `most`)."""
    masked = [i for i, token in enumerate(block) if token == mask]
    highest = scores.max(-1).values.tolist()  # (L,)
    surest = max(highest[i] for i in masked)
    if request.decoding.remasking_strategy == "sequential":
        shortfalls = {masked[0]: 0.0}
    else:
        shortfalls = {i: surest - highest[i] for i in masked}
    found = []
    for position, shortfall in shortfalls.items():
        fits = wanted[position]
        if fits is None:
            fits = frozenset((scores[position] >= highest[position] - most).nonzero().flatten().tolist())
        for token in fits:
            needed = max(shortfall, highest[position] - float(scores[position, token]))
            if needed <= most:
                found.append((position, token, needed))
    return found
