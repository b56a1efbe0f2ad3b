"""A stand-in for LMDeploy 0.18.0: what the adapter uses of it, on the CPU and in float32.

Here are its public classes; pytorch/engine has its engine for block diffusion, with LMDeploy's rules and its faults.

Compared with LMDeploy itself: the stand-in does what the sources of 0.18.0 (PyPI) and 0.16.0 (commit 1263d5c) say. With
0.18.0 on an H100 the adapter's answers to the demo's 200 problems end in the native engine's numbers for 195 (static),
198 (sequential) and 196 (dynamic) of them (docs/measurements.md). On 2026-11-28 and 2026-11-29
tests/gpu/test_lmdeploy.py ran with 0.18.0 on an H200 (torch 2.11, transformers 5.17): its first part only, because of a
time limit. No run with 0.16.0 is recorded.

To compare again, on a GPU, where LMDeploy is installed (pip install "sdar-lm-eval[lmdeploy]"):

    python -m pytest tests/gpu/test_lmdeploy.py -s

That asks the real engine most of what tests/engines/adapters/lmdeploy/test_lmdeploy_adapter.py asks the stand-in.
"""

from __future__ import annotations

import dataclasses
import logging

from .version import __version__ as __version__

for _handler in logging.getLogger().handlers:
    _handler.setLevel(logging.ERROR)
logging.getLogger("lmdeploy").setLevel(logging.WARNING)


@dataclasses.dataclass
class GenerationConfig:
    max_new_tokens: int = 512
    do_sample: bool = False
    top_p: float = 1.0
    top_k: int = 50
    min_p: float = 0.0
    temperature: float = 0.8
    repetition_penalty: float = 1.0
    ignore_eos: bool = False
    random_seed: int | None = None
    stop_token_ids: list[int] | None = None
    bad_token_ids: list[int] | None = None
    min_new_tokens: int | None = None

    def __post_init__(self) -> None:
        assert 0 <= self.top_p <= 1
        assert self.top_k >= 0
        assert 0 <= self.temperature <= 2


@dataclasses.dataclass
class PytorchEngineConfig:
    dtype: str = "auto"
    tp: int = 1
    dp: int = 1
    session_len: int | None = None
    max_batch_size: int | None = None
    cache_max_entry_count: float = 0.8
    block_size: int = 64
    max_prefill_token_num: int = 8192
    eager_mode: bool = False
    enable_metrics: bool = True
    distributed_executor_backend: str | None = None
    dllm_block_length: int | None = None
    dllm_unmasking_strategy: str = "low_confidence_dynamic"
    dllm_denoising_steps: int | None = None
    dllm_confidence_threshold: float = 0.85

    def __post_init__(self) -> None:
        assert self.dtype in ("auto", "float16", "bfloat16")
        assert 0 < self.cache_max_entry_count < 1
        assert self.dllm_unmasking_strategy in ("low_confidence_dynamic", "low_confidence_static", "sequential")
