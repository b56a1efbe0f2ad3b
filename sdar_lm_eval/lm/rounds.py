"""A round of requests: what is stored is found, the rest is computed, and each result is stored, counted and traced."""

from __future__ import annotations

import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from typing import Any

from lm_eval.api.instance import Instance

from sdar_lm_eval.engines.base import Engine, GenerationRequest, LikelihoodConfig, Scorer
from sdar_lm_eval.errors import EngineError, Interrupted, UserError
from sdar_lm_eval.lm.evaluation import Evaluation
from sdar_lm_eval.lm.jobs import Job, JobId, Jobs
from sdar_lm_eval.lm.likelihoods import Kind, Likelihoods, ScoreJob, record_of, result_of
from sdar_lm_eval.lm.prompts import Prompts
from sdar_lm_eval.lm.store import Store
from sdar_lm_eval.report.counts import Counts
from sdar_lm_eval.report.live import Live
from sdar_lm_eval.report.run import Progress
from sdar_lm_eval.report.trace import Trace, cost_of, denoising_of

logger = logging.getLogger(__name__)


class Rounds:
    """Runs the harness's requests on an engine.

    Args:
        engine: computes.
        name: of the engine, for messages.
        jobs, likelihoods: make the engine's requests.
        prompts: makes text of tokens, for traces.
        decode: makes an answer's text.
        verbose: log each example.
        alone: this process has all of the run's documents.

    Attributes:
        store: where finished answers and scores are kept.
        trace: gets a line for each; None for no trace.
    """

    def __init__(
        self,
        engine: Engine,
        name: str,
        *,
        jobs: Jobs,
        likelihoods: Likelihoods,
        prompts: Prompts,
        decode: Callable[[Sequence[int]], str],
        verbose: bool,
        alone: bool,
    ) -> None:
        self._engine, self._name = engine, name
        self._jobs, self._likelihoods, self._prompts, self._decode = jobs, likelihoods, prompts, decode
        self._verbose, self._alone = verbose, alone
        self.store = Store([])
        self.trace: Trace | None = None

    def generate(self, requests: Sequence[Instance], evaluation: Evaluation, show: bool) -> list[str]:
        """Answer requests; returns texts in their order.

        Args:
            requests: of one call of the harness.
            evaluation: the requests'; gets their counts.
            show: a progress bar.

        Raises:
            UserError, EngineError, Interrupted: as `SDARLM.generate_until`.
        """
        counts = evaluation.counts
        tracing = self.trace is not None
        asked = self._jobs.of(requests, evaluation.task_of, evaluation.seed, record_steps=tracing or self._verbose)
        evaluation.decoding |= {task: settings.as_dict() for task, settings in asked.settings.items()}
        if asked.truncated:
            logger.warning(
                "%d of %d prompts are longer than max_length - max_gen_toks allows; they lost their beginning.",
                asked.truncated,
                len(asked.jobs),
            )
        jobs, answers = asked.jobs, dict[JobId, str]()
        judges = {job.task: evaluation.task_of(job.instance).judge for job in jobs.values()}
        live = Live(judges, len(jobs), whole=self._alone)
        for job_id, job in jobs.items():
            evaluation.sent_of(job.task).add(job.document, job.prompt, job.request.prompt_ids, job.templated_by)
            if (record := self.store.get(job.key)) is not None:
                answers[job_id] = record["text"]
                counts.count(job.task, stored_requests=1)
                live.judge(job.instance, record["text"])
                self._trace_answer(job, {**record, "stored": True})
        if answers:
            logger.info("%d of %d answers are there already, and are not computed again.", len(answers), len(jobs))
        # Longest first: prompts of like length are prefilled together, and no long one is left for the end.
        missing = [job_id for job_id in jobs if job_id not in answers]
        missing.sort(key=lambda job_id: -len(jobs[job_id].request.prompt_ids))
        to_run = [jobs[job_id].request for job_id in missing]
        self._prepare(to_run, counts)
        progress = Progress(counts, len(jobs), len(answers), show, live)
        run = contextlib.closing(self._engine.generate(to_run))
        with self._round(progress, evaluation, answers, len(jobs)), run as results:
            for index, result in results:
                job = jobs[missing[index]]
                text = job.cut(self._decode(result.token_ids))
                cost = cost_of(result, prompt_tokens=len(job.request.prompt_ids))
                self.store.put(job.key, {**job.name, "text": text, **cost})
                answers[missing[index]] = text
                counts.add(job.task, result, prompt_tokens=len(job.request.prompt_ids))
                verdict = live.judge(job.instance, text)
                if self._verbose:
                    progress.tell(live.example(job.instance, job.request, result, text, verdict))
                if tracing:
                    steps = denoising_of(job.prompt, job.request, result, self._prompts.pieces)
                    self._trace_answer(job, {"text": text, **cost, **steps})
                progress.step()
        if len(answers) < len(jobs):
            raise EngineError(f"the {self._name} engine answered {len(answers)} of {len(jobs)} requests.")
        return [answers[job_id] for job_id in asked.order]

    def score(
        self,
        kind: Kind,
        requests: Sequence[Instance],
        evaluation: Evaluation,
        config: LikelihoodConfig,
        show: bool,
    ) -> list[tuple[float, bool]]:
        """Score requests; returns log-likelihoods in nats, and whether greedy decoding gives the text, in their order.

        Args:
            kind: of the requests.
            requests: of one call of the harness.
            evaluation: the requests'; gets their counts.
            config: the method.
            show: a progress bar.

        Raises:
            UserError, EngineError, Interrupted: as `SDARLM.loglikelihood`.
        """
        if not requests:
            return []
        scorer = self.scorer(f"task {requests[0].task_name!r}")
        counts = evaluation.counts
        asked = self._likelihoods.of(kind, requests, evaluation.task_of, config)
        jobs = asked.jobs
        missing = []  # (job, place among its pieces)
        computed_tokens: Counter[int] = Counter()
        for job in jobs:
            for place, (piece, key) in enumerate(zip(job.pieces, job.keys, strict=True)):
                tokens = (*piece.context_ids, *piece.continuation_ids)
                evaluation.sent_of(job.task).add(job.document, str(job.instance.args[0]), tokens, job.templated_by)
                if (record := self.store.get(key)) is not None:
                    job.results[place] = result_of(record)
                else:
                    missing.append((job, place))
                    computed_tokens[id(job)] += len(piece.continuation_ids)
            if job.finished and job.pieces:
                counts.count(job.task, stored_scores=1)
            elif job.finished:  # an empty text
                counts.add_score(job.task, job.total(), tokens=0)
            if job.finished:
                self._trace_score(job, config.method, stored=bool(job.pieces))
        finished = dict.fromkeys(id(job) for job in jobs if job.finished)
        if stored := sum(bool(job.pieces) for job in jobs if job.finished):
            logger.info("%d of %d log-likelihoods are there already, and are not computed again.", stored, len(jobs))
        progress = Progress(counts, len(jobs), len(finished), show, None)
        run = contextlib.closing(scorer.score([job.pieces[place] for job, place in missing], config))
        with self._round(progress, evaluation, finished, len(jobs)), run as results:
            for index, result in results:
                job, place = missing[index]
                self.store.put(job.keys[place], record_of(result))
                job.results[place] = result
                if job.finished:
                    finished[id(job)] = None
                    counts.add_score(job.task, job.total(), tokens=computed_tokens[id(job)])
                    self._trace_score(job, config.method, stored=False)
                    progress.step()
        if len(finished) < len(jobs):
            raise EngineError(f"the {self._name} engine scored {len(finished)} of {len(jobs)} requests.")
        scores = {id(job): job.total() for job in jobs}
        return [(scores[id(job)].log_likelihood, scores[id(job)].is_greedy) for job in asked.order]

    def scorer(self, who: str) -> Scorer:
        """Return the engine as one that scores.

        Raises:
            UserError: it does not; `who` asks.
        """
        if isinstance(self._engine, Scorer):
            return self._engine
        raise UserError(
            f"{who} asks for log-likelihoods, which the {self._name} engine does not compute. Use --model sdar, or "
            "a task that generates (output_type generate_until), such as gsm8k_sdar."
        )

    def _prepare(self, requests: Sequence[GenerationRequest], counts: Counts) -> None:
        started = time.perf_counter()
        self._engine.prepare(requests)
        counts.load_seconds += time.perf_counter() - started

    @contextlib.contextmanager
    def _round(self, progress: Progress, evaluation: Evaluation, finished: Sized, total: int) -> Iterator[None]:
        """What begins and ends a round of requests, also one that ends with an error."""
        self.store.begin()
        try:
            yield
        except KeyboardInterrupt as interrupt:
            kept = self.store.kept_in
            told = (
                f"answers are in {kept}; the same command goes on" if kept else "answers were made; not all were kept"
            )
            hint = "" if kept else " (--use_cache FILE or answers=FOLDER keeps them)"
            raise Interrupted(f"{len(finished)} of {total} {told}{hint}.") from interrupt
        finally:
            progress.close(self._engine.peak_memory_bytes())
            self.store.close()
            if self._alone:  # else `barrier` says it for all
                logger.info("%s", evaluation.counts)

    def _trace_answer(self, job: Job, line: Mapping[str, Any]) -> None:
        if self.trace is not None:
            own = {name: value for name, value in line.items() if name not in ("key", "at")}
            self.trace.write({**job.name, **own, **job.name})  # a stored record may be of another document

    def _trace_score(self, job: ScoreJob, method: str, stored: bool) -> None:
        if self.trace is None:
            return
        total = job.total()
        self.trace.write(
            {
                "task": job.task,
                "document": job.document,
                "request": job.instance.idx,  # of a multiple choice: which one
                "likelihood": method,
                "context_tokens": sum(len(piece.context_ids) for piece in job.pieces),
                "tokens": sum(len(piece.continuation_ids) for piece in job.pieces),
                "log_likelihood": total.log_likelihood,
                "is_greedy": total.is_greedy,
                "standard_error": total.standard_error,
                "tokens_run": {"clean": total.clean_tokens, "noised": total.noised_tokens},
                **({"stored": True} if stored else {}),
            }
        )
