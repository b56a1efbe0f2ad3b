"""The report of a round of requests as it goes: progress bar, examples, accuracy at the end."""

from __future__ import annotations

import logging
import time

from tqdm import tqdm

from sdar_lm_eval.report.counts import Counts
from sdar_lm_eval.report.live import Live

logger = logging.getLogger(__name__)


class Progress:
    """Shows a round of requests.

    Args:
        counts: the evaluation's; the round's time is added to them.
        total: requests of the round.
        stored: number of these requests that have answers from a store.
        show: whether there is a bar.
        live: judges the answers; None for a round of log-likelihoods.
    """

    def __init__(self, counts: Counts, total: int, stored: int, show: bool, live: Live | None) -> None:
        self._counts, self._live, self._total, self._stored = counts, live, total, stored
        name, unit, bar_format = ("Scoring" if live is None else "Generating"), "req", None
        if live is not None and live.knows_accuracy:
            name, unit, bar_format = live.title, "q", live.bar(0.0, 0)
        self._bar = tqdm(
            total=total, initial=stored, disable=not show, desc=name, unit=unit, bar_format=bar_format,
            dynamic_ncols=True,
        )  # fmt: skip
        self._started = time.perf_counter()
        self._requests_before, self._tokens_before = counts.requests, counts.new_tokens

    @property
    def computed(self) -> int:
        """Number of the round's answers that were computed so far."""
        return self._counts.requests - self._requests_before

    def step(self) -> None:
        """Advance the bar by one request, which `counts` has already."""
        seconds = time.perf_counter() - self._started
        if self._live is not None and self._live.knows_accuracy:
            self._bar.bar_format = self._live.bar(seconds, self.computed)
        elif self._live is not None:
            speed = (self._counts.new_tokens - self._tokens_before) / seconds
            per_forward = self._counts.tokens_per_forward or 0.0
            self._bar.set_postfix_str(f"{speed:,.0f} tok/s, {per_forward:.2f} tok/forward", refresh=False)
        self._bar.update()

    def tell(self, text: str) -> None:
        """Print a text of several lines, above the bar."""
        self._bar.write(text)

    def close(self, peak_memory_bytes: int) -> None:
        """End the round, finished or not."""
        self._bar.close()
        seconds = time.perf_counter() - self._started
        counts = self._counts
        counts.peak_memory_bytes = max(counts.peak_memory_bytes, peak_memory_bytes)
        if self._live is None:
            counts.scoring_seconds += seconds
            return
        counts.generation_seconds += seconds
        if self._live.knows_accuracy and self._live.whole:
            tokens = counts.new_tokens - self._tokens_before
            for line in self._live.summary(seconds, self.computed, tokens):
                logger.info("%s", line)
