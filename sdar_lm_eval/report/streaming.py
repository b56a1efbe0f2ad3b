"""Shows an answer while it is denoised: step by step in a terminal, or as plain text.

    Screen       for a terminal: masks become tokens, coloured by confidence; decided lines scroll up
    PlainText    for a pipe or a file: only the text of decided blocks

`Screen.watch` and `PlainText.watch` take the engine's steps (`BlockStep`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TextIO

from rich.console import Console
from rich.live import Live
from rich.style import Style
from rich.text import Text

from sdar_lm_eval.engines.types import BlockStep
from sdar_lm_eval.report.denoising import Denoising
from sdar_lm_eval.report.printing import printable
from sdar_lm_eval.report.terminal import BORDER, MASK, style_of
from sdar_lm_eval.thinking import Decode, Thinking, read

UNFINISHED = "\ufffd"  # the tokenizer decodes a character whose last bytes are missing to this
FRAMES_PER_SECOND = 20
ENDS = {"stop": "a stop token or stop string", "length": "the limit of new tokens", "repetition": "a loop"}
"""Finish reason -> what ended the answer."""


class PlainText:
    """Writes the text of an answer's decided blocks to a file.

    Text that later tokens may change is held back: a character without its last bytes, and the possible beginning of a
    stop string. The thought is not written.

    Args:
        out: the file that the text is written to.
        decode: token ids -> text.
        until: stop strings of the answer.
        thinking: how the answer's thought is found; None: the answer has none.
    """

    def __init__(self, out: TextIO, decode: Decode, until: Sequence[str], thinking: Thinking | None = None) -> None:
        self._out, self._decode, self._until, self._thinking = out, decode, until, thinking
        self._token_ids: list[int] = []
        self._written = 0  # characters
        self._thinks: bool | None = None  # whether the tokens so far end in a thought; None: they do not tell yet

    def watch(self, step: BlockStep) -> None:
        """Write the text that a decided block adds; do nothing for a block that has masks."""
        if step.decided:
            self._token_ids[step.start :] = step.token_ids
            if not self._is_thought(step.start):
                _, text = read(self._token_ids, self._thinking, self._decode)
                self._write_up_to(self._settled(text))

    def finish(self, text: str) -> None:
        """Write the part of the answer's text that is not written yet."""
        self._write_up_to(text)

    def _is_thought(self, start: int) -> bool:
        """Whether all tokens so far are of a thought, or may be; the tokens before `start` are known to be."""
        thinking, tokens = self._thinking, self._token_ids
        if thinking is None or self._thinks is False:
            return False
        if self._thinks is None:
            self._thinks = thinking.opened or thinking.begins(tokens, self._decode)
        if self._thinks:  # a long thought is not read again at each block
            if isinstance(thinking.end, int):
                self._thinks = thinking.end not in tokens[start:]
            else:
                begin = max(start - len(thinking.end.encode(errors="surrogatepass")), 0)
                self._thinks = thinking.end not in self._decode(tokens[begin:])
        return self._thinks is not False

    def _write_up_to(self, text: str) -> None:
        rest = text[self._written :]
        self._out.write(printable(rest) if self._out.isatty() else rest)
        self._out.flush()
        self._written = max(self._written, len(text))

    def _settled(self, text: str) -> str:
        text = text[: min((at for stop in self._until if (at := text.find(stop)) >= 0), default=len(text))]
        text = text.rstrip(UNFINISHED)
        begun = (length for stop in self._until for length in range(1, len(stop)) if text.endswith(stop[:length]))
        return text[: len(text) - max(begun, default=0)]


class Screen:
    """Shows an answer in a terminal while it is written.

    Whole lines of decided text are printed once, and scroll up. The last line and the block that is being denoised are
    drawn anew at each step.

    Args:
        console: the terminal.
        pieces: token ids -> the text of each token.
        mask_token_id: the mask token.

    Attributes:
        tokens: number of decided tokens of the answer.
    """

    def __init__(self, console: Console, pieces: Callable[[Sequence[int]], list[str]], mask_token_id: int) -> None:
        self._console, self._pieces, self._mask = console, pieces, mask_token_id
        self._line = Text()  # decided text whose line is not printed yet
        self._begun: list[tuple[int, float]] = []  # decided tokens of an unfinished character, with their confidences
        self._live = Live(
            console=console, refresh_per_second=FRAMES_PER_SECOND, vertical_overflow="visible", transient=False
        )
        self.tokens = 0

    def __enter__(self) -> Screen:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop drawing. The decided text and the last block stay on the screen."""
        self._live.stop()

    def watch(self, step: BlockStep) -> None:
        """Show the state of a block after a denoising step."""
        text = self._line + self._block(step)
        if not step.decided:
            self._live.update(text)
            return
        self.tokens = step.start + len(step.token_ids)
        *whole, self._line = text.wrap(self._console, self._console.width) or [Text()]
        self._live.update(self._line)
        for line in whole:
            self._console.print(line)

    def _block(self, step: BlockStep) -> Text:
        """A border and a block's tokens. A decided block leaves the tokens of an unfinished character to the next."""
        tokens = [*self._begun, *zip(step.token_ids, step.confidences, strict=True)]
        texts = self._pieces([token for token, _ in tokens])
        if step.decided:
            whole = len(texts)
            if texts and texts[-1].endswith(UNFINISHED) and not step.finished:
                whole = max((i + 1 for i, text in enumerate(texts[:-1]) if text), default=0)
            self._begun, tokens, texts = tokens[whole:], tokens[:whole], texts[:whole]
        block = Text()
        if step.start:
            block.append(BORDER, Style(dim=True))
        for (token, confidence), text in zip(tokens, texts, strict=True):
            if token == self._mask:
                block.append(MASK, Style(dim=True))
            else:
                block.append(printable(text), style_of(confidence))
        return block


def cost(denoising: Denoising) -> str:
    """Return in words an answer's tokens, forwards and seconds, and why it ended."""
    tokens, forwards = len(denoising.token_ids), denoising.forwards
    made, tokens_per_forward = denoising.made_forwards, denoising.tokens_per_forward
    rate = "" if tokens_per_forward is None else f"{tokens_per_forward:.2f} tokens per forward, "
    ended = ENDS.get(denoising.finish_reason, denoising.finish_reason)
    return (
        f"{tokens} tokens in {made} forwards ({forwards['denoising']} denoising, {forwards['commit']} commit): "
        f"{rate}{denoising.seconds:.2f} s; ended by {ended}"
    )
