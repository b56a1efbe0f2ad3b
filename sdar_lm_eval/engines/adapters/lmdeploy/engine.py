"""SDAR through LMDeploy's PyTorch engine (github.com/InternLM/lmdeploy): several GPUs, and mixtures of experts.

LMDeploy's `pipeline` takes text, and adds stop tokens of its own. What lies below it takes and gives tokens; it is what
LMDeploy's own benchmarks use: `Engine`, an instance of it for each request that is under way, and `async_stream_infer`,
which yields a block at a time. The engine lives in an event loop of its own (loop.py).

How blocks are denoised is settled when the engine is made. So requests run in groups of like settings; for another
strategy, threshold, number of steps or block length it is made anew. Within a group, those that run together have the
same temperature, top_k, top_p and stop tokens: LMDeploy mixes these up among the requests of a batch
(strategies/dllm/sampling.py and model_agent.py; see `_together`).

Where a rule is LMDeploy's, the file below lmdeploy/pytorch that has it is named; requirements.py says which versions
were read.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

import torch

from sdar_lm_eval.checkpoint import Checkpoint
from sdar_lm_eval.engines.adapters.common import (
    Draw,
    check_requests,
    gpu_named,
    grouped,
    half_precision,
    stop_ids_of,
    to_share,
    version_of,
    world_size,
)
from sdar_lm_eval.engines.adapters.lmdeploy.checks import DECODES, check_checkpoint, check_gpus
from sdar_lm_eval.engines.adapters.lmdeploy.group import Group
from sdar_lm_eval.engines.adapters.lmdeploy.hooks import import_lmdeploy
from sdar_lm_eval.engines.adapters.lmdeploy.loading import MAX_ACTIVE, Fixed, Loaded, Setup, wanted_active
from sdar_lm_eval.engines.adapters.lmdeploy.requirements import DEVIATIONS, executor_for, find_lmdeploy
from sdar_lm_eval.engines.base import GenerationRequest, GenerationResult, Results, at_least_one
from sdar_lm_eval.engines.runs import Closable, Failures, OneRun, environment, warm_up_requests
from sdar_lm_eval.engines.types import EngineInfo
from sdar_lm_eval.errors import EngineError

logger = logging.getLogger(__name__)


class LMDeploy(Closable):
    """SDAR on LMDeploy.

    The weights are loaded when the first requests are there.

    Args:
        checkpoint: the opened checkpoint.
        device: "cuda", "cuda:1", ... or "auto".
        dtype: "bfloat16" or "float16"; "auto" is the checkpoint's own where it is one of them, else bfloat16.
        max_active: sequences running at once; None: as many as fit, up to 256.
        tensor_parallel_size: GPUs of this machine that share the weights.
        data_parallel_size: copies of the model, each with a part of the documents. They are the processes that
            `accelerate launch` starts, so this can only say how many there are.
        cache_max_entry_count: the part of the memory that the weights leave, for keys and values.

    Raises:
        UserError: LMDeploy cannot run this checkpoint, or not with these options; says what can.
        EngineError: LMDeploy, something that it needs, or a GPU is missing.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        device: str = "auto",
        dtype: str = "auto",
        max_active: int | None = None,
        tensor_parallel_size: int = 1,
        data_parallel_size: int = 1,
        cache_max_entry_count: float = 0.8,
    ) -> None:
        tensor_parallel_size = at_least_one("tensor_parallel_size", tensor_parallel_size)
        self._setup = Setup(
            installed=find_lmdeploy(),
            executor=executor_for(tensor_parallel_size),
            checkpoint=checkpoint,
            tensor_parallel_size=tensor_parallel_size,
            max_active=None if max_active is None else at_least_one("max_active", max_active),
            cache_share=to_share("cache_max_entry_count", cache_max_entry_count),
            device=gpu_named(device, "LMDeploy"),
            dtype=half_precision(dtype, checkpoint, "LMDeploy"),
        )
        data_parallel_size = at_least_one("data_parallel_size", data_parallel_size)
        check_gpus(checkpoint, device, tensor_parallel_size, data_parallel_size)
        check_checkpoint(checkpoint)
        try:
            self._lmdeploy = import_lmdeploy()
        except Exception as error:
            raise EngineError(
                f"LMDeploy {self._setup.installed.version} cannot be imported: {type(error).__name__}: {error}. "
                'Install what it lacks, with pip install "sdar-lm-eval[lmdeploy]", or use --model sdar.'
            ) from error
        self._one_run = OneRun("LMDeploy")
        self._loaded: Loaded | None = None
        self._warm: set[Draw] = set()  # whose kernels are compiled
        self._loads = 0

    # What it says of itself

    @property
    def info(self) -> EngineInfo:
        """See `Engine.info`."""
        setup, loaded = self._setup, self._loaded
        libraries = ("triton", "ray") if setup.executor == "ray" else ("triton",)
        return EngineInfo(
            engine="lmdeploy",
            engine_version=setup.installed.version,
            engine_commit=setup.installed.commit,
            device=str(setup.device),
            dtype=setup.dtype,
            max_active=(loaded.active if loaded is not None and not loaded.closed else setup.max_active or MAX_ACTIVE),
            deviations=DEVIATIONS,
            extra={
                "tensor_parallel_size": setup.tensor_parallel_size,
                "executor": setup.executor,
                "data_parallel_size": world_size(),
                "cache_max_entry_count": setup.cache_share,
                "loads": self._loads,
            },
            environment=environment(setup.device, {name: version_of(name) for name in libraries}),
        )

    def peak_memory_bytes(self) -> int:
        """See `Engine.peak_memory_bytes`; with several GPUs, what is in use on the first one (others allocate it)."""
        if self._setup.tensor_parallel_size > 1:
            free, total = torch.cuda.mem_get_info(self._setup.device)
            return total - free
        return torch.cuda.max_memory_allocated(self._setup.device)

    # Loading

    def prepare(self, requests: Sequence[GenerationRequest]) -> None:
        """See `Engine.prepare`: checks the requests, loads the weights and warms up, for the first settings."""
        with self._one_run():
            check_requests(requests, DECODES, self._setup.checkpoint)
            if requests:
                groups = self._groups(requests)
                fixed, indices = next(iter(groups.items()))
                loaded = self._load(fixed, requests, len(groups))
                loaded.check_room(requests)
                for together in self._together(requests, indices):
                    draw = Draw.of(requests[together[0]].decoding)
                    if draw not in self._warm:
                        short = warm_up_requests([requests[i] for i in together], min(loaded.active, len(together)))
                        for _ in Group(loaded, short, range(len(short))).run(Failures()):
                            pass
                        self._warm.add(draw)

    def _groups(self, requests: Sequence[GenerationRequest]) -> dict[Fixed, list[int]]:
        """Positions of requests by what the engine is made for; those first that it is made for now."""
        groups = grouped(range(len(requests)), lambda i: Fixed.of(requests[i].decoding))
        now = self._loaded.fixed if self._loaded is not None and not self._loaded.closed else None
        return dict(sorted(groups.items(), key=lambda group: group[0] != now))

    def _load(self, fixed: Fixed, requests: Sequence[GenerationRequest], groups: int) -> Loaded:
        """The engine for these settings, made unless it is there; `requests` are all of the run."""
        active = wanted_active(self._setup, fixed, len(requests))
        loaded = self._loaded
        if loaded is not None and not loaded.closed:
            if loaded.fixed == fixed and loaded.active >= active:
                return loaded
            why = "more of them run at once" if loaded.fixed == fixed else "they are decoded in another way"
            logger.info(
                "LMDeploy is loaded once more for the next requests: %s (%s). Its decoding settings hold for all that "
                "it runs; requests of this run have %d kind(s) of them.", why, fixed, groups,
            )  # fmt: skip
        self._unload()
        loaded = self._loaded = Loaded(self._setup, self._lmdeploy, fixed, active)
        self._loads += 1
        return loaded

    def _unload(self) -> None:
        loaded, self._loaded = self._loaded, None
        if loaded is not None:
            loaded.close()
        self._warm.clear()

    # Running

    def generate(self, requests: Sequence[GenerationRequest]) -> Results[GenerationResult]:
        """See `Engine.generate`. Requests with like settings run together."""
        with self._one_run():
            check_requests(requests, DECODES, self._setup.checkpoint)
            groups, failures = self._groups(requests), Failures()
            for fixed, indices in groups.items():
                loaded = self._load(fixed, requests, len(groups))
                loaded.check_room(requests)
                for together in self._together(requests, indices):
                    yield from Group(loaded, requests, together).run(failures)
            failures.raise_if_any(len(requests))

    def _together(self, requests: Sequence[GenerationRequest], indices: Sequence[int]) -> Iterable[list[int]]:
        """Positions of requests that may run at the same time.

        strategies/dllm/sampling.py gives request i's temperature, top_k and top_p to others of its batch. And where
        requests have different numbers of stop tokens, the shorter lists are filled up with -1, which is also what
        strategies/dllm/model_agent.py (_check_stopwords_dllm) makes of a prompt's tokens: they then end the answer.
        """

        def alike(index: int) -> tuple[Draw, frozenset[int]]:
            return Draw.of(requests[index].decoding), stop_ids_of(requests[index], self._setup.checkpoint)

        return grouped(indices, alike).values()
