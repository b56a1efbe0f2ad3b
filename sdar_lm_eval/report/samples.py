"""A line of a samples file: a document's answers, and what a filter made of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from sdar_lm_eval.decoding import spelled
from sdar_lm_eval.report.fields import Fields
from sdar_lm_eval.thinking import Thought

QUESTION_KEYS = (
    "question", "problem", "query", "instruction", "prompt", "text", "input", "ctx", "context", "sentence", "goal",
)  # fmt: skip
"""Names of document fields that may hold the question; the first that a document has counts."""


@dataclass(frozen=True)
class Sample:
    """A line of a samples file: a document's answers, with what one of the task's filters made of them.

    Attributes:
        document: the document's index in the data set.
        filter: the filter's name.
        doc: the document; empty where the task's documents are no objects.
        target: the gold answer.
        prompt: the first prompt that was sent for the document; "" where the line does not say.
        as_messages: whether chat messages were sent, which a server puts into a chat template; `prompt` is their text.
        responses: the answers; for log-likelihoods each pair (log-likelihood, is greedy) as text.
        filtered: the filter's value of the first answer.
        doc_hash: lm_eval's hash of the document; None in old files.
        prompt_hash: lm_eval's hash of `prompt`; None in old files.
        line: the whole line, which has a value under the name of each metric.
    """

    document: int
    filter: str
    doc: Mapping[str, object]
    target: str
    prompt: str
    as_messages: bool
    responses: tuple[str, ...]
    filtered: str
    doc_hash: str | None
    prompt_hash: str | None
    line: Fields

    @property
    def response(self) -> str:
        """The first answer; "" where there is none."""
        return self.responses[0] if self.responses else ""

    @property
    def named_question(self) -> str:
        """The document's first field named in `QUESTION_KEYS`; "" where it has none of these."""
        named = (self.doc.get(name) for name in QUESTION_KEYS)
        return next((text for text in named if isinstance(text, str) and text.strip()), "")

    @property
    def question(self) -> str:
        """The document's question: the field that is named so, else the prompt, else the document's first text."""
        texts = (value for value in self.doc.values() if isinstance(value, str) and value.strip())
        return self.named_question or self.prompt or next(texts, "")

    @property
    def extracted(self) -> str:
        """What was scored: `filtered`; for several choices with log-likelihoods, the likeliest choice."""
        scored = self.line.content.get("filtered_resps")
        likelihoods = [_log_likelihood(pair) for pair in scored] if isinstance(scored, list) else []
        known = [value for value in likelihoods if value is not None]
        if len(known) < 2 or len(known) < len(likelihoods):
            return self.filtered
        likeliest = self.continuation(known.index(max(known)))
        return (self.filtered if likeliest is None else likeliest).strip()

    def extracted_from(self, repeat: int) -> str | None:
        """What was scored of an answer, from 0; None where the filter has one value for several answers: the first's.

        Filters that keep all answers, as those of tasks with a mean over repeats, have a value for each.
        """
        of_requests = self.line.content.get("filtered_resps")
        values = of_requests[0] if isinstance(of_requests, list) and len(of_requests) == 1 else None
        if len(self.responses) > 1 and isinstance(values, list) and len(values) == len(self.responses):
            return first_of(values[repeat])
        return self.extracted if repeat == 0 else None

    def continuation(self, request: int) -> str | None:
        """Return the text whose log-likelihood a request asked for; None where the request asked for an answer."""
        text = _arguments(self.line, request).get("arg_1")
        return text if isinstance(text, str) else None

    @property
    def asks_for_answers(self) -> bool:
        """Whether the requests asked for generated answers; False: for log-likelihoods."""
        return isinstance(_arguments(self.line, 0).get("arg_1"), dict)

    def thought(self, number: int) -> Thought | None:
        """Return the thought of one of `responses`; None where the response has none."""
        of_requests = self.line.content.get("thoughts")
        thoughts = [each for answers in of_requests for each in answers] if isinstance(of_requests, list) else []
        found = thoughts[number] if number < len(thoughts) else None
        if not isinstance(found, dict) or not isinstance(found.get("text"), str):
            return None
        return Thought(found["text"], ended=found.get("ended") is not False)


def sample_of(line: Fields) -> Sample:
    """Return a line of a samples file.

    Raises:
        UserError: the line has no document number or no filter.
    """
    document, filter_name, doc = line.whole("doc_id"), line.text("filter"), line.content.get("doc")
    if document is None:
        raise line.malformed("doc_id", "a whole number")
    if filter_name is None:
        raise line.malformed("filter", "a string")
    sent = _arguments(line, 0).get("arg_0")
    as_messages = False
    if isinstance(sent, list) and len(sent) == 1:  # as JSON: a named tuple of lm_eval's API models
        as_messages = True
        sent = _conversation(str(sent[0]))
    return Sample(
        document=document,
        filter=filter_name,
        doc=doc if isinstance(doc, dict) else {},
        target=str(line.content.get("target")),
        prompt=sent if isinstance(sent, str) else "",
        as_messages=as_messages,
        responses=tuple(_flat(line.content.get("resps"))),
        filtered=first_of(line.content.get("filtered_resps")),
        doc_hash=line.text("doc_hash"),
        prompt_hash=line.text("prompt_hash"),
        line=line,
    )


def _arguments(line: Fields, request: int) -> Mapping[str, object]:
    """The arguments of a request: "arg_0" is what was sent, "arg_1" the generation's settings or the continuation."""
    return line.part_or_empty("arguments").part_or_empty(f"gen_args_{request}").content


def _conversation(text: str) -> str:
    """Chat messages that are JSON as "role: content", a blank line between them; any other text unchanged."""
    try:
        messages = json.loads(text)
        return "\n\n".join(f"{each['role']}: {spelled(each['content'])}" for each in messages)
    except (ValueError, TypeError, KeyError, RecursionError):
        return text


def _log_likelihood(pair: object) -> float | None:
    """The log-likelihood of a pair (log-likelihood, is greedy), which lm_eval writes as text; None for other values."""
    if not isinstance(pair, list) or len(pair) != 2 or str(pair[1]) not in ("True", "False"):
        return None
    try:
        return float(pair[0])
    except (TypeError, ValueError, OverflowError):
        return None


def _flat(nested: object) -> Iterator[str]:
    """Yield the answers in lists of any depth; a pair (log-likelihood, is greedy) is one answer."""
    if isinstance(nested, list) and not (len(nested) == 2 and isinstance(nested[1], bool)):
        for part in nested:
            yield from _flat(part)
    elif nested is not None:
        yield str(nested)


def first_of(nested: object) -> str:
    """Return the first value in lists of any depth, as text; "" where there is none."""
    while isinstance(nested, list):
        nested = nested[0] if nested else ""
    return str(nested)
