"""The report of a run as it goes: progress bar, trace file, summary."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sdar_lm_eval.engines.base import GenerationResult
from sdar_lm_eval.errors import UserError

logger = logging.getLogger(__name__)


class RunReport:
    """Counts what was generated; only tokens that were returned count.

    Args:
        load_seconds: how long the checkpoint took to load.
        trace: file that gets a JSON line for each finished request, appended; None for no trace.
        show: whether to draw a progress bar.

    Raises:
        UserError: the trace file cannot be written.
    """

    def __init__(self, load_seconds: float, trace: Path | None = None, show: bool = True) -> None:
        self.load_seconds = load_seconds
        self.generation_seconds = 0.0
        self.peak_memory_bytes = 0
        self.requests = 0
        self.new_tokens = 0
        self.prompt_tokens = 0
        self.forwards = {"prefill": 0, "denoising": 0, "commit": 0}
        self._show = show
        self._trace = None
        if trace is not None:
            try:
                self._trace = trace.expanduser().open("a", encoding="utf-8")
            except OSError as error:
                raise UserError(f"trace={str(trace)!r} cannot be written: {error}.") from error

    def start(self, total: int, finished: int = 0) -> None:
        """Begin a round of `total` requests, of which some were finished by an earlier run."""
        self._bar = tqdm(
            total=total, initial=finished, disable=not self._show, desc="Generating", unit="req", dynamic_ncols=True
        )
        self._started, self._tokens_before = time.perf_counter(), self.new_tokens

    def add(self, result: GenerationResult, text: str, prompt_tokens: int, **request: Any) -> None:
        """Count a finished request and write its trace line; `request` names it (task, document, repeat)."""
        self.requests += 1
        self.new_tokens += len(result.token_ids)
        self.prompt_tokens += prompt_tokens
        forwards = {
            "prefill": result.prefill_forwards,
            "denoising": result.denoising_forwards,
            "commit": result.commit_forwards,
        }
        for kind, count in forwards.items():
            self.forwards[kind] += count
        if self._trace is not None:
            line = {
                **request,
                "prompt_tokens": prompt_tokens,
                "new_tokens": len(result.token_ids),
                "forwards": forwards,
                "seconds": round(result.seconds, 4),
                "finish_reason": result.finish_reason,
                "text": text,
                "unmasked_at": result.unmasked_at,
                "confidences": [round(c, 4) for c in result.confidences or ()],
            }
            self._trace.write(json.dumps(line, ensure_ascii=False) + "\n")
            self._trace.flush()
        seconds = time.perf_counter() - self._started
        self._bar.set_postfix_str(
            f"{(self.new_tokens - self._tokens_before) / seconds:,.0f} tok/s, {self.tokens_per_forward:.2f} tok/forward",
            refresh=False,
        )
        self._bar.update()

    def stop(self, peak_memory_bytes: int) -> None:
        """End the round, finished or not, and log the summary of all rounds so far."""
        self._bar.close()
        self.generation_seconds += time.perf_counter() - self._started
        self.peak_memory_bytes = max(self.peak_memory_bytes, peak_memory_bytes)
        logger.info(
            "%s requests, %s new tokens in %.1f s: %s tok/s, %.2f tokens per forward (prefill %s, denoising %s, "
            "commit %s); loaded in %.1f s, peak memory %.2f GiB",
            f"{self.requests:,}", f"{self.new_tokens:,}", self.generation_seconds, f"{self.tokens_per_second:,.0f}",
            self.tokens_per_forward, *(f"{count:,}" for count in self.forwards.values()), self.load_seconds,
            self.peak_memory_bytes / 2**30,
        )  # fmt: skip

    @property
    def tokens_per_second(self) -> float:
        """Returned tokens over the time of generation, prefill included."""
        return self.new_tokens / self.generation_seconds if self.generation_seconds else 0.0

    @property
    def tokens_per_forward(self) -> float:
        """Returned tokens over the forwards that made them: denoising and commit, counted for each sequence."""
        made = self.forwards["denoising"] + self.forwards["commit"]
        return self.new_tokens / made if made else 0.0

    def as_dict(self) -> dict[str, Any]:
        """The summary for the results file."""
        return {
            "requests": self.requests,
            "new_tokens": self.new_tokens,
            "prompt_tokens": self.prompt_tokens,
            "tokens_per_second": round(self.tokens_per_second, 1),
            "tokens_per_forward": round(self.tokens_per_forward, 3),
            "forwards": dict(self.forwards),
            "load_seconds": round(self.load_seconds, 2),
            "generation_seconds": round(self.generation_seconds, 2),
            "peak_memory_bytes": self.peak_memory_bytes,
        }
