"""Opens a checkpoint of the SDAR family without running its code.

SDAR's folders name Python files in `auto_map`; opening them the usual way runs those files or waits for a "y" on a
terminal. They are not needed: SDAR is Qwen3 (its MoE: Qwen3-MoE) under a block-causal mask, with Qwen3's weight names and
shapes, so transformers' own classes hold it. Here `config.json` is read as data, the tokenizer is opened from a copy
of its files without `auto_map`, weights come from safetensors alone, and no `.py` file is ever copied or downloaded.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import os
import struct
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdar_lm_eval.demo import CHECKPOINT as DEMO_CHECKPOINT
from sdar_lm_eval.engines.base import DEFAULT_BLOCK_LENGTH
from sdar_lm_eval.errors import UserError

logger = logging.getLogger(__name__)

# model_type of config.json -> (config class, model class) of transformers.
ARCHITECTURES = {
    "sdar": ("Qwen3Config", "Qwen3ForCausalLM"),
    "sdar_moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM"),
}
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
DOWNLOADED = ("*.json", "*.jinja", "merges.txt", "*.safetensors")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's folder and what it says of itself.

    Attributes:
        name: as the user gave it: hub id, folder, or `demo`.
        folder: where its files are.
        config: `config.json` as it stands.
        is_moe: SDAR MoE (Qwen3-MoE layout) rather than dense.
        mask_token_id: the token that stands for "not yet known".
        block_length: tokens the model was trained to denoise together.
        stop_ids: tokens that end an answer: `generation_config.json`'s, else config.json's, else the tokenizer's.
        max_length: most tokens of prompt and answer together (`max_position_embeddings`).
        revision: of the hub id, as it was asked for.
    """

    name: str
    folder: Path
    config: dict[str, Any] = dataclasses.field(repr=False)
    is_moe: bool
    mask_token_id: int
    block_length: int
    stop_ids: tuple[int, ...]
    max_length: int
    revision: str | None = None

    @classmethod
    def open(cls, name: str, revision: str | None = None) -> Checkpoint:
        """Open a checkpoint by hub id, folder or `demo`. Reads no weights.

        Args:
            name: `demo`, an existing folder, or a hub id (`owner/name`), downloaded to the hub's cache.
            revision: branch, tag or commit; for hub ids only.

        Raises:
            UserError: no such folder or id, no `config.json`, another model type, or no mask token named.
        """
        folder = _resolve(name, revision)
        config = _read_json(folder / "config.json", needed_for=f"checkpoint {name!r}")
        model_type = config.get("model_type")
        if model_type not in ARCHITECTURES:
            raise UserError(
                f"checkpoint {name!r} has model_type {model_type!r}; this package runs "
                f"{' and '.join(repr(known) for known in ARCHITECTURES)} (the SDAR family). "
                "Run other models with lm_eval's own, such as --model hf."
            )
        generation = _read_json(folder / "generation_config.json") if (folder / "generation_config.json").exists() else {}
        stop_ids = _as_ids(generation.get("eos_token_id")) or _as_ids(config.get("eos_token_id"))
        opened = cls(
            name=name,
            folder=folder,
            config=config,
            is_moe=model_type == "sdar_moe",
            mask_token_id=config.get("mask_token_id", -1),
            block_length=config.get("block_size", config.get("block_length", DEFAULT_BLOCK_LENGTH)),
            stop_ids=stop_ids,
            max_length=config.get("max_position_embeddings", 32768),
            revision=revision,
        )
        if opened.mask_token_id == -1:
            opened = dataclasses.replace(opened, mask_token_id=_mask_id_of_tokenizer(opened))
        if not opened.stop_ids and opened.tokenizer.eos_token_id is not None:
            opened = dataclasses.replace(opened, stop_ids=(opened.tokenizer.eos_token_id,))
        return opened

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer, from a copy of its files that names no code.

        Raises:
            UserError: the folder has no tokenizer, or transformers cannot read it.
        """
        from transformers import AutoTokenizer

        present = [self.folder / file for file in TOKENIZER_FILES if (self.folder / file).exists()]
        if not any(path.name in ("tokenizer.json", "vocab.json") for path in present):
            raise UserError(f"checkpoint {self.name!r} has no tokenizer: {self.folder} holds neither tokenizer.json nor "
                            "vocab.json with merges.txt.")  # fmt: skip
        with tempfile.TemporaryDirectory(prefix="sdar-tokenizer-") as clean:
            for path in present:
                if path.name == "tokenizer_config.json":
                    settings = _read_json(path)
                    settings.pop("auto_map", None)
                    (Path(clean) / path.name).write_text(json.dumps(settings))
                else:
                    (Path(clean) / path.name).write_bytes(path.read_bytes())
            try:
                tokenizer = AutoTokenizer.from_pretrained(clean, trust_remote_code=False)
            except Exception as error:
                raise UserError(f"the tokenizer of checkpoint {self.name!r} cannot be read: {error}") from error
        tokenizer.name_or_path = self.name
        return tokenizer

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of tokens, special tokens left out, nothing tidied up."""
        text: str = self.tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of the configuration and of samples of every weight file: other weights, another fingerprint.

        Cheap: from each file it reads its size, its header and 64 KiB at four places.
        """
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for path in self.weight_files():
            size = path.stat().st_size
            digest.update(f"{path.name}:{size}".encode())
            with path.open("rb") as file:
                for place in (0, size // 3, 2 * size // 3, max(0, size - 65536)):
                    file.seek(place)
                    digest.update(file.read(65536))
        return digest.hexdigest()[:16]

    def weight_files(self) -> list[Path]:
        """The safetensors files that hold the weights, whole as far as their headers and sizes tell.

        Raises:
            UserError: none there, one of the index missing, or one cut short.
        """
        index = self.folder / "model.safetensors.index.json"
        if index.exists():
            names = sorted(set(_read_json(index).get("weight_map", {}).values()))
        else:
            names = sorted(path.name for path in self.folder.glob("*.safetensors"))
        if not names:
            raise UserError(
                f"checkpoint {self.name!r} has no weights: no *.safetensors in {self.folder}. "
                "Only safetensors are read; convert other formats with transformers' save_pretrained."
            )
        missing = [name for name in names if not (self.folder / name).exists()]
        if missing:
            raise UserError(
                f"checkpoint {self.name!r} lacks weights: its index names {', '.join(missing)}, which {self.folder} "
                "does not hold. Download it again."
            )
        paths = [self.folder / name for name in names]
        for path in paths:
            _check_whole(path)
        return paths

    def load_model(self, *, dtype: Any, device: Any, attention: str) -> Any:
        """Load the weights into transformers' Qwen3ForCausalLM or Qwen3MoeForCausalLM.

        Args:
            dtype: torch dtype of the weights in memory.
            device: torch device.
            attention: name of an attention function registered with transformers.

        Raises:
            UserError: weights are missing, unexpected, of another shape, or cut short; the message names them.
        """
        import torch
        import transformers

        self.weight_files()
        config_class, model_class = ARCHITECTURES[self.config["model_type"]]
        config = self._transformers_config(getattr(transformers, config_class), attention)
        dtype_name = "dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"
        bars = transformers.utils.logging
        shown = bars.is_progress_bar_enabled()
        bars.disable_progress_bar()
        try:
            model, report = getattr(transformers, model_class).from_pretrained(
                self.folder,
                config=config,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                **{dtype_name: dtype},
            )
        except Exception as error:
            raise UserError(f"the weights of checkpoint {self.name!r} cannot be loaded: {error}") from error
        finally:
            if shown:
                bars.enable_progress_bar()
        for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            names = sorted(str(name) for name in report[what])
            if config.tie_word_embeddings:
                names = [name for name in names if name != "lm_head.weight"]
            if names:
                listed = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
                raise UserError(
                    f"checkpoint {self.name!r} does not fit its config.json: {what.split('_')[0]} weights {listed}."
                )
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        with torch.no_grad():
            return model.to(device).eval()

    def _transformers_config(self, config_class: Any, attention: str) -> Any:
        """Translate config.json into transformers' config of the same layout."""
        not_of_the_model = ("architectures", "auto_map", "model_type", "attn_implementation", "torch_dtype", "dtype",
                            "transformers_version", "use_cache")  # fmt: skip
        settings = {key: value for key, value in self.config.items() if key not in not_of_the_model}
        config = config_class(**settings, use_cache=False)
        config._attn_implementation = attention
        return config


def _resolve(name: str, revision: str | None) -> Path:
    if name == "demo":
        return DEMO_CHECKPOINT
    folder = Path(name).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise UserError(f"revision={revision!r} was given, but {name!r} is a folder; revisions belong to hub ids.")
        return folder
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") != 1 or os.sep in name.replace("/", "", 1)
    if looks_like_path:
        raise UserError(
            f"pretrained={name!r}: no such folder. Give an existing folder, a hub id such as JetLM/SDAR-4B-Chat, or demo."
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(DOWNLOADED)))
    except Exception as error:
        at = f" at revision {revision!r}" if revision else ""
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"pretrained={name!r}{at} is no folder here and cannot be had from the hub ({reason}). "
            "Check the id and the network, or give a folder that holds the checkpoint, or demo."
        ) from error


def _read_json(path: Path, needed_for: str = "") -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{needed_for} has no {path.name}: {path.parent} is not a checkpoint's folder.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object.")
    return content


def _as_ids(value: Any) -> tuple[int, ...]:
    """One token id, several, or none, as generation configs have it."""
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)


def _mask_id_of_tokenizer(checkpoint: Checkpoint) -> int:
    mask_id = checkpoint.tokenizer.mask_token_id
    if mask_id is None:
        raise UserError(
            f"checkpoint {checkpoint.name!r} names no mask token: neither mask_token_id in config.json nor mask_token in "
            "tokenizer_config.json. Add the one it was trained with to config.json."
        )
    return int(mask_id)


def _check_whole(path: Path) -> None:
    """Compare a safetensors file's length with what its header promises: a download cut short is named, not guessed at.

    Layout: 8 bytes little-endian header length, the header as JSON with `data_offsets`, then the data.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > size:
                raise ValueError("its header is cut short")
            header = json.loads(file.read(length))
        ends = [entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"]
        if size != 8 + length + max(ends, default=0):
            raise ValueError(f"it has {size:,} bytes where its header promises {8 + length + max(ends, default=0):,}")
    except (struct.error, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a whole safetensors file: {error}. Download it again.") from error
