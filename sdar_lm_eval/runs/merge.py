"""All answers of a run, scored by the harness in one pass: a model that says again what was recorded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.api.model import LM
from lm_eval.loggers import EvaluationTracker
from lm_eval.utils import setup_logging

from sdar_lm_eval.answers import Session, busy_seconds, differences, key_of, read_sessions, united
from sdar_lm_eval.errors import UserError
from sdar_lm_eval.gen_kwargs import read_generation
from sdar_lm_eval.report.gsm8k_json import convert, is_gsm8k, read_run
from sdar_lm_eval.report.run import Counts
from sdar_lm_eval.runs.settings import Run
from sdar_lm_eval.runs.shards import ANSWERS, task_manager

REPORT = "report.json"
"""Name of the file that a published result has: what the user gets."""

NAMED = 8  # missing documents that a message names


class RecordedLM(LM):  # type: ignore[misc]
    """Answers the harness's requests from what was recorded.

    Args:
        sessions: with the same settings.

    Raises:
        UserError: no answers at all, or answers made with different settings.
    """

    def __init__(self, sessions: Sequence[Session]) -> None:
        super().__init__()
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
        self.used: list[dict[str, Any]] = []

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the recorded answers.

        Raises:
            UserError: some are missing; says how many and which.
        """
        seen: dict[int, int] = {}
        texts, missing = [], []
        for instance in requests:
            repeat = seen[id(instance)] = seen.get(id(instance), -1) + 1
            # An answer without chance is recorded once for all repeats.
            drawn = read_generation(instance.args[1], {}).is_drawn
            line = self._answers.get(key_of(instance, repeat if drawn else 0))
            if line is None:
                missing.append((str(instance.task_name), int(instance.doc_id)))
                continue
            texts.append(str(line["text"]))
            self.used.append({**line, "document": instance.doc_id, "repeat": repeat})
        if missing:
            documents = list(dict.fromkeys(missing))
            named = ", ".join(f"{task} {document}" for task, document in documents[:NAMED])
            more = f" and {len(documents) - NAMED:,} more" if len(documents) > NAMED else ""
            raise UserError(
                f"{len(documents):,} of {len({id(r) for r in requests}):,} documents have no answer yet: "
                f"{named}{more}. Nothing is published. Run the same command again: it answers what is missing."
            )
        return texts

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
        decoding: dict[str, Any] = {}
        for model in models:
            decoding |= model.get("decoding_of_tasks", {})
        mine = {line["key"] for line in self.used}
        sessions = [session for session in self._sessions if mine & session.answers.keys()]
        counts = Counts(
            requests=len(mine),
            load_seconds=max((run.get("load_seconds", 0.0) for run in runs), default=0.0),
            peak_memory_bytes=max((run.get("peak_memory_bytes", 0) for run in runs), default=0),
        )
        for line in {line["key"]: line for line in self.used}.values():
            counts.new_tokens += line["new_tokens"]
            counts.prompt_tokens += line["prompt_tokens"]
            counts.prefill_forwards += line["forwards"]["prefill"]
            counts.denoising_forwards += line["forwards"]["denoising"]
            counts.commit_forwards += line["forwards"]["commit"]
        # Of sessions that answered more than is used here, so much of their time as of their tokens is used.
        tokens = sum(line["new_tokens"] for session in sessions for line in session.answers.values())
        counts.generation_seconds = busy_seconds(sessions) * (counts.new_tokens / tokens if tokens else 1.0)
        run = counts.as_dict() | {"sessions": len(sessions)}
        return {
            "model_dtype": models[-1].get("dtype"),
            "sdar_lm_eval": models[-1] | {"decoding_of_tasks": decoding, "run": run},
        }


def published(folder: Path, run: Run) -> Path:
    """Return where a run's result is, or will be."""
    return folder / run.name / REPORT


def publish(run: Run, folder: Path) -> Path:
    """Score all answers of a run in one pass, and write its results; where they are there already, do nothing.

    The folder named by the run's tasks gets lm_eval's results and samples files, the answers that were used, and
    report.json. It appears whole or not at all.

    Returns:
        report.json.

    Raises:
        UserError: documents without an answer.
    """
    report = published(folder, run)
    if report.exists():
        return report
    setup_logging("INFO")
    lm = RecordedLM(read_sessions(folder / ANSWERS))
    call = run.harness_call()
    partial = report.parent.with_name(report.parent.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    tracker = EvaluationTracker(output_path=str(partial))
    results = lm_eval.simple_evaluate(
        lm,
        tasks=call["tasks"],
        gen_kwargs=call["gen_kwargs"],
        limit=call["limit"],
        evaluation_tracker=tracker,
        task_manager=task_manager(run.tasks),
        confirm_run_unsafe_code=True,
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
    return content
