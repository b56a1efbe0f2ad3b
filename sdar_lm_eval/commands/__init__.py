"""The command line `sdar_lm_eval`: lm_eval's commands and this package's. Each of this package's commands is a module.

A command's module defines:

    EXAMPLE                        a command line, shown by --help
    add_arguments(parser)          declares the arguments
    run(arguments) -> str | None   does the work; `main` prints the text that it returns

The module's docstring is the command's description. A module is imported only when its command is called.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib
import importlib.metadata
import io
import os
import platform
import sys
from collections.abc import Callable, Sequence

from sdar_lm_eval import __version__
from sdar_lm_eval.errors import SDARError
from sdar_lm_eval.report.printing import printable

COMMANDS = {
    "compare": "print differences between runs, with paired intervals and tests",
    "show": "print a run's documents, or how one answer was denoised",
    "report": "write runs as one HTML page: scores, comparison, each answer with its denoising",
    "sweep": "evaluate a grid of decoding settings on this machine: accuracy against speed",
    "table": "print a run's scores beside published ones",
    "generate": "answer a prompt, and show the denoising as it happens",
    "doctor": "check which engines can run on this machine, and whether their answers can be trusted",
    "gsm8k-json": "write a GSM8K run as one JSON file",
}
"""Command -> what it is for. A command's module has the command's name, with _ for -."""

LM_EVAL_COMMANDS = {
    "run": "evaluate a model",
    "ls": "list tasks",
    "validate": "check tasks",
}
"""lm_eval's own commands -> what they are for. lm_eval runs them."""

INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 plus the number of SIGINT, as in shells."""


def overview() -> str:
    """Return the text of `sdar_lm_eval --help`."""
    width = max(map(len, (*COMMANDS, *LM_EVAL_COMMANDS)))
    listed = [f"  {name:{width}}  {purpose}" for name, purpose in COMMANDS.items()]
    theirs = [f"  {name:{width}}  {purpose}" for name, purpose in LM_EVAL_COMMANDS.items()]
    return "\n".join(
        [
            "usage: sdar_lm_eval COMMAND …",
            "",
            "lm_eval's commands, with this package's models and tasks:",
            *theirs,
            "",
            "Commands of this package:",
            *listed,
            "",
            "`sdar_lm_eval COMMAND --help` shows a command's arguments and an example.",
            "`sdar_lm_eval --version` shows the versions of this package, lm_eval and Python.",
        ]
    )


def version() -> str:
    """Return the text of `sdar_lm_eval --version`."""
    lm_eval = importlib.metadata.version("lm_eval")
    return f"sdar_lm_eval {__version__}, lm_eval {lm_eval}, Python {platform.python_version()}"


def _discard_output() -> None:
    """Send what standard output still holds to nowhere: Python flushes standard output at exit, which must not fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main(argv: Sequence[str]) -> int:
    """Run a command of this package.

    Args:
        argv: the command, one of `COMMANDS`, and its arguments.

    Returns:
        The exit code: 0; 1 after an error of this package, which is printed to standard error; 130 after Ctrl-C.

    Raises:
        SystemExit: with code 2 where an argument is not as declared, with code 0 after --help.
    """
    name = argv[0]
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as for lm_eval's command line (`autoload.py`)
    if os.environ.get("COLUMNS", "").strip() == "0":  # the width is unknown, and rich would take 0 for the width
        del os.environ["COLUMNS"]
    command = importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
    parser = argparse.ArgumentParser(
        prog=f"sdar_lm_eval {name}",
        description=command.__doc__,
        epilog=f"example:\n  {command.EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_arguments(parser)

    def text_of() -> str | None:
        try:
            arguments = parser.parse_args(argv[1:])
        finally:
            sys.stdout.flush()  # argparse ignores that its help cannot be written
        text: str | None = command.run(arguments)
        return text

    return printed(text_of)


def printed(text_of: Callable[[], str | None]) -> int:
    """Print a text to a standard output that may be closed, full, a pipe without reader, or ASCII only.

    Args:
        text_of: makes the text, and may print to standard output too.

    Returns:
        The exit code: 0; 1 after an error of this package, which is printed to standard error; 130 after Ctrl-C.
    """
    if sys.stdout is None:  # closed by the shell's >&-, and rich and `generate` write to it
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):  # what the terminal's encoding lacks is printed as an escape
        with contextlib.suppress(OSError):  # a file that became a pipe under it
            sys.stdout.reconfigure(errors="backslashreplace")
    try:
        text = text_of()
        if text is not None:
            print(text)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, say `head`, ended
        _discard_output()
    except OSError as error:
        if error.errno != errno.ENOSPC or error.filename is not None:
            raise
        _discard_output()
        print(f"sdar_lm_eval: error: the output cannot be written: {error.strerror}.", file=sys.stderr)
        return 1
    except SDARError as error:
        print(printable(f"sdar_lm_eval: error: {error}"), file=sys.stderr)
        return 1
    except KeyboardInterrupt as interrupt:
        print(
            f"sdar_lm_eval: {interrupt}".rstrip(": ") if str(interrupt) else "sdar_lm_eval: interrupted",
            file=sys.stderr,
        )
        return INTERRUPTED
    return 0
