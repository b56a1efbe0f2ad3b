"""Arguments of wrong types, in each public function: one `UserError` says what was given and what is allowed."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
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
        r'tasks=\["a", 5\] is of type list\. Give list of str or None\.': lambda: compare(run, run, tasks=["a", 5]),  # type: ignore[list-item]
        r"prompt_ids=5 is of type int\. Give list, tuple or array of int\.": (
            lambda: GenerationRequest(5, 2, DecodingConfig())  # type: ignore[arg-type]
        ),
        r"prompt_ids='Hi' is of type str\. Give list, tuple or array of int\.": (
            lambda: GenerationRequest("Hi", 2, DecodingConfig())  # type: ignore[arg-type]
        ),
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
    for prompts in (pd.Series(["Hi"]), np.array(["Hi"]), ("Hi",), iter(["Hi"]), {"Hi": 1}.keys()):
        assert len(list(model.stream(prompts, max_gen_toks=4))) == 1  # type: ignore[arg-type]
    request = GenerationRequest((5, 6), 2, DecodingConfig())
    for ids in (
        np.array([5, 6]),
        [np.int64(5), 6],
        torch.tensor([5, 6]),
        pd.Series([5, 6]),
        deque([5, 6]),
        {5: 1, 6: 1}.keys(),
    ):
        for given in (ids, iter(ids)):
            assert model.pieces(given) == ["&", "'"]  # type: ignore[arg-type]
        assert model.checkpoint.decode(iter(ids)) == model.checkpoint.decode(ids) == "&'"  # type: ignore[arg-type]
        assert GenerationRequest(ids, 2, DecodingConfig()) == request  # type: ignore[arg-type]
    for tasks in ("task", ["task"], {"task"}, pd.Series(["task"])):
        assert len(compare(run, run, tasks=tasks).table) == 1
    assert checks_types(lambda: 5)() == 5


SEVERAL = [np.array([4, 8]), pd.Series([4, 8]), torch.tensor([4.5, 8]), torch.tensor(4.5)]


@pytest.mark.parametrize("wrong", SEVERAL, ids=lambda value: f"{type(value).__name__} of {value.ndim} axes")
def test_arrays_are_no_numbers(wrong: Any, model: sdar_lm_eval.LoadedModel) -> None:
    for call in (
        lambda: model.generate("Hi", seed=wrong),
        lambda: model.settings_of(block_length=wrong),
        lambda: load("demo", max_active=wrong),
        lambda: DecodingConfig(block_length=wrong),
        lambda: GenerationRequest((5,), wrong, DecodingConfig()),
    ):
        with pytest.raises(UserError, match=r"^[^\n]+$"):
            call()


def test_scalars_of_numpy_and_torch_are_numbers_and_bools(model: sdar_lm_eval.LoadedModel) -> None:
    for number in (np.float32(0.5), torch.tensor(0.5)):
        assert model.settings_of(threshold=number).decoding.confidence_threshold == 0.5  # type: ignore[call-arg]
    assert model.settings_of(block_length=torch.tensor(4)).decoding.block_length == 4  # type: ignore[arg-type]
    for true in (np.bool_(True), torch.tensor(True)):
        assert not model.settings_of(do_sample=true, temperature=1).decoding.greedy  # type: ignore[arg-type]
        with pytest.raises(UserError, match="temperature=true is not a number"):
            model.settings_of(temperature=true)  # type: ignore[arg-type]


def test_containers_whose_elements_are_no_list_of_what_is_asked(model: sdar_lm_eval.LoadedModel, run: Path) -> None:
    frame = pd.DataFrame({"task": ["Hi"]})  # its elements are the names of its columns
    for call in (
        lambda: model.generate(frame),  # type: ignore[call-overload]
        lambda: model.generate({"Hi"}),  # type: ignore[call-overload]
        lambda: model.generate(b"Hi"),  # type: ignore[call-overload]
        lambda: compare(run, run, tasks=frame),  # type: ignore[arg-type]
        lambda: compare(run, run, tasks=np.array([1])),  # type: ignore[arg-type]
        lambda: model.pieces(np.array([[5]])),  # type: ignore[arg-type]
        lambda: model.pieces(np.array([5.5])),  # type: ignore[arg-type]
        lambda: model.checkpoint.decode(None),  # type: ignore[arg-type]
    ):
        with pytest.raises(UserError):
            call()


@pytest.mark.parametrize("token", [-1, 2**40, 2**70])
def test_numbers_that_are_no_token_ids_are_named(token: int, model: sdar_lm_eval.LoadedModel) -> None:
    for call in (model.pieces, model.checkpoint.decode):
        with pytest.raises(UserError, match=f"has no token {token}. Give tokens of 0 to 710.$"):
            call([5, token])


class Name(str, Enum):  # not StrEnum, whose members `str` converts to their values
    CHECKPOINT, DTYPE, CHAT, STRATEGY = "demo", "float32", "auto", "dynamic"


@dataclass
class BytesPath:
    path: Path

    def __fspath__(self) -> bytes:
        return os.fsencode(self.path)


def test_enums_of_texts_and_paths_of_bytes_are_taken(run: Path) -> None:
    with load(Name.CHECKPOINT, dtype=Name.DTYPE, chat_template=Name.CHAT, strategy=Name.STRATEGY) as model:  # type: ignore[call-overload]
        assert model.checkpoint.name == Checkpoint.open(Name.CHECKPOINT).name == "demo"
    given: Any = BytesPath(run)
    assert len(read_run(given).samples) == 3
    assert Checkpoint.open(BytesPath(CHECKPOINT)).fingerprint == model.checkpoint.fingerprint  # type: ignore[arg-type]


def test_the_first_hundred_elements_are_checked_and_no_more(run: Path) -> None:
    ids = [*range(100), "a"]
    assert GenerationRequest(tuple(ids), 2, DecodingConfig())  # type: ignore[arg-type]
    with pytest.raises(UserError, match="prompt_ids"):
        GenerationRequest(tuple(ids[1:]), 2, DecodingConfig())  # type: ignore[arg-type]
