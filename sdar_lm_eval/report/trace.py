"""The trace of a run: what was sent, and how each answer was written. Each run and rank has a file of its own.

    {"run": …, "started": …, "model": …}        first line: the run, and facts on model and engine
    {"task": …, "document": …, "repeat": …, …}  a line for each finished request

A generated answer's line has the prompt (text and token ids), the settings, and for each new token its id, text, step
and confidence; where the answer has a thought, also `thought` and `thought_ended`. The line of an answer from a store
has "stored": true, and what the store knows of the answer.
"""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TextIO

from sdar_lm_eval.engines.types import GenerationRequest, GenerationResult
from sdar_lm_eval.errors import UserError

logger = logging.getLogger(__name__)


class Trace:
    """The trace files of a model, one for each run.

    Args:
        path: the first run's file. A later run adds the run's name to the file's name; so does the first run if `path`
            exists already.
        model: returns facts on model and engine; called when a run's first line is written.

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
                logger.info("trace: %s exists already, so this run writes %s.", self._path, path)
            return file
        raise UserError(f"trace={str(self._path)!r} and {str(names[1])!r} are there already. Name another file.")

    def begin_run(self) -> None:
        """Begin another file if this one has lines of an earlier run."""
        if self._begun:
            self._begun = False
            if self._file is not None:
                self._file.close()
            self._file = self._open()

    def close(self) -> None:
        """Close the file. Lines written later are dropped."""
        self._begun = False
        if self._file is not None:
            self._file.close()
            self._file = None

    def write(self, line: Mapping[str, object]) -> None:
        """Write a line through to the file immediately. After a write error the trace ends, and the run goes on."""
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
    """Return an answer's tokens, forwards and seconds, as trace files and stored answers have them."""
    return {
        "prompt_tokens": prompt_tokens,
        "new_tokens": len(result.token_ids),
        "forwards": result.forwards,
        "seconds": round(result.seconds, 4),
        "finish_reason": result.finish_reason,
        **({"forced_tokens": result.forced_tokens} if result.forced_tokens else {}),
    }


def denoising_of(
    prompt: str, request: GenerationRequest, result: GenerationResult, pieces: Callable[[Sequence[int]], list[str]]
) -> dict[str, object]:
    """Return what was sent, and for each new token its id, text, step and confidence.

    Args:
        prompt: the text of `request.prompt_ids`.
        request: the request as the engine got it.
        result: the engine's, with steps recorded.
        pieces: returns the text of each token.
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
