"""How answers were written: a file beside a run's samples, `denoising_<task>_<date>.jsonl.gz`.

The first line names the format and its version; each further line is an answer:

    {"format": "sdar_lm_eval/denoising", "version": 1, "task": …}
    {"document": 3, "repeat": 0, "block_length": 4, "prompt_tokens": 57, "token_ids": […], "texts": […],
     "steps": […], "confidences": […], "finish_reason": "stop", "forwards": {…}, "seconds": 0.12}

    document        the document's index in the data set
    repeat          from 0, where a document has several answers
    prompt_tokens   tokens of the prompt. The answer's first block begins at the last multiple of block_length that is
                    not behind the prompt, so its first prompt_tokens % block_length tokens are the prompt's
    token_ids       the answer's tokens, as the engine returned them; lm_eval's text is cut before the first `until`
    texts           the text of each token. Of several tokens that encode one character, the last one has the character
    steps           the step of its block that unmasked each token, from 0; null where the engine does not record steps
    confidences     10,000 times the probability of each token when it was drawn; null where steps is null
    finish_reason   "stop" or "length"
    forwards        how often the prompt (prefill) and blocks (denoising, commit) went through the model
    seconds         from the answer's first forward to its last

A version changes when a field changes its meaning or goes; readers pass over fields that they do not know.
"""

from __future__ import annotations

import dataclasses
import gzip
import itertools
import json
import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from sdar_lm_eval.errors import UserError
from sdar_lm_eval.files import one_line, shown

FORMAT, VERSION = "sdar_lm_eval/denoising", 1
CONFIDENCE_SCALE = 10_000

_NOT_AS_WRITTEN = (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError)
"""What lines that this package did not write raise where they are read."""


class DenoisingLine(TypedDict):
    """An answer's line; the module's docstring says what each field means."""

    document: int
    repeat: int
    block_length: int
    prompt_tokens: int
    token_ids: Sequence[int]
    texts: Sequence[str]
    steps: Sequence[int] | None
    confidences: Sequence[int] | None
    finish_reason: str
    forwards: Mapping[str, int]
    seconds: float


@dataclass(frozen=True)
class Denoising:
    """How an answer was written.

    Attributes:
        document: the document's index in the data set.
        repeat: from 0, where a document has several answers.
        block_length: tokens of a block.
        prompt_tokens: tokens of the prompt.
        token_ids: the answer's tokens.
        texts: the text of each token.
        steps: the step of its block that unmasked each token, from 0; None where the engine does not record steps.
        confidences: the probability of each token when it was drawn, 0 to 1; None where steps is None.
        finish_reason: "stop" or "length".
        forwards: how often the prompt (prefill) and blocks (denoising, commit) went through the model.
        seconds: from the answer's first forward to its last.
    """

    document: int
    repeat: int
    block_length: int
    prompt_tokens: int
    token_ids: tuple[int, ...]
    texts: tuple[str, ...]
    steps: tuple[int, ...] | None
    confidences: tuple[float, ...] | None
    finish_reason: str
    forwards: Mapping[str, int]
    seconds: float

    @property
    def blocks(self) -> list[range]:
        """The indices of the answer's tokens, block by block."""
        end = len(self.token_ids)
        first = self.block_length - self.prompt_tokens % self.block_length
        borders = [0, *range(first, end, self.block_length), end]
        return [range(a, b) for a, b in itertools.pairwise(borders) if b > a]

    @property
    def global_steps(self) -> tuple[int, ...] | None:
        """The denoising step of the answer that unmasked each token, from 0, steps of earlier blocks counted."""
        if self.steps is None:
            return None
        found: list[int] = []
        before = 0
        for block in self.blocks:
            of_block = self.steps[block.start : block.stop]
            found += [before + step for step in of_block]
            before += max(of_block) + 1
        return tuple(found)

    def as_dict(self) -> dict[str, object]:
        """The record as plain values."""
        return dataclasses.asdict(self)


def denoising_file(samples: Path) -> Path:
    """Return the file of a task's denoising records beside the task's samples file."""
    return samples.with_name("denoising_" + samples.name.removeprefix("samples_") + ".gz")


def write_denoising(file: Path, task: str, lines: Iterable[DenoisingLine]) -> None:
    """Write a task's records.

    Raises:
        OSError: the file cannot be written.
    """
    with gzip.open(file, "wt", encoding="utf-8", errors="surrogatepass", newline="\n") as out:
        out.write(json.dumps({"format": FORMAT, "version": VERSION, "task": task}) + "\n")
        for line in lines:
            out.write(json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n")


def read_denoising(file: Path) -> list[Denoising]:
    """Return a task's records.

    Raises:
        UserError: the file cannot be read, or is not of this format and version.
    """
    try:
        with gzip.open(file, "rt", encoding="utf-8", errors="surrogatepass", newline="\n") as lines:
            head = json.loads(next(lines, "null"))
            if not isinstance(head, dict) or head.get("format") != FORMAT:
                raise UserError(f"{file} holds no denoising records of sdar_lm_eval. Remove it, or evaluate again.")
            if head.get("version") != VERSION:
                raise UserError(
                    f"{file} has version {shown(head.get('version'))} of the denoising format; this package reads "
                    f"version {VERSION}. Read it with the package that wrote it."
                )
            return [_denoising(json.loads(line)) for line in lines]
    except (OSError, EOFError, zlib.error, *_NOT_AS_WRITTEN) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file} cannot be read ({one_line(error)}). Remove it, or evaluate again.") from error


def _denoising(line: DenoisingLine) -> Denoising:
    tokens = tuple(map(int, line["token_ids"]))
    steps, confidences = line["steps"], line["confidences"]
    found = Denoising(
        document=int(line["document"]),
        repeat=int(line["repeat"]),
        block_length=int(line["block_length"]),
        prompt_tokens=int(line["prompt_tokens"]),
        token_ids=tokens,
        texts=tuple(map(str, line["texts"])),
        steps=None if steps is None else tuple(map(int, steps)),
        confidences=None if confidences is None else tuple(c / CONFIDENCE_SCALE for c in confidences),
        finish_reason=str(line["finish_reason"]),
        forwards={name: int(number) for name, number in line["forwards"].items()},
        seconds=float(line["seconds"]),
    )
    lists = [each for each in (found.texts, found.steps, found.confidences) if each is not None]
    if found.block_length < 1 or any(len(each) != len(tokens) for each in lists):
        raise ValueError(f"document {found.document}: lists of different lengths")
    if (found.steps is None) != (found.confidences is None):
        raise ValueError(f"document {found.document}: steps without confidences, or confidences without steps")
    numbers = (*(found.steps or ()), *(found.confidences or ()), *found.forwards.values(), found.seconds)
    if not all(math.isfinite(number) and number >= 0 for number in numbers) or found.prompt_tokens < 0:
        raise ValueError(f"document {found.document}: numbers below 0, or none")
    return found
