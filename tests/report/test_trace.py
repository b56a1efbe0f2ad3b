"""Trace files."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest

from sdar_lm_eval.decoding import DecodingConfig
from sdar_lm_eval.engines.types import GenerationRequest, GenerationResult
from sdar_lm_eval.errors import UserError
from sdar_lm_eval.report.trace import Trace, cost_of, denoising_of


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_each_line_is_on_disk_at_once_behind_the_run_s(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    trace = Trace(path, lambda: {"engine": "native"})
    assert lines(path) == []
    trace.write({"text": "Zwölf"})
    head, line = lines(path)
    assert "Zwölf" in path.read_text("utf-8")
    assert head["model"] == {"engine": "native"} and head["run"] and head["started"]
    assert line == {"text": "Zwölf"}


def test_each_run_has_a_file_of_its_own(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "trace.jsonl"
    caplog.set_level(logging.INFO, logger="sdar_lm_eval")
    trace = Trace(path, dict)
    trace.begin_run()  # of nothing yet
    trace.write({"number": 1})
    trace.begin_run()
    trace.write({"number": 2})
    Trace(path, dict).write({"number": 3})
    files = sorted(tmp_path.iterdir(), key=lambda file: str(lines(file)[1]["number"]))
    assert files[0] == path and all(file.match("trace-*.jsonl") for file in files[1:])
    assert [len(lines(file)) for file in files] == [2, 2, 2]
    assert len({str(lines(file)[0]["run"]) for file in files}) == 3
    assert f"trace: {path} exists already, so this run writes {files[2]}" in caplog.text


def test_what_an_answer_took_and_how_it_was_written() -> None:
    request = GenerationRequest((1, 2, 3), 9, DecodingConfig(temperature=0), seed=4, record_steps=True)
    result = GenerationResult((5, 6), "stop", 1, 2, 1, 0.123456, unmasked_at=(1, 0), confidences=(0.98765, 1.0))
    assert cost_of(result, prompt_tokens=3) == {
        "prompt_tokens": 3,
        "new_tokens": 2,
        "forwards": {"prefill": 1, "denoising": 2, "commit": 1},
        "seconds": 0.1235,
        "finish_reason": "stop",
    }
    written = denoising_of("a prompt", request, result, lambda ids: [f"<{token}>" for token in ids])
    assert written == {
        "prompt": "a prompt",
        "prompt_ids": (1, 2, 3),
        "decoding": request.decoding.as_dict(),
        "max_new_tokens": 9,
        "seed": 4,
        "token_ids": (5, 6),
        "tokens": ["<5>", "<6>"],
        "unmasked_at": (1, 0),
        "confidences": [0.9877, 1.0],
    }


def test_a_trace_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot be written: No such file or directory. Name a file in an existing"):
        Trace(tmp_path / "missing" / "trace.jsonl", dict)


def test_a_full_disk_ends_the_trace_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trace = Trace(tmp_path / "trace.jsonl", dict)
    trace.write({"number": 1})
    full = open("/dev/full", "w") if os.path.exists("/dev/full") else None  # noqa: PTH110, PTH123, SIM115
    if full is None:
        pytest.skip("no /dev/full here")
    monkeypatch.setattr(trace, "_file", full)
    for _ in range(3):
        trace.write({"number": 2})
    assert caplog.text.count("cannot be written (No space left on device); the run goes on without it") == 1
