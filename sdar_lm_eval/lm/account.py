"""What a rank did in an evaluation: plain data, which a rank sends to rank 0 for the results file."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

from sdar_lm_eval.hashing import hex_digest
from sdar_lm_eval.lm.denoising import DenoisingRecords
from sdar_lm_eval.lm.jobs import Job
from sdar_lm_eval.lm.task_requests import TemplatedBy, repeats_of
from sdar_lm_eval.report.counts import Counts
from sdar_lm_eval.settings import Generation
from sdar_lm_eval.thinking import Thought


@dataclass
class SentPrompts:
    """What was sent for a task.

    Attributes:
        tokens: document -> hashes of its requests' token ids, each once.
        example: the first prompt as text.
        templated_by: who put the prompts into the chat template.
    """

    tokens: dict[int, list[str]] = field(default_factory=dict)
    example: str | None = None
    templated_by: TemplatedBy | None = None

    def add(self, document: int, prompt: str, token_ids: Sequence[int], templated_by: TemplatedBy | None) -> None:
        """Note a request."""
        self.templated_by = templated_by
        hashes, digest = self.tokens.setdefault(document, []), hex_digest(token_ids)
        if digest not in hashes:  # a drawn request has several answers
            hashes.append(digest)
        self.example = prompt if self.example is None else self.example


@dataclass
class Account:
    """What a rank did in an evaluation. Ranks send their accounts to rank 0, so an account holds data alone.

    Attributes:
        seed: seed of sampled answers and masks.
        counts: the work that was done.
        published: task -> the decoding of the task's published protocol, for tasks that have one.
        decoding: task -> the settings that its answers were made with, several where documents have their own.
        sent: task -> what was sent.
        denoising: the denoising records of answers.
        thoughts: task -> (document, request of the document, repeat of the request) -> the answer's thought, or None.
        template_hash: hash of the chat template in use.
        of_engine: the work that only this engine counts.
    """

    seed: int
    counts: Counts = field(default_factory=Counts)
    published: dict[str, dict[str, object]] = field(default_factory=dict)
    decoding: dict[str, list[dict[str, object]]] = field(default_factory=dict)
    sent: dict[str, SentPrompts] = field(default_factory=dict)
    denoising: DenoisingRecords = field(default_factory=DenoisingRecords)
    thoughts: dict[str, dict[tuple[int, int, int], Thought | None]] = field(default_factory=dict)
    template_hash: str | None = None
    of_engine: Counter[str] = field(default_factory=Counter)

    def sent_of(self, task: str) -> SentPrompts:
        """What was sent for a task."""
        return self.sent.setdefault(task, SentPrompts())

    def note_settings(self, of_tasks: Mapping[str, Sequence[Generation]]) -> None:
        """Note the settings that tasks' answers are made with."""
        for task, settings in of_tasks.items():
            noted = self.decoding.setdefault(task, [])
            noted.extend(each for each in (its.as_dict() for its in settings) if each not in noted)

    def note_end(self, job: Job, thought: Thought | None, reason: str, tokens: int) -> None:
        """Note an answer's thought, and count thoughts and loops.

        Args:
            job: the job that was answered.
            thought: the answer's thought; None: it has none.
            reason: why the answer ended.
            tokens: the answer's tokens.
        """
        instance = job.instance
        repeat = job.repeat - instance.idx * repeats_of(instance)
        self.thoughts.setdefault(job.task, {})[job.document, instance.idx, repeat] = thought
        if thought is not None:
            self.counts.count(job.task, thoughts=1, unfinished_thoughts=int(not thought.ended))
        if reason == "repetition":
            saved = max(job.request.max_new_tokens - tokens, 0)
            self.counts.count(job.task, repetitions=1, saved_tokens=saved)


class EvaluationFacts(TypedDict):
    """What the results file says of an evaluation."""

    decoding_of_tasks: dict[str, dict[str, object]]
    published_decoding_of_tasks: dict[str, dict[str, object]]
    prompts: dict[str, dict[str, object]]
    run: dict[str, object]


def facts_of_evaluation(ranks: Sequence[Account]) -> EvaluationFacts:
    """Return what the results file says of an evaluation that some processes did together.

    Args:
        ranks: each process's account of the evaluation.
    """
    decoding: dict[str, list[dict[str, object]]] = {}
    prompts: dict[str, dict[str, object]] = {}
    for of_rank in ranks:
        for task_name, settings in of_rank.decoding.items():
            decoding.setdefault(task_name, []).extend(settings)
    for name in dict.fromkeys(name for of_rank in ranks for name in of_rank.sent):
        sent = [of_rank.sent[name] for of_rank in ranks if name in of_rank.sent]
        tokens = {document: hashes for of_rank in sent for document, hashes in of_rank.tokens.items()}
        by = sent[0].templated_by
        prompts[name] = {
            "chat_template_applied_by": by,
            "chat_template_sha256": ranks[0].template_hash if by else None,
            "tokens_sha256": hex_digest(sorted(tokens.items())),
            "example": sent[0].example,
        }
    return {
        "decoding_of_tasks": {task_name: _united(settings) for task_name, settings in decoding.items()},
        "published_decoding_of_tasks": {name: its for of_rank in ranks for name, its in of_rank.published.items()},
        "prompts": prompts,
        "run": Counts.of_ranks([of_rank.counts for of_rank in ranks]).as_dict(),
    }


def _united(settings: Sequence[Mapping[str, object]]) -> dict[str, object]:
    """The settings of a task: of a setting that differs between documents, the list of its values.

    The values' order does not depend on how ranks share the documents: `compare` would report another order.
    """
    values_of = {name: {json.dumps(each[name]): each[name] for each in settings} for name in settings[0]}
    distinct = {
        name: [values[text] for text in sorted(values, key=lambda text: (len(text), text))]
        for name, values in values_of.items()
    }
    return {name: values[0] if len(values) == 1 else values for name, values in distinct.items()}


def put_thoughts_into(samples: Mapping[str, Sequence[dict[str, Any]]], ranks: Sequence[Account]) -> None:
    """Put the thoughts of answers beside the answers in lm_eval's samples: `thoughts`, in the shape of `resps`.

    A document of a task in which an answer has a thought gets, for each answer, {"text": …, "ended": …} or None.

    Args:
        samples: task -> its samples, as lm_eval returns and saves them.
        ranks: each process's account of the evaluation.
    """
    for task, lines in samples.items():
        found = {key: thought for of_rank in ranks for key, thought in of_rank.thoughts.get(task, {}).items()}
        if not any(found.values()):
            continue
        for line in lines:
            line["thoughts"] = [
                [_thought_of(found, line["doc_id"], request, repeat) for repeat in range(len(answers))]
                for request, answers in enumerate(line["resps"])
            ]


def _thought_of(
    found: Mapping[tuple[int, int, int], Thought | None], document: int, request: int, repeat: int
) -> dict[str, object] | None:
    # An answer that does not depend on a seed is made once, for all repeats.
    thought = found.get((document, request, repeat), found.get((document, request, 0)))
    return None if thought is None else thought.as_dict()
