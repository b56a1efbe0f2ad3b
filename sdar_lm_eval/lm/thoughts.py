"""The settings of thoughts in model_args, and the checkpoint's think end. Both are read once, when the model is made.

`sdar_lm_eval/thinking.py` finds the thought of a single answer.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sdar_lm_eval.checkpoint import Checkpoint
from sdar_lm_eval.checkpoint.tokenizer import Tokenizer
from sdar_lm_eval.checks import at_least_one, check_range
from sdar_lm_eval.errors import UserError
from sdar_lm_eval.files import shown
from sdar_lm_eval.settings import to_bool, to_whole
from sdar_lm_eval.thinking import END, START, Repetition, Thinking

ESCAPES = {r"\n": "\n", r"\t": "\t", r"\\": "\\"}
"""What answer_prefix may hold -> what it means: a shell passes a line break on as these two characters."""

OFF = ("off", "none", "false")
"""Texts of think_end_token that mean no thoughts, in any case: lm_eval's own models take None."""


@dataclass(frozen=True)
class Thoughts:
    """The settings of a model's thoughts, and of what begins its answers.

    Attributes:
        thinking: how the thought of an answer is found whose prompt opens no thought; None: such an answer has no
            thought.
        opened: how a thought is found that the prompt opens, even if nothing else says that the checkpoint thinks;
            None: thoughts are off.
        auto: `thinking`, where model_args say nothing of thoughts.
        start, end: the texts that open and end a thought; `<think>` and `</think>` where they are unknown.
        answer_prefix: the text that each generated answer begins with.
        template_args: values for the chat template.
        repetition: the rule that ends an answer in a loop; None: no rule.
        given: model_args on thoughts, as the user gave them; results files have them.
    """

    thinking: Thinking | None
    opened: Thinking | None
    auto: Thinking | None
    start: str
    end: str
    answer_prefix: str
    template_args: Mapping[str, object]
    repetition: Repetition | None
    given: Mapping[str, object]

    @classmethod
    def read(cls, given: Mapping[str, object], checkpoint: Checkpoint) -> Thoughts:
        """Read the model_args on thoughts.

        Args:
            given: name -> value of the settings that the user gave.
            checkpoint: the opened checkpoint.

        Raises:
            UserError: a value cannot be used, or asks for thoughts whose end is unknown.
        """
        prefix = _prefix(given.get("answer_prefix", ""))
        template_args = _template_args(given)
        auto = _thinking(checkpoint, END) if START in prefix or _knows(checkpoint.tokenizer) else None
        end = _end(given.get("think_end_token", "auto"), checkpoint)
        thinking = auto if end == "auto" else None if end is None else _thinking(checkpoint, end)
        most = given.get("max_thinking_toks")
        if thinking is None and (most is not None or template_args.get("enable_thinking")):
            asks = "enable_thinking=true" if most is None else f"max_thinking_toks={most}"
            why = "think_end_token is off" if end is None else f"checkpoint {checkpoint.name!r} has no {END}"
            raise UserError(f"{asks}: {why}, so no thought ends. Say what ends its thoughts: think_end_token=TEXT.")
        if most is not None and thinking is not None:
            limit = at_least_one("max_thinking_toks", to_whole("max_thinking_toks", most))
            thinking = dataclasses.replace(thinking, max_tokens=limit)
        end_text = END if thinking is None else _text_of(thinking.end, checkpoint.tokenizer)
        by_prompt = None if end is None else thinking or _thinking(checkpoint, END)
        return cls(
            thinking=thinking,
            opened=None if by_prompt is None else dataclasses.replace(by_prompt, opened=True),
            auto=auto,
            start=_start_text(end_text) or START,
            end=end_text,
            answer_prefix=prefix,
            template_args=template_args,
            repetition=_repetition(given.get("stop_repetition")),
            given=dict(given),
        )


def _prefix(value: object) -> str:
    if not isinstance(value, str):
        raise UserError(
            f"answer_prefix={shown(value)} is no text. Give one, such as '<think>', or leave answer_prefix out."
        )
    return re.sub(r"\\[nt\\]", lambda found: ESCAPES[found[0]], value)


def _template_args(given: Mapping[str, object]) -> dict[str, object]:
    """The values for the chat template: chat_template_args, and enable_thinking, which replaces the value in them."""
    values = _mapping(given.get("chat_template_args"))
    if "enable_thinking" in given:
        values["enable_thinking"] = given["enable_thinking"]
    if "enable_thinking" in values:  # a template takes the text "false" for true
        values["enable_thinking"] = to_bool("enable_thinking", values["enable_thinking"])
    return values


def _mapping(value: object) -> dict[str, object]:
    example = '{"enable_thinking": false}'
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise UserError(
                f"chat_template_args={shown(value)} is no JSON: {error}. Give a mapping, such as {example}."
            ) from error
    if value is not None and not (isinstance(value, Mapping) and all(isinstance(name, str) for name in value)):
        raise UserError(f"chat_template_args={shown(value)} is no mapping. Give one, such as {example}.")
    return dict(value or {})


def _end(value: object, checkpoint: Checkpoint) -> str | int | None:
    """The think end that the user named: "auto", another text, a token; None for off."""
    if value is False or (isinstance(value, str) and value.lower() in OFF):  # YAML reads `off` as false
        return None
    if isinstance(value, str) and value.lower() == "auto":
        return "auto"
    if isinstance(value, str) and re.fullmatch("[0-9]+", value):  # as in lm_eval's hf model
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        tokens = checkpoint.vocabulary
        check_range(f"think_end_token={value}", 0 <= value < tokens, f"a token of the checkpoint, 0 to {tokens - 1}")
        return value
    if not isinstance(value, str) or not value.strip():
        raise UserError(
            f"think_end_token={shown(value)} names nothing. Give a text such as {END}, a token id, auto or off."
        )
    return value


def _knows(tokenizer: Tokenizer) -> bool:
    """Whether `</think>` is a token of its own, or is in a chat template."""
    template: Any = tokenizer.chat_template
    sources = template.values() if isinstance(template, Mapping) else [template]
    return any(END in source for source in sources if isinstance(source, str)) or any(
        token.content == END for token in tokenizer.added_tokens_decoder.values()
    )


def _thinking(checkpoint: Checkpoint, end: str | int) -> Thinking:
    tokenizer = checkpoint.tokenizer
    end_ids = (end,) if isinstance(end, int) else tuple(tokenizer.encode(end, add_special_tokens=False))
    start = _start_text(_text_of(end, tokenizer))
    return Thinking(
        end=_as_decoded(end, checkpoint),
        end_ids=end_ids,
        start=None if start is None else _as_decoded(start, checkpoint),
        opened=start is None,
    )


def _as_decoded(mark: str | int, checkpoint: Checkpoint) -> str | int:
    """A mark as it is found in an answer: the token, where decoding leaves the token out or the user named it."""
    token = mark if isinstance(mark, int) else checkpoint.special_token(mark)
    return mark if token is None else token


def _text_of(mark: str | int, tokenizer: Tokenizer) -> str:
    return tokenizer.decode([mark], clean_up_tokenization_spaces=False) if isinstance(mark, int) else mark


def _start_text(end: str) -> str | None:
    """The text that opens what `end` ends: without its slash. None where it has none."""
    return end.replace("/", "", 1) if "/" in end else None


def _repetition(value: object) -> Repetition | None:
    if value is None:
        return None
    found = re.fullmatch(r"(\d+):(\d+)", value.strip()) if isinstance(value, str) else None
    tokens, times = map(int, found.groups()) if found else (0, 0)
    if not (tokens >= 1 and times >= 2 and tokens * times <= 100_000):
        raise UserError(
            f"stop_repetition={shown(value)}: give N:K, such as 50:4, to end an answer whose last N*K tokens repeat "
            "with a period of at most N tokens. N is 1 or more, K is 2 or more."
        )
    return Repetition(tokens, times)
