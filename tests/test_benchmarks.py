"""benchmarks/: that a benchmark runs against the engine as it is, and what its last line holds."""

from __future__ import annotations

import json
import sys

import pytest
from support import ROOT


def test_all_sections_of_a_whole_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import whole_run

    sizes = "--prefill 40 --prefill-tokens 120 --contexts 40 400 --sequences 3 --new-tokens 8 --questions 3"
    monkeypatch.setattr(sys, "argv", ["whole_run.py", "--device", "cpu", *sizes.split(), "--answer-tokens", "8"])
    whole_run.main()
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = report["rows"]
    assert rows["start"]["bytes_read"] > 6e6 and rows["start"]["total_seconds"] > 0
    assert [(row["prompt_tokens"], row["prompts"]) for row in rows["prefill"]] == [(40, 3)]
    # Of 8 steps, 4 pass before the short request is answered.
    assert [(row["prompt_tokens"], row["sequences"], row["steps"]) for row in rows["contexts"]] == [
        (40, 3, 4),
        (400, 3, 4),
    ]
    assert (rows["gsm8k"]["questions"], rows["gsm8k"]["new_tokens"]) == (3, 24)
    assert report["engine"] == "native" and report["transformers"] and "triton" in report
