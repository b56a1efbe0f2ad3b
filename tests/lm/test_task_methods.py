"""Which documents a process draws few-shot examples for: those of one process with all documents."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from sdar_lm_eval.lm.task_methods import _draw_examples_of_whole_run, samples_are_a_share


def _documents(
    *, rank: int = 0, world_size: int = 1, samples: Sequence[int] | None = None
) -> Iterator[tuple[int, int]]:
    yield from itertools.islice(enumerate(range(6) if samples is None else samples), rank, None, world_size)


@pytest.mark.parametrize(
    ("settings", "is_share", "drawn"),
    [
        ({}, False, [0, 1, 2, 3, 4, 5]),
        ({"rank": 1, "world_size": 2}, False, [0, 1, 2, 3, 4, 5]),
        ({"rank": 1, "world_size": 3}, False, [0, 1, 2, 3, 4]),
        ({"samples": [1, 4, 5]}, False, [1, 4, 5]),
        ({"samples": [1, 4, 5]}, True, [0, 1, 2, 3, 4, 5]),
        ({"samples": [0, 2]}, True, [0, 1, 2]),
    ],
)
def test_examples_are_drawn_for_documents_of_others_too(
    settings: dict[str, Any], is_share: bool, drawn: list[int]
) -> None:
    found: list[int] = []
    task: Any = SimpleNamespace(doc_iterator=_documents, fewshot_context=found.append)
    methods: dict[str, Any] = _draw_examples_of_whole_run(task, _documents)
    with samples_are_a_share() if is_share else contextlib.nullcontext():
        for _, document in list(methods["doc_iterator"](**settings)):
            methods["fewshot_context"](document)
    assert found == drawn
