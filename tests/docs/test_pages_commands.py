"""Commands in the documentation: their programs' parsers read them, and those that run on a CPU print what is shown."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import lm_eval.tasks
import pytest
import support
from lm_eval.tasks import TaskManager
from packaging.requirements import Requirement
from pages import ASSIGNMENT, Block, blocks, commands
from support import ROOT

from sdar_lm_eval.autoload import TASKS
from sdar_lm_eval.commands import COMMANDS
from sdar_lm_eval.engines.registry import ENGINES
from sdar_lm_eval.errors import UserError
from sdar_lm_eval.runs.flags import FLAGS
from sdar_lm_eval.settings import ModelSettings, check_names

ELSEWHERE = ("hf", "modal setup", "modal volume", "lmdeploy serve", "python -m sglang.launch_server", "python -m nltk")
"""Programs whose options are not checked here."""
OWN_FOLDER = {"mine", "gsm8k_8"}
"""Tasks of files that a page shows."""
STOCK = ("hellaswag", "mmlu/default", "wikitext")
"""Folders of lm_eval's own tasks."""
MODEL_OF = {spec.model: spec.name for spec in ENGINES.values()}


@pytest.fixture(scope="module")
def tasks() -> set[str]:
    """This package's tasks, and those of lm_eval's that a page names: to read all of its 14,000 files takes seconds."""
    folders = [TASKS, *(str(Path(lm_eval.tasks.__file__).parent / name) for name in STOCK)]
    return set(TaskManager(include_path=folders, include_defaults=False).all_tasks) | OWN_FOLDER


def check_lm_eval(words: list[str], tasks: set[str]) -> None:
    cli = pytest.importorskip("lm_eval._cli.harness", reason="lm-eval before 0.4.10 has another parser")
    read = cli.HarnessCLI()._parser.parse_args(words if not words[0].startswith("-") else ["run", *words])
    if read.command != "run":
        return
    assert set(read.tasks) <= tasks, set(read.tasks) - tasks
    if read.model in MODEL_OF:
        given = dict(read.model_args or {})
        ModelSettings.read(given.pop("pretrained", ""), given, MODEL_OF[read.model])
        check_names(read.gen_kwargs or {}, "gen_kwargs")


def check_own_command(words: list[str], tasks: set[str]) -> None:
    if words[0] not in COMMANDS:
        check_lm_eval(words, tasks)
        return
    parser = argparse.ArgumentParser()
    importlib.import_module(f"sdar_lm_eval.commands.{words[0].replace('-', '_')}").add_arguments(parser)
    given = vars(parser.parse_args(words[1:]))
    assert set(given.get("tasks") or ()) <= tasks or words[0] != "sweep"


def check_pip(words: list[str], _: set[str]) -> None:
    extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text("utf-8"), re.MULTILINE)
    assert words[0] == "install"
    for word in words[1:]:
        if word.startswith("-"):
            assert word in ("--no-build-isolation", "--no-deps")
        else:
            required = Requirement(word.replace(".[", "sdar-lm-eval[") if word.startswith(".") else word)
            assert required.name != "sdar-lm-eval" or required.extras <= set(extras), word


def check_make(words: list[str], _: set[str]) -> None:
    targets = re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    assert set(words) <= set(targets)


def check_modal(words: list[str], _: set[str]) -> None:
    assert words[:2] == ["run", "modal_runner.py"] and (ROOT / words[1]).is_file()
    flags = {f"--{name.replace('_', '-')}" for name in FLAGS} | {"--help"}
    assert {word.partition("=")[0] for word in words if word.startswith("--")} <= flags


def check_torchrun(words: list[str], tasks: set[str]) -> None:
    from torch.distributed.run import get_args_parser

    read = get_args_parser().parse_args(words)
    check_module([read.training_script, *read.training_script_args] if read.module else words, tasks)


def check_accelerate(words: list[str], tasks: set[str]) -> None:
    from accelerate.commands.launch import launch_command_parser

    assert words[0] == "launch"
    read = launch_command_parser().parse_args(words[1:])
    assert read.module
    check_module([read.training_script, *read.training_script_args], tasks)


def check_module(words: list[str], tasks: set[str]) -> None:
    """The words behind `python -m`."""
    if words[0] == "pytest":
        assert all((ROOT / word).exists() for word in words[1:] if not word.startswith("-"))
    else:
        CHECKS[words[0]](words[1:], tasks)


def check_python(words: list[str], tasks: set[str]) -> None:
    if words[0] == "-m":
        check_module(words[1:], tasks)
    else:
        source = (ROOT / words[0]).read_text("utf-8")
        assert all(f'"{word}"' in source for word in words[1:] if word.startswith("--"))


CHECKS: dict[str, Callable[[list[str], set[str]], None]] = {
    "accelerate": check_accelerate,
    "lm_eval": check_lm_eval,
    "make": check_make,
    "modal": check_modal,
    "pip": check_pip,
    "python": check_python,
    "sdar_lm_eval": check_own_command,
    "torchrun": check_torchrun,
}
"""Program -> the check of the words behind it."""


@pytest.mark.parametrize(("page", "command"), commands(), ids=lambda value: str(getattr(value, "stem", value))[:60])
def test_its_program_reads_it(page: Path, command: str, tasks: set[str]) -> None:
    if command.startswith(ELSEWHERE):
        return
    words = shlex.split(command, comments=True)
    while "=" in words[0]:  # environment variables
        words.pop(0)
    words = [word for word in words if word != "…"]
    try:
        CHECKS[words[0]](words[1:], tasks)
    except SystemExit as error:  # argparse
        pytest.fail(f"{page}: {command}: {error}")


@pytest.mark.parametrize(
    "command",
    [
        "lm_eval run --model sdar --tasks gsm8k_sdar --gen_kwargs thresold=1",
        "lm_eval run --model sdar-lmdeploy --tasks gsm8k_sdar --model_args kv_pages=1",
        "lm_eval run --model sdar --tasks gsm8k_sdra",
        "torchrun --nproc_per_node 2 -m lm_eval run --model sdar --tasks nothing",
        "sdar_lm_eval compare --format word a b",
        "modal run modal_runner.py --shard 4",
        "make tea",
        "pip install .[task]",
        "python tools/demo_figures.py --print",
    ],
)
def test_a_wrong_word_is_found(command: str, tasks: set[str]) -> None:
    words = shlex.split(command)
    with pytest.raises((AssertionError, SystemExit, UserError)):
        CHECKS[words[0]](words[1:], tasks)


LOGGED = re.compile(r"^\S+ (?:INFO|WARNING) +\[([\w.]+):\d+\]", re.MULTILINE)
TIMING = re.compile(r"\d[\d,.]*(?= s\b| tok/s)")


def plain(line: str) -> str:
    """A line without what differs from run to run."""
    return TIMING.sub("#", LOGGED.sub(r"[\1]", line)).strip()


def of_makefile(command: str) -> str:
    """What `make TARGET` runs, with this Python's programs and without the installation."""
    if not command.startswith("make "):
        return command
    words = ["make", "-s", "-n", "-o", "VENV/.installed", "VENV=VENV", *command.split()[1:]]
    listed = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return listed.replace("VENV/bin/", "")


@pytest.mark.slow
def test_they_print_what_is_shown(tmp_path: Path) -> None:
    """All pages in one folder: a command that another page has shown already is not run again."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    variables = {"PATH": path, "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200", "OMP_WAIT_POLICY": "PASSIVE"}
    environment = support.environment(support.QUICK_START) | variables
    outputs: dict[str, str] = {}

    def run(words: list[str]) -> str:
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, f"{words}: {(done.stdout + done.stderr)[-4000:]}"
        return done.stderr.replace("\r", "\n") + done.stdout

    def check(block: Block) -> None:
        if block.language == "python":
            run([sys.executable, "-c", block.text])
            return
        assigned = [each for each in block.commands if ASSIGNMENT.match(each)]
        printed = ""
        for command in block.commands:
            if command not in assigned:
                script = "; ".join([*assigned, of_makefile(command)])
                if script not in outputs:
                    outputs[script] = run(["bash", "-c", script])
                printed += outputs[script] + "\n"
        lines = iter([plain(line) for line in printed.splitlines()])
        for shown in block.shown:
            found = any(plain(shown) in line for line in lines)
            assert found, f"{block.page.name}: {shown!r} is not in: {printed[-4000:]}"

    for block in blocks("console", "python"):
        if not block.title:
            check(block)
