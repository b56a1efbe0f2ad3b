"""What LMDeploy needs beside its public arguments; files are named as in versions.py.

    import_lmdeploy()          imports it without a second process of the user's script, and leaves lm_eval's log alone
    register_model_types()     has it take a checkpoint's own mask token
    give_seeds(engine, ...)    has each request draw by its own random numbers
    Forwards(engine)           counts how many forwards each request took

Each function changes an object or a registry of LMDeploy's; none replaces its code by a copy.
"""

from __future__ import annotations

import collections
import contextlib
import importlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from sdar_lm_eval.engines.adapters.lmdeploy import api

# A checkpoint's model_type -> the model_type that LMDeploy is given.
MODEL_TYPES = {"sdar": "sdar_lm_eval", "sdar_moe": "sdar_moe_lm_eval"}
_CACHED = 2  # consts.py: DLLM_CACHED, the state of a token whose keys and values are final
_ODD = 0x9E3779B1  # 2**32 / golden ratio: multiples of it are far apart modulo 2**32


@contextlib.contextmanager
def log_kept() -> Iterator[None]:
    """Undo what LMDeploy does to the root logger's handlers: it silences them below ERROR (utils.py)."""
    levels = {handler: handler.level for handler in logging.getLogger().handlers}
    try:
        yield
    finally:
        for handler, level in levels.items():
            handler.setLevel(level)
        logging.getLogger("lmdeploy").setLevel(logging.ERROR)


def import_lmdeploy() -> api.Package:
    """Import LMDeploy, without its check of the environment.

    That check runs in a new process, which would run the user's script a second time (engine/engine_checker.py).
    versions.py has checked the environment by now.
    """
    with log_kept():
        lmdeploy = api.package()
        api.engine_module()
        envs = api.envs_module()
    envs.enable_check_env = False
    return lmdeploy


def register_model_types() -> None:
    """Have LMDeploy take the mask token from config.json, for the model types of `MODEL_TYPES`.

    LMDeploy's own builder takes SDAR-Chat's mask token, 151669, for every checkpoint (configurations/sdar.py).
    """
    base = importlib.import_module("lmdeploy.pytorch.configurations.builder").AutoModelConfigBuilder
    if hasattr(base, "_of_sdar_lm_eval"):
        return
    default = api.default_builder()

    def condition(_: type, /, hf_config: api.HFConfig) -> bool:
        return hf_config.model_type in MODEL_TYPES.values()

    def build(
        _: type, /, hf_config: api.HFConfig, model_path: str | None = None, **settings: object
    ) -> api.ModelConfig:
        config = default.build(hf_config, model_path, **settings)
        config.dllm_mask_token = hf_config.mask_token_id
        config.model_paradigm = "dllm"
        return config

    # A subclass registers itself.
    methods = {"condition": classmethod(condition), "build": classmethod(build)}
    base._of_sdar_lm_eval = type("SDARBuilder", (base,), methods)


def give_seeds(engine: api.Engine, block_length: int) -> None:
    """Have each position of each request's block drawn by a random number of its own.

    strategies/dllm/sampling.py spreads the seeds of B requests over the B x L positions of their blocks in the wrong
    order (s0 s1 s2 s0 s1 s2 ... in the place of s0 s0 s1 s1 ...). Requests get each other's seeds, so that what a
    request draws depends on its neighbours. Of a request alone in a batch, all positions get the same random number.
    """
    strategy = engine.sampling_strategy
    made = strategy.make_sampling_inputs

    def with_own_seeds(seqs: Sequence[api.Request]) -> api.SamplingInputs:
        inputs = made(seqs)
        if inputs.random_seeds is not None:
            positions = torch.arange(block_length) * _ODD
            seeds = torch.tensor([seq.sampling_param.random_seed & 0xFFFFFFFF for seq in seqs])
            offsets = torch.tensor([seq.num_valid_ids for seq in seqs])
            inputs.random_seeds = ((seeds[:, None] + positions) & 0xFFFFFFFF).flatten()  # (B * L,)
            inputs.random_offsets = offsets.repeat_interleave(block_length)
        return inputs

    strategy.make_sampling_inputs = with_own_seeds


@dataclass
class ForwardCounts:
    """Forwards of one request."""

    prefill: int = 0
    denoising: int = 0
    commit: int = 0


class Forwards:
    """Counts each session's forwards, where LMDeploy updates its requests after a forward."""

    def __init__(self, engine: api.Engine) -> None:
        self._counts: dict[int, ForwardCounts] = collections.defaultdict(ForwardCounts)
        strategy = engine.seq_strategy
        update = strategy.update_running

        def counted(
            running: Sequence[api.Request],
            batched_outputs: api.BatchedOutputs,
            model_inputs: api.ModelInputs | None,
            **others: object,
        ) -> None:
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

    def take(self, session: int) -> ForwardCounts:
        """Return a finished session's forwards, and forget them."""
        return self._counts.pop(session, ForwardCounts())
