"""Counts, bar and trace of a run."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from sdar_lm_eval.engines.base import GenerationResult
from sdar_lm_eval.errors import UserError
from sdar_lm_eval.report.run import Counts, RunReport


def result(tokens: int, denoising: int = 3, commit: int = 1) -> GenerationResult:
    return GenerationResult(tuple(range(tokens)), "length", 2, denoising, commit, 0.123456)


def test_only_returned_tokens_count() -> None:
    report = RunReport()
    report.start(total=2, show=False)
    report.add(result(8, denoising=5, commit=2), "text", prompt_tokens=10)
    report.add(result(0, denoising=4, commit=0), "", prompt_tokens=7)
    report.stop(peak_memory_bytes=100)
    counts = report.counts
    assert (counts.requests, counts.new_tokens, counts.prompt_tokens) == (2, 8, 17)
    assert (counts.prefill_forwards, counts.denoising_forwards, counts.commit_forwards) == (4, 9, 2)
    assert counts.tokens_per_forward == 8 / 11
    assert 0 < counts.generation_seconds < 5
    assert counts.tokens_per_second == 8 / counts.generation_seconds


def test_rounds_add_up_and_the_highest_peak_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.perf_counter", itertools.count().__next__)  # read at start, add and stop
    report = RunReport()
    for peak in (100, 300, 200):
        report.start(total=1, show=False)
        report.add(result(2), "text", prompt_tokens=1)
        report.stop(peak_memory_bytes=peak)
    assert (report.counts.requests, report.counts.new_tokens, report.counts.peak_memory_bytes) == (3, 6, 300)
    assert report.counts.generation_seconds == 3 * 2


def test_nothing_done_is_no_division_by_zero() -> None:
    counts = Counts()
    assert (counts.tokens_per_second, counts.tokens_per_forward) == (0.0, 0.0)
    assert counts.as_dict()["requests"] == 0
    assert "0 requests, 0 new tokens" in str(counts)


def test_ranks_that_ran_side_by_side() -> None:
    one = Counts(3, 100, 50, 3, 40, 10, load_seconds=2.0, generation_seconds=4.0, peak_memory_bytes=7)
    other = Counts(2, 60, 30, 2, 20, 10, load_seconds=3.0, generation_seconds=8.0, peak_memory_bytes=5)
    both = Counts.of_ranks([one, other])
    assert both == Counts(5, 160, 80, 5, 60, 20, load_seconds=3.0, generation_seconds=8.0, peak_memory_bytes=7)
    assert both.tokens_per_second == 20
    assert both.tokens_per_forward == 2
    assert Counts.of_ranks([one]) == one


def test_the_summary_as_values_and_as_a_line() -> None:
    counts = Counts(1319, 123456, 200000, 1400, 50000, 30000, 12.344, 61.728, 3 << 30)
    assert counts.as_dict() == {
        "requests": 1319,
        "new_tokens": 123456,
        "prompt_tokens": 200000,
        "tokens_per_second": 2000.0,
        "tokens_per_forward": 1.543,
        "forwards": {"prefill": 1400, "denoising": 50000, "commit": 30000},
        "load_seconds": 12.34,
        "generation_seconds": 61.73,
        "peak_memory_bytes": 3 << 30,
    }
    assert str(counts) == (
        "1,319 requests, 123,456 new tokens in 61.7 s: 2,000 tok/s, 1.54 tokens per forward (prefill 1,400, denoising "
        "50,000, commit 30,000); loaded in 12.3 s, peak memory 3.00 GiB"
    )


def test_each_line_of_the_trace_is_on_disk_at_once_and_appended(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"earlier": true}\n')
    report = RunReport(path)
    assert report.tracing
    report.start(total=1, show=False)
    recorded = GenerationResult((5, 6), "stop", 1, 2, 1, 0.123456, unmasked_at=(1, 0), confidences=(0.98765, 1.0))
    report.add(recorded, "Zwölf\n", prompt_tokens=3, task="t", document=4, repeat=1)
    _, line = path.read_text(encoding="utf-8").splitlines()
    assert "Zwölf" in line
    assert json.loads(line) == {
        "task": "t",
        "document": 4,
        "repeat": 1,
        "prompt_tokens": 3,
        "new_tokens": 2,
        "forwards": {"prefill": 1, "denoising": 2, "commit": 1},
        "seconds": 0.1235,
        "finish_reason": "stop",
        "text": "Zwölf\n",
        "unmasked_at": [1, 0],
        "confidences": [0.9877, 1.0],
    }
    report.stop(0)


def test_a_home_folder_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    RunReport(Path("~/trace.jsonl"))
    assert (tmp_path / "trace.jsonl").exists()


def test_a_trace_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot be written: No such file or directory. Name a file in an existing"):
        RunReport(tmp_path / "missing" / "trace.jsonl")


@pytest.mark.parametrize("show", [True, False])
def test_the_bar_shows_progress_and_speed(capsys: pytest.CaptureFixture[str], show: bool) -> None:
    report = RunReport()
    report.start(total=4, finished=3, show=show)
    report.add(result(8, denoising=3, commit=1), "text", prompt_tokens=1)
    report.stop(0)
    bar = capsys.readouterr().err
    if show:
        assert "75%" in bar and "3/4" in bar  # what an earlier run had finished
        assert "4/4" in bar and "2.00 tok/forward" in bar and "tok/s" in bar
    else:
        assert bar == ""
