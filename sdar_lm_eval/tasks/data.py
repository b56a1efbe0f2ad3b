"""Where the tasks' documents come from: a folder of the user's, else the Hugging Face Hub or a data set's archive.

    documents(GSM8K, "test", metadata)    the rows of a split, each checked by its data set's `parse`

Metadata names a folder, or else an environment variable does: a data set's own folder (`gsm8k_dir`, `SDAR_GSM8K_DIR`),
or one for all (`sdar_data_dir`, `SDAR_DATA_DIR`), which holds a folder for each data set (`gsm8k`, `mmlu`, …). A data
set's folder holds the rows as the hub has them: one JSON object a line, or the hub's own parquet or CSV files in their
places.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import datasets
import huggingface_hub

from sdar_lm_eval.errors import UserError, did_you_mean, listed
from sdar_lm_eval.files import require_regular, shown

logger = logging.getLogger(__name__)

ROOT_KEY = "sdar_data_dir"
ROOT_VARIABLE = "SDAR_DATA_DIR"

_LONGER_KEYS = ("mmlu_pro_dir",)  # keys that begin as another data set's, and are no misspelling of it

Config = str | tuple[str, ...] | None
"""The hub's configuration, or several of which each has a part of the rows; None where the data set has one only."""

RowT = TypeVar("RowT", bound=Mapping[str, object])
RowT_co = TypeVar("RowT_co", bound=Mapping[str, object], covariant=True)


class RowError(Exception):
    """A row of a data set cannot be used; says what is wrong, as a sentence."""


class Columns:
    """A row as it was read. Its methods raise `RowError` where a column is missing, empty or of another type.

    Args:
        row: column -> value.
        example: a row as messages show it.
    """

    def __init__(self, row: Mapping[str, object], example: str) -> None:
        self._row, self._example = row, example

    def text(self, column: str) -> str:
        """Return a column's string, which is not blank."""
        value = self.string(column)
        if not value.strip():
            raise RowError(f"{column!r} is empty.")
        return value

    def string(self, column: str) -> str:
        """Return a column's string, which may be blank."""
        value = self._value(column)
        if not isinstance(value, str):
            raise self.malformed(column, "a string")
        return value

    def whole(self, column: str) -> int:
        """Return a column's whole number."""
        value = self._value(column)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.malformed(column, "a whole number")
        return value

    def items(self, column: str) -> list[object]:
        """Return a column's list, which is not empty."""
        value = self._value(column)
        if not isinstance(value, list):
            raise self.malformed(column, "a list")
        if not value:
            raise RowError(f"{column!r} is empty.")
        return value

    def texts(self, column: str, expected: str) -> list[str]:
        """Return a column's list of strings, which is not empty; `expected` says in the error what it has to be."""
        items = self.items(column)
        texts = [item for item in items if isinstance(item, str)]
        if len(texts) < len(items):
            raise self.malformed(column, expected)
        return texts

    def malformed(self, column: str, expected: str) -> RowError:
        """Return the error for a column whose value is not what was expected."""
        return RowError(f"{column!r} is {shown(self._row[column])}, not {expected}.")

    def _value(self, column: str) -> object:
        if column not in self._row:
            known = listed(list(map(repr, sorted(self._row))))
            raise RowError(f"no {column!r}, only {known}. Each line must be one {self._example}.")
        return self._row[column]


@dataclass(frozen=True)
class Archive:
    """A zip file that a data set is published in.

    Attributes:
        url: where the file is.
        md5: the file's MD5 checksum, in hexadecimal.
    """

    url: str
    md5: str


@dataclass(frozen=True)
class HubFile:
    """A file of a data set on the hub that has no configurations that can be loaded.

    Attributes:
        id: dataset id on the Hugging Face Hub.
        name: the file's name, with `{config}`.
    """

    id: str
    name: str


@dataclass(frozen=True)
class _Folder:
    """A folder that should hold a data set.

    Attributes:
        given: the folder as the user gave it, unchecked.
        named_by: the setting that named the folder, as the beginning of a message.
        below: the data set's folder in it; "" where it is the data set's own.
    """

    given: object
    named_by: str
    below: str = ""

    def __str__(self) -> str:
        """The folder as messages show it."""
        return repr(str(Path(str(self.given)) / self.below if self.below else self.given))


@dataclass(frozen=True)
class Source(Generic[RowT_co]):
    """A data set.

    Attributes:
        title: the data set's name in messages.
        folder: the data set's name in the folder for all, in the metadata key (`…_dir`) and in the environment
            variable (`SDAR_…_DIR`).
        hub: dataset id on the Hugging Face Hub, or a file there, or the archive of a data set that the hub lacks.
        config: the data set's configuration.
        files: where a folder may hold a split, as glob patterns with `{split}` and `{config}`; the first that matches
            is read.
        where: the files that a folder needs where the hub cannot be reached.
        row: a row as messages show it.
        parse: makes a row of its columns, or raises `RowError`.
    """

    title: str
    folder: str
    hub: str | HubFile | Archive
    config: Config
    files: tuple[str, ...]
    where: str
    row: str
    parse: Callable[[Columns], RowT_co]

    @property
    def key(self) -> str:
        """Name of the metadata entry that holds the folder."""
        return f"{self.folder}_dir"

    @property
    def variable(self) -> str:
        """Name of the environment variable that holds the folder."""
        return f"SDAR_{self.folder.upper()}_DIR"


def dataset(**splits: Sequence[Mapping[str, object]]) -> datasets.DatasetDict:
    """Return what lm-eval takes from a task's `custom_dataset`: split -> rows."""
    return datasets.DatasetDict({split: datasets.Dataset.from_list(list(rows)) for split, rows in splits.items()})


def documents(
    source: Source[RowT], split: str, metadata: Mapping[str, object], config: str | None = None
) -> list[RowT]:
    """Return the rows of a split, as `source.parse` makes them.

    Args:
        source: the data set.
        split: the hub's name of the split.
        metadata: the run's metadata and model arguments, as lm-eval hands them to a task. Entries of other tasks and
            of the model are among them.
        config: the hub's configuration, where the tasks use several.

    Raises:
        UserError: the folder, its file or a row cannot be used, or the hub cannot be reached.
    """
    for known in (source.key, ROOT_KEY):
        for name in metadata:
            if name.startswith(known.removesuffix("_dir")) and name not in (known, *_LONGER_KEYS):
                hint = did_you_mean(name, [known])
                raise UserError(f"Unknown metadata {name!r}: the {source.title} tasks know {known!r} only.{hint}")
    chosen = config or source.config
    if folder := next(_folders(source, metadata), None):
        return _read_folder(source, folder, split, chosen)
    if isinstance(source.hub, Archive):
        return _read_archive(source, source.hub, split, chosen)
    if isinstance(source.hub, HubFile):
        return _read_hub_file(source, source.hub, chosen)
    return _read_hub(source, source.hub, split, chosen)


def warn_of_folders(source: Source[RowT], metadata: Mapping[str, object], task: str, instead: str) -> None:
    """Log a WARNING where the user names a folder of a data set, but the task has its own documents.

    Args:
        source: the data set.
        metadata: the run's, as `documents` takes it.
        task: the task that has its own documents.
        instead: a task that reads the folder.
    """
    if folder := next(_folders(source, metadata), None):
        logger.warning(
            "%s asks its own problems. %s %r, and the task does not read that folder. "
            "For the problems there: --tasks %s.",
            task,
            folder.named_by,
            str(folder.given),
            instead,
        )


def _folders(source: Source[RowT], metadata: Mapping[str, object]) -> Iterator[_Folder]:
    """Yield each folder that the user named; the first one counts."""
    in_root = f"folder for {source.title} is"
    for folder in (
        _Folder(metadata.get(source.key), f"{source.key} is"),
        _Folder(os.environ.get(source.variable) or None, f"{source.variable} is"),
        _Folder(metadata.get(ROOT_KEY), f"{ROOT_KEY}'s {in_root}", source.folder),
        _Folder(os.environ.get(ROOT_VARIABLE) or None, f"{ROOT_VARIABLE}'s {in_root}", source.folder),
    ):
        if folder.given is not None:
            yield folder


def read_jsonl(source: Source[RowT], file: Path) -> list[RowT]:
    """Return the rows of a file with one JSON object a line.

    Raises:
        UserError: the file or a row cannot be used.
    """
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{file}, line {line}: not UTF-8. Save the file as UTF-8.") from error
    # Not splitlines(): a JSON string may hold U+2028 and its like.
    rows = [
        _checked(source, _parsed(source, line, where), where)
        for where, line in ((f"{file}, line {number}", line) for number, line in enumerate(text.split("\n"), 1))
        if line.strip()
    ]
    if not rows:
        raise UserError(f"{file} is empty. It needs one {source.row} a line.")
    return rows


def require(title: str, *modules: str) -> None:
    """Check that the modules which score a task are installed, before a model spends hours on its answers.

    Raises:
        UserError: one is missing; says how to install all that the tasks need.
    """
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"{title} is scored with {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed: "
            'pip install "sdar-lm-eval[tasks]"'
        )


def _read_hub(source: Source[RowT], hub: str, split: str, config: Config) -> list[RowT]:
    configs = config if isinstance(config, tuple) else (config,)
    try:
        rows = [row for each in configs for row in datasets.load_dataset(hub, each, split=split)]
    except Exception as error:  # whatever the network, the hub's client or a cache can raise
        raise _unreachable(source, "the Hugging Face Hub", error) from error
    return [_checked(source, row, f"{hub}, row {number}") for number, row in enumerate(rows)]


def _read_hub_file(source: Source[RowT], hub: HubFile, config: Config) -> list[RowT]:
    try:
        file = huggingface_hub.hf_hub_download(hub.id, hub.name.format(config=config), repo_type="dataset")
    except Exception as error:  # whatever the network, the hub's client or a cache can raise
        raise _unreachable(source, "the Hugging Face Hub", error) from error
    return _read_file(source, Path(file))


def _read_archive(source: Source[RowT], archive: Archive, split: str, config: Config) -> list[RowT]:
    manager = datasets.DownloadManager()
    try:
        file = Path(manager.download(archive.url))
        found = hashlib.md5(file.read_bytes(), usedforsecurity=False).hexdigest()
        if found != archive.md5:
            raise ValueError(f"its MD5 checksum is {found}, not {archive.md5}")
        folder = manager.extract(str(file))
    except Exception as error:  # whatever the network, a proxy's page or a full disk can raise
        raise _unreachable(source, archive.url, error) from error
    return _read_folder(source, _Folder(folder, f"{archive.url} is unpacked in"), split, config)


def _unreachable(source: Source[RowT], where: str, error: Exception) -> UserError:
    reason = f"{type(error).__name__}: {error}".partition("\n")[0]
    return UserError(
        f"{source.title} cannot be loaded from {where} ({reason}). To work offline, put {source.where} in a folder and "
        f'name it: --metadata \'{{"{source.key}": "/path/to/folder"}}\' or {source.variable}=/path/to/folder.'
    )


def _read_folder(source: Source[RowT], folder: _Folder, split: str, config: Config) -> list[RowT]:
    names = [pattern.format(split=split, config=config) for pattern in source.files]
    if isinstance(source.hub, Archive):
        hub = source.hub.url
    else:
        hub = f"{source.hub.id if isinstance(source.hub, HubFile) else source.hub} from the Hugging Face Hub"
    remedy = f"Give a folder that holds {source.title}'s {names[0]}, or leave it out to load {hub}."
    if not isinstance(folder.given, (str, os.PathLike)) or not str(folder.given).strip():
        raise UserError(f"{folder.named_by} {shown(folder.given)}, which is no path. {remedy}")
    told = f"{folder.named_by} {folder}"
    try:
        path = Path(folder.given).expanduser() / folder.below
        if path.is_file():
            raise UserError(f"{told}, a file: give the folder that holds {names[0]}.")
        if not path.is_dir():
            raise UserError(f"{told}, and there is no such folder. {remedy}")
        for name in names:
            if files := sorted(path.glob(name)):
                return [row for file in files for row in _read_file(source, file)]
        raise UserError(f"{told}, which holds no {names[0]} ({_contents(path)}). {remedy}")
    except (OSError, RuntimeError) as error:  # no permission; a ~user that does not exist
        raise UserError(f"{told}, which cannot be read ({error}). {remedy}") from error


def _read_file(source: Source[RowT], file: Path) -> list[RowT]:
    require_regular(file)  # a pipe would be waited for
    if file.suffix == ".csv":
        return _read_csv(source, file)
    if file.suffix != ".parquet":
        return read_jsonl(source, file)
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(file).to_pylist()
    except (pyarrow.ArrowException, ValueError) as error:
        raise UserError(f"{file}: not a parquet file that can be read ({error}). Download it again.") from error
    return [_checked(source, row, f"{file}, row {number}") for number, row in enumerate(rows)]


def _read_csv(source: Source[RowT], file: Path) -> list[RowT]:
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            rows = list(csv.DictReader(lines, strict=True))
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not a CSV file that can be read ({error}). Download it again.") from error
    return [_checked(source, row, f"{file}, row {number}") for number, row in enumerate(rows, 1)]


def _contents(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    if not names:
        return "it is empty"
    return f"it holds {listed(names)}"


def _parsed(source: Source[RowT], line: str, where: str) -> object:
    try:
        row: object = json.loads(line)
        json.dumps(row, ensure_ascii=False).encode()  # half of a surrogate pair is valid JSON, but no text
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error}). Each line must be one {source.row}.") from error
    return row


def _checked(source: Source[RowT], row: object, where: str) -> RowT:
    """Return a row as `source.parse` makes it.

    Raises:
        UserError: the row cannot be used.
    """
    if not isinstance(row, Mapping):
        raise UserError(f"{where}: {shown(row)} is no object. Each line must be one {source.row}.")
    try:
        return source.parse(Columns(row, source.row))
    except RowError as error:
        raise UserError(f"{where}: {error}") from error
