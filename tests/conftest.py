from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import logging
import os
import sys
from pathlib import Path
from typing import Any

import pytest

# Tensors here are small: a second thread waits more than it computes, above all where the machine is shared. Read by
# torch when it is imported, here and in the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Triton reads the variable when it is imported. A folder's conftest.py may import Triton before `pytest_configure`
# runs, which asks torch whether there is a GPU.
if not any(Path("/dev", name).exists() for name in ("nvidiactl", "dxg")):  # dxg: Windows's Linux
    os.environ["TRITON_INTERPRET"] = "1"

with contextlib.suppress(ImportError):  # tests/gpu does without
    import hypothesis

    hypothesis.settings.register_profile("patient", deadline=None)  # a busy machine is no failure
    hypothesis.settings.load_profile("patient")


def pytest_configure(config: pytest.Config) -> None:
    """Prepare the libraries, but where xdist's workers run the tests: the process that starts them needs no torch."""
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        prepare_torch()


def prepare_torch() -> None:
    import torch
    from torch.utils import collect_env

    # lm_eval asks pip and the system at each evaluation, which takes a second or two; they say the same each time.
    collect_env.get_pretty_env_info = functools.cache(collect_env.get_pretty_env_info)

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
        with contextlib.suppress(ImportError):
            from triton.runtime import interpreter

            quicken(interpreter)


def quicken(interpreter: Any) -> None:
    """Have Triton's interpreter do once, or not at all, what it does at each launch or operation."""
    # It replaces each function of its language at every launch and in every function that a kernel calls, which takes
    # half of its time. What it puts there is always the same: once is enough.
    if hasattr(interpreter, "_LangPatchScope"):
        replace, replaced = interpreter._patch_lang, set()

        def replace_once(fn: Any) -> Any:
            modules = frozenset(map(id, fn.__globals__.values())) & {id(interpreter.tl), id(interpreter.tl.core)}
            if modules not in replaced:
                replaced.add(modules)
                replace(fn)
            return interpreter._LangPatchScope()  # nothing to undo

        interpreter._patch_lang = replace_once

    # It computes whether each sum and product of integers overflows, and drops the result: `debug` is not set.
    builder = getattr(interpreter, "interpreter_builder", None)
    if builder is not None and not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)

    # It makes a table of all types whenever it looks one up.
    if hasattr(interpreter, "_get_np_dtype"):
        look_up, types = interpreter._get_np_dtype, {}

        def look_up_once(dtype: Any) -> Any:
            if str(dtype) not in types:
                types[str(dtype)] = look_up(dtype)
            return types[str(dtype)]

        interpreter._get_np_dtype = look_up_once


# With several workers the last to begin should be short.
LONG = ("test_modal_runner", "test_ranks", "test_fused", "test_install", "test_resume", "test_kernels_compile")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Modules with long tests first."""
    items.sort(key=lambda item: item.path.stem not in LONG)


modules_frozen = 0


def freeze_modules() -> None:
    """Leave modules and tests out of garbage collections: with them each takes 0.2 s, and engines ask for many."""
    global modules_frozen
    if len(sys.modules) > modules_frozen + 50:
        gc.collect()
        gc.freeze()
        modules_frozen = len(sys.modules)


@functools.wraps(gc.get_freeze_count)
def any_frozen() -> int:
    """Say cheaply whether objects are frozen: Python counts them one by one, and each run of an engine asks."""
    return modules_frozen


gc.get_freeze_count = any_frozen


def pytest_collection_finish() -> None:
    freeze_modules()


def pytest_runtest_logfinish() -> None:
    """Libraries import much of themselves when a test first uses them."""
    freeze_modules()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # or the libraries that look for leaks at the end see some


@pytest.fixture(autouse=True)
def _caplog_hears_lm_eval() -> None:
    """Undo what lm-eval did when it last ran in this process: its log, which ours joins, went nowhere but to stderr."""
    logger = logging.getLogger("lm_eval")
    logger.propagate = True
    for name in ("lm_eval", "sdar_lm_eval"):
        logging.getLogger(name).setLevel(logging.NOTSET)
    for handler in logging.getLogger().handlers:  # pytest's own are the same for all tests; LMDeploy makes them deaf
        handler.setLevel(logging.NOTSET)
