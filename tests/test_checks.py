"""Arguments of wrong types, in each public function: one `UserError` says what was given and what is allowed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from run_files import write_run

import sdar_lm_eval
from sdar_lm_eval import Checkpoint, DecodingConfig, GenerationRequest, UserError, compare, load, make_engine, read_run
from sdar_lm_eval.checks import checks_types
from sdar_lm_eval.demo import CHECKPOINT

WRONG = [None, 5, 1.5, True, b"demo", ["demo"], {"demo": 1}, object(), Path("/nowhere")]
Call = Callable[[Any], object]


@pytest.fixture(scope="module")
def model() -> Iterator[sdar_lm_eval.LoadedModel]:
    with load(CHECKPOINT) as loaded:  # a path is as good as a text
        yield loaded


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run"), {"task": {"acc,none": [1, 0, 1]}})


@pytest.mark.parametrize("wrong", WRONG, ids=lambda value: type(value).__name__)
def test_a_wrong_type_is_a_user_error(wrong: Any, model: sdar_lm_eval.LoadedModel, run: Path) -> None:
    both, request = compare(run, run), {"prompt_ids": (1,), "max_new_tokens": 2, "decoding": DecodingConfig()}
    calls: dict[str, Call] = {
        "pretrained": load,
        "engine": lambda value: load("demo", value),
        "path": read_run,
        "a": lambda value: compare(value, run),
        "tasks": lambda value: compare(run, run, tasks=value),
        "metrics": lambda value: compare(run, run, metrics=value),
        "filters": lambda value: compare(run, run, filters=value),
        "task": both.changed,
        "name": lambda value: make_engine(value, model.checkpoint),
        "checkpoint": lambda value: make_engine("native", value),
        "device": lambda value: make_engine("native", model.checkpoint, device=value),
        "dtype": lambda value: make_engine("native", model.checkpoint, dtype=value),
        "watch": lambda value: model.generate("Hi", watch=value, max_gen_toks=4),
        "prompts": lambda value: list(model.stream(value, max_gen_toks=4)),
        "pairs": model.loglikelihood,
        "token_ids": model.pieces,
        **{name: lambda value, name=name: GenerationRequest(**(request | {name: value})) for name in request},
        "revision": lambda value: Checkpoint.open("demo", value),
        "a checkpoint": Checkpoint.open,
    }
    allowed = [
        *[("tasks", None), ("metrics", None), ("filters", None), ("task", None), ("watch", None), ("revision", None)],
        *[("max_new_tokens", 5), ("prompts", ["demo"])],
    ]
    for name, call in calls.items():
        if (name, wrong) in allowed and not isinstance(wrong, bool):
            call(wrong)
        else:
            with pytest.raises(UserError):
                call(wrong)


def test_the_message_says_what_was_given_and_what_is_allowed(model: sdar_lm_eval.LoadedModel, run: Path) -> None:
    told = {
        r"path=5 is of type int\. Give str or PathLike\.": lambda: read_run(5),  # type: ignore[arg-type]
        r"a=5 is of type int\. Give str, PathLike or RunFrames\.": lambda: compare(5, run),  # type: ignore[arg-type]
        r"tasks=\['a', 5\] is of type list\. Give list of str or None\.": lambda: compare(run, run, tasks=["a", 5]),  # type: ignore[list-item]
        r"watch=5 is of type int\. Give a function or None\.": lambda: model.generate("Hi", watch=5),  # type: ignore[call-overload]
        r"checkpoint='demo' is of type str\. Give Checkpoint\.": lambda: make_engine("native", "demo"),  # type: ignore[arg-type]
        r"engine got an unexpected keyword argument 'pages'\. Known: checkpoint, device, ": (
            lambda: make_engine("native", model.checkpoint, pages=5)
        ),
    }
    for message, call in told.items():
        with pytest.raises(UserError, match=message):
            call()
    with pytest.raises(TypeError, match=r"load\(\) takes from 0 to 2 positional arguments but 3 were given"):
        load("demo", "native", 3)  # type: ignore[call-overload]


def test_what_python_users_give_instead_of_a_list_is_taken(model: sdar_lm_eval.LoadedModel, run: Path) -> None:
    for prompts in (pd.Series(["Hi"]), np.array(["Hi"]), ("Hi",), iter(["Hi"])):
        assert len(list(model.stream(prompts, max_gen_toks=4))) == 1  # type: ignore[arg-type]
    assert model.pieces(np.array([5, 6])) == model.pieces([np.int64(5), np.int64(6)])  # type: ignore[arg-type, list-item]
    for tasks in ("task", ["task"], {"task"}, pd.Series(["task"])):
        assert len(compare(run, run, tasks=tasks).table) == 1
    assert checks_types(lambda: 5)() == 5


def test_the_first_hundred_elements_are_checked_and_no_more(run: Path) -> None:
    ids = [*range(100), "a"]
    assert GenerationRequest(tuple(ids), 2, DecodingConfig())  # type: ignore[arg-type]
    with pytest.raises(UserError, match="prompt_ids"):
        GenerationRequest(tuple(ids[1:]), 2, DecodingConfig())  # type: ignore[arg-type]
