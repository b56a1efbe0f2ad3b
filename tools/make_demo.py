"""Make the bundled checkpoint and its problems again, from a seed.

    python tools/make_demo.py --out FOLDER [--seed 0] [--device cuda]          both trainings
    python tools/make_demo.py --out FOLDER --base CHECKPOINT                   the second training only

This writes `problems.jsonl` (200 held-out word problems) and `checkpoint/`: a 3-million-parameter block-diffusion model
in SDAR's layout (Qwen3 with block size 4), its tokenizer, chat template and generation config. The same seed gives the
same bytes of problems and tokenizer, and the same weights up to the GPU's rounding.

The first training is on word problems (demo_problems.py), and takes about two minutes on one H100. The second training
adds the tasks of `parallel_bench_sdar_demo`, and keeps the predictions on word problems (demo_training.py). Their
documents of the test sets are of neither training. The tokenizer is that of the word problems: the tasks' questions and
answers are made of its tokens.

`--base` names a checkpoint that had the first training, such as an earlier bundled one. At the end the command prints
how many questions of each kind the checkpoint answers right.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import demo_training
from demo_decoding import STOP, Question, table
from demo_problems import problems
from demo_training import BLOCK_SIZE, END, MASK, Chat, tokenized

from sdar_lm_eval.demo import PROMPT
from sdar_lm_eval.tasks.generated import KINDS, Document, documents, is_right, stream

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import Qwen3ForCausalLM

logger = logging.getLogger(__name__)

Config: TypeAlias = "dict[str, bool | int | float | str | list[str] | None]"

PROBLEM_TOKENS, TASK_TOKENS = 160, 64  # longest training texts; longer ones are left out
MOST_TEXTS = 600_000  # of word problems in the first training
MOST_TASK_TEXTS = 300_000  # of tasks; of word problems beside them a third
VOCAB_SIZE = 900
TEST_PROBLEMS = 200
TURN = "<|im_start|>"
SPECIAL_TOKENS = (END, TURN, STOP, MASK)

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


def chat(question: str, answer: str) -> Chat:
    """Return a user's turn and its answer in the chat template."""
    return f"{TURN}user\n{question}{STOP}\n{TURN}assistant\n", f"{answer}{STOP}"


def problem_chats(seed: int) -> Iterator[Chat]:
    """Yield training problems without end."""
    for problem in problems(seed, held_out=False):
        yield chat(PROMPT.format(question=problem.question), problem.answer)


def task_chats(seed: int) -> Iterator[Chat]:
    """Yield training documents of the tasks without end, the kinds in turn."""
    streams = [stream(kind, "demo", seed=seed, held_out=False) for kind in KINDS]
    for document in itertools.chain.from_iterable(zip(*streams, strict=True)):
        yield chat(document["question"], document["answer"])


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
    end, mask = tokenizer.token_to_id(END), tokenizer.token_to_id(MASK)
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


def new_model(config: Config, *, seed: int, device: str) -> Qwen3ForCausalLM:
    """Return the demo model with random weights, in float32."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    known = {k: v for k, v in config.items() if k not in ("architectures", "model_type", "torch_dtype")}
    model = Qwen3ForCausalLM._from_config(Qwen3Config(**known), attn_implementation="sdpa").float().to(device)
    logger.info("%s parameters", f"{sum(p.numel() for p in model.parameters()):,}")
    return model


def load_weights(model: Qwen3ForCausalLM, checkpoint: Path) -> None:
    """Give the model the weights of a checkpoint that `write_checkpoint` wrote."""
    from safetensors.torch import load_file

    missing, unexpected = model.load_state_dict(load_file(checkpoint / "model.safetensors"), strict=False)
    assert missing in ([], ["lm_head.weight"]), missing  # tied to the embeddings
    assert not unexpected, unexpected


def train(
    model: Qwen3ForCausalLM, tokenizer: Tokenizer, *, seed: int, steps: int, batch: int, lr: float, device: str
) -> None:
    """Train the model on word problems."""
    texts = tokenized(tokenizer, problem_chats(seed), min(steps * batch, MOST_TEXTS), PROBLEM_TOKENS, device)
    demo_training.learn(model, tokenizer, texts, steps=steps, batch=batch, lr=lr)


def train_on_tasks(
    model: Qwen3ForCausalLM, tokenizer: Tokenizer, *, seed: int, steps: int, batch: int, lr: float, device: str
) -> None:
    """Train the model on the tasks, and keep its predictions on word problems."""
    import torch

    torch.manual_seed(seed)
    count = min(steps * batch, MOST_TASK_TEXTS)
    known = tokenized(tokenizer, problem_chats(seed), -(-count // 3), PROBLEM_TOKENS, device)
    texts = tokenized(tokenizer, task_chats(seed), count, TASK_TOKENS, device)
    demo_training.learn_beside(model, tokenizer, texts, known, steps=steps, batch=batch, lr=lr)


def test_questions(seed: int, limit: int) -> dict[str, tuple[list[Question], int]]:
    """Return the first `limit` test questions of each kind, and the most new tokens of their answers."""

    def problem(question: str, gold: str) -> Question:
        prompt, _ = chat(PROMPT.format(question=question), "")
        return Question(prompt, lambda answer: answer.rpartition("#### ")[2] == gold)

    def task(document: Document) -> Question:
        form = KINDS[document["kind"]].form("demo")
        prompt, _ = chat(document["question"], "")
        return Question(prompt, lambda answer: is_right(document, form.strict(answer)))

    test = itertools.islice(problems(seed, held_out=True), min(limit, TEST_PROBLEMS))
    sets = {"word problems": ([problem(p.question, p.answer.rpartition("#### ")[2]) for p in test], 96)}
    for kind in KINDS:
        sets[kind] = ([task(document) for document in documents(kind, "demo", min(limit, 100))], 24)
    return sets


def write_checkpoint(folder: Path, model: Qwen3ForCausalLM, config: Config, tokenizer: Tokenizer) -> None:
    """Write the folder as SDAR publishes its own: config, generation config, tokenizer, chat template, weights."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    stop_ids = [tokenizer.token_to_id(STOP), tokenizer.token_to_id(END)]
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": END,
        "pad_token": END,
        "mask_token": MASK,
        "additional_special_tokens": [TURN, STOP],
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
    parser.add_argument("--base", type=Path, help="a checkpoint that had the first training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2000, help="of the first training")
    parser.add_argument("--task_steps", type=int, default=2400, help="of the second training")
    parser.add_argument("--batch", type=int, default=256, help="texts a step, of word problems or of tasks")
    parser.add_argument("--lr", type=float, default=2e-3, help="of the first training")
    parser.add_argument("--task_lr", type=float, default=1e-3, help="of the second training")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--limit", type=int, default=200, help="test questions of each kind, at the end")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "problems.jsonl").write_text(problems_jsonl(args.seed))
    tokenizer = make_tokenizer(args.seed)
    config = make_config(tokenizer)
    model = new_model(config, seed=args.seed, device=args.device)
    shared = {"seed": args.seed, "batch": args.batch, "device": args.device}
    if args.base:
        load_weights(model, args.base)
    else:
        train(model, tokenizer, steps=args.steps, lr=args.lr, **shared)
    sets = test_questions(args.seed, args.limit)
    logger.info(
        "Right answers after the first training, %%\n%s",
        table(model, tokenizer, {"word problems": sets["word problems"]}),
    )
    train_on_tasks(model, tokenizer, steps=args.task_steps, lr=args.task_lr, **shared)
    write_checkpoint(args.out / "checkpoint", model, config, tokenizer)
    load_weights(model, args.out / "checkpoint")  # rounded as they are written
    logger.info("Right answers, %%\n%s", table(model, tokenizer, sets))


if __name__ == "__main__":
    main()
