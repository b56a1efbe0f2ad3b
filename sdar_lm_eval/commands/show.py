"""Lists a run's documents, right and wrong, or prints one document and the denoising of each answer.

With --doc, show takes several runs, and prints their answers to the document one below the other.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sdar_lm_eval.errors import UserError, did_you_mean
from sdar_lm_eval.report import text_table
from sdar_lm_eval.report.denoising import Denoising
from sdar_lm_eval.report.documents import Answer, Document, by_key, documents_of, is_likelihood, main_key
from sdar_lm_eval.report.pairing import over_seeds
from sdar_lm_eval.report.printing import printable
from sdar_lm_eval.report.runs import Metric, Run, read_one_run, read_runs
from sdar_lm_eval.report.terminal import denoised_text, legend

EXAMPLE = "sdar_lm_eval show runs/threshold-0.6 runs/threshold-0.85 --doc 7"

KINDS = {
    "right": "score 1, or 0 where lower values are better",
    "wrong": "another score from 0 to 1",
    "invalid": "the filter found nothing in the answer",
    "cut": "the answer ended at the limit of new tokens",
    "thinking": "the answer ended while the model was thinking",
}
"""Value of `--only` -> the documents that it lists."""
REMARKS = {
    "length": "The answer ended at the limit of new tokens.",
    "repetition": "The answer ended in a loop (stop_repetition).",
}
"""Finish reason -> what `show` says of an answer that ended so."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.add_argument(
        "paths",
        nargs="+",
        metavar="RUN",
        type=Path,
        help="the folder of --output_path; the run needs --log_samples; several runs need --doc",
    )
    parser.add_argument("--task", help="the task; needed if the run has several tasks")
    parser.add_argument(
        "--metric",
        help="the metric that decides right and wrong; default: the published column's, else the task's first",
    )
    parser.add_argument(
        "--filter",
        help="the filter whose extracted answers count; default: the published column's, else the task's first",
    )
    parser.add_argument("--only", choices=KINDS, help="; ".join(f"{name}: {what}" for name, what in KINDS.items()))
    parser.add_argument("--search", metavar="TEXT", help="list only documents whose question or answer has this text")
    parser.add_argument(
        "--doc", type=int, metavar="N", help="print document N (lm_eval's doc_id in the first run) and its answers"
    )
    parser.add_argument(
        "--tokens", action="store_true", help="with --doc: a table of tokens, their blocks, steps and confidences"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> str | None:
    """Print the documents, or one of them, and return None; with --json, return them as JSON.

    Raises:
        UserError: a path holds no run, several runs are given without --doc, or a run lacks the task, its samples, the
            metric or the document.
    """
    if arguments.doc is not None:
        return _show_document(read_runs(arguments.paths), arguments)
    if len(arguments.paths) > 1:
        raise UserError(
            f"show lists the documents of one run, and {len(arguments.paths)} were given. --doc N prints the runs' "
            "answers to document N; sdar_lm_eval compare RUN RUN --list lists the documents that differ."
        )
    run = read_one_run(arguments.paths[0])
    task = _task(run, arguments.task)
    metric = _metric(run, task, arguments.metric, arguments.filter)
    every = _with_samples(run, task, documents_of(run, task))
    if arguments.only in ("right", "wrong"):
        _require_scores(run, task, metric, every, arguments.only)
    chosen = [each for each in every if _is_kind(each, metric, arguments.only) and _has(each, arguments.search)]
    if arguments.json:
        return _as_json([_as_dict(run, each, metric) for each in chosen])
    console = Console(highlight=False)
    console.print(Text(_title(run, task, metric, every, len(chosen))), soft_wrap=True)
    console.print(_table(chosen, metric))
    return None


def _show_document(runs: Sequence[Run], arguments: argparse.Namespace) -> str | None:
    """Print a document and the runs' answers, and return None; with --json, return them as JSON."""
    task = _task(runs[0], arguments.task)
    metrics = [_metric(run, _task(run, task), arguments.metric, arguments.filter) for run in runs]
    documents = _same_document(runs, task, arguments.doc)
    if arguments.json:
        return _as_json([_as_dict(*each) for each in zip(runs, documents, metrics, strict=True)])
    console = Console(highlight=False)
    first = documents[0]
    title = Text(printable(f"{task} {first.index}"), "bold")
    verdict = _verdict(first.score(metrics[0].key), metrics[0])
    console.print(title if len(runs) > 1 else Text.assemble(title, "  ", verdict))
    console.print()
    console.print(Text(printable(first.prompt or first.question)), soft_wrap=True)
    if not arguments.tokens and any(answer.denoising for each in documents for answer in each.answers):
        coloured = console.color_system is not None and not console.no_color
        console.print(legend(coloured), soft_wrap=True)
    for run, document, metric in zip(runs, documents, metrics, strict=True):
        if len(runs) > 1:
            console.print()
            console.print(Text(printable(run.label), "bold"), soft_wrap=True)
        of_likelihoods = is_likelihood(run.results_of(task), task)
        _print_answers(console, metric, document, as_table=arguments.tokens, of_likelihoods=of_likelihoods)
        if (document.prompt, document.as_messages) != (first.prompt, first.as_messages):
            sent = {True: "This run sent chat messages", False: "This run sent a whole prompt"}[document.as_messages]
            what = "This run's prompt differs" if document.as_messages == first.as_messages else sent
            told = f"{what}. `show` of this run alone, with --doc {document.index}, prints the prompt."
            console.print(told, style="yellow", soft_wrap=True)
    return None


def _with_samples(run: Run, task: str, documents: Sequence[Document]) -> Sequence[Document]:
    if not documents:
        raise UserError(f"{run.label} has no samples of {task}. Evaluate again with --log_samples.")
    return documents


def _same_document(runs: Sequence[Run], task: str, index: int) -> list[Document]:
    """Each run's document that the first run numbers `index`."""
    of_runs = by_key(runs, task)
    for run, found in zip(runs, of_runs, strict=True):
        _with_samples(run, task, list(found.values()))
    first = _document(list(of_runs[0].values()), task, index)
    key = next(key for key, each in of_runs[0].items() if each is first)
    for run, found in zip(runs, of_runs, strict=True):
        if key not in found:
            raise UserError(
                f"--doc {index}: {run.label} has no answer to this document of {runs[0].label}. Leave out the run, "
                "or evaluate the document with the run's settings."
            )
    return [found[key] for found in of_runs]


def _task(run: Run, name: str | None) -> str:
    if name is None and len(run.tasks) == 1:
        return run.tasks[0]
    if name in run.of_tasks:
        return str(name)
    given = f"has {len(run.tasks)} tasks" if name is None else f"has no task {name!r}"
    hint = did_you_mean(name, run.tasks) if name else ""
    raise UserError(f"{run.label} {given}; give --task {' or '.join(run.tasks)}.{hint}")


def _metric(run: Run, task: str, name: str | None, filter_name: str | None) -> Metric:
    metrics = run.metrics(task)
    fitting = [each for each in metrics if name in (None, each.name) and filter_name in (None, each.filter)]
    if not fitting:
        run.require_scores(task)
        wanted = " ".join(f"--{n} {v}" for n, v in (("metric", name), ("filter", filter_name)) if v is not None)
        raise UserError(f"{task} has no such score: {wanted}. Its scores: {', '.join(str(m.key) for m in metrics)}.")
    chosen = main_key(run, task)
    return next((each for each in fitting if each.key == chosen), fitting[0])


def _require_scores(run: Run, task: str, metric: Metric, documents: Sequence[Document], only: str) -> None:
    """Raise unless a document can be right or wrong by the metric: a perplexity has no score of single documents."""
    run.require_scores(task)
    if all(each.score(metric.key) is None for each in documents):
        known = dict.fromkeys(str(key) for each in documents for answer in each.answers for key in answer.scores)
        remedy = f"Choose --metric and --filter of {', '.join(known)}, or leave --only out." if known else ""
        raise UserError(
            f"--only {only}: {metric.key} in {task} has no score of single documents. {remedy or 'Leave --only out.'}"
        )


def _document(documents: Sequence[Document], task: str, index: int) -> Document:
    found = next((each for each in documents if each.index == index), None)
    if found is None:
        first, last = documents[0].index, documents[-1].index
        raise UserError(
            f"--doc {index}: the run has no such document of {task}. "
            f"It has {len(documents)} documents, {first} to {last}."
        )
    return found


def _right(metric: Metric) -> int:
    """The score of a right answer."""
    return 0 if metric.higher_is_better is False else 1


def _is_kind(document: Document, metric: Metric, kind: str | None) -> bool:
    """Whether `--only` KIND lists a document."""
    score, right = document.score(metric.key), _right(metric)
    match kind:
        case "right":
            return score == right
        case "wrong":
            return score is not None and score != right and 0 <= score <= 1
        case "invalid":
            return document.is_invalid(metric.filter)
        case "cut":
            return document.is_cut
        case "thinking":
            return document.ended_while_thinking
    return True


def _has(document: Document, text: str | None) -> bool:
    return text is None or any(
        text.casefold() in part.casefold() for part in (document.question, *(a.text for a in document.answers))
    )


def _verdict(score: float | None, metric: Metric) -> Text:
    if score is None:
        return Text("no score", "dim")
    if score in (0, 1):
        return Text("✓ right", "green") if score == _right(metric) else Text("✗ wrong", "red")
    return Text(f"{score:.3g}")


def _extracted(answer: Answer, filter_name: str) -> str:
    return answer.extracted.get(filter_name) or "nothing"


def _title(run: Run, task: str, metric: Metric, documents: Sequence[Document], chosen: int) -> str:
    # The documents' scores need not average to the metric: a perplexity is no mean.
    found = next(each for each in over_seeds(run, task) if each.key == metric.key)
    scores = [score for each in documents if (score := each.score(metric.key)) is not None]
    share = all(0 <= each <= 1 for each in (*scores, found.value))
    shown = text_table.score(found.value, found.stderr, share=share) + "%" * share
    return printable(f"{run.label}: {task}, {metric.key} {shown}; {chosen:,} of {len(documents):,} documents")


def _table(documents: Sequence[Document], metric: Metric) -> Table:
    table = Table(box=None, pad_edge=False, expand=True)
    most = max((each.index for each in documents), default=0)
    for name in ("doc", "tokens", "forwards"):
        table.add_column(name, justify="right", no_wrap=True, min_width=len(str(most)) if name == "doc" else None)
    for name in ("verdict", "extracted", "gold"):
        table.add_column(name, no_wrap=True, max_width=18)
    table.add_column("question", no_wrap=True, ratio=1)
    for each in documents:
        records = [answer.denoising for answer in each.answers if answer.denoising is not None]
        tokens = f"{fmean(len(record.token_ids) for record in records):.0f}" if records else ""
        forwards = f"{fmean(record.made_forwards for record in records):.0f}" if records else ""
        verdict = _verdict(each.score(metric.key), metric)
        if each.is_cut:
            verdict.append(" cut", "yellow")
        if each.ended_while_thinking:
            verdict.append(" thinking", "yellow")
        extracted = ", ".join(dict.fromkeys(_extracted(answer, metric.filter) for answer in each.answers))
        texts = (" ".join(printable(text).split()) for text in (extracted, each.gold, each.question))
        table.add_row(str(each.index), tokens, forwards, verdict, *map(Text, texts))
    return table


def _tokens(record: Denoising) -> Table:
    """A row for each token. Blocks, steps of a block and tokens count from 1."""
    table = Table(box=None, pad_edge=False)
    for name in ("token", "block", "step", "confidence"):
        table.add_column(name, justify="right")
    table.add_column("text")
    for number, block in enumerate(record.blocks, 1):
        for i in block:
            step = "" if record.steps is None else str(record.steps[i] + 1)
            confidence = "" if record.confidences is None else f"{record.confidences[i]:.4f}"
            text = Text(repr(printable(record.texts[i])))
            table.add_row(str(i + 1), str(number), step, confidence, text)
    return table


def _print_answers(
    console: Console, metric: Metric, document: Document, *, as_table: bool, of_likelihoods: bool
) -> None:
    """Print a document's answers: their texts or denoising, `as_table` a row for each token; then what was extracted.

    Args:
        console: prints.
        metric: decides right and wrong.
        document: the document.
        as_table: whether denoised answers are tables of tokens.
        of_likelihoods: whether the task compares log-likelihoods.
    """
    for number, answer in enumerate(document.answers):
        named = "answer" if len(document.answers) == 1 else f"answer {number + 1} of {len(document.answers)}"
        record = answer.denoising
        console.rule(Text.assemble(f"{named}  ", _verdict(answer.scores.get(metric.key), metric)), align="left")
        if record is None:
            if answer.thought is not None and answer.thought.text:
                console.print(Text(printable(answer.thought.text), "dim"), soft_wrap=True)
            console.print(Text(printable(answer.text)), soft_wrap=True)
            if not of_likelihoods:  # the model wrote nothing
                console.print("The run has no record of how the answer was written.", style="dim")
        else:
            console.print(_tokens(record) if as_table else denoised_text(record), soft_wrap=True)
            console.print()
            console.print(Text(_cost(record)))
            if record.finish_reason in REMARKS:
                console.print(REMARKS[record.finish_reason], style="yellow")
        if answer.ended_while_thinking:
            console.print("The answer ended while the model was thinking: its scored text is empty.", style="yellow")
        console.print()
        for filter_name in answer.extracted:
            extracted, name = printable(_extracted(answer, filter_name)), printable(filter_name)
            if filter_name == "none":  # lm_eval's name where a task has no filters
                if extracted == printable(answer.text):
                    continue
                name = "chosen" if of_likelihoods else "extracted"
            console.print(Text.assemble((f"{name}: ", "dim"), extracted), soft_wrap=True)
        console.print(Text.assemble(("gold: ", "dim"), printable(document.gold)), soft_wrap=True)


def _cost(record: Denoising) -> str:
    tokens, tokens_per_forward = len(record.token_ids), record.tokens_per_forward
    rate = "" if tokens_per_forward is None else f", {tokens_per_forward:.2f} tokens per forward"
    denoising, commit = (record.forwards.get(name, 0) for name in ("denoising", "commit"))
    return f"{tokens} tokens, {denoising} denoising and {commit} commit forwards{rate}, {record.seconds:.2f} s"


def _as_json(documents: Sequence[dict[str, object]]) -> str:
    return json.dumps(documents, indent=2, ensure_ascii=False)


def _as_dict(run: Run, document: Document, metric: Metric) -> dict[str, object]:
    return {
        "run": run.label,
        "document": document.index,
        "score": document.score(metric.key),
        "question": document.question,
        "prompt": document.prompt,
        "gold": document.gold,
        "answers": [
            {
                "text": answer.text,
                **({} if answer.thought is None else answer.thought.as_record()),
                "extracted": dict(answer.extracted),
                "scores": [{"metric": m.name, "filter": m.filter, "value": v} for m, v in answer.own_scores.items()],
                "denoising": None if answer.denoising is None else answer.denoising.as_dict(),
            }
            for answer in document.answers
        ],
    }
