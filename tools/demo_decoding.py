"""A quick look at what a checkpoint in training can do: greedy block decoding, without a cache, of a batch at once.

The package's engines measure; the figures of this module only tell whether a training went well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from demo_training import BLOCK_SIZE, MASK

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import Qwen3ForCausalLM

STOP = "<|im_end|>"


@dataclass(frozen=True)
class Question:
    """A prompt in the chat template, and whether an answer to it is right."""

    prompt: str
    is_right: Callable[[str], bool]


@dataclass(frozen=True)
class Rule:
    """How many of a block's most confident tokens a step keeps.

    Attributes:
        name: the name in tables.
        tokens: this many.
        threshold: all above this confidence, if they are more; None: no others.
    """

    name: str
    tokens: int
    threshold: float | None = None


RULES = (
    Rule("4 steps", 1),
    Rule("2 steps", 2),
    Rule("1 step", 4),
    Rule("dynamic 0.85", 1, 0.85),
    Rule("dynamic 0.5", 1, 0.5),
)


@torch.no_grad()
def decode(
    model: Qwen3ForCausalLM, prompts: Sequence[Sequence[int]], length: int, mask_id: int, stop_id: int, rule: Rule
) -> torch.Tensor:
    """Return the prompts with what follows them, (B, length), decided block by block up to the block of the stop token.

    What is not decided stays masked.
    """
    device, count, blocks = model.device, len(prompts), length // BLOCK_SIZE
    ids = torch.full((count, length), mask_id, device=device)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt, device=device)
    block_of = torch.arange(length, device=device) // BLOCK_SIZE
    attention = (block_of[None, :] <= block_of[:, None])[None, None]  # (1, 1, N, N)
    begins = torch.tensor([len(prompt) for prompt in prompts], device=device)[:, None]  # (B, 1)
    block = begins // BLOCK_SIZE  # (B, 1): which one is being decided; `blocks` where the answer is finished
    rows = torch.arange(count, device=device)[:, None]
    while bool((block < blocks).any()):
        places = block.clamp(max=blocks - 1) * BLOCK_SIZE + torch.arange(BLOCK_SIZE, device=device)  # (B, 4)
        hidden = model.model(input_ids=ids, attention_mask=attention).last_hidden_state[rows, places]
        logits = model.lm_head(hidden).float()  # (B, 4, V)
        logits[..., mask_id] = -torch.inf
        confidence, drawn = logits.softmax(-1).max(-1)  # (B, 4) each
        masked = (ids[rows, places] == mask_id) & (block < blocks)
        rank = confidence.masked_fill(~masked, -1.0).argsort(-1, descending=True).argsort(-1)
        kept = rank < rule.tokens
        if rule.threshold is not None:
            kept |= confidence > rule.threshold
        ids[rows, places] = torch.where(kept & masked, drawn, ids[rows, places])
        decided = (ids[rows, places] != mask_id).all(-1, keepdim=True)
        stopped = ((ids[rows, places] == stop_id) & (places >= begins)).any(-1, keepdim=True)
        block = torch.where(decided, torch.where(stopped, blocks, block + 1), block)
    return ids


def accuracy(
    model: Qwen3ForCausalLM, tokenizer: Tokenizer, questions: Sequence[Question], new_tokens: int, rule: Rule
) -> float:
    """Return the share of questions that are answered right with at most `new_tokens` tokens."""
    prompts = [tokenizer.encode(question.prompt, add_special_tokens=False).ids for question in questions]
    longest = max(map(len, prompts)) + new_tokens
    length = -(-longest // BLOCK_SIZE) * BLOCK_SIZE
    stop, mask_id = tokenizer.token_to_id(STOP), tokenizer.token_to_id(MASK)
    decoded = decode(model, prompts, length, mask_id, stop, rule).tolist()
    right = 0
    for question, prompt, ids in zip(questions, prompts, decoded, strict=True):
        answer = ids[len(prompt) :]
        answer = answer[: answer.index(stop)] if stop in answer else answer
        right += question.is_right(tokenizer.decode(answer, skip_special_tokens=False))
    return right / len(questions)


def table(model: Qwen3ForCausalLM, tokenizer: Tokenizer, sets: dict[str, tuple[Sequence[Question], int]]) -> str:
    """Return the accuracy of each set by each rule, in per cent; a set is its questions and their most new tokens."""
    lines = [f"{'':24}" + "".join(f"{rule.name:>14}" for rule in RULES)]
    for name, (questions, new_tokens) in sets.items():
        scores = [accuracy(model, tokenizer, questions, new_tokens, rule) for rule in RULES]
        lines.append(f"{name:24}" + "".join(f"{100 * score:14.1f}" for score in scores))
    return "\n".join(lines)
