"""Requests for another package's engine: which are refused, how they are grouped, where their answers end or go on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from sdar_lm_eval.checkpoint import Checkpoint
from sdar_lm_eval.decoding import DecodingConfig
from sdar_lm_eval.ending import CLOSE, Ending, end_of_answer
from sdar_lm_eval.engines.types import GenerationRequest, GenerationResult
from sdar_lm_eval.errors import UserError, listed
from sdar_lm_eval.hashing import seed_from

Key = TypeVar("Key", bound=Hashable)


IN_THOUGHT = "in thought"
"""The reason of a part of an answer: the engine stopped at a stop string within a thought, and has to go on."""

_SUMMED = ("prefill_forwards", "denoising_forwards", "commit_forwards", "seconds")


class NoAnswerError(Exception):
    """One request has no answer; the engine goes on."""


# Refusals


@dataclass(frozen=True)
class Decodes:
    """Which settings of `DecodingConfig` an engine has.

    Attributes:
        engine: the engine's name in messages, with its version where versions differ.
        strategies: its remasking strategies.
        block_lengths: its block lengths.
        takes: subject and verb of the message that lists `block_lengths`.
        repetition_penalty: why the adapter passes no repetition penalty on.
    """

    engine: str
    strategies: Sequence[str]
    block_lengths: Sequence[int]
    takes: str
    repetition_penalty: str

    def check(self, decoding: DecodingConfig) -> None:
        """Refuse settings that the engine would decode by other rules.

        Raises:
            UserError: says which settings the engine has.
        """
        if decoding.remasking_strategy not in self.strategies:
            raise UserError(
                f"remasking_strategy={decoding.remasking_strategy!r} is not in {self.engine}, which has "
                f"{listed(self.strategies)}. Choose one of these, or use --model sdar."
            )
        if decoding.repetition_penalty != 1:
            raise UserError(
                f"repetition_penalty={decoding.repetition_penalty}: {self.repetition_penalty}. Use --model sdar, or "
                "leave out repetition_penalty."
            )
        if decoding.block_length not in self.block_lengths:
            raise UserError(
                f"block_length={decoding.block_length}: {self.takes} {listed(self.block_lengths)}. Use --model sdar."
            )


def check_requests(requests: Sequence[GenerationRequest], decodes: Decodes, checkpoint: Checkpoint) -> None:
    """Refuse requests that would be answered wrongly, before any of them runs.

    Raises:
        UserError: some request would be.
    """
    for decoding in {request.decoding for request in requests}:
        decodes.check(decoding)
    check_lengths(requests, checkpoint.max_length, f"checkpoint {checkpoint.name!r} takes")


def check_lengths(requests: Iterable[GenerationRequest], limit: int, who: str) -> None:
    """Refuse requests of more than `limit` tokens; `who` ("checkpoint 'x' takes") begins the clause with the limit.

    Raises:
        UserError: a request is too long.
    """
    for request in requests:
        if request.longest > limit:
            raise UserError(
                f"a request of {len(request.prompt_ids):,} prompt and {request.max_new_tokens:,} new tokens needs "
                f"{request.longest:,} tokens in whole blocks; {who} {limit:,}. Lower max_gen_toks or max_length."
            )


# Groups


class Draw(NamedTuple):
    """How tokens are drawn.

    Greedy decoding is top_k=1 at temperature 1: confidences are then probabilities at temperature 1.
    """

    greedy: bool
    temperature: float
    top_k: int
    top_p: float

    @classmethod
    def of(cls, decoding: DecodingConfig) -> Draw:
        """The draw of these settings; all greedy settings have one draw."""
        if decoding.greedy:
            return cls(True, 1.0, 1, 1.0)
        return cls(False, decoding.temperature, decoding.top_k, decoding.top_p)


def grouped(indices: Iterable[int], key: Callable[[int], Key]) -> dict[Key, list[int]]:
    """Indices by their key; keys and indices stay in the order given."""
    groups: dict[Key, list[int]] = {}
    for index in indices:
        groups.setdefault(key(index), []).append(index)
    return groups


# Answers


def stop_ids_of(request: GenerationRequest, checkpoint: Checkpoint) -> frozenset[int]:
    """The tokens that an engine can stop a request at: its stop tokens, and stop strings that are a single token.

    Where the prompt has opened a thought, no stop string is among them: the thought may hold it.
    """
    ids = set(request.stop_ids)
    thinks = request.thinking is not None and request.thinking.opened
    for string in () if thinks else request.stop_strings:
        encoded = checkpoint.tokenizer.encode(string, add_special_tokens=False)
        if len(encoded) == 1 and string in checkpoint.decode(encoded):
            ids.add(encoded[0])
    return frozenset(ids)


def answer_end(
    tokens: Sequence[int], request: GenerationRequest, checkpoint: Checkpoint, engine: str
) -> tuple[int, str]:
    """Where a request's answer ends in the tokens that an engine returned: (tokens of the answer, reason).

    The reason is that of `Ending.add`; or IN_THOUGHT, where the engine stopped at a stop string within a thought.

    Raises:
        NoAnswerError: the engine returned too few tokens.
    """
    end, reason = end_of_answer(tokens, request, checkpoint.decode)
    return end, reason or why_stopped(tokens, request, checkpoint, engine)


def why_stopped(tokens: Sequence[int], request: GenerationRequest, checkpoint: Checkpoint, engine: str) -> str:
    """Return IN_THOUGHT, where an engine stopped at a stop string that ends no answer: it stands within a thought.

    An engine may return the rest of the block in which it stopped.

    Raises:
        NoAnswerError: the engine stopped for no reason.
    """
    last_block = tokens[-request.decoding.block_length :]
    if request.thinking is not None and not stop_ids_of(request, checkpoint).isdisjoint(last_block):
        return IN_THOUGHT
    raise NoAnswerError(
        f"{engine} returned {len(tokens)} of {request.max_new_tokens} tokens, and none that ends the answer."
    )


# Continuations


class Parts:
    """An answer that an engine makes in parts: a part goes on behind those before it, which its prompt holds.

    An engine is asked again where it stopped within a thought, and where the thought has reached its limit: then the
    think end stands between the two parts.

    Args:
        request: the request for the whole answer.
        checkpoint: decodes tokens.

    Attributes:
        next: the request for the next part.
    """

    def __init__(self, request: GenerationRequest, checkpoint: Checkpoint) -> None:
        self._request, self._decode = request, checkpoint.decode
        self._ending = Ending(request, checkpoint.decode)
        self._parts: list[GenerationResult] = []
        self._tokens: list[int] = []
        self._forced = 0
        self.next = self._part()

    def add(self, result: GenerationResult) -> GenerationResult | None:
        """Take the next part's result; return the whole answer's, or None where another part follows (`next`)."""
        whole_room = self.next.max_new_tokens == self._request.max_new_tokens - len(self._tokens)
        count, reason = self._ending.add(result.token_ids)
        self._parts.append(result)
        self._tokens += result.token_ids[:count]
        if reason == CLOSE:
            assert self._request.thinking is not None
            self._tokens += self._request.thinking.end_ids
            self._forced += len(self._request.thinking.end_ids)
        elif (
            not reason
            and result.finish_reason in (("stop", "length") if whole_room else ("stop",))
            # A stop string that the white space behind the thought completes ends no answer.
            and not (self._ending.bare and result.finish_reason == "stop" and self._has_stop_string(result))
        ):
            reason = result.finish_reason  # by a stop token, which is not among the tokens; or by the limit
        if reason in ("", CLOSE):
            self.next = self._part()
            return None
        return dataclasses.replace(
            result,
            token_ids=tuple(self._tokens),
            finish_reason=reason,
            forced_tokens=self._forced,
            **{name: sum(getattr(part, name) for part in self._parts) for name in _SUMMED},
        )

    def _has_stop_string(self, part: GenerationResult) -> bool:
        text = self._decode(part.token_ids)
        return any(string in text for string in self._request.stop_strings)

    def _part(self) -> GenerationRequest:
        """The request for the part behind the tokens so far.

        A thought that may reach its limit ends the part at the end of the limit's block: a block that two parts share
        would be denoised otherwise than in one part, also where the thought ends by itself.
        """
        request, thinking, done = self._request, self._request.thinking, len(self._tokens)
        opened = bool(self._ending.thinks)
        limit = request.max_new_tokens - done
        if opened and (most := self._ending.thought_limit) is not None:
            begin, length = len(request.prompt_ids), request.decoding.block_length
            limit = min(limit, -(-(begin + most) // length) * length - begin - done)
        if done and thinking is not None:
            # Only the first part can say whether the answer opens a thought. A later part's limit closes the thought.
            thinking = dataclasses.replace(thinking, opened=True, max_tokens=None) if opened else None
        return dataclasses.replace(
            request,
            prompt_ids=(*request.prompt_ids, *self._tokens),
            max_new_tokens=limit,
            thinking=thinking,
            seed=seed_from([request.seed, done]) if done else request.seed,
        )
