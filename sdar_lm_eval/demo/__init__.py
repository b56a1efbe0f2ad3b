"""The bundled checkpoint (`pretrained=demo`), its problems, and how both are made (`make.py`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sdar_lm_eval.checkpoint import Checkpoint

CHECKPOINT = Path(__file__).parent / "checkpoint"
PROBLEMS = Path(__file__).parent / "problems.jsonl"


def prompts(checkpoint: Checkpoint) -> list[tuple[int, ...]]:
    """The problems as tokens of a checkpoint with a chat template: one user turn, the answer to follow."""
    from sdar_lm_eval.demo.make import PROMPT

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
