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

from sdar_lm_eval.engines.base import GenerationResult
from sdar_lm_eval.errors import UserError

logger = logging.getLogger(__name__)


@dataclass
class Counts:
    """What one process generated; only tokens that were returned count.

    Attributes:
        requests: answers made, not those read from a cache.
        generation_seconds: time of generation, prefill included.
        peak_memory_bytes: of the device on CUDA, else of the process.
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

    @classmethod
    def of_ranks(cls, ranks: Sequence[Counts]) -> Counts:
        """Those of processes that ran side by side: work adds up; of times and memory the largest counts."""
        longest = ("load_seconds", "generation_seconds", "peak_memory_bytes")
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
            "peak_memory_bytes": self.peak_memory_bytes,
        }

    def __str__(self) -> str:
        return (
            f"{self.requests:,} requests, {self.new_tokens:,} new tokens in {self.generation_seconds:.1f} s: "
            f"{self.tokens_per_second:,.0f} tok/s, {self.tokens_per_forward:.2f} tokens per forward "
            f"(prefill {self.prefill_forwards:,}, denoising {self.denoising_forwards:,}, commit "
            f"{self.commit_forwards:,}); loaded in {self.load_seconds:.1f} s, "
            f"peak memory {self.peak_memory_bytes / 2**30:.2f} GiB"
        )


class RunReport:
    """Counts what this process generates, shows it, and traces it.

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

    def start(self, total: int, finished: int = 0, show: bool = True) -> None:
        """Begin a round of `total` requests, of which some were finished by an earlier run; `show` draws a bar."""
        self._bar = tqdm(
            total=total, initial=finished, disable=not show, desc="Generating", unit="req", dynamic_ncols=True
        )
        self._started, self._tokens_before = time.perf_counter(), self.counts.new_tokens

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
            line = {
                **request,
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
                "unmasked_at": result.unmasked_at,
                "confidences": [round(c, 4) for c in result.confidences or ()],
            }
            self._trace.write(json.dumps(line, ensure_ascii=False) + "\n")
            self._trace.flush()
        speed = (counts.new_tokens - self._tokens_before) / (time.perf_counter() - self._started)
        self._bar.set_postfix_str(f"{speed:,.0f} tok/s, {counts.tokens_per_forward:.2f} tok/forward", refresh=False)
        self._bar.update()

    def stop(self, peak_memory_bytes: int) -> None:
        """End the round, finished or not."""
        self._bar.close()
        self.counts.generation_seconds += time.perf_counter() - self._started
        self.counts.peak_memory_bytes = max(self.counts.peak_memory_bytes, peak_memory_bytes)
