"""The interface of engines: requests, results, and protocols.

    GenerationRequest   prompt tokens, decoding settings (`DecodingConfig`), and what ends the answer
    GenerationResult    the new tokens, why they end, and the forwards they took
    Engine              generate(requests) yields (index, GenerationResult) as each request finishes
    EngineInfo          facts about an engine

For watching denoising, which an engine may not support:

    BlockStep           a block after a denoising step
    Watchable           an Engine with generate_watched(requests, watch)

For log-likelihoods, which an engine may not support:

    LikelihoodConfig    the method and its settings
    ScoreRequest        context tokens and continuation tokens
    ScoreResult         the continuation's log-likelihood
    Scorer              an Engine with score(requests, config)

This module holds no tensor and does not import torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar, runtime_checkable

from sdar_lm_eval.checks import check_arguments, check_number, check_range, check_type, plain
from sdar_lm_eval.decoding import DecodingConfig
from sdar_lm_eval.defaults import DEFAULT_BLOCK_LENGTH
from sdar_lm_eval.errors import UserError, did_you_mean
from sdar_lm_eval.thinking import Repetition, Thinking

LIKELIHOOD_METHODS = ("chain", "nelbo")

Self = TypeVar("Self")

Fact = str | int | float | bool | None


@dataclass(frozen=True)
class EngineInfo:
    """Facts about an engine, for the results file.

    Attributes:
        engine: the engine's name.
        device: the device that the engine computes on.
        dtype: dtype of weights and activations, without "torch.".
        max_active: most sequences that run at once.
        engine_version, engine_commit: version and commit of the engine's package; None for this package's own engine,
            and for a commit that pip does not know.
        deviations: setting -> how the engine's rule differs from that of `DecodingConfig`; None: no rule differs.
        answer_options: options of this engine that change answers: name -> value; False or None where an option is
            off. A run takes stored answers only of equal options.
        extra: options and counts that only this engine has.
        counted: names in `extra` of the work done since the engine was loaded.
        environment: versions of libraries and Python, the GPU's name.
    """

    engine: str
    device: str
    dtype: str
    max_active: int
    engine_version: str | None = None
    engine_commit: str | None = None
    deviations: Mapping[str, str] | None = None
    answer_options: Mapping[str, Fact] = field(default_factory=dict)
    extra: Mapping[str, Fact] = field(default_factory=dict)
    counted: tuple[str, ...] = ()
    environment: Mapping[str, str | None] = field(default_factory=dict)

    @property
    def counts(self) -> Counter[str]:
        """The work done since the engine was loaded."""
        return Counter({name: int(self.extra[name] or 0) for name in self.counted})

    def as_dict(self) -> dict[str, Fact | dict[str, Fact] | dict[str, str]]:
        """All facts by name in one mapping, as the results file holds them."""
        package = {"engine_version": self.engine_version, "engine_commit": self.engine_commit}
        return {
            "engine": self.engine,
            **(package if self.engine_version is not None else {}),
            "device": self.device,
            "dtype": self.dtype,
            "max_active": self.max_active,
            **self.extra,
            **({"answer_options": dict(self.answer_options)} if self.answer_options else {}),
            **({} if self.deviations is None else {"deviations": dict(self.deviations)}),
            **self.environment,
        }


@dataclass(frozen=True)
class GenerationRequest:
    """One prompt to be continued.

    Args:
        prompt_ids: the prompt's tokens, at least one; a list or an array of tokens becomes a tuple.
        max_new_tokens: most tokens of the answer.
        decoding: the decoding settings.
        stop_ids: tokens that end the answer; the answer does not include the stop token.
        stop_strings: texts that end the answer, outside of its thought. The answer includes the token that completes a
            stop string: the caller cuts the decoded text at the stop string.
        seed: seed of this request's draws. The draws do not depend on the other requests.
        record_steps: whether to report each token's step and confidence (GenerationResult.unmasked_at, .confidences).
        thinking: how the answer's thought is found, and after how many tokens it is closed; None: the answer has none.
        repetition: the rule that ends an answer in a loop; None: no rule.
    """

    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    decoding: DecodingConfig
    stop_ids: frozenset[int] = frozenset()
    stop_strings: tuple[str, ...] = ()
    seed: int = 0
    record_steps: bool = False
    thinking: Thinking | None = None
    repetition: Repetition | None = None

    def __post_init__(self) -> None:
        given: Any = self.prompt_ids
        check_type("prompt_ids", given, Sequence[int])
        if not isinstance(given, tuple):
            object.__setattr__(self, "prompt_ids", tuple(map(plain, given)))  # the class is frozen
        # A prompt may be long, so its tokens are checked once.
        check_arguments(GenerationRequest, **vars(self) | {"prompt_ids": ()})
        if not self.prompt_ids:
            raise UserError("a generation request needs at least one prompt token; give the tokenizer's prefix token.")
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens={self.max_new_tokens} is out of range: it must be 1 or more.")

    @property
    def longest(self) -> int:
        """Most tokens of prompt and answer, rounded up to whole blocks."""
        length = self.decoding.block_length
        return -(-(len(self.prompt_ids) + self.max_new_tokens) // length) * length


@dataclass(frozen=True)
class GenerationResult:
    """The answer to one request: token ids, no text.

    Attributes:
        token_ids: the new tokens, without a stop token.
        finish_reason: "stop" (a stop token or string), "length", or "repetition" (`GenerationRequest.repetition`).
        prefill_forwards, denoising_forwards, commit_forwards: number of forwards of each kind that ran for the request,
            also those before a preemption. In the native engine, a commit shares its forward with the next block's
            first denoising step.
        seconds: time from the request's first forward to its end.
        unmasked_at: for each new token, the step of its block that unmasked the token, from 0; None: not recorded.
        confidences: for each new token, its probability when the token was drawn; None: not recorded.
        forced_tokens: number of new tokens that were not drawn: the think end behind a thought that reached its limit
            (`Thinking.max_tokens`). Of these tokens, `confidences` has 1. `unmasked_at` has the step after the last
            one of the block's kept tokens, and the block's later tokens count their steps from there on.
    """

    token_ids: tuple[int, ...]
    finish_reason: str
    prefill_forwards: int
    denoising_forwards: int
    commit_forwards: int
    seconds: float
    unmasked_at: tuple[int, ...] | None = None
    confidences: tuple[float, ...] | None = None
    forced_tokens: int = 0

    @property
    def forwards(self) -> dict[str, int]:
        """The number of forwards by kind, as files have them."""
        return {
            "prefill": self.prefill_forwards,
            "denoising": self.denoising_forwards,
            "commit": self.commit_forwards,
        }


Result = TypeVar("Result")
Results = Generator[tuple[int, Result], None, None]
"""Yields (position in the requests, result) as each request finishes; closing the generator ends the run."""


class Engine(Protocol):
    """The interface that the harness needs."""

    @property
    def info(self) -> EngineInfo:
        """The current facts for the results file."""

    def prepare(self, requests: Sequence[GenerationRequest]) -> None:
        """Allocate and compile what these requests need. The time of `prepare` counts as loading, not as generation.

        Raises:
            UserError, EngineError: as `generate`.
        """

    def generate(self, requests: Sequence[GenerationRequest]) -> Results[GenerationResult]:
        """Run all requests; yield (position in `requests`, result) as each finishes, in any order.

        Raises:
            UserError: a request can never run. The error has the numbers, and is raised before any request runs.
            EngineError: the engine stopped; results that were yielded before stay valid.
        """

    def peak_memory_bytes(self) -> int:
        """Most memory used so far in bytes: of the device on CUDA, else of the process."""

    def close(self) -> None:
        """Free the model's memory: at once, or at the end of a run in progress. A second call does nothing.

        After `close`, `prepare`, `generate` and `score` raise an EngineError. `info` stays.
        """

    def __enter__(self: Self) -> Self:
        """Return the engine; the end of the `with` block closes the engine."""

    def __exit__(self, *_: object) -> None: ...


@dataclass(frozen=True)
class BlockStep:
    """A block of an answer after a denoising step. Tokens of the prompt in the block are left out.

    Attributes:
        index: position of the request in the run.
        start: number of the answer's tokens before the block.
        token_ids: the block's tokens, with the mask token at masked positions. Of a decided block, these are the tokens
            that belong to the answer.
        unmasked_at: for each token, the step of the block that unmasked the token, from 0; -1 for a mask.
        confidences: for each token, its probability when the token was drawn; 1 for a mask.
        decided: whether this step decided the block. An inserted think end has a step of its own, decided too.
        finished: whether the answer ends in this block; never true of a block that is not decided.
    """

    index: int
    start: int
    token_ids: tuple[int, ...]
    unmasked_at: tuple[int, ...]
    confidences: tuple[float, ...]
    decided: bool
    finished: bool


Watch = Callable[[BlockStep], None]
"""Called after each denoising step of a request; must return quickly, since the engine waits for it."""


@runtime_checkable
class Watchable(Protocol):
    """The interface of an engine that shows its denoising steps."""

    def generate_watched(self, requests: Sequence[GenerationRequest], watch: Watch) -> Results[GenerationResult]:
        """Do as `Engine.generate`, and call `watch` after each denoising step of each request.

        A request's steps come in order. A block that was not decided when its request was preempted begins again; a
        request that runs once more begins again with its first block.

        Raises:
            UserError, EngineError: as `Engine.generate`. What `watch` raises ends the run.
        """


@dataclass(frozen=True)
class LikelihoodConfig:
    """How log-likelihoods are computed; `sdar_lm_eval/likelihood.py` defines the methods.

    Args:
        method: "chain", exact, one forward of a block for each of its scored tokens; or "nelbo", the evidence
            lower bound.
        mc_samples: sampled masks of a block (nelbo). A block of m scored tokens has 2^m - 1 possible masks. If that
            number is at most mc_samples, all masks are computed, without sampling noise: 256 is enough for blocks of 8.
        block_length: tokens denoised together.
        seed: seed of the sampled masks.

    Raises:
        UserError: a value is out of range.
    """

    method: str = "chain"
    mc_samples: int = 256
    block_length: int = DEFAULT_BLOCK_LENGTH
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in LIKELIHOOD_METHODS:
            raise UserError(
                f"likelihood={self.method!r} is unknown; choose {' or '.join(LIKELIHOOD_METHODS)}."
                + did_you_mean(str(self.method), LIKELIHOOD_METHODS)
            )
        object.__setattr__(self, "mc_samples", check_number("mc_samples", self.mc_samples, whole=True))
        check_range(
            f"mc_samples={self.mc_samples}",
            2 <= self.mc_samples <= 2**20 and self.mc_samples % 2 == 0,
            "an even number from 2 to 1,048,576",
        )

    def as_dict(self) -> dict[str, str | int]:
        """The settings by name, without those that the method does not use."""
        return {"likelihood": self.method} | ({"mc_samples": self.mc_samples} if self.method == "nelbo" else {})


@dataclass(frozen=True)
class ScoreRequest:
    """A continuation to compute the log-likelihood of.

    Args:
        context_ids: the tokens before the continuation; at least one (the tokenizer's prefix token for empty text).
        continuation_ids: at least one.
    """

    context_ids: tuple[int, ...]
    continuation_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.context_ids or not self.continuation_ids:
            raise UserError(
                f"a score request needs at least one token of context ({len(self.context_ids)} given) and of "
                f"continuation ({len(self.continuation_ids)} given); give the tokenizer's prefix token for no context."
            )


@dataclass(frozen=True)
class ScoreResult:
    """A continuation's score.

    Attributes:
        log_likelihood: the log-likelihood in nats; under nelbo, the evidence lower bound. -inf where the continuation
            holds the mask token, which is never generated.
        is_greedy: whether greedy decoding by `sequential`, one token a step, generates this continuation. Both methods
            agree.
        standard_error: standard error of log_likelihood in nats, from sampled masks; 0 where no masks were sampled.
        clean_tokens, noised_tokens: tokens that ran through the model for this request, in unmasked text and in masked
            blocks. Tokens that several requests share count for the first of these.
    """

    log_likelihood: float
    is_greedy: bool
    standard_error: float = 0.0
    clean_tokens: int = 0
    noised_tokens: int = 0


@runtime_checkable
class Scorer(Protocol):
    """The interface of an engine that computes log-likelihoods."""

    def score(self, requests: Sequence[ScoreRequest], config: LikelihoodConfig) -> Results[ScoreResult]:
        """Score all requests; yield (position in `requests`, result) as each finishes, in any order.

        Raises:
            UserError: a request can never run. The error has the numbers, and is raised before any request runs.
            EngineError: the engine stopped; results that were yielded before stay valid.
        """
