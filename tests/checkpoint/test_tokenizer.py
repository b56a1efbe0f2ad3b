from __future__ import annotations

from pathlib import Path

import pytest
from editing import edit_json
from support import (
    random_checkpoint,
)

from sdar_lm_eval.checkpoint import Checkpoint
from sdar_lm_eval.checkpoint import checkpoint as module
from sdar_lm_eval.errors import UserError

# Tokenizers


def test_the_tokenizer_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = random_checkpoint(tmp_path, leave_out=("mask_token_id",))
    opened = []
    read = module.open_tokenizer
    monkeypatch.setattr(module, "open_tokenizer", lambda *a: opened.append(a) or read(*a))
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
    with pytest.raises(UserError, match=r"has no tokenizer: .* no tokenizer\.json.* Save the tokenizer"):
        _ = Checkpoint.open(str(folder)).tokenizer
