"""Harness requests for log-likelihoods -> score requests, and the sums of their results."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from lm_eval.api.instance import Instance
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from sdar_lm_eval.checkpoint import Checkpoint
from sdar_lm_eval.engines.types import LikelihoodConfig, ScoreRequest, ScoreResult
from sdar_lm_eval.errors import UserError
from sdar_lm_eval.lm.jobs import TaskOf
from sdar_lm_eval.lm.prompts import Prompts
from sdar_lm_eval.lm.store import Record, fields_of, key_of
from sdar_lm_eval.lm.task_requests import TemplatedBy

logger = logging.getLogger(__name__)

Kind = Literal["loglikelihood", "loglikelihood_rolling"]


@dataclass
class ScoreJob:
    """One log-likelihood to compute, summed over its pieces: the windows of a rolling one, else a single piece.

    Attributes:
        instance: the harness's request.
        task: the task's name.
        document: the document's index in the data set.
        templated_by: who put the context into the chat template; None where nobody did.
        pieces: the requests to the engine.
        keys: each piece's key in the store.
        results: index of a piece -> its result, for the pieces that are finished.
    """

    instance: Instance
    task: str
    document: int
    templated_by: TemplatedBy | None
    pieces: list[ScoreRequest]
    keys: list[str]
    results: dict[int, ScoreResult] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        """Whether all pieces have their result."""
        return len(self.results) == len(self.pieces)

    def total(self) -> ScoreResult:
        """The sum over the pieces, in their order."""
        results = [self.results[index] for index in sorted(self.results)]
        return ScoreResult(
            log_likelihood=math.fsum(result.log_likelihood for result in results),
            is_greedy=all(result.is_greedy for result in results),
            standard_error=math.hypot(*(result.standard_error for result in results)),
            clean_tokens=sum(result.clean_tokens for result in results),
            noised_tokens=sum(result.noised_tokens for result in results),
        )


@dataclass(frozen=True)
class ScoreRound:
    """The work of one call of the harness.

    Attributes:
        order: for each request of the call, its job.
        truncated: number of contexts that lost their beginning.
        config: settings of the log-likelihoods.
    """

    order: list[ScoreJob]
    truncated: int
    config: LikelihoodConfig

    @property
    def jobs(self) -> list[ScoreJob]:
        """Each job once."""
        return list({id(job): job for job in self.order}.values())


class Likelihoods:
    """Makes score requests of the harness's requests.

    Args:
        checkpoint: has the mask token.
        prompts: makes the texts' tokens.
        max_length: most tokens of context and continuation.
        config: the method.
    """

    def __init__(self, checkpoint: Checkpoint, prompts: Prompts, max_length: int, config: LikelihoodConfig) -> None:
        self._checkpoint, self._prompts, self._max_length, self._config = checkpoint, prompts, max_length, config

    def config(self, seed: int) -> LikelihoodConfig:
        """The method, with the seed of the masks that it samples."""
        return dataclasses.replace(self._config, seed=seed)

    def of(self, kind: Kind, requests: Sequence[Instance], task_of: TaskOf, seed: int) -> ScoreRound:
        """Return the jobs of a call's requests. Copies of a request, by which lm_eval pads ranks, share one job.

        Args:
            kind: the requests' type.
            requests: one call's requests.
            task_of: returns a request's task.
            seed: the evaluation's seed.

        Raises:
            UserError: a continuation is too long.
        """
        config = self.config(seed)
        distinct = {id(instance): instance for instance in requests}
        tasks = [task_of(instance) for instance in distinct.values()]
        templated_by = [
            self._prompts.templated_by(task, str(instance.args[0]))
            for task, instance in zip(tasks, distinct.values(), strict=True)
        ]
        pairs_of = self._pairs(kind, list(distinct.values()), [by is not None for by in templated_by])
        jobs: dict[int, ScoreJob] = {}
        truncated = 0
        for (key, instance), task, by, pairs in zip(distinct.items(), tasks, templated_by, pairs_of, strict=True):
            fitted = [self.truncated(*pair) for pair in pairs]
            pieces = [piece for piece, _ in fitted]
            jobs[key] = ScoreJob(
                instance=instance,
                task=task.name,
                document=task.document(instance),
                templated_by=by,
                pieces=pieces,
                keys=[_key_of(piece, config) for piece in pieces],
            )
            truncated += any(cut for _, cut in fitted)
        order = [jobs[id(instance)] for instance in requests]
        asked = ScoreRound(order, truncated, config)
        self._warn_of_texts(asked)
        return asked

    def check(self, requests: Sequence[Instance]) -> None:
        """Check the lengths of a task's continuations before any task runs.

        Raises:
            UserError: a continuation is too long.
        """
        scored = [request for request in requests if request.request_type == "loglikelihood"]
        # A text has at most as many tokens as bytes, so most continuations fit without a look at their tokens.
        long = [request for request in scored if len(str(request.args[1]).encode(errors="replace")) >= self._max_length]
        for pairs in self._pairs("loglikelihood", long, [False] * len(long)):
            for pair in pairs:
                self.truncated(*pair)

    def truncated(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[ScoreRequest, bool]:
        """Return a score request of at most `max_length` tokens, and whether its context lost its beginning.

        Raises:
            UserError: the continuation leaves no room for a token of context.
        """
        room = self._max_length - len(continuation)
        if room < 1:
            raise UserError(
                f"a continuation of {len(continuation):,} tokens and one of context are more than "
                f"max_length={self._max_length}. Raise max_length (the checkpoint allows "
                f"{self._checkpoint.max_length})."
            )
        return ScoreRequest(tuple(context[-room:]), tuple(continuation)), len(context) > room

    def _pairs(
        self, kind: Kind, instances: Sequence[Instance], rendered: Sequence[bool]
    ) -> Iterator[Sequence[tuple[Sequence[int], Sequence[int]]]]:
        """Yield the tokens of each request's contexts and continuations; no pair where the text to score is empty."""
        if kind == "loglikelihood":
            texts = [(str(instance.args[0]), str(instance.args[1])) for instance in instances]
            for context, continuation in self._prompts.encode_pairs(texts, rendered):
                yield [(context, continuation)] if continuation else []
            return
        # The context of the first window is the prefix token. The contexts of other windows are tokens of the text.
        length = max(self._max_length - 1, 1)
        texts = [("", str(instance.args[0])) for instance in instances]
        for (prefix,), ids in self._prompts.encode_pairs(texts, rendered):
            windows = get_rolling_token_windows(list(ids), prefix, max_seq_len=length, context_len=1)
            yield [make_disjoint_window(window) for window in windows]

    def _warn_of_texts(self, asked: ScoreRound) -> None:
        """Warn of contexts that were truncated, of empty texts, and of texts with the mask token."""
        jobs = asked.jobs
        if asked.truncated:
            logger.warning(
                "%d of %d contexts do not fit into max_length=%d beside their continuations, and lost their beginning.",
                asked.truncated,
                len(jobs),
                self._max_length,
            )
        if empty := sum(not job.pieces for job in jobs):
            logger.warning("%d of %d texts to be scored are empty; their log-likelihood is 0.", empty, len(jobs))
        mask = self._checkpoint.mask_token_id
        if impossible := sum(any(mask in piece.continuation_ids for piece in job.pieces) for job in jobs):
            logger.warning(
                "%d of %d texts to be scored contain the mask token %r, which is never generated; their log-likelihood "
                "is -inf, and so a perplexity is infinite. Take the mask token out of the documents.",
                impossible,
                len(jobs),
                self._prompts.tokenizer.convert_ids_to_tokens(mask),
            )


def record_of(result: ScoreResult) -> Record:
    """Return a result as it is stored."""
    return {
        "log_likelihood": result.log_likelihood,
        "is_greedy": result.is_greedy,
        "standard_error": result.standard_error,
    }


def result_of(record: Record) -> ScoreResult:
    """Return a stored result. Its token counts are 0, since nothing was run for it."""
    return ScoreResult(record["log_likelihood"], bool(record.get("is_greedy")), record.get("standard_error", 0.0))


def _key_of(piece: ScoreRequest, config: LikelihoodConfig) -> str:
    """A hash of all that the score depends on beside checkpoint and engine."""
    content = fields_of(piece) | config.as_dict() | {"block_length": config.block_length}
    if config.method == "nelbo":  # masks may be drawn
        content["seed"] = config.seed
    return key_of("loglikelihood", content)
