"""`config.json` of a checkpoint: checks its values, and translates them into transformers' config of that layout."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdar_lm_eval.defaults import DEFAULT_BLOCK_LENGTH
from sdar_lm_eval.errors import UserError
from sdar_lm_eval.families import FAMILIES
from sdar_lm_eval.family import Family
from sdar_lm_eval.files import one_line, shown

if TYPE_CHECKING:
    from transformers import PretrainedConfig

logger = logging.getLogger(__name__)

Config = Mapping[str, Any]

# Key -> the largest value that is believed. Larger ones are slips, and would be built before anything fails.
WHOLE = {
    "block_length": 2**16, "block_size": 2**16, "decoder_sparse_step": 10**4, "head_dim": 2**16, "hidden_size": 2**20,
    "intermediate_size": 2**24, "max_position_embeddings": 2**40, "moe_intermediate_size": 2**24,
    "num_attention_heads": 2**16, "num_experts": 2**16, "num_experts_per_tok": 2**16, "num_hidden_layers": 10**4,
    "num_key_value_heads": 2**16, "vocab_size": 2**28,
}  # fmt: skip


def _is_whole(value: Any, least: int = 0, most: int = 2**62) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def _all(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(check, value))


# Keys, what their values must be, and that in words.
KINDS: tuple[tuple[tuple[str, ...], Callable[[Any], bool], str], ...] = (
    (
        ("attention_bias", "norm_topk_prob", "tie_word_embeddings", "use_sliding_window"),
        lambda value: isinstance(value, bool),
        "true or false",
    ),
    (("rms_norm_eps", "rope_theta"), _is_positive, "a number above 0"),
    (("dtype", "hidden_act", "torch_dtype"), lambda value: isinstance(value, str), "a text"),
    (("mlp_only_layers",), _all(_is_whole), "a list of layers"),
    (("rope_parameters", "rope_scaling"), lambda value: isinstance(value, dict), "an object"),
    (
        ("layer_types",),
        _all(lambda kind: kind == "full_attention"),
        "full_attention for each layer, the only kind here",
    ),
)


def check_config(name: str, config: Config) -> Family:
    """Check each value of `config.json` that is read, by itself and beside the others; null counts as left out.

    Returns:
        The model's family.

    Raises:
        UserError: no family has this model type, or a value is of another type, out of range, or at odds with another.
    """
    model_type = config.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise UserError(
            f"checkpoint {name!r} has model_type {shown(model_type)}; this package runs "
            f"{' and '.join(repr(known) for known in FAMILIES)} (the SDAR family). "
            "Run other models with lm_eval's own, such as --model hf."
        )
    for key, most in WHOLE.items():
        if config.get(key) is not None and not _is_whole(config[key], 1, most):
            raise _wrong(name, config, key, f"a whole number from 1 to {most:,}")
    for keys, is_right, words in KINDS:
        for key in keys:
            if config.get(key) is not None and not is_right(config[key]):
                raise _wrong(name, config, key, words)
    for rope in ("rope_parameters", "rope_scaling"):
        theta = (config.get(rope) or {}).get("rope_theta")
        if theta is not None and not _is_positive(theta):
            raise _wrong(name, config, rope, "an object whose rope_theta is a number above 0")
    if (config.get("head_dim") or 2) % 2:
        raise _wrong(name, config, "head_dim", "even, for rotary position embeddings")
    if config.get("use_sliding_window"):
        raise UserError(f"checkpoint {name!r} has use_sliding_window=true, which is not supported.")
    for part, whole in (("num_key_value_heads", "num_attention_heads"), ("num_experts_per_tok", "num_experts")):
        small, large = config.get(part), config.get(whole)
        if small is None or large is None or (whole == "num_experts" and not family.is_moe):
            continue
        if small > large or (whole == "num_attention_heads" and large % small):
            raise _wrong(name, config, part, f"fit {whole}={large}")
    return family


def _wrong(name: str, config: Config, key: str, words: str) -> UserError:
    return UserError(
        f"checkpoint {name!r} has {key}={shown(config[key])} in its config.json; it must be {words}. "
        "Correct the file, or download it again."
    )


def vocabulary_of(config: Config, family: Family) -> int:
    """How many rows the embedding has: every token is below."""
    return config.get("vocab_size") or family.defaults["vocab_size"]


def max_length_of(config: Config, family: Family) -> int:
    """Most tokens of prompt and answer together."""
    return config.get("max_position_embeddings") or family.defaults["max_position_embeddings"]


def stop_ids_of(name: str, value: Any, vocabulary: int) -> tuple[int, ...]:
    """One token id, several, or none, as `eos_token_id` has it.

    Raises:
        UserError: one of them is no token.
    """
    ids = () if value is None else tuple(value) if isinstance(value, list) else (value,)
    if not all(_is_whole(token, 0, vocabulary - 1) for token in ids):
        raise UserError(
            f"checkpoint {name!r} has eos_token_id={shown(value)}; it must be a token id or a list of them, each below "
            f"its vocab_size={vocabulary}. Correct its generation_config.json or config.json."
        )
    return ids


def check_mask_token(name: str, mask_token_id: Any, vocabulary: int) -> None:
    """Check the token that stands for "not yet known".

    Raises:
        UserError: none is named, or it is no token.
    """
    if mask_token_id is None:
        raise UserError(
            f"checkpoint {name!r} names no mask token: neither mask_token_id in config.json nor mask_token in "
            "tokenizer_config.json. Add the one it was trained with to config.json."
        )
    if not _is_whole(mask_token_id, 0, vocabulary - 1):
        raise UserError(
            f"checkpoint {name!r} has mask_token_id={shown(mask_token_id)}, which must be a token below its "
            f"vocab_size={vocabulary}. Correct its config.json."
        )


def block_length_of(name: str, folder: Path, config: Config) -> int:
    """Tokens that the model was trained to denoise together: config.json's, else the name's, else 4.

    Args:
        name: as the user gave it.
        folder: where the checkpoint's files are.
        config: its config.json.
    """
    said = config.get("block_size") or config.get("block_length")
    named = next(filter(None, map(_block_length_in, _model_names(name, folder))), None)
    if said is not None:
        if named not in (None, said):
            logger.warning(
                "checkpoint %r has a block size of %d in its config.json, which is used, but of %d in its name. "
                "Give block_length=%d if the name is right.",
                name, said, named, named,
            )  # fmt: skip
        return int(said)
    if named is None:
        logger.warning(
            "checkpoint %r does not say its block size; %d is assumed. Give block_length=N if it was trained with "
            "another.",
            name,
            DEFAULT_BLOCK_LENGTH,
        )
    return named or DEFAULT_BLOCK_LENGTH


def _model_names(name: str, folder: Path) -> list[str]:
    """What the model may be called, best first: the hub's name for it, or its own folder's, but no folder above.

    Of a trainer's `checkpoint-500` and of a hub's `models--owner--name/snapshots/commit` the model's folder is above.
    """
    if not Path(name).expanduser().is_dir():  # a hub id
        return [name.rpartition("/")[2]]
    names = []
    for path in (Path(name).expanduser().absolute(), folder.resolve()):
        parts = list(path.parts)
        if len(parts) > 2 and parts[-2] == "snapshots" and parts[-3].startswith("models--"):
            names.append(parts[-3].rpartition("--")[2])
            continue
        while len(parts) > 1 and re.fullmatch(r"checkpoint-\d+", parts[-1]):
            parts.pop()
        names.append(parts[-1])
    return names


def _block_length_in(name: str) -> int | None:
    """N of the last `b…N` that stands by itself in a name: JetLM's end in -b8, others go on behind it."""
    found = re.findall(r"(?<![^-_.])b([1-9]\d{0,3})(?![^-_.])", name)
    return int(found[-1]) if found else None


def transformers_config(name: str, config: Config, family: Family, attention: str) -> PretrainedConfig:
    """Translate config.json into transformers' config of the same layout.

    Of its keys those alone go there that say how the model computes: no other can make transformers build anything.

    Raises:
        UserError: transformers cannot use it.
    """
    import transformers
    from transformers.activations import ACT2FN

    settings = {key: config[key] for key in (*family.settings, "rope_theta", "rope_scaling") if key in config}
    # transformers 5 writes rope_parameters, which 4 does not know: its rope_theta would be 10000. Both read these.
    if rope := dict(config.get("rope_parameters") or {}):
        settings["rope_theta"] = rope.pop("rope_theta", settings.get("rope_theta", 10000.0))
        settings["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else rope
    if config.get("hidden_act") is not None and config["hidden_act"] not in ACT2FN:
        raise _wrong(name, config, "hidden_act", "an activation of transformers, such as silu")
    try:
        translated = getattr(transformers, family.config_class)(**settings, use_cache=False)
        if getattr(translated, "head_dim", None) is None:  # Qwen3MoeConfig has no default of its own
            translated.head_dim = translated.hidden_size // translated.num_attention_heads
    except Exception as error:
        raise UserError(f"config.json of checkpoint {name!r} cannot be used: {one_line(error)}") from error
    translated._attn_implementation = attention
    return translated
