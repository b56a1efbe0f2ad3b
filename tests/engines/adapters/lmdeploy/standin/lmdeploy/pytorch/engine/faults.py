"""Faults that a test can add to LMDeploy's own, and records that it can look at afterwards."""

from __future__ import annotations

from typing import Any

pages: int | None = None  # number of KV pages; None: 100,000
at_step: dict[int, BaseException] = {}  # number of a step, from 0 on over the whole process -> the error that it raises
at_start: BaseException | None = None  # the error that Engine raises once the weights are loaded
made: list[Any] = []  # every Engine
batches: list[tuple[int, int]] = []  # every step: sequences prefilled, sequences denoised
settings: list[Any] = []  # every request's SamplingParam
files: list[list[str]] = []  # every folder that was opened: its files' names


def reset() -> None:
    global pages, at_start
    pages = at_start = None
    for kept in (at_step, made, batches, settings, files):
        kept.clear()
