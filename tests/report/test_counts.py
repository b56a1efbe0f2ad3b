"""Counts of an evaluation, and the bar over a round."""

from __future__ import annotations

import itertools

import pytest

from sdar_lm_eval.engines.types import GenerationResult, ScoreResult
from sdar_lm_eval.report.counts import Counts, EarlierWork
from sdar_lm_eval.report.live import Live
from sdar_lm_eval.report.run import Progress


def result(tokens: int, denoising: int = 3, commit: int = 1) -> GenerationResult:
    return GenerationResult(tuple(range(tokens)), "length", 2, denoising, commit, 0.123456)


def test_only_returned_tokens_count_of_each_task_and_of_all() -> None:
    counts = Counts()
    counts.add("a", result(8, denoising=5, commit=2), prompt_tokens=10)
    counts.add("b", result(0, denoising=4, commit=0), prompt_tokens=7)
    counts.count("b", stored_requests=3)
    assert (counts.requests, counts.new_tokens, counts.prompt_tokens) == (2, 8, 17)
    assert (counts.prefill_forwards, counts.denoising_forwards, counts.commit_forwards) == (4, 9, 2)
    assert counts.tokens_per_forward == 8 / 11
    assert counts.tasks["a"].tokens_per_forward == 8 / 7
    summary = counts.as_dict()
    assert (summary["requests"], summary["stored_requests"]) == (2, 3)
    assert {task: (of["requests"], of["stored_requests"]) for task, of in summary["tasks"].items()} == {
        "a": (1, 0), "b": (1, 3)
    }  # fmt: skip


def test_rounds_add_up_and_the_highest_peak_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.perf_counter", itertools.count().__next__)  # read at start, step and close
    counts = Counts()
    for peak in (100, 300, 200):
        progress = Progress(counts, total=1, stored=0, show=False, live=Live({}, 1))
        counts.add("a", result(2), prompt_tokens=1)
        progress.step()
        progress.close(peak_memory_bytes=peak)
    assert (counts.requests, counts.new_tokens, counts.peak_memory_bytes) == (3, 6, 300)
    assert counts.generation_seconds == 3 * 2
    assert counts.tokens_per_second == 1


def test_where_nothing_was_computed_there_are_no_figures() -> None:
    counts = Counts(generation_seconds=0.1)
    counts.count("a", stored_requests=4)
    summary = counts.as_dict()
    assert (summary["requests"], summary["stored_requests"]) == (0, 4)
    for name in ("tokens_per_second", "tokens_per_forward", "generation_seconds"):
        assert summary[name] is None
    assert summary["tasks"]["a"]["tokens_per_forward"] is None
    assert str(counts).startswith("4 answers were there already; loaded in")
    scores = Counts()
    for error in (0.5, 0.25):
        scores.add_stored_score("a", ScoreResult(-1.0, False, error))
    assert scores.as_dict()["likelihoods"]["standard_error"] == {"mean": 0.375, "largest": 0.5}
    assert str(scores).startswith("2 log-likelihoods were there already; loaded in")
    assert "0 requests, 0 new tokens" in str(Counts())


def test_what_stored_answers_took_is_counted_apart() -> None:
    counts = Counts()
    counts.add("a", result(8, denoising=5, commit=2), prompt_tokens=10)
    counts.add_stored("a", tokens=6, forwards=4)
    counts.add_stored("b", tokens=10, forwards=5)
    counts.add_earlier({"file": EarlierWork(10.0, 11.234, tokens=16, used=16)})
    summary = counts.as_dict()
    assert summary["stored"] == {"new_tokens": 16, "forwards": 9, "seconds": 1.234}
    assert (summary["new_tokens"], summary["requests"], summary["stored_requests"]) == (8, 1, 2)
    assert summary["tokens_per_forward"] == round(8 / 7, 3)  # of what was computed
    assert summary["tasks"]["a"]["stored"] == {"new_tokens": 6, "forwards": 4}
    united = Counts.of_ranks([counts, counts])
    assert (united.stored_tokens, united.stored_seconds) == (32, pytest.approx(2 * 1.234))
    counts.add_stored("b", tokens=None, forwards=None)
    counts.stored_untimed += 1
    summary = counts.as_dict()
    assert summary["stored"] == {"new_tokens": None, "forwards": None, "seconds": None}
    assert summary["tasks"]["b"]["stored"] == {"new_tokens": None, "forwards": None}
    assert summary["tasks"]["a"]["stored"] == {"new_tokens": 6, "forwards": 4}


def test_ranks_that_ran_side_by_side() -> None:
    one = Counts(3, 100, 50, 3, 40, 10, load_seconds=2.0, generation_seconds=4.0, peak_memory_bytes=7)
    other = Counts(2, 60, 30, 2, 20, 10, load_seconds=3.0, generation_seconds=8.0, peak_memory_bytes=5)
    both = Counts.of_ranks([one, other])
    assert both == Counts(5, 160, 80, 5, 60, 20, load_seconds=3.0, generation_seconds=8.0, peak_memory_bytes=7)
    assert both.tokens_per_second == 20
    assert both.tokens_per_forward == 2
    assert Counts.of_ranks([one]) == one
    for counts, task in ((one, "a"), (other, "a"), (other, "b")):
        counts.add_score(task, ScoreResult(-1.0, False, 0.5, 3, 4), tokens=2)
    both = Counts.of_ranks([one, other])
    assert {task: of.scored_requests for task, of in both.tasks.items()} == {"a": 2, "b": 1}
    assert (both.scored_tokens, both.largest_standard_error) == (6, 0.5)


def test_the_summary_as_values_and_as_a_line() -> None:
    counts = Counts(1319, 123456, 200000, 1400, 50000, 30000, 12.344, 61.728, 3 << 30)
    assert counts.as_dict() == {
        "requests": 1319,
        "stored_requests": 0,
        "new_tokens": 123456,
        "prompt_tokens": 200000,
        "tokens_per_second": 2000.0,
        "tokens_per_forward": 1.543,
        "forwards": {"prefill": 1400, "denoising": 50000, "commit": 30000},
        "load_seconds": 12.34,
        "generation_seconds": 61.728,
        "peak_memory_bytes": 3 << 30,
        "tasks": {},
    }
    assert str(counts) == (
        "1,319 requests, 123,456 new tokens in 61.7 s: 2,000 tok/s, 1.54 tokens per forward (prefill 1,400, denoising "
        "50,000, commit 30,000); loaded in 12.3 s, peak memory 3.00 GiB"
    )


@pytest.mark.parametrize("show", [True, False])
def test_the_bar_shows_progress_and_speed(capsys: pytest.CaptureFixture[str], show: bool) -> None:
    counts = Counts()
    live = Live({"unjudged": None}, 4)
    progress = Progress(counts, total=4, stored=3, show=show, live=live)
    counts.add("unjudged", result(8, denoising=3, commit=1), prompt_tokens=1)
    progress.step()
    progress.close(0)
    bar = capsys.readouterr().err
    if show:
        assert "75%" in bar and "3/4" in bar  # what was there already
        assert "4/4" in bar and "2.00 tok/forward" in bar and "tok/s" in bar
    else:
        assert bar == ""
