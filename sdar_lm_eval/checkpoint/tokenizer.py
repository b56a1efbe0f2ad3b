"""The tokenizer of a checkpoint: opened from a copy of its files that names no code, and checked."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, overload

from sdar_lm_eval.errors import UserError
from sdar_lm_eval.files import one_line, read_bytes, read_json, shown

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
# A pattern with nested repetitions exceeds the regular expression engine's limit of steps on one of these texts.
PROBES = tuple(f"{part * 500}{end}" for part in ("a", "aB ", " ", "1", "-", "\n", "é", "字") for end in ("!", "x"))


class AddedToken(Protocol):
    """A token beside the tokenizer's own vocabulary."""

    @property
    def content(self) -> str:
        """The token's text."""

    @property
    def special(self) -> bool:
        """Whether decoding may leave the token out."""


class Tokenizer(Protocol):
    """What this package uses of transformers' `PreTrainedTokenizerBase`."""

    name_or_path: str
    chat_template: object
    """A text, several by name, or None; unchecked (`chat_template.py`)."""
    bos_token: str | None
    bos_token_id: int | None
    eos_token_id: int | None
    mask_token_id: int | None

    @property
    def added_tokens_decoder(self) -> Mapping[int, AddedToken]:
        """Id -> token, of those beside the tokenizer's own vocabulary."""

    @property
    def special_tokens_map(self) -> Mapping[str, str | list[str]]:
        """Role -> token, such as `eos_token`."""

    @overload
    def __call__(
        self, text: str, *, add_special_tokens: bool, split_special_tokens: bool = ...
    ) -> Mapping[str, list[int]]: ...
    @overload
    def __call__(self, text: list[str], *, add_special_tokens: bool) -> Mapping[str, list[list[int]]]: ...

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Return the tokens of a text."""

    def decode(
        self,
        token_ids: list[int] | NDArray[np.int64],
        *,
        skip_special_tokens: bool = ...,
        clean_up_tokenization_spaces: bool,
    ) -> str:
        """Return the text of tokens."""

    def convert_ids_to_tokens(self, ids: int) -> str:
        """Return a token as the vocabulary spells it."""

    def get_vocab(self) -> dict[str, int]:
        """Return token -> id."""

    def apply_chat_template(
        self, conversation: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool
    ) -> str:
        """Render a conversation."""


def open_tokenizer(name: str, folder: Path, vocabulary: int) -> Tokenizer:
    """Open a checkpoint's tokenizer.

    Args:
        name: the checkpoint's, for messages.
        folder: where its files are.
        vocabulary: rows of the embedding.

    Raises:
        UserError: there is no tokenizer, transformers cannot read it, or it gives tokens that the embedding lacks.
    """
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory(prefix="sdar-tokenizer-") as clean:
        copy_tokenizer(name, folder, Path(clean))
        try:
            with _panics_as_errors(name):
                tokenizer: Tokenizer = AutoTokenizer.from_pretrained(clean, trust_remote_code=False)
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"the tokenizer of checkpoint {name!r} cannot be read: {one_line(error)}") from error
    tokenizer.name_or_path = name
    _guard(tokenizer, name)
    _check_ids(name, tokenizer, vocabulary)
    with _no_standard_error():  # a panic prints its own traceback
        for text in PROBES:
            tokenizer.encode(text, add_special_tokens=False)
    return tokenizer


def copy_tokenizer(name: str, folder: Path, target: Path, changes: Mapping[str, object] | None = None) -> None:
    """Copy a tokenizer's files. The copied tokenizer_config.json names no code, and has `changes` in it.

    Raises:
        UserError: there is no tokenizer, or one of its files cannot be read.
    """
    present = [folder / file for file in TOKENIZER_FILES if (folder / file).exists()]
    has = {path.name for path in present}
    if not ("tokenizer.json" in has or {"vocab.json", "merges.txt"} <= has):
        raise UserError(
            f"checkpoint {name!r} has no tokenizer: {folder} holds no tokenizer.json, nor vocab.json and merges.txt. "
            "Save the tokenizer into this folder."
        )
    settings = read_json(folder / "tokenizer_config.json") if "tokenizer_config.json" in has else {}
    settings.pop("auto_map", None)
    # transformers 4 does not know TokenizersBackend, which transformers 5 writes.
    if settings.get("tokenizer_class") in (None, "TokenizersBackend"):
        settings["tokenizer_class"] = "PreTrainedTokenizerFast" if "tokenizer.json" in has else "Qwen2Tokenizer"
    if not _is_template(settings.get("chat_template")):
        raise UserError(
            f"chat_template in {folder / 'tokenizer_config.json'} is {shown(settings['chat_template'])}; it must be a "
            'text, or a list of {"name": …, "template": …}. Correct the file, or remove the key.'
        )
    for path in present:
        content = read_bytes(path)
        try:
            content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 ({one_line(error)}). Download it again.") from error
        (target / path.name).write_bytes(content)
    (target / "tokenizer_config.json").write_text(json.dumps(settings | dict(changes or {})), encoding="utf-8")


def _is_template(value: object) -> bool:
    if isinstance(value, list):
        return all(isinstance(v, dict) and isinstance(v.get("name"), str) and _is_text(v, "template") for v in value)
    if isinstance(value, dict):
        return all(_is_text(value, key) for key in value)
    return value is None or isinstance(value, str)


def _is_text(values: Mapping[str, object], key: str) -> bool:
    return isinstance(values.get(key), str)


def _check_ids(name: str, tokenizer: Tokenizer, vocabulary: int) -> None:
    """Refuse tokens that the embedding has no row for: in the middle of a run they would end the process on a GPU."""
    remedy = f"Its config.json has vocab_size={vocabulary}. Take the tokenizer that belongs to the weights."
    token, last = max(tokenizer.get_vocab().items(), key=lambda entry: entry[1], default=("", 0))
    if last >= vocabulary:
        raise UserError(f"the tokenizer of checkpoint {name!r} has a token {shown(token)} with id {last}. {remedy}")
    framed = max(tokenizer.encode("a", add_special_tokens=True), default=0)
    if framed >= vocabulary:
        raise UserError(f"the tokenizer of checkpoint {name!r} adds a token {framed} to each text. {remedy}")


def _guard(tokenizer: Tokenizer, name: str) -> None:
    """Make a panic of the tokenizer's Rust code an error that names the checkpoint."""
    kind = type(tokenizer)

    class Guarded(kind):  # type: ignore[misc, valid-type]
        def __call__(self, *args: object, **keywords: object) -> object:
            with _panics_as_errors(name):
                return super().__call__(*args, **keywords)

        def encode(self, *args: object, **keywords: object) -> object:
            with _panics_as_errors(name):
                return super().encode(*args, **keywords)

    functools.update_wrapper(Guarded, kind, updated=())
    tokenizer.__class__ = Guarded


@contextlib.contextmanager
def _panics_as_errors(name: str) -> Iterator[None]:
    try:
        yield
    except (Exception, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # pyo3_runtime.PanicException, which no module exports
        raise UserError(
            f"the tokenizer of checkpoint {name!r} stopped in the middle of a text ({one_line(error)}). Its "
            "tokenizer.json holds a pattern that takes too long, or is damaged: take the file that belongs to the "
            "weights."
        ) from error


@contextlib.contextmanager
def _no_standard_error() -> Iterator[None]:
    """Silence the process's standard error, for code beside Python too."""
    try:
        kept = os.dup(2)
    except OSError:  # it is closed
        yield
        return
    try:
        if sys.stderr is not None:
            sys.stderr.flush()
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
