"""Answers in a terminal: each token coloured by its confidence and numbered by its step, with borders of blocks."""

from __future__ import annotations

from rich.style import Style
from rich.text import Text

from sdar_lm_eval.report.denoising import Denoising
from sdar_lm_eval.report.printing import printable

LEVELS = ((0.5, "bold red"), (0.7, "red"), (0.9, "yellow"), (0.99, "cyan"))
"""Styles of tokens whose confidence is below a value; tokens of higher confidence have no style."""

BORDER = "│"
MASK = "▢"
_SUBSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")


def style_of(confidence: float) -> str:
    """Return the style of a token that was drawn with a confidence, 0 to 1."""
    return next((style for limit, style in LEVELS if confidence < limit), "")


def legend() -> Text:
    """Return what the colours and marks mean."""
    text = Text("confidence: ")
    for limit, style in LEVELS:
        text.append(f"below {limit:g}", style).append("  ")
    return text.append(f"   {BORDER} border of blocks   ₁ step of the block that kept the token, from 1")


def written(denoising: Denoising) -> Text:
    """Return an answer with its denoising; a line break of the answer is shown as ⏎ and made."""
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
