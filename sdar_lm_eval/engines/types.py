"""What goes into an engine and what comes out: requests, results, and the protocol.

    GenerationRequest   prompt tokens, how to denoise (`DecodingConfig`), and what ends the answer
    GenerationResult    the new tokens, why they ended, what they cost
    Engine              generate(requests) yields (index, GenerationResult) as each finishes
    EngineInfo          what an engine says of itself

and for log-likelihoods, which an engine may leave out:

    LikelihoodConfig    by which method
    ScoreRequest        context tokens and continuation tokens
    ScoreResult         the continuation's log-likelihood
    Scorer              an Engine with score(requests, config)

Nothing here holds a tensor or imports torch.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar, runtime_checkable

from sdar_lm_eval.checks import check_number, check_range
from sdar_lm_eval.decoding import DecodingConfig
from sdar_lm_eval.defaults import DEFAULT_BLOCK_LENGTH
from sdar_lm_eval.errors import UserError, did_you_mean

LIKELIHOOD_METHODS = ("chain", "nelbo")

Self = TypeVar("Self")

Fact = str | int | float | bool | None


@dataclass(frozen=True)
class EngineInfo:
    """Facts on an engine: what the results file has of it.

    Attributes:
        engine: the engine's name.
        device: where it computes.
        dtype: of weights and activations, without "torch.".
        max_active: most sequences at once.
        engine_version, engine_commit: of the engine's package; None for the engine of this package, and for a commit
            that pip does not know.
        deviations: rules that differ from those of `DecodingConfig`, by setting; None where there are none.
        extra: options and counts that only this engine has.
        environment: versions of libraries, Python, the GPU's name.
    """

    engine: str
    device: str
    dtype: str
    max_active: int
    engine_version: str | None = None
    engine_commit: str | None = None
    deviations: Mapping[str, str] | None = None
    extra: Mapping[str, Fact] = field(default_factory=dict)
    environment: Mapping[str, str | None] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Fact | dict[str, str]]:
        """All facts by name in one mapping, as the results file has them."""
        package = {"engine_version": self.engine_version, "engine_commit": self.engine_commit}
        return {
            "engine": self.engine,
            **(package if self.engine_version is not None else {}),
            "device": self.device,
            "dtype": self.dtype,
            "max_active": self.max_active,
            **self.extra,
            **({} if self.deviations is None else {"deviations": dict(self.deviations)}),
            **self.environment,
        }


@dataclass(frozen=True)
class GenerationRequest:
    """One prompt to be continued.

    Args:
        prompt_ids: the prompt's tokens; at least one.
        max_new_tokens: the answer is never longer.
        decoding: how to denoise.
        stop_ids: tokens that end the answer; the token itself is not part of it.
        stop_strings: texts that end the answer. The tokens up to the one that completes the text are returned (whoever
            makes text of them cuts it exactly).
        seed: of this request's draws; the same seed gives the same draws whatever else is in the batch.
        record_steps: report when and how surely each token was unmasked (GenerationResult.unmasked_at, .confidences).
    """

    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    decoding: DecodingConfig
    stop_ids: frozenset[int] = frozenset()
    stop_strings: tuple[str, ...] = ()
    seed: int = 0
    record_steps: bool = False

    def __post_init__(self) -> None:
        if not self.prompt_ids:
            raise UserError("a generation request needs at least one prompt token; give the tokenizer's prefix token.")
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens={self.max_new_tokens} is out of range: it must be 1 or more.")

    @property
    def longest(self) -> int:
        """Most tokens of prompt and answer, the last block whole."""
        length = self.decoding.block_length
        return -(-(len(self.prompt_ids) + self.max_new_tokens) // length) * length


@dataclass(frozen=True)
class GenerationResult:
    """What an engine made of one request: token ids, no text.

    Attributes:
        token_ids: the new tokens, without the stop token that ended them.
        finish_reason: "stop" (a stop token or string) or "length".
        prefill_forwards, denoising_forwards, commit_forwards: how often its prompt, or a block of it, went through the
            model. In the native engine a commit shares its forward with the next block's first denoising. A request
            that was preempted and run again counts all of them.
        seconds: from its first forward to its end.
        unmasked_at: for each new token, the denoising step of its block that unmasked it (from 0), if recorded.
        confidences: for each new token, its probability when it was drawn, if recorded.
    """

    token_ids: tuple[int, ...]
    finish_reason: str
    prefill_forwards: int
    denoising_forwards: int
    commit_forwards: int
    seconds: float
    unmasked_at: tuple[int, ...] | None = None
    confidences: tuple[float, ...] | None = None


Result = TypeVar("Result")
Results = Generator[tuple[int, Result], None, None]
"""(position in the requests, result) as each finishes; closing it ends the run."""


class Engine(Protocol):
    """What the harness needs of an engine."""

    @property
    def info(self) -> EngineInfo:
        """Facts for the results file, as they are now."""

    def prepare(self, requests: Sequence[GenerationRequest]) -> None:
        """Do what has to be done before these requests can run, once: its time is loading, not generation.

        Raises:
            UserError, EngineError: as `generate`.
        """

    def generate(self, requests: Sequence[GenerationRequest]) -> Results[GenerationResult]:
        """Run all requests; yield (position in `requests`, result) as each finishes, in any order.

        Raises:
            UserError: a request can never run; raised before anything ran, with the numbers.
            EngineError: the engine stopped; what was yielded before stays valid.
        """

    def peak_memory_bytes(self) -> int:
        """The most memory used so far: the device's on CUDA, else the process's."""

    def close(self) -> None:
        """Give the model's memory back, or have a run that is under way do so at its end; a second call does nothing.

        From then on `prepare`, `generate` and `score` raise an EngineError; `info` stays.
        """

    def __enter__(self: Self) -> Self:
        """The engine; the end of the `with` block closes it."""

    def __exit__(self, *_: object) -> None: ...


@dataclass(frozen=True)
class LikelihoodConfig:
    """How log-likelihoods are computed; `sdar_lm_eval/likelihood.py` defines the methods.

    Args:
        method: "chain", exact, as many forwards of a block as it has scored tokens; or "nelbo", the diffusion bound.
        mc_samples: of nelbo: masks a block. Blocks with no more possible masks than that have all of them computed,
            without sampling noise (2^m - 1 for m scored tokens: 256 is enough for blocks of 8).
        block_length: tokens denoised together.
        seed: of the masks that are sampled.

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
        """The settings by name, without those that have no say."""
        return {"likelihood": self.method} | ({"mc_samples": self.mc_samples} if self.method == "nelbo" else {})


@dataclass(frozen=True)
class ScoreRequest:
    """A continuation whose log-likelihood is asked for.

    Args:
        context_ids: the tokens before it; at least one (the tokenizer's prefix token where there is no text).
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
        log_likelihood: in nats; under nelbo the bound, with its sign turned. -inf where the continuation holds the mask
            token, which is never generated.
        is_greedy: whether greedy decoding by `sequential`, one token a step, gives this continuation; the same under
            both methods.
        standard_error: of log_likelihood, in nats, from sampled masks; 0 where nothing was sampled.
        clean_tokens, noised_tokens: run through the model for this request: text without masks, and blocks with masks.
            What several requests share counts for the first of them.
    """

    log_likelihood: float
    is_greedy: bool
    standard_error: float = 0.0
    clean_tokens: int = 0
    noised_tokens: int = 0


@runtime_checkable
class Scorer(Protocol):
    """What an engine has that computes log-likelihoods."""

    def score(self, requests: Sequence[ScoreRequest], config: LikelihoodConfig) -> Results[ScoreResult]:
        """Score all requests; yield (position in `requests`, result) as each finishes, in any order.

        Raises:
            UserError: a request can never run; raised before anything ran, with the numbers.
            EngineError: the engine stopped; what was yielded before stays valid.
        """
