"""SDAR through LMDeploy's PyTorch engine (github.com/InternLM/lmdeploy): several GPUs, and mixtures of experts.

LMDeploy's `pipeline` takes text, and adds stop tokens of its own. The adapter calls the layer below it, which takes and
returns tokens, as LMDeploy's own benchmarks do: `Engine`, an instance of it for each request under way, and
`async_stream_infer`, which yields a block at a time. The engine runs in an event loop of its own (loop.py).

How blocks are denoised is fixed when the engine is made: for another strategy, threshold, number of steps or block
length, the engine is made anew. Requests that run at the same time also have the same temperature, top_k, top_p and
stop tokens: LMDeploy mixes these up among the requests of a batch (see `_together`).

Where a rule is LMDeploy's, its file below lmdeploy/pytorch is named; versions.py says in which versions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch

from sdar_lm_eval.checkpoint import Checkpoint
from sdar_lm_eval.checks import at_least_one, if_given
from sdar_lm_eval.engines.adapters.adapter import Adapter
from sdar_lm_eval.engines.adapters.installed import import_errors, version_of
from sdar_lm_eval.engines.adapters.lmdeploy.checks import DECODES, check_checkpoint, check_gpus
from sdar_lm_eval.engines.adapters.lmdeploy.group import Group
from sdar_lm_eval.engines.adapters.lmdeploy.hooks import import_lmdeploy
from sdar_lm_eval.engines.adapters.lmdeploy.loading import MAX_ACTIVE, Fixed, Loaded, Setup, Size, wanted_active
from sdar_lm_eval.engines.adapters.lmdeploy.versions import DEVIATIONS, executor_for, find_lmdeploy
from sdar_lm_eval.engines.adapters.options import gpu_named, half_precision, to_share, world_size
from sdar_lm_eval.engines.adapters.requests import Draw, check_requests, grouped, stop_ids_of
from sdar_lm_eval.engines.runs import Failures, environment
from sdar_lm_eval.engines.types import EngineInfo, GenerationRequest, GenerationResult


class LMDeploy(Adapter[Loaded, Size]):
    """SDAR on LMDeploy.

    The weights are loaded when the first requests are there.

    Args:
        checkpoint: the opened checkpoint.
        device: "cuda", "cuda:1", ... or "auto".
        dtype: "bfloat16" or "float16"; "auto" is the checkpoint's own dtype if it is one of these, else bfloat16.
        max_active: most sequences at once; None: as many as fit, up to 256.
        tensor_parallel_size: GPUs of this machine that share the weights.
        data_parallel_size: copies of the model, each with a part of the documents. A copy is a process that `accelerate
            launch` started. A number other than 1 must be the number of these processes.
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
        super().__init__("LMDeploy", checkpoint)
        tensor_parallel_size = at_least_one("tensor_parallel_size", tensor_parallel_size)
        self.setup = Setup(
            installed=find_lmdeploy(),
            executor=executor_for(tensor_parallel_size),
            checkpoint=checkpoint,
            tensor_parallel_size=tensor_parallel_size,
            max_active=if_given(at_least_one, "max_active", max_active),
            cache_share=to_share("cache_max_entry_count", cache_max_entry_count),
            device=gpu_named(device, "LMDeploy"),
            dtype=half_precision(dtype, checkpoint, "LMDeploy"),
        )
        data_parallel_size = at_least_one("data_parallel_size", data_parallel_size)
        check_gpus(checkpoint, device, tensor_parallel_size, data_parallel_size)
        check_checkpoint(checkpoint)
        remedy = 'Install what it lacks, with pip install "sdar-lm-eval[lmdeploy]", or use --model sdar.'
        with import_errors(f"LMDeploy {self.setup.installed.version}", remedy):
            self.lmdeploy = import_lmdeploy()

    @property
    def info(self) -> EngineInfo:
        """See `Engine.info`."""
        setup, loaded = self.setup, self._in_memory
        libraries = ("triton", "ray") if setup.executor == "ray" else ("triton",)
        return EngineInfo(
            engine="lmdeploy",
            engine_version=setup.installed.version,
            engine_commit=setup.installed.commit,
            device=str(setup.device),
            dtype=setup.dtype,
            max_active=loaded.max_active if loaded else setup.max_active or MAX_ACTIVE,
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
        """See `Engine.peak_memory_bytes`; with several GPUs, memory in use now on the first (workers allocate it)."""
        if self.setup.tensor_parallel_size > 1:
            free, total = torch.cuda.mem_get_info(self.setup.device)
            return total - free
        return torch.cuda.max_memory_allocated(self.setup.device)

    def _check(self, requests: Sequence[GenerationRequest]) -> None:
        check_requests(requests, DECODES, self.setup.checkpoint)

    def _parts(self, requests: Sequence[GenerationRequest]) -> list[list[int]]:
        """The engine is made for one `Fixed`; requests that it is made for now come first."""
        groups = grouped(range(len(requests)), lambda i: Fixed.of(requests[i].decoding))
        now = self._in_memory.size.fixed if self._in_memory is not None else None
        return [indices for _, indices in sorted(groups.items(), key=lambda group: group[0] != now)]

    def _size_for(self, requests: Sequence[GenerationRequest], part: Sequence[int]) -> Size:
        """The settings of the part, with room for as many sequences as the whole run has."""
        fixed = Fixed.of(requests[part[0]].decoding)
        return Size(fixed, wanted_active(self.setup, fixed, len(requests)))

    def _why_not(self, loaded: Loaded, size: Size, requests: Sequence[GenerationRequest]) -> str:
        if loaded.size.fixed == size.fixed and loaded.max_active >= size.max_active:
            return ""
        why = "more of them run at once" if loaded.size.fixed == size.fixed else "they are decoded in another way"
        kinds = len({Fixed.of(request.decoding) for request in requests})
        return (
            f"{why} ({size.fixed}). Its decoding settings hold for all that it runs; requests of this run have {kinds} "
            "kind(s) of them"
        )

    def _open(self, size: Size) -> Loaded:
        return Loaded(self.setup, self.lmdeploy, size)

    def _check_room(self, loaded: Loaded, requests: Sequence[GenerationRequest], part: Sequence[int]) -> None:
        loaded.check_room(requests)

    def _together(self, requests: Sequence[GenerationRequest], part: Sequence[int]) -> Iterable[tuple[Draw, list[int]]]:
        """Requests with the same draw and stop tokens.

        strategies/dllm/sampling.py gives a request's temperature, top_k and top_p to other requests of its batch.
        Where requests have different numbers of stop tokens, LMDeploy pads the shorter lists with -1. It also writes -1
        over a prompt's tokens before it looks for stop tokens (strategies/dllm/model_agent.py: _check_stopwords_dllm),
        so that a prompt's tokens would end the answer.
        """

        def alike(index: int) -> tuple[Draw, frozenset[int]]:
            return Draw.of(requests[index].decoding), stop_ids_of(requests[index], self.setup.checkpoint)

        return [(draw, indices) for (draw, _), indices in grouped(part, alike).items()]

    def _run(
        self, loaded: Loaded, requests: Sequence[GenerationRequest], indices: Sequence[int], failures: Failures
    ) -> Iterator[tuple[int, GenerationResult]]:
        return Group(loaded, requests, indices).run(failures)
