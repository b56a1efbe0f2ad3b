"""The command line `sdar_lm_eval`: which commands there are, their help, and what is lm_eval's."""

from __future__ import annotations

import subprocess
import sys

import pytest

from sdar_lm_eval.commands import COMMANDS, LM_EVAL_COMMANDS, main, overview


def test_the_overview_has_every_command() -> None:
    done = subprocess.run([sys.executable, "-m", "sdar_lm_eval"], capture_output=True, text=True, check=True)
    assert done.stdout == overview() + "\n"
    assert all(f"  {name} " in done.stdout for name in (*COMMANDS, *LM_EVAL_COMMANDS))


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    told = capsys.readouterr().out
    assert ended.value.code == 0 and f"example:\n  sdar_lm_eval {name} " in told


@pytest.mark.parametrize("name", COMMANDS)
def test_a_flag_that_is_none_is_a_usage_error(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([name, "--nothing-of-the-kind"])
    assert ended.value.code == 2 and f"usage: sdar_lm_eval {name}" in capsys.readouterr().err
