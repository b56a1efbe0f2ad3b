"""`sdar_lm_eval sweep`, by its command line."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from sdar_lm_eval.commands import main
from sdar_lm_eval.commands.sweep import _as_arguments
from sdar_lm_eval.engines.native.engine import NativeEngine
from sdar_lm_eval.errors import EngineError
from sdar_lm_eval.runs.plan import Plan

DEMO = ["--model_args", "pretrained=demo", "--tasks", "gsm8k_sdar_demo"]
OF_DOCS = [
    *("--strategy", "static", "--steps", "4,2,1", "--and", "--strategy", "sequential,random", "--steps", "4,2"),
    *("--and", "--strategy", "dynamic", "--threshold", "0.5,0.6,0.7,0.8,0.85,0.9,0.95,0.99"),
    *("--and", "--strategy", "entropy_bounded", "--eb_threshold", "0.1,0.35,1"),
]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda _: None)  # slow, and of no interest here
    return


def said(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(["sweep", *words])
    told = capsys.readouterr()
    return code, told.out, told.err


def test_one_command_for_the_accuracy_table(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, _ = said(capsys, *DEMO, *OF_DOCS, "--dry-run")
    lines = out.splitlines()
    assert code == 0 and lines[0] == "18 evaluations in sweeps/demo-gsm8k_sdar_demo" and len(lines) == 19
    assert lines[1] == "  remasking_strategy=low_confidence_static, denoising_steps=4"
    assert lines[18] == "  remasking_strategy=entropy_bounded, eb_threshold=1"
    assert not list(tmp_path.iterdir())


def test_one_point_has_nothing_to_compare(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--limit", "1", "--gen_kwargs", "max_gen_toks=4", "--threshold", "0.5", "--output_path", "s"]
    code, out, _ = said(capsys, *DEMO, *words)
    assert code == 0 and out.splitlines()[-1] == "See it: sdar_lm_eval report s -o report.html"
    assert "confidence_threshold=0.5" in out  # a single combination has its settings, too
    assert main(["report", "s", "-o", "report.html"]) == 0


def test_a_sweep(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = [*DEMO, "--limit", "4", "--gen_kwargs", "max_gen_toks=64", "--strategy", "dynamic,static"]
    words += ["--threshold", "0.5:0.6", "--output_path", "s", "--plot", "plots/a.png"]
    code, out, err = said(capsys, *words)
    assert code == 0, err
    assert "; 1 left out as equal but for settings without effect" in err
    assert re.search(r"3/3 remasking_strategy=low_confidence_static: [\d.]+ ± [\d.]+% of 4 documents of gsm8k", err)
    rows = out[out.index("strategy ") :].splitlines()
    assert [row.split()[0] for row in rows[1:4]] == ["low_confidence_dynamic"] * 2 + ["low_confidence_static"]
    assert "confidence_threshold=0.5" in rows[1] and "AUP" in out and "Pareto front" in out
    written = [Path("s") / name for name in ("table.md", "points.json", "accuracy.svg")] + [Path("plots/a.png")]
    assert out.splitlines()[-2:] == [
        "Written: " + ", ".join(map(str, written)),
        "Compare them: sdar_lm_eval compare s; see them: sdar_lm_eval report s -o report.html",
    ]
    assert all(file.stat().st_size for file in written)
    points = json.loads(Path("s/points.json").read_text())
    front, dynamic, static = points["tasks"][0]["aup"]
    assert front["interval"] is None and dynamic["interval"][0] <= dynamic["aup"] <= dynamic["interval"][1]
    assert static["ahead"] == static["aup"] - dynamic["aup"]
    assert re.search(r"^low_confidence_static .* to .* [+-][\d.]+ \([+-][\d.]+ to [+-][\d.]+\) ", out, re.MULTILINE)

    code, out, err = said(capsys, *words[:-2], "--json")  # nothing is computed again
    again = json.loads(out)
    assert code == 0 and again == points and again["failed"] == {} and len(again["tasks"][0]["points"]) == 3
    listed = json.loads(said(capsys, *words[:-2], "--json", "--dry-run")[1])
    assert [each["finished"] for each in listed["evaluations"]] == [True] * 3 and listed["copies"] == 1
    higher = said(capsys, *words[:-2], "--y_max", "100", "--metric", "exact_match,flexible-extract")[1]
    assert "relative to 100.0%" in higher and "exact_match,flexible-extract of 4 documents ±" in higher

    # A comparison of the whole folder would mix runs of different documents.
    code, out, err = said(capsys, *DEMO, "--limit", "2", "--threshold", "0.5,0.6", *words[2:4], "--output_path", "s")
    assert code == 0, err
    named = "s/*/gsm8k_sdar_demo-first-2"
    assert f"sdar_lm_eval compare {named}; see them: sdar_lm_eval report {named} -o" in out
    assert "Written: s/table-3.md, s/points-3.json, s/accuracy-3.svg" in out  # the third sweep in the folder
    assert "of 2 documents ±" in Path("s/table-3.md").read_text()
    assert "relative to 100.0%" in Path("s/table-2.md").read_text()
    assert json.loads(Path("s/points.json").read_text()) == points
    assert "confidence_threshold=0.5" in out


@pytest.mark.parametrize(
    ("others", "own", "named"),
    [
        ([], ["t=1/short", "t=2/short"], "s"),
        (["t=1/long"], ["t=1/short", "t=2/short"], "s/*/short"),
        (["t=3/short"], ["t=1/short", "t=2/short"], "s/t=1/short s/t=2/short"),
        (["t=3/short"], ["t=1/short"], "s/t=1/short"),
        (["t=3/short"], ["t=1/a-seed-1", "t=1/a-seed-2", "t=2/a"], "s/t=1 s/t=2/a"),
        (["t=1/long"], ["t=1/a-seed-1", "t=1/a-seed-2", "t=2/a"], "s"),
        (["t=3/[x] y"], ["t=1/[x] y", "t=2/[x] y"], "'s/t=1/[x] y' 's/t=2/[x] y'"),
    ],
)
def test_next_steps_name_the_sweep_s_runs_and_no_others(others: list[str], own: list[str], named: str) -> None:
    for name in (*others, *own):
        (folder := Path("s") / name / "demo").mkdir(parents=True)
        (folder / "results_1.json").touch()
    evaluations = [SimpleNamespace(folder=Path("s") / name.split("/")[0], name=name.split("/")[1]) for name in own]
    unused: Any = None
    planned = Plan(unused, unused, (), unused, Path("s"), cast(Any, tuple(evaluations)), (), 0)
    assert _as_arguments(planned) == named


def test_outside_of_a_repository_git_is_silent(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    words = ["--limit", "1", "--gen_kwargs", "max_gen_toks=4", "--threshold", "0.5", "--output_path", "s"]
    assert main(["sweep", *DEMO, *words]) == 0
    assert "not a git repository" not in capfd.readouterr().err
    subprocess.run(["git", "init", "-q"], check=True)
    subprocess.run(
        ["git", "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "a", "--allow-empty"], check=True
    )
    assert main(["sweep", *DEMO, *words[:-1], "t"]) == 0
    (file,) = Path("t").rglob("results_*.json")
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    assert commit.startswith(json.loads(file.read_text())["git_hash"])


def test_several_tasks_stand_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model_args", "pretrained=demo", "--tasks", "parallel_bench_sdar_puzzle_demo", "--limit", "2"]
    code, out, err = said(capsys, *words, "--steps", "4,1", "--strategy", "static", "--output_path", "s")
    assert code == 0, err
    content = json.loads(Path("s/points.json").read_text())
    expected = [
        [task["task"], *(f"{point['accuracy']:.1f} ± {point['stderr']:.1f}" for point in task["points"])]
        for task in content["tasks"]
    ]
    assert [row[0] for row in expected] == [f"parallel_bench_sdar_{kind}_demo" for kind in ("latin_square", "sudoku")]
    lines = [re.split(" {2,}", line) for line in out[out.index("All tasks") :].splitlines()]
    assert lines[7:9] == expected and lines[6] == ["accuracy, %", "1", "2"]
    assert "## All tasks\n\n| # | strategy | setting |" in Path("s/table.md").read_text()


def test_one_that_fails(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    generate = NativeEngine.generate

    def fail(self: NativeEngine, requests: Any) -> Any:
        if requests and requests[0].decoding.confidence_threshold == 0.5:
            raise EngineError("out of memory")
        return generate(self, requests)

    monkeypatch.setattr(NativeEngine, "generate", fail)
    words = [*DEMO, "--limit", "2", "--gen_kwargs", "max_gen_toks=8", "--threshold", "0.5,0.9"]
    code, out, err = said(capsys, *words)
    assert code == 1 and "1/2 confidence_threshold=0.5: failed: out of memory" in err
    assert "sdar_lm_eval: error: 1 of 2 evaluations failed. The same command runs these again." in err
    assert "  confidence_threshold=0.5: out of memory" in err
    assert "low_confidence_dynamic" in out and Path("sweeps/demo-gsm8k_sdar_demo/table.md").exists()
    monkeypatch.undo()


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ([], 1, "A grid has no settings. Give some, such as --threshold 0.5:0.9, before and after each --and"),
        (["--threshold", "0.5", "--and"], 1, "A grid has no settings"),
        (
            ["--threshold", "0.5", "--threshold", "0.6"],
            2,
            "given twice; separate values by commas, or",
        ),
        (["--strategy", "static", "--remasking_strategy", "random"], 2, "given twice"),
        (["--threshold", "0.5", "--plot", "chart.jpg"], 1, "chart.jpg: a chart's file ends in .svg, .png, .pdf"),
        (["--threshold", "0.5", "--gen_kwargs", "max_gen_toks"], 1, "--gen_kwargs max_gen_toks: cannot be read"),
        (["--threshold", "0.5", "--gen_kwargs", '{"a": '], 1, "cannot be read"),
        (["--threshold", "0.5", "--y_max", "0"], 1, "--y_max 0 is out of range: give a percentage above 0"),
        (["--threshold", "0.5", "--limit", "many"], 2, "invalid float value: 'many'"),
        (
            ["--threshold", "0.5", "--metric", "exact", "--dry-run"],
            1,
            "--metric exact: gsm8k_sdar_demo has no such metric. Did you mean 'exact_match'? Choose exact_match,",
        ),
    ],
)
def test_mistakes(words: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        ended = main(["sweep", *DEMO, *words])
    except SystemExit as error:
        ended = int(error.code or 0)
    assert ended == code and message in " ".join(capsys.readouterr().err.split())


def test_arguments_are_lm_eval_s(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model_args", "pretrained=demo,max_length=512", '{"dtype": "float32"}', "--tasks", "gsm8k_sdar_demo"]
    words += ["--gen_kwargs", 'until=["a","b"],max_gen_toks=8', "--threshold", "0.5", "--json", "--dry-run"]
    code, out, err = said(capsys, *words)
    assert code == 0, err
    assert json.loads(out)["evaluations"][0]["settings"] == {"confidence_threshold": 0.5}
