"""All answers of a run, scored by the harness in one pass: a model that says again what was recorded."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lm_eval
import lm_eval.evaluator
from lm_eval.api.model import LM
from lm_eval.loggers import EvaluationTracker
from lm_eval.utils import setup_logging

from sdar_lm_eval.checkpoint import Checkpoint
from sdar_lm_eval.errors import UserError
from sdar_lm_eval.lm.answers import Session, busy_seconds, read_sessions, united
from sdar_lm_eval.lm.evaluation import Evaluation, TaskRequests, differences, facts_of_evaluation, watch
from sdar_lm_eval.lm.jobs import Jobs
from sdar_lm_eval.lm.prompts import Prompts
from sdar_lm_eval.report.counts import Counts
from sdar_lm_eval.report.gsm8k_json import convert, is_gsm8k, read_run
from sdar_lm_eval.runs.programs import RunPrograms, run_by, run_here
from sdar_lm_eval.runs.settings import Run, scored_by
from sdar_lm_eval.runs.shards import ANSWERS, task_manager

REPORT = "report.json"
"""Name of the file that a published result has: what the user gets."""

NAMED = 8  # missing documents that a message names


class RecordedLM(LM):
    """Answers the harness's requests from what was recorded.

    It asks as the machines did: with the checkpoint's tokenizer and chat template, so that a request is found by the
    tokens that were sent.

    Args:
        sessions: with the same settings.
        seed: of the run.
        begin: called when the tasks are loaded, before anything is asked.

    Raises:
        UserError: no answers at all, answers made with different settings, or a checkpoint that cannot be opened.
    """

    def __init__(self, sessions: Sequence[Session], seed: int, begin: Callable[[], Any] | None = None) -> None:
        super().__init__()
        self._begin = begin
        if not sessions:
            raise UserError("There are no answers yet: none of the machines finished one. Run the same command again.")
        for session in sessions:
            if session.settings != sessions[0].settings:
                told = differences(sessions[0].settings, session.settings)
                raise UserError(
                    f"Answers of different settings cannot be one result: {sessions[0].path} and {session.path} "
                    f"({told}). Move away those that you don't want."
                )
        self._sessions = sessions
        self._answers = united(sessions)
        model = sessions[-1].model
        checkpoint = Checkpoint.open(model["pretrained"], model["revision"])
        self._prompts = Prompts(checkpoint, model["chat_template"])
        self._jobs = Jobs(checkpoint, self._prompts, {}, model["max_length"], alone=True)
        self._evaluation = Evaluation(seed)
        self.used: list[dict[str, Any]] = []
        watch(lm_eval.evaluator)

    # What evaluation.py tells it

    @property
    def renders(self) -> bool:
        """Whether prompts go into the chat template."""
        return self._prompts.renders

    @property
    def tokenizer_name(self) -> str:
        """Name in the harness's cache of built requests, which is not used here."""
        return ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Render a conversation."""
        return self._prompts.render(chat_history, add_generation_prompt)

    def check_cache(self, path: str) -> None:
        """There is none."""

    def evaluation_begins(self, cached: bool) -> None:
        """Say that the tasks are loaded."""
        if self._begin is not None:
            self._begin()

    def task_begins(self, task: TaskRequests) -> None:
        """Learn what lm_eval knows of a task's requests."""
        self._evaluation.tasks[task.name] = task

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the recorded answers.

        Raises:
            UserError: some are missing; says how many and which.
        """
        asked = self._jobs.of(requests, self._evaluation.tasks, self._evaluation.seed)
        self._evaluation.decoding |= {task: settings.as_dict() for task, settings in asked.settings.items()}
        missing = []
        for job in asked.jobs.values():
            self._evaluation.sent_of(job.task).add(job.document, job.prompt, job.request.prompt_ids, job.templated_by)
            line = self._answers.get(job.key)
            if line is None:
                missing.append((job.task, job.document))
            else:
                self.used.append({**line, **job.name})
        if missing:
            documents = list(dict.fromkeys(missing))
            named = ", ".join(f"{task} {document}" for task, document in documents[:NAMED])
            more = f" and {len(documents) - NAMED:,} more" if len(documents) > NAMED else ""
            raise UserError(
                f"{len(documents):,} of {len({id(r) for r in requests}):,} documents have no answer yet: "
                f"{named}{more}. Nothing is published. Run the same command again: it answers what is missing."
            )
        return [str(self._answers[asked.jobs[job_id].key]["text"]) for job_id in asked.order]

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Refuse: only generated answers are recorded."""
        raise UserError(f"task {requests[0].task_name!r} asks for log-likelihoods, which are not recorded.")

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Refuse: only generated answers are recorded."""
        raise UserError(f"task {requests[0].task_name!r} asks for log-likelihoods, which are not recorded.")

    def get_model_info(self) -> dict[str, Any]:
        """Facts for `results["config"]`: those of the machines that answered, and what all of them did together."""
        models = [dict(session.model) for session in self._sessions]
        runs = [model.pop("run", {}) for model in models]
        mine = {line["key"] for line in self.used}
        sessions = [session for session in self._sessions if mine & session.answers.keys()]
        counts = self._evaluation.counts = Counts(
            load_seconds=max((run.get("load_seconds", 0.0) for run in runs), default=0.0),
            peak_memory_bytes=max((run.get("peak_memory_bytes", 0) for run in runs), default=0),
        )
        for line in {line["key"]: line for line in self.used}.values():
            counts.count(
                line["task"],
                requests=1,
                new_tokens=line["new_tokens"],
                prompt_tokens=line["prompt_tokens"],
                prefill_forwards=line["forwards"]["prefill"],
                denoising_forwards=line["forwards"]["denoising"],
                commit_forwards=line["forwards"]["commit"],
            )
        # A session that answered more than is used here counts by its share of the tokens.
        tokens = sum(line.get("new_tokens", 0) for session in sessions for line in session.answers.values())
        counts.generation_seconds = busy_seconds(sessions) * (counts.new_tokens / tokens if tokens else 1.0)
        facts = facts_of_evaluation([self._evaluation], self._prompts.template_hash)
        facts["run"]["sessions"] = len(sessions)
        return {"model_dtype": models[-1].get("dtype"), "sdar_lm_eval": models[-1] | facts}


def published(folder: Path, run: Run) -> Path:
    """Return where a run's result is, or will be."""
    return folder / run.name / REPORT


def publish(run: Run, folder: Path, run_programs: RunPrograms = run_here) -> Path:
    """Score all answers of a run in one pass, and write its results; where they are there already, do nothing.

    The folder named by the run's tasks gets lm_eval's results and samples files, the answers that were used, and
    report.json. It appears whole or not at all. Results of another version of this package's sources are replaced.

    Args:
        run: the evaluation.
        folder: the run's.
        run_programs: runs programs that the model wrote, where a task is scored by that and the run confirms it.

    Returns:
        report.json.

    Raises:
        UserError: documents without an answer.
    """
    report = published(folder, run)
    if report.exists() and json.loads(report.read_text("utf-8")).get("scored_by") == scored_by():
        return report
    setup_logging("INFO")
    stack = contextlib.ExitStack()
    # From when the tasks are loaded: they try a program of ours then, whether this machine can run any.
    lm = RecordedLM(read_sessions(folder / ANSWERS), run.seed, lambda: stack.enter_context(run_by(run_programs)))
    call = run.harness_call()
    partial = report.parent.with_name(report.parent.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    tracker = EvaluationTracker(output_path=str(partial))
    with stack:
        results = lm_eval.simple_evaluate(
            lm,
            tasks=call["tasks"],
            gen_kwargs=call["gen_kwargs"],
            limit=call["limit"],
            evaluation_tracker=tracker,
            task_manager=task_manager(run.tasks),
            confirm_run_unsafe_code=run.confirm_run_unsafe_code,
        )
    assert results is not None
    results["config"] |= {name: call[name] for name in ("model", "model_args")}
    tracker.general_config_tracker.log_experiment_args(call["model"], call["model_args"], None, None, True)
    samples = results.pop("samples")
    tracker.save_results_aggregated(results=results, samples=samples)
    for task in results["configs"]:
        tracker.save_results_samples(task_name=task, samples=samples[task])
    lines = [json.dumps(line, ensure_ascii=False) + "\n" for line in lm.used]
    (partial / "answers.jsonl").write_text("".join(lines), "utf-8")
    (partial / REPORT).write_text(json.dumps(_report(run, partial), indent=2, ensure_ascii=False), "utf-8")
    if report.parent.exists():
        shutil.rmtree(report.parent)
    partial.rename(report.parent)
    return report


def _report(run: Run, folder: Path) -> dict[str, Any]:
    """The benchmark's JSON for one task of GSM8K, else the same without results: these are in the samples files."""
    results, samples = read_run(folder)
    tasks = [task for task in results["configs"] if is_gsm8k(samples(task))]
    if len(tasks) == len(results["configs"]) == 1:
        content = convert(folder)
        settings = content["config"]
    else:
        ours = results["config"]["sdar_lm_eval"]
        settings = {"tasks": list(run.tasks), "engine": run.engine, "gpu": ours.get("gpu")}
        content = {"config": settings, "metrics": results["results"], "performance": ours["run"]}
    settings |= {"model_name": run.model_name} | run.swept
    return content | {"scored_by": scored_by()}
