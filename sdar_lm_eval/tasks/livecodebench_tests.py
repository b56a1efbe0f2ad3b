"""The tests of LiveCodeBench's problems, kept beside the documents: they are hundreds of megabytes.

    keep("abc387_b", tests)     of a problem, as its row has them
    job("abc387_b", code)       a program and its problem's tests, for `programs.py`

lm-eval loads a task's functions from its file more than once, but imports this module once.
"""

from __future__ import annotations

import base64
import io
import json
import pickle
import zlib
from pathlib import Path
from typing import NoReturn, TypedDict

from sdar_lm_eval.tasks.programs import Job

SECONDS = 6.0
"""The time limit of each test (OpenCompass, livecodebench_gen_a4f90b.py)."""

_CHILD = Path(__file__).with_name("livecodebench_child.py")


class ProblemTests(TypedDict):
    """A problem's tests, as `livecodebench_child.check` takes them."""

    function: str | None
    inputs: list[str]
    outputs: list[str]


_kept: dict[str, tuple[str, int]] = {}


def keep(problem: str, tests: ProblemTests) -> None:
    """Keep the tests of a problem, compressed."""
    packed = base64.b64encode(zlib.compress(json.dumps(tests).encode())).decode()
    _kept[problem] = packed, len(tests["inputs"])


def job(problem: str, code: str) -> Job:
    """Return a program with its problem's tests: the time limit is each test's, and the released one for all."""
    packed, number = _kept[problem]
    call = (
        "import base64 as _base64, zlib as _zlib\n"
        f"check({code!r}, seconds={SECONDS}, **json.loads(_zlib.decompress(_base64.b64decode({packed!r}))))\n"
    )
    return Job("", f"{_CHILD.read_text('utf-8')}\n{call}", (SECONDS + 1) * number + 5, guard=True)


def read_cases(text: str) -> list[dict[str, str]]:
    """Return the test cases of a row's column: JSON, or JSON that is pickled, compressed and in base 64.

    Raises:
        ValueError: the text is neither, or the pickle holds anything but text.
    """
    try:
        cases = json.loads(text)
    except ValueError:
        try:
            cases = json.loads(_TextUnpickler(io.BytesIO(zlib.decompress(base64.b64decode(text)))).load())
        except (zlib.error, pickle.UnpicklingError, TypeError, EOFError) as error:
            raise ValueError(f"no test cases ({error})") from error
    if not isinstance(cases, list) or not all(
        isinstance(case, dict) and isinstance(case.get("input"), str) and isinstance(case.get("output"), str)
        for case in cases
    ):
        raise ValueError("no list of objects with an input and an output")
    return cases


class _TextUnpickler(pickle.Unpickler):
    """Reads a pickle of plain values: one that names a class or function could run programs."""

    def find_class(self, module_name: str, global_name: str) -> NoReturn:
        """Refuse.

        Raises:
            pickle.UnpicklingError: always.
        """
        raise pickle.UnpicklingError(f"it names {module_name}.{global_name}")
