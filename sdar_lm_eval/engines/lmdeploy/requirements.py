"""Which LMDeploy is installed, what is missing beside it, and where its answers follow other rules than ours.

Nothing here imports LMDeploy.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from sdar_lm_eval.errors import EngineError

logger = logging.getLogger(__name__)

# Read: 0.16.0 (github.com/InternLM/lmdeploy, commit 1263d5cd889b7ad500e85b8eb20401327a4516ab) and PyPI's 0.18.0. All
# that is said here of LMDeploy, with a file's name below lmdeploy/pytorch, is so in both.
OLDEST, NEWEST = (0, 16), (0, 18)
INSTALL = 'Install with: pip install "sdar-lm-eval[lmdeploy]". Or use --model sdar, which needs none of this.'

STRATEGIES = ("low_confidence_dynamic", "low_confidence_static", "sequential")  # config.py: UnmaskingStrategy
DEVIATIONS: Mapping[str, str] = {
    # strategies/dllm/unmasking.py: UnmaskingProcessor.low_confidence_dynamic
    "low_confidence_dynamic": "confidences at the threshold count as above it; fewer of them than the step's quota: "
    "they and at least the most confident token, whatever denoising_steps says",
    # the same: _get_denoise_num
    "denoising_steps": "where they do not divide block_length, each step has the quota block_length // "
    "denoising_steps, so there are more steps",
    # the same: _get_scores, of the logits that FusedLogitsProcessor returns in the weights' dtype
    "confidence": "a token's probability before top_k and top_p; it and the threshold are rounded to the weights' "
    "dtype (bfloat16: 0.85 is 0.8516)",
    # engine/logits_process.py
    "sampling": "temperature, logits and probabilities are rounded to the weights' dtype before a token is drawn",
}


@dataclass(frozen=True)
class Installed:
    """The LMDeploy that is there: its version, and its commit where pip knows it."""

    version: str
    commit: str | None


def find_lmdeploy() -> Installed:
    """Find which LMDeploy is installed, without importing it.

    Raises:
        EngineError: it is missing or too old, or something that it needs is missing.
    """
    spec = importlib.util.find_spec("lmdeploy")
    folder = next((Path(place) for place in (spec.submodule_search_locations or ())), None) if spec else None
    installed = None if folder is None else _installed(folder)
    missing = [] if installed else ["LMDeploy"]
    if not _is_there("triton"):
        missing.append("triton")
    if torch.version.cuda is None:
        missing.append(f"a torch for CUDA (torch {torch.__version__} is not)")
    elif not torch.cuda.is_available():
        missing.append("a CUDA GPU")
    if missing:
        raise EngineError(f"--model sdar-lmdeploy lacks {', '.join(missing)}. {INSTALL}")
    assert installed is not None
    numbers = tuple(map(int, re.findall(r"\d+", installed.version)[:2]))
    if numbers < OLDEST:
        raise EngineError(
            f"LMDeploy {installed.version} is installed; {'.'.join(map(str, OLDEST))} or newer is needed. {INSTALL}"
        )
    if numbers > NEWEST:
        logger.warning(
            "LMDeploy %s is newer than %s, the newest that this was written for.",
            installed.version,
            ".".join(map(str, NEWEST)),
        )
    return installed


def executor_for(tensor_parallel_size: int) -> str:
    """Who runs the model: LMDeploy's own choice, ray for several GPUs, where it can; else processes of its own.

    It offers both for the GPUs of one machine (messages.py: PytorchEngineConfig.distributed_executor_backend), and
    calls its own processes, `mp`, deprecated.
    """
    if tensor_parallel_size == 1:
        return "uni"
    return "ray" if _is_there("ray") else "mp"


def _is_there(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _installed(folder: Path) -> Installed | None:
    """Version and commit, from what pip wrote, else from the package itself (a checkout on the path)."""
    own = folder / "version.py"
    match = re.search(r"""^__version__ = ['\"](.+)['\"]$""", own.read_text(), re.MULTILINE) if own.is_file() else None
    try:
        distribution = importlib.metadata.distribution("lmdeploy")
    except importlib.metadata.PackageNotFoundError:
        return Installed(match[1], None) if match else None
    origin = json.loads(distribution.read_text("direct_url.json") or "{}")
    return Installed(match[1] if match else distribution.version, origin.get("vcs_info", {}).get("commit_id"))
