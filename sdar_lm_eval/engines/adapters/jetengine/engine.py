"""SDAR through JetEngine (github.com/Labman42/JetEngine).

The adapter calls the methods that JetEngine's own `generate` is made of: `add_request` for each prompt, then `step`
until all answers are back. Compared with `generate`, each answer is handed on as it finishes, requests of different
lengths run side by side, and a standstill (no KV page is free for any sequence) shows at once: the sequences under way
then run again, half as many at a time.

Two versions of JetEngine are in use; versions.py finds the installed one and says where they differ.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Iterator, Sequence

import torch

from sdar_lm_eval.checkpoint import Checkpoint
from sdar_lm_eval.checks import at_least_one, check_bool, if_given
from sdar_lm_eval.engines.adapters.adapter import Adapter
from sdar_lm_eval.engines.adapters.installed import import_errors, version_of
from sdar_lm_eval.engines.adapters.jetengine import api
from sdar_lm_eval.engines.adapters.jetengine.checks import check, check_setup
from sdar_lm_eval.engines.adapters.jetengine.group import Alike, Group, StepCounts
from sdar_lm_eval.engines.adapters.jetengine.loading import Loaded, Setup, wanted_size
from sdar_lm_eval.engines.adapters.jetengine.memory import CAPTURED, Size
from sdar_lm_eval.engines.adapters.jetengine.versions import INSTALL, find_jetengine
from sdar_lm_eval.engines.adapters.options import gpu_named, half_precision, to_share
from sdar_lm_eval.engines.adapters.requests import grouped
from sdar_lm_eval.engines.runs import Failures, environment
from sdar_lm_eval.engines.types import EngineInfo, GenerationRequest, GenerationResult
from sdar_lm_eval.errors import listed

logger = logging.getLogger(__name__)


class JetEngine(Adapter[Loaded, Size]):
    """SDAR on JetEngine.

    The weights are loaded when the first requests are there: JetEngine takes its memory once, for all that it will run.

    Args:
        checkpoint: the opened checkpoint.
        device: "cuda", "cuda:1", ... or "auto".
        dtype: "bfloat16" or "float16"; "auto" is the checkpoint's own dtype if it is one of these, else bfloat16.
        max_active: most sequences at once, rounded down to a number that has a CUDA graph; None: as many as fit, up to
            256.
        gpu_memory_utilization: the part of the GPU's memory that JetEngine may fill; None: what the requests need.
        tensor_parallel_size: GPUs that share the weights (0.1.0 only).
        enforce_eager: run without CUDA graphs.

    Raises:
        UserError: JetEngine cannot run this checkpoint, or not with these options; says what can.
        EngineError: JetEngine, something that it needs, or a GPU is missing.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        device: str = "auto",
        dtype: str = "auto",
        max_active: int | None = None,
        gpu_memory_utilization: float | None = None,
        tensor_parallel_size: int = 1,
        enforce_eager: bool = False,
    ) -> None:
        super().__init__("JetEngine", checkpoint)
        dialect, self._commit = find_jetengine()
        self.setup = Setup(
            dialect=dialect,
            checkpoint=checkpoint,
            config=checkpoint.full_config(),
            device=gpu_named(device, "JetEngine"),
            dtype=half_precision(dtype, checkpoint, "JetEngine"),
            tensor_parallel_size=at_least_one("tensor_parallel_size", tensor_parallel_size),
            gpu_memory_utilization=if_given(to_share, "gpu_memory_utilization", gpu_memory_utilization),
            max_active=if_given(at_least_one, "max_active", max_active),
            graphs=not check_bool("enforce_eager", enforce_eager) and dialect.graphs,
        )
        check_setup(self.setup)
        with import_errors("JetEngine", INSTALL):
            self.jetengine = api.package()
        self._may_split = True
        self._generator = torch.Generator(self.setup.device)
        self._counts = StepCounts()

    @property
    def info(self) -> EngineInfo:
        """See `Engine.info`."""
        setup, loaded = self.setup, self._in_memory
        return EngineInfo(
            engine="jetengine",
            engine_version=setup.dialect.version,
            engine_commit=self._commit,
            device=str(setup.device),
            dtype=setup.dtype,
            max_active=loaded.max_active if loaded else setup.max_active or CAPTURED[-1],
            deviations=setup.dialect.deviations,
            extra={
                "tensor_parallel_size": setup.tensor_parallel_size,
                "cuda_graphs": setup.graphs,
                **dataclasses.asdict(self._counts),
                "flash_attn_splits": self._may_split,
            },
            counted=tuple(dataclasses.asdict(self._counts)),
            environment=environment(
                setup.device, {name: version_of(name) for name in ("flashinfer-python", "flash-attn")}
            ),
        )

    def peak_memory_bytes(self) -> int:
        """See `Engine.peak_memory_bytes`."""
        return torch.cuda.max_memory_allocated(self.setup.device)

    def _check(self, requests: Sequence[GenerationRequest]) -> None:
        check(requests, self.setup)

    def _parts(self, requests: Sequence[GenerationRequest]) -> list[list[int]]:
        """JetEngine is made for one block length."""
        return list(grouped(range(len(requests)), lambda i: requests[i].decoding.block_length).values())

    def _size_for(self, requests: Sequence[GenerationRequest], part: Sequence[int]) -> Size:
        return wanted_size(self.setup, [requests[i] for i in part])

    def _why_not(self, loaded: Loaded, size: Size, requests: Sequence[GenerationRequest]) -> str:
        return "" if loaded.size.holds(size) else "they have another block length, or need more room"

    def _open(self, size: Size) -> Loaded:
        loaded = Loaded(self.setup, self.jetengine, self._generator, size)
        self._may_split = loaded.may_split
        return loaded

    def _check_room(self, loaded: Loaded, requests: Sequence[GenerationRequest], part: Sequence[int]) -> None:
        loaded.check_room([requests[i] for i in part])

    def _together(
        self, requests: Sequence[GenerationRequest], part: Sequence[int]
    ) -> Iterable[tuple[Alike, list[int]]]:
        return grouped(part, lambda i: Alike.of(requests[i].decoding)).items()

    def _warm_up(self, loaded: Loaded, requests: Sequence[GenerationRequest]) -> None:
        """Warm up, and count none of these steps. JetEngine compiles for up to a minute."""
        counts, self._counts = self._counts, StepCounts()
        try:
            super()._warm_up(loaded, requests)
        finally:
            self._counts = counts

    def _run(
        self, loaded: Loaded, requests: Sequence[GenerationRequest], indices: Sequence[int], failures: Failures
    ) -> Iterator[tuple[int, GenerationResult]]:
        return Group(loaded, requests, indices, self._counts).run(failures)

    def _generate(
        self, requests: Sequence[GenerationRequest], failures: Failures
    ) -> Iterator[tuple[int, GenerationResult]]:
        yield from super()._generate(requests, failures)
        counts = self._counts
        if counts.mask_tokens_drawn:
            logger.warning(
                "JetEngine drew the mask token %d times; answers were made without it.", counts.mask_tokens_drawn
            )
        if self.setup.graphs and counts.steps_without_graph:
            logger.info(
                "%d of %d steps ran without a CUDA graph: JetEngine has them for %s, 32, 48, ... sequences.",
                counts.steps_without_graph,
                counts.steps,
                listed(CAPTURED[:5]),
            )
