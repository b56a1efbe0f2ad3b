"""Make the bundled checkpoint and its problems again, from a seed.

    python tools/make_demo.py --out FOLDER [--seed 0] [--steps 2000] [--device cuda]

This writes `problems.jsonl` (200 held-out word problems) and `checkpoint/`: a 3-million-parameter block-diffusion model
in SDAR's layout (Qwen3 with block size 4), its tokenizer, chat template and generation config. The same seed gives the
same bytes of problems and tokenizer, and the same weights up to the GPU's rounding. It takes about two minutes on one
H100.

The training objective is SDAR's (arXiv 2510.06303), which is that of block diffusion (arXiv 2503.09573): a noised copy
of the text stands before the clean one; a noised block sees itself and the clean blocks before it; the masked tokens
are predicted where they stand, by weighted cross-entropy. Of the m answer tokens of a block, k ~ U{1..m} are masked and
weigh m / k: in expectation the same bound as noise levels t ~ U(0, 1) with weight 1 / t, with less variance.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from demo_problems import Problem, problems

from sdar_lm_eval.demo import PROMPT

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from tokenizers import Tokenizer
    from transformers import Qwen3ForCausalLM

logger = logging.getLogger(__name__)

Config: TypeAlias = "dict[str, bool | int | float | str | list[str] | None]"

BLOCK_SIZE = 4
MAX_TOKENS = 160  # longest training text; longer ones are left out
VOCAB_SIZE = 900
TEST_PROBLEMS = 200
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|MASK|>")

CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)

# Qwen2's split: words with one leading character, single digits, punctuation, white space.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def chat(problem: Problem) -> tuple[str, str]:
    """Return a problem as (prompt in the chat template, answer up to its end of turn)."""
    user = PROMPT.format(question=problem.question)
    return f"<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n", f"{problem.answer}<|im_end|>"


def problems_jsonl(seed: int) -> str:
    """Return the content of `problems.jsonl`: held-out problems as GSM8K has them, one JSON object a line."""
    test = itertools.islice(problems(seed, held_out=True), TEST_PROBLEMS)
    return "".join(json.dumps({"question": p.question, "answer": p.answer}) + "\n" for p in test)


def make_tokenizer(seed: int) -> Tokenizer:
    """Return a byte-level BPE tokenizer trained on 20,000 problems."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    sample = itertools.islice(problems(seed, held_out=False), 20_000)
    tokenizer.train_from_iterator(
        (f"user\n{PROMPT.format(question=p.question)}\nassistant\n{p.answer}" for p in sample),
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE - len(SPECIAL_TOKENS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    return tokenizer


def make_config(tokenizer: Tokenizer) -> Config:
    """Return `config.json` of the demo model: SDAR's keys, with Qwen3's meaning."""
    end, mask = tokenizer.token_to_id("<|endoftext|>"), tokenizer.token_to_id("<|MASK|>")
    return {
        "architectures": ["SDARForCausalLM"],
        "model_type": "sdar",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "block_size": BLOCK_SIZE,
        "bos_token_id": end,
        "eos_token_id": end,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 256,
        "initializer_range": 0.02,
        "intermediate_size": 512,
        "mask_token_id": mask,
        "max_position_embeddings": 2048,
        "max_window_layers": 5,
        "num_attention_heads": 4,
        "num_hidden_layers": 5,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 10000,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": False,
        "use_sliding_window": False,
        "vocab_size": tokenizer.get_vocab_size(),
    }


def block_diffusion_mask(length: int, block_size: int) -> torch.Tensor:
    """Return the attention mask of [noised; clean] halves: bool (2 * length, 2 * length), True = attends.

    Source: Block Diffusion, arXiv 2503.09573, section 3 (block diagonal, offset block causal, block causal).
    """
    import torch

    block = torch.arange(length) // block_size
    before, same = block[:, None] > block[None, :], block[:, None] == block[None, :]
    noised = torch.cat([same, before], dim=1)  # sees its own noised block and the clean blocks before it
    clean = torch.cat([torch.zeros_like(same), before | same], dim=1)
    return torch.cat([noised, clean])


def training_texts(tokenizer: Tokenizer, seed: int, count: int) -> tuple[NDArray[np.int16], NDArray[np.bool_]]:
    """Tokenize training problems: ids (n, MAX_TOKENS), and is_answer (n, MAX_TOKENS) for the tokens that are learnt.

    A text is padded with <|endoftext|> behind its end of turn. The answer is learnt, and the padding up to the end of
    the answer's last block.
    """
    import numpy as np

    end = tokenizer.token_to_id("<|endoftext|>")
    source = problems(seed, held_out=False)
    ids, is_answer = [], []
    for _ in range(math.ceil(count / 10_000)):
        pairs = [chat(p) for p in itertools.islice(source, 10_000)]
        prompts = tokenizer.encode_batch([prompt for prompt, _ in pairs], add_special_tokens=False)
        answers = tokenizer.encode_batch([answer for _, answer in pairs], add_special_tokens=False)
        for prompt, answer in zip(prompts, answers, strict=True):
            n, total = len(prompt.ids), len(prompt.ids) + len(answer.ids)
            last = math.ceil(total / BLOCK_SIZE) * BLOCK_SIZE
            if last > MAX_TOKENS:
                continue
            ids.append(np.array(prompt.ids + answer.ids + [end] * (MAX_TOKENS - total), dtype=np.int16))
            is_answer.append((np.arange(MAX_TOKENS) >= n) & (np.arange(MAX_TOKENS) < last))
    return np.stack(ids), np.stack(is_answer)


def add_noise(
    ids: torch.Tensor, is_answer: torch.Tensor, mask_id: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mask k ~ U{1..m} of the m answer tokens of every block.

    ids and is_answer are (B, N); returns noised ids (B, N), masked (B, N) bool and weights m / k (B, N).
    """
    import torch

    b, n = ids.shape
    answer = is_answer.view(b, n // BLOCK_SIZE, BLOCK_SIZE)
    m = answer.sum(-1, keepdim=True)
    k = (torch.rand(m.shape, device=ids.device) * m).long() + 1
    order = torch.rand(answer.shape, device=ids.device).masked_fill(~answer, 2.0)
    masked = (order.argsort(-1).argsort(-1) < k) & answer
    weights = torch.where(masked, m / k, 0.0).view(b, n)
    masked = masked.view(b, n)
    return torch.where(masked, mask_id, ids), masked, weights


def train(
    config: Config, tokenizer: Tokenizer, *, seed: int, steps: int, batch: int, lr: float, device: str
) -> Qwen3ForCausalLM:
    """Return the trained demo model, in float32."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    kind = torch.device(device).type
    torch.manual_seed(seed)
    known = {k: v for k, v in config.items() if k not in ("architectures", "model_type", "torch_dtype")}
    model = Qwen3ForCausalLM._from_config(Qwen3Config(**known), attn_implementation="sdpa").float().to(device)
    logger.info("%s parameters", f"{sum(p.numel() for p in model.parameters()):,}")
    mask_id = tokenizer.token_to_id("<|MASK|>")
    assert mask_id is not None
    started = time.time()
    texts, learnt = training_texts(tokenizer, seed, min(steps * batch, 600_000))
    logger.info("%d training texts in %.0f s", len(texts), time.time() - started)
    ids, is_answer = torch.from_numpy(texts).to(device), torch.from_numpy(learnt).to(device)

    attention = block_diffusion_mask(MAX_TOKENS, BLOCK_SIZE).to(device)[None, None]  # (1, 1, 2N, 2N)
    positions = torch.arange(MAX_TOKENS, device=device).repeat(2)[None]  # (1, 2N)
    decay = [p for p in model.parameters() if p.dim() > 1]
    keep = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": keep, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=kind != "cpu")
    warmup = min(200, steps // 10 + 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * s / steps))
    )
    started = time.time()
    for step in range(steps):
        rows = torch.randint(len(ids), (batch,), device=device)
        clean, answer = ids[rows].long(), is_answer[rows]
        noised, masked, weights = add_noise(clean, answer, mask_id)
        with torch.autocast(kind, dtype=torch.bfloat16, enabled=kind != "cpu"):
            hidden = model.model(
                input_ids=torch.cat([noised, clean], dim=1), attention_mask=attention, position_ids=positions
            ).last_hidden_state[:, :MAX_TOKENS]  # (B, N, D): the noised half
            logits = model.lm_head(hidden[masked])  # (masked, V)
        loss = torch.nn.functional.cross_entropy(logits.float(), clean[masked], reduction="none")
        loss = (loss * weights[masked]).sum() / answer.sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 200 == 0 or step == steps - 1:
            logger.info("step %d  loss per answer token %.4f  %.0f s", step, loss.item(), time.time() - started)
    return model


def write_checkpoint(folder: Path, model: Qwen3ForCausalLM, config: Config, tokenizer: Tokenizer) -> None:
    """Write the folder as SDAR publishes its own: config, generation config, tokenizer, chat template, weights."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    end = "<|endoftext|>"
    stop_ids = [tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id(end)]
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": end,
        "pad_token": end,
        "mask_token": "<|MASK|>",
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": config["max_position_embeddings"],
    }
    generation = {"eos_token_id": stop_ids, "pad_token_id": config["eos_token_id"], "do_sample": False}
    for name, content in [
        ("config.json", config),
        ("generation_config.json", generation),
        ("tokenizer_config.json", tokenizer_config),
    ]:
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    tokenizer.save(str(folder / "tokenizer.json"))
    tied = config["tie_word_embeddings"]
    weights = {
        name: tensor.to(torch.bfloat16).contiguous().cpu()
        for name, tensor in model.state_dict().items()
        if not (tied and name == "lm_head.weight")
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(description="Make the demo checkpoint and its problems again.")
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoint/ and problems.jsonl")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "problems.jsonl").write_text(problems_jsonl(args.seed))
    tokenizer = make_tokenizer(args.seed)
    config = make_config(tokenizer)
    model = train(config, tokenizer, seed=args.seed, steps=args.steps, batch=args.batch, lr=args.lr, device=args.device)
    write_checkpoint(args.out / "checkpoint", model, config, tokenizer)


if __name__ == "__main__":
    main()
