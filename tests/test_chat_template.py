"""A sane template renders as transformers renders it; any other ends within a second, as one line that names it."""

from __future__ import annotations

import time
import types
from typing import Any

import pytest
from support import REAL_FOLDER

from sdar_lm_eval import chat_template as module
from sdar_lm_eval.chat_template import ChatTemplate
from sdar_lm_eval.checkpoint import Checkpoint
from sdar_lm_eval.demo import CHECKPOINT as DEMO
from sdar_lm_eval.errors import UserError

USER = [{"role": "user", "content": "What is 2 + 3?"}]
CONVERSATIONS = [
    USER,
    [{"role": "system", "content": "Be\nterse. {{ no }} {% template %}"}, *USER],
    [*USER, {"role": "assistant", "content": "<think>\nhm\n</think>\n\n5"}, {"role": "user", "content": " And  6 ? "}],
    [*USER, {"role": "assistant", "content": ""}, {"role": "user", "content": "日本 <b>&amp; 'x' \"y\""}],
]
OPEN = [
    [*USER, {"role": "assistant", "content": content}]
    for content in (
        "The answer is",
        "The answer is ",
        " \n5",
        "5 \n",
        "What is 2 + 3?",
        "<think>\na",
        "x\ufdd0",
        "a b  ",
    )
]
LOOP = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
SANE = {
    "demo": (DEMO / "chat_template.jinja").read_text(),
    "loop": LOOP + "{% if add_generation_prompt %}[assistant]{% endif %}",
    "stripped": "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] | trim }}</s>{% endfor %}",
    "special tokens": "{{ eos_token }}{{ bos_token }}{{ nonesuch }}" + LOOP + "{{ pad_token ~ mask_token }}",
    "macro": "{% macro turn(m, end='$') %}{{ m.role ~ ': ' + m.content }}{{ end }}{% endmacro %}"
    "{% for m in messages %}{{ turn(m) }}{{ turn(m, end=loop.index) }}{% endfor %}",
    "caller": "{% macro box() %}({{ caller() }}){% endmacro %}{% call box() %}" + LOOP + "{% endcall %}",
    "namespace": "{% set ns = namespace(n=0, t='') %}{% for m in messages %}{% set ns.n = ns.n + m.content | length %}"
    "{% set ns.t = ns.t ~ m.role %}{% endfor %}{{ ns.n * 2 }} {{ 2 ** 5 }} {{ '-' * 3 }} {{ ns.t }}" + LOOP,
    "block": "{% set text %}{% for m in messages %}{{ m.content }}|{% endfor %}{% endset %}{{ text | length }}"
    "{{ text }}",
    "json": "{{ messages | tojson(indent=2) }}{{ messages[-1] }}{{ none }}{{ true }}{{ 1.5 }}{{ [1] }}{{ {'a': 1} }}",
    "loop controls": "{% for m in messages[::-1] %}{% if m.role == 'system' %}{% continue %}{% endif %}"
    "{{ loop.first }}{{ m.content }}{% if loop.index > 2 %}{% break %}{% endif %}{% else %}none{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "spaces": "  {% for m in messages %}  \n  {{- m.content -}}  \n\n {# a comment #}\n{% endfor %}\n\n",
    "filters": "{% for m in messages | rejectattr('role', 'equalto', 'system') %}"
    "{{ m.content | upper | replace('A', 'b') }}{{ m.content.split(' ')[0].rstrip('?') }}"
    "{{ '%s-%d' | format(m.role, 3) }}{% endfor %}",
    "filter block": "{% filter upper %}" + LOOP + "{% endfilter %}",
    "recursive": "{% for m in [[1, [2]], 3] recursive %}{{ loop(m) if m is iterable else m }}{% endfor %}" + LOOP,
    "unpacked": "{% for key, value in messages[0] | dictsort %}{% set a, b = key, value %}{{ a ~ b }}{% endfor %}",
    "tools": "{% if tools is not none %}tools{% endif %}{% if documents %}documents{% endif %}" + LOOP,
    "with": "{% with first = messages[0].content %}{{ first }}{% endwith %}{% raw %}{{ raw }}{% endraw %}",
}
if REAL_FOLDER.is_dir():
    SANE["SDAR"] = (REAL_FOLDER / "chat_template.jinja").read_text()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return Checkpoint.open("demo").tokenizer


def of(source: Any, special_tokens: Any = None) -> ChatTemplate:
    return ChatTemplate(types.SimpleNamespace(chat_template=source, special_tokens_map=special_tokens or {}), "c")


@pytest.mark.parametrize("name", SANE)
def test_renders_as_transformers_does(tokenizer: Any, name: str) -> None:
    template = of(SANE[name], tokenizer.special_tokens_map)
    drops_system = name in ("loop controls", "filters")
    for conversation in CONVERSATIONS:
        if drops_system and conversation[0]["role"] == "system":
            with pytest.raises(UserError, match=r"writes no role 'system'\. Choose "):
                template.render(conversation)
            continue
        expected = tokenizer.apply_chat_template(
            conversation, chat_template=SANE[name], tokenize=False, add_generation_prompt=True
        )
        assert template.render(conversation) == expected


ANSWERED = [*USER, {"role": "assistant", "content": "5"}]
# As Qwen3's: a rule for each role, and no rule for others.
RULES = """{% if messages[0].role == 'system' %}<s>{{ messages[0].content }}{% endif %}
{%- for m in messages %}{% if m.role == 'user' %}<u>{{ m.content }}{% elif m.role == 'assistant' %}<a>{{ m.content }}
{%- elif m.role == 'tool' or m['role'] in ['observation'] %}<t>{{ m.content }}{% endif %}{% endfor %}"""
STRICT = "{% if messages[-1].role == 'developer' %}{{ raise_exception('no') }}{% endif %}" + RULES
MEANT = r"writes no role 'asistant'\. Did you mean 'assistant'\? Choose system, "


@pytest.mark.parametrize(
    ("source", "role", "told"),
    [
        (SANE["demo"], "asistant", MEANT + "developer, user, assistant, tool, function"),
        (SANE["demo"], "", r"writes no role ''\. Choose system, developer, user, assistant, tool, function\."),
        (RULES, "asistant", MEANT + r"user, assistant, tool\."),
        (RULES, "developer", r"writes no role 'developer'\. .*Choose system, user, assistant, tool\."),
        (RULES, "content", "writes no role 'content'"),
        (STRICT, "developer", r"refuses a conversation of user, assistant, developer \(TemplateError: no\)"),
        (STRICT, "asistant", r"Choose system, user, assistant, tool\."),
        (RULES, "system", r"leaves out message 3, of role 'system', of a conversation of user, assistant, system\. "),
        (SANE["loop controls"], "system", r"Choose developer, .*leave out --system_instruction and the task.s `desc"),
    ],
)  # fmt: skip
def test_a_role_that_the_template_does_not_write_is_refused(source: str, role: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        of(source).render([*ANSWERED, {"role": role, "content": "x"}])


def test_roles_that_the_template_writes_are_taken() -> None:
    for source, roles in ((RULES, ("tool", "observation")), (SANE["demo"], ("tool", "developer", "function"))):
        for role in roles:
            assert "12.5" in of(source).render([*ANSWERED, {"role": role, "content": "12.5"}])
    assert of(RULES).render([{"role": "system", "content": "Be terse."}, *USER]).startswith("<s>Be terse.")
    behind_an_answer = RULES.replace(
        "m.role == 'tool'", "m.role == 'tool' and messages[loop.index0 - 1].role == 'assistant'"
    )
    assert of(behind_an_answer).render([*ANSWERED, {"role": "tool", "content": "12.5"}]).endswith("<t>12.5")


@pytest.mark.parametrize("name", ["demo", "loop", "stripped", "spaces", *(["SDAR"] if "SDAR" in SANE else [])])
def test_an_answer_is_continued_as_transformers_does(tokenizer: Any, name: str) -> None:
    template = of(SANE[name])
    for conversation in OPEN:
        expected = tokenizer.apply_chat_template(
            conversation, chat_template=SANE[name], tokenize=False, continue_final_message=True
        )
        assert template.render(conversation, add_generation_prompt=False) == expected


def test_a_template_that_leaves_the_answer_out_cannot_continue_it() -> None:
    with pytest.raises(UserError, match=r"user, assistant \(TemplateError: the text of the last message"):
        of("{{ messages[0].content }}").render(OPEN[0], add_generation_prompt=False)


def test_of_several_templates_the_default_is_taken() -> None:
    assert of({"default": LOOP, "tool_use": "{{ 1 / 0 }}"}).render(USER) == "[user] What is 2 + 3?\n"


def test_it_is_not_slower_than_transformers(tokenizer: Any) -> None:
    template = of(tokenizer.chat_template, tokenizer.special_tokens_map)

    def seconds(render: Any) -> float:
        best = 1.0
        for _ in range(5):
            begun = time.perf_counter()
            for _ in range(200):
                render(CONVERSATIONS[1])
            best = min(best, time.perf_counter() - begun)
        return best

    theirs = seconds(lambda messages: tokenizer.apply_chat_template(messages, tokenize=False))
    assert seconds(template.render) < 1.5 * theirs


NESTED = "{% for i in range(99999) %}{% for j in range(99999) %}BODY{% endfor %}{% endfor %}"
HOSTILE = {
    "a loop": (NESTED.replace("BODY", ""), "takes more than 0.5 seconds"),
    "a loop that sets": (NESTED.replace("BODY", "{% set x = i + j %}"), "takes more than 0.5 seconds"),
    "a loop in a block": ("{% set x %}" + NESTED.replace("BODY", "") + "{% endset %}", "takes more than 0.5 seconds"),
    "a macro": (
        "{% macro f(n) %}{% if n %}{% set a = f(n - 1) %}{% set b = f(n - 1) %}{% endif %}{% endmacro %}{{ f(60) }}",
        "takes more than 0.5 seconds",
    ),
    "a recursive loop": (
        "{% for i in [1, 2] recursive %}{% set a = loop([1, 2]) if loop.depth < 40 %}{% endfor %}",
        "takes more than 0.5 seconds",
    ),
    "100 MB": ("{{ 'x' * 100000000 }}", "makes a value of more than 10,000,000 characters"),
    "100 MB, the other way": ("{{ 100000000 * 'x' }}", "makes a value of more than 10,000,000 characters"),
    "100 MB in pieces": (
        "{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
        "writes more than 10,000,000 characters",
    ),
    "100 MB of its own": (
        "{% for i in range(99999) %}" + "x" * 1000 + "{% endfor %}",
        "writes more than 10,000,000 characters",
    ),
    "100 MB in a block": (
        "{% set y %}{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}{% endset %}",
        "writes more than 10,000,000 characters",
    ),
    "100 MB at once": ("{{ ('x' * 5000000) | replace('x', 'yyy') }}", "writes more than 10,000,000 characters"),
    "100 GB at once": ("{{ 'x' | center(100000000000) }}", "asks for a number above 10,000,000"),
    "100 GB by a method": ("{{ 'x'.ljust(width) if false else 'x'.ljust(100000000000) }}", "asks for a number above"),
    "100 GB by name": ("{{ 'x' | indent(width=100000000000, first=true) }}", "asks for a number above 10,000,000"),
    "doubling": (
        "{% set ns = namespace(x='xx') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "makes a value of more than 10,000,000 characters",
    ),
    "a power": ("{{ 10 ** 1000000000 }}", "numbers of more than 10,000 bits"),
    "squares": (
        "{% set ns = namespace(x=9) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
        "numbers of more than 10,000 bits",
    ),
    "a range": ("{% for i in range(10 ** 6) %}{% endfor %}", "fails (OverflowError: "),
    "division": ("{{ 1 / 0 }}", "fails (ZeroDivisionError: division by zero)"),
    "types": ("{{ messages + 1 }}", "fails (TypeError: "),
    "the sandbox": ("{{ messages.__class__.__mro__ }}", "is not safe (SecurityError: "),
    "the sandbox, a call": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "is not safe (SecurityError: "),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "fails (RecursionError: "),
    "syntax": ("{% for %}", "cannot be compiled (TemplateSyntaxError: "),
    "an unknown tag": ("{% nonesuch %}", "cannot be compiled (TemplateSyntaxError: "),
    "an unknown filter": ("{{ 1 | nonesuch }}", "cannot be compiled (TemplateAssertionError: "),
    "nesting": ("{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}", "cannot be compiled (RecursionError: "),
    "nested loops": ("{% for i in [1] %}" * 500 + "{% endfor %}" * 500, "cannot be compiled ("),
    "no text": (5, "is 5, which is no text"),
    "too long": ("x" * 200_001, "has 200,001 characters"),
    "several": ({"a": LOOP, "b": LOOP}, "is one of several ('a', 'b'), and none of them is called 'default'"),
    "several, no text": ({"default": None}, "is null, which is no text"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_template_that_harms_ends_as_one_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a model is loaded, whatever the conversation will be."""
    monkeypatch.setattr(module, "MOST_SECONDS", 0.5)
    source, expected = HOSTILE[name]
    begun = time.perf_counter()
    with pytest.raises(UserError) as caught:
        of(source)
    said = str(caught.value)
    assert said.startswith("the chat template of checkpoint 'c' ")
    assert expected in said
    assert "use chat_template=off" in said
    assert "\n" not in said and len(said) < 600
    assert time.perf_counter() - begun < 3


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{% if messages[0].role == 'system' %}" + NESTED + "{% endif %}",
         "takes more than 0.5 seconds for a conversation of system, user."),
        ("{% if messages[0].role == 'system' %}{{ raise_exception('no\\nsystem' * 1000) }}{% endif %}",
         "refuses a conversation of system, user (TemplateError: no systemno systemno"),
        ("{% if messages[0].role == 'system' %}{{ lipsum(n=1000000) }}{% endif %}",
         "refuses a conversation of system, user (UndefinedError: 'lipsum' is undefined)"),
        ("{{ 1 / (messages[0].role != 'system') }}", "refuses a conversation of system, user (ZeroDivisionError: "),
    ],
)  # fmt: skip
def test_what_harms_some_conversations_is_found_there(
    source: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_SECONDS", 0.5)
    template = of(source)
    template.render(USER)
    with pytest.raises(UserError) as caught:
        template.render(CONVERSATIONS[1])
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    template.render(USER)  # the limits are each rendering's own


def test_a_template_that_wants_a_system_turn_is_not_refused_for_that() -> None:
    wanted = "{% if messages[0].role != 'system' %}{{ raise_exception('give a system turn') }}{% endif %}"
    template = of(wanted + "{{ messages[0].content }} {{ messages[1].content }}")
    assert template.render([{"role": "system", "content": "Be terse."}, *USER]) == f"Be terse. {USER[0]['content']}"
    with pytest.raises(UserError, match=r"refuses a conversation of user \(TemplateError: give a system turn\)"):
        template.render(USER)
