"""What a harness request's `gen_kwargs` come to, together with model_args."""

from __future__ import annotations

import copy
import importlib
import inspect
import logging
import pydoc
import re
from pathlib import Path
from typing import Any, get_type_hints

import lm_eval.tasks
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from lm_eval._cli.utils import key_val_to_dict
from lm_eval.config.task import TaskConfig

from sdar_lm_eval import arguments, settings, spellings
from sdar_lm_eval.engines.native.strategies import STRATEGIES
from sdar_lm_eval.engines.registry import ENGINES, EngineSpec
from sdar_lm_eval.errors import UserError
from sdar_lm_eval.settings import (
    ModelSettings,
    check_gen_kwargs,
    read_generation,
    to_bool,
    to_texts,
)
from sdar_lm_eval.spellings import MAX_TOKENS_SPELLINGS


def read(gen_kwargs: dict[str, Any] | None = None, **base: Any) -> Any:
    return read_generation(gen_kwargs or {}, base)


def cli(text: str) -> dict[str, Any]:
    """Read `--gen_kwargs text` as lm_eval does."""
    return key_val_to_dict(text)


# The harness's default, and nothing at all


def test_a_task_without_generation_kwargs_is_greedy_and_stops_at_its_delimiter() -> None:
    arriving = TaskConfig(task="t", output_type="generate_until").generation_kwargs
    assert arriving == {"temperature": 0.0, "do_sample": False, "max_gen_toks": 256, "until": ["\n\n"]}
    read_ = read(arriving)
    assert (read_.decoding.temperature, read_.max_gen_toks, read_.until) == (0.0, 256, ("\n\n",))


def test_nothing_given_means_the_defaults() -> None:
    read_ = read()
    assert (read_.max_gen_toks, read_.until) == (512, ())
    expected = {
        "block_length": 4,
        "denoising_steps": 4,
        "remasking_strategy": "low_confidence_dynamic",
        "confidence_threshold": 0.85,
        "eb_threshold": 0.35,
        "temperature": 0.0,
        "top_k": 0,
        "top_p": 1.0,
        "repetition_penalty": 1.0,
    }
    assert read_.decoding.as_dict().items() >= expected.items()


# Greedy or sampled: the harness's rule


@pytest.mark.parametrize(
    ("gen_kwargs", "base", "temperature"),
    [
        ({}, {}, 0.0),
        ({"until": ["Q:"]}, {}, 0.0),  # 61 stock tasks: the harness decodes them greedily
        ({"temperature": 0.7}, {}, 0.7),
        ({"temperature": 0}, {}, 0.0),
        ({"do_sample": True}, {}, 1.0),
        ({"do_sample": True, "temperature": 0.2}, {}, 0.2),
        ({"do_sample": True, "temperature": None}, {}, 1.0),
        ({"do_sample": False, "temperature": 1}, {}, 0.0),
        ({"do_sample": None, "temperature": "0.5"}, {}, 0.5),
        ({"do_sample": "false", "temperature": "0.5"}, {}, 0.0),
        ({"do_sample": "True"}, {}, 1.0),
        # model_args hold where the request does not say …
        ({}, {"temperature": 0.7}, 0.7),
        ({}, {"do_sample": True}, 1.0),
        ({}, {"do_sample": False, "temperature": 0.7}, 0.0),
        ({"do_sample": True}, {"temperature": 0.7}, 0.7),
        # … and nowhere else
        ({"do_sample": False}, {"temperature": 0.7}, 0.0),
        ({"do_sample": False}, {"do_sample": True}, 0.0),
        ({"temperature": 0}, {"do_sample": True}, 0.0),
        ({"temperature": 0.3}, {"do_sample": False}, 0.3),
    ],
)
def test_do_sample_and_temperature_decide(gen_kwargs: dict[str, Any], base: dict[str, Any], temperature: float) -> None:
    read_ = read(gen_kwargs, **base)
    assert read_.decoding.temperature == temperature
    assert read_.is_drawn == (temperature > 0)


def test_the_random_strategy_is_drawn_though_greedy() -> None:
    assert read({"remasking_strategy": "random"}).is_drawn
    assert not read({"do_sample": True, "top_k": 1}).is_drawn


@pytest.mark.parametrize(
    ("gen_kwargs", "base", "says"),
    [
        (
            {"do_sample": False, "temperature": 0.7},
            {},
            "; --gen_kwargs do_sample=true,temperature=0.7 samples",
        ),
        ({"do_sample": True, "temperature": 0}, {}, "do_sample=true with temperature=0 is greedy"),
        ({"do_sample": False, "temperature": 0.0}, {"temperature": 0.7}, "sampling in model_args has no effect"),
        ({"do_sample": False}, {}, ""),
        ({"do_sample": False, "temperature": 0.0, "until": []}, {"confidence_threshold": 0.9}, ""),
        ({}, {"do_sample": False}, ""),
    ],
)
def test_contradictions_are_said(
    gen_kwargs: dict[str, Any], base: dict[str, Any], says: str, caplog: pytest.LogCaptureFixture
) -> None:
    read(gen_kwargs, **base)
    assert says in caplog.text if says else not caplog.text


# The length's spellings


@pytest.mark.parametrize("spelling", MAX_TOKENS_SPELLINGS)
def test_every_spelling_of_the_length_counts(spelling: str) -> None:
    assert read({spelling: 32}).max_gen_toks == 32
    assert read({}, **{spelling: 32}).max_gen_toks == 32


@pytest.mark.parametrize("command_line", MAX_TOKENS_SPELLINGS)
@pytest.mark.parametrize("in_yaml", MAX_TOKENS_SPELLINGS)
def test_the_command_line_beats_the_task_whatever_they_call_it(in_yaml: str, command_line: str) -> None:
    arriving = {"until": [], in_yaml: 512, "do_sample": False}
    arriving.update(cli(f"temperature=0,{command_line}=32"))  # as lm_eval merges them
    assert read(arriving, max_gen_toks=100).max_gen_toks == 32


def test_two_lengths_in_one_place_are_said(caplog: pytest.LogCaptureFixture) -> None:
    spellings.warn_once_of_two_spellings.cache_clear()
    with caplog.at_level(logging.INFO):
        read({"max_gen_toks": 512, "max_new_tokens": 512})
        assert not caplog.text
        assert read({"max_gen_toks": 512, "max_new_tokens": 32, "max_tokens": None}).max_gen_toks == 32
        assert read({"strategy": "static", "remasking_strategy": "random"}).decoding.remasking_strategy == "random"
    assert "max_new_tokens=32 overrides max_gen_toks=512, which is given in the same place." in caplog.text
    assert "remasking_strategy=random overrides remasking_strategy=low_confidence_static, which is" in caplog.text


@pytest.mark.parametrize(("value", "tokens"), [("32", 32), (1000.0, 1000), ("1e3", 1000)])
def test_lengths_come_as_numbers_or_text(value: Any, tokens: int) -> None:
    assert read({"max_gen_toks": value}).max_gen_toks == tokens


@pytest.mark.parametrize("value", [0, -1, "many", 1.5, True, [32], float("nan")])
def test_lengths_out_of_range_are_refused(value: Any) -> None:
    with pytest.raises(UserError, match="max_new_tokens="):
        read({"max_new_tokens": value})


# Values as text, precedence, names


def test_text_means_what_the_value_means() -> None:
    values = {
        "block_length": 8,
        "denoising_steps": 2,
        "remasking_strategy": "entropy_bounded",
        "confidence_threshold": 0.5,
        "eb_threshold": 0.1,
        "temperature": 0.9,
        "top_k": 20,
        "top_p": 0.95,
        "repetition_penalty": 1.1,
        "max_gen_toks": 64,
        "do_sample": True,
    }
    texts = {name: str(value) for name, value in values.items()}
    assert read(values) == read(texts) == read(cli(",".join(f"{n}={v}" for n, v in texts.items())))
    model_args = ModelSettings.read("demo", texts, "native").decoding
    assert read(values) == read({}, **model_args)
    assert {name: type(value) for name, value in model_args.items()} == {n: type(v) for n, v in values.items()}


def test_gen_kwargs_beat_model_args_beat_the_default() -> None:
    read_ = read({"confidence_threshold": 0.7}, confidence_threshold=0.6, top_p=0.9)
    assert (read_.decoding.confidence_threshold, read_.decoding.top_p, read_.decoding.top_k) == (0.7, 0.9, 0)


def test_none_means_not_given() -> None:
    assert read({"top_p": None, "until": None, "max_gen_toks": None, "num_beams": None}, top_p=0.9) == read(top_p=0.9)


def test_minus_one_switches_top_k_off() -> None:
    assert read(cli("top_k=-1")).decoding.top_k == 0


@pytest.mark.parametrize(
    ("given", "base", "steps"),
    [
        ({"block_length": 8}, {"block_length": 4}, 8),
        ({"block_length": 2}, {}, 2),
        ({"denoising_steps": 2}, {"block_length": 4}, 2),
        ({"block_length": 8}, {"denoising_steps": 4}, 4),
        ({"block_length": 8, "denoising_steps": 4}, {"denoising_steps": 2}, 4),
    ],
)
def test_steps_follow_the_block_unless_given(given: dict[str, Any], base: dict[str, Any], steps: int) -> None:
    assert read(given, **base).decoding.denoising_steps == steps


def test_a_shorter_block_than_the_steps_of_model_args_is_refused() -> None:
    with pytest.raises(UserError, match=r"denoising_steps=4 is out of range: .* from 1 to block_length \(2\)"):
        read({"block_length": 2}, denoising_steps=4)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("block_length", [0, -4, 1.5, 4096, "four"]),
        ("denoising_steps", [0, 5]),
        ("confidence_threshold", [-0.1, 1.1, "high"]),
        ("eb_threshold", [-1]),
        ("temperature", [-1, "warm", float("inf")]),
        ("top_p", [0, 1.5]),
        ("top_k", [-2, 0.5]),
        ("repetition_penalty", [0]),
        ("remasking_strategy", ["low_confidence_statc", "", 3]),
        ("do_sample", ["maybe", 2, 0.5]),
    ],
)
def test_values_out_of_range_are_refused_by_name(name: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(UserError, match=f"^{name}="):
            read({name: value})
        with pytest.raises(UserError, match=f"^{name}="):
            read({"until": []}, **{name: value})


def test_an_unknown_strategy_gets_a_suggestion() -> None:
    with pytest.raises(UserError, match="Did you mean 'low_confidence_static'") as caught:
        read({"remasking_strategy": "low_confidence_statc"})
    assert all(strategy in str(caught.value) for strategy in STRATEGIES)


def test_unknown_names_are_refused_with_a_suggestion_and_the_list() -> None:
    with pytest.raises(
        UserError, match=r"gen_kwargs: 'confidence_treshold' is unknown. Did you mean 'confidence_thr"
    ) as c:
        read({"confidence_treshold": 0.9})
    assert "max_gen_toks" in str(c.value) and "threshold, steps" in str(c.value)
    with pytest.raises(UserError, match="'length_penalty' is unknown"):
        read({"length_penalty": 1.0})


def test_other_engines_settings_pass_where_they_ask_for_nothing() -> None:
    assert read({"num_beams": 1, "n": 1, "num_return_sequences": 1, "use_cache": True}) == read()
    assert read({"num_beams": "1", "use_cache": False}) == read()
    with pytest.raises(UserError, match=r"num_beams=10 is not supported, only 1; .* --gen_kwargs num_beams=1"):
        read({"num_beams": 10})


def test_nothing_arriving_is_changed() -> None:
    arriving = {"until": ["a", ""], "max_new_tokens": "8", "top_k": -1, "do_sample": "false", "temperature": 1}
    before = copy.deepcopy(arriving)
    read(arriving, until="x")
    assert arriving == before


# until


@pytest.mark.parametrize(
    ("value", "texts"),
    [
        (None, ()),
        ([], ()),
        ("", ()),
        ([""], ()),
        ("stop", ("stop",)),  # one text, not four letters
        (["a", "b", "a", ""], ("a", "b")),
        (("a",), ("a",)),
    ],
)
def test_until_is_a_text_several_or_none(value: Any, texts: tuple[str, ...]) -> None:
    assert to_texts(value) == texts
    assert read({"until": value}).until == texts


@pytest.mark.parametrize("value", [5, ["a", 5], {"a": 1}, [None]])
def test_until_of_anything_else_is_refused(value: Any) -> None:
    with pytest.raises(UserError, match="until="):
        read({"until": value})


def test_until_of_model_args_holds_where_the_task_names_none() -> None:
    assert read({}, until="x").until == ("x",)
    assert read({"until": []}, until="x").until == ()


@pytest.mark.parametrize(
    ("value", "truth"), [(True, True), (0, False), ("true", True), (" False ", False), (1, True), ("FALSE", False)]
)
def test_truth_comes_as_value_or_text(value: Any, truth: bool) -> None:
    assert to_bool("x", value) is truth


# The stock tasks


def _stock_generation_kwargs() -> list[tuple[str, dict[str, Any]]]:
    class Loader(yaml.CSafeLoader):
        pass

    Loader.add_multi_constructor("!", lambda *_: None)
    found = []
    for path in Path(lm_eval.tasks.__file__).parent.rglob("*"):
        if path.name.endswith(("yaml", "yml")) and path.is_file():
            text = path.read_text(encoding="utf-8")
            content = yaml.load(text, Loader) if "generation_kwargs" in text else None
            if content and content.get("generation_kwargs"):
                found.append((str(path), content["generation_kwargs"]))
    return found


def test_every_stock_task_can_be_read_but_those_with_beam_search() -> None:
    tasks = _stock_generation_kwargs()
    assert len(tasks) > 300
    refused = set()
    for path, gen_kwargs in tasks:
        try:
            read(gen_kwargs)
        except UserError:
            refused.add(Path(path).parent.name)
    assert refused == {"code-text"}


@given(
    st.dictionaries(
        st.sampled_from(
            ["do_sample", "temperature", "top_p", "until", "max_gen_toks", "max_tokens", "num_beams", "steps", "x"]
        ),
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.lists(st.text(max_size=2)),
    ),
    st.sampled_from([4, 32]),
)
def test_whatever_arrives_is_read_or_refused(arriving: dict[str, Any], block_length: int) -> None:
    try:
        read_ = read(arriving, block_length=block_length)
    except UserError:
        return
    check_gen_kwargs(arriving)  # knows no block length, and refuses nothing that a checkpoint allows
    assert read_.max_gen_toks >= 1
    assert all(read_.until) or not read_.until


@pytest.mark.parametrize(
    ("short", "setting", "value"),
    [
        ({"strategy": "static"}, "remasking_strategy", "low_confidence_static"),
        ({"strategy": "dynamic"}, "remasking_strategy", "low_confidence_dynamic"),
        ({"remasking_strategy": "entropy"}, "remasking_strategy", "entropy_bounded"),
        ({"strategy": "sequential"}, "remasking_strategy", "sequential"),
        ({"threshold": "0.5"}, "confidence_threshold", 0.5),
        ({"steps": 2}, "denoising_steps", 2),
        ({"block": 8}, "block_length", 8),
    ],
)
def test_short_names(caplog: pytest.LogCaptureFixture, short: dict[str, Any], setting: str, value: Any) -> None:
    caplog.set_level(logging.INFO)
    spellings.log_alias_once.cache_clear()
    model_args = ModelSettings.read("demo", short, "native").decoding
    for request, base in ((short, {}), ({}, model_args)):
        assert getattr(read_generation(request, base).decoding, setting) == value
    name, text = next(iter(short.items()))
    if text != "sequential":
        assert caplog.text.count(f"{name}={text} is read as {setting}={value}.") == 1


def test_of_a_short_and_a_full_name_the_later_one_holds() -> None:
    """`--gen_kwargs threshold=0.5` stands behind what a task says."""
    task = {"confidence_threshold": 0.9}
    assert read_generation(task | {"threshold": 0.5}, {}).decoding.confidence_threshold == 0.5
    assert read_generation({"threshold": 0.5} | task, {}).decoding.confidence_threshold == 0.9
    assert read_generation({"threshold": 0.5}, task).decoding.confidence_threshold == 0.5


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("seed", "The seed is the model's: --model_args seed=N, or the third of --seed."),
        ("stop", "Stop strings are until."),
        ("model", "The checkpoint is --model_args pretrained=…"),
        ("remasking", "Did you mean 'remasking_strategy'?"),
        ("low_confidence_threshold", "Did you mean 'confidence_threshold'?"),
        ("temprature", "Did you mean 'temperature'?"),
        ("tresh", "Did you mean 'threshold'?"),
        ("max_thinking_toks", "The model takes it, for all tasks: --model_args max_thinking_toks=1."),
    ],
)
def test_hints(name: str, hint: str) -> None:
    with pytest.raises(UserError) as raised:
        read_generation({name: 1}, {})
    assert f"gen_kwargs: '{name}' is unknown. {hint} Known: block_length" in str(raised.value)


@pytest.mark.parametrize("spec", ENGINES.values(), ids=lambda spec: spec.name)
def test_help_shows_each_argument_with_its_type(spec: EngineSpec) -> None:
    module, _, name = spec.lm.partition(":")
    text = pydoc.plain(pydoc.render_doc(getattr(importlib.import_module(module), name)))
    for argument, kind in get_type_hints(getattr(arguments, spec.arguments)).items():
        described = rf"{argument} \({re.escape(inspect.formatannotation(kind))}\): \S+"
        assert re.search(described, text), argument
        assert re.search(rf"[(,]\s*{argument}: ", text), argument  # in the signature, too


# What each strategy reads of the settings that not all of them read. Source: generate.py of JetAstra/SDAR, where every
# strategy but entropy_bounded takes the schedule; and `random` of LLaDA's, which takes it too.
READ = {
    "low_confidence_static": {"denoising_steps"},
    "low_confidence_dynamic": {"denoising_steps", "confidence_threshold"},
    "sequential": {"denoising_steps"},
    "random": {"denoising_steps"},
    "entropy_bounded": {"eb_threshold"},
}
READ |= {
    name: {"denoising_steps"} if strategy.uses_schedule else {strategy.setting or ""}
    for name, strategy in STRATEGIES.items()
    if name not in READ
}


@pytest.mark.parametrize(
    "value", [{"denoising_steps": 2}, {"confidence_threshold": 0.5}, {"eb_threshold": 0.7}], ids=str
)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_setting_without_effect_is_told_once(
    caplog: pytest.LogCaptureFixture, strategy: str, value: dict[str, float]
) -> None:
    settings.warn_once_of_idle_knob.cache_clear()
    ((name, given_value),) = value.items()
    given = {"remasking_strategy": strategy, **value}
    for _ in range(2):
        settings.warn_of_idle_knobs(given, read_generation(given, {}).decoding, " decodes")
    told = f"{name}={given_value} has no effect: {strategy} decodes; strategy="
    assert caplog.text.count("has no effect") == caplog.text.count(told) == int(name not in READ[strategy])
    readers = " or ".join(reader for reader in STRATEGIES if name in READ[reader])
    assert (f"{told}{readers} reads it." in caplog.text) == (name not in READ[strategy])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_default_that_is_given_is_no_mistake(caplog: pytest.LogCaptureFixture, strategy: str) -> None:
    settings.warn_once_of_idle_knob.cache_clear()
    given = {"remasking_strategy": strategy, "block_length": 8, "denoising_steps": 8, "confidence_threshold": 0.85}
    settings.warn_of_idle_knobs(given, read_generation(given, {}).decoding, " decodes")
    assert "has no effect" not in caplog.text


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"answers": ""}, r"answers='' is no path\. Give one, or leave answers out"),
        ({"answers": True}, "answers=true is no path"),
        ({"trace": " "}, "trace=' ' is no path"),
        ({"device": ""}, "device='' names nothing"),
        ({"dtype": True}, "dtype=true names nothing"),
        ({"max_length": 0}, "max_length=0 is out of range: it must be 1 or more"),
        ({"max_length": "-5"}, "max_length=-5 is out of range"),
    ],
    ids=str,
)
def test_values_that_say_nothing_are_refused(given: dict[str, Any], message: str) -> None:
    """As `answers=$FOLDER` gives where the variable is not set."""
    with pytest.raises(UserError, match=message):
        ModelSettings.read("demo", given, "native")
