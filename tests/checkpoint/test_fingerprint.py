"""Every byte counts, and none is read twice."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from editing import edit_json
from support import random_checkpoint

from sdar_lm_eval.checkpoint import Checkpoint
from sdar_lm_eval.checkpoint import fingerprint as module
from sdar_lm_eval.demo import CHECKPOINT as DEMO
from sdar_lm_eval.errors import UserError

LONG_AGO = 1_000_000_000


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's cache folder of the test's own; returns the file that is to be in it."""
    monkeypatch.setenv("LOCALAPPDATA" if os.name == "nt" else "XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "sdar_lm_eval" / "sha256.json"


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    """A copy of the demo whose weights nobody touched for long."""
    folder = Path(shutil.copytree(DEMO, tmp_path / "copy"))
    os.utime(folder / "model.safetensors", (LONG_AGO, LONG_AGO))
    return folder


def print_of(folder: Path) -> str:
    return Checkpoint.open(str(folder)).fingerprint


def read_by(folder: Path) -> tuple[str, int]:
    """The fingerprint, and how many bytes the process read for it."""
    checkpoint = Checkpoint.open(str(folder))
    before = _bytes_read()
    found = checkpoint.fingerprint
    return found, _bytes_read() - before


def _bytes_read() -> int:
    if sys.platform != "linux":
        pytest.skip("Linux alone counts a process's reads")
    return int(Path("/proc/self/io").read_text().split()[1])


def test_the_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    first = random_checkpoint(tmp_path / "a")
    same = Path(shutil.copytree(first, tmp_path / "b"))
    assert print_of(first) == print_of(same)
    assert print_of(random_checkpoint(tmp_path / "c", seed=1)) != print_of(first)
    seen = {print_of(first)}
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        edit_json(same / name, comment="x")
        seen.add(print_of(same))
    for name in ("tokenizer.json", "chat_template.jinja"):
        with (same / name).open("a") as file:
            file.write(" ")
        seen.add(print_of(same))
    assert len(seen) == 6


@pytest.mark.parametrize(("begin", "end"), [(0.1, 0.3), (0.5, 0.5), (0.999, 1)])
def test_every_byte_of_the_weights_counts(demo: Path, begin: float, end: float) -> None:
    """Also where the file keeps its size and its modification time."""
    before = print_of(demo)
    weights = demo / "model.safetensors"
    content = bytearray(weights.read_bytes())
    first = int(begin * len(content))
    last = max(first + 1, int(end * len(content)))
    content[first:last] = bytes(0 if byte else 1 for byte in content[first:last])
    weights.write_bytes(content)
    os.utime(weights, (LONG_AGO, LONG_AGO))
    assert print_of(demo) != before == print_of(DEMO)


def test_weights_are_read_once(demo: Path) -> None:
    size = (demo / "model.safetensors").stat().st_size
    first, read = read_by(demo)
    assert read > size
    second, read = read_by(demo)
    assert (second, read < size / 10) == (first, True)
    (demo / "model.safetensors").touch()
    touched, read = read_by(demo)
    assert (touched, read > size) == (first, True)


def test_a_file_that_just_changed_is_read_again(demo: Path, cache: Path) -> None:
    """It may change once more within one tick of the file system's clock."""
    (demo / "model.safetensors").touch()
    print_of(demo)
    assert not cache.exists()


def test_the_same_content_elsewhere_is_the_same(demo: Path, tmp_path: Path) -> None:
    """Of several files, which threads read."""
    first = random_checkpoint(tmp_path / "a", shards=4)
    assert print_of(first) == print_of(Path(shutil.copytree(first, tmp_path / "b")))
    assert print_of(demo) == print_of(DEMO)


def test_the_hub_cache_has_it_for_a_name(demo: Path, tmp_path: Path) -> None:
    """Its blobs are named by their sha256, of which nothing is read; another name is no hash."""
    expected = print_of(demo)
    repository = tmp_path / "models--a--b"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for file in demo.iterdir():
        blob = repository / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copyfile(file, blob)
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    found, read = read_by(snapshot)
    assert found == expected
    assert read < (demo / "model.safetensors").stat().st_size / 10
    blob = (snapshot / "model.safetensors").resolve()
    for name in ("f" * 40, "g" * 64, blob.name + "0"):
        (snapshot / "model.safetensors").unlink()
        blob = blob.rename(blob.with_name(name))
        (snapshot / "model.safetensors").symlink_to(blob)
        found, read = read_by(snapshot)
        assert found == expected
        assert read > blob.stat().st_size


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'{"PATH": 5}', b'{"PATH": []}', b'{"PATH": [0, 0, 0, 0, "x"]}',
     b'{"PATH": [null, null, null, null, null]}'],
)  # fmt: skip
def test_a_broken_cache_never_matters(demo: Path, cache: Path, content: bytes) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_bytes(content.replace(b"PATH", str(demo / "model.safetensors").encode()))
    assert print_of(demo) == print_of(DEMO)
    assert json.loads(cache.read_bytes()).keys() >= {str((demo / "model.safetensors").resolve())}


def test_a_cache_that_cannot_be_written_or_read_never_matters(
    demo: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = print_of(demo)
    shutil.rmtree(cache.parent)
    cache.parent.write_text("a file where the folder belongs")
    assert print_of(demo) == expected
    cache.parent.unlink()
    cache.mkdir(parents=True)  # a folder where the file belongs
    assert print_of(demo) == expected
    assert [path.name for path in cache.parent.iterdir()] == [cache.name]  # nothing is left lying about
    cache.rmdir()
    os.mkfifo(cache)
    assert print_of(demo) == expected
    monkeypatch.setenv("XDG_CACHE_HOME", "~nobody-of-this-name/cache")
    assert print_of(demo) == expected


def test_processes_that_write_at_the_same_time(demo: Path, cache: Path) -> None:
    """The file is whole at any time, whoever comes last."""
    entry = (1, 2, 3, 4), "0" * 64

    def remember(number: int) -> int:
        module._remember({f"/{number}": entry})
        return len(json.loads(cache.read_bytes()))

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(remember, range(200)))
    assert print_of(demo) == print_of(DEMO)


def test_the_cache_does_not_grow_without_end(cache: Path) -> None:
    module._remember({str(number): ((1, 2, 3, 4), "0" * 64) for number in range(module.REMEMBERED + 5)})
    assert len(json.loads(cache.read_bytes())) == module.REMEMBERED


def test_a_hash_is_that_of_hashlib_on_any_python(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python 3.10 has no file_digest."""
    monkeypatch.delattr(hashlib, "file_digest", raising=False)
    path = demo / "model.safetensors"
    assert module._read_sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_what_is_no_file_is_not_read(demo: Path) -> None:
    checkpoint = Checkpoint.open(str(demo))
    (demo / "model.safetensors").unlink()
    os.mkfifo(demo / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.safetensors is not a regular file, but a pipe"):
        _ = checkpoint.fingerprint
