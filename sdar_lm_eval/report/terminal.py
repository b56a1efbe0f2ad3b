"""Answers in a terminal: each token with its confidence as a colour and its step as a subscript; borders of blocks."""

from __future__ import annotations

from rich.style import Style
from rich.text import Text

from sdar_lm_eval.report.denoising import Denoising
from sdar_lm_eval.report.printing import printable

LEVELS = ((0.5, "bold red"), (0.7, "red"), (0.85, "yellow"), (0.95, "cyan"))
"""(confidence, style of tokens below this confidence), rising; tokens of higher confidence have no style."""

BORDER = "│"
MASK = "▢"
_SUBSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")


def style_of(confidence: float) -> str:
    """Return rich's style for a token that was drawn with a confidence, 0 to 1."""
    return next((style for limit, style in LEVELS if confidence < limit), "")


def legend(coloured: bool = True) -> Text:
    """Return a line that explains the marks and, if `coloured`, the colours."""
    text = Text()
    if coloured:
        text.append("confidence: ")
        for limit, style in LEVELS:
            text.append(f"below {limit:g}", style).append("  ")
        text.append("   ")
    return text.append(f"{BORDER} border between blocks   ₁ step within the block that unmasked the token, from 1")


def denoised_text(denoising: Denoising) -> Text:
    """Return an answer with its colours, steps and borders. A line break is shown as ⏎ before the new line begins."""
    text = Text()
    for number, block in enumerate(denoising.blocks):
        if number:
            text.append(BORDER, Style(dim=True))
        for i in block:
            confidence = 1.0 if denoising.confidences is None else denoising.confidences[i]
            style = style_of(confidence)
            token = denoising.texts[i]
            shown = printable(token).replace("\n", "⏎")
            text.append(shown, style)
            if denoising.steps is not None:
                text.append(str(denoising.steps[i] + 1).translate(_SUBSCRIPTS), Style(dim=True))
            if "\n" in token:
                text.append("\n")
    return text
