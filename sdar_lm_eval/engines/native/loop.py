"""The loop of a run: schedule -> launch -> settle, step after step, until every sequence is finished."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from sdar_lm_eval.ending import CLOSE, Ending
from sdar_lm_eval.engines.native.batch import StepOutcome
from sdar_lm_eval.engines.native.runner import Runner
from sdar_lm_eval.engines.native.scheduler import Scheduler, SequenceState
from sdar_lm_eval.engines.runs import is_out_of_memory
from sdar_lm_eval.engines.types import BlockStep, GenerationResult, Watch
from sdar_lm_eval.errors import EngineError

logger = logging.getLogger(__name__)

Finished = tuple[int, GenerationResult]
"""A request's index, and its result."""


class Occupant(NamedTuple):
    """The sequence that a slot held when a step was launched, and the sequence's epoch then."""

    sequence: SequenceState
    epoch: int


class Loop:
    """Runs sequences until they are finished.

    On a GPU the next step is launched before the step in flight is done. The device knows which sequences are finished,
    except by a stop string or a loop (`GenerationRequest.repetition`): the host finds both one step late. Such a
    sequence runs one more step, whose result is discarded.

    Args:
        scheduler: plans the steps.
        runner: runs the steps; it has memory for the scheduler's sequences.
        decode: token ids to text, for stop strings.
        in_flight: most steps that are launched and not collected.
        watch: called with each sequence's block after each of its steps, when the step is collected; None: nobody
            watches.

    Attributes:
        suspects: indices of sequences whose logits are not finite; they have no result.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        decode: Callable[[Sequence[int]], str],
        in_flight: int,
        watch: Watch | None = None,
    ) -> None:
        self._scheduler, self._runner, self._decode = scheduler, runner, decode
        self._most_in_flight, self._watch = in_flight, watch
        self._in_flight: deque[dict[int, Occupant]] = deque()  # for each step: slot -> occupant
        self._any_settled = False
        self._endings: dict[int, Ending] = {}  # index of a sequence whose answer is begun -> its tokens so far
        self._finished: list[Finished] = []
        self.suspects: list[int] = []

    def run(self) -> Iterator[Finished]:
        """Yield each result once its sequence is finished.

        Raises:
            EngineError: memory does not suffice for one sequence.
        """
        while self._scheduler.unfinished:
            try:
                scheduled = self._schedule()
                launched = self._launch()
            except BaseException as error:
                yield from self._yield_finished()
                if not is_out_of_memory(error):
                    raise
                self._make_room(error)
                continue
            # The GPU runs the step that was just launched while the caller handles these results.
            yield from self._yield_finished()
            if not (scheduled or launched or self._in_flight):
                raise EngineError(
                    f"the engine stands still with {len(self._scheduler.running)} unfinished sequences: this should "
                    "never happen. Finished answers are kept (--use_cache); run again with a smaller max_active."
                )
            # A forecast needs the outcome of an earlier step, so the first step is in flight alone.
            most_in_flight = self._most_in_flight if self._any_settled else 1
            if self._in_flight and (not launched or len(self._in_flight) == most_in_flight):
                self._settle()
            if self._most_in_flight == 1:
                yield from self._yield_finished()
        yield from self._yield_finished()

    def _yield_finished(self) -> Iterator[Finished]:
        finished, self._finished = self._finished, []
        yield from finished

    def _schedule(self) -> bool:
        """Carry out one plan of the scheduler; return whether it prefilled or started a sequence."""
        plan = self._scheduler.plan()
        self._runner.stop(plan.vacated)
        self._runner.set_pages(plan.paged)
        if plan.prefill:
            now = time.perf_counter()
            self._runner.prefill(plan.prefill)
            for sequence, _, end in plan.prefill:
                self._scheduler.prefilled(sequence, end)
                sequence.prefill_forwards += 1
                sequence.started_at = sequence.started_at or now
        self._runner.begin(plan.starting)
        for sequence in plan.starting:
            sequence.in_batch = True
            sequence.started_at = sequence.started_at or time.perf_counter()
        return bool(plan.prefill or plan.starting)

    def _launch(self) -> bool:
        """Launch a step; return whether there was anything to run."""
        running = self._scheduler.running
        # With a step in flight, the device may have begun the block after the one that the host knows of.
        blocks = self._most_in_flight
        context = max((min(s.block_start + blocks * s.block_length, s.longest) for s in running), default=0)
        if not running or not self._runner.launch(context):
            return False
        self._in_flight.append({sequence.slot: Occupant(sequence, sequence.epoch) for sequence in running})
        return True

    def _settle(self) -> None:
        """Collect the oldest step in flight, and update its sequences."""
        outcome, occupants = self._runner.collect(), self._in_flight.popleft()
        self._any_settled = True
        any_stuck = outcome.stuck.any()
        for slot in outcome.took_part.nonzero()[0].tolist():
            sequence, epoch = occupants[slot]
            if sequence.epoch != epoch:
                continue  # the sequence has left the slot since
            if any_stuck and outcome.stuck[slot]:
                self.suspects.append(sequence.index)
                self._runner.cache.clear(self._scheduler.discard(sequence))
                continue
            sequence.denoising_forwards += 1
            sequence.commit_forwards += int(outcome.committed[slot])
            start = sequence.num_new_tokens
            reason = self._decide(sequence, outcome) if outcome.decided[slot] else ""
            if self._watch is not None:
                self._watch(_block_step(sequence, slot, start, outcome, reason))
            if outcome.decided[slot]:
                sequence.steps_before = 0
            if reason == CLOSE:
                self._close_thought(sequence, start, outcome.unmasked_at[slot])
            elif reason:
                device_knows = not (sequence.request.stop_strings or sequence.request.repetition)
                self._scheduler.finish(sequence, device_knows=device_knows)
                self._finished.append((sequence.index, _result(sequence, reason)))
                del self._endings[sequence.index]

    def _decide(self, sequence: SequenceState, outcome: StepOutcome) -> str:
        """Append the new tokens of a decided block; return why the answer or its thought ends in it, or ""."""
        slot, first = sequence.slot, len(sequence.tokens) - sequence.block_start
        new = outcome.tokens[slot, first : sequence.block_length].tolist()
        if sequence.index not in self._endings:
            self._endings[sequence.index] = Ending(sequence.request, self._decode)
        count, reason = self._endings[sequence.index].add(new)
        sequence.decide(new[:count])
        if sequence.request.record_steps:
            steps = outcome.unmasked_at[slot, first : first + count] + sequence.steps_before
            sequence.unmasked_at += steps.tolist()
            sequence.confidences += outcome.confidence[slot, first : first + count].tolist()
        return reason

    def _close_thought(self, sequence: SequenceState, start: int, unmasked_at: NDArray[np.int32]) -> None:
        """Insert the think end behind the decided tokens; the answer goes on behind the think end.

        Args:
            sequence: the sequence, whose last block was decided, and kept up to the thought's limit.
            start: number of new tokens before the kept ones of that block.
            unmasked_at: (L,), the step that unmasked each token of that block, without `steps_before`.
        """
        request, length, end = sequence.request, sequence.block_length, len(sequence.tokens)
        assert request.thinking is not None
        forced = list(request.thinking.end_ids)
        first = (len(request.prompt_ids) + start) % length
        step = 1 + int(unmasked_at[first : first + sequence.num_new_tokens - start].max())
        # In the next block, if the think end reaches into it, it is what comes first.
        steps = [step if (end + i) // length == (end - 1) // length else 0 for i in range(len(forced))]
        if request.record_steps:
            sequence.unmasked_at += steps
            sequence.confidences += [1.0] * len(forced)
        if self._watch is not None:
            told = tuple(forced), tuple(steps), (1.0,) * len(forced)
            self._watch(BlockStep(sequence.index, sequence.num_new_tokens, *told, decided=True, finished=False))
        self._scheduler.insert(sequence, forced)
        sequence.forced_tokens += len(forced)
        sequence.steps_before = steps[-1] + 1 if len(sequence.tokens) % length else 0

    def _make_room(self, error: BaseException) -> None:
        """After an out-of-memory error, halve the running sequences and the prefill of a step for a while.

        Raises:
            EngineError: both limits are at their minimum already.
        """
        scheduler, runner = self._scheduler, self._runner
        running = len(scheduler.running)
        if not scheduler.can_shrink:
            raise runner.out_of_memory() from error
        scheduler.shrink()
        if runner.device.type == "cuda":
            torch.cuda.empty_cache()
        try:
            # The failed plan may have been carried out in part.
            runner.run_only(scheduler.running)
        except Exception as again:
            if not is_out_of_memory(again):
                raise
            raise runner.out_of_memory() from again
        logger.warning(
            "Out of memory on %s with %d sequences at once; %d go on, with half the prompt tokens a step. More are "
            "tried again later. Answers are the same.",
            runner.device,
            running,
            len(scheduler.running),
        )


def _block_step(sequence: SequenceState, slot: int, start: int, outcome: StepOutcome, reason: str) -> BlockStep:
    """What a step made of a sequence's block; `start` is the number of new tokens before the block."""
    decided = bool(outcome.decided[slot])
    first = (len(sequence.request.prompt_ids) + start) % sequence.block_length
    end = first + sequence.num_new_tokens - start if decided else sequence.block_length
    steps = outcome.unmasked_at[slot, first:end]
    return BlockStep(
        index=sequence.index,
        start=start,
        token_ids=tuple(outcome.tokens[slot, first:end].tolist()),
        unmasked_at=tuple(np.where(steps < 0, steps, steps + sequence.steps_before).tolist()),
        confidences=tuple(outcome.confidence[slot, first:end].tolist()),
        decided=decided,
        finished=reason not in ("", CLOSE),
    )


def _result(sequence: SequenceState, reason: str) -> GenerationResult:
    assert sequence.started_at is not None
    recorded = sequence.request.record_steps
    return GenerationResult(
        token_ids=tuple(sequence.tokens[len(sequence.request.prompt_ids) :]),
        finish_reason=reason,
        prefill_forwards=sequence.prefill_forwards,
        denoising_forwards=sequence.denoising_forwards,
        commit_forwards=sequence.commit_forwards,
        seconds=time.perf_counter() - sequence.started_at,
        unmasked_at=tuple(sequence.unmasked_at) if recorded else None,
        confidences=tuple(sequence.confidences) if recorded else None,
        forced_tokens=sequence.forced_tokens,
    )
