"""Which LMDeploy is installed, what is missing beside it, and where its rules differ from those of `DecodingConfig`.

Nothing here imports LMDeploy.
"""

from __future__ import annotations

import importlib.util
import logging
import re
from collections.abc import Mapping
from pathlib import Path

import torch

from sdar_lm_eval.engines.adapters.installed import Installed, check_nothing_is_missing, installed, is_there
from sdar_lm_eval.errors import EngineError

logger = logging.getLogger(__name__)

# The adapter was written from the sources of 0.16.0 (github.com/InternLM/lmdeploy, commit
# 1263d5cd889b7ad500e85b8eb20401327a4516ab) and of PyPI's 0.18.0. Where a comment cites a file below lmdeploy/pytorch,
# what it says holds in both.
OLDEST, NEWEST = (0, 16), (0, 18)
INSTALL = 'Install with: pip install "sdar-lm-eval[lmdeploy]". Or use --model sdar, which needs none of this.'

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


def find_lmdeploy() -> Installed:
    """Find which LMDeploy is installed, without importing it.

    Raises:
        EngineError: LMDeploy is missing or too old, or something that it needs is missing.
    """
    spec = importlib.util.find_spec("lmdeploy")
    folder = next((Path(place) for place in (spec.submodule_search_locations or ())), None) if spec else None
    found = None if folder is None else _version_in(folder)
    missing = [] if found else ["LMDeploy"]
    if not is_there("triton"):
        missing.append("triton")
    if torch.version.cuda is None:
        missing.append(f"a torch for CUDA (torch {torch.__version__} is not)")
    elif not torch.cuda.is_available():
        missing.append("a CUDA GPU")
    check_nothing_is_missing("sdar-lmdeploy", missing, INSTALL)
    assert found is not None
    numbers = tuple(map(int, re.findall(r"\d+", found.version)[:2]))
    if numbers < OLDEST:
        raise EngineError(
            f"LMDeploy {found.version} is installed; {'.'.join(map(str, OLDEST))} or newer is needed. {INSTALL}"
        )
    if numbers > NEWEST:
        logger.warning(
            "LMDeploy %s is newer than %s, the newest that this adapter was written for.",
            found.version,
            ".".join(map(str, NEWEST)),
        )
    return found


def executor_for(tensor_parallel_size: int) -> str:
    """Which executor of LMDeploy's runs the model: "uni" on one GPU; on several "ray" where installed, else "mp".

    LMDeploy has both for the GPUs of one machine (messages.py: PytorchEngineConfig.distributed_executor_backend).
    LMDeploy prefers ray, and calls "mp", worker processes of its own, deprecated.
    """
    if tensor_parallel_size == 1:
        return "uni"
    return "ray" if is_there("ray") else "mp"


def _version_in(folder: Path) -> Installed | None:
    """Version and commit: the version from the package itself, which may be a checkout; the rest from pip."""
    own = folder / "version.py"
    match = re.search(r"""^__version__ = ['\"](.+)['\"]$""", own.read_text(), re.MULTILINE) if own.is_file() else None
    pip = installed("lmdeploy")
    if match is None:
        return pip
    return Installed(match[1], pip.commit if pip else None)
