"""benchmarks/: that a benchmark runs against the engine as it is, and what its last line holds."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys

import pytest
import torch
from support import QUICK_START, ROOT, environment


def test_all_sections_of_a_whole_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import whole_run

    sizes = "--prefill 40 --prefill-tokens 120 --contexts 40 400 --sequences 3 --new-tokens 8 --questions 3"
    monkeypatch.setattr(sys, "argv", ["whole_run.py", "--device", "cpu", *sizes.split(), "--answer-tokens", "8"])
    whole_run.main()
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = report["rows"]
    assert rows["start"]["bytes_read"] > 6e6 and rows["start"]["total_seconds"] > 0
    assert [(row["prompt_tokens"], row["prompts"]) for row in rows["prefill"]] == [(40, 3)]
    # Of 8 steps, 4 pass before the short request is answered.
    assert [(row["prompt_tokens"], row["sequences"], row["steps"]) for row in rows["contexts"]] == [
        (40, 3, 4),
        (400, 3, 4),
    ]
    assert (rows["gsm8k"]["questions"], rows["gsm8k"]["new_tokens"]) == (3, 24)
    assert report["engine"] == "native" and report["transformers"] and "triton" in report


@pytest.mark.slow
def test_two_processes_share_the_questions_of_a_whole_run() -> None:
    launched = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    launched += [str(ROOT / "benchmarks" / "whole_run.py"), "--device", "cpu", "--questions", "3"]
    launched += ["--answer-tokens", "8", "--sections", "gsm8k"]
    done = subprocess.run(
        launched, env=environment(QUICK_START), capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    (row,) = [json.loads(line)["rows"]["gsm8k"] for line in done.stdout.splitlines() if line.startswith("{")]
    assert (row["processes"], row["questions"], row["new_tokens"]) == (2, 3, 24)
    assert row["active"] == 2 and row["seconds"] == max(row["seconds_of_processes"])


def test_several_processes_run_one_section(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(sys, "argv", ["whole_run.py", "--sections", "gsm8k", "prefill"])
    with pytest.raises(SystemExit):
        importlib.import_module("whole_run").main()
    assert "2 processes run --sections gsm8k alone" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "column"),
    [
        ("throughput --active 1 2 --prompts 2 --new-tokens 4 --shared-prefix 20 --floor", "of_the_floor"),
        ("likelihood --texts 1 --length 40 --repeats 1 --kinds endings letters few-shot", "seconds"),
        ("floor --active 1 --device cpu", "layers_ms"),
        pytest.param(
            "kernel_times --active 1 2 --context 64",
            "chosen_us",
            marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="measures a GPU"),
        ),
    ],
)
def test_each_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: str, column: str
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    script, *words = arguments.split()
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *words])
    importlib.import_module(script).main()
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["rows"] and all(row[column] > 0 for row in report["rows"])


@pytest.mark.parametrize("script", ["throughput", "whole_run", "likelihood"])
def test_a_missing_folder_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], script: str
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--pretrained", "/nowhere"])
    with pytest.raises(SystemExit):
        importlib.import_module(script).main()
    assert f"{script}.py: error: pretrained='/nowhere': no such folder." in capsys.readouterr().err


@pytest.mark.parametrize("arguments", ["throughput --active 4 0", "floor --active 0", "whole_run --questions 0"])
def test_numbers_begin_with_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: str
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    script, *words = arguments.split()
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *words])
    with pytest.raises(SystemExit):
        importlib.import_module(script).main()
    assert capsys.readouterr().err.endswith(f"{script}.py: error: argument {words[0]}: 0 is below 1\n")


def test_where_the_gpus_time_goes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """On the CPU, with a profiler that knows what a GPU did."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu_time

    events = [
        (1_000, 4_000, "_attend"),
        (3_000, 5_000, "void cutlass::Kernel2<a, b>(c)"),  # on another stream, at the same time
        (6_500, 7_500, "nvjet_tst_256x128"),  # 1.5 us behind
        (57_500, 58_500, "void at::native::copy<int>(x)"),  # 50 us behind
        (400_000, 401_000, "_attend"),
    ]

    class Event:
        def __init__(self, start: int, end: int, name: str) -> None:
            self.start_ns, self.duration_ns, self.name = (lambda: start), (lambda: end - start), (lambda: name)

        def device_type(self) -> str:
            return "DeviceType.CUDA"

    class Profile:
        def __init__(self, activities: object) -> None:
            self.profiler = self.kineto_results = self

        def __enter__(self) -> Profile:
            return self

        def __exit__(self, *_: object) -> None: ...

        def events(self) -> list[Event]:
            return [Event(*event) for event in events]

    sizes = "--active 3 --new-tokens 8 --threshold 0 --model-args device=cpu"
    monkeypatch.setattr(sys, "argv", ["gpu_time.py", *sizes.split()])
    with pytest.raises(SystemExit):
        gpu_time.main()
    assert capsys.readouterr().err.endswith("error: there is no GPU here\n")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(gpu_time, "profile", Profile)
    gpu_time.main()
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["kernels"]["products"] == [0.003, 2] and report["seconds"] > 0

    found = gpu_time.summary(reversed(events), most=3)
    assert found["busy_ms"] == pytest.approx(0.007)
    assert found["kernels"] == {"_attend": (0.004, 2), "products": (0.003, 2), "void at::native::copy": (0.001, 1)}
    assert found["gaps_ms"] == {"up to 2 us": 0.0015, "up to 20 us": 0, "up to 200 us": 0.05, "longer": 0.3415}
    gap = found["longest_gaps"][0]
    assert (gap["ms"], gap["behind"], gap["before"]) == (0.3415, "void at::native::copy<int>(x)", "_attend")
