"""Renders a checkpoint's chat template, an untrusted program, within limits of time and length.

transformers compiles a chat template in jinja2's sandbox. The sandbox keeps a template from files and from Python's
internals, but does not limit a template's time and memory. `ChatTemplate` compiles the template in the same sandbox,
and adds a check to each loop, macro, assignment, argument and output. A single step of jinja2 between two checks, such
as the format "%10000000000d", is not limited.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import jinja2
from jinja2 import meta, nodes
from jinja2.runtime import Context

from sdar_lm_eval.checkpoint.tokenizer import Tokenizer
from sdar_lm_eval.errors import UserError, did_you_mean, listed
from sdar_lm_eval.files import one_line, shown

MOST_SECONDS = 5.0  # a conversation takes about 0.0001
MOST_CHARACTERS = 10_000_000  # in the output, or in a variable's value
MOST_BITS = 10_000  # in a number
MOST_SOURCE = 200_000  # characters; the longest templates have some 20,000
# Marks the end of a message that is to be continued: a Unicode noncharacter, and a space. A template that strips
# messages removes the space.
END = "\ufdd2 "

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
"""Roles that chat templates commonly know. A template may name others."""

ALWAYS_WRITTEN = ("user", "assistant")

USER_TURN = {"role": "user", "content": "2 + 2 = ?"}
PROBE = "271828"  # digits, which no filter such as `upper` changes

NO_VALUES: Mapping[str, object] = {}
SET_BY_RENDERING = {"messages", "add_generation_prompt"}

Message = Mapping[str, str]
"""A turn of a conversation: {"role": "user", "content": "…"}."""
Value = TypeVar("Value")


class Unbounded(Exception):  # noqa: N818
    """A template ran or wrote beyond its limits."""


class ChatTemplate:
    """A tokenizer's chat template.

    Args:
        tokenizer: transformers' tokenizer; it has one template, or several by name.
        checkpoint: the checkpoint's name, for messages.
        name: the template's name where there are several; None: `default`.
        values: further values for the template, by name, such as enable_thinking.

    Raises:
        UserError: there is no template of that name, a value has the name of one that rendering sets, or the template
            is no text, cannot be compiled, or fails for a user's turn.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        checkpoint: str,
        name: str | None = None,
        values: Mapping[str, object] = NO_VALUES,
    ) -> None:
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
            raise UserError(
                f"{self._title} has {len(source):,} characters, at most {MOST_SOURCE:,} are allowed. {_REMEDY}"
            )
        self.source = source
        """Jinja2's text."""
        if taken := sorted(values.keys() & SET_BY_RENDERING):
            raise UserError(f"chat_template_args has {listed(taken)}, which rendering sets. Leave out {listed(taken)}.")
        self._names = {"tools": None, "documents": None, **tokenizer.special_tokens_map, **values}
        self._budget = _Budget()
        try:
            self._template = _compile(source, self._budget)
        except Exception as error:  # jinja2's, and those of Python's own compiler
            raise UserError(f"{self._title} cannot be compiled ({_line(error)}). {_REMEDY}") from error
        tree = self._template.environment.parse(source)
        # First, as `find_undeclared_variables` folds constants.
        self._texts = {constant.value for constant in tree.find_all(nodes.Const) if isinstance(constant.value, str)}
        self.unread = sorted(values.keys() - meta.find_undeclared_variables(tree))
        """Names of the values that the template does not read."""
        self._first_left_out = functools.cache(self._find_left_out)
        self._render_one_turn()

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """Render a conversation, as `tokenizer.apply_chat_template(tokenize=False)` does.

        Args:
            messages: the conversation.
            add_generation_prompt: whether the assistant's turn is opened; else the last message is left open to be
                continued.

        Raises:
            UserError: the template does not know a role, leaves out a message, refuses the conversation, fails, or
                exceeds its limits.
        """
        all_roles = tuple(message["role"] for message in messages)
        roles = ", ".join(all_roles[:6]) + (" and so on" if len(all_roles) > 6 else "")
        if (position := self._first_left_out(all_roles)) is not None:
            role, known = all_roles[position], [each for each in ROLES if self._writes(each)]
            if role in known:
                raise UserError(
                    f"{self._title} leaves out message {position + 1}, of role {shown(role)}, of a conversation of "
                    f"{roles}. Move that message, or leave it out."
                )
            remedy = f" {_WITHOUT_SYSTEM}" if role == "system" else ""
            hint = did_you_mean(role, known)
            raise UserError(f"{self._title} writes no role {shown(role)}.{hint} Choose {', '.join(known)}.{remedy}")
        try:
            return self._render(messages, add_generation_prompt)
        except Unbounded as error:
            raise UserError(f"{self._title} {error} for a conversation of {roles}. {_REMEDY}") from error
        except Exception as error:  # a template can raise any exception
            raise UserError(
                f"{self._title} refuses a conversation of {roles} ({_line(error)}). {_WITHOUT_SYSTEM}"
            ) from error

    def _find_left_out(self, roles: tuple[str, ...]) -> int | None:
        """The position of the first message in a conversation of these roles that the template does not write, if any.

        A template without a rule for a role, or for a role at a position, drops the message. A template that writes any
        role would write a mistyped role too, which no checkpoint was trained on.
        """
        for position, role in enumerate(roles):
            if role not in ROLES and role not in self._texts:
                return position
        if others := [position for position, role in enumerate(roles) if role not in ALWAYS_WRITTEN]:
            probes = [f"{PROBE}{position:06}" for position in range(len(roles))]
            turns = [{"role": role, "content": probe} for role, probe in zip(roles, probes, strict=True)]
            with contextlib.suppress(Exception):  # `render` says why the template refuses a conversation
                text = self._render(turns, True)
                return next((position for position in others if probes[position] not in text), None)
        return None

    def _writes(self, role: str) -> bool:
        """Whether the template writes a message of a role before or behind a user's turn."""
        for roles in ((role, "user"), ("user", role)):
            with contextlib.suppress(Exception):
                self._render([{"role": each, "content": PROBE} for each in roles], True)
                if self._find_left_out(roles) is None:
                    return True
        return role in ALWAYS_WRITTEN

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        conversation: list[dict[str, str]] = [dict(message) for message in messages]
        if not add_generation_prompt:
            conversation[-1]["content"] += END
        self._budget.begin()
        text = self._template.render(messages=conversation, add_generation_prompt=add_generation_prompt, **self._names)
        if add_generation_prompt:
            return text
        before, found, after = text.rpartition(END[0])
        if not found or messages[-1]["content"].strip() not in before:
            raise jinja2.TemplateError(
                "the text of the last message, which is to be continued, is not in what it writes"
            )
        return before if after.startswith(END[1:]) else before.rstrip()

    def _render_one_turn(self) -> None:
        """Render a user's turn, so that a broken template fails before a model is loaded. It may refuse that turn.

        Raises:
            UserError: the template fails for a user's turn.
        """
        try:
            self._render([USER_TURN], add_generation_prompt=True)
        except Unbounded as error:
            raise UserError(f"{self._title} {error}. {_REMEDY}") from error
        except jinja2.exceptions.SecurityError as error:
            raise UserError(f"{self._title} is not safe ({_line(error)}). {_REMEDY}") from error
        except jinja2.TemplateError:  # it may want a system turn
            pass
        except Exception as error:
            raise UserError(f"{self._title} fails ({_line(error)}). {_REMEDY}") from error


_WITHOUT_SYSTEM = (
    "If the template takes no system turn, leave out --system_instruction and the task's `description`; or use "
    "chat_template=off."
)
_REMEDY = "Correct chat_template.jinja or tokenizer_config.json, or use chat_template=off."


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {one_line(error, most=200)}"


class _Budget:
    """What is left of a rendering's limits. The compiled template calls the methods as filters.

    The methods take jinja2's context: jinja2 evaluates filters of constants at compile time, unless they take it.
    """

    def begin(self) -> None:
        """Begin a rendering."""
        self._deadline = time.monotonic() + MOST_SECONDS
        self._left = MOST_CHARACTERS

    @jinja2.pass_context
    def step(self, _: Context, value: object) -> None:
        """Check the time at an iteration of a loop or a call of a macro."""
        if time.monotonic() > self._deadline:
            raise Unbounded(f"takes more than {MOST_SECONDS:g} seconds")

    @jinja2.pass_context
    def written(self, _: Context, value: Value) -> Value:
        """Count the characters of an output."""
        if isinstance(value, str):
            self._left -= len(value)
            if self._left < 0:
                raise Unbounded(f"writes more than {MOST_CHARACTERS:,} characters")
        return value

    @jinja2.pass_context
    def argument(self, _: Context, value: Value) -> Value:
        """Check an argument of a filter or function, such as a width."""
        if isinstance(value, int) and value > MOST_CHARACTERS:
            raise Unbounded(f"asks for a number above {MOST_CHARACTERS:,}")
        return value

    @jinja2.pass_context
    def kept(self, _: Context, value: Value) -> Value:
        """Check a value that is assigned to a variable."""
        if isinstance(value, (str, list, tuple)) and len(value) > MOST_CHARACTERS:
            raise Unbounded(f"makes a value of more than {MOST_CHARACTERS:,} characters or parts")
        return value


def _compile(source: str, budget: _Budget) -> jinja2.Template:
    """Compile a template in transformers' environment, with calls of `budget` in it."""
    from transformers.utils import chat_template_utils

    # An empty template's environment has the filters, names and extensions that transformers gives to all.
    environment = chat_template_utils._compile_jinja_template("").environment.overlay()
    # As filters, the methods are called directly; the sandbox's call of a method would double a rendering's time.
    checks = {f"budget_{name}": getattr(budget, name) for name in ("argument", "kept", "step", "written")}
    environment.filters = environment.filters | checks
    environment.intercepted_binops = frozenset({"*", "**"})
    environment.call_binop = functools.partial(_bounded, environment.call_binop)
    # jinja2's lipsum writes any number of paragraphs without a loop in the template.
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
    """Multiply, or raise to a power, unless the result would exceed the limits."""
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * max(right, 0) if operator == "**" else left.bit_length() + right.bit_length()
        if bits > MOST_BITS:
            raise Unbounded(f"computes numbers of more than {MOST_BITS:,} bits")
    for parts, times in ((left, right), (right, left)):
        if isinstance(parts, (str, list, tuple)) and isinstance(times, int) and len(parts) * times > MOST_CHARACTERS:
            raise Unbounded(f"makes a value of more than {MOST_CHARACTERS:,} characters or parts")
    return compute(context, operator, left, right)
