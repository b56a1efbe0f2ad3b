"""A hash is the same in each process, also of functions; it changes with the file that defines a function."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from sdar_lm_eval.hashing import hex_digest

DEFINED = """
import functools

@functools.cache
def stored(answer):
    return answer

def score(answer, weight=1):
    return weight

class Filter:
    def __call__(self, answer):
        return answer

class Choice(Filter):
    weight = 2

class Table:
    pass
"""
HASHED = """
import functools, importlib.util, sys
from sdar_lm_eval.hashing import hex_digest
spec = importlib.util.spec_from_file_location("json", sys.argv[1] + "/defined.py")
defined = importlib.util.module_from_spec(spec)  # not registered, and of a registered module's name
spec.loader.exec_module(defined)
contents = [
    {"filters": [{"function": defined.score}]}, functools.partial(defined.score, weight=2),
    functools.partial(defined.score, weight=3), defined.stored, defined.Filter, defined.Filter(), defined.Table(), len,
    lambda: 0, defined.Choice,
]
print(*map(hex_digest, contents))
"""


def hashes(folder: Path) -> list[str]:
    """The hashes of functions, classes and objects of defined.py, in a process of their own."""
    command = [sys.executable, "-B", "-c", HASHED, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


def test_a_class_without_functions_counts_by_its_own_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its base may be defined in another file."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "base_of_choice.py").write_text("class Base:\n    def __call__(self, answer):\n        return answer\n")
    file = tmp_path / "own_choice.py"
    file.write_text("from base_of_choice import Base\n\nclass Choice(Base):\n    weight = 1\n")
    choice = importlib.import_module("own_choice").Choice
    before = hex_digest(choice)
    file.write_text(file.read_text().replace("weight = 1", "weight = 2"))
    assert hex_digest(choice) != before


def test_a_function_is_hashed_alike_in_each_process(tmp_path: Path) -> None:
    (tmp_path / "defined.py").write_text(DEFINED)
    first = hashes(tmp_path)
    assert hashes(tmp_path) == first
    assert len(set(first)) == len(first) - 1  # a filter and its class are the same code


def test_the_content_of_its_file_counts(tmp_path: Path) -> None:
    (tmp_path / "defined.py").write_text(DEFINED)
    before = hashes(tmp_path)
    (tmp_path / "defined.py").write_text(DEFINED.replace("return weight", "return 2 * weight"))
    changed = [new != old for new, old in zip(hashes(tmp_path), before, strict=True)]
    assert changed == [True, True, True, True, True, True, False, False, False, True]
