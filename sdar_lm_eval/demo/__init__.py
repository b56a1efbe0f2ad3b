"""The bundled checkpoint (`pretrained=demo`) and its problems; `tools/make_demo.py` makes both again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypedDict

if TYPE_CHECKING:
    from sdar_lm_eval.checkpoint.tokenizer import Tokenizer

CHECKPOINT = Path(__file__).parent / "checkpoint"
PROBLEMS = Path(__file__).parent / "problems.jsonl"
PROMPT = '{question}\n\nPlease reason step by step, and end with a line "#### <number>".'
"""The wording of the task `gsm8k_sdar_hash`, on which the checkpoint is trained."""


class Problem(TypedDict):
    """A line of `problems.jsonl`; the answer ends in `#### 18`."""

    question: str
    answer: str


class HasTokenizer(Protocol):
    """The part of a checkpoint that `prompts` needs."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, which has a chat template."""


def prompts(checkpoint: HasTokenizer) -> list[tuple[int, ...]]:
    """Return the problems as a checkpoint's tokens, each as a user turn in the chat template."""
    tokenizer = checkpoint.tokenizer
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": PROMPT.format(question=problem["question"])}],
            tokenize=False,
            add_generation_prompt=True,
        )
        for problem in problems()
    ]
    return [tuple(tokenizer.encode(text, add_special_tokens=False)) for text in texts]


def golds() -> list[str]:
    """Return the problems' right answers, the numbers behind `####`."""
    return [problem["answer"].split("#### ")[1] for problem in problems()]


def problems() -> list[Problem]:
    """Return the problems."""
    return [json.loads(line) for line in PROBLEMS.read_text(encoding="utf-8").splitlines()]
