"""JetEngine on the CPU: puts the stand-in for one version on the path, and has torch report a GPU that is not there.

    with standin("0.2.0") as jetengine:                       the stand-in's jetengine_shared.py
        jetengine.faults.pages = 3
        make_engine("jetengine", Checkpoint.open("demo"))

The stand-in lies in engines/adapters/jetengine/standin; shared/jetengine_shared.py says how it was compared with
JetEngine.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from sdar_lm_eval.engines.adapters.jetengine import hooks

FOLDER = Path(__file__).parent / "engines" / "adapters" / "jetengine" / "standin"
VERSIONS = ("0.2.0", "0.1.0")
GIB = 1 << 30
OF_STANDIN = ("jetengine", "jetengine_shared", "flashinfer", "flash_attn", "liger_kernel")


@contextlib.contextmanager
def standin(version: str) -> Iterator[Any]:
    """Put the stand-in in the place of JetEngine; yield its shared module."""
    with pytest.MonkeyPatch.context() as patch:
        for folder in ("shared", version):
            patch.syspath_prepend(str(FOLDER / folder))
        gpu_on_the_cpu(patch)
        # Config classes that the adapter registers are forgotten at the end.
        patch.setattr(CONFIG_MAPPING, "_extra_content", dict(CONFIG_MAPPING._extra_content))
        shared = importlib.import_module("jetengine_shared")
        alone = not dist.is_initialized()
        try:
            yield shared
        finally:
            for llm in shared.made:
                atexit.unregister(llm.exit)
                for worker in getattr(llm, "ps", ()):
                    worker.kill()
                    worker.join()
            if alone and dist.is_initialized():
                dist.destroy_process_group()
                atexit.unregister(dist.destroy_process_group)
            hooks.unset_default_device()
            torch.set_default_dtype(torch.float32)
            forget_modules()


def forget_modules() -> None:
    """Have the next import read the stand-in's files anew, which may be another version's."""
    for name in list(sys.modules):
        if name.partition(".")[0] in OF_STANDIN:
            del sys.modules[name]
    importlib.invalidate_caches()


class GeneratorOnTheCPU(torch.Generator):
    def __new__(cls, device: Any = "cpu") -> Any:
        return super().__new__(cls, "cpu")


def gpu_on_the_cpu(patch: pytest.MonkeyPatch, free: int = 79 * GIB, total: int = 80 * GIB, gpus: int = 1) -> None:
    """Have torch report GPUs. No tensor can be on them, so flash-attn is tried with tensors of the CPU."""
    facts = {
        "is_available": lambda: True,
        "device_count": lambda: gpus,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "mem_get_info": lambda device=None: (free, total),
        "get_device_name": lambda device=None: "a GPU on the CPU",
        "max_memory_allocated": lambda device=None: GIB,
        "empty_cache": lambda: None,
    }
    for name, fact in facts.items():
        patch.setattr(torch.cuda, name, fact)
    patch.setattr(torch, "Generator", GeneratorOnTheCPU)
    tried = hooks.ensure_right_attention
    if getattr(tried, "on_the_cpu", False):
        return

    def on_the_cpu(config: Any, block_length: int, dtype: torch.dtype, device: Any) -> bool:
        assert torch.device(device).type == "cuda"
        return tried(config, block_length, dtype, "cpu")

    on_the_cpu.on_the_cpu = True
    patch.setattr(hooks, "ensure_right_attention", on_the_cpu)
