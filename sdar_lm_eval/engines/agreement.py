"""Judges whether rounding explains that an engine's greedy answer differs from float32's.

Engines that compute in another dtype, or in another order, get logits that differ by rounding. Where two choices of
greedy decoding are nearly equally probable, rounding may flip the choice, and all later tokens may then differ. So
equal tokens cannot be required. The rule is: a rounding of r nats explains an answer if greedy decoding can write the
answer with float32's log-probabilities, each changed by at most r.

The log-probabilities come from transformers' forward of the whole text under SDAR's attention mask, without cache,
batch or kernels. The rule applies to low_confidence_static and sequential with one token a step (`denoising_steps` is
`block_length`): each step then chooses one position and its token.
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
from sdar_lm_eval.tokens import first_difference

if TYPE_CHECKING:
    from transformers import PreTrainedModel

JUDGED = ("low_confidence_static", "sequential")
"""Strategies to which the rule applies."""
ROUNDING = 0.1
"""Most nats that rounding to 16 bits explains: the probabilities of two choices are then within 10% of each other. The
demo's 400 answers in bfloat16 on the CPU need up to 0.078."""
ROUNDING_OF_FLOAT32 = 0.001
"""Most nats that another order of summation in float32 explains."""
MOST_FORWARDS = 500
"""Most states of a block that a search visits; a search that needs more states finds no explanation."""

Block = tuple[int, ...]
"""A block's tokens, with the mask token at masked positions."""
Wanted = Sequence[frozenset[int] | None]
"""For each position of a block the tokens that fit the answer; None: any token, since the answer ends before."""


@dataclass(frozen=True)
class Divergence:
    """An answer that differs from the reference's, or that float32 does not write.

    Attributes:
        index: position of the answer's request.
        token: index in the answer of the first token that differs, or of the first token of the first block that needs
            rounding.
        rounding: the least rounding in nats that explains this block; infinite where no rounding up to `ROUNDING` does.
        worst: the largest of the least roundings of all blocks, in nats; infinite likewise.
    """

    index: int
    token: int
    rounding: float
    worst: float


class Float32Judge:
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
        """Compare an answer with the reference's. Return None where they are equal.

        Args:
            index: position of the request.
            request: the request: greedy, by a strategy of `JUDGED`, with one token a step and without stop strings.
            answer: an engine's answer.
            reference: the reference's answer.
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
        """Check an answer without a reference. Return None where a rounding of `ROUNDING_OF_FLOAT32` explains it.

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
        """Return for each block of an answer the least rounding with which greedy decoding writes the block.

        Args:
            request: as for `divergence`.
            answer: the answer's tokens, without a stop token.
            most: the largest rounding to search for, in nats.

        Returns:
            Nats for each block; infinite where no rounding up to `most` explains the block.
        """
        length, prompt = request.decoding.block_length, request.prompt_ids
        text = (*prompt, *answer)
        end = len(text) + (len(answer) < request.max_new_tokens)  # with the stop token after the answer
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
        """Compute log-probabilities at the positions of several states of blocks, in one forward.

        The states follow the text in the sequence, each with the positions of its block. A state attends to itself and
        to the text's earlier blocks. Source: the layout of SDAR's training, in which a text and its noised blocks share
        a forward.

        Args:
            text: prompt and answer.
            states: name of a state -> (position of the block's first token, the block).
            length: L, the number of tokens in a block.

        Returns:
            Name of a state -> (L, V) in nats.
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
    """Return the most nats that rounding explains, for a dtype of weights and activations."""
    return ROUNDING_OF_FLOAT32 if dtype == "float32" else ROUNDING


def _search(
    request: GenerationRequest, text: Sequence[int], start: int, mask: int, most: float
) -> Generator[Block, torch.Tensor, float]:
    """Find the least rounding with which greedy decoding writes the block of a text at `start`.

    A state is the block with some positions masked. A step unmasks one position. The rounding that a step needs is the
    larger of two shortfalls: its position's against the best position, and its token's against the best token. The
    rounding that a path needs is the largest of its steps. The search is Dijkstra's algorithm with the maximum in the
    place of the sum: it extends the state that needs the least rounding, so the first state with all wanted tokens is
    the end of a best path.

    Args:
        request: as for `Float32Judge.divergence`.
        text: prompt and answer.
        start: position of the block's first token.
        mask: the mask token.
        most: the largest rounding to search for, in nats.

    Yields:
        A state. The caller sends back its log-probabilities (L, V).

    Returns:
        Nats; infinite where no rounding up to `most` explains the block.
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
                heapq.heappush(queue, (needed, masked - 1, following))  # equal roundings: fewest masks first
    return math.inf


def _wanted(request: GenerationRequest, text: Sequence[int], start: int) -> Wanted:
    """The tokens that fit each position of the block at `start`: the text's token, then a stop token, then any token.

    A stop token ended an answer that is shorter than its limit.
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
    """The next steps with wanted tokens: (position, token, rounding in nats that the step needs, at most `most`)."""
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
