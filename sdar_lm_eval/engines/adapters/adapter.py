"""What every adapter does with the requests of a run.

    requests of a run
      _check              refuses them, before any of them runs
      _parts              which of them one loaded engine can run; a part after the other
        _size_for         what an engine has to be loaded with to run a part
        _load             the engine in memory, if it has that size; else a new one
        _together         which of a part may run at the same time
          _run            runs these
    an answer that goes on after a part of it is asked for once more, with the part's tokens behind the prompt (`Parts`)
    (position, result) of each request as it finishes; at the end one error that names the requests without an answer

`prepare` does the same with the first part, but runs short requests in the place of the user's: once for each kind of
settings that kernels are compiled for. Positions are those in the requests of the run.
"""

from __future__ import annotations

import abc
import logging
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Generic, Protocol, TypeVar

from sdar_lm_eval.checkpoint import Checkpoint
from sdar_lm_eval.engines.adapters.requests import Parts
from sdar_lm_eval.engines.runs import Closable, Failures, OneRun, check_tokens, warm_up_requests
from sdar_lm_eval.engines.types import GenerationRequest, GenerationResult, Results

logger = logging.getLogger(__name__)


class Loaded(Protocol):
    """An engine in memory."""

    @property
    def closed(self) -> bool:
        """Whether the engine has ended."""

    @property
    def max_active(self) -> int:
        """Most sequences that run at once."""

    def close(self) -> None:
        """End the engine and give its memory back."""


LoadedEngine = TypeVar("LoadedEngine", bound=Loaded)
Size = TypeVar("Size")


class Adapter(Closable, abc.ABC, Generic[LoadedEngine, Size]):
    """An engine of another package, which is loaded when the first requests are there.

    Args:
        name: the engine's, in messages.
        checkpoint: the opened checkpoint.
    """

    def __init__(self, name: str, checkpoint: Checkpoint) -> None:
        self._name, self._checkpoint = name, checkpoint
        self._one_run = OneRun(name)
        self.loaded: LoadedEngine | None = None
        self._loads = 0
        self._warm: set[Hashable] = set()  # settings whose kernels are compiled

    # Each adapter's own

    @abc.abstractmethod
    def _check(self, requests: Sequence[GenerationRequest]) -> None:
        """Refuse requests that would be answered wrongly.

        Raises:
            UserError: some request would be.
        """

    @abc.abstractmethod
    def _parts(self, requests: Sequence[GenerationRequest]) -> Sequence[list[int]]:
        """Positions of the requests that one loaded engine can run, part after part."""

    @abc.abstractmethod
    def _size_for(self, requests: Sequence[GenerationRequest], part: Sequence[int]) -> Size:
        """What the engine has to be loaded with to run a part of these requests."""

    @abc.abstractmethod
    def _why_not(self, loaded: LoadedEngine, size: Size, requests: Sequence[GenerationRequest]) -> str:
        """Why the loaded engine cannot run requests of this size, for the log; "" where it can."""

    @abc.abstractmethod
    def _open(self, size: Size) -> LoadedEngine:
        """Load the engine.

        Raises:
            UserError: the memory does not hold the engine.
            EngineError: the engine did not start.
        """

    @abc.abstractmethod
    def _check_room(self, loaded: LoadedEngine, requests: Sequence[GenerationRequest], part: Sequence[int]) -> None:
        """Refuse requests that the loaded engine has no room for.

        Raises:
            UserError: some request has no room.
        """

    @abc.abstractmethod
    def _together(
        self, requests: Sequence[GenerationRequest], part: Sequence[int]
    ) -> Iterable[tuple[Hashable, list[int]]]:
        """Groups of a part: the settings that kernels are compiled for, positions that may run at the same time."""

    @abc.abstractmethod
    def _run(
        self,
        loaded: LoadedEngine,
        requests: Sequence[GenerationRequest],
        indices: Sequence[int],
        failures: Failures,
    ) -> Iterator[tuple[int, GenerationResult]]:
        """Run the requests at these positions at the same time; yield each result as it is there."""

    # What is the same

    @property
    def _in_memory(self) -> LoadedEngine | None:
        """The loaded engine, unless it has ended."""
        return None if self.loaded is None or self.loaded.closed else self.loaded

    def prepare(self, requests: Sequence[GenerationRequest]) -> None:
        """See `Engine.prepare`: checks the requests, then loads and warms up the engine for the first part of them."""
        with self._one_run():
            check_tokens((request.prompt_ids for request in requests), self._checkpoint)
            self._check(requests)
            if requests:
                part = self._parts(requests)[0]
                loaded = self._load(requests, part)
                for settings, indices in self._together(requests, part):
                    if settings not in self._warm:
                        self._warm_up(loaded, [requests[i] for i in indices])
                        self._warm.add(settings)

    def generate(self, requests: Sequence[GenerationRequest]) -> Results[GenerationResult]:
        """See `Engine.generate`. Requests with like settings run together."""
        with self._one_run():
            check_tokens((request.prompt_ids for request in requests), self._checkpoint)
            self._check(requests)
            failures = Failures()
            yield from self._generate(requests, failures)
            failures.raise_if_any(len(requests))

    def _generate(
        self, requests: Sequence[GenerationRequest], failures: Failures
    ) -> Iterator[tuple[int, GenerationResult]]:
        answers = {i: Parts(r, self._checkpoint) for i, r in enumerate(requests) if r.thinking is not None}
        asked = [answers[i].next if i in answers else request for i, request in enumerate(requests)]
        open_answers = set(range(len(requests)))
        while open_answers:
            going_on: dict[int, GenerationRequest] = {}
            for part in self._parts(requests):
                now = [index for index in part if index in open_answers]
                if not now:
                    continue
                # The whole answers decide the size: a later part has no more tokens than they.
                loaded = self._load(requests, now)
                for _, indices in self._together(asked, now):
                    for index, result in self._run(loaded, asked, indices, failures):
                        whole = answers[index].add(result) if index in answers else result
                        if whole is not None:
                            yield index, whole
                        else:
                            going_on[index] = answers[index].next
            open_answers = set(going_on)
            asked = [going_on.get(index, request) for index, request in enumerate(asked)]

    def _load(self, requests: Sequence[GenerationRequest], part: Sequence[int]) -> LoadedEngine:
        """The engine with room for a part of these requests; loaded anew unless the one in memory has it."""
        size = self._size_for(requests, part)
        loaded = self._in_memory
        why = "" if loaded is None else self._why_not(loaded, size, requests)
        if why:
            logger.info("%s is loaded once more for the next requests: %s.", self._name, why)
        if loaded is None or why:
            self._unload()
            loaded = self.loaded = self._open(size)
            self._loads += 1
        self._check_room(loaded, requests, part)
        return loaded

    def _warm_up(self, loaded: LoadedEngine, requests: Sequence[GenerationRequest]) -> None:
        """Run short requests with the settings of these, so that compiling kernels does not count as generation."""
        short = warm_up_requests(requests, min(loaded.max_active, len(requests)))
        for _ in self._run(loaded, short, range(len(short)), Failures()):
            pass

    def _unload(self) -> None:
        loaded, self.loaded = self._in_memory, None
        if loaded is not None:
            loaded.close()
        self._warm.clear()
