"""What LMDeploy has to be told beside its public arguments; files are named as in requirements.py.

    import_lmdeploy()          no second process of the user's script, and lm_eval's log left as it is
    register_model_types()     a checkpoint's own mask token
    give_seeds(engine, ...)    draws that are a request's own
    Forwards(engine)           how many forwards each request took

Each works on an object or a register of LMDeploy's; none of its code is replaced by a copy.
"""

from __future__ import annotations

import collections
import contextlib
import importlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

# model_type of a checkpoint -> the one that LMDeploy is shown.
MODEL_TYPES = {"sdar": "sdar_lm_eval", "sdar_moe": "sdar_moe_lm_eval"}
_CACHED = 2  # consts.py: DLLM_CACHED, of a token whose keys and values are final
_ODD = 0x9E3779B1


@contextlib.contextmanager
def log_kept() -> Iterator[None]:
    """Undo what LMDeploy does to the root logger, whose handlers it tells to be silent below ERROR (utils.py)."""
    levels = {handler: handler.level for handler in logging.getLogger().handlers}
    try:
        yield
    finally:
        for handler, level in levels.items():
            handler.setLevel(level)
        logging.getLogger("lmdeploy").setLevel(logging.ERROR)


def import_lmdeploy() -> ModuleType:
    """LMDeploy's package.

    It checks its environment in a new process, which runs the script anew that was started (engine/engine_checker.py);
    requirements.py has checked by now, so it does not.
    """
    with log_kept():
        lmdeploy = importlib.import_module("lmdeploy")
        importlib.import_module("lmdeploy.pytorch.engine")
        envs: Any = importlib.import_module("lmdeploy.pytorch.envs")
    envs.enable_check_env = False
    return lmdeploy


def register_model_types() -> None:
    """Have LMDeploy take the mask token from config.json for the model types of ours.

    Its own builder takes 151669, SDAR-Chat's, for everybody's (configurations/sdar.py).
    """
    base: Any = importlib.import_module("lmdeploy.pytorch.configurations.builder").AutoModelConfigBuilder
    if hasattr(base, "_of_sdar_lm_eval"):
        return
    default = importlib.import_module("lmdeploy.pytorch.configurations.default").DefaultModelConfigBuilder

    class Builder(base):  # type: ignore[misc]
        @classmethod
        def condition(cls, hf_config: Any) -> bool:
            return hf_config.model_type in MODEL_TYPES.values()

        @classmethod
        def build(cls, hf_config: Any, model_path: str | None = None, **settings: Any) -> Any:
            config = default.build(hf_config, model_path, **settings)
            config.dllm_mask_token = hf_config.mask_token_id
            config.model_paradigm = "dllm"
            return config

    base._of_sdar_lm_eval = Builder


def give_seeds(engine: Any, block_length: int) -> None:
    """Have each place of each request's blocks drawn by random numbers of its own.

    strategies/dllm/sampling.py hands out the seeds of B requests over the B x L places of their blocks in the wrong
    order (s0 s1 s2 s0 s1 s2 ... in the place of s0 s0 s1 s1 ...): requests get each other's, several the same one, and
    what a request draws depends on its neighbours. Alone in a batch, all places of a block get the same number.
    """
    strategy = engine.sampling_strategy
    made = strategy.make_sampling_inputs

    def with_own_seeds(seqs: Any) -> Any:
        inputs = made(seqs)
        if inputs.random_seeds is not None:
            places = torch.arange(block_length) * _ODD
            seeds = torch.tensor([seq.sampling_param.random_seed & 0xFFFFFFFF for seq in seqs])
            offsets = torch.tensor([seq.num_valid_ids for seq in seqs])
            inputs.random_seeds = ((seeds[:, None] + places) & 0xFFFFFFFF).flatten()  # (B * L,)
            inputs.random_offsets = offsets.repeat_interleave(block_length)
        return inputs

    strategy.make_sampling_inputs = with_own_seeds


@dataclass
class Count:
    """Forwards of one request."""

    prefill: int = 0
    denoising: int = 0
    commit: int = 0


class Forwards:
    """Counts each session's forwards, of which LMDeploy says nothing: after each one it updates its sequences."""

    def __init__(self, engine: Any) -> None:
        self._counts: dict[int, Count] = collections.defaultdict(Count)
        strategy = engine.seq_strategy
        update = strategy.update_running

        def counted(running: Any, batched_outputs: Any, model_inputs: Any, **others: Any) -> None:
            mask = batched_outputs.extra_outputs.dllm_mask.view(len(running), -1)  # (B, L)
            prefill = model_inputs is not None and not model_inputs.is_decoding
            for seq, cached in zip(running, (mask == _CACHED).all(dim=1).tolist(), strict=True):
                if seq.status.name == "RUNNING":
                    count = self._counts[seq.session_id]
                    count.prefill += prefill
                    count.commit += cached and not prefill
                    count.denoising += not cached and not prefill
            update(running=running, batched_outputs=batched_outputs, model_inputs=model_inputs, **others)

        strategy.update_running = counted

    def take(self, session: int) -> Count:
        """A finished session's forwards."""
        return self._counts.pop(session, Count())
