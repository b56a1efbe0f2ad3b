"""Small random checkpoints in SDAR's layout, and the model they hold written out once more.

    random_checkpoint(folder, moe=True, rope_theta=5e5)    a folder that Checkpoint.open takes; a few 100 kB
    reference_logits(weights, config, ids, sees)           its logits by plain tensor algebra, without transformers
    reference_forward(…, past)                             the same after tokens whose keys and values are there
    block_causal(length, block_length)                     which token sees which

And what processes need that tests start: environment(QUICK_START).

The weights are random but not small: a wrong rotary base, epsilon or head size moves the logits by far more than
rounding does.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from sdar_lm_eval.demo import CHECKPOINT as DEMO_CHECKPOINT

ROOT = Path(__file__).parents[1]
# lm_eval starts without what takes seconds there; its own tasks are among that.
QUICK_START = Path(__file__).parent / "quick_start"
CAN_FORK = sys.platform == "linux" and not torch.cuda.is_available()  # a fork cannot use a GPU that was asked before
# The real SDAR-4B-Chat folder without weights, where the machine has it beside the checkout.
REAL_FOLDER = Path(__file__).parents[2] / "shared" / "models" / "sdar-4b-chat"
KeysValues = list[tuple[torch.Tensor, torch.Tensor]]
MOE_SETTINGS = {
    "model_type": "sdar_moe",
    "architectures": ["SDARMoeForCausalLM"],
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
}


def environment(*folders: Path) -> dict[str, str]:
    """Variables for a process that finds the modules that this one finds, in `folders` first, and takes one core."""
    path = os.pathsep.join(map(str, [*folders, ROOT, *sys.path]))
    server = {"QUICK_START_SERVER": str(_forks() / "socket")} if QUICK_START in folders and CAN_FORK else {}
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **server}


@functools.cache
def _forks() -> Path:
    """Start the server of forks, which ends with this process, and return its folder."""
    folder = Path(tempfile.mkdtemp())
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening:
        listening.bind(str(folder / "socket"))
        listening.listen()
        variables = environment() | {"SDAR_LM_EVAL_AUTOLOAD": "0"}
        command = [sys.executable, "-u", QUICK_START / "forks.py", str(listening.fileno()), folder]
        server = subprocess.Popen(command, env=variables, pass_fds=[listening.fileno()], stdin=subprocess.PIPE)
    assert server.stdin is not None
    atexit.register(shutil.rmtree, folder)
    atexit.register(server.wait)
    atexit.register(server.stdin.close)
    return folder


def fork_of(process: int) -> int:
    """Return which process does the work of one that was started with `environment(QUICK_START)`."""
    try:
        return int((_forks() / str(process)).readlink().name)
    except FileNotFoundError:
        return process


def small_config(*, moe: bool = False, **settings: Any) -> dict[str, Any]:
    """config.json of a model of two layers over the demo tokenizer; `settings` replace its keys."""
    config = json.loads((DEMO_CHECKPOINT / "config.json").read_text())
    config |= {
        "head_dim": 24,  # not hidden_size / num_attention_heads
        "hidden_size": 64,
        "intermediate_size": 96,
        "max_window_layers": 2,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "rope_theta": 1000000,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }
    return config | (MOE_SETTINGS if moe else {}) | settings


def random_weights(config: dict[str, Any], seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights under the names that SDAR's files have."""
    generator = torch.Generator().manual_seed(seed)
    d, size, vocabulary = config["hidden_size"], config["head_dim"], config["vocab_size"]
    heads, kv_heads = config["num_attention_heads"] * size, config["num_key_value_heads"] * size

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) * 2 / columns**0.5

    def norm(width: int) -> torch.Tensor:
        return 1 + 0.3 * torch.randn(width, generator=generator)

    def mlp(prefix: str, width: int) -> dict[str, torch.Tensor]:
        return {
            f"{prefix}.gate_proj.weight": matrix(width, d),
            f"{prefix}.up_proj.weight": matrix(width, d),
            f"{prefix}.down_proj.weight": matrix(d, width),
        }

    weights = {"model.embed_tokens.weight": torch.randn(vocabulary, d, generator=generator)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        weights |= {
            f"{layer}.input_layernorm.weight": norm(d),
            f"{layer}.post_attention_layernorm.weight": norm(d),
            f"{layer}.self_attn.q_proj.weight": matrix(heads, d),
            f"{layer}.self_attn.k_proj.weight": matrix(kv_heads, d),
            f"{layer}.self_attn.v_proj.weight": matrix(kv_heads, d),
            f"{layer}.self_attn.o_proj.weight": matrix(d, heads),
            f"{layer}.self_attn.q_norm.weight": norm(size),
            f"{layer}.self_attn.k_norm.weight": norm(size),
        }
        if _is_sparse(config, i):
            weights[f"{layer}.mlp.gate.weight"] = matrix(config["num_experts"], d)
            for expert in range(config["num_experts"]):
                weights |= mlp(f"{layer}.mlp.experts.{expert}", config["moe_intermediate_size"])
        else:
            weights |= mlp(f"{layer}.mlp", config["intermediate_size"])
    weights["model.norm.weight"] = norm(d)
    if not config["tie_word_embeddings"]:
        weights["lm_head.weight"] = matrix(vocabulary, d)
    return weights


def write_weights(folder: Path, weights: dict[str, torch.Tensor], shards: int = 1) -> None:
    """Write `model.safetensors`, or several files with their index."""
    if shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for i in range(shards):
        part = dict(list(weights.items())[i::shards])
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(w.nbytes for w in weights.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def random_checkpoint(
    folder: Path, *, moe: bool = False, seed: int = 0, shards: int = 1, leave_out: Sequence[str] = (), **settings: Any
) -> Path:
    """Make `folder` a checkpoint with random float32 weights and the demo's tokenizer, and return it.

    Args:
        folder: made if it is not there.
        moe: SDAR MoE rather than dense.
        seed: seed of the weights.
        shards: weight files; more than one come with an index.
        leave_out: keys that config.json does not name.
        settings: keys of config.json to set.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copyfile(DEMO_CHECKPOINT / name, folder / name)
    config = small_config(moe=moe, **settings)
    if config["vocab_size"] < 711:  # the demo's stop tokens are beyond it
        (folder / "generation_config.json").write_text('{"eos_token_id": 0}')
    write_weights(folder, random_weights(config, seed), shards)
    written = {name: value for name, value in config.items() if name not in leave_out}
    (folder / "config.json").write_text(json.dumps(written))
    return folder


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All weights of a checkpoint's folder by name."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def block_causal(length: int, block_length: int) -> torch.Tensor:
    """(length, length) bool: a token sees its own block and those before."""
    block = torch.arange(length) // block_length
    return block[:, None] >= block


def reference_logits(
    weights: dict[str, torch.Tensor], config: Mapping[str, Any], ids: torch.Tensor, sees: torch.Tensor
) -> torch.Tensor:
    """Logits of Qwen3 or Qwen3-MoE, (N, V), for ids (N,) at positions 0.. under the mask `sees` (N, N)."""
    return reference_forward(weights, config, ids, sees)[0]


def reference_forward(
    weights: dict[str, torch.Tensor],
    config: Mapping[str, Any],
    ids: torch.Tensor,
    sees: torch.Tensor,
    past: KeysValues | None = None,
) -> tuple[torch.Tensor, KeysValues]:
    """One forward of Qwen3 or Qwen3-MoE, by plain tensor algebra.

    Source: modeling_sdar.py and modeling_sdar_moe.py of JetLM's checkpoints, which are transformers 4.52.4's
    modeling_qwen3.py and modeling_qwen3_moe.py but for the mask.

    Args:
        weights: float32, by the names in SDAR's files.
        config: config.json.
        ids: (N,), the tokens at positions P, P + 1, ...
        sees: (N, P + N) bool, which tokens each of them attends to.
        past: keys and values of the P tokens before, (P, heads, size) for each layer; None where P is 0.

    Returns:
        (logits (N, V), keys and values of all P + N tokens for each layer)
    """
    eps, size, n = config["rms_norm_eps"], config["head_dim"], len(ids)

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps) * weights[f"{name}.weight"]

    def mlp(x: torch.Tensor, name: str) -> torch.Tensor:
        gate, up = x @ weights[f"{name}.gate_proj.weight"].T, x @ weights[f"{name}.up_proj.weight"].T
        return (torch.nn.functional.silu(gate) * up) @ weights[f"{name}.down_proj.weight"].T

    positions = torch.arange(sees.shape[1] - n, sees.shape[1])
    frequencies = config["rope_theta"] ** (-torch.arange(0, size, 2) / size)
    angles = torch.outer(positions.float(), frequencies)  # (N, size / 2)

    def rotate(x: torch.Tensor) -> torch.Tensor:  # (N, heads, size)
        a, b = x.chunk(2, dim=-1)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    hidden, kept = weights["model.embed_tokens.weight"][ids], []  # (N, D)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        x = norm(hidden, f"{layer}.input_layernorm")
        q, k, v = ((x @ weights[f"{layer}.self_attn.{name}_proj.weight"].T).view(n, -1, size) for name in "qkv")
        q, k = rotate(norm(q, f"{layer}.self_attn.q_norm")), rotate(norm(k, f"{layer}.self_attn.k_norm"))
        if past is not None:
            k, v = torch.cat([past[i][0], k]), torch.cat([past[i][1], v])
        kept.append((k, v))
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / size**0.5
        attention = scores.masked_fill(~sees, -torch.inf).softmax(-1)
        out = torch.einsum("hqk,khd->qhd", attention, v).reshape(n, -1)
        hidden = hidden + out @ weights[f"{layer}.self_attn.o_proj.weight"].T
        x = norm(hidden, f"{layer}.post_attention_layernorm")
        if f"{layer}.mlp.gate.weight" not in weights:
            hidden = hidden + mlp(x, f"{layer}.mlp")
            continue
        share, chosen = (x @ weights[f"{layer}.mlp.gate.weight"].T).softmax(-1).topk(config["num_experts_per_tok"])
        if config["norm_topk_prob"]:
            share = share / share.sum(-1, keepdim=True)
        experts = torch.stack([mlp(x, f"{layer}.mlp.experts.{e}") for e in range(config["num_experts"])], dim=1)
        hidden = hidden + (experts.gather(1, chosen[..., None].expand(-1, -1, x.shape[-1])) * share[..., None]).sum(1)
    head = "model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"
    return norm(hidden, "model.norm") @ weights[head].T, kept


def _is_sparse(config: dict[str, Any], layer: int) -> bool:
    """Whether a layer holds experts. Source: Qwen3MoeDecoderLayer."""
    return (
        config["model_type"] == "sdar_moe"
        and layer not in config["mlp_only_layers"]
        and (layer + 1) % config["decoder_sparse_step"] == 0
    )
