"""What is read from lm_eval's files is checked where it is read."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdar_lm_eval.errors import UserError
from sdar_lm_eval.report.fields import Fields
from sdar_lm_eval.report.gsm8k_json import convert
from sdar_lm_eval.report.results import read_lines, results_in

SAMPLE = {
    "doc_id": 0, "doc": {"question": "1 + 1?", "answer": "#### 2"}, "target": "2", "resps": [["It is 2."]],
    "filtered_resps": ["2"], "filter": "strict-match", "exact_match": 1.0,
}  # fmt: skip
RESULTS = {
    "date": 1.0,
    "config": {"model": "hf", "model_args": "pretrained=x"},
    "configs": {"gsm8k": {}},
    "results": {"gsm8k": {"exact_match,strict-match": 1.0, "exact_match_stderr,strict-match": "N/A"}},
}


def _run(folder: Path, sample: dict[str, Any], **results: Any) -> Path:
    (folder / "results_1.json").write_text(json.dumps(RESULTS | results))
    (folder / "samples_gsm8k_1.jsonl").write_text(json.dumps(SAMPLE) + "\n" + json.dumps(SAMPLE | sample) + "\n")
    return folder


def test_a_whole_run(tmp_path: Path) -> None:
    scores = {"gsm8k": {"exact_match,strict-match": 0.5, "exact_match_stderr,strict-match": "N/A"}}
    sample = {"doc_id": 1, "exact_match": 0.0, "filtered_resps": [], "resps": []}
    content = convert(_run(tmp_path, sample, results=scores))
    assert content["metrics"]["percentage"] == "50.00%" and content["metrics"]["stderr"] is None
    assert [result["generated_text"] for result in content["results"]] == ["It is 2.", ""]
    assert content["config"]["model_name"] == "x"


@pytest.mark.parametrize(
    ("sample", "results", "told"),
    [
        ({"doc_id": "0"}, {}, "samples_gsm8k_1.jsonl is not as lm_eval writes it (line 2: doc_id is '0', not a whole"),
        ({"doc_id": None}, {}, "(line 2: doc_id is null, not a whole number)"),
        ({"filter": 1}, {}, "(line 2: filter is 1, not a string)"),
        ({"exact_match": "yes"}, {}, "(line 2: exact_match is 'yes', not 0 or 1)"),
        ({"exact_match": 0.5}, {}, "(line 2: exact_match is 0.5, not 0 or 1)"),
        ({"exact_match": math.nan}, {}, "(line 2: exact_match is nan, not 0 or 1)"),
        (
            {},
            {"config": {"sdar_lm_eval": {"run": {"generation_seconds": math.nan}}}},
            "(config.sdar_lm_eval.run.generation_seconds is nan, not a number)",
        ),
        ({}, {"configs": []}, "results_1.json is not as lm_eval writes it (configs is [], not an object)"),
        ({}, {"results": {}}, "holds no results of a task. Evaluate with --output_path"),
        ({}, {"config": {"model_args": [1]}}, "(config.model_args is [1], not an object)"),
        (
            {},
            {"config": {"sdar_lm_eval": {"run": {"generation_seconds": "1"}}}},
            "(config.sdar_lm_eval.run.generation_seconds is '1', not a number)",
        ),
    ],
)
def test_what_lm_eval_would_not_write(sample: Any, results: Any, told: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as raised:
        convert(_run(tmp_path, sample, **results))
    assert told in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("read", "expected"),
    [(Fields.text, "a string"), (Fields.number, "a number"), (Fields.whole, "a whole number")],
)
def test_true_is_no_number_and_what_is_missing_is_none(read: Callable[[Fields, str], Any], expected: str) -> None:
    fields = Fields({"flag": True, "nothing": None}, Path("results.json"), "config.")
    assert read(fields, "nothing") is None and read(fields, "missing") is None
    with pytest.raises(UserError, match=rf"results.json .*\(config.flag is true, not {expected}\)"):
        read(fields, "flag")


def test_a_samples_file_that_lost_lines_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    scores = {"gsm8k": {"exact_match,strict-match": 0.5, "exact_match,flexible-extract": 0.5}}
    folder = _run(tmp_path, {"doc_id": 1}, results=scores, **{"n-samples": {"gsm8k": {"effective": 2}}})
    (results,) = results_in(folder)
    assert len(results.samples("gsm8k")) == len(results.samples("gsm8k")) == 2
    (told,) = caplog.messages
    assert "samples_gsm8k_1.jsonl has 0 of 2 documents of the filter flexible-extract" in told
    with (folder / "samples_gsm8k_1.jsonl").open("a") as file:
        file.writelines(json.dumps(SAMPLE | {"doc_id": i, "filter": "flexible-extract"}) + "\n" for i in range(2))
    caplog.clear()
    (results,) = results_in(folder)
    assert len(results.samples("gsm8k")) == 4 and not caplog.messages


@pytest.mark.parametrize(
    ("scores", "told"),
    [
        ({"exact_match,strict-match": 0.5}, "exact_match of strict-match is 0.5000, but 1.0000 by the samples"),
        ({"exact_match,strict-match": 1.0, "exact_match,last": 0.5}, "last is 0.5000, but missing in the samples"),
    ],
)
def test_samples_that_give_another_score_are_not_converted(tmp_path: Path, scores: dict[str, float], told: str) -> None:
    with pytest.raises(UserError, match=told):
        convert(_run(tmp_path, {"doc_id": 1}, results={"gsm8k": scores}))


def test_damaged_lines(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text('{"a": "\u2028"}\n\n[1]\n{"a": ' + "\n" + "[" * 100_000 + "\n")
    assert [line.content for line in read_lines(file, whole=False)] == [{"a": "\u2028"}]
    with pytest.raises(UserError, match=r"trace.jsonl, line 4: not JSON"):
        list(read_lines(file))
    file.write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"trace\.jsonl cannot be read"):
        list(read_lines(file))
    os.mkfifo(tmp_path / "pipe.jsonl")
    for damaged in (file, tmp_path / "pipe.jsonl"):
        assert not list(read_lines(damaged, whole=False))
    assert [message.split(" ")[0] for message in caplog.messages] == [str(file), str(tmp_path / "pipe.jsonl")]
