"""Requests that may run together on LMDeploy, and the two threads between which their results pass."""

from __future__ import annotations

import asyncio
import concurrent.futures
import queue
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from sdar_lm_eval.ending import Ending
from sdar_lm_eval.engines.adapters.lmdeploy import api
from sdar_lm_eval.engines.adapters.lmdeploy.loading import PATIENCE, Loaded
from sdar_lm_eval.engines.adapters.requests import Draw, NoAnswerError, stop_ids_of, why_stopped
from sdar_lm_eval.engines.runs import Failures
from sdar_lm_eval.engines.types import GenerationRequest, GenerationResult
from sdar_lm_eval.errors import EngineError

_Result = tuple[int, GenerationResult]  # position of the request, its result

# Statuses by which one request failed and the engine did not (lmdeploy/messages.py, one folder up: ResponseType).
OF_ONE_REQUEST = ("INPUT_LENGTH_ERROR", "SESSION_REPEAT", "SESSION_NOT_EXIST", "CANCEL")
WATCH = 5.0  # seconds without a result before the worker processes are checked


class Group:
    """Runs requests whose draws and stop tokens are alike.

    The adapter itself ends a request as soon as a block completes a stop string or a loop, or holds a stop token that
    LMDeploy does not see: LMDeploy knows no stop strings, and looks for no stop token in the block that begins with the
    prompt's last tokens (strategies/dllm/sequence.py: output_start_pos is where that block ends).

    Args:
        loaded: LMDeploy, made for the requests' settings; closed if it fails.
        requests: all requests of the run.
        indices: positions of the group's requests.
    """

    def __init__(self, loaded: Loaded, requests: Sequence[GenerationRequest], indices: Sequence[int]) -> None:
        self._loaded, self._requests, self._indices = loaded, requests, indices
        self._checkpoint, self._version = loaded.setup.checkpoint, loaded.setup.installed.version

    def run(self, failures: Failures) -> Iterator[_Result]:
        """Run the requests; a crash, or a caller who closes this generator, loses only the requests under way.

        Raises:
            EngineError: LMDeploy stopped.
        """
        results: queue.SimpleQueue[_Result | None] = queue.SimpleQueue()

        async def begin() -> asyncio.Task[None]:
            return asyncio.create_task(self._serve(results.put, failures))

        async def end() -> None:
            task.cancel()
            await asyncio.wait([task])

        loaded, loop = self._loaded, self._loaded.loop
        assert loop is not None
        task = loop.run(begin())
        try:
            while True:
                try:
                    result = results.get(timeout=WATCH)
                except queue.Empty:
                    loaded.check_workers()
                    continue
                if result is None:
                    break
                yield result
        finally:
            if not loaded.closed:  # a closed engine has no requests left
                lost = loaded.lost
                try:
                    loop.run(end(), WATCH if lost else PATIENCE)
                except concurrent.futures.TimeoutError:
                    if not lost:
                        raise
                if lost:
                    loaded.close()
        if error := task.exception():
            loaded.close()
            raise error

    async def _serve(self, put: Callable[[_Result | None], None], failures: Failures) -> None:
        """Put each result as it is there, and None at the end."""
        waiting = deque(self._indices)

        async def work() -> None:
            instance = self._loaded.engine.create_instance()
            while waiting:
                index = waiting.popleft()
                try:
                    put((index, await self.answer(instance, self._requests[index])))
                except NoAnswerError as error:
                    failures.add(index, str(error))

        at_once = self._loaded.at_once([self._requests[index] for index in self._indices])
        workers = [asyncio.create_task(work()) for _ in range(at_once)]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
            put(None)

    async def answer(self, instance: api.Instance, request: GenerationRequest) -> GenerationResult:
        """Run one request on an instance of LMDeploy's engine."""
        session, started = next(self._loaded.sessions), time.perf_counter()
        tokens: list[int] = []
        ending, end, reason = Ending(request, self._checkpoint.decode), 0, ""
        stream = instance.async_stream_infer(session, list(request.prompt_ids), gen_config=self._settings(request))
        finished = False
        try:
            async for output in stream:
                status = output.status.name
                if status not in ("SUCCESS", "FINISH"):
                    if status in OF_ONE_REQUEST:
                        raise NoAnswerError(f"LMDeploy {self._version} refused it ({status}).")
                    raise EngineError(
                        f"LMDeploy {self._version} stopped ({status}); its log says why. Finished answers "
                        "are kept (--use_cache)."
                    )
                tokens += output.token_ids
                if not reason:
                    added, reason = ending.add(output.token_ids)
                    end += added
                finished = status == "FINISH"
                if not finished and reason not in ("", "length"):
                    break
            if not finished:
                await instance.async_cancel(session)
        finally:
            await stream.aclose()
        reason = reason or why_stopped(tokens, request, self._checkpoint, "LMDeploy")
        forwards = self._loaded.forwards.take(session)
        # The forward over a prompt shorter than a block denoises, and prefills nothing.
        prefilled = len(request.prompt_ids) >= request.decoding.block_length
        return GenerationResult(
            token_ids=tuple(tokens[:end]),
            finish_reason=reason,
            prefill_forwards=forwards.prefill if prefilled else 0,
            denoising_forwards=forwards.denoising + (0 if prefilled else forwards.prefill),
            commit_forwards=forwards.commit,
            seconds=time.perf_counter() - started,
        )

    def _settings(self, request: GenerationRequest) -> api.GenerationConfig:
        """A request's GenerationConfig.

        The stop tokens given are all stop tokens: below the pipeline LMDeploy adds none. `ignore_eos` stays off: it
        would forbid these tokens rather than ignore them (messages.py: SamplingParam.from_gen_config).
        """
        greedy, temperature, top_k, top_p = Draw.of(request.decoding)
        vocabulary = self._checkpoint.vocabulary
        settings = self._loaded.lmdeploy.GenerationConfig(
            max_new_tokens=request.max_new_tokens,
            do_sample=not greedy,
            top_k=0 if top_k >= vocabulary else top_k,
            top_p=top_p,
            random_seed=request.seed,
            stop_token_ids=sorted(stop_ids_of(request, self._checkpoint)) or None,
            bad_token_ids=[self._checkpoint.mask_token_id],
        )
        settings.temperature = temperature  # set late: the constructor refuses values above 2, the engine takes any
        return settings
