"""Lines of samples files of other tasks than a question with one answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sdar_lm_eval.report.fields import Fields
from sdar_lm_eval.report.samples import Sample, sample_of


def sample(**content: Any) -> Sample:
    return sample_of(Fields({"doc_id": 0, "filter": "none", **content}, Path("samples.jsonl")))


@pytest.mark.parametrize(
    ("content", "question"),
    [
        ({"doc": {"number": 7, "blank": " ", "story": "Tom has"}}, "Tom has"),
        ({"doc": {"question": 7, "ctx": "Ada has", "story": "Tom has"}}, "Ada has"),
        ({"doc": {"story": "Tom has"}, "arguments": {"gen_args_0": {"arg_0": "Q: Tom has"}}}, "Q: Tom has"),
        ({"doc": "Tom has"}, ""),
    ],
)
def test_a_question_is_a_text(content: Any, question: str) -> None:
    assert sample(**content).question == question


@pytest.mark.parametrize(
    ("content", "extracted"),
    [
        ({"resps": [["a", "b"]], "filtered_resps": [["1", "2"]]}, ["1", "2"]),
        ({"resps": [["a", "b"]], "filtered_resps": ["1"]}, ["1", None]),
        ({"resps": [["a", "b"]], "filtered_resps": [["1", "2", "3"]]}, ["1", None]),
        ({"resps": [["a", "b"]]}, ["None", None]),
    ],
)
def test_what_was_extracted_from_each_answer(content: Any, extracted: list[str | None]) -> None:
    assert [sample(**content).extracted_from(repeat) for repeat in (0, 1)] == extracted
