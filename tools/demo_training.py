"""How the demo checkpoint is trained: block diffusion on word problems, then on other tasks beside them.

The objective is SDAR's (arXiv 2510.06303), which is that of block diffusion (arXiv 2503.09573): a noised copy of the
text stands before the clean one; a noised block sees itself and the clean blocks before it; the masked tokens are
predicted where they stand, by weighted cross-entropy. Of the m answer tokens of a block, k ~ U{1..m} are masked and
weigh m / k: in expectation the same bound as noise levels t ~ U(0, 1) with weight 1 / t, with less variance.

The second training keeps what the first one taught (learning without forgetting, arXiv 1606.09282): on word problems
the loss is the divergence from the predictions of the model as it was, and only the other tasks have texts to learn.
"""

from __future__ import annotations

import copy
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn.functional import cross_entropy, kl_div

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import Qwen3ForCausalLM

logger = logging.getLogger(__name__)

BLOCK_SIZE = 4
MASK, END = "<|MASK|>", "<|endoftext|>"
AT_ONCE = 10_000  # texts that are tokenized together
KEEPING = 4.0  # weight of the divergence on known texts: accuracies with 2 and 1 steps a block react to small changes

Chat = tuple[str, str]
"""A prompt in the chat template, and its answer up to its end of turn."""


@dataclass(frozen=True)
class Texts:
    """Tokenized texts: ids (n, N) int16, and is_answer (n, N) bool for the tokens that are learnt."""

    ids: torch.Tensor
    is_answer: torch.Tensor

    def batch(self, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return random rows: ids (size, N) int64, is_answer (size, N)."""
        rows = torch.randint(len(self.ids), (size,), device=self.ids.device)
        return self.ids[rows].long(), self.is_answer[rows]


def tokenized(tokenizer: Tokenizer, chats: Iterator[Chat], count: int, longest: int, device: str = "cpu") -> Texts:
    """Tokenize at least `count` texts; those of more than `longest` tokens are left out.

    A text is padded with <|endoftext|> behind its end of turn. The answer is learnt, and the padding up to the end of
    the answer's last block.
    """
    started = time.time()
    end = tokenizer.token_to_id(END)
    ids, is_answer = [], []
    for _ in range(math.ceil(count / AT_ONCE)):
        pairs = list(itertools.islice(chats, AT_ONCE))
        prompts = tokenizer.encode_batch([prompt for prompt, _ in pairs], add_special_tokens=False)
        answers = tokenizer.encode_batch([answer for _, answer in pairs], add_special_tokens=False)
        for prompt, answer in zip(prompts, answers, strict=True):
            n, total = len(prompt.ids), len(prompt.ids) + len(answer.ids)
            last = math.ceil(total / BLOCK_SIZE) * BLOCK_SIZE
            if last > longest:
                continue
            ids.append(np.array(prompt.ids + answer.ids + [end] * (longest - total), dtype=np.int16))
            is_answer.append((np.arange(longest) >= n) & (np.arange(longest) < last))
    logger.info("%d training texts in %.0f s", len(ids), time.time() - started)
    return Texts(torch.from_numpy(np.stack(ids)).to(device), torch.from_numpy(np.stack(is_answer)).to(device))


def block_diffusion_mask(length: int, block_size: int) -> torch.Tensor:
    """Return the attention mask of [noised; clean] halves: bool (2 * length, 2 * length), True = attends.

    Source: Block Diffusion, arXiv 2503.09573, section 3 (block diagonal, offset block causal, block causal).
    """
    block = torch.arange(length) // block_size
    before, same = block[:, None] > block[None, :], block[:, None] == block[None, :]
    noised = torch.cat([same, before], dim=1)  # sees its own noised block and the clean blocks before it
    clean = torch.cat([torch.zeros_like(same), before | same], dim=1)
    return torch.cat([noised, clean])


def add_noise(
    ids: torch.Tensor, is_answer: torch.Tensor, mask_id: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mask k ~ U{1..m} of the m answer tokens of every block.

    ids and is_answer are (B, N); returns noised ids (B, N), masked (B, N) bool and weights m / k (B, N).
    """
    b, n = ids.shape
    answer = is_answer.view(b, n // BLOCK_SIZE, BLOCK_SIZE)
    m = answer.sum(-1, keepdim=True)
    k = (torch.rand(m.shape, device=ids.device) * m).long() + 1
    order = torch.rand(answer.shape, device=ids.device).masked_fill(~answer, 2.0)
    masked = (order.argsort(-1).argsort(-1) < k) & answer
    weights = torch.where(masked, m / k, 0.0).view(b, n)
    masked = masked.view(b, n)
    return torch.where(masked, mask_id, ids), masked, weights


def masked_logits(
    model: Qwen3ForCausalLM, noised: torch.Tensor, clean: torch.Tensor, masked: torch.Tensor
) -> torch.Tensor:
    """Return the logits at the masked positions, (masked, V) in float32; noised, clean and masked are (B, N)."""
    length, device = clean.shape[1], clean.device
    attention = block_diffusion_mask(length, BLOCK_SIZE).to(device)[None, None]  # (1, 1, 2N, 2N)
    positions = torch.arange(length, device=device).repeat(2)[None]  # (1, 2N)
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type != "cpu"):
        hidden = model.model(
            input_ids=torch.cat([noised, clean], dim=1), attention_mask=attention, position_ids=positions
        ).last_hidden_state[:, :length]  # (B, N, D): the noised half
        logits: torch.Tensor = model.lm_head(hidden[masked])
    return logits.float()


def learn(model: Qwen3ForCausalLM, tokenizer: Tokenizer, texts: Texts, *, steps: int, batch: int, lr: float) -> None:
    """Train the model on texts."""
    mask_id = tokenizer.token_to_id(MASK)

    def loss() -> torch.Tensor:
        return _likelihood_bound(model, mask_id, *texts.batch(batch))

    _optimize(model, loss, steps=steps, lr=lr)


def learn_beside(
    model: Qwen3ForCausalLM, tokenizer: Tokenizer, texts: Texts, known: Texts, *, steps: int, batch: int, lr: float
) -> None:
    """Train the model on texts, and keep its predictions on `known` texts as they are, a quarter as many a step."""
    mask_id = tokenizer.token_to_id(MASK)
    teacher = copy.deepcopy(model).eval().requires_grad_(False)

    def loss() -> torch.Tensor:
        clean, answer = known.batch(max(1, batch // 4))
        noised, masked, weights = add_noise(clean, answer, mask_id)
        with torch.no_grad():
            before = masked_logits(teacher, noised, clean, masked).log_softmax(-1)
        now = masked_logits(model, noised, clean, masked).log_softmax(-1)
        divergence = kl_div(now, before, reduction="none", log_target=True).sum(-1)
        forgotten = (divergence * weights[masked]).sum() / answer.sum()
        return torch.stack([_likelihood_bound(model, mask_id, *texts.batch(batch)), KEEPING * forgotten])

    _optimize(model, loss, steps=steps, lr=lr)


def _likelihood_bound(model: Qwen3ForCausalLM, mask_id: int, clean: torch.Tensor, answer: torch.Tensor) -> torch.Tensor:
    """Return the bound on the negative log-likelihood, per answer token."""
    noised, masked, weights = add_noise(clean, answer, mask_id)
    loss = cross_entropy(masked_logits(model, noised, clean, masked), clean[masked], reduction="none")
    return (loss * weights[masked]).sum() / answer.sum()


def _optimize(model: Qwen3ForCausalLM, loss_of: Callable[[], torch.Tensor], *, steps: int, lr: float) -> None:
    """Take AdamW steps on the sum of a loss's parts; the learning rate warms up and follows a cosine.

    `loss_of` draws a batch and returns the parts, as a scalar or (parts,).
    """
    decay = [p for p in model.parameters() if p.dim() > 1]
    keep = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": keep, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=model.device.type != "cpu")
    warmup = min(200, steps // 10 + 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * s / steps))
    )
    started = time.time()
    for step in range(steps):
        loss = loss_of()
        optimizer.zero_grad(set_to_none=True)
        loss.sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 200 == 0 or step == steps - 1:
            parts = " + ".join(f"{part:.4f}" for part in loss.flatten().tolist())
            logger.info("step %d  loss per answer token %s  %.0f s", step, parts, time.time() - started)
