"""`sdar_lm_eval doctor`: what it finds here, engines that can be trusted, and engines that err."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

import lmdeploy_standin
import pytest
import torch

from sdar_lm_eval import Checkpoint, trial
from sdar_lm_eval.commands import main
from sdar_lm_eval.engines.adapters.jetengine.versions import INSTALL as INSTALL_JETENGINE
from sdar_lm_eval.engines.native.engine import NativeEngine
from sdar_lm_eval.engines.native.strategies import STRATEGIES
from sdar_lm_eval.engines.registry import ENGINES
from sdar_lm_eval.report import machine

pytestmark = pytest.mark.slow
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
RUN = ("--run", "--limit", "3", "--engine", "native")


@pytest.fixture
def doctor(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that runs the command, with short answers: (exit code, what it prints, its error)."""
    monkeypatch.setattr(trial, "MAX_GEN_TOKS", 32)

    def run(*words: str) -> tuple[int, str, str]:
        code = main(["doctor", *words])
        out, err = capfd.readouterr()
        return code, out, err

    return run


@NO_GPU
def test_it_says_what_is_here_and_what_is_missing(doctor: Any) -> None:
    code, out, err = doctor()
    assert code == 0 and not err
    assert f"torch              {torch.__version__}" in out
    assert "cpu: " in out and "GiB free" in out
    assert "native: runs here on cpu (--model sdar)" in out
    assert "jetengine: --model sdar-jetengine lacks JetEngine, " in out and INSTALL_JETENGINE in out
    assert 'pip install "sdar-lm-eval[lmdeploy]"' in out


def test_its_json_has_the_same(doctor: Any) -> None:
    code, out, _ = doctor("--json")
    found = json.loads(out)
    assert code == 0 and found["trials"] == []
    assert [engine["name"] for engine in found["engines"]] == list(ENGINES)
    assert found["engines"][0]["runs"] and found["engines"][0]["lacks"] is None
    assert found["versions"]["torch"] == torch.__version__
    assert set().union(*(spec.packages for spec in ENGINES.values())) <= set(found["versions"])
    assert found["devices"][-1]["name"] == "cpu" and found["devices"][-1]["memory"] > 2**30


def test_an_engine_that_can_be_trusted(doctor: Any) -> None:
    code, out, err = doctor(*RUN)
    assert code == 0 and not err
    assert "reference: native on cpu, float32: 6 of 6 answers are transformers'" in out
    assert "\nnative on cpu, float32: 6 of 6 answers are float32's\n" in out
    assert "low_confidence_dynamic  3 of 3 equal  not judged: one step may unmask several tokens" in out
    assert out.count("tokens/s") == 6


def test_rounding_is_told_as_such(doctor: Any) -> None:
    code, out, _ = doctor(*RUN, "--limit", "4", "--model_args", "dtype=bfloat16", "--json")
    reference, native = json.loads(out)["trials"]
    assert code == 0 and reference["passed"] and native["passed"]
    found = [d for each in native["strategies"] if each["judged"] for d in each["divergences"]]
    assert found and all(0 < d["rounding"] <= d["worst"] < 0.1 for d in found)
    worst = max(d["worst"] for d in found)
    differ = f"{len(found)} differ, all at choices within {worst:.3f} nats: rounding"
    assert native["verdict"] == f"native on cpu, bfloat16: {8 - len(found)} of 8 answers are float32's; {differ}"
    assert all(each["equal"] == 4 - len(each["divergences"]) for each in native["strategies"])


def test_a_broken_weight_is_found(doctor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one dtype alone, as a bad kernel would be."""
    load_model = Checkpoint.load_model

    def load_broken(self: Checkpoint, *, dtype: torch.dtype, **how: Any) -> Any:
        model = load_model(self, dtype=dtype, **how)
        if dtype == torch.bfloat16:
            model.model.layers[1].self_attn.k_norm.weight.data *= 2
        return model

    monkeypatch.setattr(Checkpoint, "load_model", load_broken)
    code, out, err = doctor(*RUN, "--model_args", "dtype=bfloat16")
    assert code == 1 and "not to be trusted on this machine: native." in err
    assert "6 of 6 answers are transformers'" in out
    assert "NOT explained: " in out and "by more than 0.1 nats: problem " in out


def test_a_strategy_that_errs_everywhere_is_found(doctor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference errs alike, so the engine's answers are equal to it; transformers' forward tells."""
    static = STRATEGIES["low_confidence_static"]
    wrong = dataclasses.replace(static, order=lambda candidates: candidates.confidence)
    monkeypatch.setitem(STRATEGIES, static.name, wrong)
    code, out, err = doctor(*RUN)
    assert code == 1 and "not to be trusted on this machine: native (the reference)." in err
    assert "reference: native on cpu, float32: 3 of 6 answers are transformers'; 3 differ; NOT explained: 3" in out
    assert re.search(r"by more than 0\.001 nats: problem 0 from token \d+ on \(low_confidence_static, ", out)


def test_an_engine_that_drops_the_end_is_found(doctor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    generate = NativeEngine.generate

    def generate_short(self: NativeEngine, requests: Any) -> Any:
        for index, result in generate(self, requests):
            short = dataclasses.replace(result, token_ids=result.token_ids[:-3])
            yield index, short if self.info.dtype == "bfloat16" else result

    monkeypatch.setattr(NativeEngine, "generate", generate_short)
    code, out, _ = doctor(*RUN, "--limit", "1", "--model_args", "dtype=bfloat16")
    assert code == 1
    assert "0 of 2 answers are float32's; 2 differ; NOT explained: 2 of them" in out


def test_an_engine_that_stops_does_not_keep_the_others(doctor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in's GPU is not there, so the native engine, which takes it for one, stops."""
    with lmdeploy_standin.standin():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
        monkeypatch.setattr(machine, "_driver", lambda: "570.1")
        words = ["--run", "--limit", "2", "--engine", "native", "--engine", "lmdeploy", "--model_args", "kernels=false"]
        code, out, err = doctor(*words)
    assert "cuda:0: a GPU on the CPU, 80.0 GiB (79.0 GiB free), driver 570.1, compute capability 9.0" in out
    assert "\nnative: stopped: " in out
    assert "\nlmdeploy on cuda:0, bfloat16: " in out and "NOT explained" not in out
    assert code == 1 and "not to be trusted on this machine: native." in err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--limit", "0"], "--limit 0 must be 1 or more"),
        (["--model_args", "dtype=float32"], "--model_args needs --run"),
        ([*RUN, "--model_args", "strategy=static"], "strategy is a decoding setting, which doctor chooses itself"),
        ([*RUN, "--model_args", "kernel=false"], "kernel is not a model_arg of native. Did you mean 'kernels'?"),
        ([*RUN, "--pretrained", "/no/such/folder"], "/no/such/folder"),
        pytest.param(["--run", "--engine", "lmdeploy"], "none of these engines can run here", marks=NO_GPU),
    ],
    ids=str,
)
def test_mistakes_are_one_line(doctor: Any, words: list[str], told: str) -> None:
    code, _, err = doctor(*words)
    assert code == 1 and told in err and len(err.splitlines()) == 1
