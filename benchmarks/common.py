"""What the benchmarks share: a checkpoint with random weights, where the real ones are not at hand; this CPU's name."""

from __future__ import annotations

import contextlib
import json
import platform
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from sdar_lm_eval import Checkpoint


@contextlib.contextmanager
def with_random_weights(folder: str) -> Iterator[str]:
    """A temporary copy of a checkpoint's folder, its weights drawn from N(0, 0.02²), norms 1, in its own dtype.

    The folder needs config.json and a tokenizer, and room for the weights in the temporary folder's file system.
    """
    checkpoint = Checkpoint.open(folder)
    dtype = getattr(torch, checkpoint.config.get("torch_dtype") or "bfloat16")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    weights = {
        name: (
            torch.ones(shape, dtype=dtype)
            if "norm" in name
            else torch.empty(shape, dtype=dtype, device=device).normal_(0, 0.02).cpu()
        )
        for name, shape in checkpoint.weight_shapes().items()
    }
    with tempfile.TemporaryDirectory(prefix="random-weights-") as copy:
        for path in checkpoint.folder.iterdir():
            if path.is_file() and not path.name.endswith((".safetensors", ".safetensors.index.json", ".py")):
                shutil.copyfile(path, Path(copy) / path.name)
        save_file(weights, Path(copy) / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((Path(copy) / "config.json").read_text())
        (Path(copy) / "config.json").write_text(json.dumps(config | {"block_size": checkpoint.block_length}))
        del weights
        yield copy


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
