from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from editing import assert_reference, edit_json, load
from support import (
    REAL_FOLDER,
    random_checkpoint,
    random_weights,
    write_weights,
)

from sdar_lm_eval.checkpoint import Checkpoint

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
    folder = random_checkpoint(tmp_path)
    edit_json(folder / "config.json", vocab_size=151936)
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
    layout = sdar.family.weights(config)
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
