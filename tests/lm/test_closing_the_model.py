from __future__ import annotations

import json
from pathlib import Path

from scripted_lm import GREEDY, MakeLM, request


def test_closing_the_model_closes_what_it_opened(make_lm: MakeLM, tmp_path: Path) -> None:
    with make_lm(trace=tmp_path / "trace.jsonl", answers=tmp_path / "answers") as lm:
        lm.generate_until([request("one", GREEDY)])
        assert not lm.engine.closed
    assert lm.engine.closed
    lm.close()
    assert len((tmp_path / "trace.jsonl").read_text().splitlines()) == 2
    (answers,) = (tmp_path / "answers").iterdir()
    assert "model" in json.loads(answers.read_text().splitlines()[-1])
    lm.generate_until([request("two", GREEDY)])  # by an engine that does not mind: the trace has ended
    assert len((tmp_path / "trace.jsonl").read_text().splitlines()) == 2
    assert lm.get_model_info()["sdar_lm_eval"]["engine"] == "scripted"
