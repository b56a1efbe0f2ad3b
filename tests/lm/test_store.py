"""Places of finished answers: what is found, what is left alone, what broken files end in."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import sqlite3
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from sdar_lm_eval.decoding import DecodingConfig
from sdar_lm_eval.engines.types import GenerationRequest, ScoreRequest
from sdar_lm_eval.errors import UserError
from sdar_lm_eval.lm.store import (
    CacheFile,
    Store,
    as_record,
    check_cache_file,
    differences,
    encode_line,
    fields_of,
    key_of,
)
from sdar_lm_eval.thinking import Repetition, Thinking

NATIVE = {"engine": "native", "dtype": "float32"}


def test_keys_do_not_depend_on_the_order_of_settings() -> None:
    assert key_of("a", {"x": 1, "y": 2}) == key_of("a", {"y": 2, "x": 1})
    assert len({key_of("a", {"x": 1}), key_of("b", {"x": 1}), key_of("a", {"x": 2}), key_of("a", {"x": "1"})}) == 4


@pytest.mark.parametrize(
    "asked",
    [
        GenerationRequest((1, 2), 8, DecodingConfig(), frozenset({3}), ("stop",), 5, True),
        GenerationRequest(
            (1,), 8, DecodingConfig(), thinking=Thinking("<end>", (1, 2), 3), repetition=Repetition(4, 2)
        ),
        ScoreRequest((1, 2), (3,)),
    ],
)
def test_the_fields_of_a_request_are_those_of_dataclasses(asked: Any) -> None:
    assert fields_of(asked) == dataclasses.asdict(asked)


def test_differences_are_told_as_users_write_settings() -> None:
    theirs = {"dtype": "float32", "gen_kwargs": {"until": ["a", "b"], "steps": 2}, "tasks": {"x": None}}
    mine = {"dtype": "float32", "gen_kwargs": {"steps": 2}, "tasks": {"x": None}, "reproducible": True}
    told = 'until was ["a", "b"], is not given; reproducible was not given, is true'
    assert differences(theirs, mine) == told


def test_a_record_is_found_by_who_made_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = str(tmp_path / "c.db")
    CacheFile(path, NATIVE).put("k", {"text": "Zwölf\ud800"})
    assert CacheFile(path, NATIVE).get("k") == {"text": "Zwölf\ud800"}
    assert not caplog.text
    other = CacheFile(path, NATIVE | {"dtype": "bfloat16"})
    assert other.get("k") is None
    told = "has answers of other settings, which are ignored (dtype was 'float32', is 'bfloat16')"
    assert caplog.text.count(told) == 1
    other.put("k", {"text": "two"})
    caplog.clear()
    assert [CacheFile(path, made).get("k") for made in (NATIVE, NATIVE | {"dtype": "bfloat16"})] == [
        {"text": "Zwölf\ud800"}, {"text": "two"}
    ]  # fmt: skip
    assert not caplog.text  # both have answers of their own


@pytest.mark.parametrize(
    "content",
    [
        b'{"text": nul', encode_line({"text": 5})[:-1], b"[]", encode_line({"log_likelihood": math.nan})[:-1],
        encode_line({"token": "x"})[:-1], encode_line({"text": "x"})[:-1].replace(b"x", b"y"), None, "text", 5,
    ],
)  # fmt: skip
def test_a_damaged_record_is_made_again(tmp_path: Path, content: Any) -> None:
    path = str(tmp_path / "c.db")
    file = CacheFile(path, NATIVE)
    file.put("k", {"text": "x"})
    with sqlite3.connect(path) as database:
        database.execute("UPDATE sdar_records SET record = ?", (content,))
    assert file.get("k") is None
    file.put("k", {"text": "y"})
    assert CacheFile(path, NATIVE).get("k") == {"text": "y"}


def test_minus_infinity_is_a_score() -> None:
    for record in ({"log_likelihood": float("-inf")}, {"text": ""}):
        assert as_record(record) == record


def test_names_of_another_version_are_left_out(tmp_path: Path) -> None:
    file = CacheFile(str(tmp_path / "c.db"), NATIVE)
    file.put("k", {"text": "x", "passes": {"made": 3}, "new_tokens": 4})
    assert file.get("k") == {"text": "x", "new_tokens": 4}


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2 + 9])


def _other_columns(path: Path) -> None:
    with sqlite3.connect(path) as database:
        database.execute("DROP TABLE sdar_fingerprints")
        database.execute("CREATE TABLE sdar_fingerprints (a TEXT)")


def _broken_fingerprint(path: Path) -> None:
    with sqlite3.connect(path) as database:
        database.execute("UPDATE sdar_fingerprints SET settings = 'null{'")


DAMAGES: Mapping[str, Callable[[Path], Any]] = {
    "garbage": lambda path: path.write_bytes(os.urandom(9000)),
    "cut": _cut,
    "other columns": _other_columns,
    "a broken fingerprint": _broken_fingerprint,
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_that_is_no_cache_is_one_line(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "c.db"
    file = CacheFile(str(path), NATIVE)
    for number in range(50):
        file.put(str(number), {"text": "x" * 500})
    DAMAGES[damage](path)
    with pytest.raises(
        UserError,
        match=rf"^--use_cache {path} cannot be used \(.*\)\. End the program that uses the file, give another path",
    ) as raised:
        CacheFile(str(path), NATIVE | {"dtype": "other"})
    assert "\n" not in str(raised.value)


def test_a_cache_may_lie_in_folders_that_do_not_exist(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "today" / "c.db"
    check_cache_file(str(path))
    assert path.parent.is_dir()
    check_cache_file(str(path))


def test_a_locked_file_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c.db"
    CacheFile(str(path), NATIVE)
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *args, **kwargs: connect(*args, **kwargs, timeout=0.1))
    with pytest.raises(UserError, match=r"cannot be used \(database is locked\).* End the program that uses the file"):
        CacheFile(str(path), NATIVE)
    holder.close()


def test_runs_that_begin_together_may_share_a_new_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tmp_path / "c.db")

    class Late(sqlite3.Connection):
        """Another process makes the tables just before this one does."""

        def execute(self, query: str, *parameters: Any) -> sqlite3.Cursor:
            if query.startswith("CREATE"):
                monkeypatch.undo()
                CacheFile(path, NATIVE).put("k", {"text": "x"})
            return super().execute(query, *parameters)

    monkeypatch.setattr(sqlite3, "connect", functools.partial(sqlite3.connect, factory=Late))
    assert CacheFile(path, NATIVE).get("k") == {"text": "x"}


def test_a_place_that_lacks_a_record_does_not_have_all(tmp_path: Path) -> None:
    old, new = (CacheFile(str(tmp_path / name), NATIVE) for name in ("old.db", "new.db"))
    old.put("k", {"text": "x"})
    store = Store([new, old])
    assert store.get("other") is None and store.kept_in == f"{new.name} and {old.name}"
    assert store.get("k") == {"text": "x"} and store.kept_in == old.name


def test_what_a_read_only_file_has_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "c.db"
    CacheFile(str(path), NATIVE).put("k", {"text": "x"})
    file = CacheFile(str(path), NATIVE)
    file._file.execute("PRAGMA query_only = ON")  # as for a user who may not write
    store = Store([file])
    assert store.get("k") == {"text": "x"}
    for key in ("a", "b"):
        store.put(key, {"text": "y"})
    assert caplog.text.count("cannot be written (attempt to write a readonly database)") == 1
    assert "later answers are kept in memory alone, until the results are written" in caplog.text
    assert store.kept_in == ""
