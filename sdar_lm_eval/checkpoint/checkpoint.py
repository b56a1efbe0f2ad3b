"""A checkpoint: its config, mask token, block length and stop tokens, its tokenizer and its weights."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sdar_lm_eval.checkpoint.config import (
    block_length_of,
    check_config,
    check_mask_token,
    max_length_of,
    read_stop_ids,
    transformers_config,
    vocabulary_of,
)
from sdar_lm_eval.checkpoint.fingerprint import fingerprint
from sdar_lm_eval.checkpoint.folder import resolve
from sdar_lm_eval.checkpoint.tokenizer import TOKENIZER_FILES, Tokenizer, copy_tokenizer, open_tokenizer
from sdar_lm_eval.checkpoint.weights import INDEX, check_headers, check_layout, link_weights, load, weight_files
from sdar_lm_eval.checks import checks_types
from sdar_lm_eval.errors import UserError
from sdar_lm_eval.families.base import Config, Family
from sdar_lm_eval.files import one_line, plain_text, read_json

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint.

    Attributes:
        name: the name that the user gave: hub id, folder, or `demo`.
        folder: the folder of the files.
        config: the content of config.json, unchanged.
        family: the family of `model_type` in config.json.
        mask_token_id: the token at masked positions.
        block_length: tokens that the model was trained to denoise together: config.json's `block_size`, else the
            number in the name (JetLM's names end in -b8, -b16, ... where it is not 4), else 4.
        stop_ids: tokens that end an answer: generation_config.json's, else config.json's, else the tokenizer's.
        max_length: most tokens of prompt and answer together (`max_position_embeddings`).
        revision: branch, tag or commit of the hub id, as the user gave it.
    """

    name: str
    folder: Path
    config: Config = dataclasses.field(repr=False)
    family: Family
    mask_token_id: int
    block_length: int
    stop_ids: tuple[int, ...]
    max_length: int
    revision: str | None = None

    @classmethod
    @checks_types
    def open(cls, name: str | PathLike[str], revision: str | None = None) -> Checkpoint:
        """Open a checkpoint by hub id, folder or `demo`. Reads the headers of existing weight files.

        Args:
            name: `demo`, an existing folder, or a hub id (`owner/name`), downloaded to the hub's cache.
            revision: branch, tag or commit; for hub ids only.

        Raises:
            UserError: the folder or the id does not exist, there is no config.json, no family has the model type, no
                mask token is named, or a value or a file cannot be used.
        """
        name = plain_text(name)
        folder = resolve(name, revision)
        try:
            return cls._open(name, folder, revision)
        except OSError as error:
            raise UserError(f"checkpoint {name!r} cannot be read: {one_line(error)}") from error

    @classmethod
    def _open(cls, name: str, folder: Path, revision: str | None) -> Checkpoint:
        if not (folder / "config.json").exists():
            raise UserError(
                f"checkpoint {name!r} has no config.json: {folder} is not a checkpoint's folder. Give the folder that "
                "has config.json, the tokenizer and the weights."
            )
        config = read_json(folder / "config.json")
        family = check_config(name, config)
        check_headers(name, folder, config, family)
        vocabulary = vocabulary_of(config, family)
        generation_config = folder / "generation_config.json"
        generation = read_json(generation_config) if generation_config.exists() else {}
        stop_ids = read_stop_ids(name, generation.get("eos_token_id"), vocabulary)
        stop_ids = stop_ids or read_stop_ids(name, config.get("eos_token_id"), vocabulary)
        mask_token_id = config.get("mask_token_id")
        tokenizer = None
        if mask_token_id is None or not stop_ids:
            tokenizer = open_tokenizer(name, folder, vocabulary)
            mask_token_id = tokenizer.mask_token_id if mask_token_id is None else mask_token_id
            stop_ids = stop_ids or read_stop_ids(name, tokenizer.eos_token_id, vocabulary)
        check_mask_token(name, mask_token_id, vocabulary)
        assert isinstance(mask_token_id, int)
        opened = cls(
            name=name,
            folder=folder,
            config=config,
            family=family,
            mask_token_id=mask_token_id,
            block_length=block_length_of(name, folder, config),
            stop_ids=stop_ids,
            max_length=max_length_of(config, family),
            revision=revision,
        )
        if tokenizer is not None:
            opened.__dict__["tokenizer"] = tokenizer  # so that `tokenizer` does not read it again
        return opened

    @property
    def is_moe(self) -> bool:
        """Whether layers have experts."""
        return self.family.is_moe

    @property
    def vocabulary(self) -> int:
        """Number of rows of the embedding: every token id is below it. A config.json may leave it to the default."""
        return vocabulary_of(self.config, self.family)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer, opened from a copy of its files without references to code.

        Raises:
            UserError: the folder has no tokenizer, transformers cannot read it, or it has tokens that the embedding
                lacks.
        """
        return open_tokenizer(self.name, self.folder, self.vocabulary)

    @checks_types
    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of tokens without special tokens; white space is unchanged.

        Raises:
            UserError: a token is no token id.
        """
        ids = token_ids if hasattr(token_ids, "__array__") else list(token_ids)
        with self.refusing_large_ids(ids):
            # transformers visits each token of a list in Python, so it gets an array.
            array = np.asarray(ids, dtype=np.int64)
            return self.tokenizer.decode(array, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    @contextlib.contextmanager
    def refusing_large_ids(self, token_ids: Iterable[int]) -> Iterator[None]:
        """Name the token that the tokenizer refuses: a negative one, or one of more than 32 bits.

        Raises:
            UserError: the tokenizer refuses a token.
        """
        try:
            yield
        except OverflowError as error:
            token = next(token for token in map(int, token_ids) if not 0 <= token < self.vocabulary)
            raise UserError(f"{self.name} has no token {token}. Give tokens of 0 to {self.vocabulary - 1}.") from error

    def special_token(self, text: str) -> int | None:
        """Return the special token that a text spells, which `decode` leaves out; None if the text spells none."""
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        return ids[0] if len(ids) == 1 and not self.decode(ids) and text.strip() else None

    def has_special_tokens(self, text: str) -> bool:
        """Whether a text contains a special token, alone or beside other text."""
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        return self.decode(ids) != self.tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of every byte that answers depend on: weights, config, tokenizer and chat template.

        Weight files are hashed once; their hashes are stored (`fingerprint.py`).
        """
        files = [self.folder / name for name in ("generation_config.json", *TOKENIZER_FILES)]
        return fingerprint(self.config, [path for path in files if path.exists()], self.weight_files())

    def weight_files(self) -> list[Path]:
        """Return the safetensors files that hold the weights: model.safetensors, else those that its index names.

        Raises:
            UserError: there are none, one that the index names is missing, or one is no regular file.
        """
        return weight_files(self.name, self.folder)

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the name and shape of each weight that config.json asks for."""
        return self.family.weights(self._transformers_config("eager"))

    def full_config(self) -> Config:
        """Return config.json completed with transformers' defaults, for engines that have other defaults or none.

        Raises:
            UserError: transformers cannot use the config.
        """
        config = self._transformers_config("eager")
        return {
            **self.config,
            **{name: getattr(config, name) for name in self.family.settings if hasattr(config, name)},
        }

    def check_weights(self) -> None:
        """Compare the weight files with the weights that config.json asks for.

        Raises:
            UserError: weights are missing, unexpected, of another shape, or cut short; the message names them.
        """
        check_layout(self.name, self._transformers_config("eager"), self.family, self.weight_files())

    def load_model(self, *, dtype: torch.dtype, device: torch.device | str, attention: str) -> PreTrainedModel:
        """Load the weights into the family's model class of transformers.

        Each weight is copied to the device as it is read.

        Args:
            dtype: torch dtype of the weights in memory.
            device: torch device.
            attention: name of an attention function registered with transformers, "sdpa" or "eager".

        Raises:
            UserError: weights are missing, unexpected, of another shape, or cut short (the message names them), or do
                not fit on the device.
            EngineError: the installed transformers does not load all weights.
        """
        import torch
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        assert isinstance(dtype, torch.dtype), dtype
        assert attention in {"eager", *ALL_ATTENTION_FUNCTIONS.keys()}, attention
        config, files = self._transformers_config(attention), self.weight_files()
        check_layout(self.name, config, self.family, files)
        return load(self.name, files, self.folder / INDEX, self.family, config, dtype=dtype, device=device)

    @contextlib.contextmanager
    def clean_folder(
        self, config: Mapping[str, object], tokenizer: Mapping[str, object] | None = None
    ) -> Iterator[Path]:
        """Make a temporary folder, without code or references to code, for an engine that opens checkpoints itself.

        Args:
            config: the content of the folder's config.json.
            tokenizer: keys to set in the folder's tokenizer_config.json.

        Yields:
            The folder, with the tokenizer's files and links to the weights.

        Raises:
            UserError: the weights do not fit the checkpoint's config.json, or there is no tokenizer.
        """
        self.check_weights()
        with tempfile.TemporaryDirectory(prefix="sdar-checkpoint-") as clean:
            link_weights(self.weight_files(), self.folder / INDEX, Path(clean))
            copy_tokenizer(self.name, self.folder, Path(clean), tokenizer or {})
            (Path(clean) / "config.json").write_text(json.dumps(dict(config)), encoding="utf-8")
            yield Path(clean)

    def _transformers_config(self, attention: str) -> PretrainedConfig:
        return transformers_config(self.name, self.config, self.family, attention)
