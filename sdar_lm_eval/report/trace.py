"""The trace of a run: what was sent, and how each answer was written. A file a run and rank.

    {"run": …, "started": …, "model": …}        first line: the run, and facts on model and engine
    {"task": …, "document": …, "repeat": …, …}  a line for each finished request

A generated answer's line has its prompt (text and token ids), its settings, and for each new token its id, text, step
and confidence. Answers that were there already say so ("stored": true) and have what is known of them.
"""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TextIO

from sdar_lm_eval.engines.base import GenerationRequest, GenerationResult
from sdar_lm_eval.errors import UserError

logger = logging.getLogger(__name__)


class Trace:
    """The trace files of a model: a new one for each run.

    Args:
        path: the first run's file. Where it exists, and for later runs, the run's name is added to the file's.
        model: called for facts on model and engine when a run's first line is written.

    Raises:
        UserError: the file cannot be written.
    """

    def __init__(self, path: Path, model: Callable[[], Mapping[str, object]]) -> None:
        self._path, self._model = path, model
        self._begun = False
        self._file: TextIO | None = self._open()

    def _open(self) -> TextIO:
        self._run = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{uuid.uuid4().hex[:6]}"
        another = f"{self._path.stem}-{self._run}{self._path.suffix}"
        names = self._path, self._path.parent / another
        if self._path.is_dir():
            raise UserError(f"trace={str(self._path)!r} cannot be written: it is a folder. Name a file.")
        for path in names:
            try:
                file = path.open("x", encoding="utf-8", errors="surrogatepass")
            except FileExistsError:
                continue
            except OSError as error:
                raise UserError(
                    f"trace={str(self._path)!r} cannot be written: {error.strerror}. Name a file in an existing folder."
                ) from error
            if path != self._path:
                logger.info("trace: %s is another run's; this run's is %s.", self._path, path)
            return file
        raise UserError(f"trace={str(self._path)!r} and {str(names[1])!r} are there already. Name another file.")

    def begin_run(self) -> None:
        """Begin another file, if this one has lines of an earlier run."""
        if self._begun:
            self._begun = False
            if self._file is not None:
                self._file.close()
            self._file = self._open()

    def close(self) -> None:
        """Close the file; what is written later is dropped."""
        self._begun = False
        if self._file is not None:
            self._file.close()
            self._file = None

    def write(self, line: Mapping[str, object]) -> None:
        """Write a line, safe from a killed process. A file that cannot be written any more is given up."""
        if self._file is None:
            return
        try:
            if not self._begun:
                self._begun = True
                self._write({"run": self._run, "started": time.time(), "model": self._model()})
            self._write(line)
        except OSError as error:
            logger.error("trace=%s cannot be written (%s); the run goes on without it.", self._path, error.strerror)
            self._file = None

    def _write(self, line: Mapping[str, object]) -> None:
        assert self._file is not None
        self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._file.flush()


def cost_of(result: GenerationResult, prompt_tokens: int) -> dict[str, object]:
    """Return what an answer took, as trace files and stored answers have it."""
    return {
        "prompt_tokens": prompt_tokens,
        "new_tokens": len(result.token_ids),
        "forwards": {
            "prefill": result.prefill_forwards,
            "denoising": result.denoising_forwards,
            "commit": result.commit_forwards,
        },
        "seconds": round(result.seconds, 4),
        "finish_reason": result.finish_reason,
    }


def denoising_of(
    prompt: str, request: GenerationRequest, result: GenerationResult, pieces: Callable[[Sequence[int]], list[str]]
) -> dict[str, object]:
    """Return what was sent, and for each new token its id, text, step and confidence.

    Args:
        prompt: the text that `request.prompt_ids` are of.
        request: the engine's.
        result: with steps recorded.
        pieces: makes token ids the text of each.
    """
    return {
        "prompt": prompt,
        "prompt_ids": request.prompt_ids,
        "decoding": request.decoding.as_dict(),
        "max_new_tokens": request.max_new_tokens,
        "seed": request.seed,
        "token_ids": result.token_ids,
        "tokens": pieces(result.token_ids),
        "unmasked_at": result.unmasked_at,
        "confidences": [round(confidence, 4) for confidence in result.confidences or ()],
    }
