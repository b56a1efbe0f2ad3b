"""Denoising records, which say how answers were written: `denoising_<task>_<date>.jsonl.gz` beside a run's samples.

The first line names the format and its version. Each further line is the record of one answer:

    {"format": "sdar_lm_eval/denoising", "version": 1, "task": …}
    {"document": 3, "repeat": 0, "block_length": 4, "prompt_tokens": 57, "token_ids": […], "texts": […],
     "steps": […], "confidences": […], "finish_reason": "stop", "forwards": {…}, "seconds": 0.12}

    document        the document's index in the data set
    repeat          number of the answer among the document's answers, from 0
    block_length    tokens in a block
    prompt_tokens   number of tokens in the prompt. Blocks count from the prompt's first token, so the first
                    prompt_tokens % block_length tokens of the answer's first block are the prompt's
    token_ids       the answer's tokens, as the engine returned them, with its thought; lm_eval's text is what follows
                    the thought, before the first `until`
    texts           the text of each token. Where several tokens encode one character, the last token has the character
    steps           for each token the step within its block that unmasked the token, from 0; null where the engine
                    does not record steps
    confidences     10,000 times the probability of each token when it was drawn; 10,000 for an inserted think
                    end (max_thinking_toks); null where steps is null
    finish_reason   "stop", "length" or "repetition"
    forwards        number of forwards by kind: of the prompt (prefill), of blocks (denoising, commit)
    seconds         time from the answer's first forward to its last
    forced_tokens   number of tokens that were not drawn: an inserted think end; not in the line where it is 0

The version changes when a field is removed or changes its meaning. Readers ignore fields that they do not know.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import itertools
import json
import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from sdar_lm_eval.errors import UserError
from sdar_lm_eval.files import one_line, shown

if TYPE_CHECKING:
    from typing_extensions import NotRequired

FORMAT, VERSION = "sdar_lm_eval/denoising", 1
CONFIDENCE_SCALE = 10_000

_NOT_AS_WRITTEN = (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError)
"""Errors that reading raises on lines that this package did not write."""


class DenoisingLine(TypedDict):
    """An answer's record as a line of the file has it; the module's docstring says what each field means."""

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
    forced_tokens: NotRequired[int]


@dataclass(frozen=True)
class Denoising:
    """The denoising record of an answer: how the answer was written.

    Attributes:
        document: the document's index in the data set.
        repeat: number of the answer among the document's answers, from 0.
        block_length: tokens in a block.
        prompt_tokens: number of tokens in the prompt.
        token_ids: (T,) the answer's tokens.
        texts: (T,) the text of each token.
        steps: (T,) the step within its block that unmasked each token, from 0; None where the engine does not record
            steps.
        confidences: (T,) the probability of each token when it was drawn, 0 to 1; None where steps is None.
        finish_reason: "stop", "length" or "repetition".
        forwards: "prefill", "denoising" and "commit" -> number of forwards.
        seconds: time from the answer's first forward to its last.
        forced_tokens: number of tokens that were not drawn.
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
    forced_tokens: int = 0

    @property
    def drawn_tokens(self) -> int:
        """Number of tokens that were drawn: those that tokens per forward counts."""
        return len(self.token_ids) - self.forced_tokens

    @property
    def made_forwards(self) -> int:
        """Number of forwards that denoised or committed blocks: those that tokens per forward counts."""
        return self.forwards.get("denoising", 0) + self.forwards.get("commit", 0)

    @property
    def tokens_per_forward(self) -> float | None:
        """Drawn tokens over denoising and commit forwards; None without forwards."""
        return self.drawn_tokens / self.made_forwards if self.made_forwards else None

    @property
    def blocks(self) -> list[range]:
        """For each block the indices into `token_ids` of its tokens."""
        end = len(self.token_ids)
        first = self.block_length - self.prompt_tokens % self.block_length
        borders = [0, *range(first, end, self.block_length), end]
        return [range(a, b) for a, b in itertools.pairwise(borders) if b > a]

    @property
    def global_steps(self) -> tuple[int, ...] | None:
        """(T,) the step that unmasked each token, counted from 0 over the whole answer; None where `steps` is None."""
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
        """Return the record: field -> value."""
        return dataclasses.asdict(self)


def denoising_file(samples: Path) -> Path:
    """Return the path of the denoising file that belongs to a task's samples file; the file need not exist."""
    return samples.with_name("denoising_" + samples.name.removeprefix("samples_") + ".gz")


def write_denoising(file: Path, task: str, lines: Iterable[DenoisingLine]) -> None:
    """Write a task's denoising file; no file is left where not all lines can be written.

    Args:
        file: the file, which is replaced.
        task: the task's name.
        lines: the answers' records.

    Raises:
        OSError: the file cannot be written.
    """
    try:
        # Level 9, the default, takes 20 times as long for files that are 6% smaller: minutes for long answers.
        with gzip.open(file, "wt", compresslevel=4, encoding="utf-8", errors="surrogatepass", newline="\n") as out:
            out.write(json.dumps({"format": FORMAT, "version": VERSION, "task": task}) + "\n")
            for line in lines:
                out.write(json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n")
    except BaseException:
        # Readers of a run refuse a cut file, but do without a file.
        with contextlib.suppress(OSError):
            file.unlink(missing_ok=True)
        raise


def read_denoising(file: Path) -> list[Denoising]:
    """Return the records of a denoising file, in the file's order.

    Raises:
        UserError: the file cannot be read, is damaged, or is not of this format and version.
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
        forced_tokens=int(line.get("forced_tokens", 0)),
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
