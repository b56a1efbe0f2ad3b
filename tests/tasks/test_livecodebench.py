from __future__ import annotations

import base64
import json
import os
import pickle
import random
import sys
import types
import zlib
from io import StringIO
from pathlib import Path
from typing import Any

import huggingface_hub
import miniature
import numpy as np
import pytest
from opencompass_code import answers, needs_opencompass
from scripted import evaluate, load_task, prompts

from sdar_lm_eval.errors import UserError
from sdar_lm_eval.tasks import livecodebench, livecodebench_child
from sdar_lm_eval.tasks.livecodebench import code_of
from sdar_lm_eval.tasks.livecodebench_child import as_function, check, is_same
from sdar_lm_eval.tasks.livecodebench_tests import ProblemTests, job, keep, read_cases
from sdar_lm_eval.tasks.programs import passes

STDIN = ProblemTests(function=None, inputs=["3\n1 2 3\n", "1\n-5"], outputs=["6\n", "-5\n"])
METHOD = ProblemTests(function="add", inputs=["1\n[2]", "0\n[]"], outputs=["[1, 2]", "[0]"])
FUNCTION = ProblemTests(function="half", inputs=['{"1": 2}', "3"], outputs=["1.0", "1.5"])

RIGHT = {
    "input": (STDIN, "n = int(input())\nprint(sum(map(int, input().split())))"),
    "sys.stdin": (STDIN, "import sys\ninput = sys.stdin.readline\ninput()\nprint(sum(map(int, input().split())))"),
    "read": (STDIN, "import sys\nprint(sum(map(int, sys.stdin.read().split()[1:])))"),
    "lines": (STDIN, "import sys\nrows = [r for r in sys.stdin]\nprint(sum(int(x) for x in rows[1].split()))"),
    "main": (
        STDIN,
        "def main():\n    input()\n    print(sum(map(int, input().split())))\n\n"
        "if __name__ == '__main__':\n    main()",
    ),
    "exit": (STDIN, "import sys\ninput()\nprint(sum(map(int, input().split())))\nsys.exit()"),
    "late import": (
        STDIN,
        "input()\nimport math\nfrom functools import reduce\n"
        "print(reduce(lambda a, b: a + b, map(int, input().split())))",
    ),
    "spaces": (STDIN, "input()\nprint('  ', sum(map(int, input().split())), '  ')\nprint()"),
    "float": (STDIN, "input()\nprint(f'{sum(map(int, input().split())):.3f}')"),
    "method": (
        METHOD, "class Solution:\n    def add(self, a: int, b: List[int]) -> List[int]:\n        return [a, *b]",
    ),
    "tuple": (METHOD, "class Solution:\n    def add(self, a, b):\n        return (a, *b)"),
    "function": (
        FUNCTION,
        "def half(x):\n    return sum(k * v for k, v in x.items()) / 2 if isinstance(x, dict) else x / 2",
    ),
    "objects": (
        ProblemTests(function="f", inputs=["3", "4"], outputs=['[{"1": 3}]', '{"1": 4}']),
        "def f(n):\n    return [{1: n}] if n == 3 else {1: n}",
    ),
}  # fmt: skip
WRONG = {
    "nothing": (STDIN, ""),
    "no Python": (STDIN, "print("),
    "an import alone": (STDIN, "import sys"),
    "another number": (STDIN, "print(6)"),
    "a global": (
        STDIN,
        "total = 0\ndef add():\n    global total\n    total += 1\nadd()\ninput()\n"
        "print(sum(map(int, input().split())))",
    ),
    "an exception": (STDIN, "input()\nprint(sum(map(int, input().split())))\n1 / 0"),
    "too much input": (STDIN, "input()\nprint(sum(map(int, input().split())))\ninput()\ninput()"),
    "a file": (STDIN, "import os\nprint(os.getcwd())"),
    "no such function": (METHOD, "class Solution:\n    def sub(self, a, b):\n        return [a]"),
    "no class": (METHOD, "def other():\n    pass"),
    "a set": (METHOD, "class Solution:\n    def add(self, a, b):\n        return {a, *b}"),
    "sys.exit": (METHOD, "import sys\nsys.exit()"),
    "sys.exit in a method": (METHOD, "import sys\nclass Solution:\n    def add(self, a, b):\n        sys.exit()"),
    "equal to anything": (
        METHOD,
        "class L(list):\n    def __eq__(self, other):\n        return True\n"
        "class Solution:\n    def add(self, a, b):\n        return L()",
    ),
}  # fmt: skip


def _passes(tests: ProblemTests, program: str) -> bool:
    keep("x", tests)
    return passes(job("x", program))


@pytest.mark.parametrize("name", [*RIGHT, *WRONG])
def test_programs(name: str) -> None:
    assert _passes(*{**RIGHT, **WRONG}[name]) == (name in RIGHT)


def test_a_stdin_that_the_program_imports() -> None:
    """As in the released evaluation, its lines have no line break, and there are none to go through."""
    tests = ProblemTests(function=None, inputs=["\n7\n"], outputs=["7"])
    assert _passes(tests, "input()\nprint(input())")
    assert _passes(tests, "from sys import stdin\nassert stdin.readline() == ''\nprint(stdin.readline())")
    assert not _passes(tests, "from sys import stdin\nfor line in stdin:\n    print(line)")


def test_the_time_of_all_tests_is_longer_than_that_of_each() -> None:
    keep("x", STDIN)
    assert job("x", "").seconds == 7 * len(STDIN["inputs"]) + 5  # a test may take 6 s


def test_each_test_has_its_own_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdar_lm_eval.tasks.livecodebench_tests.SECONDS", 1.0)
    tests = ProblemTests(function=None, inputs=["0.6", "0.6"], outputs=["ok", "ok"])
    program = "import time\ntime.sleep(float(input()))\nprint('ok')"
    assert _passes(tests, program)  # 1.2 s in all
    assert not _passes({**tests, "inputs": ["0", "1.5"]}, program)
    assert not _passes({**tests, "inputs": ["0", "0"]}, "while True:\n    pass")


@pytest.mark.parametrize(
    ("response", "code"),
    [
        ("```python\nx = 1\n```", "x = 1"),
        ("Here:\n```\na\nb\n```\nor\n```\nc\n```", "a\nb"),
        ("<think>```\nno\n```</think>\n```\nyes\n```", "yes"),
        ("```python\nx = 1", ""),
        ("x = 1", ""),
    ],
)
def test_the_code_of_a_response(response: str, code: str) -> None:
    assert code_of(response) == code


def test_what_it_asks(offline: Path) -> None:
    task = load_task("livecodebench_v5_sdar")
    stdin, starter = prompts(task)
    assert stdin == (
        "### Question:\nPrint twice the number {n}.\n\nSample: 1 -> 2\n\n### Format: Read the inputs from stdin "
        "solve the problem and write the answer to stdout (do not directly test on the sample inputs). Enclose your "
        "code within delimiters as follows.\n```python\n# YOUR CODE HERE\n```\n\n### Answer: (use the provided format "
        "with backticks)\n\n\n"
    )
    assert "### Format: You will use the following starter code" in starter and "        \n```\n\n### Answer" in starter
    assert set(task.eval_docs[0]) == {"question_id", "question", "starter_code"}  # samples files hold no tests


def test_an_evaluation(offline: Path) -> None:
    def answer(doc: dict[str, Any]) -> str:
        wrong = "print(input() * 2)"  # passes the public test of no problem
        code = miniature.LIVECODEBENCH[1]["solution"] if doc["starter_code"] else wrong
        return f"```python\n{code}\n```"

    results, _ = evaluate(answer, "livecodebench_v6_sdar_s", confirm_run_unsafe_code=True)
    assert results["results"]["livecodebench_v6_sdar_s"]["pass@1,opencompass"] == 0.5
    with pytest.raises(ValueError, match="unsafe"):
        evaluate(answer, "livecodebench_v6_sdar")


class _Bomb:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("exit 1",)


@pytest.mark.parametrize(
    "text", [
        "x", "{}", "[1]", '[{"input": 1, "output": ""}]', "eJw=", base64.b64encode(zlib.compress(b"x")).decode(),
        base64.b64encode(zlib.compress(pickle.dumps(_Bomb()))).decode(),
        base64.b64encode(zlib.compress(pickle.dumps(7))).decode(),
    ]
)  # fmt: skip
def test_cases_that_cannot_be_read(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        read_cases(text)
    row = miniature.LIVECODEBENCH[0] | {"private_test_cases": text}
    file = miniature.write_jsonl(tmp_path / "test5.jsonl", [row])
    with pytest.raises(UserError) as raised:
        livecodebench.load(release=5, livecodebench_dir=str(tmp_path))
    assert str(raised.value).startswith(f"{file}, line 1: the test cases or 'metadata' cannot be read (")


def test_the_hub_s_file(miniature_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(repo: str, file: str, repo_type: str) -> str:
        asked.append((repo, file, repo_type))
        return str(miniature_data / "livecodebench" / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert len(livecodebench.load(release=6)["test"]) == 2
    assert asked == [("livecodebench/code_generation_lite", "test6.jsonl", "dataset")]


# Beside SDAR's own evaluation


@pytest.fixture
def run_test(opencompass: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return OpenCompass's verdict on a program and its tests; it runs here, without its guard."""
    module = types.ModuleType("pyext")

    class RuntimeModule:
        @staticmethod
        def from_string(name: str, doc: str, text: str) -> Any:
            names: dict[str, Any] = {}
            exec(text, names)
            return types.SimpleNamespace(**names)

    module.RuntimeModule = RuntimeModule  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pyext", module)
    names = opencompass("datasets/livecodebench/testing_util.py")
    names["reliability_guard"] = lambda: None
    import faulthandler
    import signal

    monkeypatch.setattr(faulthandler, "enable", lambda: None)  # pytest's stderr has no file number
    before = signal.getsignal(signal.SIGALRM)

    def verdict(tests: ProblemTests, program: str) -> bool:
        sample = {"inputs": tests["inputs"], "outputs": tests["outputs"], "fn_name": tests["function"]}
        signal.signal(signal.SIGALRM, names["timeout_handler"])
        limit = sys.getrecursionlimit()
        try:
            results, _ = names["run_test"]({"input_output": json.dumps(sample)}, test=program)
        except SystemExit:  # ends the process there
            return False
        finally:
            sys.setrecursionlimit(limit)
            signal.signal(signal.SIGALRM, before)
        return bool(np.all(np.array(results) > 0))

    return verdict


@needs_opencompass
def test_prompts_beside_opencompass(opencompass: Any, conversation: Any, offline: Path) -> None:
    from datetime import datetime
    from enum import Enum

    names = {"Enum": Enum, "datetime": datetime, "json": json, "base64": base64, "zlib": zlib, "pickle": pickle}
    names |= opencompass("datasets/livecodebench/prompts.py", "class CodeGenerationPromptConstants", "def get_generic")
    import datasets

    rows = datasets.Dataset.from_list(miniature.LIVECODEBENCH)
    names |= {
        "BaseDataset": object,
        "get_data_path": lambda path, local_mode: path,
        "load_dataset": lambda *_, **__: rows,
    }
    names["DatasetDict"] = dict
    loader = opencompass(
        "datasets/livecodebench/livecodebench.py", "class LCBCodeGenerationDataset", "class LCBCodeExecution", **names
    )["LCBCodeGenerationDataset"]
    from opencompass_code import Anything

    sys.modules["opencompass.datasets.livecodebench"] = Anything("livecodebench")
    config = opencompass("configs/datasets/livecodebench/livecodebench_gen_a4f90b.py")["LCBCodeGeneration_dataset"]
    theirs = loader.load()["test"]
    expected = [conversation(config, [], row) for row in theirs]
    task = load_task("livecodebench_v5_sdar")
    assert [[{"role": "user", "content": prompt}] for prompt in prompts(task)] == expected
    from sdar_lm_eval.tasks.data import documents

    ours = documents(livecodebench.LIVECODEBENCH, "test", {}, config="test5")
    for row, their_row in zip(ours, theirs, strict=True):
        sample = json.loads(their_row["evaluation_sample"])
        tests = row["tests"]
        assert (tests["function"], tests["inputs"], tests["outputs"]) == (
            sample["fn_name"], sample["inputs"], sample["outputs"],
        )  # fmt: skip


@needs_opencompass
def test_code_beside_opencompass(opencompass: Any) -> None:
    names = opencompass("utils/text_postprocessors.py")
    extract = opencompass("datasets/livecodebench/extract_utils.py")["extract_code_generation"]
    for text in answers("```|```python|\\n|\\n|x = 1| |<think>|</think>|Here:|``|\\n```\\n", 20_000):
        assert code_of(text) == extract(names["extract_non_reasoning_content"](text)), text


@needs_opencompass
def test_programs_beside_opencompass(run_test: Any) -> None:
    for name, (tests, program) in {**RIGHT, **WRONG}.items():
        if name not in ("a file", "equal to anything"):  # the guard is off; an impostor is right there
            assert run_test(tests, program) == (name in RIGHT), name


@needs_opencompass
def test_built_programs_beside_opencompass(run_test: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs of random statements, by both runners in this process."""
    monkeypatch.setattr(livecodebench_child, "_limit", lambda seconds: None)
    drawn = random.Random(0)
    statements = [
        "import sys", "import math", "from sys import stdin", "n = int(input())", "a = input().split()", "total = 0",
        "for line in sys.stdin:\n    total += len(line.split())", "print(total)", "print(n)", "print(6)", "print('6 ')",
        "print(*map(int, a))", "print(sum(map(int, a)))", "print(sum(map(int, a)) / 1)", "def f(x):\n    return x + n",
        "print(f(3))", "sys.exit()", "exit", "global total", "x = '''a\nb'''", "print()", "if n == 3:\n    print(6)",
        "if __name__ == '__main__':\n    print(6)", "data = stdin.read().split()",
        "data = sys.stdin.read().split()",
        "print(stdin.readline())", "rows = stdin.readlines()", "print(sum(map(int, data[1:])))",
        "input = sys.stdin.readline", "b = [sum(map(int, a)) for _ in range(1)]", "print(b[0])", "import os", "1/0",
    ]  # fmt: skip
    one = ProblemTests(function=None, inputs=["3\n1 2 3\n"], outputs=["6\n"])
    right = 0
    for _ in range(3_000):
        program = "\n".join(drawn.sample(statements, drawn.randint(1, 6)))
        if drawn.random() < 0.5:
            program = f"import sys\nn = int(input())\na = input().split()\n{program}"
        theirs = run_test(one, program)
        assert _passes_here(one, program) == theirs, program
        right += theirs
    assert right > 200
    values = [
        "1",
        "-1",
        "[1, 2]",
        "[[1, 2]]",
        "[[1], [2]]",
        '{"1": 2}',
        '[{"1": 2}]',
        "[]",
        "null",
        "true",
        "1.0",
        '"a"',
    ]
    returned = [
        "x",
        "(x,)",
        "[x]",
        "x[0]",
        "tuple(x)",
        "[tuple(y) for y in x]",
        "1",
        "[1, 2]",
        "(1, 2)",
        "[(1, 2)]",
        "{1: 2}",
    ]
    returned += ["[[1, 2]]", "[(1,), (2,)]", "None", "True", "{1}", "[]", "()", "1.0", "print(x)"]
    right = 0
    for given in values:
        for expected in values:
            for value in returned:
                tests = ProblemTests(function="f", inputs=[given], outputs=[expected])
                for program in (
                    f"def f(x):\n    return {value}",
                    f"class Solution:\n    def f(self, x):\n        return {value}",
                ):
                    theirs = run_test(tests, program)
                    assert _passes_here(tests, program) == theirs, (tests, program)
                    right += theirs
    assert right > 200


def _passes_here(tests: ProblemTests, program: str) -> bool:
    limit = sys.getrecursionlimit()
    before, sys.stdout = (sys.stdin, sys.stdout), StringIO()
    try:
        check(program, seconds=0, **tests)
    except (Exception, SystemExit):
        return False
    finally:
        sys.stdin, sys.stdout = before
        sys.setrecursionlimit(limit)
    return True


@needs_opencompass
def test_output_beside_opencompass(run_test: Any) -> None:
    """What a program printed, and what was expected."""
    pieces = "1|2|10|1.0|1.00001|1e3|0.1| |\\n|\\n|a|A|-|YES|nan|inf|,"
    pairs = list(zip(answers(pieces, 1_500), answers(pieces, 1_500, seed=1), strict=True))
    pairs += [(a, a.replace("1", drawn)) for a, _ in pairs[:700] for drawn in ("1", "1.0", " 1", "1\n")]
    right = 0
    for printed, expected in pairs:
        tests = ProblemTests(function=None, inputs=[""], outputs=[expected])
        theirs = run_test(tests, f"print({printed!r}, end='')")
        assert is_same(printed, expected) == theirs, (printed, expected)
        right += theirs
    assert right > 600


def test_imports_before_the_program_stay_outside() -> None:
    assert as_function("import os\nx = 1\nimport sys\nprint(x)") == (
        "import os\nstdin = sys.stdin\nstdout = sys.stdout\ndef code():\n\tx = 1\n\timport sys\n\tprint(x)\n"
    )
