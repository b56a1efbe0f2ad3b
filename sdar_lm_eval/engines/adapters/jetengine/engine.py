"""SDAR through JetEngine (github.com/Labman42/JetEngine), with what a careful user of it has to look after.

JetEngine is driven by the methods that its own `generate` is made of: `add_request` for each prompt, then `step` until
all are back. Unlike `generate` that hands each answer on as it finishes, lets requests of different lengths run side by
side, and shows a standstill (no page is free for any sequence) at once: what was under way then runs again, with half
as many sequences at a time.

Two versions are in use; versions.py finds the installed one and says where they differ.
"""

from __future__ import annotations

import dataclasses
import importlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from types import ModuleType

import torch

from sdar_lm_eval.checkpoint import Checkpoint
from sdar_lm_eval.engines.adapters.common import gpu_named, grouped, half_precision, listed, to_share, version_of
from sdar_lm_eval.engines.adapters.jetengine.checks import check, check_setup
from sdar_lm_eval.engines.adapters.jetengine.group import Alike, Counts, Group
from sdar_lm_eval.engines.adapters.jetengine.loading import Loaded, Setup, wanted_size
from sdar_lm_eval.engines.adapters.jetengine.memory import CAPTURED
from sdar_lm_eval.engines.adapters.jetengine.versions import INSTALL, find_jetengine
from sdar_lm_eval.engines.base import GenerationRequest, GenerationResult, Results, at_least_one, check_bool
from sdar_lm_eval.engines.runs import Closable, Failures, OneRun, environment, warm_up_requests
from sdar_lm_eval.engines.types import EngineInfo
from sdar_lm_eval.errors import EngineError

logger = logging.getLogger(__name__)


class JetEngine(Closable):
    """SDAR on JetEngine.

    The weights are loaded when the first requests are there, since JetEngine takes its memory once and for all.

    Args:
        checkpoint: the opened checkpoint.
        device: "cuda", "cuda:1", ... or "auto".
        dtype: "bfloat16" or "float16"; "auto" is the checkpoint's own where it is one of them, else bfloat16.
        max_active: sequences running at once, rounded down to one that has a CUDA graph; None: as many as fit, up to
            256.
        gpu_memory_utilization: the part of the GPU's memory that JetEngine may fill; None: what the requests need.
        tensor_parallel_size: GPUs that share the weights (0.1.0 only).
        enforce_eager: go without CUDA graphs.

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
        dialect, self._commit = find_jetengine()
        self._setup = Setup(
            dialect=dialect,
            checkpoint=checkpoint,
            config=checkpoint.full_config(),
            device=gpu_named(device, "JetEngine"),
            dtype=half_precision(dtype, checkpoint, "JetEngine"),
            tensor_parallel_size=at_least_one("tensor_parallel_size", tensor_parallel_size),
            gpu_memory_utilization=(
                None if gpu_memory_utilization is None else to_share("gpu_memory_utilization", gpu_memory_utilization)
            ),
            max_active=None if max_active is None else at_least_one("max_active", max_active),
            graphs=not check_bool("enforce_eager", enforce_eager) and dialect.graphs,
        )
        check_setup(self._setup)
        self._jetengine = _import_jetengine()
        self._one_run = OneRun("JetEngine")
        self._loaded: Loaded | None = None
        self._warm: set[Alike] = set()  # settings whose kernels are compiled
        self._may_split = True
        self._generator = torch.Generator(self._setup.device)
        self._counts = Counts()

    # What it says of itself

    @property
    def info(self) -> EngineInfo:
        """See `Engine.info`."""
        setup = self._setup
        return EngineInfo(
            engine="jetengine",
            engine_version=setup.dialect.version,
            engine_commit=self._commit,
            device=str(setup.device),
            dtype=setup.dtype,
            max_active=self._loaded.size.max_active if self._loaded else setup.max_active or CAPTURED[-1],
            deviations=setup.dialect.deviations,
            extra={
                "tensor_parallel_size": setup.tensor_parallel_size,
                "cuda_graphs": setup.graphs,
                **dataclasses.asdict(self._counts),
                "flash_attn_splits": self._may_split,
            },
            environment=environment(
                setup.device, {name: version_of(name) for name in ("flashinfer-python", "flash-attn")}
            ),
        )

    def peak_memory_bytes(self) -> int:
        """See `Engine.peak_memory_bytes`."""
        return torch.cuda.max_memory_allocated(self._setup.device)

    def prepare(self, requests: Sequence[GenerationRequest]) -> None:
        """See `Engine.prepare`: checks the requests, loads the weights, with memory for them, and warms up.

        JetEngine compiles at the first steps of a process, which takes up to a minute.
        """
        with self._one_run():
            check(requests, self._setup)
            if requests:
                of_length = next(iter(self._by_block_length(requests)))
                loaded = self._load([requests[i] for i in of_length])
                for alike, indices in self._alike(requests, of_length).items():
                    if alike not in self._warm:
                        self._warm_up(loaded, [requests[i] for i in indices])
                        self._warm.add(alike)

    def _warm_up(self, loaded: Loaded, requests: Sequence[GenerationRequest]) -> None:
        """Run short requests with the settings of these, and count none of their steps."""
        short = warm_up_requests(requests, min(loaded.size.max_active, len(requests)))
        for _ in self._group(loaded, short, range(len(short)), Counts()).run(Failures()):
            pass

    def _load(self, requests: Sequence[GenerationRequest]) -> Loaded:
        """JetEngine with room for these requests, which have one block length; made unless there is one already.

        Raises:
            UserError: one of them can never run.
        """
        size = wanted_size(self._setup, requests)
        loaded = self._loaded
        if loaded is None or not loaded.size.holds(size):
            if loaded is not None:
                logger.info("JetEngine is loaded once more: the next requests have other blocks, or need more room.")
                self._unload()
            loaded = self._loaded = Loaded(self._setup, self._jetengine, self._generator, size)
            self._may_split = loaded.may_split
        loaded.check_pages(requests)
        return loaded

    def _unload(self) -> None:
        loaded, self._loaded = self._loaded, None
        if loaded is not None:
            loaded.close()
        self._warm.clear()

    @staticmethod
    def _by_block_length(requests: Sequence[GenerationRequest]) -> Iterable[list[int]]:
        return grouped(range(len(requests)), lambda i: requests[i].decoding.block_length).values()

    @staticmethod
    def _alike(requests: Sequence[GenerationRequest], indices: Iterable[int]) -> dict[Alike, list[int]]:
        return grouped(indices, lambda i: Alike.of(requests[i].decoding))

    def _group(
        self, loaded: Loaded, requests: Sequence[GenerationRequest], indices: Sequence[int], counts: Counts
    ) -> Group:
        return Group(loaded, self._jetengine.SamplingParams, self._generator, requests, indices, counts)

    # Generation

    def generate(self, requests: Sequence[GenerationRequest]) -> Results[GenerationResult]:
        """See `Engine.generate`. Requests are started in the order given, those with like settings together."""
        with self._one_run():
            yield from self._generate(requests)

    def _generate(self, requests: Sequence[GenerationRequest]) -> Iterator[tuple[int, GenerationResult]]:
        check(requests, self._setup)
        failures, counts = Failures(), self._counts
        for of_length in self._by_block_length(requests):
            loaded = self._load([requests[i] for i in of_length])
            for indices in self._alike(requests, of_length).values():
                yield from self._group(loaded, requests, indices, counts).run(failures)
        if counts.mask_tokens_drawn:
            logger.warning(
                "JetEngine drew the mask token %d times; answers were made without it.", counts.mask_tokens_drawn
            )
        if self._setup.graphs and counts.steps_without_graph:
            logger.info(
                "%d of %d steps ran without a CUDA graph: JetEngine has them for %s, 32, 48, ... sequences.",
                counts.steps_without_graph,
                counts.steps,
                listed(CAPTURED[:5]),
            )
        failures.raise_if_any(len(requests))


def _import_jetengine() -> ModuleType:
    try:
        return importlib.import_module("jetengine")
    except Exception as error:
        raise EngineError(f"JetEngine cannot be imported: {type(error).__name__}: {error}. {INSTALL}") from error
