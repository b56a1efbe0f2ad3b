from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    QUICK_START,
    REAL_FOLDER,
    block_causal,
    environment,
    random_checkpoint,
    random_weights,
    read_weights,
    reference_logits,
    small_config,
    write_weights,
)

from sdar_lm_eval import checkpoint as module
from sdar_lm_eval.checkpoint import Checkpoint
from sdar_lm_eval.demo import CHECKPOINT as DEMO
from sdar_lm_eval.engines.base import DecodingConfig, GenerationRequest, make_engine
from sdar_lm_eval.errors import UserError

IDS = torch.randint(0, 700, (18,), generator=torch.Generator().manual_seed(1))


def load(folder: Path, **settings: Any) -> Any:
    defaults: dict[str, Any] = {"dtype": torch.float32, "device": "cpu", "attention": "sdpa"}
    return Checkpoint.open(str(folder)).load_model(**(defaults | settings))


def edit_json(path: Path, leave_out: tuple[str, ...] = (), **changes: Any) -> None:
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if key not in leave_out}))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = read_weights(folder)
    change(weights)
    write_weights(folder, weights)


# No code of a checkpoint runs, nothing waits, nothing is fetched


@pytest.fixture
def trap(tmp_path: Path) -> Path:
    """A checkpoint whose every Python file and pickle leaves `MARK` behind when it runs."""
    folder = random_checkpoint(tmp_path / "trap")
    code = f"from pathlib import Path\nPath({str(folder / 'MARK')!r}).touch()\n"
    (folder / "custom_generate").mkdir()
    for name in ("configuration_sdar", "modeling_sdar", "tokenization_qwen2", "tokenization_qwen2_fast",
                 "custom_generate/generate", "__init__"):  # fmt: skip
        (folder / f"{name}.py").write_text(code)
    touch = f"cposix\nsystem\n(Vtouch {folder / 'MARK'}\ntR.".encode()
    for name in ("pytorch_model.bin", "adapter_model.bin"):
        (folder / name).write_bytes(touch)
    (folder / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": str(folder), "peft_type": "LORA"})
    )
    edit_json(
        folder / "config.json",
        auto_map={
            "AutoConfig": "configuration_sdar.SDARConfig",
            "AutoModel": "modeling_sdar.SDARModel",
            "AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM",
        },
    )
    edit_json(
        folder / "tokenizer_config.json",
        tokenizer_class="Qwen2Tokenizer",
        auto_map={"AutoTokenizer": ["tokenization_qwen2.Qwen2Tokenizer", "tokenization_qwen2_fast.Qwen2TokenizerFast"]},
    )
    return folder


def test_no_code_of_a_checkpoint_runs_and_nothing_is_asked_or_fetched(
    trap: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("asked, or called out")

    monkeypatch.setattr("builtins.input", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    checkpoint = Checkpoint.open(str(trap))
    assert checkpoint.tokenizer.encode("<|im_end|>") == [709]
    checkpoint.load_model(dtype=torch.float32, device="cpu", attention="sdpa")
    assert checkpoint.fingerprint
    assert not (trap / "MARK").exists()


def test_transformers_sees_links_to_the_weights_alone(trap: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Path] = {}
    original = transformers.Qwen3ForCausalLM.from_pretrained

    def from_pretrained(folder: str, **arguments: Any) -> Any:
        seen.update({path.name: path.resolve() for path in Path(folder).iterdir()})
        return original(folder, **arguments)

    monkeypatch.setattr(transformers.Qwen3ForCausalLM, "from_pretrained", from_pretrained)
    load(trap)
    assert seen.pop("model.safetensors") == (trap / "model.safetensors").resolve()
    assert seen.pop("generation_config.json").parent != trap.resolve()
    assert not seen


def test_the_trap_works(trap: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The usual way, with the answer that it asks for."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    with contextlib.suppress(AttributeError):  # the file has no SDARConfig
        transformers.AutoConfig.from_pretrained(trap, trust_remote_code=True)
    assert (trap / "MARK").exists()


def test_the_harness_model_asks_nobody(trap: Path, hub: Path, tmp_path: Path) -> None:
    """lm_eval's model in a process of its own, of a folder and of a hub id in an offline cache.

    First nobody types on the terminal that the process reads, then that is the end of a pipe that was closed.
    """
    program = tmp_path / "program.py"
    program.write_text(f"""
import os
import huggingface_hub.constants
from sdar_lm_eval.lm.model import SDARLM
huggingface_hub.constants.HF_HUB_CACHE = {str(hub.parents[2])!r}
huggingface_hub.constants.HF_HUB_OFFLINE = True
SDARLM(pretrained={str(trap)!r}, device='cpu', max_gen_toks=8)
reading, writing = os.pipe()
os.close(writing)
os.dup2(reading, 0)
SDARLM(pretrained={ID!r}, device='cpu', max_gen_toks=8)
""")
    keyboard, terminal = pty.openpty()
    try:
        ran = subprocess.run(
            [sys.executable, program],
            stdin=terminal, capture_output=True, text=True, timeout=120, env=environment(QUICK_START), check=False,
        )  # fmt: skip
    finally:
        os.close(keyboard)
        os.close(terminal)
    assert ran.returncode == 0, ran.stderr
    assert "deprecated" not in ran.stderr
    assert not (trap / "MARK").exists()


# From the hub

ID = "JetLM/SDAR-Tiny-Chat-b8"


@pytest.fixture
def hub(trap: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache that holds two revisions of `ID` as links to blobs, and no network; returns the folder of `main`."""
    cache = tmp_path / "hub"
    repository = cache / f"models--{ID.replace('/', '--')}"
    for revision, seed in [("main", 0), ("v1", 1)]:
        commit = revision.encode().hex().ljust(40, "0")
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "blobs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
        snapshot = repository / "snapshots" / commit
        snapshot.mkdir(parents=True)
        write_weights(trap, random_weights(small_config(), seed))
        edit_json(trap / "config.json", leave_out=("block_size",))
        for file in trap.glob("*.*"):
            blob = repository / "blobs" / f"{revision}-{file.name}"
            shutil.copyfile(file, blob)
            (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return repository / "snapshots" / b"main".hex().ljust(40, "0")


def test_opens_a_cached_hub_id_offline(hub: Path, trap: Path) -> None:
    checkpoint = Checkpoint.open(ID)
    assert checkpoint.folder == hub
    assert checkpoint.name == checkpoint.tokenizer.name_or_path == ID
    assert checkpoint.block_length == 8
    got = checkpoint.load_model(dtype=torch.float32, device="cpu", attention="sdpa").lm_head.weight
    assert torch.equal(got, random_weights(small_config(), 0)["lm_head.weight"])
    assert not (trap / "MARK").exists()


def test_a_revision_is_another_snapshot(hub: Path) -> None:
    main, v1 = Checkpoint.open(ID), Checkpoint.open(ID, "v1")
    assert v1.revision == "v1"
    assert v1.folder.name == b"v1".hex().ljust(40, "0")
    assert v1.fingerprint != main.fingerprint


@pytest.mark.parametrize(("name", "revision"), [("JetLM/not-there", None), (ID, "not-there")])
def test_what_the_hub_does_not_have_is_one_error(hub: Path, name: str, revision: str | None) -> None:
    with pytest.raises(UserError, match=r"not-there.*cannot be had from the hub.*Check the id and the network"):
        Checkpoint.open(name, revision)


def test_downloads_neither_code_nor_pickles(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.utils import filter_repo_objects

    asked: dict[str, Any] = {}

    def snapshot_download(name: str, **arguments: Any) -> str:
        asked.update(arguments, name=name)
        return str(DEMO)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    Checkpoint.open("JetLM/SDAR-4B-Chat", "main")
    assert (asked["name"], asked["revision"]) == ("JetLM/SDAR-4B-Chat", "main")
    needed = [*module.TOKENIZER_FILES, "config.json", "generation_config.json", "model.safetensors.index.json",
              "model.safetensors", "model-00001-of-00002.safetensors"]  # fmt: skip
    harmful = ["modeling_sdar.py", "tokenization_qwen2.py", "pytorch_model.bin", "x.pt", "x.pth", "x.pkl", "x.ckpt",
               "a/b.py", "x.pyc", "x.so", "training_args.bin", "config.json.py", "model.gguf", "README.md"]  # fmt: skip
    kept = filter_repo_objects([*needed, *harmful], allow_patterns=asked["allow_patterns"])
    assert sorted(kept) == sorted(needed)


@pytest.mark.parametrize("name", ["nowhere", "/no/where", "./no/where", "~/no-where", "../x", "a/b/c", "a b/c"])
def test_a_path_that_is_not_there_is_not_looked_up_on_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    monkeypatch.chdir(tempfile.gettempdir())
    with pytest.raises(UserError, match="no such folder"):
        Checkpoint.open(name)


def test_only_hub_ids_have_revisions(tmp_path: Path) -> None:
    for name in (str(random_checkpoint(tmp_path)), "demo"):
        with pytest.raises(UserError, match=r"revision='main' was given, but .* is a folder"):
            Checkpoint.open(name, "main")


# What a checkpoint says of itself


def test_the_demo_checkpoint() -> None:
    demo = Checkpoint.open("demo")
    assert demo.folder == DEMO
    assert (demo.is_moe, demo.block_length, demo.max_length) == (False, 4, 2048)
    assert demo.mask_token_id == demo.tokenizer.mask_token_id
    assert demo.tokenizer.convert_ids_to_tokens(list(demo.stop_ids)) == ["<|im_end|>", "<|endoftext|>"]
    assert demo.decode(demo.tokenizer.encode("<|im_start|> 12 ,  x<|im_end|>")) == " 12 ,  x"
    assert sum(path.stat().st_size for path in DEMO.iterdir()) < 8_000_000


def test_values_that_config_json_lacks_come_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(module.logger, "warning", lambda text, *values: said.append(text % values))
    lacking = ("block_size", "mask_token_id", "eos_token_id", "max_position_embeddings")
    folder = random_checkpoint(tmp_path, leave_out=lacking)
    (folder / "generation_config.json").unlink()
    checkpoint = Checkpoint.open(str(folder))
    assert (checkpoint.mask_token_id, checkpoint.stop_ids) == (710, (707,))  # the tokenizer's
    assert (checkpoint.block_length, checkpoint.max_length) == (4, 32768)
    assert ["4 is assumed. Give block_length=N" in text for text in said] == [True]


@pytest.mark.parametrize(
    ("name", "keys", "expected"),
    [
        ("SDAR-8B-Chat-b32", {}, 32),
        ("SDAR-8B-Chat-b32", {"block_size": 4}, 4),
        ("SDAR-8B-Chat", {"block_length": 16}, 16),
        ("SDAR-8B-Chat", {"block_size": None, "block_length": 8}, 8),
        ("SDAR-8B-Chat", {}, 4),
        ("SDAR-b8-Chat", {}, 4),
        ("SDAR-8B-Chat-b0", {}, 4),
    ],
)
def test_block_length(tmp_path: Path, name: str, keys: dict[str, Any], expected: int) -> None:
    folder = random_checkpoint(tmp_path / name, leave_out=("block_size",))
    edit_json(folder / "config.json", **keys)
    assert Checkpoint.open(f"{folder}/").block_length == expected


def test_stop_ids_of_config_json(tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path, eos_token_id=[5, 6])
    edit_json(folder / "generation_config.json", eos_token_id=None)
    assert Checkpoint.open(str(folder)).stop_ids == (5, 6)


def test_other_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'llama'.*'sdar' and 'sdar_moe'.*--model hf"):
        Checkpoint.open(str(random_checkpoint(tmp_path, model_type="llama")))


def test_a_folder_without_config_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.json"):
        Checkpoint.open(str(tmp_path))


def test_a_checkpoint_without_a_mask_token_is_refused(tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path, leave_out=("mask_token_id",))
    edit_json(folder / "tokenizer_config.json", leave_out=("mask_token",))
    with pytest.raises(UserError, match="names no mask token"):
        Checkpoint.open(str(folder))


@pytest.mark.parametrize(
    ("key", "value"),
    [("mask_token_id", 711), ("mask_token_id", "x"), ("block_size", 0), ("block_size", "4"), ("vocab_size", None),
     ("max_position_embeddings", 2.5), ("eos_token_id", ["x"]), ("mask_token_id", -1)],
)  # fmt: skip
def test_values_out_of_range_are_named(tmp_path: Path, key: str, value: Any) -> None:
    folder = random_checkpoint(tmp_path)
    (folder / "generation_config.json").unlink()
    edit_json(folder / "config.json", **{key: value})
    if value is None:
        assert Checkpoint.open(str(folder)).config[key] is None
        return
    with pytest.raises(UserError, match=key):
        Checkpoint.open(str(folder))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
READ = [
    "model_type",
    "mask_token_id",
    "eos_token_id",
    "block_size",
    "block_length",
    "vocab_size",
    "max_position_embeddings",
]


@settings(max_examples=150, deadline=None)
@given(values=st.dictionaries(st.sampled_from(READ), JSON))
def test_any_config_json_opens_or_is_a_user_error(values: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for file in DEMO.iterdir():
            if file.name not in ("model.safetensors", "config.json"):
                (Path(folder) / file.name).symlink_to(file)
        (Path(folder) / "config.json").write_text(json.dumps(small_config() | values))
        try:
            checkpoint = Checkpoint.open(folder)
        except UserError:
            return
        assert checkpoint.block_length >= 1
        assert checkpoint.max_length >= 1
        assert isinstance(checkpoint.mask_token_id, int)
        assert all(isinstance(token, int) for token in checkpoint.stop_ids)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", b""])
def test_broken_json_is_named(tmp_path: Path, content: bytes) -> None:
    folder = random_checkpoint(tmp_path)
    (folder / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=r"config\.json"):
        Checkpoint.open(str(folder))


# Tokenizers


def test_the_tokenizer_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = random_checkpoint(tmp_path, leave_out=("mask_token_id",))
    opened = []
    read = module._open_tokenizer
    monkeypatch.setattr(module, "_open_tokenizer", lambda *a: opened.append(a) or read(*a))
    assert Checkpoint.open(str(folder)).tokenizer.mask_token_id == 710
    assert len(opened) == 1


@pytest.mark.parametrize("tokenizer_class", [None, "TokenizersBackend", "Qwen2Tokenizer", "Qwen2TokenizerFast"])
def test_tokenizer_classes_of_every_transformers(tmp_path: Path, tokenizer_class: str | None) -> None:
    folder = random_checkpoint(tmp_path)
    changes = {"tokenizer_class": tokenizer_class} if tokenizer_class else {}
    edit_json(folder / "tokenizer_config.json", leave_out=() if changes else ("tokenizer_class",), **changes)
    tokenizer = Checkpoint.open(str(folder)).tokenizer
    assert tokenizer.encode("<|im_start|>user 12") == Checkpoint.open("demo").tokenizer.encode("<|im_start|>user 12")
    assert (tokenizer.eos_token, tokenizer.mask_token) == ("<|endoftext|>", "<|MASK|>")


def test_a_tokenizer_without_settings(tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path)
    (folder / "tokenizer_config.json").unlink()
    assert Checkpoint.open(str(folder)).tokenizer.encode("<|im_start|>") == [708]


def test_tokenizers_that_cannot_be_read(tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer of checkpoint .* cannot be read"):
        _ = Checkpoint.open(str(folder)).tokenizer
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"has no tokenizer: .* no tokenizer\.json"):
        _ = Checkpoint.open(str(folder)).tokenizer


# The model


def assert_reference(folder: Path, config: dict[str, Any], attention: str = "sdpa") -> None:
    sees = block_causal(len(IDS), 4)
    mask = sees if attention == "sdpa" else torch.where(sees, 0.0, torch.finfo(torch.float32).min)
    model = load(folder, attention=attention)
    got = model(input_ids=IDS[None], attention_mask=mask[None, None]).logits[0]
    expected = reference_logits(read_weights(folder), config, IDS, sees)
    assert expected.std() > 1
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    assert not got.requires_grad
    assert not model.training


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
    assert module._layout(theirs, is_moe=False) == expected


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
            shapes = module._read_shapes(path)
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
    monkeypatch.setattr(module, "_free_memory", lambda device: size)
    load(folder)
    monkeypatch.setattr(module, "_free_memory", lambda device: size - 1)
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
    assert module._free_memory(torch.device("cuda:1")) == 130
    assert module._free_memory(torch.device("cpu")) is None


# The fingerprint


def test_the_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    first = random_checkpoint(tmp_path / "a")
    same = Path(shutil.copytree(first, tmp_path / "b"))
    print_of = lambda folder: Checkpoint.open(str(folder)).fingerprint  # noqa: E731
    assert print_of(first) == print_of(same)
    assert print_of(random_checkpoint(tmp_path / "c", seed=1)) != print_of(first)
    seen = {print_of(first)}
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        edit_json(same / name, comment="x")
        seen.add(print_of(same))
    for name in ("tokenizer.json", "chat_template.jinja"):
        with (same / name).open("a") as file:
            file.write(" ")
        seen.add(print_of(same))
    assert len(seen) == 6


# The real folder

real = pytest.mark.skipif(not REAL_FOLDER.is_dir(), reason=f"needs SDAR-4B-Chat's folder in {REAL_FOLDER}")

# Of transformers 4.52.4's Qwen2Tokenizer (the slow one, which the checkpoint's own code is a copy of).
# fmt: off
ENCODED = [
    ("Hello, world!", [9707, 11, 1879, 0]),
    ("1234567890 3.14159 1,000,000",
     [16, 17, 18, 19, 20, 21, 22, 23, 24, 15, 220, 18, 13, 16, 19, 16, 20, 24, 220, 16, 11, 15, 15, 15, 11, 15,
      15, 15]),
    ("  two  spaces\tand\ttabs \n\n\nlines\r\n  indented",
     [220, 1378, 220, 12621, 52477, 3244, 3435, 14731, 7969, 319, 220, 1257, 15864]),
    ("don't I'LL we've 'S", [15007, 944, 358, 6, 4086, 582, 3003, 364, 50]),
    ("naïve café — “quotes” … №5 ½ ²",
     [3376, 37572, 586, 51950, 1959, 1036, 53282, 854, 4593, 96890, 20, 220, 26062, 220, 29456]),
    ("e\u0301 vs \xe9", [963, 6165, 3958]),
    ("日本語とCJK漢字、한국어 العربية עברית हिन्दी",
     [101059, 102819, 19182, 89349, 110007, 18600, 5373, 23573, 124785, 31079, 129071, 131917, 123826, 84310,
      42311, 101, 30484, 99, 43647]),
    ("\U0001f469\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 \U0001f916\u200b\xa0x",
     [145233, 378, 235, 145233, 378, 235, 145665, 378, 235, 145988, 11162, 97, 244, 15692, 4102, 87]),
    ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
     [151644, 872, 198, 13048, 151645, 198, 151644, 77091, 198]),
    ("x<|endoftext|>y <|im_end|> <|fim_prefix|>", [87, 151643, 88, 220, 151645, 220, 151659]),
    ("<think>\n\n</think>\n\n<tool_call>", [151667, 271, 151668, 271, 151657]),
    ("<|MASK|> <MASK> a<|MASK|>b", [151669, 366, 49863, 29, 264, 151669, 65]),
    ("<|im_start |> <im_start> <|im_|im_end|>",
     [27, 91, 318, 4906, 58721, 366, 318, 4906, 29, 82639, 318, 35395, 318, 6213, 91, 29]),
    ("$\\boxed{\\frac{3}{4}}$ #### 42", [58736, 79075, 35702, 37018, 90, 18, 15170, 19, 3417, 3, 26274, 220, 19, 17]),
    ("def f(x):\n    return x**2  # ok\n", [750, 282, 2075, 982, 262, 470, 856, 334, 17, 220, 671, 5394, 198]),
    (" leading and trailing ", [6388, 323, 27748, 220]),
    ("\n", [198]),
    ("", []),
]
# fmt: on


@pytest.fixture(scope="module")
def sdar() -> Checkpoint:
    return Checkpoint.open(str(REAL_FOLDER))


@real
def test_what_the_real_checkpoint_says(sdar: Checkpoint) -> None:
    assert (sdar.mask_token_id, sdar.block_length, sdar.stop_ids, sdar.max_length, sdar.is_moe) == (
        151669, 4, (151645, 151643), 32768, False,
    )  # fmt: skip
    assert sdar.tokenizer.mask_token_id == sdar.mask_token_id
    assert sdar.tokenizer.eos_token_id == 151643
    assert sdar.tokenizer.bos_token is None


@real
@pytest.mark.parametrize(("text", "ids"), ENCODED)
def test_the_real_tokenizer(sdar: Checkpoint, text: str, ids: list[int]) -> None:
    assert sdar.tokenizer.encode(text) == ids
    assert sdar.tokenizer.encode(text, add_special_tokens=False) == ids


@real
def test_the_real_tokenizer_from_tokenizer_json(sdar: Checkpoint, tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path, vocab_size=8, mask_token_id=7)
    (folder / "tokenizer_config.json").write_text((REAL_FOLDER / "tokenizer_config.json").read_text())
    sdar.tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer = Checkpoint.open(str(folder)).tokenizer
    assert [tokenizer.encode(text) for text, _ in ENCODED] == [ids for _, ids in ENCODED]


@real
def test_the_real_chat_template(sdar: Checkpoint) -> None:
    chat = [{"role": "user", "content": "What is 2 + 3?\n\nPlease reason."}]
    rendered = sdar.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert rendered == "<|im_start|>user\nWhat is 2 + 3?\n\nPlease reason.<|im_end|>\n<|im_start|>assistant\n"


@real
def test_decoding_leaves_special_tokens_out_and_tidies_nothing(sdar: Checkpoint) -> None:
    ids = sdar.tokenizer.encode("x , y . <think> don 't<|MASK|><|im_end|>")
    assert sdar.decode(ids) == "x , y . <think> don 't"


@real
def test_the_real_index_has_the_layout_we_ask_for(sdar: Checkpoint) -> None:
    config = sdar._transformers_config("sdpa")
    index = json.loads((REAL_FOLDER / "model.safetensors.index.json").read_text())
    layout = module._layout(config, is_moe=False)
    assert layout.keys() == index["weight_map"].keys()
    size = sum(torch.Size(shape).numel() for shape in layout.values()) * 2
    assert size == index["metadata"]["total_size"]


@real
def test_weights_of_the_real_layout(tmp_path: Path) -> None:
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "head_dim": 16}  # fmt: skip
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        shutil.copyfile(REAL_FOLDER / name, tmp_path / name)
    edit_json(tmp_path / "config.json", **small)
    config = json.loads((tmp_path / "config.json").read_text())
    write_weights(tmp_path, random_weights(config), shards=3)
    assert_reference(tmp_path, config)
    assert load(tmp_path).model.rotary_emb.inv_freq[-1].item() == pytest.approx(1000000 ** (-14 / 16))
