"""A checkpoint that thinks: one layer whose weights are a script, so that every engine runs it, and answers alike.

Attention looks at the token before, and the head maps this token to the next one:

    any text -> <think> A e 5 C </think> 7 re, and a stop token

So the thought holds a stop string ("e") and a wrong number ("5"), and the answer is "7". After C a loop,
x y x y …, is nearly as probable as `</think>`: a greedy answer ends its thought, and a sampled one may not.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from support import DEMO_CHECKPOINT, small_config, write_weights

START, END = 711, 712
STOP, MASK = 709, 710
A, E, FIVE, C, SEVEN, RE, X, Y, NEW_LINE = 32, 68, 20, 34, 22, 263, 87, 88, 198
SUCCESSORS = {
    START: (A,), A: (E,), E: (FIVE,), FIVE: (C,), C: (END, X), X: (Y,), Y: (X,),
    END: (SEVEN,), SEVEN: (RE,), RE: (STOP,),
}  # fmt: skip
THOUGHT, ANSWER = "<think>Ae5C", "7re"
HEAD, WIDTH, CODES = 32, 64, 16  # sizes of a head and of the hidden state; codes of tokens
THETA = 100.0
OTHER, HIDDEN = 1, 2  # codes of all other tokens, and of the mask


def thinking_checkpoint(folder: Path, *, loops: bool = True, special: bool = False, blank: bool = False) -> Path:
    """Make `folder` the checkpoint, and return it.

    Args:
        folder: made if it is not there.
        loops: whether the thought may run into a loop; else `</think>` always follows C.
        special: whether decoding leaves out `<think>` and `</think>`.
        blank: whether a line break follows `</think>`, as chat models write it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copyfile(DEMO_CHECKPOINT / name, folder / name)
    tokenizer = json.loads((DEMO_CHECKPOINT / "tokenizer.json").read_text())
    kind = tokenizer["added_tokens"][0]
    marks = {START: "<think>", END: "</think>"}
    tokenizer["added_tokens"] += [{**kind, "id": i, "content": text, "special": special} for i, text in marks.items()]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = small_config(
        vocab_size=END + 1, head_dim=HEAD, hidden_size=WIDTH, num_hidden_layers=1, max_window_layers=1, rope_theta=THETA
    )
    (folder / "config.json").write_text(json.dumps(config))
    successors = SUCCESSORS if loops else {**SUCCESSORS, C: (END,)}
    if blank:
        successors = {**successors, END: (NEW_LINE,), NEW_LINE: (SEVEN,)}
    write_weights(folder, script(config, successors))
    return folder


def script(config: dict[str, Any], successors: dict[int, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """The weights. The hidden state is 1, then the code of the token, one-hot, and that of the token before."""
    vocabulary, size = config["vocab_size"], config["head_dim"]
    code = torch.full((vocabulary,), OTHER)
    code[MASK] = HIDDEN
    for number, token in enumerate(successors, HIDDEN + 1):
        code[token] = number
    embedding = torch.zeros(vocabulary, WIDTH)
    embedding[:, 0] = 1
    embedding[torch.arange(vocabulary), code] = 1

    angles = THETA ** (-torch.arange(0, size, 2) / size)  # by which a position turns each pair of values
    query = torch.cat([angles.cos(), -angles.sin()])  # turned back by one position
    key = torch.cat([torch.ones(size // 2), torch.zeros(size // 2)])
    q, k = torch.zeros(4 * size, WIDTH), torch.zeros(2 * size, WIDTH)
    q[:, 0], k[:, 0] = query.repeat(4), key.repeat(2)
    v, o = torch.zeros(2 * size, WIDTH), torch.zeros(WIDTH, 4 * size)
    for number in range(1, CODES):
        v[number, number] = 1
        o[CODES + number, number] = 1
    head = torch.zeros(vocabulary, WIDTH)
    head[START, CODES + OTHER] = 10
    for token, following in successors.items():
        for rank, successor in enumerate(following):
            head[successor, CODES + int(code[token])] = 10 - rank / 10
    layer = "model.layers.0"
    width = config["intermediate_size"]
    return {
        "model.embed_tokens.weight": embedding,
        f"{layer}.input_layernorm.weight": torch.ones(WIDTH),
        f"{layer}.post_attention_layernorm.weight": torch.ones(WIDTH),
        f"{layer}.self_attn.q_proj.weight": q,
        f"{layer}.self_attn.k_proj.weight": k,
        f"{layer}.self_attn.v_proj.weight": v,
        f"{layer}.self_attn.o_proj.weight": o,
        f"{layer}.self_attn.q_norm.weight": torch.full((size,), 10.0),
        f"{layer}.self_attn.k_norm.weight": torch.full((size,), 10.0),
        f"{layer}.mlp.gate_proj.weight": torch.zeros(width, WIDTH),
        f"{layer}.mlp.up_proj.weight": torch.zeros(width, WIDTH),
        f"{layer}.mlp.down_proj.weight": torch.zeros(WIDTH, width),
        "model.norm.weight": torch.ones(WIDTH),
        "lm_head.weight": head,
    }
