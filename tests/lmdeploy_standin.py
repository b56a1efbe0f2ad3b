"""LMDeploy on the CPU: puts the stand-in on the path, and has torch report a GPU that is not there.

    with standin() as faults:                                 the stand-in's pytorch/engine/faults.py
        faults.pages = 3
        make_engine("lmdeploy", Checkpoint.open("demo"))

The stand-in lies in engines/adapters/lmdeploy/standin; lmdeploy/__init__.py says how it was compared with LMDeploy.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from sdar_lm_eval.engines.adapters.lmdeploy import engine, versions

FOLDER = Path(__file__).parent / "engines" / "adapters" / "lmdeploy" / "standin"
GIB = 1 << 30
devices: list[tuple[str, str]] = []  # every torch.cuda.set_device: the thread's name, the GPU


@contextlib.contextmanager
def standin() -> Iterator[Any]:
    """Put the stand-in in the place of LMDeploy; yield its module of faults."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        gpu_on_the_cpu(patch)
        patch.setattr(versions, "is_there", lambda module: module == "triton")
        # Config classes that the adapter registers are forgotten at the end.
        patch.setattr(CONFIG_MAPPING, "_extra_content", dict(CONFIG_MAPPING._extra_content))
        for name in list(sys.modules):
            if name.partition(".")[0] == "lmdeploy":
                patch.delitem(sys.modules, name)
        faults: Any = importlib.import_module("lmdeploy.pytorch.engine.faults")
        faults.reset()
        opened: list[Any] = []
        init = engine.LMDeploy.__init__
        patch.setattr(engine.LMDeploy, "__init__", lambda self, *a, **k: (init(self, *a, **k), opened.append(self))[1])
        try:
            yield faults
        finally:
            for adapter in opened:
                adapter.close()
            for name in list(sys.modules):
                if name.partition(".")[0] == "lmdeploy":
                    del sys.modules[name]
            importlib.invalidate_caches()


def gpu_on_the_cpu(patch: pytest.MonkeyPatch, total: int = 80 * GIB, gpus: int = 1) -> None:
    """Have torch report GPUs."""
    facts = {
        "is_available": lambda: gpus > 0,
        "device_count": lambda: gpus,
        "current_device": lambda: 0,
        "set_device": lambda device: devices.append((threading.current_thread().name, str(device))),
        "mem_get_info": lambda device=None: (total - GIB, total),
        "get_device_name": lambda device=None: "a GPU on the CPU",
        "max_memory_allocated": lambda device=None: GIB,
        "empty_cache": lambda: None,
    }
    for name, fact in facts.items():
        patch.setattr(torch.cuda, name, fact)
    patch.setattr(torch.version, "cuda", "13.0")
