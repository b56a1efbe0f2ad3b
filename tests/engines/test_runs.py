from __future__ import annotations

import ast
import gc
import sys
import threading
import types
from pathlib import Path

import pytest
import torch
from asking import GREEDY

import sdar_lm_eval
from sdar_lm_eval import EngineError, GenerationRequest, UserError
from sdar_lm_eval.checks import at_least_one, if_given
from sdar_lm_eval.engines import runs
from sdar_lm_eval.engines.runs import Allowance, Failures, OneRun, is_out_of_memory, peak_of_process, warm_up_requests


def test_an_option_that_is_not_given_is_not_read():
    assert if_given(at_least_one, "max_active", None) is None
    assert if_given(at_least_one, "max_active", 3) == 3
    with pytest.raises(UserError, match="max_active=0"):
        if_given(at_least_one, "max_active", 0)


class TestOneRun:
    def held(self, one_run):
        with one_run():
            yield 1
            yield 2

    def test_a_second_one_is_refused_until_the_first_has_ended(self):
        one_run = OneRun("native")
        first = self.held(one_run)
        next(first)
        with pytest.raises(EngineError, match=r"the native engine is in the middle of another run.*close\(\)"):
            next(self.held(one_run))
        assert list(first) == [2]
        assert list(self.held(one_run)) == [1, 2]

    @pytest.mark.parametrize("end", ["close", "forgotten", "another thread"])
    def test_a_generator_that_is_given_up_lets_go(self, end):
        one_run = OneRun("native")
        first = self.held(one_run)
        next(first)
        if end == "close":
            first.close()
        elif end == "forgotten":
            del first
            gc.collect()
        else:
            thread = threading.Thread(target=first.close)
            thread.start()
            thread.join()
        assert list(self.held(one_run)) == [1, 2]

    def test_a_closed_engine_is_unloaded_once_and_refuses_runs(self):
        one_run, unloaded = OneRun("native"), []
        for _ in range(2):
            one_run.close(lambda: unloaded.append(1))
        assert unloaded == [1]
        with pytest.raises(EngineError, match=r"^the native engine is closed\. Open another one\.$"):
            next(self.held(one_run))

    @pytest.mark.parametrize("end", ["read", "close"])
    def test_closing_in_the_middle_of_a_run_unloads_at_its_end(self, end):
        one_run, unloaded = OneRun("native"), []
        first = self.held(one_run)
        next(first)
        one_run.close(lambda: unloaded.append(1))
        with pytest.raises(EngineError, match="is closed"):
            next(self.held(one_run))
        assert not unloaded
        if end == "read":
            assert list(first) == [2]
        else:
            first.close()
        assert unloaded == [1]

    def test_an_error_lets_go(self):
        one_run = OneRun("native")
        with pytest.raises(KeyError), one_run():
            raise KeyError
        assert list(self.held(one_run)) == [1, 2]


def test_failures_name_how_many_which_and_why():
    failures = Failures()
    failures.raise_if_any(3)
    for index in (30, 4):
        failures.add(index, "bad weights.")
    for index in range(100, 112):
        failures.add(index, "too long.")
    with pytest.raises(EngineError) as caught:
        failures.raise_if_any(200)
    assert str(caught.value) == (
        "14 of 200 requests have no answer; the other answers are kept (--use_cache). Number 4, 30: bad weights. "
        "Number 100, 101, 102, 103, 104, 105, 106, 107, 108, 109 and 2 more: too long."
    )


def test_an_allowance_grows_again_and_ever_more_slowly():
    allowance = Allowance(16)
    steps = []
    for to in (4, 4):
        allowance.cut(to)
        seen = [allowance.now]
        while allowance.now < 16:
            allowance.count_full_step()
            if allowance.now != seen[-1]:
                seen.append(allowance.now)
            steps.append(to)
        assert seen == [4, 5, 6, 7, 8, 10, 12, 15, 16]
    assert steps.count(4) == 8 * 2 * runs.PATIENCE + 8 * 4 * runs.PATIENCE
    allowance.cut(0)
    assert allowance.now == 1


class TestOutOfMemory:
    def test_torchs_own_error_on_the_cpu(self):
        with pytest.raises(RuntimeError) as caught:
            torch.empty(1 << 60, dtype=torch.uint8)
        assert is_out_of_memory(caught.value)

    @pytest.mark.parametrize(
        ("error", "is_one"),
        [
            (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), True),
            (MemoryError("Unable to allocate 8.00 EiB for an array"), True),
            (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."), True),
            (RuntimeError("CUDA error: out of memory"), True),
            (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"), True),
            (RuntimeError("CUDA error: unspecified launch failure"), False),
            (ValueError("CUDA error: out of memory"), False),
            (KeyboardInterrupt(), False),
        ],
    )
    def test_others(self, error, is_one):
        assert is_out_of_memory(error) == is_one


@pytest.mark.parametrize(("prompt", "new"), [(1, 1), (3, 2), (30, 1), (30, 500)])
def test_requests_to_warm_up_with_need_no_more_room(prompt, new):
    requests = [GenerationRequest((7,) * prompt, new, GREEDY, stop_strings=("x",))]
    short = warm_up_requests(requests, 4)
    assert len(short) == 4
    assert max(request.longest for request in short) <= requests[0].longest
    assert {request.decoding for request in short} == {GREEDY}
    if new == 500:
        assert [request.max_new_tokens for request in short] == [12, 8, 4, 8]


class TestPlatforms:
    """Windows lacks these modules of the standard library, and these names of other modules."""

    MODULES = frozenset({"fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty"})
    NAMES = frozenset(
        {
            f"os.{name}"
            for name in ("fork", "geteuid", "getuid", "kill", "killpg", "mkfifo", "nice", "sched_getaffinity")
        }
        | {f"signal.{name}" for name in ("SIGALRM", "SIGHUP", "SIGKILL", "alarm", "setitimer")}
    )

    def found(self, source):
        """What a module would fail by: unguarded imports at its top level, and names used without `hasattr`."""
        tree = ast.parse(source)
        for node in tree.body:  # imports in functions, in `try` and in `if` are deeper
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            yield from self.MODULES & {name.partition(".")[0] for name in names}
        used = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        for name in used & self.NAMES:
            module, _, attribute = name.partition(".")
            if f'hasattr({module}, "{attribute}")' not in source:
                yield name

    def test_no_module_needs_what_windows_lacks(self):
        assert list(self.found("import resource\nimport signal\nprint(signal.SIGKILL)")) == [
            "resource",
            "signal.SIGKILL",
        ]
        files = sorted(Path(sdar_lm_eval.__file__).parent.rglob("*.py"))
        assert len(files) > 50
        assert {path.name: found for path in files if (found := list(self.found(path.read_text("utf-8"))))} == {}

    def test_peak_memory_without_resource(self, monkeypatch):
        assert peak_of_process() > 1 << 26
        process = types.SimpleNamespace(memory_info=lambda: types.SimpleNamespace(peak_wset=123))
        monkeypatch.setitem(sys.modules, "resource", None)
        monkeypatch.setitem(sys.modules, "psutil", types.SimpleNamespace(Process=lambda: process))
        assert peak_of_process() == 123
