"""What a model is told of its evaluations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol, TypeGuard

from lm_eval.api.instance import Instance

from sdar_lm_eval.lm.denoising import LinesOf
from sdar_lm_eval.lm.task_requests import TaskRequests


class Watched(Protocol):
    """A model that is told of its evaluations: the models of this package."""

    watched: ClassVar[bool]
    """True. A class attribute, since reading other models' properties may raise."""

    renders: bool
    """Whether prompts of generating tasks go into the chat template where lm_eval's user did not ask for it."""

    @property
    def tokenizer_name(self) -> str:
        """Key of tokenizer and template in lm_eval's cache of built requests."""

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True, *, prefixed: bool = True
    ) -> str:
        """Render a conversation; `prefixed`: with the setting answer_prefix, which is for generated answers."""

    def check_cache(self, path: str) -> None:
        """Refuse a file of `--use_cache` that cannot be used."""

    def evaluation_begins(self, *, seed: int | None, cached: bool, template: str | None) -> None:
        """An evaluation begins.

        Args:
            seed: lm_eval's seed for torch; None where it has none.
            cached: whether lm_eval keeps the answers (`--use_cache`).
            template: the name of the chat template that the user chose; None: the default one.
        """

    def add_thoughts(self, samples: Mapping[str, Sequence[dict[str, Any]]]) -> None:
        """Put the thoughts of the last evaluation's answers into lm_eval's samples, by task."""

    def denoising_lines(self) -> LinesOf:
        """Return a function: task -> the lines of its denoising file; none for a task without records."""

    def task_begins(self, task: TaskRequests, requests: Sequence[Instance]) -> None:
        """lm_eval has built a task's requests."""

    def evaluation_ends(self) -> None:
        """The evaluation ended, with or without an error."""

    def get_model_info(self) -> dict[str, object]:
        """Facts for `results["config"]`: on the model, and on what the last evaluation did."""


def is_watched(lm: object) -> TypeGuard[Watched]:
    """Whether an lm_eval model is told of its evaluations."""
    return getattr(type(lm), "watched", False) is True
