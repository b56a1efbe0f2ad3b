"""A checkpoint with one thing broken ends before anything is built, within seconds, as one line: what and where."""

from __future__ import annotations

import json
import os
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from editing import edit_json
from support import MOE_SETTINGS, random_checkpoint, small_config

from sdar_lm_eval.checkpoint import Checkpoint
from sdar_lm_eval.errors import UserError
from sdar_lm_eval.lm.prompts import Prompts

Builder = Callable[[Path], Any]


def opened(folder: Path) -> Checkpoint:
    """What an evaluation asks of a checkpoint before an engine builds a model."""
    checkpoint = Checkpoint.open(str(folder))
    Prompts(checkpoint)
    checkpoint.check_weights()
    return checkpoint


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of each kind, to be copied."""
    at = tmp_path_factory.mktemp("whole")
    return {
        "dense": random_checkpoint(at / "dense"),
        "moe": random_checkpoint(at / "moe", moe=True),
        "sharded": random_checkpoint(at / "sharded", shards=3),
    }


# Builders: each breaks one thing in a checkpoint's folder.


def config(**changes: Any) -> Builder:
    return lambda folder: edit_json(folder / "config.json", **changes)


def write(file: str, content: bytes | str) -> Builder:
    data = content if isinstance(content, bytes) else content.encode()
    return lambda folder: (folder / file).write_bytes(data)


def written(file: str, change: Callable[[dict[str, Any]], Any]) -> Builder:
    """Change the JSON that a file holds."""

    def build(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        change(content)
        (folder / file).write_text(json.dumps(content))

    return build


def replaced(file: str, by: str) -> Builder:
    def build(folder: Path) -> None:
        (folder / file).unlink(missing_ok=True)
        if by == "folder":
            (folder / file).mkdir()
        elif by == "pipe":
            os.mkfifo(folder / file)
        else:
            (folder / file).symlink_to(by)

    return build


def header(content: bytes, length: int | None = None, size: int | None = None) -> Builder:
    """Write weights that have this header; a file of many bytes is a sparse one."""

    def build(folder: Path) -> None:
        with (folder / "model.safetensors").open("wb") as file:
            file.write(struct.pack("<Q", len(content) if length is None else length) + content)
            if size is not None:
                file.truncate(size)

    return build


def pickled(folder: Path) -> None:
    """An index that names a pickle, whose first bytes pass for a safetensors header."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    first = next(iter(index["weight_map"]))
    torch.save({first: torch.zeros(1)}, folder / "extra.bin")
    index["weight_map"][first] = "extra.bin"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def pattern(regex: str) -> Builder:
    return written("tokenizer.json", lambda t: t["pre_tokenizer"]["pretokenizers"][0].update(pattern={"Regex": regex}))


def post_processor(token: int) -> Builder:
    return written(
        "tokenizer.json",
        lambda content: content.update(
            post_processor={
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {"<s>": {"id": "<s>", "ids": [token], "tokens": ["<s>"]}},
            }
        ),
    )


def template(source: Any) -> Builder:
    def build(folder: Path) -> None:
        (folder / "chat_template.jinja").unlink()
        edit_json(folder / "tokenizer_config.json", chat_template=source)

    return build


def added_token(token: int) -> Builder:
    entry = {"id": token, "content": "<new>", "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": True}  # fmt: skip
    return written("tokenizer.json", lambda content: content["added_tokens"].append(entry))


DEEP = b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
NOT_A_FILE = [
    (f"{file}, {by}", kind, replaced(file, by), f"{file} is not a regular file, but {told}. Put the file itself there.")
    for by, told in (("folder", "a folder"), ("pipe", "a pipe"), ("/dev/zero", "a device"))
    for file, kind in (
        ("config.json", "dense"), ("generation_config.json", "dense"), ("tokenizer.json", "dense"),
        ("tokenizer_config.json", "dense"), ("chat_template.jinja", "dense"), ("special_tokens_map.json", "dense"),
        ("model.safetensors", "dense"), ("model.safetensors.index.json", "sharded"),
        ("model-00002-of-00003.safetensors", "sharded"),
    )
]  # fmt: skip
TYPES = [
    (
        f"{key}={shown[:30]}",
        "moe",
        config(**{key: value}),
        f"has {key}={shown} in its config.json; it must be {allowed}",
    )
    for key, value, shown, allowed in (
        ("num_hidden_layers", 10**7, "10000000", "a whole number from 1 to 10,000."),
        ("num_experts", 10**7, "10000000", "a whole number from 1 to 65,536."),
        ("hidden_size", [64], "[64]", "a whole number"),
        ("hidden_size", 64.0, "64.0", "a whole number"),
        ("hidden_size", True, "true", "a whole number"),
        ("hidden_size", 10**4000, "1000000 …", "a whole number"),
        ("num_attention_heads", -4, "-4", "a whole number"),
        ("num_attention_heads", {"a": [[[[1]]]]}, '{"a": [[...]]}', "a whole number"),
        ("num_key_value_heads", 3, "3", "a divisor of num_attention_heads=4."),
        ("num_experts_per_tok", 7, "7", "at most num_experts=6."),
        ("head_dim", 23, "23", "even"),
        ("vocab_size", "x" * 10**6, "'xxxx …", "a whole number"),
        ("decoder_sparse_step", 0, "0", "a whole number"),
        ("mlp_only_layers", 3, "3", "a list of layers."),
        ("mlp_only_layers", ["x"], '["x"]', "a list of layers."),
        ("rms_norm_eps", "1e-6", "'1e-6'", "a number above 0."),
        ("rms_norm_eps", float("nan"), "nan", "a number above 0."),
        ("rope_theta", 0, "0", "a number above 0."),
        ("rope_theta", [1e4], "[10000.0]", "a number above 0."),
        ("rope_scaling", "linear", "'linear'", "an object."),
        ("rope_parameters", {"rope_theta": "x"}, '{"rope_theta": "x"}', "an object whose rope_theta"),
        ("hidden_act", 5, "5", "a text."),
        ("hidden_act", "nonesuch", "'nonesuch'", "an activation of transformers, such as silu."),
        ("torch_dtype", 16, "16", "a text."),
        ("tie_word_embeddings", "no", "'no'", "true or false."),
        ("norm_topk_prob", 1, "1", "true or false."),
        ("layer_types", ["full_attention", "sliding_attention"], '["full_attention", "sliding_attention"]', "full_"),
        ("block_size", 10**9, "1000000000", "a whole number"),
        ("max_position_embeddings", "2048", "'2048'", "a whole number"),
    )
]
BROKEN: list[tuple[str, str, Builder, str]] = [
    *NOT_A_FILE,
    *TYPES,
    # JSON
    ("config.json, deep", "dense", write("config.json", DEEP), "config.json cannot be read as JSON: its lists and"),
    ("generation_config.json, deep", "dense", write("generation_config.json", DEEP), "nested too deep"),
    ("tokenizer_config.json, deep", "dense", write("tokenizer_config.json", DEEP), "tokenizer_config.json cannot be"),
    ("tokenizer.json, deep", "dense", write("tokenizer.json", DEEP), "the tokenizer of checkpoint"),
    ("index, deep", "sharded", write("model.safetensors.index.json", DEEP), "index.json cannot be read as JSON"),
    ("config.json, digits", "dense", write("config.json", '{"a": ' + "9" * 5000 + "}"), "cannot be read as JSON"),
    ("config.json, large", "dense", lambda f: os.truncate(f / "config.json", 10**11), "100,000,000,000 bytes; at most"),
    ("tokenizer.json, large", "dense", lambda f: os.truncate(f / "tokenizer.json", 10**11), "bytes; at most"),
    ("template, not UTF-8", "dense", write("chat_template.jinja", b"\xff\xfe"), "chat_template.jinja is not UTF-8"),
    # Weights
    ("a pickle", "sharded", pickled, "index.json names extra.bin: only safetensors are read"),
    ("a header of 30 GB", "dense", header(b"{", 30 * 10**9, 31 * 10**9), "its header has 30,000,000,000 bytes"),
    ("a header, nested", "dense", header(DEEP), "its header is nested too deep. Download it again."),
    ("a header, a list", "dense", header(b"[]"), "is not a whole safetensors file"),
    ("weights of another type", "dense",
     header(b'{"a": {"dtype": "I8", "shape": [0], "data_offsets": [0, 0]}}'), "weights of type 'I8', not F64"),
    ("a shape of a million", "dense",
     header(json.dumps({"model.norm.weight": {"dtype": "F32", "shape": [1] * 10**6, "data_offsets": [0, 0]}}).encode()),
     "model.norm.weight [1, 1, 1, 1, ...] in place of [64]"),
    ("a name of lines", "dense",
     header(json.dumps({"a\nb" * 10**5: {"dtype": "F32", "shape": [], "data_offsets": [0, 0]}}).encode()),
     "unexpected: 'a\\nb"),
    ("10,000 layers", "dense", config(num_hidden_layers=10_000),
     "asks for about 110,000 weights (num_hidden_layers=10,000), but its files hold"),
    ("60,000 experts", "moe", config(num_experts=60_000),
     "(num_hidden_layers=2 and num_experts=60,000), but its files hold"),
    ("9 layers", "dense", config(num_hidden_layers=9), "do not fit its config.json; missing: model.layers.2."),
    ("another model", "dense", config(model_type=["sdar"] * 10**6),
     'has model_type ["sdar", "sdar", "sdar", "sdar", ...]'),
    # Tokens
    ("a stop id of 2^63", "dense", lambda f: edit_json(f / "generation_config.json", eos_token_id=[5, 2**63]),
     "has eos_token_id=[5, 9223372036854775808]; it must be a token id or a list of them, each below its vocab_size"),
    ("a stop id below 0", "dense", lambda f: edit_json(f / "generation_config.json", eos_token_id=-1), "id=-1; it"),
    ("a stop id beyond", "dense",
     lambda f: [(f / "generation_config.json").unlink(), edit_json(f / "config.json", eos_token_id=711)], "id=711; it"),
    ("a mask id beyond", "dense", config(mask_token_id=711), "mask_token_id=711, which must be a token below"),
    ("a mask id of true", "dense", config(mask_token_id=True), "mask_token_id=true"),
    ("a token beyond", "dense", added_token(711), "has a token '<new>' with id 711. Its config.json has"),
    ("a vocabulary beyond", "dense",
     written("tokenizer.json", lambda t: t["model"]["vocab"].update(far=99_999)), "has a token 'far' with id 99999."),
    ("a post-processor beyond", "dense", post_processor(5000), "adds a token 5000 to each text. Its config.json has"),
    ("a post-processor below 0", "dense", post_processor(-1), "the tokenizer of checkpoint"),
    ("a pattern that explodes", "dense", pattern(r"(a+)+$x?(?=b)"), "stopped in the middle of a text (Onig: "),
    ("a pattern of spaces that explodes", "dense", pattern(r"( +)+$x?(?=b)"), "stopped in the middle of a text (Onig"),
    ("a pattern that is none", "dense", pattern("("), "the tokenizer of checkpoint"),
    # Templates, see test_chat_template.py
    ("template, a number", "dense", template(5), "chat_template in "),
    ("template, a list of numbers", "dense", template([5]), "it must be a text, or a list of"),
    ("template, no default", "dense", template([{"name": "a", "template": "x"}]), "none of them is called 'default'"),
    ("template, division", "dense", template("{{ 1 / 0 }}"), "the chat template of checkpoint"),
    ("template, the sandbox", "dense", template("{{ ''.__class__.__base__ }}"), "is not safe (SecurityError"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "build", "expected"), [row[1:] for row in BROKEN], ids=[row[0] for row in BROKEN])
def test_what_is_broken_ends_as_one_line(
    whole: dict[str, Path], tmp_path: Path, kind: str, build: Builder, expected: str, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(whole[kind], tmp_path / "c"))
    build(folder)
    begun = time.perf_counter()
    with pytest.raises(UserError) as caught:
        opened(folder)
    said = str(caught.value)
    assert all(part in said for part in expected.split(" … "))
    assert "\n" not in said and len(said) < 900
    assert time.perf_counter() - begun < 5
    assert capfd.readouterr().err == ""  # nor does another library print


@pytest.mark.parametrize("kind", ["dense", "moe", "sharded"])
def test_what_is_whole_opens(whole: dict[str, Path], kind: str) -> None:
    assert opened(whole[kind]).fingerprint


def test_keys_that_the_model_does_not_use_build_nothing(whole: dict[str, Path], tmp_path: Path) -> None:
    """transformers makes a name for each of num_labels."""
    folder = Path(shutil.copytree(whole["dense"], tmp_path / "c"))
    edit_json(folder / "config.json", num_labels=10**9, pad_token_id=10**9, id2label=5, quantization_config=7)
    model = opened(folder).load_model(dtype=torch.float32, device="cpu", attention="sdpa")
    assert model.model.embed_tokens.padding_idx is None


def test_a_pattern_that_explodes_only_later(whole: dict[str, Path], tmp_path: Path) -> None:
    """On a text that nobody tried: each way to tokenize names the tokenizer."""
    folder = Path(shutil.copytree(whole["dense"], tmp_path / "c"))
    pattern(r"(z+)+$x?(?=b)|.")(folder)
    tokenizer = opened(folder).tokenizer
    assert tokenizer.encode("a") and tokenizer(["a"])["input_ids"]
    for tokenize in (lambda: tokenizer.encode("z" * 30 + "!"), lambda: tokenizer(["a", "z" * 30 + "!"])):
        with pytest.raises(UserError, match=r"the tokenizer of checkpoint .* stopped in the middle of a text \(Onig"):
            tokenize()


def test_a_template_is_not_read_where_it_is_not_used(whole: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole["dense"], tmp_path / "c"))
    (folder / "chat_template.jinja").write_text("{{ 1 / 0 }}")
    prompts = Prompts(Checkpoint.open(str(folder)), "off")
    with pytest.raises(UserError, match=r"the chat template of checkpoint .* fails \(ZeroDivisionError"):
        prompts.render([{"role": "user", "content": "2"}])


@pytest.mark.parametrize("missing", [{}, MOE_SETTINGS])
def test_a_config_that_says_little_is_taken_at_transformers_word(tmp_path: Path, missing: dict[str, Any]) -> None:
    """Its defaults are another model's: the weights do not fit, which is said."""
    folder = random_checkpoint(tmp_path, moe=bool(missing), leave_out=tuple(small_config().keys() - {"model_type"}))
    with pytest.raises(UserError, match=r"names no mask token|do not fit its config\.json"):
        opened(folder)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("~nobody-of-this-name/x", "cannot be looked up"),
        ("x" * 5000, "cannot be looked up|no such folder"),
        ("a\0b", "cannot be looked up|no such folder"),
        ("FILE", "not a folder. Give the folder that holds config.json"),
        ("/dev/null", "not a folder"),
        ("", "no such folder|not a checkpoint's folder|has no config.json"),
    ],
)
def test_names_that_are_no_folder(tmp_path: Path, name: str, expected: str) -> None:
    (tmp_path / "FILE").touch()
    with pytest.raises(UserError, match=expected):
        Checkpoint.open(name.replace("FILE", str(tmp_path / "FILE")))
