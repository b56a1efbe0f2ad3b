"""What each kind of generated task has: cases, questions, right answers, and forms in which answers are written."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, TypeAlias

from sdar_lm_eval.tasks.generated.draws import Draws

Size: TypeAlias = Literal["chat", "demo"]
"""`chat`: for chat models. `demo`: short, in the vocabulary of the bundled checkpoint."""

Answer: TypeAlias = tuple[str, ...]
"""The parts of an answer: names in their order, cells of a grid row by row, or one sentence."""

SIZES: tuple[Size, ...] = ("chat", "demo")


@dataclass(frozen=True)
class Case:
    """A question's content, without its wording.

    Attributes:
        given: the names, symbols, cells or words of the question.
        answer: one right answer.
        key: the part of a case that tells it from other cases. No key is on both sides of the split into training and
            test.
        word: the name to insert or to put in another's place; "" without one.
        place: the place that the question names, from 1; 0 without one.
    """

    given: tuple[str, ...]
    answer: Answer
    key: tuple[str, ...]
    word: str = ""
    place: int = 0


class Form(ABC):
    """How the parts of an answer are written as text."""

    @abstractmethod
    def write(self, answer: Answer) -> str:
        """Return the text that `strict` reads."""

    @abstractmethod
    def strict(self, text: str) -> Answer | None:
        """Return the answer of a text that has the form and nothing else but white space around it; else None."""

    @abstractmethod
    def lenient(self, text: str) -> Answer | None:
        """Return the answer that a text contains, in this form or a similar one; None without any."""


class Kind(ABC):
    """A kind of task."""

    @abstractmethod
    def draw(self, draws: Draws, size: Size, number: int) -> Case:
        """Return a random case; `number` counts the cases from 0, for lengths that go round."""

    @abstractmethod
    def question(self, case: Case, size: Size) -> str:
        """Return the user's turn."""

    @abstractmethod
    def is_right(self, case: Case, answer: Answer) -> bool:
        """Return whether an answer is a right one."""

    @abstractmethod
    def form(self, size: Size) -> Form:
        """Return the form that the question asks for."""
