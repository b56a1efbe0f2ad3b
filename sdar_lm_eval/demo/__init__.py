"""The bundled checkpoint (`pretrained=demo`) and its problems; `tools/make_demo.py` makes both again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

CHECKPOINT = Path(__file__).parent / "checkpoint"
PROBLEMS = Path(__file__).parent / "problems.jsonl"
PROMPT = '{question}\n\nPlease reason step by step, and end with a line "#### <number>".'
"""The wording of the task `gsm8k_sdar_hash`, on which the checkpoint is trained."""


class HasTokenizer(Protocol):
    """A checkpoint, as far as it is needed here."""

    @property
    def tokenizer(self) -> Any:
        """With a chat template."""


def prompts(checkpoint: HasTokenizer) -> list[tuple[int, ...]]:
    """The problems as tokens of a checkpoint with a chat template: one user turn, the answer to follow."""
    texts = [
        checkpoint.tokenizer.apply_chat_template(
            [{"role": "user", "content": PROMPT.format(**json.loads(line))}], tokenize=False, add_generation_prompt=True
        )
        for line in PROBLEMS.read_text(encoding="utf-8").splitlines()
    ]
    return [tuple(checkpoint.tokenizer.encode(text, add_special_tokens=False)) for text in texts]


def golds() -> list[str]:
    """The problems' right answers, numbers as they stand behind `####`."""
    lines = PROBLEMS.read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["answer"].split("#### ")[1] for line in lines]
