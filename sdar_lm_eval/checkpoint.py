"""Opens a checkpoint of the SDAR family without running its code.

SDAR's folders name Python files in `auto_map`; opening them the usual way runs those files or waits for a "y" on a
terminal. They are not needed: SDAR is Qwen3 (its MoE: Qwen3-MoE) under a block-causal mask, with Qwen3's weight names
and shapes, so transformers' own classes hold it. Here `config.json` is read as data. Nobody else sees the folder:
transformers and other engines get temporary ones, with a copy of the tokenizer's files without `auto_map`, and links to
the safetensors, whose names and shapes have been compared with `config.json` by then. No `.py` file is ever copied or
downloaded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import math
import re
import struct
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sdar_lm_eval.demo import CHECKPOINT as DEMO_CHECKPOINT
from sdar_lm_eval.engines.base import DEFAULT_BLOCK_LENGTH
from sdar_lm_eval.errors import EngineError, UserError

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
LESS_MEMORY = "Choose a smaller dtype, another device or a smaller checkpoint, or end what else runs there."
# What SDARConfig takes where config.json is silent.
DEFAULT_VOCABULARY = 151936
DEFAULT_MAX_LENGTH = 32768
# Of config.json, what says how the model computes; but for RoPE, which transformers 4 and 5 say in different ways.
MODEL_SETTINGS = (
    "attention_bias", "decoder_sparse_step", "head_dim", "hidden_act", "hidden_size", "intermediate_size",
    "max_position_embeddings", "mlp_only_layers", "moe_intermediate_size", "norm_topk_prob", "num_attention_heads",
    "num_experts", "num_experts_per_tok", "num_hidden_layers", "num_key_value_heads", "rms_norm_eps",
    "tie_word_embeddings", "vocab_size",
)  # fmt: skip
# Names in older files that hold nothing: computed from the configuration.
IGNORED_WEIGHTS = ("rotary_emb.inv_freq",)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's folder and what it says of itself.

    Attributes:
        name: as the user gave it: hub id, folder, or `demo`.
        folder: where its files are.
        config: `config.json` as it stands.
        is_moe: SDAR MoE (Qwen3-MoE layout) rather than dense.
        mask_token_id: the token that stands for "not yet known".
        block_length: tokens the model was trained to denoise together: config.json's `block_size`, else what the name
            says (JetLM's end in -b8, -b16, ... where it is not 4), else 4.
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
        if model_type not in tuple(ARCHITECTURES):
            raise UserError(
                f"checkpoint {name!r} has model_type {model_type!r}; this package runs "
                f"{' and '.join(repr(known) for known in ARCHITECTURES)} (the SDAR family). "
                "Run other models with lm_eval's own, such as --model hf."
            )
        generation_config = folder / "generation_config.json"
        generation = _read_json(generation_config) if generation_config.exists() else {}
        stop_ids = _ids(generation.get("eos_token_id"), name) or _ids(config.get("eos_token_id"), name)
        mask_token_id = config.get("mask_token_id")
        tokenizer = None
        if mask_token_id is None or not stop_ids:
            tokenizer = _open_tokenizer(name, folder)
            mask_token_id = tokenizer.mask_token_id if mask_token_id is None else mask_token_id
            stop_ids = stop_ids or _ids(tokenizer.eos_token_id, name)
        if mask_token_id is None:
            raise UserError(
                f"checkpoint {name!r} names no mask token: neither mask_token_id in config.json nor mask_token in "
                "tokenizer_config.json. Add the one it was trained with to config.json."
            )
        vocabulary = _whole("vocab_size", config, name, DEFAULT_VOCABULARY)
        if not (isinstance(mask_token_id, int) and 0 <= mask_token_id < vocabulary):
            raise UserError(
                f"checkpoint {name!r} has mask_token_id={mask_token_id!r}, which must be a token below its "
                f"vocab_size={vocabulary}. Correct its config.json."
            )
        opened = cls(
            name=name,
            folder=folder,
            config=config,
            is_moe=model_type == "sdar_moe",
            mask_token_id=mask_token_id,
            block_length=_block_length(name, config),
            stop_ids=stop_ids,
            max_length=_whole("max_position_embeddings", config, name, DEFAULT_MAX_LENGTH),
            revision=revision,
        )
        if tokenizer is not None:
            opened.__dict__["tokenizer"] = tokenizer  # read already
        return opened

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer, from a copy of its files that names no code.

        Raises:
            UserError: the folder has no tokenizer, or transformers cannot read it.
        """
        return _open_tokenizer(self.name, self.folder)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of tokens, special tokens left out, nothing tidied up."""
        # Of a list transformers looks at every token by itself.
        ids = np.asarray(token_ids, dtype=np.int64)
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of what answers depend on: other weights, configuration, tokenizer or template, another fingerprint.

        Cheap: from each weight file it reads its size and 64 KiB at four places.
        """
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for name in ("generation_config.json", *TOKENIZER_FILES):
            if (self.folder / name).exists():
                digest.update(name.encode() + (self.folder / name).read_bytes())
        for path in self.weight_files():
            size = path.stat().st_size
            digest.update(f"{path.name}:{size}".encode())
            with path.open("rb") as file:
                for place in (0, size // 3, 2 * size // 3, max(0, size - 65536)):
                    file.seek(place)
                    digest.update(file.read(65536))
        return digest.hexdigest()[:16]

    def weight_files(self) -> list[Path]:
        """The safetensors files that hold the weights: model.safetensors, else those of its index.

        Raises:
            UserError: none there, or one of the index missing.
        """
        if (self.folder / "model.safetensors").exists():
            return [self.folder / "model.safetensors"]
        index = self.folder / "model.safetensors.index.json"
        if not index.exists():
            raise UserError(
                f"checkpoint {self.name!r} has no weights: {self.folder} holds neither model.safetensors nor "
                "model.safetensors.index.json. Only these are read; convert others with transformers' save_pretrained."
            )
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(Path(str(file)).name == file for file in weight_map.values()):
            raise UserError(f"{index} has no weight_map from weights to files beside it. Download it again.")
        names = sorted(set(weight_map.values()))
        missing = [name for name in names if not (self.folder / name).exists()]
        if missing:
            raise UserError(
                f"checkpoint {self.name!r} lacks weights: its index names {_listed(missing)}, which {self.folder} does "
                "not hold. Download it again."
            )
        return [self.folder / name for name in names]

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of each weight that config.json asks for."""
        return _layout(self._transformers_config("eager"), self.is_moe)

    def full_config(self) -> dict[str, Any]:
        """config.json with the defaults of transformers for what it leaves out, for engines that have others or none.

        Raises:
            UserError: it cannot be used.
        """
        config = self._transformers_config("eager")
        return self.config | {name: getattr(config, name) for name in MODEL_SETTINGS if hasattr(config, name)}

    def check_weights(self) -> None:
        """Compare the weight files with what config.json asks for.

        Raises:
            UserError: weights are missing, unexpected, of another shape, or cut short; the message names them.
        """
        self._check_layout(self._transformers_config("eager"), self.weight_files())

    def load_model(self, *, dtype: Any, device: Any, attention: str) -> Any:
        """Load the weights into transformers' Qwen3ForCausalLM or Qwen3MoeForCausalLM.

        They go to the device as they are read.

        Args:
            dtype: torch dtype of the weights in memory.
            device: torch device.
            attention: name of an attention function registered with transformers, "sdpa" or "eager".

        Raises:
            UserError: weights are missing, unexpected, of another shape, or cut short (the message names them), or do
                not fit on the device.
            EngineError: this transformers does not take SDAR's weights for what they are.
        """
        import torch
        import transformers
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        assert isinstance(dtype, torch.dtype), dtype
        assert attention in {"eager", *ALL_ATTENTION_FUNCTIONS.keys()}, attention
        version = tuple(map(int, transformers.__version__.split(".")[:2]))
        config = self._transformers_config(attention)
        self._check_layout(config, self.weight_files())
        self._check_memory(config, dtype, torch.device(device))
        with tempfile.TemporaryDirectory(prefix="sdar-weights-") as clean, _no_progress_bars():
            self._link_weights(Path(clean))
            (Path(clean) / "generation_config.json").write_text("{}")  # transformers 5 insists on one
            try:
                model, report = getattr(transformers, ARCHITECTURES[self.config["model_type"]][1]).from_pretrained(
                    clean,
                    config=config,
                    use_safetensors=True,
                    local_files_only=True,
                    output_loading_info=True,
                    device_map=torch.device(device),
                    **{"dtype" if version >= (4, 56) else "torch_dtype": dtype},
                )
            except torch.OutOfMemoryError as error:
                raise UserError(
                    f"the weights of checkpoint {self.name!r} do not fit on {device}: {error} {LESS_MEMORY}"
                ) from error
            except Exception as error:
                raise UserError(
                    f"the weights of checkpoint {self.name!r} cannot be loaded: {type(error).__name__}: {error}"
                ) from error
        left = {str(name) for what in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in report[what]}
        if config.tie_word_embeddings:
            left.discard("lm_head.weight")
        if left:
            raise EngineError(
                f"checkpoint {self.name!r} is whole, but transformers {transformers.__version__} did not take its "
                f"{_listed(sorted(left))}. Install another version of transformers."
            )
        if config.tie_word_embeddings:
            model.lm_head.weight = model.model.embed_tokens.weight  # also where the files hold another head
        if self.is_moe and version < (4, 53):
            _hand_keywords_to_attention(model.model)
        return model.requires_grad_(False).eval()

    @contextlib.contextmanager
    def clean_folder(self, config: Mapping[str, Any], tokenizer: Mapping[str, Any] | None = None) -> Iterator[Path]:
        """A temporary folder for an engine that opens checkpoints by itself: no code in it, and none named.

        Args:
            config: what its config.json holds.
            tokenizer: keys to set in its tokenizer_config.json.

        Yields:
            The folder, with the tokenizer's files and links to the weights.

        Raises:
            UserError: the weights are not those that the checkpoint's config.json asks for, or no tokenizer is there.
        """
        self.check_weights()
        with tempfile.TemporaryDirectory(prefix="sdar-checkpoint-") as clean:
            self._link_weights(Path(clean))
            _copy_tokenizer(self.name, self.folder, Path(clean), tokenizer or {})
            (Path(clean) / "config.json").write_text(json.dumps(dict(config)), encoding="utf-8")
            yield Path(clean)

    def _link_weights(self, target: Path) -> None:
        for path in [*self.weight_files(), self.folder / "model.safetensors.index.json"]:
            if path.exists():
                (target / path.name).symlink_to(path.resolve())

    def _transformers_config(self, attention: str) -> Any:
        """Translate config.json into transformers' config of the same layout."""
        import transformers

        not_of_the_model = ("architectures", "auto_map", "model_type", "attn_implementation", "torch_dtype", "dtype",
                            "transformers_version", "use_cache", "rope_parameters")  # fmt: skip
        settings = {key: value for key, value in self.config.items() if key not in not_of_the_model}
        if settings.get("use_sliding_window"):
            raise UserError(f"checkpoint {self.name!r} has use_sliding_window=true, which is not supported.")
        # transformers 5 writes rope_parameters, which 4 does not know: its rope_theta would be 10000. Both read these.
        if rope := dict(self.config.get("rope_parameters") or {}):
            settings["rope_theta"] = rope.pop("rope_theta", settings.get("rope_theta", 10000.0))
            settings["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else rope
        try:
            config = getattr(transformers, ARCHITECTURES[self.config["model_type"]][0])(**settings, use_cache=False)
            if getattr(config, "head_dim", None) is None:  # Qwen3MoeConfig has no default of its own
                config.head_dim = config.hidden_size // config.num_attention_heads
            _layout(config, self.is_moe)  # takes wrong types to light
        except Exception as error:
            raise UserError(f"config.json of checkpoint {self.name!r} cannot be used: {error}") from error
        config._attn_implementation = attention
        return config

    def _check_memory(self, config: Any, dtype: Any, device: Any) -> None:
        """Refuse weights that a GPU has no room for, before they are read."""
        size = sum(map(math.prod, _layout(config, self.is_moe).values())) * dtype.itemsize
        free = _free_memory(device)
        if free is not None and size > free:
            raise UserError(
                f"the weights of checkpoint {self.name!r} take {size / 2**30:.1f} GiB as "
                f"{str(dtype).removeprefix('torch.')}, but {device} has {free / 2**30:.1f} GiB free. {LESS_MEMORY}"
            )

    def _check_layout(self, config: Any, files: list[Path]) -> None:
        """Compare names and shapes of the weights with what the configuration asks for."""
        found: dict[str, tuple[int, ...]] = {}
        for path in files:
            found |= _read_shapes(path)
        wanted = _layout(config, self.is_moe)
        ignored = (*IGNORED_WEIGHTS, *(["lm_head.weight"] if config.tie_word_embeddings else []))
        wrong = {
            "missing": sorted(wanted.keys() - found.keys()),
            "unexpected": sorted(name for name in found.keys() - wanted.keys() if not name.endswith(ignored)),
            "of another shape": [
                f"{name} {list(found[name])} in place of {list(shape)}"
                for name, shape in sorted(wanted.items())
                if found.get(name, shape) != shape
            ],
        }
        if any(wrong.values()):
            told = "; ".join(f"{what}: {_listed(names)}" for what, names in wrong.items() if names)
            raise UserError(f"the weights of checkpoint {self.name!r} do not fit its config.json; {told}.")


def _free_memory(device: Any) -> int | None:
    """Bytes that a GPU has free, for new tensors too; None for other devices."""
    import torch

    if device.type != "cuda":
        return None
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + unused


def _resolve(name: str, revision: str | None) -> Path:
    folder = DEMO_CHECKPOINT if name == "demo" else Path(name).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise UserError(f"revision={revision!r} was given, but {name!r} is a folder; revisions belong to hub ids.")
        return folder
    if name.startswith((".", "~")) or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UserError(
            f"pretrained={name!r}: no such folder. Give an existing folder, a hub id such as JetLM/SDAR-4B-Chat, or "
            "demo."
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


def _whole(key: str, config: Mapping[str, Any], name: str, default: int) -> int:
    value = config.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(
            f"checkpoint {name!r} has {key}={value!r} in its config.json; it must be a whole number above 0."
        )
    return value


def _ids(value: Any, name: str) -> tuple[int, ...]:
    """One token id, several, or none, as `eos_token_id` has it."""
    ids = () if value is None else tuple(value) if isinstance(value, list) else (value,)
    if not all(isinstance(token, int) for token in ids):
        raise UserError(f"checkpoint {name!r} has eos_token_id={value!r}; it must be a token id or a list of them.")
    return ids


def _block_length(name: str, config: Mapping[str, Any]) -> int:
    for key in ("block_size", "block_length"):
        if length := _whole(key, config, name, 0):
            return length
    if match := re.search(r"-b([1-9]\d*)/?$", name):
        return int(match[1])
    logger.warning(
        "checkpoint %r does not say its block size; %d is assumed. Give block_length=N if it was trained with another.",
        name,
        DEFAULT_BLOCK_LENGTH,
    )
    return DEFAULT_BLOCK_LENGTH


def _open_tokenizer(name: str, folder: Path) -> Any:
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory(prefix="sdar-tokenizer-") as clean:
        _copy_tokenizer(name, folder, Path(clean))
        try:
            tokenizer = AutoTokenizer.from_pretrained(clean, trust_remote_code=False)
        except Exception as error:
            raise UserError(f"the tokenizer of checkpoint {name!r} cannot be read: {error}") from error
    tokenizer.name_or_path = name
    return tokenizer


def _copy_tokenizer(name: str, folder: Path, target: Path, changes: Mapping[str, Any] | None = None) -> None:
    """Copy a tokenizer's files; its settings name no code, and `changes` replace theirs."""
    present = [folder / file for file in TOKENIZER_FILES if (folder / file).exists()]
    has = {path.name for path in present}
    if not ("tokenizer.json" in has or {"vocab.json", "merges.txt"} <= has):
        raise UserError(
            f"checkpoint {name!r} has no tokenizer: {folder} holds no tokenizer.json, nor vocab.json and merges.txt."
        )
    settings = _read_json(folder / "tokenizer_config.json") if "tokenizer_config.json" in has else {}
    settings.pop("auto_map", None)
    if settings.get("tokenizer_class") in (None, "TokenizersBackend"):  # not named, or as only transformers 5 names it
        settings["tokenizer_class"] = "PreTrainedTokenizerFast" if "tokenizer.json" in has else "Qwen2Tokenizer"
    for path in present:
        (target / path.name).write_bytes(path.read_bytes())
    (target / "tokenizer_config.json").write_text(json.dumps(settings | dict(changes or {})), encoding="utf-8")


def _layout(config: Any, is_moe: bool) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight that a file must hold.

    Source: modeling_sdar.py and modeling_sdar_moe.py of JetLM's checkpoints.
    """
    d, size, vocabulary = config.hidden_size, config.head_dim, config.vocab_size
    heads, kv_heads = config.num_attention_heads * size, config.num_key_value_heads * size
    projections = {"q_proj": (heads, d), "k_proj": (kv_heads, d), "v_proj": (kv_heads, d), "o_proj": (d, heads)}

    layout: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, d), "model.norm.weight": (d,)}
    if not config.tie_word_embeddings:
        layout["lm_head.weight"] = (vocabulary, d)
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}"
        layout |= {f"{layer}.{norm}_layernorm.weight": (d,) for norm in ("input", "post_attention")}
        layout |= {f"{layer}.self_attn.{norm}_norm.weight": (size,) for norm in "qk"}
        layout |= {f"{layer}.self_attn.{name}.weight": shape for name, shape in projections.items()}
        if config.attention_bias:
            layout |= {f"{layer}.self_attn.{name}.bias": shape[:1] for name, shape in projections.items()}
        mlps = {f"{layer}.mlp": config.intermediate_size}
        if is_moe and i not in config.mlp_only_layers and (i + 1) % config.decoder_sparse_step == 0:
            layout[f"{layer}.mlp.gate.weight"] = (config.num_experts, d)
            mlps = {f"{layer}.mlp.experts.{e}": config.moe_intermediate_size for e in range(config.num_experts)}
        for mlp, width in mlps.items():
            layout |= {f"{mlp}.{name}_proj.weight": (width, d) for name in ("gate", "up")}
            layout[f"{mlp}.down_proj.weight"] = (d, width)
    return layout


def _read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes in a safetensors file, whose length is what its header promises: a download cut short is named.

    Layout: 8 bytes little-endian header length, the header as JSON with `shape` and `data_offsets`, then the data.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            start = file.read(8)
            if len(start) < 8 or (length := struct.unpack("<Q", start)[0]) > size - 8:
                raise ValueError("its header is cut short")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if size != end:
            raise ValueError(f"it has {size:,} bytes where its header promises {end:,}")
        return {name: tuple(entry["shape"]) for name, entry in header.items()}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a whole safetensors file: {error}. Download it again.") from error


def _hand_keywords_to_attention(model: Any) -> None:
    """Let the model's keyword arguments reach its attention, which the MoE layers of transformers 4.52 keep back."""
    given: dict[str, Any] = {}
    model.register_forward_pre_hook(lambda _, args, keywords: given.update(keywords), with_kwargs=True)
    model.register_forward_hook(lambda *_: given.clear())
    for layer in model.layers:
        layer.self_attn.register_forward_pre_hook(lambda _, args, keywords: (args, given | keywords), with_kwargs=True)


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    from transformers.utils import logging as bars

    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
