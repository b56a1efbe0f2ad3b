"""Documents of each kind from a seed, on two sides of a split: training and test."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import TypedDict

from sdar_lm_eval.tasks.generated.draws import Draws
from sdar_lm_eval.tasks.generated.grids import GRIDS
from sdar_lm_eval.tasks.generated.kind import Answer, Case, Kind, Size
from sdar_lm_eval.tasks.generated.sentences import SENTENCES
from sdar_lm_eval.tasks.generated.waiting_line import WAITING_LINE

KINDS: Mapping[str, Kind] = {**WAITING_LINE, **SENTENCES, **GRIDS}
"""Name of each kind -> the kind."""


class Document(TypedDict):
    """A document of a task.

    `question` is the user's turn, and `answer` one right answer in the form that the question asks for. `given`, `word`
    and `place` are those of the `Case`.
    """

    kind: str
    size: Size
    question: str
    answer: str
    given: list[str]
    word: str
    place: int


def is_held_out(key: Sequence[str]) -> bool:
    """Return whether the cases of a key are kept for tests (one key in twenty is)."""
    return hashlib.sha256("\n".join(key).encode()).digest()[0] % 20 == 0


def stream(kind: str, size: Size, *, seed: int, held_out: bool) -> Iterator[Document]:
    """Yield documents of a kind without end; `held_out` chooses the side of the split."""
    its = KINDS[kind]
    draws = Draws(f"{seed}/{kind}/{size}/{'test' if held_out else 'train'}")
    for number in itertools.count():
        while is_held_out((case := its.draw(draws, size, number)).key) != held_out:
            pass
        yield Document(
            kind=kind,
            size=size,
            question=its.question(case, size),
            answer=its.form(size).write(case.answer),
            given=list(case.given),
            word=case.word,
            place=case.place,
        )


def documents(kind: str, size: Size, count: int, *, seed: int = 0, held_out: bool = True) -> list[Document]:
    """Return the first `count` documents of a kind whose questions differ."""
    drawn: dict[str, Document] = {}
    for document in stream(kind, size, seed=seed, held_out=held_out):
        drawn.setdefault(document["question"], document)
        if len(drawn) == count:
            break
    return list(drawn.values())


def is_right(document: Document, answer: Answer | None) -> bool:
    """Return whether an answer, as a `Form` reads it, is a right one of a document."""
    if answer is None:
        return False
    its = KINDS[document["kind"]]
    one = its.form(document["size"]).strict(document["answer"])
    assert one is not None, "a document's answer has its form"
    case = Case(tuple(document["given"]), one, (), document["word"], document["place"])
    return its.is_right(case, answer)
