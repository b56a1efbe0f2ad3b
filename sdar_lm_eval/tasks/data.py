"""Where the tasks' documents come from: a folder of the user's, else the Hugging Face Hub.

    documents(GSM8K, "test", metadata)    the rows of a split, checked; a list of dicts

A folder is named by metadata, which wins, or by environment: for each data set its own (`gsm8k_dir`, `SDAR_GSM8K_DIR`),
or one folder for all (`sdar_data_dir`, `SDAR_DATA_DIR`) with a folder for each in it (`gsm8k`, `mmlu`, …). It holds the
rows as the hub has them: one JSON object a line, or the hub's own parquet files in their places.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from sdar_lm_eval.errors import UserError, did_you_mean
from sdar_lm_eval.files import require_regular

logger = logging.getLogger(__name__)

ROOT_KEY = "sdar_data_dir"
ROOT_VARIABLE = "SDAR_DATA_DIR"

Row = dict[str, Any]
Complaint = Callable[[Row], str | None]


@dataclass(frozen=True)
class Source:
    """A data set.

    Attributes:
        title: what messages call it.
        folder: its name below the folder for all; the metadata key is this and `_dir`, the environment variable
            `SDAR_…_DIR`.
        hub: dataset id on the Hugging Face Hub.
        config: the hub's configuration; None for its only one.
        files: where a folder may hold a split, as glob patterns with `{split}` and `{config}`; the first that is found
            is read.
        where: what to put into a folder when the hub cannot be reached.
        columns: the columns that are used, and their types. Texts must not be blank.
        row: a row as messages show it.
        complaint: what else is wrong with a row, as a sentence, or None.
    """

    title: str
    folder: str
    hub: str
    config: str | None
    files: tuple[str, ...]
    where: str
    columns: Mapping[str, type]
    row: str
    complaint: Complaint | None = None

    @property
    def key(self) -> str:
        """Name of the metadata entry that holds the folder."""
        return f"{self.folder}_dir"

    @property
    def variable(self) -> str:
        """Name of the environment variable that holds the folder."""
        return f"SDAR_{self.folder.upper()}_DIR"


def documents(source: Source, split: str, metadata: Mapping[str, Any], config: str | None = None) -> list[Row]:
    """Return the rows of a split, with the columns of `source.columns`.

    Args:
        source: the data set.
        split: as the hub calls it.
        metadata: the run's metadata and model arguments, as lm-eval hands them to a task; what is not this data set's
            is somebody else's.
        config: the hub's configuration, where the data set has several that are used.

    Raises:
        UserError: the folder, its file or a row cannot be used, or the hub cannot be reached.
    """
    for known in (source.key, ROOT_KEY):
        for name in metadata:
            if name.startswith(known.removesuffix("_dir")) and name != known:
                hint = did_you_mean(name, [known])
                raise UserError(f"Unknown metadata {name!r}: the {source.title} tasks know {known!r} only.{hint}")
    config = config or source.config
    if folder := next(_folders(source, metadata), None):
        return _read_folder(source, *folder, split, config)
    return _read_hub(source, split, config)


def warn_of_folders(source: Source, metadata: Mapping[str, Any], task: str, instead: str) -> None:
    """Log a WARNING that a task has its own documents, where a folder of the data set is named.

    Args:
        source: the data set whose folders the task does not read.
        metadata: the run's, as `documents` takes it.
        task: which one asks its own documents.
        instead: a task that reads the folder.
    """
    if folder := next(_folders(source, metadata), None):
        given, label, _ = folder
        logger.warning(
            "%s asks its own problems: %s %r, which it does not read. For the problems there: --tasks %s.",
            task,
            label,
            str(given),
            instead,
        )


def _folders(source: Source, metadata: Mapping[str, Any]) -> Iterator[tuple[Any, str, str]]:
    """Yield each folder that is named, the one that counts first: as given, with its label, and the folder below it."""
    for given, label, below in (
        (metadata.get(source.key), f"{source.key} is", ""),
        (os.environ.get(source.variable) or None, f"{source.variable} is", ""),
        (metadata.get(ROOT_KEY), f"{ROOT_KEY}'s folder for {source.title} is", source.folder),
        (os.environ.get(ROOT_VARIABLE) or None, f"{ROOT_VARIABLE}'s folder for {source.title} is", source.folder),
    ):
        if given is not None:
            yield given, label, below


def read_jsonl(source: Source, file: Path) -> list[Row]:
    """Return the rows of a file that has one JSON object a line.

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
    """Check that optional modules are installed, before a model spends hours on answers that cannot be scored.

    Raises:
        UserError: one is missing; says how to install all that the tasks need.
    """
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"{title} is scored with {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed: "
            'pip install "sdar-lm-eval[tasks]"'
        )


def _read_hub(source: Source, split: str, config: str | None) -> list[Row]:
    try:
        rows = datasets.load_dataset(source.hub, config, split=split)
    except Exception as error:  # whatever the network, the hub's client or a cache can raise
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise UserError(
            f"{source.title} cannot be loaded from the Hugging Face Hub ({reason}). To work offline, put "
            f'{source.where} in a folder and name it: --metadata \'{{"{source.key}": "/path/to/folder"}}\' or '
            f"{source.variable}=/path/to/folder."
        ) from error
    return [_checked(source, row, f"{source.hub}, row {number}") for number, row in enumerate(rows)]


def _read_folder(source: Source, given: Any, label: str, below: str, split: str, config: str | None) -> list[Row]:
    names = [pattern.format(split=split, config=config) for pattern in source.files]
    remedy = (
        f"Give a folder that holds {source.title}'s {names[0]}, or leave it out to load {source.hub} from the Hugging "
        "Face Hub."
    )
    if not isinstance(given, (str, os.PathLike)) or not str(given).strip():
        raise UserError(f"{label} {given!r}, which is no path. {remedy}")
    shown = repr(str(Path(given) / below)) if below else repr(str(given))
    try:
        folder = Path(given).expanduser() / below
        if folder.is_file():
            raise UserError(f"{label} {shown}, a file: give the folder that holds {names[0]}.")
        if not folder.is_dir():
            raise UserError(f"{label} {shown}, and there is no such folder. {remedy}")
        for name in names:
            if files := sorted(folder.glob(name)):
                return [row for file in files for row in _read_file(source, file)]
        raise UserError(f"{label} {shown}, which holds no {names[0]} ({_contents(folder)}). {remedy}")
    except (OSError, RuntimeError) as error:  # no permission; a ~user that does not exist
        raise UserError(f"{label} {shown}, which cannot be read ({error}). {remedy}") from error


def _read_file(source: Source, file: Path) -> list[Row]:
    require_regular(file)  # a pipe would be waited for
    if file.suffix != ".parquet":
        return read_jsonl(source, file)
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(file).to_pylist()
    except (pyarrow.ArrowException, ValueError) as error:
        raise UserError(f"{file}: not a parquet file that can be read ({error}). Download it again.") from error
    return [_checked(source, row, f"{file}, row {number}") for number, row in enumerate(rows)]


def _contents(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    if not names:
        return "it is empty"
    return f"it holds {', '.join(names[:8])}" + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _parsed(source: Source, line: str, where: str) -> Any:
    try:
        row = json.loads(line)
        json.dumps(row, ensure_ascii=False).encode()  # half of a surrogate pair is valid JSON, but no text
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error}). Each line must be one {source.row}.") from error
    return row


def _checked(source: Source, row: Any, where: str) -> Row:
    """Return the row's columns that are used.

    Raises:
        UserError: they are not there, or not usable.
    """
    if not isinstance(row, Mapping):
        raise UserError(f"{where}: a {type(row).__name__}, not an object. Each line must be one {source.row}.")
    for column, kind in source.columns.items():
        if column not in row:
            raise UserError(f"{where}: no {column!r}, only {sorted(row)}. Each line must be one {source.row}.")
        value = row[column]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise UserError(f"{where}: {column!r} is a {type(value).__name__}, not {_NAMES[kind]}.")
        if value == [] or (isinstance(value, str) and not value.strip()):
            raise UserError(f"{where}: {column!r} is empty.")
    if source.complaint and (complaint := source.complaint(dict(row))):
        raise UserError(f"{where}: {complaint}")
    return {column: row[column] for column in source.columns}


_NAMES = {str: "a string", int: "a whole number", list: "a list"}
