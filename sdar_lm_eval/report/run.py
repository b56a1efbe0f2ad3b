"""The report of a run as it goes: progress bar, trace file, summary."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sdar_lm_eval.engines.base import GenerationResult, ScoreResult
from sdar_lm_eval.errors import UserError
from sdar_lm_eval.report.live import Live

logger = logging.getLogger(__name__)


@dataclass
class Counts:
    """What one process generated; only tokens that were returned count.

    Attributes:
        requests: answers made, not those read from a cache.
        generation_seconds: time of generation, prefill included.
        peak_memory_bytes: of the device on CUDA, else of the process.
        scored_requests, scored_tokens: log-likelihoods computed, and the tokens they are of.
        clean_tokens, noised_tokens: run through the model for them: text without masks, and blocks with masks.
        standard_errors: sum of the log-likelihoods' standard errors, in nats; largest_standard_error of one.
    """

    requests: int = 0
    new_tokens: int = 0
    prompt_tokens: int = 0
    prefill_forwards: int = 0
    denoising_forwards: int = 0
    commit_forwards: int = 0
    load_seconds: float = 0.0
    generation_seconds: float = 0.0
    peak_memory_bytes: int = 0
    scored_requests: int = 0
    scored_tokens: int = 0
    clean_tokens: int = 0
    noised_tokens: int = 0
    scoring_seconds: float = 0.0
    standard_errors: float = 0.0
    largest_standard_error: float = 0.0

    @classmethod
    def of_ranks(cls, ranks: Sequence[Counts]) -> Counts:
        """Those of processes that ran side by side: work adds up; of times and memory the largest counts."""
        longest = (
            "load_seconds", "generation_seconds", "peak_memory_bytes", "scoring_seconds", "largest_standard_error",
        )  # fmt: skip
        return cls(
            **{
                name: (max if name in longest else sum)(getattr(counts, name) for counts in ranks)
                for name in cls.__dataclass_fields__
            }
        )

    @property
    def tokens_per_second(self) -> float:
        """Returned tokens over the time of generation."""
        return self.new_tokens / self.generation_seconds if self.generation_seconds else 0.0

    @property
    def tokens_per_forward(self) -> float:
        """Returned tokens over the forwards that made them: denoising and commit, counted for each sequence."""
        made = self.denoising_forwards + self.commit_forwards
        return self.new_tokens / made if made else 0.0

    @property
    def likelihoods(self) -> dict[str, Any]:
        """The part of the summary that is about log-likelihoods."""
        mean = self.standard_errors / self.scored_requests if self.scored_requests else 0.0
        return {
            "requests": self.scored_requests,
            "tokens": self.scored_tokens,
            "tokens_run": {"clean": self.clean_tokens, "noised": self.noised_tokens},
            "standard_error": {"mean": round(mean, 6), "largest": round(self.largest_standard_error, 6)},
            "seconds": round(self.scoring_seconds, 2),
        }

    def as_dict(self) -> dict[str, Any]:
        """The summary for the results file."""
        return {
            "requests": self.requests,
            "new_tokens": self.new_tokens,
            "prompt_tokens": self.prompt_tokens,
            "tokens_per_second": round(self.tokens_per_second, 1),
            "tokens_per_forward": round(self.tokens_per_forward, 3),
            "forwards": {
                "prefill": self.prefill_forwards,
                "denoising": self.denoising_forwards,
                "commit": self.commit_forwards,
            },
            "load_seconds": round(self.load_seconds, 2),
            "generation_seconds": round(self.generation_seconds, 2),
            **({"likelihoods": self.likelihoods} if self.scored_requests else {}),
            "peak_memory_bytes": self.peak_memory_bytes,
        }

    def __str__(self) -> str:
        parts = []
        if self.requests or not self.scored_requests:
            parts.append(
                f"{self.requests:,} request{'s' * (self.requests != 1)}, {self.new_tokens:,} new tokens in "
                f"{self.generation_seconds:.1f} s: "
                f"{self.tokens_per_second:,.0f} tok/s, {self.tokens_per_forward:.2f} tokens per forward "
                f"(prefill {self.prefill_forwards:,}, denoising {self.denoising_forwards:,}, commit "
                f"{self.commit_forwards:,})"
            )
        if self.scored_requests:
            parts.append(
                f"{self.scored_requests:,} log-likelihoods of {self.scored_tokens:,} tokens in "
                f"{self.scoring_seconds:.1f} s (run: {self.clean_tokens:,} clean and {self.noised_tokens:,} noised)"
            )
            if self.largest_standard_error:
                parts[-1] += f", standard errors up to {self.largest_standard_error:.2g} nats"
        return (
            "; ".join(parts)
            + f"; loaded in {self.load_seconds:.1f} s, peak memory {self.peak_memory_bytes / 2**30:.2f} GiB"
        )


class RunReport:
    """Counts what this process generates and scores, shows it, and traces it.

    Args:
        trace: file that gets a JSON line for each finished request, appended; None for no trace.

    Raises:
        UserError: the trace file cannot be written.
    """

    def __init__(self, trace: Path | None = None) -> None:
        self.counts = Counts()
        self._trace = None
        if trace is not None:
            try:
                self._trace = trace.expanduser().open("a", encoding="utf-8")
            except OSError as error:
                raise UserError(
                    f"trace={str(trace)!r} cannot be written: {error.strerror}. Name a file in an existing folder."
                ) from error

    @property
    def tracing(self) -> bool:
        """Whether there is a trace file."""
        return self._trace is not None

    def start(
        self, total: int, finished: int = 0, show: bool = True, scoring: bool = False, live: Live | None = None
    ) -> None:
        """Begin a round of `total` requests, of which some were finished by an earlier run; `show` draws a bar.

        `live` tells what the answers are worth as they come in, where it knows.
        """
        self._scoring, self._live = scoring, live
        name, unit, bar_format = "Scoring" if scoring else "Generating", "req", None
        if live is not None and live.knows_accuracy:
            name, unit, bar_format = live.title, "q", live.bar(0.0, 0)
        self._bar = tqdm(
            total=total, initial=finished, disable=not show, desc=name, unit=unit, bar_format=bar_format,
            dynamic_ncols=True,
        )  # fmt: skip
        self._started, self._tokens_before = time.perf_counter(), self.counts.new_tokens
        self._requests_before = self.counts.requests

    def add(self, result: GenerationResult, text: str, prompt_tokens: int, **request: Any) -> None:
        """Count a finished request and write its trace line; `request` names it (task, document, repeat)."""
        counts = self.counts
        counts.requests += 1
        counts.new_tokens += len(result.token_ids)
        counts.prompt_tokens += prompt_tokens
        counts.prefill_forwards += result.prefill_forwards
        counts.denoising_forwards += result.denoising_forwards
        counts.commit_forwards += result.commit_forwards
        if self._trace is not None:
            self._write(
                {
                    **request,
                    **facts_of(result, text, prompt_tokens),
                    "unmasked_at": result.unmasked_at,
                    "confidences": [round(c, 4) for c in result.confidences or ()],
                }
            )
        seconds = time.perf_counter() - self._started
        if self._live is not None and self._live.knows_accuracy:
            self._bar.bar_format = self._live.bar(seconds, counts.requests - self._requests_before)
        else:
            speed = (counts.new_tokens - self._tokens_before) / seconds
            self._bar.set_postfix_str(f"{speed:,.0f} tok/s, {counts.tokens_per_forward:.2f} tok/forward", refresh=False)
        self._bar.update()

    def tell(self, text: str) -> None:
        """Print a text of several lines, above the bar."""
        self._bar.write(text)

    def add_score(self, result: ScoreResult, context_tokens: int, tokens: int, **request: Any) -> None:
        """Count a scored request and write its trace line; `request` names it (task, document, method)."""
        counts = self.counts
        counts.scored_requests += 1
        counts.scored_tokens += tokens
        counts.clean_tokens += result.clean_tokens
        counts.noised_tokens += result.noised_tokens
        counts.standard_errors += result.standard_error
        counts.largest_standard_error = max(counts.largest_standard_error, result.standard_error)
        if self._trace is not None:
            self._write(
                {
                    **request,
                    "context_tokens": context_tokens,
                    "tokens": tokens,
                    "log_likelihood": result.log_likelihood,
                    "is_greedy": result.is_greedy,
                    "standard_error": result.standard_error,
                    "tokens_run": {"clean": result.clean_tokens, "noised": result.noised_tokens},
                }
            )
        self._bar.update()

    def _write(self, line: dict[str, Any]) -> None:
        assert self._trace is not None
        self._trace.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._trace.flush()

    def stop(self, peak_memory_bytes: int) -> None:
        """End the round, finished or not."""
        self._bar.close()
        seconds = time.perf_counter() - self._started
        if self._scoring:
            self.counts.scoring_seconds += seconds
        else:
            self.counts.generation_seconds += seconds
            if self._live is not None and self._live.knows_accuracy and self._live.whole:
                computed = self.counts.requests - self._requests_before
                tokens = self.counts.new_tokens - self._tokens_before
                logger.info("%s", self._live.summary(seconds, computed, tokens))
        self.counts.peak_memory_bytes = max(self.counts.peak_memory_bytes, peak_memory_bytes)


def facts_of(result: GenerationResult, text: str, prompt_tokens: int) -> dict[str, Any]:
    """Return an answer and how it was made, as trace files and folders of answers have it."""
    return {
        "prompt_tokens": prompt_tokens,
        "new_tokens": len(result.token_ids),
        "forwards": {
            "prefill": result.prefill_forwards,
            "denoising": result.denoising_forwards,
            "commit": result.commit_forwards,
        },
        "seconds": round(result.seconds, 4),
        "finish_reason": result.finish_reason,
        "text": text,
    }
