from __future__ import annotations

import shutil
from pathlib import Path

from editing import edit_json
from support import (
    random_checkpoint,
)

from sdar_lm_eval.checkpoint import Checkpoint

# The fingerprint


def test_the_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    first = random_checkpoint(tmp_path / "a")
    same = Path(shutil.copytree(first, tmp_path / "b"))
    print_of = lambda folder: Checkpoint.open(str(folder)).fingerprint  # noqa: E731
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
