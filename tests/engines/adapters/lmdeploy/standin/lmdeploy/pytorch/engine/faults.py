"""What a test can have go wrong beside what always does, and what it can look at afterwards."""

from __future__ import annotations

from typing import Any

pages: int | None = None  # KV pages that there are, in the place of many
at_step: dict[int, BaseException] = {}  # step, from 0, of all that the process runs -> what it raises
at_start: BaseException | None = None  # what Engine raises once the weights are loaded
made: list[Any] = []  # every Engine
batches: list[tuple[int, int]] = []  # of every step: sequences prefilled, sequences denoised
settings: list[Any] = []  # every request's SamplingParam
files: list[list[str]] = []  # names in each folder that was opened


def reset() -> None:
    global pages, at_start
    pages = at_start = None
    for kept in (at_step, made, batches, settings, files):
        kept.clear()
