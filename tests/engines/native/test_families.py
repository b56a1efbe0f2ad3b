"""A model family that consists of one file in the folder of families is opened, checked, decoded and scored."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import oracle
import pytest
import torch
from asking import run
from support import random_checkpoint, random_weights, small_config, write_weights

from sdar_lm_eval import Checkpoint, DecodingConfig, GenerationRequest, UserError, families, make_engine
from sdar_lm_eval.engines.types import LikelihoodConfig, ScoreRequest
from sdar_lm_eval.families import FAMILIES

# Qwen2 has biases of queries, keys and values, and no norms of heads.
FILE = """
from sdar_lm_eval.families.base import Family


def weights(config):
    d, width = config.hidden_size, config.intermediate_size
    size = d // config.num_attention_heads
    kv = config.num_key_value_heads * size
    shapes = {
        "model.embed_tokens.weight": (config.vocab_size, d),
        "model.norm.weight": (d,),
        "lm_head.weight": (config.vocab_size, d),
    }
    of_a_layer = {
        "input_layernorm.weight": (d,), "post_attention_layernorm.weight": (d,), "self_attn.o_proj.weight": (d, d),
        "self_attn.q_proj.weight": (d, d), "self_attn.k_proj.weight": (kv, d), "self_attn.v_proj.weight": (kv, d),
        "self_attn.q_proj.bias": (d,), "self_attn.k_proj.bias": (kv,), "self_attn.v_proj.bias": (kv,),
        "mlp.gate_proj.weight": (width, d), "mlp.up_proj.weight": (width, d), "mlp.down_proj.weight": (d, width),
    }
    for i in range(config.num_hidden_layers):
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in of_a_layer.items()}
    return shapes


FAMILIES = (
    Family(
        "toy", "Qwen2Config", "Qwen2ForCausalLM",
        settings=("hidden_size", "intermediate_size", "max_position_embeddings", "num_attention_heads",
                  "num_hidden_layers", "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings", "vocab_size"),
        defaults={"vocab_size": 711, "max_position_embeddings": 2048}, is_moe=False, weights=weights,
        count=lambda config: 12 * config["num_hidden_layers"],
    ),
)
"""


def set_model_type(folder: Path, model_type: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": model_type}))


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "toy.py").write_text(FILE)
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(tmp_path)])
    found = families.discover()
    monkeypatch.delitem(sys.modules, f"{families.__name__}.toy")
    assert found.keys() - FAMILIES.keys() == {"toy"}
    monkeypatch.setitem(FAMILIES, "toy", found["toy"])


@pytest.fixture
def checkpoint(added: None, tmp_path: Path) -> Checkpoint:
    folder = random_checkpoint(tmp_path / "toy-b8", head_dim=16, block_size=8)
    weights = random_weights(small_config(head_dim=16))
    for name in [name for name in weights if name.endswith(("q_norm.weight", "k_norm.weight"))]:
        del weights[name]
    for name in [name for name in weights if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))]:
        weights[name.replace(".weight", ".bias")] = torch.randn(len(weights[name])) / 4
    write_weights(folder, weights)
    set_model_type(folder, "toy")
    return Checkpoint.open(str(folder))


@pytest.mark.parametrize("kernels", [False, True], ids=["modules", "kernels"])
def test_its_answers(checkpoint: Checkpoint, kernels: bool) -> None:
    """Kernels draw the tokens; the family has no weights for the fused decoder."""
    if kernels:
        pytest.importorskip("triton")
    assert (checkpoint.block_length, checkpoint.is_moe) == (8, False)
    engine = make_engine("native", checkpoint, device="cpu", kernels=kernels)
    model = checkpoint.load_model(dtype=torch.float32, device="cpu", attention="sdpa")
    decodings = [DecodingConfig(8, temperature=0), DecodingConfig(4, 2, "sequential", temperature=1.0)]
    requests = [GenerationRequest(tuple(range(5, 11 + i)), 11, d, seed=i) for i, d in enumerate(decodings)]
    for request, result in zip(requests, run(engine, requests), strict=True):
        tokens, reason, *_ = oracle.generate(model, checkpoint.mask_token_id, request)
        assert (list(result.token_ids), result.finish_reason) == (tokens, reason)


def test_its_log_likelihoods(checkpoint: Checkpoint) -> None:
    """The score of one token after a context is the log-softmax at the masked position."""
    engine = make_engine("native", checkpoint, device="cpu")
    context, token = tuple(range(5, 14)), 17
    ((_, score),) = engine.score([ScoreRequest(context, (token,))], LikelihoodConfig(block_length=8))
    model = checkpoint.load_model(dtype=torch.float32, device="cpu", attention="sdpa")
    mask_id = checkpoint.mask_token_id
    ids = torch.tensor([[*context, *[mask_id] * (16 - len(context))]])
    with torch.no_grad():
        logits = model(ids, attention_mask=oracle.block_causal_mask(16, 8)).logits[0, len(context)]
    logits[mask_id] = -torch.inf
    assert score.log_likelihood == pytest.approx(float(logits.log_softmax(-1)[token]), abs=1e-4)


def test_its_weights_are_checked(checkpoint: Checkpoint) -> None:
    set_model_type(checkpoint.folder, "sdar")
    with pytest.raises(UserError, match=r"missing: model\.layers\.0\.self_attn\.k_norm\.weight.*unexpected: .*bias"):
        Checkpoint.open(str(checkpoint.folder)).check_weights()


def test_messages_name_it(checkpoint: Checkpoint) -> None:
    set_model_type(checkpoint.folder, "llama")
    with pytest.raises(UserError, match=r"'sdar' and 'sdar_moe' and 'toy'"):
        Checkpoint.open(str(checkpoint.folder))


def test_the_folder_is_the_list() -> None:
    files = {file.stem for file in (Path(families.__file__).parent).glob("*.py")} - {"__init__", "base"}
    assert files == {family.weights.__module__.rpartition(".")[2] for family in FAMILIES.values()}
