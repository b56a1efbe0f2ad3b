"""The GSM8K benchmark's JSON file (config, metrics, results) from what lm_eval wrote for any model."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sdar_lm_eval.errors import UserError, did_you_mean
from sdar_lm_eval.report.results import Json, model_of, results_in

NAME = "gsm8k-json"
HELP = "a run of GSM8K as the benchmark's JSON file"

PREFERRED_FILTER = "flexible-extract"
"""The filter that counts where nobody chooses: as the original benchmark's, it takes the last number if need be."""

_METRIC = "exact_match"
_DECODING = ("block_length", "denoising_steps", "temperature", "remasking_strategy", "confidence_threshold")
_VERSIONS = (
    "torch", "transformers", "engine_version", "engine_commit", "flash-attn", "flashinfer-python", "lmdeploy", "python",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.add_argument("path", metavar="OUTPUT_DIR", help="what --output_path named; the run needs --log_samples")
    parser.add_argument("--task", help="which task, where the run has several of GSM8K")
    parser.add_argument("--filter", help=f"whose answers count; default: {PREFERRED_FILTER}, else the task's first")
    parser.add_argument("--output", metavar="FILE", help="write it there rather than print it")


def run(arguments: argparse.Namespace) -> str:
    """Return the JSON text, or where it was written."""
    content = convert(Path(arguments.path), arguments.task, arguments.filter)
    text = json.dumps(content, indent=2, ensure_ascii=False)
    if arguments.output is None:
        return text
    try:
        Path(arguments.output).write_text(text + "\n", "utf-8")
    except OSError as error:
        raise UserError(f"--output {arguments.output} cannot be written: {error.strerror}.") from error
    metrics = content["metrics"]
    return f"{arguments.output}: {metrics['percentage']} ({metrics['correct']}/{metrics['total']})"


def convert(path: Path, task: str | None = None, filter_name: str | None = None) -> Json:
    """Return the benchmark's JSON of the newest run in a folder.

    An answer's `generation_time` and `tokens_per_second` are in the folder if the run had `trace=` or `answers=` name a
    file there; they are None where they are unknown, as are settings of models that do not say.

    Args:
        path: what `--output_path` named, or a results file.
        task: which one, where there are several.
        filter_name: whose answers count.

    Raises:
        UserError: no such run, task or filter, or samples were not logged.
    """
    results, samples_of = read_run(path)
    known = [name for name in results["configs"] if is_gsm8k(samples_of(name))]
    if not known:
        missing = [name for name in results["configs"] if not samples_of(name)]
        what = "samples (--log_samples)" if missing else "GSM8K's questions and answers, scored by exact_match"
        raise UserError(f"{str(path)!r} has no {what}: the run was of {', '.join(results['configs'])}.")
    if task is None and len(known) == 1:
        task = known[0]
    if task is None or task not in known:
        given = "several tasks of GSM8K" if task is None else f"no task {task!r} of GSM8K"
        hint = did_you_mean(task or "", known)
        raise UserError(f"{str(path)!r} has {given}; give --task {' or '.join(known)}.{hint}")
    samples = samples_of(task)
    filters = list(dict.fromkeys(str(sample["filter"]) for sample in samples))
    if filter_name is None:
        filter_name = PREFERRED_FILTER if PREFERRED_FILTER in filters else filters[0]
    if filter_name not in filters:
        hint = did_you_mean(filter_name, filters)
        raise UserError(f"--filter {filter_name} is unknown to {task}; choose {', '.join(filters)}.{hint}")
    chosen = sorted((s for s in samples if s["filter"] == filter_name), key=lambda sample: sample["doc_id"])
    costs = _costs(path if path.is_dir() else path.parent, task)
    scores = {name: _metrics(results, task, name, samples) for name in filters}
    return {
        "config": _config(results, task),
        "metrics": scores[filter_name] | {"filter": filter_name, "by_filter": scores},
        "performance": _performance(results, task, len(chosen)),
        "results": [_result(sample, costs.get(sample["doc_id"], {})) for sample in chosen],
    }


def read_run(path: Path) -> tuple[Json, Callable[[str], list[Json]]]:
    """Return the newest results file in a folder (or the file named), and a function for its samples of a task.

    Raises:
        UserError: there is none.
    """
    file, results = results_in(path, "configs")[-1]
    # results_<date>.json, or what --output_path named with _<date>; the samples are beside it, with the same date.
    date = file.stem.rpartition("_")[2]

    def samples_of(task: str) -> list[Json]:
        samples = file.with_name(f"samples_{task}_{date}.jsonl")
        return list(_lines(samples)) if samples.exists() else []

    return results, samples_of


def is_gsm8k(samples: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a task's samples are GSM8K's: a question, a worked answer, and exact_match between numbers."""
    if not samples:
        return False
    doc = samples[0].get("doc", {})
    return _METRIC in samples[0] and {"question", "answer"} <= doc.keys() and "####" in str(doc["answer"])


def _result(sample: Mapping[str, Any], cost: Mapping[str, Any]) -> Json:
    text, predicted = _first(sample["resps"]), _first(sample["filtered_resps"])
    seconds = cost.get("seconds") if cost.get("text") == text else None
    speed = round(cost["new_tokens"] / seconds, 1) if seconds else None
    return {
        "idx": sample["doc_id"],
        "question": sample["doc"]["question"],
        "ground_truth": str(sample["target"]),
        "generated_text": text,
        "predicted_answer": predicted,
        "correct": bool(sample[_METRIC]),
        "generation_time": seconds,
        "tokens_per_second": speed,
    }


def _metrics(results: Json, task: str, filter_name: str, samples: Sequence[Mapping[str, Any]]) -> Json:
    of_filter = [bool(sample[_METRIC]) for sample in samples if sample["filter"] == filter_name]
    correct, total = sum(of_filter), len(of_filter)
    stderr = results["results"][task].get(f"{_METRIC}_stderr,{filter_name}")
    return {
        "accuracy": correct / total,
        "correct": correct,
        "total": total,
        "percentage": f"{correct / total:.2%}",
        "stderr": stderr if isinstance(stderr, float) and stderr == stderr else None,
    }


def _config(results: Json, task: str) -> Json:
    config = results["config"]
    ours = config.get("sdar_lm_eval") or {}
    decoding = (ours.get("decoding_of_tasks") or {}).get(task) or {}
    generation = results["configs"][task].get("generation_kwargs") or {}
    length = decoding.get("max_gen_toks", generation.get("max_gen_toks"))
    settings = {name: decoding.get(name) for name in _DECODING}
    if not decoding:
        settings["temperature"] = generation.get("temperature") if generation.get("do_sample") else 0.0
    versions = {"sdar_lm_eval": ours.get("version"), "lm_eval": results.get("lm_eval_version")}
    versions |= {name: ours[name] for name in _VERSIONS if ours.get(name)}
    versions.setdefault("transformers", results.get("transformers_version"))
    return {
        "model_name": model_of(results),
        **settings,
        "max_gen_length": length,
        "engine": ours.get("engine") or config.get("model"),
        "versions": versions,
        "gpu": ours.get("gpu"),
        "task": task,
        "seed": ours.get("seed"),
        "dtype": ours.get("dtype"),
        "checkpoint_fingerprint": ours.get("checkpoint_fingerprint"),
    }


def _performance(results: Json, task: str, questions: int) -> Json:
    """Time is of all tasks of the run together; tokens and forwards are the task's."""
    run = (results["config"].get("sdar_lm_eval") or {}).get("run") or {}
    seconds, requests = run.get("generation_seconds"), run.get("requests") or questions
    of_task = (run.get("tasks") or {}).get(task) or run
    return {
        "total_seconds": seconds,
        "seconds_per_question": None if seconds is None else round(seconds / requests, 4),
        "tokens_per_second": run.get("tokens_per_second"),
        "tokens_per_forward": of_task.get("tokens_per_forward"),
        "new_tokens": of_task.get("new_tokens"),
    }


def _costs(folder: Path, task: str) -> dict[int, Json]:
    """What is known of how each document's first answer was made; the newest line counts."""
    costs = {}
    for file in sorted(folder.rglob("*.jsonl*")):
        if file.name.startswith("samples_"):
            continue
        for line in _lines(file, whole=False):
            if line.get("task") == task and line.get("repeat") == 0 and "seconds" in line:
                costs[line["document"]] = line
    return costs


def _lines(file: Path, whole: bool = True) -> Iterable[Json]:
    """A JSONL file's objects; where it need not be `whole`, without lines that a killed process left unfinished."""
    # Not splitlines(): a JSON string may hold U+2028 and its like.
    for number, line in enumerate(file.read_text("utf-8").split("\n"), 1):
        if not line:
            continue
        try:
            content = json.loads(line)
        except ValueError as error:
            if not whole:
                continue
            raise UserError(f"{file}, line {number}: not JSON ({error}).") from error
        if isinstance(content, dict):
            yield content


def _first(nested: Any) -> str:
    while isinstance(nested, list):
        nested = nested[0] if nested else ""
    return str(nested)
