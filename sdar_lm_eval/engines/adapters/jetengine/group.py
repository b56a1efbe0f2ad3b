"""Requests with like settings on JetEngine, step after step."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from sdar_lm_eval.decoding import DecodingConfig
from sdar_lm_eval.engines.adapters.jetengine.hooks import prints_to_log, tail_of
from sdar_lm_eval.engines.adapters.jetengine.loading import Loaded
from sdar_lm_eval.engines.adapters.jetengine.memory import CAPTURED, PREFILL_TOKENS, captured
from sdar_lm_eval.engines.adapters.requests import Draw, NoAnswerError, answer_end, stop_ids_of
from sdar_lm_eval.engines.runs import Allowance, Failures, is_out_of_memory
from sdar_lm_eval.engines.types import GenerationRequest, GenerationResult
from sdar_lm_eval.errors import EngineError

logger = logging.getLogger(__name__)

IDLE_STEPS = 4  # steps without progress that are a standstill; else every second step makes progress, or more


@dataclass
class StepCounts:
    """What happened in the steps of an engine's runs; the results file has these counts."""

    steps: int = 0
    steps_without_graph: int = 0
    standstills: int = 0
    mask_tokens_drawn: int = 0


@dataclass(frozen=True)
class Alike:
    """Settings that requests which run together must share: JetEngine takes them from the first request."""

    strategy: str
    confidence_threshold: float
    eb_threshold: float
    draw: Draw

    @classmethod
    def of(cls, decoding: DecodingConfig) -> Alike:
        """The settings that decoding with this configuration shares."""
        return cls(decoding.remasking_strategy, decoding.confidence_threshold, decoding.eb_threshold, Draw.of(decoding))


@dataclass(frozen=True)
class _Started:
    """A request under way: its position, the step that it began at, whether its prompt has a full block to prefill."""

    index: int
    step: int
    prefilled: bool
    time: float = field(default_factory=time.perf_counter)


class Group:
    """Runs requests of one block length and with like settings (`Alike`).

    Args:
        loaded: JetEngine, with room for each of the requests.
        requests: all requests of the run.
        indices: positions of the group's requests.
        counts: the counts to which the group adds its steps.
    """

    def __init__(
        self, loaded: Loaded, requests: Sequence[GenerationRequest], indices: Sequence[int], counts: StepCounts
    ) -> None:
        self._loaded, self._llm, self._setup = loaded, loaded.llm, loaded.setup
        self._requests, self._indices, self._counts = requests, indices, counts
        self._waiting = deque(indices)
        self._running: dict[int, _Started] = {}  # by the number that JetEngine gives a sequence
        self._fillers: set[int] = set()
        self._idle = 0

    def run(self, failures: Failures) -> Iterator[tuple[int, GenerationResult]]:
        """Run the requests; after a standstill half as many at a time, then gradually more.

        Raises:
            EngineError: JetEngine stopped, or stands still with a single sequence.
        """
        waiting, running = self._waiting, self._running
        allowance = Allowance(self._loaded.at_once([self._requests[i] for i in self._indices]))
        self._reset_scheduler()
        seed = _common_seed(self._requests[i].seed for i in self._indices)
        torch.manual_seed(seed)
        self._loaded.generator.manual_seed(seed)
        try:
            while waiting or running:
                active = captured(allowance.now)
                if waiting and len(running) >= active:
                    allowance.count_full_step()
                added = self._admit(active)
                if self._setup.graphs and not waiting and not added:
                    self._fill_up()
                finished = self._step(added)
                if finished is None:
                    if active == 1:
                        raise EngineError(
                            f"JetEngine stands still with a single sequence; {len(waiting) + len(running)} of "
                            f"{len(self._indices)} requests are unanswered. Finished answers are kept (--use_cache)."
                        )
                    waiting.extendleft(reversed([started.index for started in running.values()]))
                    running.clear()
                    allowance.cut(active := captured(active // 2))
                    self._counts.standstills += 1
                    self._reset_scheduler()
                    logger.warning(
                        "JetEngine ran out of memory; its sequences run again, %d at a time. Answers are kept.", active
                    )
                    continue
                for number, tokens in finished:
                    started = running.pop(number)
                    try:
                        result = self._result(self._requests[started.index], started, tokens)
                    except NoAnswerError as error:
                        failures.add(started.index, str(error))
                    else:
                        yield started.index, result
        finally:
            self._llm.scheduler.consistent_sampling_params = False

    def _reset_scheduler(self) -> None:
        """Give JetEngine a scheduler without sequences, which takes all requests' settings from the first."""
        scheduler = self._llm.scheduler = type(self._llm.scheduler)(self._llm.config)
        scheduler.consistent_sampling_params = True
        if self._requests[self._indices[0]].decoding.greedy:
            self._setup.dialect.draw_greedily(scheduler)
        self._fillers.clear()
        self._idle = 0

    def _admit(self, active: int) -> list[_Started]:
        """Hand requests over until `active` are running or a prefill is full; return those that were handed over."""
        added: list[_Started] = []
        prefill = 0
        while self._waiting and len(self._running) < active:
            request = self._requests[self._waiting[0]]
            prefill += len(request.prompt_ids)
            # A part that goes on within a thought has a longer prompt than JetEngine may have been made for.
            if added and prefill > min(PREFILL_TOKENS, self._loaded.size.prefill_tokens):
                break
            number = self._add(request.prompt_ids, self._sampling_params(request))
            has_full_block = len(tail_of(request)) < len(request.prompt_ids)
            started = _Started(self._waiting.popleft(), self._counts.steps, has_full_block)
            self._running[number] = started
            added.append(started)
        return added

    def _fill_up(self) -> None:
        """Add fillers, sequences of one block without a prompt, up to a number of sequences that has a CUDA graph.

        At the end of a run, fewer and fewer sequences are left. A step with a CUDA graph takes less time than a step of
        fewer sequences without one.
        """
        now = len(self._running) + len(self._fillers)
        wanted = next(size for size in CAPTURED if size >= now)
        example = self._requests[self._indices[0]]
        params = self._sampling_params(dataclasses.replace(example, max_new_tokens=example.decoding.block_length))
        self._fillers |= {self._add((), params) for _ in range(wanted - now)}

    def _add(self, prompt: Sequence[int], params: object) -> int:
        """Hand a prompt over; return the number that JetEngine gives its sequence: the largest so far."""
        self._llm.add_request(list(prompt), params)
        queues = [getattr(self._llm.scheduler, name) for name in self._setup.dialect.queues]
        return int(max(queue[-1].seq_id for queue in queues if queue))

    def _step(self, added: list[_Started]) -> list[tuple[int, list[int]]] | None:
        """Run one step of JetEngine: (number, tokens) of each request that finished, or None at a standstill."""
        prefilled = sum(started.prefilled for started in added)
        blocks = len(self._running) + len(self._fillers) - prefilled
        if self._setup.dialect.prefills_beside or not prefilled:
            self._counts.steps += 1
            self._counts.steps_without_graph += blocks > 0 and blocks not in CAPTURED
        try:
            with prints_to_log():
                finished, progress = self._llm.step()
        except Exception as error:
            if is_out_of_memory(error) and not self._loaded.workers:
                torch.cuda.empty_cache()
                return None
            if self._loaded.workers:
                self._loaded.kill()
            raise EngineError(
                f"JetEngine {self._setup.dialect.version} stopped: {type(error).__name__}: {error}. Finished answers "
                "are kept (--use_cache)."
            ) from error
        self._idle = 0 if finished or progress else self._idle + 1
        if self._idle >= IDLE_STEPS:
            return None
        results = [(output[0], output[1]) for output in finished if output[0] not in self._fillers]
        self._fillers.difference_update(output[0] for output in finished)
        return results

    def _sampling_params(self, request: GenerationRequest) -> object:
        decoding, vocabulary = request.decoding, self._setup.config["vocab_size"]
        draw, stop_ids = Draw.of(decoding), stop_ids_of(request, self._setup.checkpoint)
        params: dict[str, object] = {
            "temperature": draw.temperature,
            # topk=0 is "off" in JetEngine's examples, but makes 0.2.0 draw the most probable token.
            "topk": min(draw.top_k or vocabulary, vocabulary),
            "topp": draw.top_p,
            "max_tokens": request.max_new_tokens,
            "block_length": decoding.block_length,
            "denoising_steps": decoding.steps,
            "remasking_strategy": decoding.remasking_strategy,
            "dynamic_threshold": decoding.confidence_threshold,
            "stop_words": sorted(stop_ids),
            "ignore_eos": False,
        }
        return self._loaded.jetengine.SamplingParams(**params | self._setup.dialect.sampling_params(request, stop_ids))

    def _result(self, request: GenerationRequest, started: _Started, tokens: list[int]) -> GenerationResult:
        """Cut the tokens that JetEngine returned to the answer."""
        dialect, checkpoint = self._setup.dialect, self._setup.checkpoint
        if dialect.returns_prompt:
            length = len(request.prompt_ids)
            if tuple(tokens[:length]) != request.prompt_ids:
                raise NoAnswerError("JetEngine returned another prompt than it was given.")
            tokens = tokens[length:]
        block_length = request.decoding.block_length
        forwards = self._counts.steps - started.step - (started.prefilled and dialect.prefills_beside)
        commits = -(-(len(request.prompt_ids) % block_length + len(tokens)) // block_length)
        end, reason = answer_end(tokens, request, checkpoint, "JetEngine")
        answer = tuple(token for token in tokens[:end] if token != checkpoint.mask_token_id)
        self._counts.mask_tokens_drawn += end - len(answer)
        return GenerationResult(
            token_ids=answer,
            finish_reason=reason,
            prefill_forwards=int(started.prefilled),
            denoising_forwards=max(forwards - commits, 0),
            commit_forwards=commits,
            seconds=time.perf_counter() - started.time,
        )


def _common_seed(seeds: Iterator[int]) -> int:
    digest = hashlib.sha256(",".join(map(str, seeds)).encode()).digest()
    return int.from_bytes(digest[:7], "little")
