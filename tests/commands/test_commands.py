"""The command line `sdar_lm_eval`: which commands there are, their help, and what is lm_eval's."""

from __future__ import annotations

import importlib.metadata
import io
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from run_files import write_run
from support import environment

from sdar_lm_eval import __version__
from sdar_lm_eval.commands import COMMANDS, LM_EVAL_COMMANDS, main, overview


def test_the_overview_has_every_command() -> None:
    done = subprocess.run([sys.executable, "-m", "sdar_lm_eval"], capture_output=True, text=True, check=True)
    assert done.stdout == overview() + "\n"
    assert all(f"  {name} " in done.stdout for name in (*COMMANDS, *LM_EVAL_COMMANDS))


@pytest.mark.parametrize(
    ("word", "hint"), [("compar", " Did you mean 'compare'?"), ("rnu", " Did you mean 'run'?"), ("x", "")]
)
def test_an_unknown_command_is_one_line_that_names_all(word: str, hint: str) -> None:
    done = subprocess.run([sys.executable, "-m", "sdar_lm_eval", word, "runs"], capture_output=True, text=True)
    known = ", ".join((*LM_EVAL_COMMANDS, *COMMANDS))
    assert done.returncode == 2
    assert done.stderr == f"sdar_lm_eval: error: '{word}' is no command.{hint} Commands: {known}.\n"


@pytest.mark.parametrize("flag", ["--version", "-V"])
def test_versions_are_one_line(flag: str) -> None:
    done = subprocess.run([sys.executable, "-m", "sdar_lm_eval", flag], capture_output=True, text=True, check=True)
    lm_eval = importlib.metadata.version("lm_eval")
    assert done.stdout == f"sdar_lm_eval {__version__}, lm_eval {lm_eval}, Python {platform.python_version()}\n"
    assert done.stderr == ""


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


def test_characters_that_the_terminals_encoding_lacks_are_printed_as_escapes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path / "a", {"task": {"acc,none": [1, 0]}})
    write_run(tmp_path / "b", {"task": {"acc,none": [1, 1]}}, beams=4)
    out = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr("sys.stdout", out)
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert rb"50.0 \xb1 50.0" in out.buffer.getvalue()  # type: ignore[attr-defined]


HELP = ([], ["--help"], ["--version"], ["compare", "--help"])


@pytest.mark.parametrize("words", HELP, ids=" ".join)
def test_help_is_printed_whatever_the_encoding(words: list[str]) -> None:
    ascii_only = {**environment(), "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [sys.executable, "-m", "sdar_lm_eval", *words], capture_output=True, text=True, env=ascii_only
    )
    assert done.returncode == 0 and "sdar_lm_eval" in done.stdout and done.stderr == ""


@pytest.mark.parametrize("words", HELP, ids=" ".join)
def test_help_may_have_no_reader(words: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "sdar_lm_eval", *words],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    os.close(writer)
    assert done.returncode == 0 and done.stderr == ""


WITHOUT_OUTPUT = "generate a --model_args pretrained=demo --gen_kwargs max_gen_toks=4"
FULL = "sdar_lm_eval: error: the output cannot be written: No space left on device."


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize(
    ("shell", "code", "told"),
    [
        ("compare a b > /dev/full", 1, FULL),
        ("show a --doc 0 > /dev/full", 1, FULL),
        ("--help > /dev/full", 1, FULL),
        ("compare a b >&-", 0, ""),
        pytest.param("show a --doc 0 >&-", 0, "", marks=pytest.mark.slow),
        pytest.param(f"{WITHOUT_OUTPUT} >&-", 0, "forwards", marks=pytest.mark.slow),
        ("generate - <&-", 1, "sdar_lm_eval: error: standard input is closed. Give the prompt as a text."),
    ],
)
def test_output_that_cannot_be_written_is_one_line(shell: str, code: int, told: str, tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_run(tmp_path / name, {"task": {"acc,none": [1, 0]}})
    command = f"{sys.executable} -m sdar_lm_eval {shell}"
    done = subprocess.run(
        ["sh", "-c", command], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == code and told in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert code == 0 or len(done.stderr.splitlines()) == 1


def test_generate_does_without_standard_output(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdout", None)  # as Python has it where a shell closes it
    assert main(WITHOUT_OUTPUT.split()) == 0
    assert "forwards" in capfd.readouterr().err


@pytest.mark.parametrize("columns", ["0", "1", "x"])
def test_a_terminal_s_width_may_be_unknown(
    columns: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "a", {"task": {"acc,none": [1, 0]}})
    monkeypatch.setenv("COLUMNS", columns)
    assert main(["show", str(tmp_path / "a"), "--doc", "0"]) == 0
    assert "gold" in capsys.readouterr().out
