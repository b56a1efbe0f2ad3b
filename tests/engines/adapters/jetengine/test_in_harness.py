"""`--model sdar-jetengine` in lm_eval, compared with `--model sdar`. A test runs this file in two processes."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lm_eval
import lm_eval.evaluator
import pytest
import torch
from jetengine_standin import VERSIONS, standin
from lm_eval.tasks import TaskManager
from support import QUICK_START, environment

import sdar_lm_eval.tasks
from sdar_lm_eval.errors import EngineError, UserError
from sdar_lm_eval.lm.model import SDARLM, SDARJetEngineLM

TASKS = str(Path(sdar_lm_eval.tasks.__file__).parent)
STATIC = {"pretrained": "demo", "remasking_strategy": "low_confidence_static"}
DOCUMENTS = 4


def evaluate(lm: Any, documents: int = DOCUMENTS, **settings: Any) -> Any:
    """Scores and answers: what two engines must agree in."""
    manager = TaskManager(include_path=TASKS, include_defaults=False)
    settings = {"gen_kwargs": "max_gen_toks=24", "bootstrap_iters": 0, "log_samples": True} | settings
    results = lm_eval.simple_evaluate(lm, tasks=["gsm8k_sdar_demo"], task_manager=manager, limit=documents, **settings)
    if results is None:
        return None
    samples = sorted((s["doc_id"], s["filter"], s["resps"][0][0]) for s in results["samples"]["gsm8k_sdar_demo"])
    return json.loads(json.dumps({"scores": results["results"]["gsm8k_sdar_demo"], "samples": samples}))


def scenarios(folder: Path) -> dict[str, Any]:
    """Evaluate twice with a cache. In the second run process 1 finds all of its answers, and loads no JetEngine."""
    found: dict[str, Any] = {}
    with standin("0.2.0") as shared:
        for name in ("first", "again"):
            lm = SDARJetEngineLM(**STATIC)
            found["device"] = lm.device
            lm._device = "cpu"  # for the tensors that lm_eval's processes exchange
            made = len(shared.made)
            results = evaluate(lm, 5, use_cache=str(folder / "cache"))
            computed = lm.counts.requests
            found[name] = {"results": results, "computed": computed, "made": len(shared.made) - made}
            if lm.rank == 0:
                lm.cache_hook.dbdict.terminate()  # deletes the file
    return found


if __name__ == "__main__":
    logging.disable()
    lm_eval.evaluator.add_env_info = lambda _: None  # as below
    (Path(sys.argv[1]) / f"found{os.environ['RANK']}.json").write_text(json.dumps(scenarios(Path(sys.argv[1]))))
    sys.exit()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda _: None)  # slow, and of no interest here


@pytest.fixture(scope="module")
def native() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lm_eval.evaluator.add_env_info", lambda _: None)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        answers = {
            strategy: evaluate(SDARLM("demo", device="cpu", remasking_strategy=strategy), 5)
            for strategy in ("low_confidence_static", "sequential")
        }
        torch.set_num_threads(threads)
        return answers


def first(answers: Any, documents: int) -> list[Any]:
    return [sample for sample in answers["samples"] if sample[0] < documents]


@pytest.mark.parametrize("strategy", ["low_confidence_static", "sequential"])
def test_answers_are_those_of_the_native_engine(
    jetengine: Any, native: Any, strategy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    lm = SDARJetEngineLM("demo", remasking_strategy=strategy)
    capsys.readouterr()
    answers = evaluate(lm, 5)
    assert answers == native[strategy]
    info = lm.get_model_info()["sdar_lm_eval"]
    assert (info["engine"], info["engine_version"]) == ("jetengine", jetengine.version)
    assert info["run"]["requests"] == 5
    assert "KVCache" not in capsys.readouterr().out


def test_after_a_crash_only_what_is_missing_is_computed(jetengine: Any, native: Any, tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    jetengine.faults.alone = False
    jetengine.faults.at_step = {50: RuntimeError("device-side assert")}
    crashed = SDARJetEngineLM(**STATIC, max_active=2)
    with pytest.raises(EngineError, match="device-side assert"):
        evaluate(crashed, use_cache=cache)
    finished = crashed.counts.requests
    assert 0 < finished < DOCUMENTS
    resumed = SDARJetEngineLM(**STATIC, max_active=2)
    answers = evaluate(resumed, use_cache=cache)
    assert resumed.counts.requests == DOCUMENTS - finished
    assert answers["samples"] == first(native["low_confidence_static"], DOCUMENTS)


def test_a_cache_keeps_engines_and_versions_apart(native: Any, tmp_path: Path) -> None:
    """Each engine and version finds its own answers only."""
    cache = str(tmp_path / "cache")
    for computed in (1, 0):
        for version in VERSIONS:
            with standin(version):
                lm = SDARJetEngineLM(**STATIC)
                evaluate(lm, 1, use_cache=cache)
                assert lm.counts.requests == computed
        lm = SDARLM(**STATIC, device="cpu", dtype="bfloat16")
        evaluate(lm, 1, use_cache=cache)
        assert lm.counts.requests == computed


def test_what_it_takes_and_does_not(jetengine: Any) -> None:
    lm = SDARJetEngineLM(**STATIC, gpu_memory_utilization=0.5, enforce_eager=True, tensor_parallel_size=1)
    assert not lm.get_model_info()["sdar_lm_eval"]["cuda_graphs"]
    with pytest.raises(UserError, match="'kv_pages' is unknown"):
        SDARJetEngineLM(**STATIC, kv_pages=9)
    with pytest.raises(UserError, match="'gpu_memory_utilization' is unknown"):
        SDARLM(**STATIC, gpu_memory_utilization=0.5)


@pytest.mark.slow
def test_two_processes_give_what_one_gives(native: Any, tmp_path: Path) -> None:
    """Each process has a JetEngine in a process group of its own, and loads it without waiting for the other."""
    variables = {name: value for name, value in environment(QUICK_START).items() if name not in ("RANK", "WORLD_SIZE")}
    variables["TORCH_DIST_INIT_BARRIER"] = "1"  # making a process group then waits for all of its processes
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launcher, __file__, str(tmp_path)],
        timeout=120, capture_output=True, text=True, cwd=tmp_path, env=variables, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rank0, rank1 = (json.loads((tmp_path / f"found{rank}.json").read_text()) for rank in (0, 1))
    for name in ("first", "again"):
        assert rank0[name]["results"] == native["low_confidence_static"]
        assert rank1[name]["results"] is None
    assert rank0["device"] == rank1["device"] == "cuda:0"
    assert [(r["first"]["computed"], r["again"]["computed"]) for r in (rank0, rank1)] == [(3, 3), (2, 0)]
    assert [(r["first"]["made"], r["again"]["made"]) for r in (rank0, rank1)] == [(1, 1), (1, 0)]
