"""Runs files of SDAR's OpenCompass as they are, with stand-ins for what they import.

SDAR_OPENCOMPASS=…/SDAR/evaluation/opencompass python -m pytest tests/tasks
"""

from __future__ import annotations

import os
import random
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(os.environ.get("SDAR_OPENCOMPASS", "")) / "opencompass"

needs_opencompass = pytest.mark.skipif(
    not (ROOT / "configs" / "datasets").is_dir(), reason="SDAR_OPENCOMPASS names no evaluation/opencompass of SDAR"
)


class Anything(types.ModuleType):
    """A module that has every name, as a string."""

    def __getattr__(self, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class Registry:
    def register_module(self, *_: object, **__: object) -> Any:
        return lambda registered: registered


def running() -> Iterator[Callable[..., dict[str, Any]]]:
    """Yield a function that runs a file of OpenCompass, or lines of it, and returns its names."""
    before = dict(sys.modules)

    def run(path: str, start: str = "", end: str = "", **names: Any) -> dict[str, Any]:
        text = (ROOT / path).read_text("utf-8")
        text = text[text.index(start) if start else 0 :]
        text = text[: text.index(end, len(start)) if end else len(text)]
        exec(compile(text, str(ROOT / path), "exec"), names)
        return names

    def module(name: str, **names: Any) -> types.ModuleType:
        sys.modules[name] = made = types.ModuleType(name)
        made.__path__ = []  # type: ignore[attr-defined]
        vars(made).update(names)
        return made

    registries = ("ICL_PROMPT_TEMPLATES", "TEXT_POSTPROCESSORS", "ICL_EVALUATORS", "LOAD_DATASET")
    for name in ("mmengine", "opencompass", "opencompass.openicl", "opencompass.utils"):
        module(name)
    module("mmengine.config", ConfigDict=dict)
    module("mmengine.dist", is_main_process=lambda: True)
    module("opencompass.registry", **{name: Registry() for name in registries})
    module("opencompass.utils.types", _check_type_list=lambda value, _: value)
    for name in (
        "datasets",
        "datasets.ProteinLMBench",
        "evaluator",
        "openicl.icl_retriever",
        "openicl.icl_inferencer",
        "openicl.icl_evaluator",
    ):
        sys.modules[f"opencompass.{name}"] = anything = Anything(name)
        anything.__path__ = []
    sys.modules["opencompass.utils.text_postprocessors"] = Anything("text_postprocessors")
    vars(module("opencompass.utils.prompt")).update(run("utils/prompt.py"))
    vars(module("opencompass.openicl.icl_prompt_template")).update(run("openicl/icl_prompt_template.py"))
    yield run
    for name in set(sys.modules) - set(before):
        if name.partition(".")[0] in ("mmengine", "opencompass"):
            del sys.modules[name]


def conversations_by(opencompass: Any) -> Any:
    """Return a function from a dataset configuration, its shots and a row to what the chat template would get."""
    typing = vars(__import__("typing"))
    template = sys.modules["opencompass.openicl.icl_prompt_template"].PromptTemplate
    retriever = opencompass("openicl/icl_retriever/icl_base_retriever.py")["BaseRetriever"]
    names = {**typing, **vars(sys.modules["opencompass.utils.prompt"]), "PromptType": Any}
    names |= {"deepcopy": __import__("copy").deepcopy, "warnings": __import__("warnings")}
    parser = opencompass("models/base_api.py", "class APITemplateParser", "class TokenBucket", **names)
    model = "models/huggingface_above_v4_33.py"
    names = opencompass(model, "def _get_meta_template", "def _set_model_kwargs_torch_dtype", **parser)
    convert = opencompass(model, "def _convert_chat_messages", "def _format_with_fast")["_convert_chat_messages"]

    def messages(config: dict[str, Any], shots: list[Any], row: dict[str, Any]) -> list[dict[str, str]]:
        made = {
            name: template(**{key: value for key, value in config["infer_cfg"][name].items() if key != "type"})
            for name in ("ice_template", "prompt_template")
            if name in config["infer_cfg"]
        }
        source = object.__new__(type("Retriever", (retriever,), {"retrieve": lambda self: []}))
        source.index_ds, source.test_ds = shots, [row]
        source.ice_separator = source.ice_eos_token = "\n"
        source.dataset_reader = types.SimpleNamespace(output_column=config["reader_cfg"]["output_column"])
        shown = source.generate_ice(list(range(len(shots))), ice_template=made.get("ice_template"))
        prompt = source.generate_prompt_for_generate_task(0, shown, "", **made)
        return convert([names["_get_meta_template"](None).parse_template(prompt, mode="gen")])[0]

    return messages


def answers(pieces: str, number: int, seed: int = 0) -> Iterator[str]:
    """Yield random answers of the pieces that the rules look for: they reach more of the rules' corners than models."""
    chosen = random.Random(seed)
    parts = [piece.replace("\\n", "\n") for piece in pieces.split("|")]
    for _ in range(number):
        yield "".join(chosen.choices(parts, k=chosen.randint(1, 9)))
