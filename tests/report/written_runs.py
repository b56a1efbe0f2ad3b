"""Runs as lm_eval and this package write them, made of a few numbers: results, samples and denoising files."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sdar_lm_eval.report.denoising import DenoisingLine, denoising_file, write_denoising


def write_answers(
    folder: Path,
    answers: Sequence[Sequence[str]],
    *,
    gold: Sequence[str] | None = None,
    questions: Sequence[str] | None = None,
    task: str = "gsm8k_sdar",
    model: str = "sdar",
    settings: dict[str, Any] | None = None,
    records: Sequence[DenoisingLine] = (),
    extracted: Sequence[str] | None = None,
    date: int = 1,
    seed: int = 1234,
    prompt: str = "Question: {}\nAnswer:",
    messages: bool = False,
) -> Path:
    """Write a run of one task, whose filters take the last word of an answer, and return its folder.

    Args:
        folder: where to.
        answers: document -> its answers.
        gold: document -> the gold answer; None: "7" for all.
        questions: document -> its question.
        task: the task's name.
        model: lm_eval's name of the model; "sdar" has settings and costs of this package.
        settings: decoding settings.
        records: lines of the denoising file; none: no file.
        extracted: document -> what the filters extract, where it is not the last word.
        date: when the run began.
        seed: the run's.
        prompt: the text that was sent, with the question's place.
        messages: whether it was sent as a chat message.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines, scores = [], []
    for document, texts in enumerate(answers):
        target = gold[document] if gold else "7"
        question = questions[document] if questions else f"What is question {document}?"
        found = extracted[document] if extracted else (texts[0].split() or ["[invalid]"])[-1]
        scores.append(float(found == target))
        sent: Any = prompt.format(question)
        if messages:  # as lm_eval's API models write it
            sent = [json.dumps([{"role": "user", "content": sent}])]
        doc = {"question": question, "answer": f"#### {target}"}
        for name in ("strict-match", "flexible-extract"):
            lines.append(
                {
                    "doc_id": document,
                    "doc": doc,
                    "target": target,
                    "arguments": {"gen_args_0": {"arg_0": sent, "arg_1": {"until": []}}},
                    "resps": [list(texts)],
                    "filtered_resps": [found],
                    "filter": name,
                    "metrics": ["exact_match"],
                    "doc_hash": hashlib.sha256(json.dumps(doc).encode()).hexdigest(),
                    "prompt_hash": str(int(messages)),
                    "target_hash": "0",
                    "exact_match": scores[-1],
                }
            )
    mean = sum(scores) / max(len(scores), 1)
    ours = {
        "pretrained": "m",
        "decoding_of_tasks": {task: {"block_length": 4, **(settings or {})}},
        "run": {
            "new_tokens": 90,
            "forwards": {"prefill": 1, "denoising": 50, "commit": 10},
            "generation_seconds": 0.1,
        },
        "seed": seed,
    }
    results = {
        "results": {task: {f"exact_match,{name}": mean for name in ("strict-match", "flexible-extract")}},
        "configs": {task: {"output_type": "generate_until"}},
        "config": {
            "model": model,
            "model_args": {"model" if messages else "pretrained": "m"},
            **({"sdar_lm_eval": ours} if model == "sdar" else {"gen_kwargs": settings or {}}),
        },
        "model_name": "m",
        "date": float(date),
        "n-samples": {task: {"original": len(answers), "effective": len(answers)}},
        "higher_is_better": {task: {"exact_match": True}},
        "group_subtasks": {},
    }
    (folder / f"results_{date}.json").write_text(json.dumps(results))
    samples = folder / f"samples_{task}_{date}.jsonl"
    samples.write_text("".join(json.dumps(line) + "\n" for line in lines))
    if records:
        write_denoising(denoising_file(samples), task, records)
    return folder


def record(
    document: int,
    texts: Sequence[str],
    steps: Sequence[int] | None,
    confidences: Sequence[int] | None = None,
    *,
    repeat: int = 0,
    block_length: int = 4,
    prompt_tokens: int = 8,
    finish_reason: str = "stop",
) -> DenoisingLine:
    """Return a line of a denoising file."""
    if confidences is None and steps is not None:
        confidences = [9_000] * len(texts)
    return DenoisingLine(
        document=document,
        repeat=repeat,
        block_length=block_length,
        prompt_tokens=prompt_tokens,
        token_ids=list(range(len(texts))),
        texts=list(texts),
        steps=steps,
        confidences=confidences,
        finish_reason=finish_reason,
        forwards={"prefill": 1, "denoising": 9, "commit": 2},
        seconds=0.25,
    )


def large_run(folder: Path, documents: int, tokens: int, seed: int, shots: int = 4) -> Path:
    """Write a run of many long answers of random words, with prompts of some shots."""
    draw = random.Random(seed)
    shared = random.Random(0)
    vocabulary = [" " + "".join(shared.choices("etaoinshrdlu", k=shared.randint(1, 8))) for _ in range(4_000)]
    answers, records, gold = [], [], []
    questions = [" ".join(shared.choices(vocabulary, k=45)) for _ in range(documents)]
    for document in range(documents):
        gold.append(str(shared.randint(0, 9)))
        texts = [*draw.choices(vocabulary, k=tokens - 1), f" {draw.randint(0, 9)}"]
        steps: list[int] = []
        while len(steps) < tokens:  # a block: some tokens at once, then one by one
            kept = [min(3, draw.randint(0, 3)) for _ in range(4)]
            order = sorted(set(kept))
            steps += [order.index(step) for step in kept]
        confidences = [10_000 if draw.random() < 0.5 else draw.randint(1_000, 9_999) for _ in range(tokens)]
        answers.append(["".join(texts)])
        records.append(record(document, texts, steps[:tokens], confidences, prompt_tokens=900))
    example = "Question: " + " ".join(shared.choices(vocabulary, k=60)) + "\nAnswer: " + "x " * 100 + "\n\n"
    return write_answers(
        folder, answers, gold=gold, questions=questions, records=records, settings={"confidence_threshold": seed / 10},
        prompt=example * shots + "Question: {}\nAnswer:",
    )  # fmt: skip


def add_thoughts(folder: Path, thoughts: Mapping[int, tuple[str, bool]]) -> Path:
    """Put thoughts into a run's samples file: document -> the thought of its only answer, and whether it has an end."""
    (file,) = folder.glob("samples_*")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for line in lines:
        if line["doc_id"] in thoughts:
            text, ended = thoughts[line["doc_id"]]
            line["thoughts"] = [[{"text": text, "ended": ended}]]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder
