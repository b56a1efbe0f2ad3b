from __future__ import annotations

import contextlib
import json
import os
import pty
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from editing import JSON, edit_json, load
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    QUICK_START,
    environment,
    random_checkpoint,
    random_weights,
    small_config,
    write_weights,
)

from sdar_lm_eval.checkpoint import Checkpoint
from sdar_lm_eval.checkpoint.tokenizer import TOKENIZER_FILES
from sdar_lm_eval.demo import CHECKPOINT as DEMO
from sdar_lm_eval.errors import UserError

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
    with pytest.raises(UserError, match=r"not-there.*cannot be downloaded from the hub.*Check the id and the network"):
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
    needed = [*TOKENIZER_FILES, "config.json", "generation_config.json", "model.safetensors.index.json",
              "model.safetensors", "model-00001-of-00002.safetensors"]  # fmt: skip
    harmful = ["modeling_sdar.py", "tokenization_qwen2.py", "pytorch_model.bin", "x.pt", "x.pth", "x.pkl", "x.ckpt",
               "sub/model.safetensors", "onnx/config.json", "a/b.py", "x.pyc", "x.so",
               "training_args.bin", "config.json.py", "model.gguf", "README.md"]  # fmt: skip
    kept = filter_repo_objects(
        [*needed, *harmful], allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"]
    )
    assert sorted(kept) == sorted(needed)


@pytest.mark.parametrize("name", ["nowhere", "/no/where", "./no/where", "~/no-where", "../x", "a/b/c", "a b/c"])
def test_a_path_that_is_not_there_is_not_looked_up_on_the_hub(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    monkeypatch.chdir(tmp_path)
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


def test_values_that_config_json_lacks_come_from_elsewhere(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lacking = ("block_size", "mask_token_id", "eos_token_id", "max_position_embeddings")
    folder = random_checkpoint(tmp_path, leave_out=lacking)
    (folder / "generation_config.json").unlink()
    checkpoint = Checkpoint.open(str(folder))
    assert (checkpoint.mask_token_id, checkpoint.stop_ids) == (710, (707,))  # the tokenizer's
    assert (checkpoint.block_length, checkpoint.max_length) == (4, 32768)
    assert ["4 is assumed. Give block_length=N" in text for text in caplog.messages] == [True]


@pytest.mark.parametrize(
    ("name", "keys", "expected"),
    [
        ("SDAR-8B-Chat-b32", {}, 32),
        ("SDAR-8B-Chat-b32", {"block_size": 4}, 4),
        ("SDAR-8B-Chat", {"block_length": 16}, 16),
        ("SDAR-8B-Chat", {"block_size": None, "block_length": 8}, 8),
        ("SDAR-8B-Chat", {}, 4),
        ("SDAR-b8-Chat", {}, 8),
        ("SDAR-8B-Chat-b0", {}, 4),
    ],
)
def test_block_length(tmp_path: Path, name: str, keys: dict[str, Any], expected: int) -> None:
    folder = random_checkpoint(tmp_path / name, leave_out=("block_size",))
    edit_json(folder / "config.json", **keys)
    assert Checkpoint.open(f"{folder}/").block_length == expected


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (f"models--JetLM--SDAR-8B-Chat-b32/snapshots/{COMMIT}", 32),
        (f"models--JetLM--SDAR-8B-Chat/snapshots/{COMMIT}", 4),
        (f"b16-cache/models--JetLM--SDAR-8B-Chat/snapshots/{COMMIT}", 4),
        ("LightningRL-8B-b32-GSM8K", 32),
        ("LightningRL-8B-b32-MATH500", 32),
        ("MBD-SDAR-8B-Chat-b32", 32),
        ("SDAR-1.7B-Chat-b64", 64),
        ("models/b16-experiments/SDAR-4B-Chat", 4),
        ("SDAR-8B-Chat-b32/checkpoint-500", 32),
        ("SDAR-8B-Chat-b32/checkpoint-500/merged", 4),
        ("SDAR-b4-to-b16", 16),
        ("SDAR_8B_b8", 8),
        ("SDAR-30B-A3B-Sci", 4),
        ("TDAR-8B-Thinking", 4),
        ("SDAR-b20260101", 4),
        ("SDAR-ab8", 4),
        ("SDAR-b8x", 4),
    ],
)
def test_the_block_length_that_a_path_names(tmp_path: Path, path: str, expected: int) -> None:
    """Of the model's own name, and of no folder of the user's above it."""
    folder = random_checkpoint(tmp_path / "above-b2" / path, leave_out=("block_size",))
    assert Checkpoint.open(str(folder)).block_length == expected


def test_the_block_length_of_a_folder_that_is_linked_or_relative(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = random_checkpoint(tmp_path / "models--JetLM--SDAR-8B-Chat-b32" / "snapshots" / COMMIT,
                               leave_out=("block_size",))  # fmt: skip
    (tmp_path / "mine").symlink_to(folder)
    assert Checkpoint.open(str(tmp_path / "mine")).block_length == 32
    monkeypatch.chdir(folder)
    assert Checkpoint.open(".").block_length == 32


def test_a_name_that_disagrees_with_config_json_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Checkpoint.open(str(random_checkpoint(tmp_path / "SDAR-8B-Chat-b4")))
    assert not caplog.messages
    assert Checkpoint.open(str(random_checkpoint(tmp_path / "SDAR-8B-Chat-b32"))).block_length == 4
    [said] = caplog.messages
    assert "block size of 4 in its config.json, and of 32 in its name" in said
    assert "Give block_length=32 if the name is right." in said


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
