"""The types that the package gives its users: mypy on a user's script."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import pytest
from support import ROOT, environment

from sdar_lm_eval.arguments import DecodingArguments, OtherSpellings
from sdar_lm_eval.spellings import ALIASES, MAX_TOKENS_SPELLINGS

SCRIPT = """
from sdar_lm_eval import Answer, LoadedModel, laod, load

def use(model: LoadedModel) -> list[Answer]:
    model.generate("x", strategy="static", threshold=0.9, max_new_tokens=3)
    model.generate("x", treshold=0.9)
    load("demo", threshold=0.9, steps=2)
    load("demo", "lmdeploy", block=4)
    return model.generate(["x"], steps=2)
"""


def test_other_spellings_have_the_types_of_the_settings() -> None:
    types = get_type_hints(DecodingArguments)
    limits = dict.fromkeys(MAX_TOKENS_SPELLINGS[1:], MAX_TOKENS_SPELLINGS[0])
    expected = {name: types[setting] for name, setting in {**ALIASES, **limits}.items()}
    assert get_type_hints(OtherSpellings) == expected


@pytest.mark.slow
def test_a_users_mistakes_are_found_and_nothing_else(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "script.py"],
        cwd=tmp_path, env={**environment(), "MYPYPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    errors = [line for line in done.stdout.splitlines() if ": error: " in line]
    assert {int(line.split(":")[1]) for line in errors} == {2, 6}, done.stdout
    assert 'no attribute "laod"' in done.stdout and '"treshold"' in done.stdout
