"""Runs a program of LiveCodeBench on its tests. The text of this file stands in each `Job` of `livecodebench_tests.py`.

As in OpenCompass (opencompass/datasets/livecodebench/testing_util.py in JetAstra/SDAR at c2041a8): a program that reads
stdin becomes a function that is called once a test, with a stdin and a stdout of its own. Its oddities decide scores:
what is global in the program is local to the function, a stdin that the program imports (`from sys import stdin`) reads
lines without their line breaks, and `sys.exit()` ends a test without an error.
"""

from __future__ import annotations

import ast
import io
import json
import math
import signal
import sys
from collections.abc import Callable
from typing import Any

_MODULES = (
    "string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math", "random", "statistics", "itertools",
    "functools", "operator", "io", "sys", "json",
)  # fmt: skip
_PRELUDE = (
    "".join(f"from {name} import *\n" for name in (*_MODULES, "builtins", "typing"))
    + "".join(f"import {name}\n" for name in _MODULES)
    + "sys.setrecursionlimit(600000)\n"
)


def check(program: str, function: str | None, inputs: list[str], outputs: list[str], seconds: float) -> None:
    """Run a program on its tests, in their order.

    Args:
        program: Python.
        function: name of the function, or method of `Solution`, that a test calls; None: a test runs the program.
        inputs: input of each test: arguments as JSON, one in a line, or the text on stdin.
        outputs: expected output of each test: a value as JSON, or the text on stdout.
        seconds: the time limit of each test. A test that takes longer ends the process.

    Raises:
        Exception: a test fails, in whatever way.
    """
    names: dict[str, Any] = {}
    sys.stdin = imported = io.StringIO()
    _limit(seconds)
    exec(compile(_PRELUDE + (program if function else as_function(program)), "<program>", "exec"), names)
    owner = names["Solution"]() if function and "class Solution" in program else None
    called = names[function or "code"] if owner is None else getattr(owner, function or "")
    for given, expected in zip(inputs, outputs, strict=True):
        if function:
            passed = _returns(called, given, expected, seconds)
        else:
            _let_read(imported, given)
            passed = _prints(called, given, expected, seconds)
        if not passed:
            raise AssertionError(f"{given[:200]!r}")
    _limit(0)


def as_function(program: str) -> str:
    """Return a program as the function `code`; its first imports stay outside, later ones move inside."""
    try:
        *before, last = ast.parse(program).body
        if isinstance(last, ast.If) and ast.unparse(last.test).strip() == "__name__ == '__main__'":
            program = "\n".join(ast.unparse(ast.Module(part, [])) for part in (before, last.body))
    except (SyntaxError, ValueError):  # compiling it says so; an empty program has no last statement
        pass
    lines = program.split("\n")
    first = next((place for place, line in enumerate(lines) if not line.startswith(("from ", "import "))), len(lines))
    body = [] if first == len(lines) else ["stdin = sys.stdin", "stdout = sys.stdout", "def code():"]
    return "\n".join([*lines[:first], *body, *("\t" + line for line in lines[first:])]) + "\n"


def _limit(seconds: float) -> None:
    """Let the process end after some seconds; 0: never."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, seconds)


def _returns(function: Callable[..., Any], given: str, expected: str, seconds: float) -> bool:
    arguments, value = [json.loads(line) for line in given.split("\n")], json.loads(expected)
    if arguments and isinstance(arguments[0], dict):
        arguments = _numbered(arguments[0]) or arguments
    value = (_numbered(value) if isinstance(value, dict) else None) or value
    if isinstance(value, list) and value and isinstance(value[0], dict):
        value = _numbered(value[0]) or value
    _limit(seconds)
    found = function(*arguments)
    json.dumps(found)
    found = list(found) if isinstance(found, tuple) else found
    several = isinstance(value, list) and bool(value)
    if found == value or (several and found == value[0]):
        return True
    if several and isinstance(found, list) and found and isinstance(found[0], tuple):
        return bool([list(each) for each in found] == value[0])
    return False


def _numbered(value: dict[str, Any]) -> list[Any] | None:
    """The object with whole numbers for keys, in a list; None where a key is none."""
    try:
        return [{int(key): each for key, each in value.items()}]
    except ValueError:
        return None


def _let_read(stdin: io.StringIO, given: str) -> None:
    """Let the stdin that a program imported read a test's input, by three of its methods."""
    lines = iter(given.split("\n"))
    methods: dict[str, Callable[..., Any]] = {
        "readline": lambda *_: next(lines),
        "readlines": lambda *_: given.split("\n"),
        "read": lambda *_: given,
    }
    vars(stdin).update(methods)


def _prints(function: Callable[[], Any], given: str, expected: str, seconds: float) -> bool:
    stdout, before = io.StringIO(), (sys.stdin, sys.stdout)
    stdout.close = lambda: None  # type: ignore[method-assign]
    sys.stdin, sys.stdout = io.StringIO(given), stdout
    _limit(seconds)
    try:
        function()
    except SystemExit:
        pass
    finally:
        sys.stdin, sys.stdout = before
    return is_same(stdout.getvalue(), expected)


def is_same(printed: str, expected: str) -> bool:
    """Whether a program printed what is expected: the same text but for white space around it or its lines, or lines
    that are numbers close to the expected ones."""
    lines = printed.splitlines()
    if expected.strip() in ("\n".join(lines).strip(), "\n".join(line.strip() for line in lines).strip()):
        return True
    wanted = [line.strip() for line in expected.split("\n") if line]
    found = [line for line in lines if line]
    if wanted in (lines, found):
        return True
    if len(found) != len(wanted) or all(a.isdigit() and b.isdigit() for a, b in zip(found, wanted, strict=True)):
        return False
    try:
        return all(_is_close(float(a), float(b)) for a, b in zip(found, wanted, strict=True))
    except ValueError:
        return False


def _is_close(found: float, wanted: float) -> bool:
    """Return whether two numbers are close, by the rule of numpy's `isclose`."""
    finite = math.isfinite(found) and math.isfinite(wanted)
    return found == wanted or (finite and abs(found - wanted) <= 1e-8 + 1e-5 * abs(wanted))
