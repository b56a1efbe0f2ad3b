"""Renders a checkpoint's chat template, somebody else's program, within limits of time and length.

transformers compiles a chat template in jinja2's sandbox. The sandbox keeps a template from files and from Python's
internals, but lets it run and write without end. `ChatTemplate` compiles the template in the same sandbox, with a check
in each loop, macro, assignment, argument and output. A single step of jinja2 between two checks is not bounded, such as
the format "%10000000000d".
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeVar

import jinja2
from jinja2 import nodes
from jinja2.runtime import Context

from sdar_lm_eval.errors import UserError
from sdar_lm_eval.files import one_line, shown

MOST_SECONDS = 5.0  # a conversation takes about 0.0001
MOST_CHARACTERS = 10_000_000  # written, or held by a variable
MOST_BITS = 10_000  # of a number
MOST_SOURCE = 200_000  # characters; the longest templates have some 20,000
# Stands at the end of a message that is to be continued: a character that no text has, and a space, which a template
# that strips messages takes away.
END = "\ufdd2 "

Message = Mapping[str, str]
Value = TypeVar("Value")


class Tokenizer(Protocol):
    """What is read of a transformers tokenizer."""

    chat_template: str | Mapping[str, str] | None
    special_tokens_map: Mapping[str, object]


class Unbounded(Exception):  # noqa: N818
    """A template ran or wrote beyond its limits."""


class ChatTemplate:
    """A tokenizer's chat template.

    Args:
        tokenizer: transformers'; its template may be a text, or several by name.
        checkpoint: name for messages.
        name: which of several; None: `default`.

    Raises:
        UserError: the template is no text, several without a default, cannot be compiled, or fails for a user's turn.
    """

    def __init__(self, tokenizer: Tokenizer, checkpoint: str, name: str | None = None) -> None:
        self._title = f"the chat template of checkpoint {checkpoint!r}"
        source = tokenizer.chat_template
        if isinstance(source, Mapping):
            if (name or "default") not in source:
                raise UserError(
                    f"{self._title} is one of several ({', '.join(map(shown, list(source)[:8]))}), and none of them is "
                    f"called {name or 'default'!r}. {_REMEDY}"
                )
            source = source[name or "default"]
        elif name is not None:
            raise UserError(f"{self._title} has no name; {name!r} was asked for. Give --apply_chat_template alone.")
        if not isinstance(source, str):
            raise UserError(f"{self._title} is {shown(source)}, which is no text. {_REMEDY}")
        if len(source) > MOST_SOURCE:
            raise UserError(f"{self._title} has {len(source):,} characters, at most {MOST_SOURCE:,} do. {_REMEDY}")
        self.source = source
        """Jinja2's text."""
        self._names = dict(tokenizer.special_tokens_map)
        self._budget = _Budget()
        try:
            self._template = _compile(source, self._budget)
        except Exception as error:  # of jinja2, and of Python's own compiler
            raise UserError(f"{self._title} cannot be compiled ({_told(error)}). {_REMEDY}") from error
        self._try()

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """Render a conversation, as `tokenizer.apply_chat_template(tokenize=False)` does.

        Args:
            messages: the conversation.
            add_generation_prompt: open the assistant's turn; else the last message is left open to be continued.

        Raises:
            UserError: the template refuses the conversation, fails, or exceeds its limits.
        """
        named = [message["role"] for message in messages]
        roles = ", ".join(named[:6]) + (" and so on" if len(named) > 6 else "")
        try:
            return self._render(messages, add_generation_prompt)
        except Unbounded as error:
            raise UserError(f"{self._title} {error} for a conversation of {roles}. {_REMEDY}") from error
        except Exception as error:  # whatever a template raises
            raise UserError(
                f"{self._title} refuses a conversation of {roles} ({_told(error)}). Where it has no system turn, leave "
                "out --system_instruction; or use chat_template=off."
            ) from error

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        conversation: list[dict[str, str]] = [dict(message) for message in messages]
        if not add_generation_prompt:
            conversation[-1]["content"] += END
        self._budget.begin()
        text = self._template.render(
            messages=conversation,
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **self._names,
        )
        if add_generation_prompt:
            return text
        before, found, after = text.rpartition(END[0])
        if not found or messages[-1]["content"].strip() not in before:
            raise jinja2.TemplateError(
                "the text of the last message, which is to be continued, is not in what it writes"
            )
        return before if after.startswith(END[1:]) else before.rstrip()

    def _try(self) -> None:
        """Find what fails for every conversation before a model is loaded; what a template refuses is its own affair.

        Raises:
            UserError: the template fails for a user's turn.
        """
        try:
            self._render([{"role": "user", "content": "2 + 2 = ?"}], add_generation_prompt=True)
        except Unbounded as error:
            raise UserError(f"{self._title} {error}. {_REMEDY}") from error
        except jinja2.exceptions.SecurityError as error:
            raise UserError(f"{self._title} is not safe ({_told(error)}). {_REMEDY}") from error
        except jinja2.TemplateError:  # it may want a system turn
            pass
        except Exception as error:
            raise UserError(f"{self._title} fails ({_told(error)}). {_REMEDY}") from error


_REMEDY = "Correct chat_template.jinja or tokenizer_config.json, or use chat_template=off."


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {one_line(error, most=200)}"


class _Budget:
    """What one rendering may use; the compiled template asks it.

    Its methods take jinja2's context, since jinja2 calls other filters of a constant once, when it compiles.
    """

    def begin(self) -> None:
        """A rendering begins."""
        self._deadline = time.monotonic() + MOST_SECONDS
        self._left = MOST_CHARACTERS

    @jinja2.pass_context
    def step(self, _: Context, value: object) -> None:
        """One turn of a loop, or call of a macro."""
        if time.monotonic() > self._deadline:
            raise Unbounded(f"takes more than {MOST_SECONDS:g} seconds")

    @jinja2.pass_context
    def written(self, _: Context, value: Value) -> Value:
        """Count what is written, to the prompt or into a block that is kept."""
        if isinstance(value, str):
            self._left -= len(value)
            if self._left < 0:
                raise Unbounded(f"writes more than {MOST_CHARACTERS:,} characters")
        return value

    @jinja2.pass_context
    def argument(self, _: Context, value: Value) -> Value:
        """Check what a filter or function is given, such as a width."""
        if isinstance(value, int) and value > MOST_CHARACTERS:
            raise Unbounded(f"asks for a number above {MOST_CHARACTERS:,}")
        return value

    @jinja2.pass_context
    def kept(self, _: Context, value: Value) -> Value:
        """Check what becomes a variable's value."""
        if isinstance(value, (str, list, tuple)) and len(value) > MOST_CHARACTERS:
            raise Unbounded(f"makes a value of more than {MOST_CHARACTERS:,} characters or parts")
        return value


def _compile(source: str, budget: _Budget) -> jinja2.Template:
    """Compile a template in transformers' environment, with calls of `budget` in it."""
    from transformers.utils import chat_template_utils

    # An empty template's environment has the filters, names and extensions that transformers gives to all.
    environment = chat_template_utils._compile_jinja_template("").environment.overlay()
    # Filters are called directly; methods go through the sandbox, which takes as long as the rest of a rendering.
    asked = {f"budget_{name}": getattr(budget, name) for name in ("argument", "kept", "step", "written")}
    environment.filters = environment.filters | asked
    environment.intercepted_binops = frozenset({"*", "**"})
    environment.call_binop = functools.partial(_bounded, environment.call_binop)
    # lipsum writes as much as it is asked for, without a loop of the template's.
    environment.globals = {name: value for name, value in environment.globals.items() if name != "lipsum"}

    tree = environment.parse(source)
    for call in list(tree.find_all((nodes.Call, nodes.Filter))):
        call.args = [_call("argument", value) for value in call.args]
        for keyword in call.kwargs:
            keyword.value = _call("argument", keyword.value)
    for node in list(tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock))):
        node.body.insert(0, nodes.ExprStmt(_call("step", nodes.Const(None))))
    for output in list(tree.find_all(nodes.Output)):
        texts = (nodes.Const(part.data) if isinstance(part, nodes.TemplateData) else part for part in output.nodes)
        output.nodes = [_call("written", text) for text in texts]
    for assignment in list(tree.find_all(nodes.Assign)):
        assignment.node = _call("kept", assignment.node)
    tree.set_environment(environment)
    return jinja2.Template.from_code(environment, environment.compile(tree), environment.globals)


def _call(name: str, value: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(value, f"budget_{name}", [], [], None, None)


def _bounded(
    compute: Callable[[Context, str, object, object], object],
    context: Context,
    operator: str,
    left: object,
    right: object,
) -> object:
    """Multiply or raise to a power, but not to what takes minutes or all memory."""
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * max(right, 0) if operator == "**" else left.bit_length() + right.bit_length()
        if bits > MOST_BITS:
            raise Unbounded(f"computes numbers of more than {MOST_BITS:,} bits")
    for parts, times in ((left, right), (right, left)):
        if isinstance(parts, (str, list, tuple)) and isinstance(times, int) and len(parts) * times > MOST_CHARACTERS:
            raise Unbounded(f"makes a value of more than {MOST_CHARACTERS:,} characters or parts")
    return compute(context, operator, left, right)
