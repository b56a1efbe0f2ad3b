"""A round of requests: stored results are read, the others are computed; each result is stored, counted and traced."""

from __future__ import annotations

import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized

from lm_eval.api.instance import Instance

from sdar_lm_eval.engines.types import Engine, GenerationRequest, GenerationResult, Scorer
from sdar_lm_eval.errors import EngineError, Interrupted, UserError
from sdar_lm_eval.lm.account import Account
from sdar_lm_eval.lm.denoising import CompactDenoising
from sdar_lm_eval.lm.evaluation import Evaluation
from sdar_lm_eval.lm.jobs import Job, JobId, Jobs
from sdar_lm_eval.lm.likelihoods import Kind, Likelihoods, ScoreJob, ScoreRound, record_of, result_of
from sdar_lm_eval.lm.prompts import Prompts
from sdar_lm_eval.lm.store import Store
from sdar_lm_eval.report.counts import Counts
from sdar_lm_eval.report.live import Live
from sdar_lm_eval.report.run import Progress
from sdar_lm_eval.report.trace import Trace, cost_of, denoising_of
from sdar_lm_eval.thinking import Thought

logger = logging.getLogger(__name__)


class Rounds:
    """Runs the harness's requests on an engine.

    Args:
        engine: computes answers and scores.
        name: the engine's name, for messages.
        jobs, likelihoods: make the engine's requests.
        prompts: makes the text of each token, for traces.
        decode: makes an answer's text of its tokens.
        trace: gets a line for each finished request; None for no trace.
        record_steps: whether denoising records are kept.
        verbose: whether each example is logged.
        alone: whether this process has all of the run's documents.

    Attributes:
        store: where finished answers and scores are kept.
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
        trace: Trace | None,
        record_steps: bool,
        verbose: bool,
        alone: bool,
    ) -> None:
        self._engine, self._name = engine, name
        self._jobs, self._likelihoods, self._prompts, self._decode = jobs, likelihoods, prompts, decode
        self._trace, self._record_steps, self._verbose, self._alone = trace, record_steps, verbose, alone
        self.store = Store([])

    def begin_run(self) -> None:
        """Begin another trace file, where the trace has lines of an earlier run."""
        if self._trace is not None:
            self._trace.begin_run()

    def close(self) -> None:
        """Close the store and the trace."""
        self.store.close()
        if self._trace is not None:
            self._trace.close()

    def generate(self, requests: Sequence[Instance], evaluation: Evaluation, show: bool) -> list[str]:
        """Answer requests; returns texts in their order.

        Args:
            requests: one call's requests.
            evaluation: the evaluation that the requests belong to; gets their counts.
            show: whether there is a progress bar.

        Raises:
            UserError, EngineError, Interrupted: as `SDARLM.generate_until`.
        """
        recording = self._record_steps or self._trace is not None or self._verbose
        account = evaluation.account
        asked = self._jobs.of(requests, evaluation.task_of, account.seed, record_steps=recording)
        account.note_settings(asked.settings)
        account.template_hash = self._prompts.template_hash
        asked.warn_of_truncated()
        jobs = asked.jobs
        tasks = {job.task: evaluation.task_of(job.instance) for job in jobs.values()}
        judges, filters = ({name: getattr(task, each) for name, task in tasks.items()} for each in ("judge", "filters"))
        live = Live(judges, len(jobs), whole=self._alone, filters=filters)
        answers = self._stored_answers(jobs, account, live)
        missing = asked.longest_first(job_id for job_id in jobs if job_id not in answers)
        to_run = [jobs[job_id].request for job_id in missing]
        self._prepare_engine(to_run, account.counts)
        progress = Progress(account.counts, len(jobs), len(answers), show, live)
        run = contextlib.closing(self._engine.generate(to_run))
        with self._round(progress, account, answers, len(jobs)), run as results:
            for index, result in results:
                job = jobs[missing[index]]
                thought, text = job.read(result.token_ids, self._decode)
                self._keep(job, result, thought, text, account)
                answers[missing[index]] = text
                account.counts.add(job.task, result, prompt_tokens=len(job.request.prompt_ids))
                account.note_end(job, thought, result.finish_reason, len(result.token_ids))
                verdict = live.judge(job.task, job.instance, text)
                if self._verbose:
                    progress.tell(live.example(job.instance, job.request, result, text, verdict, thought))
                if self._trace is not None:
                    cost = cost_of(result, prompt_tokens=len(job.request.prompt_ids))
                    steps = denoising_of(job.prompt, job.request, result, self._prompts.pieces)
                    self._trace_answer(job, {**_as_record(text, thought), **cost, **steps})
                progress.step()
        if len(answers) < len(jobs):
            raise EngineError(f"the {self._name} engine answered {len(answers)} of {len(jobs)} requests.")
        return [answers[job_id] for job_id in asked.order]

    def _stored_answers(self, jobs: Mapping[JobId, Job], account: Account, live: Live) -> dict[JobId, str]:
        """Note what is sent, and return the answers that the store has; these are counted, judged and traced."""
        answers: dict[JobId, str] = {}
        keys: set[str] = set()
        unrecorded = 0
        for job_id, job in jobs.items():
            account.sent_of(job.task).add(job.document, job.prompt, job.request.prompt_ids, job.templated_by)
            record = self.store.get(job.key)
            recalled = None if record is None else job.recall(record)
            if record is None or recalled is None:
                continue
            thought, text = recalled
            answers[job_id] = text
            keys.add(job.key)
            forwards = record.get("forwards")
            made = None if forwards is None else forwards["denoising"] + forwards["commit"]
            account.counts.add_stored(job.task, record.get("new_tokens"), made)
            account.counts.count(job.task, stored_forced_tokens=record.get("forced_tokens", 0))
            account.note_end(job, thought, record.get("finish_reason", ""), record.get("new_tokens", 0))
            live.judge(job.task, job.instance, text)
            self._trace_answer(job, {**record, **_as_record(text, thought), "stored": True})
            if self._record_steps and (denoising := CompactDenoising.of_record(record)) is not None:
                account.denoising.add(job.task, job.document, job.repeat, denoising)
            elif self._record_steps:
                unrecorded += 1
        if answers:
            earlier = self.store.earlier(keys)
            account.counts.stored_untimed += len(answers) if earlier is None else 0
            account.counts.add_earlier(earlier or {})
            logger.info("%d of %d answers are there already, and are not computed again.", len(answers), len(jobs))
        if unrecorded:
            logger.info(
                "Stored answers without a denoising record: %d. A run with record_steps=false, or of an earlier "
                "version, made these answers.",
                unrecorded,
            )
        return answers

    def _keep(self, job: Job, result: GenerationResult, thought: Thought | None, text: str, account: Account) -> None:
        """Store an answer, with its denoising record where records are kept; the account keeps the record too."""
        prompt_tokens = len(job.request.prompt_ids)
        record = {**job.name, **_as_record(text, thought), **cost_of(result, prompt_tokens)}
        if self._record_steps:
            denoising = CompactDenoising.of_result(result, job.request.decoding.block_length, prompt_tokens)
            account.denoising.add(job.task, job.document, job.repeat, denoising)
            record |= denoising.as_record()
        self.store.put(job.key, record)

    def score(
        self, kind: Kind, requests: Sequence[Instance], evaluation: Evaluation, show: bool
    ) -> list[tuple[float, bool]]:
        """Score requests; returns log-likelihoods in nats, and whether greedy decoding gives the text, in their order.

        Args:
            kind: the requests' type.
            requests: one call's requests.
            evaluation: the evaluation that the requests belong to; gets their counts.
            show: whether there is a progress bar.

        Raises:
            UserError, EngineError, Interrupted: as `SDARLM.loglikelihood`.
        """
        if not requests:
            return []
        scorer = self.scorer_of(requests[0])
        account = evaluation.account
        asked = self._likelihoods.of(kind, requests, evaluation.task_of, account.seed)
        jobs, config = asked.jobs, asked.config
        missing = self._missing_pieces(asked, account)
        computed_tokens: Counter[int] = Counter()
        for job, part in missing:
            computed_tokens[id(job)] += len(job.pieces[part].continuation_ids)
        finished = dict.fromkeys(id(job) for job in jobs if job.finished)
        progress = Progress(account.counts, len(jobs), len(finished), show, None)
        run = contextlib.closing(scorer.score([job.pieces[part] for job, part in missing], config))
        with self._round(progress, account, finished, len(jobs)), run as results:
            for index, result in results:
                job, part = missing[index]
                self.store.put(job.keys[part], record_of(result))
                job.results[part] = result
                if job.finished:
                    finished[id(job)] = None
                    account.counts.add_score(job.task, job.total(), tokens=computed_tokens[id(job)])
                    self._trace_score(job, config.method, stored=False)
                    progress.step()
        if len(finished) < len(jobs):
            raise EngineError(f"the {self._name} engine scored {len(finished)} of {len(jobs)} requests.")
        scores = {id(job): job.total() for job in jobs}
        return [(scores[id(job)].log_likelihood, scores[id(job)].is_greedy) for job in asked.order]

    def _missing_pieces(self, asked: ScoreRound, account: Account) -> list[tuple[ScoreJob, int]]:
        """Note what is sent, take results from the store, and return (job, index of its piece) for each piece without.

        Jobs that are finished thereby are counted and traced.
        """
        missing = []
        for job in asked.jobs:
            for part, (piece, key) in enumerate(zip(job.pieces, job.keys, strict=True)):
                tokens = (*piece.context_ids, *piece.continuation_ids)
                account.sent_of(job.task).add(job.document, str(job.instance.args[0]), tokens, job.templated_by)
                if (record := self.store.get(key)) is not None:
                    job.results[part] = result_of(record)
                else:
                    missing.append((job, part))
            if job.finished:
                if job.pieces:
                    account.counts.add_stored_score(job.task, job.total())
                else:  # an empty text
                    account.counts.add_score(job.task, job.total(), tokens=0)
                self._trace_score(job, asked.config.method, stored=bool(job.pieces))
        if stored := sum(bool(job.pieces) for job in asked.jobs if job.finished):
            logger.info(
                "%d of %d log-likelihoods are there already, and are not computed again.", stored, len(asked.jobs)
            )
        return missing

    def score_tokens(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], seed: int) -> list[tuple[float, bool]]:
        """Score (context ids, continuation ids), as `score` returns it, without store, counts and trace."""
        requests = [self._likelihoods.truncated(context, continuation)[0] for context, continuation in pairs]
        results = dict(self._scorer("a caller").score(requests, self._likelihoods.config(seed)))
        return [(results[i].log_likelihood, results[i].is_greedy) for i in range(len(requests))]

    def scorer_of(self, request: Instance) -> Scorer:
        """Return what scores a request for log-likelihoods.

        Raises:
            UserError: the engine does not score, or enable_thinking is true.
        """
        scorer = self._scorer(f"task {request.task_name!r}")
        if self._prompts.thoughts.template_args.get("enable_thinking"):
            raise UserError(
                f"task {request.task_name!r} asks for log-likelihoods, and enable_thinking=true for thoughts. "
                "Leave out enable_thinking, or use a task that generates (output_type generate_until)."
            )
        return scorer

    def _scorer(self, who: str) -> Scorer:
        """The engine as one that scores.

        Raises:
            UserError: the engine does not score; the message names `who` asks.
        """
        if isinstance(self._engine, Scorer):
            return self._engine
        raise UserError(
            f"{who} asks for log-likelihoods, which the {self._name} engine does not compute. Use --model sdar, or "
            "a task that generates (output_type generate_until), such as gsm8k_sdar."
        )

    def _prepare_engine(self, requests: Sequence[GenerationRequest], counts: Counts) -> None:
        started = time.perf_counter()
        self._engine.prepare(requests)
        counts.load_seconds += time.perf_counter() - started

    @contextlib.contextmanager
    def _round(self, progress: Progress, account: Account, finished: Sized, total: int) -> Iterator[None]:
        """Begin a round of requests, and end it whether or not an error ends it."""
        self.store.begin()
        try:
            yield
        except KeyboardInterrupt as interrupt:
            whose = "" if self._alone else " of this process"
            made, kept = f"Interrupted. {len(finished)} of {total} answers{whose}", self.store.kept_in
            raise Interrupted(
                f"{made} are in {kept}. Run the same command again to compute the others."
                if kept
                else f"{made} were made. No file has them all: --use_cache FILE or answers=FOLDER keeps answers."
            ) from interrupt
        finally:
            progress.close(self._engine.peak_memory_bytes())
            self.store.close()
            if self._alone:  # else rank 0 logs the counts of all ranks
                logger.info("%s", account.counts)

    def _trace_answer(self, job: Job, line: Mapping[str, object]) -> None:
        if self._trace is not None:
            values = {name: value for name, value in line.items() if name not in ("key", "at")}
            self._trace.write({**job.name, **values, **job.name})  # a stored record may name another document

    def _trace_score(self, job: ScoreJob, method: str, stored: bool) -> None:
        if self._trace is None:
            return
        total = job.total()
        self._trace.write(
            {
                "task": job.task,
                "document": job.document,
                "request": job.instance.idx,  # the index of a multiple choice's answer
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


def _as_record(text: str, thought: Thought | None) -> dict[str, object]:
    """An answer's text and, if it has one, its thought, as stored answers and traces have them."""
    return {"text": text, **({} if thought is None else thought.as_record())}
