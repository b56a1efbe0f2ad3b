"""Live accuracy, and a log of each example, while answers come in.

The harness scores when all answers are there, and its scores are the ones that count. Until then a task's *judge*
predicts the harness's score. A judge is a function (document, answer) -> `Verdict`, which applies one of the task's own
filters and its metric. The task's YAML names the judge:

    metadata:
      sdar_judge:
        title: GSM8K                                  what the progress bar says
        verdict: sdar_lm_eval.tasks.gsm8k:verdict     module:function

A task without a judge has no live accuracy.
"""

from __future__ import annotations

import importlib
import itertools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sdar_lm_eval.engines.types import GenerationRequest, GenerationResult
from sdar_lm_eval.errors import UserError
from sdar_lm_eval.files import shown
from sdar_lm_eval.thinking import Thought

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

logger = logging.getLogger(__name__)

BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}] "


@dataclass(frozen=True)
class Verdict:
    """What the harness will find in an answer.

    Attributes:
        predicted: the filter's value of the answer.
        gold: the task's `doc_to_target` of the document.
        correct: whether the metric counts the answer as right.
        filter: the name of the filter that was applied.
    """

    predicted: str
    gold: str
    correct: bool
    filter: str


Judge = Callable[[Mapping[str, object], str], Verdict]
Filter = Callable[[Mapping[str, object], str], tuple[object, str]]
"""Returns what a task's filter of lm_eval makes of a document's only answer, and the document's `doc_to_target`."""


class Live:
    """Judges the answers of a round as they come in.

    Args:
        tasks: task -> its `sdar_judge`; None for a task without one.
        total: the number of answers to come.
        whole: whether these are all answers of the round; False: one rank's share.
        filters: task -> name -> the task's filter of this name; tasks whose filters are unknown are missing or empty.

    Raises:
        UserError: a task's `sdar_judge` is incomplete, or names a function that cannot be imported.
    """

    def __init__(
        self,
        tasks: Mapping[str, Mapping[str, str] | None],
        total: int,
        whole: bool = True,
        filters: Mapping[str, Mapping[str, Filter]] | None = None,
    ) -> None:
        known = {task: judge for task, judge in sorted(tasks.items()) if judge is not None}
        self._judges = {task: _load(task, judge) for task, judge in known.items()}
        # An accuracy over only some tasks would mislead.
        self.knows_accuracy = bool(tasks) and len(known) == len(tasks)
        self.title = " ".join(dict.fromkeys(judge["title"] for judge in known.values())) + " Eval"
        self.whole = whole
        self._filters = filters or {}
        self._total = total
        self._answered = 0
        self._tallies = {task: _Tally() for task in sorted(tasks)}

    def judge(self, task: str, instance: Instance, text: str) -> Verdict | None:
        """Count an answer to a task's request, and return its verdict; None for a task without a judge."""
        self._answered += 1
        judge = self._judges.get(task)
        if judge is None:
            return None
        try:
            verdict = judge(instance.doc, text)
            if known := self._filters.get(task):
                _check(task, verdict, known, instance.doc, text)
        except Exception as error:  # say, a user's variant with other documents; the run is worth more than a verdict
            why = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            logger.warning("Live accuracy is switched off: %s", why)
            self._judges.clear()
            self.knows_accuracy = False
            return None
        tally = self._tallies[task]
        tally.judged += 1
        tally.correct += verdict.correct
        tally.filter = verdict.filter
        return verdict

    def bar(self, seconds: float, computed: int) -> str:
        """Return the progress bar's format, after `computed` answers took `seconds`."""
        if not self.knows_accuracy:
            return BAR
        pace = f" | {seconds / computed:.1f}s/q" if computed else ""
        judged = {task: f"{tally.accuracy:.1%}" for task, tally in self._tallies.items() if tally.judged}
        told = ", ".join(f"{task} {share}" for task, share in judged.items())
        if len(self._tallies) == 1:
            told = next(iter(judged.values()), "0.0%")
        return f"{BAR}Acc: {told}{pace}"

    def example(
        self,
        instance: Instance,
        request: GenerationRequest,
        result: GenerationResult,
        text: str,
        verdict: Verdict | None,
        thought: Thought | None = None,
    ) -> str:
        """Return the log of one example."""
        length = request.decoding.block_length
        blocks = -(-(len(request.prompt_ids) % length + len(result.token_ids)) // length)
        speed = len(result.token_ids) / result.seconds if result.seconds else 0.0
        lines = [
            "=" * 80,
            f"Example {self._answered}/{self._total}",
            f"Question: {_question(instance)}",
            f"Generated: {len(result.token_ids)} tokens in {blocks} blocks and {result.seconds:.2f} s ({speed:.1f} "
            f"tok/s; the prompt has {len(request.prompt_ids)}; ended by {result.finish_reason})",
            *_denoised(request, result),
            *([] if thought is None else [f"Thought{'' if thought.ended else ', not ended'}: {thought.text}"]),
            f"Text: {text}",
        ]
        if verdict is not None:
            lines += [
                f"Predicted: {verdict.predicted} ({verdict.filter})",
                f"Ground truth: {verdict.gold}",
                f"Correct: {'✓' if verdict.correct else '✗'}",
            ]
        return "\n".join(lines)

    def summary(self, seconds: float, computed: int, tokens: int) -> list[str]:
        """Return the lines that end a round: one for each task, and the speed of `computed` answers of `tokens`."""
        accuracies = [
            f"accuracy {tally.accuracy:.1%} ({tally.correct}/{tally.judged}, {tally.filter})"
            for tally in self._tallies.values()
        ]
        pace = f"{seconds / computed:.2f} s a question, {tokens / seconds:,.1f} returned tokens/s, " if computed else ""
        if len(accuracies) == 1:
            return [f"{self.title}: {accuracies[0]}, {pace}{seconds:.1f} s"]
        of_tasks = [f"{task}: {accuracy}" for task, accuracy in zip(self._tallies, accuracies, strict=True)]
        return [*of_tasks, f"{self.title}: {pace}{seconds:.1f} s"]


@dataclass
class _Tally:
    """Number of a task's answers that were judged so far, and number of right answers."""

    judged: int = 0
    correct: int = 0
    filter: str = ""

    @property
    def accuracy(self) -> float:
        return self.correct / self.judged if self.judged else 0.0


def steps_of(request: GenerationRequest, result: GenerationResult) -> list[list[tuple[int, int, float]]] | None:
    """Return each block's steps as (masked, transferred, mean confidence); None where steps are not recorded.

    Only returned tokens count. Tokens behind the end of the answer are not recorded, so a step that unmasked nothing
    but these is left out.
    """
    if result.unmasked_at is None or result.confidences is None:
        return None
    length = request.decoding.block_length
    first = len(request.prompt_ids) % length  # number of the prompt's tokens in the first block
    tokens = zip(result.unmasked_at, result.confidences, strict=True)
    blocks = []
    for _, placed in itertools.groupby(enumerate(tokens, first), key=lambda token: token[0] // length):
        of_block = sorted(token for _, token in placed)
        steps, masked = [], len(of_block)
        for _, kept in itertools.groupby(of_block, key=lambda token: token[0]):
            confidences = [confidence for _, confidence in kept]
            steps.append((masked, len(confidences), sum(confidences) / len(confidences)))
            masked -= len(confidences)
        blocks.append(steps)
    return blocks


def _denoised(request: GenerationRequest, result: GenerationResult) -> list[str]:
    blocks = steps_of(request, result)
    if not blocks:
        return []
    head = "Denoised (masked -> transferred, their mean confidence; a step each):"
    width = len(str(len(blocks)))
    return [head] + [
        f"  block {number:{width}}: " + ", ".join(f"{masked} -> {kept} {mean:.3f}" for masked, kept, mean in steps)
        for number, steps in enumerate(blocks, 1)
    ]


def _question(instance: Instance) -> str:
    doc = instance.doc
    question = doc.get("question") if isinstance(doc, Mapping) else None
    return str(question if isinstance(question, str) else instance.args[0])


def _check(task: str, verdict: Verdict, filters: Mapping[str, Filter], doc: Mapping[str, object], text: str) -> None:
    """Raise `UserError` unless a task finds what its judge found: a variant may have filters and gold of its own."""
    if verdict.filter not in filters:
        found = f"which is none of the task's ({', '.join(filters)})"
    elif (theirs := filters[verdict.filter](doc, text)) != (verdict.predicted, verdict.gold):
        found = (
            f"and finds {shown(verdict.predicted)} (gold: {shown(verdict.gold)}) where the task finds "
            f"{shown(theirs[0])} (gold: {shown(theirs[1])})"
        )
    else:
        return
    raise UserError(
        f"the judge of {task} applies the filter {verdict.filter}, {found}. Name another judge in the task's YAML "
        "(metadata: sdar_judge:)."
    )


def _load(task: str, judge: Mapping[str, str]) -> Judge:
    if missing := [key for key in ("title", "verdict") if key not in judge]:
        raise UserError(f"task {task!r}: metadata: sdar_judge: of its YAML has no {' and no '.join(missing)}.")
    module, _, name = judge["verdict"].partition(":")
    try:
        function: Judge = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"task {task!r}: its judge {judge['verdict']!r} cannot be imported ({error}). Name it as module:function "
            "under metadata: sdar_judge: of the task's YAML; PYTHONPATH must hold the module's folder."
        ) from error
    return function
