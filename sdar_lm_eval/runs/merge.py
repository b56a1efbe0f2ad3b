"""Scores all answers of a run in one pass of the harness, by a model that repeats recorded answers."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import lm_eval.evaluator
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.utils import setup_logging

from sdar_lm_eval.checkpoint import Checkpoint
from sdar_lm_eval.errors import UserError, listed
from sdar_lm_eval.lm.account import Account, facts_of_evaluation, put_thoughts_into
from sdar_lm_eval.lm.answers import Session, earlier_work, read_sessions, united
from sdar_lm_eval.lm.denoising import CompactDenoising, LinesOf
from sdar_lm_eval.lm.evaluation import Evaluation
from sdar_lm_eval.lm.hooks import watch
from sdar_lm_eval.lm.jobs import Jobs
from sdar_lm_eval.lm.prompts import Prompts
from sdar_lm_eval.lm.store import Record, differences
from sdar_lm_eval.lm.task_requests import TaskRequests
from sdar_lm_eval.lm.thoughts import Thoughts
from sdar_lm_eval.report.counts import seconds_of
from sdar_lm_eval.report.gsm8k_json import convert, is_gsm8k
from sdar_lm_eval.report.results import results_in
from sdar_lm_eval.runs.programs import RunPrograms, run_by, run_here
from sdar_lm_eval.runs.saving import evaluate_into
from sdar_lm_eval.runs.settings import RunSettings, scored_by
from sdar_lm_eval.runs.shards import ANSWERS, task_manager
from sdar_lm_eval.runs.summary import Report, valid_report

REPORT = "report.json"
"""Name of the file in a published result's folder that the user gets."""

MOST_NAMED = 8  # missing documents in a message


class RecordedLM(LM):
    """Answers the harness's requests with recorded answers.

    The key of an answer holds the tokens that were sent. So requests go through the checkpoint's tokenizer and chat
    template, as on the machines that answered.

    Args:
        sessions: the machines' records, all with the same settings.
        seed: the run's.
        begin: called once the tasks are loaded, before the first request.

    Attributes:
        used: the records of the answers that were returned, each with the task, document and repeat that it answers.

    Raises:
        UserError: no answers at all, answers made with different settings, or a checkpoint that cannot be opened.
    """

    watched: ClassVar[bool] = True

    def __init__(self, sessions: Sequence[Session], seed: int, begin: Callable[[], object] | None = None) -> None:
        super().__init__()
        self._begin = begin
        if not sessions:
            raise UserError("There are no answers yet: none of the machines finished one. Run the same command again.")
        for session in sessions:
            if session.settings != sessions[0].settings:
                told = differences(sessions[0].settings, session.settings)
                raise UserError(
                    f"Answers of different settings cannot be one result: {sessions[0].path} and {session.path} "
                    f"({told}). Move away the files that you do not want."
                )
        self._sessions = sessions
        self._answers = united(sessions)
        model = sessions[-1].model
        checkpoint = Checkpoint.open(model["pretrained"], model["revision"])
        thoughts = Thoughts.read(model.get("thinking", {}), checkpoint)
        self._prompts = Prompts(checkpoint, model["chat_template"], thoughts)
        self._jobs = Jobs(checkpoint, self._prompts, {}, model["max_length"])
        self._evaluation = Evaluation(Account(seed))
        self._texts: dict[str, str] = {}  # key -> what is scored of the answer
        self.used: list[Record] = []
        watch(lm_eval.evaluator)

    # What a model is told of its evaluations (`watched.Watched`)

    @property
    def renders(self) -> bool:
        """Whether prompts go into the chat template."""
        return self._prompts.renders

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer's name in the harness's cache of built requests, which `publish` leaves off."""
        return ""

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True, *, prefixed: bool = True
    ) -> str:
        """Render a conversation."""
        return self._prompts.render(chat_history, add_generation_prompt, prefixed=prefixed)

    def add_thoughts(self, samples: Mapping[str, Sequence[dict[str, Any]]]) -> None:
        """Put the thoughts of the answers into lm_eval's samples."""
        put_thoughts_into(samples, [self._evaluation.account])

    def check_cache(self, path: str) -> None:
        """Do nothing: `publish` uses no cache."""

    def evaluation_begins(self, *, seed: int | None, cached: bool, template: str | None) -> None:
        """Call `begin`."""
        if self._begin is not None:
            self._begin()

    def task_begins(self, task: TaskRequests, requests: Sequence[Instance]) -> None:
        """Note what lm_eval knows of a task's requests."""
        self._evaluation.add(task, requests)
        self._evaluation.account.template_hash = self._prompts.template_hash

    def denoising_lines(self) -> LinesOf:
        """Return a function: task -> the lines of its denoising file, as far as the answers' records have them."""
        return lambda task: self._evaluation.account.denoising.lines(task, self._prompts.pieces)

    def evaluation_ends(self) -> None:
        """Forget the tasks and their requests."""
        self._evaluation.end()

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the recorded answers.

        Raises:
            UserError: answers are missing; says how many and of which documents.
        """
        account = self._evaluation.account
        asked = self._jobs.of(requests, self._evaluation.task_of, account.seed)
        account.note_settings(asked.settings)
        missing = []
        for job in asked.jobs.values():
            account.sent_of(job.task).add(job.document, job.prompt, job.request.prompt_ids, job.templated_by)
            record = self._answers.get(job.key)
            recalled = None if record is None else job.recall(record)
            if record is None or recalled is None:
                missing.append((job.task, job.document))
                continue
            thought, self._texts[job.key] = recalled
            account.note_end(job, thought, record.get("finish_reason", ""), record.get("new_tokens", 0))
            self.used.append(cast("Record", {**record, **job.name}))  # the record may name another document
            if (denoising := CompactDenoising.of_record(record)) is not None:
                account.denoising.add(job.task, job.document, job.repeat, denoising)
        if missing:
            documents = list(dict.fromkeys(missing))
            named = listed([f"{task} {document}" for task, document in documents], MOST_NAMED)
            raise UserError(
                f"{len(documents):,} of {len({id(r) for r in requests}):,} documents have no answer yet: "
                f"{named}. Nothing is published. Run the same command again: it answers what is missing."
            )
        return [self._texts[asked.jobs[job_id].key] for job_id in asked.order]

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Refuse: only generated answers are recorded."""
        raise _not_recorded(requests)

    def loglikelihood_rolling(self, requests: Sequence[Instance]) -> list[float]:
        """Refuse: only generated answers are recorded."""
        raise _not_recorded(requests)

    def get_model_info(self) -> dict[str, object]:
        """Return facts for `results["config"]`: the model's on the machines that answered, and their work in sum."""
        models = [dict(session.model) for session in self._sessions]
        runs = [model.pop("run", {}) for model in models]
        mine = {line["key"] for line in self.used}
        sessions = [session for session in self._sessions if mine & session.answers.keys()]
        counts = copy.deepcopy(self._evaluation.account.counts)  # of thoughts; the rest follows
        counts.load_seconds = max((run.get("load_seconds", 0.0) for run in runs), default=0.0)
        counts.peak_memory_bytes = max((run.get("peak_memory_bytes", 0) for run in runs), default=0)
        for line in self.used:  # also equal requests of several documents: each was answered
            counts.count(
                line["task"],
                requests=1,
                new_tokens=line["new_tokens"],
                prompt_tokens=line["prompt_tokens"],
                prefill_forwards=line["forwards"]["prefill"],
                denoising_forwards=line["forwards"]["denoising"],
                commit_forwards=line["forwards"]["commit"],
                forced_tokens=line.get("forced_tokens", 0),
            )
        counts.generation_seconds = seconds_of(earlier_work(sessions, mine).values())
        facts = facts_of_evaluation([dataclasses.replace(self._evaluation.account, counts=counts)])
        facts["run"]["sessions"] = len(sessions)
        return {"model_dtype": models[-1].get("dtype"), "sdar_lm_eval": models[-1] | facts}


def _not_recorded(requests: Sequence[Instance]) -> UserError:
    return UserError(f"task {requests[0].task_name!r} asks for log-likelihoods, which are not recorded.")


def publish(run: RunSettings, folder: Path, run_programs: RunPrograms = run_here) -> Path:
    """Score all answers of a run in one pass, and write the results; do nothing where these are there already.

    The folder named by the run's tasks gets lm_eval's results and samples files, the answers that were used, and
    report.json. The folder appears whole or not at all. Damaged results, and results of other sources of this package,
    are replaced.

    Args:
        run: the evaluation.
        folder: the run's.
        run_programs: runs programs that the model wrote, for tasks that are scored by that.

    Returns:
        The path of report.json.

    Raises:
        UserError: a document has no answer.
    """
    report = folder / run.name / REPORT
    if report.exists() and valid_report(report.read_bytes()) is not None:
        return report
    setup_logging("INFO")
    stack = contextlib.ExitStack()
    # `run_programs` begins once the tasks are loaded: while they load, they try whether this machine runs programs.
    lm = RecordedLM(read_sessions(folder / ANSWERS), run.seed, lambda: stack.enter_context(run_by(run_programs)))
    call = run.harness_call()

    def finish(partial: Path) -> None:
        lines = [json.dumps(line, ensure_ascii=False) + "\n" for line in lm.used]
        (partial / "answers.jsonl").write_text("".join(lines), "utf-8")
        (partial / REPORT).write_text(json.dumps(_report(run, partial), indent=2, ensure_ascii=False), "utf-8")

    with stack:
        evaluate_into(
            report.parent,
            lm,
            **call,
            finish=finish,
            task_manager=task_manager(run.tasks),
            confirm_run_unsafe_code=run.confirm_run_unsafe_code,
        )
    return report


def _report(run: RunSettings, folder: Path) -> Report:
    """Return the benchmark's JSON for one task of GSM8K, else the scores: the samples files have the rest."""
    results = results_in(folder, "configs")[-1]
    tasks = list(results.configs.content)
    asked = {"model_name": run.model_name, **run.swept}
    if len(tasks) == 1 and is_gsm8k(results.samples(tasks[0])):
        content = convert(folder)
        return {**content, "config": content["config"] | asked, "scored_by": scored_by()}
    return {
        "config": {"tasks": list(run.tasks), "engine": run.engine, "gpu": results.ours.text("gpu"), **asked},
        "metrics": {task: results.scores.part(task).content for task in results.scores.content},
        "performance": results.ours.part("run").content,
        "scored_by": scored_by(),
    }
