"""Requests for another package's engine: which are refused, how they are grouped, and where their answers end."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from sdar_lm_eval.checkpoint import Checkpoint
from sdar_lm_eval.decoding import DecodingConfig, end_of_answer
from sdar_lm_eval.engines.types import GenerationRequest
from sdar_lm_eval.errors import UserError

Key = TypeVar("Key", bound=Hashable)


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
                "leave it out."
            )
        if decoding.block_length not in self.block_lengths:
            raise UserError(
                f"block_length={decoding.block_length}: {self.takes} {listed(self.block_lengths)}. Use --model sdar."
            )


def check_requests(requests: Sequence[GenerationRequest], decodes: Decodes, checkpoint: Checkpoint) -> None:
    """Refuse requests that would be answered wrongly, before any of them runs.

    Raises:
        UserError: there is one.
    """
    for decoding in {request.decoding for request in requests}:
        decodes.check(decoding)
    check_lengths(requests, checkpoint.max_length, f"checkpoint {checkpoint.name!r} has")


def check_lengths(requests: Iterable[GenerationRequest], limit: int, who: str) -> None:
    """Refuse requests of more than `limit` tokens; `who` ("checkpoint 'x' has") begins the clause with the limit.

    Raises:
        UserError: one is too long.
    """
    for request in requests:
        if request.longest > limit:
            raise UserError(
                f"a request of {len(request.prompt_ids):,} prompt and {request.max_new_tokens:,} new tokens needs "
                f"{request.longest:,} places in whole blocks; {who} {limit:,}. Lower max_gen_toks or max_length."
            )


def listed(values: Iterable[object]) -> str:
    """Values as messages list them."""
    return ", ".join(map(str, values))


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
    """The tokens that an engine can stop a request at: its stop tokens, and stop strings that are a single token."""
    ids = set(request.stop_ids)
    for string in request.stop_strings:
        encoded = checkpoint.tokenizer.encode(string, add_special_tokens=False)
        if len(encoded) == 1 and string in checkpoint.decode(encoded):
            ids.add(encoded[0])
    return frozenset(ids)


def answer_end(
    tokens: Sequence[int], request: GenerationRequest, checkpoint: Checkpoint, engine: str
) -> tuple[int, str]:
    """Where a request's answer ends in the tokens that an engine returned: (tokens of the answer, "stop" or "length").

    Raises:
        NoAnswerError: the engine returned too few tokens.
    """
    end, reason = end_of_answer(tokens, request, checkpoint.decode)
    if not reason:
        raise NoAnswerError(
            f"{engine} returned {len(tokens)} of {request.max_new_tokens} tokens, and none that ends the answer."
        )
    return end, reason
