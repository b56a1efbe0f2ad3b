"""A prompt that knows which turns of a conversation it is made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Turn = dict[str, str]
"""As chat templates take it: `{"role": "user", "content": "…"}`."""


class TurnsPrompt(str):
    """A prompt as plain text, for models without a chat template, with the conversation it stands for.

    Attributes:
        turns: the conversation; the last turn is the user's.
    """

    turns: list[Turn]

    def __new__(cls, text: str, turns: Sequence[Turn]) -> TurnsPrompt:
        """Return the text with its turns."""
        prompt = super().__new__(cls, text)
        prompt.turns = list(turns)
        return prompt

    def __getnewargs__(self) -> tuple[Any, ...]:
        """What copies and pickles are made from."""
        return str(self), self.turns
