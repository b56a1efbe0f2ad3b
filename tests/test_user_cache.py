"""Files of the user's cache folder, which may be missing, broken or not writable."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from sdar_lm_eval.user_cache import cache_file, keep_cached, read_cached


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LOCALAPPDATA" if os.name == "nt" else "XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "sdar_lm_eval"


@pytest.mark.skipif(os.name == "nt", reason="Windows has another default")
def test_the_folder_is_in_the_home_folder_by_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_file("a/b.json") == tmp_path / ".cache" / "sdar_lm_eval" / "a" / "b.json"


def test_what_is_kept_is_read(folder: Path) -> None:
    assert read_cached("some/file.json") == {}
    keep_cached("some/file.json", {"1": [2, 3.5]})
    assert read_cached("some/file.json") == {"1": [2, 3.5]}
    keep_cached("some/file.json", {})
    assert read_cached("some/file.json") == {}
    assert [path.name for path in (folder / "some").iterdir()] == ["file.json"]


@pytest.mark.parametrize("content", [b"", b"[1]", b"{", b"\xff", b'{"a":' * 100_000])
def test_a_broken_file_is_left_out(folder: Path, caplog: pytest.LogCaptureFixture, content: bytes) -> None:
    folder.mkdir()
    (folder / "file.json").write_bytes(content)
    with caplog.at_level(logging.INFO):
        assert read_cached("file.json") == {}
    assert "The cache file file.json is ignored" in caplog.text


def test_what_cannot_be_written_is_lost_and_leaves_nothing_behind(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "file.json").mkdir(parents=True)  # a folder where the file belongs
    with caplog.at_level(logging.INFO):
        keep_cached("file.json", {"a": 1})
    assert [path.name for path in folder.iterdir()] == ["file.json"]

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with caplog.at_level(logging.INFO):
        keep_cached("other.json", {"a": 1})
    assert [path.name for path in folder.iterdir()] == ["file.json"]
    assert caplog.text.count("cannot be written") == 2


@pytest.mark.skipif(os.name == "nt", reason="Windows has another default")
def test_a_user_without_a_home_folder_has_no_files(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "~nobody-of-this-name/cache")
    with caplog.at_level(logging.INFO):
        keep_cached("file.json", {"a": 1})
        assert read_cached("file.json") == {}
    assert len(caplog.records) == 2
