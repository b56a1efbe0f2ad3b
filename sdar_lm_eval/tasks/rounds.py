"""Few-shot prompts whose shots are rounds of a conversation, whatever the flags.

lm-eval puts each shot into turns of its own only under `--apply_chat_template --fewshot_as_multiturn true`. Otherwise
the shots and the question are one text, which a chat model reads as one turn. A task of this class has rounds wherever
a chat template is applied: under `--apply_chat_template` alone, and by the models of this package, which apply theirs
unasked.

Imports are absolute, since lm-eval opens this file by its path, outside of the package.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from lm_eval.api.task import ConfigurableTask

from sdar_lm_eval.errors import UserError


class RoundsTask(ConfigurableTask):
    """lm-eval's task from a YAML file (`class: !function rounds.RoundsTask`), with each shot a round of its own."""

    def __init__(self, config: Mapping[str, object]) -> None:
        super().__init__(config={name: value for name, value in config.items() if name != "class"})

    def fewshot_context(
        self,
        doc: dict[str, object],
        num_fewshot: int,
        system_instruction: str | None = None,
        apply_chat_template: bool = False,
        fewshot_as_multiturn: bool = False,
        chat_template: Callable[..., str] | None = None,
        gen_prefix: str | None = None,
    ) -> str:
        """Return the prompt: the rounds as `chat_template` renders them, or one text without a chat template.

        Raises:
            UserError: the data has fewer than `num_fewshot` shots.
        """
        split = self.config.fewshot_split
        if num_fewshot > (there := len(self.dataset[split])):
            raise UserError(
                f"{self.config.task} is asked with {num_fewshot} shots, but its {split!r} data has {there}. Complete "
                f"the data, or run with --num_fewshot {there}."
            )
        return str(
            super().fewshot_context(
                doc,
                num_fewshot,
                system_instruction=system_instruction,
                apply_chat_template=apply_chat_template,
                fewshot_as_multiturn=apply_chat_template,
                chat_template=chat_template,
                gen_prefix=gen_prefix,
            )
        )
