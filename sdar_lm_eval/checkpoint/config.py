"""Checks the values of a checkpoint's config.json, and translates config.json to transformers' config."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdar_lm_eval.defaults import DEFAULT_BLOCK_LENGTH
from sdar_lm_eval.errors import UserError
from sdar_lm_eval.families import FAMILIES
from sdar_lm_eval.families.base import Config, Family
from sdar_lm_eval.files import one_line, shown

if TYPE_CHECKING:
    from transformers import PretrainedConfig

logger = logging.getLogger(__name__)

# Key -> the largest plausible value. A larger value is a mistake, and transformers would build a model of this size.
WHOLE = {
    "block_length": 2**16, "block_size": 2**16, "decoder_sparse_step": 10**4, "head_dim": 2**16, "hidden_size": 2**20,
    "intermediate_size": 2**24, "max_position_embeddings": 2**40, "moe_intermediate_size": 2**24,
    "num_attention_heads": 2**16, "num_experts": 2**16, "num_experts_per_tok": 2**16, "num_hidden_layers": 10**4,
    "num_key_value_heads": 2**16, "vocab_size": 2**28,
}  # fmt: skip


def _is_whole(value: object, least: int = 0, most: int = 2**62) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_positive(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def _all(check: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, list) and all(map(check, value))


# Keys, a check of their values, and what the check requires, in words.
KINDS: tuple[tuple[tuple[str, ...], Callable[[object], bool], str], ...] = (
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
    """Check each value of config.json that is read, and that the values fit together. null means not given.

    Returns:
        The model's family.

    Raises:
        UserError: no family has this model type, or a value has a wrong type, is out of range, or does not fit another.
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
        raise UserError(
            f"checkpoint {name!r} has use_sliding_window=true in its config.json, which this package does not support. "
            "Use a checkpoint without a sliding window."
        )
    heads, kv_heads = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if heads is not None and kv_heads is not None and heads % kv_heads:
        raise _wrong(name, config, "num_key_value_heads", f"a divisor of num_attention_heads={heads}")
    experts, used = config.get("num_experts"), config.get("num_experts_per_tok")
    if family.is_moe and experts is not None and used is not None and used > experts:
        raise _wrong(name, config, "num_experts_per_tok", f"at most num_experts={experts}")
    return family


def _wrong(name: str, config: Config, key: str, words: str) -> UserError:
    return UserError(
        f"checkpoint {name!r} has {key}={shown(config[key])} in its config.json; it must be {words}. "
        "Correct the file, or download it again."
    )


def vocabulary_of(config: Config, family: Family) -> int:
    """The number of rows of the embedding: every token id is below it."""
    return config.get("vocab_size") or family.defaults["vocab_size"]


def max_length_of(config: Config, family: Family) -> int:
    """Most tokens of prompt and answer together."""
    return config.get("max_position_embeddings") or family.defaults["max_position_embeddings"]


def read_stop_ids(name: str, value: Any, vocabulary: int) -> tuple[int, ...]:
    """Read `eos_token_id`: one token id, a list of ids, or None.

    Raises:
        UserError: an id is no token of the vocabulary.
    """
    ids = () if value is None else tuple(value) if isinstance(value, list) else (value,)
    if not all(_is_whole(token, 0, vocabulary - 1) for token in ids):
        raise UserError(
            f"checkpoint {name!r} has eos_token_id={shown(value)}; it must be a token id or a list of them, each below "
            f"its vocab_size={vocabulary}. Correct its generation_config.json or config.json."
        )
    return ids


def check_mask_token(name: str, mask_token_id: object, vocabulary: int) -> None:
    """Check the mask token.

    Raises:
        UserError: the checkpoint names no mask token, or the id is no token of the vocabulary.
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
    """The block length that the model was trained with: from config.json, else from the name, else 4.

    Args:
        name: the checkpoint's name as the user gave it.
        folder: the folder of the checkpoint's files.
        config: the content of config.json.
    """
    said = config.get("block_size") or config.get("block_length")
    named = next(filter(None, map(_block_length_in, _model_names(name, folder))), None)
    if said is not None:
        if named not in (None, said):
            logger.warning(
                "checkpoint %r has a block size of %d in its config.json, and of %d in its name. config.json decides. "
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
    """Names that the model may have, best first: its name on the hub, or the name of its folder.

    In two layouts an outer folder has the model's name: a trainer's `name/checkpoint-500`, and the hub cache's
    `models--owner--name/snapshots/commit`.
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
    """N of the last separate part `bN` of a name. JetLM's names end in it (-b8); others have parts after it."""
    found = re.findall(r"(?<![^-_.])b([1-9]\d{0,3})(?![^-_.])", name)
    return int(found[-1]) if found else None


def transformers_config(name: str, config: Config, family: Family, attention: str) -> PretrainedConfig:
    """Translate config.json to transformers' config of the family.

    Only the family's settings and RoPE are passed on, so that no other key can make transformers build anything.

    Raises:
        UserError: transformers cannot use the config.
    """
    import transformers
    from transformers.activations import ACT2FN

    settings = {key: config[key] for key in (*family.settings, "rope_theta", "rope_scaling") if key in config}
    # transformers 5 writes rope_parameters. transformers 4 would ignore this key and use rope_theta=10000, so it is
    # translated to rope_theta and rope_scaling, which both versions read.
    if rope := dict(config.get("rope_parameters") or {}):
        settings["rope_theta"] = rope.pop("rope_theta", settings.get("rope_theta", 10000.0))
        settings["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else rope
    if config.get("hidden_act") is not None and config["hidden_act"] not in ACT2FN:
        raise _wrong(name, config, "hidden_act", "an activation of transformers, such as silu")
    try:
        translated = getattr(transformers, family.config_class)(**settings, use_cache=False)
        if getattr(translated, "head_dim", None) is None:  # Qwen3MoeConfig has no default for it
            translated.head_dim = translated.hidden_size // translated.num_attention_heads
    except Exception as error:
        raise UserError(f"config.json of checkpoint {name!r} cannot be used: {one_line(error)}") from error
    translated._attn_implementation = attention
    return translated
