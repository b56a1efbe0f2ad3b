from __future__ import annotations

import json
import re
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from editing import IDS, JSON, assert_reference, edit_json, edit_weights, load
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    block_causal,
    random_checkpoint,
    random_weights,
    read_weights,
    reference_logits,
    small_config,
    write_weights,
)

from sdar_lm_eval.checkpoint import Checkpoint
from sdar_lm_eval.checkpoint import weights as module
from sdar_lm_eval.decoding import DecodingConfig
from sdar_lm_eval.engines.registry import make_engine
from sdar_lm_eval.engines.types import GenerationRequest
from sdar_lm_eval.errors import UserError
from sdar_lm_eval.families import FAMILIES

# The model


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("moe", [False, True])
def test_logits_are_those_of_the_model_written_out(tmp_path: Path, moe: bool, attention: str) -> None:
    assert_reference(random_checkpoint(tmp_path, moe=moe), small_config(moe=moe), attention)


@pytest.mark.parametrize(
    ("moe", "changes"),
    [
        (False, {"rope_theta": 10000}),
        (False, {"rope_theta": 500000.0, "rms_norm_eps": 0.5}),
        (False, {"tie_word_embeddings": True}),
        (False, {"head_dim": 16, "num_key_value_heads": 1}),
        (False, {"num_key_value_heads": 4}),
        (True, {"rope_theta": 10000, "rms_norm_eps": 0.5}),
        (True, {"norm_topk_prob": False}),
        (True, {"num_experts": 3, "num_experts_per_tok": 3}),
        (True, {"decoder_sparse_step": 2}),
        (True, {"mlp_only_layers": [0]}),
        (True, {"tie_word_embeddings": True}),
    ],
)
def test_every_setting_arrives(tmp_path: Path, moe: bool, changes: dict[str, Any]) -> None:
    assert_reference(random_checkpoint(tmp_path, moe=moe, **changes), small_config(moe=moe, **changes))


@pytest.mark.parametrize("moe", [False, True])
def test_settings_as_transformers_5_writes_them(tmp_path: Path, moe: bool) -> None:
    folder = random_checkpoint(tmp_path, moe=moe, leave_out=("rope_theta", "rope_scaling", "torch_dtype"))
    rope = {"rope_type": "default", "rope_theta": 1000000}
    edit_json(folder / "config.json", rope_parameters=rope, dtype="float32", layer_types=["full_attention"] * 2)
    assert_reference(folder, small_config(moe=moe))


@pytest.mark.parametrize("moe", [False, True])
@pytest.mark.parametrize("new", [False, True])
def test_rope_scaling_arrives_with_its_base(tmp_path: Path, moe: bool, new: bool) -> None:
    folder = random_checkpoint(tmp_path, moe=moe, leave_out=("rope_theta", "rope_scaling"))
    scaling: dict[str, Any] = {"rope_type": "linear", "factor": 4.0}
    if new:
        edit_json(folder / "config.json", rope_parameters=scaling | {"rope_theta": 70000.0})
    else:
        edit_json(folder / "config.json", rope_scaling=scaling, rope_theta=70000.0)
    expected = 70000.0 ** (-torch.arange(0, 24, 2) / 24) / 4
    torch.testing.assert_close(load(folder).model.rotary_emb.inv_freq, expected)


def test_a_moe_without_head_dim(tmp_path: Path) -> None:
    config = small_config(moe=True, head_dim=16)
    folder = random_checkpoint(tmp_path, moe=True, head_dim=16, leave_out=("head_dim",))
    assert load(folder).config.head_dim == 16  # hidden_size / num_attention_heads; the engine sizes its cache by it
    assert_reference(folder, config)


@pytest.mark.parametrize("moe", [False, True])
def test_several_files(tmp_path: Path, moe: bool) -> None:
    folder = random_checkpoint(tmp_path, moe=moe, shards=3)
    assert len(Checkpoint.open(str(folder)).weight_files()) == 3
    assert_reference(folder, small_config(moe=moe))


def test_a_single_file_wins_over_an_index(tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path, shards=2)
    write_weights(folder, random_weights(small_config(), seed=5))
    assert Checkpoint.open(str(folder)).weight_files() == [folder / "model.safetensors"]
    assert torch.equal(load(folder).lm_head.weight, random_weights(small_config(), seed=5)["lm_head.weight"])


def test_tied_embeddings_stay_tied_whatever_head_the_file_holds(tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path, tie_word_embeddings=True)
    edit_weights(folder, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"] * 2}))
    assert_reference(folder, small_config(tie_word_embeddings=True))


def test_names_that_hold_nothing_are_passed_over(tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path)
    edit_weights(folder, lambda w: w.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(12)}))
    assert_reference(folder, small_config())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("moe", [False, True])
def test_dtype(tmp_path: Path, dtype: torch.dtype, moe: bool) -> None:
    model = load(random_checkpoint(tmp_path, moe=moe), dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_the_layout_is_that_of_transformers(bias: bool, tied: bool) -> None:
    config = small_config(attention_bias=bias, tie_word_embeddings=tied)
    theirs = transformers.Qwen3Config(**{k: v for k, v in config.items() if k not in ("model_type", "architectures")})
    with torch.device("meta"):
        model = transformers.Qwen3ForCausalLM(theirs)
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    if tied:
        expected.pop("lm_head.weight", None)  # named or not, as the version has it
    assert FAMILIES["sdar"].weights(theirs) == expected


def test_an_unknown_attention_is_our_mistake(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="nonesuch"):
        load(random_checkpoint(tmp_path), attention="nonesuch")


def test_loading_is_silent(tmp_path: Path, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder) -> None:
    load(random_checkpoint(tmp_path, shards=2))
    assert capfd.readouterr() == ("", "")
    assert [str(w.message) for w in recwarn] == []


@pytest.mark.parametrize("moe", [False, True])
def test_the_native_engine_runs_it(tmp_path: Path, moe: bool) -> None:
    """Greedy, one token a step from left to right: each is the argmax of the model written out."""
    folder = random_checkpoint(tmp_path, moe=moe, seed=3)
    config, weights = small_config(moe=moe), read_weights(folder)
    prompt = IDS[:7].tolist()
    decoding = DecodingConfig(remasking_strategy="sequential", temperature=0)
    request = GenerationRequest(tuple(prompt), max_new_tokens=9, decoding=decoding)
    [(_, result)] = make_engine("native", Checkpoint.open(str(folder)), device="cpu").generate([request])

    tokens = list(prompt)
    while len(tokens) < len(prompt) + 9:
        masked = tokens + [config["mask_token_id"]] * (-len(tokens) % 4 or 4)
        logits = reference_logits(weights, config, torch.tensor(masked), block_causal(len(masked), 4))[len(tokens)]
        logits[config["mask_token_id"]] = -torch.inf
        tokens.append(int(logits.argmax()))
    assert list(result.token_ids) == tokens[len(prompt) :]


# Weights that do not fit


def put(name: str, *shape: int) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda weights: weights.update({name: torch.zeros(shape)})


def take(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda weights: [weights.pop(key) for key in list(weights) if key.startswith(name)] and None


@pytest.mark.parametrize(
    ("moe", "change", "message"),
    [
        (False, take("model.layers.1.mlp.up_proj.weight"), "missing: model.layers.1.mlp.up_proj.weight."),
        (False, take("lm_head.weight"), "missing: lm_head.weight."),
        (False, put("model.layers.2.mlp.up_proj.weight", 96, 64), "unexpected: model.layers.2.mlp.up_proj.weight."),
        (False, put("model.layers.0.self_attn.q_proj.bias", 96), "unexpected: model.layers.0.self_attn.q_proj.bias."),
        (False, put("model.embed_tokens.weight", 700, 64),
         "of another shape: model.embed_tokens.weight [700, 64] in place of [711, 64]."),
        (True, take("model.layers.1.mlp.experts.3.up_proj"), "missing: model.layers.1.mlp.experts.3.up_proj.weight."),
        (True, take("model.layers.0.mlp.gate.weight"), "missing: model.layers.0.mlp.gate.weight."),
        (True, put("model.layers.0.mlp.experts.6.up_proj.weight", 32, 64),
         "unexpected: model.layers.0.mlp.experts.6.up_proj.weight."),
        (True, put("model.layers.0.mlp.experts.2.down_proj.weight", 64, 31),
         "of another shape: model.layers.0.mlp.experts.2.down_proj.weight [64, 31] in place of [64, 32]."),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_are_named(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], moe: bool, change: Any, message: str
) -> None:
    folder = random_checkpoint(tmp_path, moe=moe)
    edit_weights(folder, change)
    with pytest.raises(UserError, match=re.escape(f"do not fit its config.json; {message}")):
        load(folder)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("prefix", "message"), [
    ("model.layers.1", r"missing: model\.layers\.1\.input_layernorm\.weight, .* and 6 more\."),
    ("", r"missing: lm_head\.weight, model\.embed_tokens\.weight, .* and 20 more\."),
])  # fmt: skip
def test_many_missing_weights_are_counted(tmp_path: Path, prefix: str, message: str) -> None:
    folder = random_checkpoint(tmp_path)
    edit_weights(folder, take(prefix))
    with pytest.raises(UserError, match=message):
        load(folder)


def test_everything_wrong_is_one_error(tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path)
    edit_weights(folder, take("lm_head.weight"))
    edit_weights(folder, put("x", 1))
    edit_weights(folder, put("model.norm.weight", 1))
    with pytest.raises(
        UserError, match=r"missing: lm_head\.weight; unexpected: x; of another shape: model\.norm\.weight"
    ):
        load(folder)


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1])
def test_files_cut_short_are_named(tmp_path: Path, keep: int) -> None:
    folder = random_checkpoint(tmp_path, shards=2)
    file = folder / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(
        UserError, match=r"model-00002-of-00002\.safetensors is not a whole safetensors file.*Download it"
    ):
        load(folder)


HEADER = st.binary(max_size=60) | st.dictionaries(
    st.text(max_size=3),
    JSON | st.fixed_dictionaries({"shape": JSON, "data_offsets": st.lists(st.integers(0, 9), max_size=3) | JSON}),
    max_size=3,
).map(lambda header: json.dumps(header).encode())


@settings(max_examples=200, deadline=None)
@given(header=HEADER, data=st.binary(max_size=9), length=st.none() | st.integers(0, 2**64 - 1))
def test_any_bytes_are_whole_or_a_user_error(header: bytes, data: bytes, length: int | None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)
        try:
            shapes = module.read_shapes(path)
        except UserError:
            return
        assert all(isinstance(shape, tuple) for shape in shapes.values())


def test_no_weights_at_all(tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"has no weights: .* neither model\.safetensors nor model\.safetensors\.index"):
        load(folder)


def test_a_file_of_the_index_is_missing(tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path, shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(
        UserError, match=r"its index names model-00002-of-00003\.safetensors, which .* Download it again"
    ):
        load(folder)


@pytest.mark.parametrize(
    "index", [{}, {"weight_map": []}, {"weight_map": {"a": 3}}, {"weight_map": {"a": "../model.safetensors"}}]
)
def test_a_broken_index(tmp_path: Path, index: Any) -> None:
    folder = random_checkpoint(tmp_path, shards=3)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"index\.json has no weight_map"):
        load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_sliding_window": True, "sliding_window": 8}, "use_sliding_window"),
        ({"hidden_size": "64"}, "hidden_size|do not fit"),
        ({"num_hidden_layers": None}, r"config\.json"),
        ({"hidden_act": "nonesuch"}, "nonesuch"),
    ],
)
def test_a_configuration_that_cannot_be_used(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    folder = random_checkpoint(tmp_path)
    edit_json(folder / "config.json", **changes)
    with pytest.raises(UserError, match=message):
        load(folder)


def test_a_device_without_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = random_checkpoint(tmp_path)
    size = sum(weight.nbytes for weight in read_weights(folder).values())
    monkeypatch.setattr(module, "free_memory", lambda device: size)
    load(folder)
    monkeypatch.setattr(module, "free_memory", lambda device: size - 1)
    with pytest.raises(UserError, match=r"take 0\.0 GiB as float32, but cpu has 0\.0 GiB free\. .* smaller dtype"):
        load(folder)
    load(folder, dtype=torch.bfloat16)

    def too_large(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("tried to allocate")

    monkeypatch.setattr(transformers.Qwen3ForCausalLM, "from_pretrained", too_large)
    with pytest.raises(UserError, match=r"do not fit on cpu: tried to allocate Choose a smaller dtype"):
        load(folder, dtype=torch.bfloat16)


def test_weights_go_to_the_device(tmp_path: Path) -> None:
    """The one that every machine has beside its CPU."""
    assert {weight.device.type for weight in load(random_checkpoint(tmp_path), device="meta").parameters()} == {"meta"}


def test_the_memory_that_a_gpu_has_for_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """What nobody has, and what torch has and does not use."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 50)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 20)
    assert module.free_memory(torch.device("cuda:1")) == 130
    assert module.free_memory(torch.device("cpu")) is None
