"""What goes into an engine and what comes out: the request, its settings, the result, and the protocol.

    DecodingConfig      how to denoise: frozen, validated, hashable
    GenerationRequest   prompt tokens + DecodingConfig + what ends the answer
    GenerationResult    the new tokens, why they ended, what they cost
    Engine              generate(requests) yields (index, GenerationResult) as each finishes

and for log-likelihoods, which an engine may leave out:

    LikelihoodConfig    by which method
    ScoreRequest        context tokens + continuation tokens
    ScoreResult         the continuation's log-likelihood
    Scorer              an Engine with score(requests, config)

Nothing here holds a tensor or imports torch.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

from sdar_lm_eval.defaults import DEFAULT_BLOCK_LENGTH
from sdar_lm_eval.engines.native.strategies import STRATEGIES
from sdar_lm_eval.engines.types import EngineInfo, Self
from sdar_lm_eval.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from sdar_lm_eval.checkpoint import Checkpoint

LIKELIHOOD_METHODS = ("chain", "nelbo")

MAX_BLOCK_LENGTH = 1024


@dataclass(frozen=True)
class DecodingConfig:
    """How one request is denoised. Names follow `generate.py` of JetAstra/SDAR.

    Args:
        block_length: tokens denoised together.
        denoising_steps: length of the schedule of a block; step s unmasks `quotas[s]` tokens. None: `block_length`.
        remasking_strategy: which masked positions a step unmasks; a file each in `engines/native/strategies/`.
        confidence_threshold: low_confidence_dynamic keeps every token whose confidence is above it (strictly).
        eb_threshold: entropy_bounded keeps tokens while the sum of their entropies, in nats, is below it.
        temperature: of the distribution tokens are drawn from; 0 draws the most probable one (greedy). The harness's
            tasks are greedy unless they or the user ask for sampling; this class by itself samples.
        top_k: draw from the k most probable tokens only; 0 is off.
        top_p: draw from the smallest set of tokens whose probability exceeds p; 1 is off.
        repetition_penalty: as in transformers: the logits of tokens already in the prompt or answer are divided
            (positive ones) or multiplied (negative ones) by it; 1 is off.

    Raises:
        UserError: a value is out of range.
    """

    block_length: int = DEFAULT_BLOCK_LENGTH
    denoising_steps: int | None = None
    remasking_strategy: str = "low_confidence_dynamic"
    confidence_threshold: float = 0.85
    eb_threshold: float = 0.35
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "remasking_strategy":
                if not isinstance(value, str) or value not in STRATEGIES:
                    raise UserError(
                        f"remasking_strategy={value!r} is unknown; choose one of {', '.join(STRATEGIES)}."
                        + did_you_mean(str(value), STRATEGIES)
                    )
            elif not (field.name == "denoising_steps" and value is None):
                whole = field.name in ("block_length", "denoising_steps", "top_k")
                object.__setattr__(self, field.name, to_number(field.name, value, whole=whole))
        if self.denoising_steps is None:
            object.__setattr__(self, "denoising_steps", self.block_length)
        steps = self.steps
        _check_range(
            f"block_length={self.block_length}",
            1 <= self.block_length <= MAX_BLOCK_LENGTH,
            f"a whole number from 1 to {MAX_BLOCK_LENGTH}",
        )
        _check_range(
            f"denoising_steps={steps}",
            1 <= steps <= self.block_length,
            f"a whole number from 1 to block_length ({self.block_length})",
        )
        _check_range(
            f"confidence_threshold={self.confidence_threshold}",
            0 <= self.confidence_threshold <= 1,
            "a probability from 0 to 1",
        )
        _check_range(
            f"eb_threshold={self.eb_threshold}",
            0 <= self.eb_threshold <= 1e6,
            "an entropy in nats, from 0 to 1,000,000",
        )
        # Engines compute in float32: these bounds keep logits finite there.
        _check_range(
            f"temperature={self.temperature}",
            self.temperature == 0 or 1e-4 <= self.temperature <= 1e4,
            "0 (greedy), or from 0.0001 to 10,000",
        )
        _check_range(f"top_k={self.top_k}", self.top_k >= 0, "0 (off) or more")
        _check_range(f"top_p={self.top_p}", 0 < self.top_p <= 1, "above 0 and at most 1 (off)")
        _check_range(
            f"repetition_penalty={self.repetition_penalty}",
            0.01 <= self.repetition_penalty <= 100,
            "from 0.01 to 100 (1 is off)",
        )

    @property
    def steps(self) -> int:
        """The length of the schedule, with the default resolved."""
        return self.block_length if self.denoising_steps is None else self.denoising_steps

    @property
    def quotas(self) -> tuple[int, ...]:
        """Tokens to unmask at each step: block_length // steps, one more in the first block_length % steps."""
        base, extra = divmod(self.block_length, self.steps)
        return tuple(base + (step < extra) for step in range(self.steps))

    @property
    def greedy(self) -> bool:
        """Whether every draw is the most probable token."""
        return self.temperature == 0 or self.top_k == 1

    def as_dict(self) -> dict[str, Any]:
        """The settings by name, as plain values."""
        return dataclasses.asdict(self)


DECODING_SETTINGS = tuple(field.name for field in dataclasses.fields(DecodingConfig))


def _check_range(given: str, allowed: bool, what: str) -> None:
    if not allowed:
        raise UserError(f"{given} is out of range: it must be {what}.")


def to_number(name: str, value: Any, *, whole: bool) -> int | float:
    """Read a number given as a number or as text.

    Raises:
        UserError: not a finite number, or not a whole one where `whole` asks for it.
    """
    kind = "a whole number" if whole else "a number"
    if whole and isinstance(value, int) and not isinstance(value, bool):
        return value  # not by way of float, which has no room for large ones
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number) or (whole and number != int(number)):
        raise UserError(f"{name}={value!r} is not {kind}.")
    return int(number) if whole else number


def at_least_one(name: str, value: Any) -> int:
    """Read a whole number above 0, given as a number or as text.

    Raises:
        UserError: it is not one.
    """
    number = int(to_number(name, value, whole=True))
    _check_range(f"{name}={number}", number >= 1, "1 or more")
    return number


def check_bool(name: str, value: Any) -> bool:
    """Take true or false, and nothing that stands for them.

    Raises:
        UserError: it is neither.
    """
    if not isinstance(value, bool):
        raise UserError(f"{name}={value!r} is neither true nor false. Give one of them.")
    return value


def not_finite(dtype: str) -> str:
    """Why a request has no answer whose logits are no numbers, and what to do."""
    return (
        f"the model's logits are not finite numbers (dtype {dtype.removeprefix('torch.')}). float16 overflows in some "
        "models: use dtype=bfloat16 or float32. Else the weights are bad."
    )


def check_rope(checkpoint: Checkpoint) -> None:
    """Refuse a rotary embedding whose frequencies are chosen by the longest sequence of a batch.

    An answer would depend on what runs beside it. Source: dynamic_rope_update in transformers' modeling_rope_utils.py,
    which recomputes the frequencies of "dynamic" types and of longrope; those of all other types are constants.

    Raises:
        UserError: the checkpoint asks for one.
    """
    for key in ("rope_parameters", "rope_scaling"):
        rope = checkpoint.config.get(key)
        if not isinstance(rope, Mapping):
            continue
        kind = str(rope.get("rope_type", rope.get("type", "default")))
        if "dynamic" in kind or kind == "longrope":
            raise UserError(
                f"checkpoint {checkpoint.name!r} has rope_type={kind!r} in its config.json: its rotary frequencies "
                "depend on the longest sequence of a batch, so answers would depend on what runs beside them. Choose "
                "a type with constant frequencies (default, linear, yarn, llama3)."
            )


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


def end_of_answer(
    tokens: Sequence[int],
    request: GenerationRequest,
    decode: Callable[[Sequence[int]], str],
    earlier: Sequence[int] = (),
) -> tuple[int, str]:
    """Where an answer ends in some of its tokens, behind which an engine may have made more.

    Args:
        tokens: new tokens, with all that was made after the answer's end.
        request: its limit, stop tokens and stop strings count.
        decode: makes text of tokens.
        earlier: the answer's tokens before, in which it has not ended.

    Returns:
        (tokens of the answer, "stop" or "length"); (len(tokens), "") where the answer has no end in them. A stop token
        is not part of the answer; of a stop string, the token that completes it is.
    """
    room = request.max_new_tokens - len(earlier)
    count, reason = (room, "length") if room <= len(tokens) else (len(tokens), "")
    for place, token in enumerate(tokens[:count]):
        if token in request.stop_ids:
            count, reason = place, "stop"
            break

    # Every token with text has a byte of it or more, so a stop string of n bytes begins at most n tokens earlier.
    window = max((len(string.encode(errors="surrogatepass")) for string in request.stop_strings), default=0)
    before = list(earlier[-window:]) if window else []

    def stopped(length: int) -> bool:
        text = decode([*before, *tokens[:length]])
        return any(string in text for string in request.stop_strings)

    if request.stop_strings and stopped(count):
        count, reason = bisect.bisect_left(range(count), True, key=stopped), "stop"
    return count, reason


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
        object.__setattr__(self, "mc_samples", to_number("mc_samples", self.mc_samples, whole=True))
        _check_range(
            f"mc_samples={self.mc_samples}",
            2 <= self.mc_samples <= 2**20 and self.mc_samples % 2 == 0,
            "an even number from 2 to 1,048,576",
        )

    def as_dict(self) -> dict[str, Any]:
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
