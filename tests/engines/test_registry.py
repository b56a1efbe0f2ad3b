"""The table of engines, which all others read; and one engine more, in a file of its own."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import lm_eval
import pytest
from lm_eval.tasks import TaskManager

from sdar_lm_eval import arguments
from sdar_lm_eval.autoload import TASKS
from sdar_lm_eval.engines import registry
from sdar_lm_eval.engines.native.strategies import STRATEGIES
from sdar_lm_eval.engines.registry import ENGINES, EngineSpec, make_engine
from sdar_lm_eval.engines.types import Scorer
from sdar_lm_eval.errors import UserError

TOY = """
from sdar_lm_eval.engines.types import GenerationResult
from sdar_lm_eval.engines.types import EngineInfo

class Toy:
    info = EngineInfo("toy", device="cpu", dtype="none", max_active=1)
    def __init__(self, checkpoint, device, dtype, max_active):
        self.answer = tuple(checkpoint.tokenizer.encode("#### 7"))
    def prepare(self, requests): pass
    def generate(self, requests):
        for index, request in enumerate(requests):
            yield index, GenerationResult(self.answer, "stop", 1, 1, 1, 0.1)
    def peak_memory_bytes(self): return 0
    def close(self): pass
"""


@pytest.mark.parametrize("spec", ENGINES.values(), ids=ENGINES)
def test_what_the_table_says_is_so(spec: EngineSpec) -> None:
    for target in (spec.target, spec.lm):
        module, _, name = target.partition(":")
        assert hasattr(importlib.import_module(module), name)
    assert hasattr(arguments, spec.arguments)
    assert set(spec.strategies or ()) <= set(STRATEGIES)
    module, _, name = spec.target.partition(":")
    assert hasattr(getattr(importlib.import_module(module), name), "score") is spec.scores
    assert {"score"} <= set(dir(Scorer))


def test_an_engine_is_a_file_and_an_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda _: None)
    (tmp_path / "toy_engine.py").write_text(TOY)
    monkeypatch.syspath_prepend(tmp_path)
    lm = "sdar_lm_eval.lm.model:SDARToyLM"
    spec = EngineSpec(name="toy", model="sdar-toy", lm=lm, target="toy_engine:Toy", arguments="ModelArguments")
    monkeypatch.setitem(ENGINES, "toy", spec)
    module, _, name = lm.partition(":")
    model = getattr(importlib.import_module(module), name)
    assert "--model sdar-toy" in model.__doc__ and "max_active (int" in model.__doc__
    results = lm_eval.simple_evaluate(
        model(pretrained="demo"),
        tasks=["gsm8k_sdar_demo"],
        task_manager=TaskManager(include_path=TASKS, include_defaults=False),
        limit=2,
        bootstrap_iters=0,
    )
    assert results is not None
    assert {sample["resps"][0][0] for sample in results["samples"]["gsm8k_sdar_demo"]} == {"#### 7"}
    assert results["config"]["sdar_lm_eval"]["engine"] == "toy"
    with pytest.raises(UserError, match="'kv_pages' is unknown"):
        model(pretrained="demo", kv_pages=4)
    with pytest.raises(UserError, match=r"'toi' is unknown; known: .*native, .*, toy\. Did you mean 'toy'"):
        make_engine("toi", None)  # type: ignore[arg-type]


def test_it_needs_the_standard_library_alone() -> None:
    program = f"import sys; sys.path.insert(0, {str(Path(registry.__file__).parents[2])!r})\n"
    program += "import sdar_lm_eval.engines.registry; assert not {'torch', 'numpy', 'lm_eval'} & set(sys.modules)"
    subprocess.run([sys.executable, "-S", "-c", program], check=True)
