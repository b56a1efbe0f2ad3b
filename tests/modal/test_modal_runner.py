"""`modal run modal_runner.py`, by the real client, against a stand-in of Modal's control plane."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import json
import math
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import datasets
import lm_eval
import pytest
from control_plane import ControlPlane
from datasets.arrow_writer import ArrowWriter
from lm_eval.tasks import TaskManager
from support import ROOT, environment

from sdar_lm_eval.autoload import TASKS
from sdar_lm_eval.checkpoint import Checkpoint
from sdar_lm_eval.demo import CHECKPOINT as DEMO_CHECKPOINT
from sdar_lm_eval.engines.adapters.jetengine.versions import PINNED
from sdar_lm_eval.engines.registry import ENGINES
from sdar_lm_eval.lm.answers import read_sessions
from sdar_lm_eval.lm.model import SDARLM
from sdar_lm_eval.runs.flags import FLAGS

DEMO = ("--engine", "native", "--model-name", "demo", "--tasks", "gsm8k_sdar_demo")
DOCUMENTS = 72
SHARD = DOCUMENTS // 2  # more than run at once (32), so that not all answers come together
ENOUGH = 4  # answers there when a container is preempted


def _answers_of(process: int) -> int:
    """Lines, without the heading, of the file of answers that a process has open."""
    for descriptor in Path(f"/proc/{process}/fd").glob("*"):
        with contextlib.suppress(OSError):
            path = descriptor.readlink()
            if path.parent.name == "answers":
                return path.read_bytes().count(b"\n") - 1
    return 0


def _run(plane: ControlPlane, *words: str) -> subprocess.CompletedProcess[str]:
    return plane.modal("run", "modal_runner.py", *words)


class Sharded:
    """A run of two shards, one of whose containers is preempted half-way; then the same command again."""

    def __init__(self, plane: ControlPlane, output: Path) -> None:
        words = (*DEMO, "--num-samples", str(DOCUMENTS), "--shards", "2", "--output-file", str(output))
        self.plane = plane
        self.done = _run(plane, *words)
        assert self.done.returncode == 0, self.done.stdout + self.done.stderr
        self.started = list(plane.started)
        self.report = json.loads(output.read_text())
        self.files = self._snapshot()
        self.again = _run(plane, *words)
        self.started_again = plane.started[len(self.started) :]
        self.files_again = self._snapshot()

    def _snapshot(self) -> dict[str, bytes]:
        root = self.plane.volume("sdar-results")
        return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sharded]:
    folder = tmp_path_factory.mktemp("sharded")

    def preempt(process: int) -> signal.Signals | None:
        return signal.SIGINT if _answers_of(process) >= ENOUGH else None

    with ControlPlane(folder / "modal", trouble=preempt) as plane:
        yield Sharded(plane, folder / "results.json")


def test_a_preempted_shard_goes_on_from_its_answers(sharded: Sharded) -> None:
    assert len(sharded.plane.hit) == 1
    assert sorted(sharded.started) == ["evaluate", "evaluate", "evaluate", "prepare", "publish"]
    assert (sharded.started[0], sharded.started[-1]) == ("prepare", "publish")
    (folder,) = sharded.plane.volume("sdar-results").iterdir()
    sessions = read_sessions(folder / "answers")
    answered = [len(session.answers) for session in sessions]
    assert len(answered) == 3 and sum(answered) == DOCUMENTS  # none twice, none lost
    assert len({key for session in sessions for key in session.answers}) == DOCUMENTS
    assert ENOUGH <= min(answered) < SHARD
    # The progress bar of the last container starts where the preempted one stopped.
    starts = [int(n) for n in re.findall(rf"(\d+)/{SHARD} \[00:00<\?, \?q/s\]", sharded.done.stdout)]
    assert max(starts) == min(answered)


def test_the_result_is_the_one_of_a_local_run(sharded: Sharded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda _: None)
    local = lm_eval.simple_evaluate(
        SDARLM("demo", seed=0),  # the original benchmark's
        tasks=["gsm8k_sdar_demo"],
        task_manager=TaskManager(include_path=TASKS, include_defaults=False),
        gen_kwargs="do_sample=true,temperature=1.0",
        limit=6,
    )
    assert local is not None
    expected = [s for s in local["samples"]["gsm8k_sdar_demo"] if s["filter"] == "flexible-extract"]
    report = sharded.report
    assert [r["idx"] for r in report["results"]] == list(range(DOCUMENTS))
    assert [r["generated_text"] for r in report["results"][:6]] == [s["resps"][0][0] for s in expected]
    assert [r["correct"] for r in report["results"][:6]] == [s["exact_match"] == 1 for s in expected]
    right = sum(r["correct"] for r in report["results"])
    assert report["metrics"]["accuracy"] == right / DOCUMENTS
    assert report["metrics"]["stderr"] == pytest.approx(
        math.sqrt(right / DOCUMENTS * (1 - right / DOCUMENTS) / (DOCUMENTS - 1))
    )
    config = report["config"]
    assert (config["model_name"], config["engine"], config["max_gen_length"]) == ("demo", "native", 128)
    assert (config["temperature"], config["confidence_threshold"], config["block_length"]) == (1.0, 0.85, 4)
    assert all(r["generation_time"] > 0 and r["tokens_per_second"] > 0 for r in report["results"])


def test_what_the_user_sees(sharded: Sharded) -> None:
    out = sharded.done.stdout
    assert re.search(r"model +demo\n", out) and re.search(r"gpu +H100!\n", out) and re.search(r"shards +2\n", out)
    assert f"{DOCUMENTS} documents in 2 shards" in out
    assert re.search(
        rf"GSM8K Eval: +\d+%\|.*\| \d+/{SHARD} \[\d\d:\d\d<\d\d:\d\d, +\d+\.\d\dq/s\] Acc: \d+\.\d% \| \d\.\ds/q", out
    )
    example = out[out.index("Example ") :]
    for part in ("Question: ", "Generated: ", "Denoised (masked -> transferred", "  block ", "Text: ", "Predicted: "):
        assert part in example
    metrics = sharded.report["metrics"]
    assert f"Accuracy: {metrics['percentage']} ({metrics['correct']}/{DOCUMENTS})" in out
    assert "returned tokens/s" in out and "Average time a question" in out and "Total time" in out


def test_the_same_command_adds_nothing(sharded: Sharded) -> None:
    assert sharded.again.returncode == 0
    assert sharded.started_again == ["prepare"]
    assert "there already: nothing is computed" in sharded.again.stdout
    assert sharded.files_again == sharded.files


def test_what_is_asked_of_modal(sharded: Sharded) -> None:
    plane = sharded.plane
    definition = plane.functions["evaluate"].definition
    assert definition.resources.gpu_config.gpu_type == "H100!"
    assert definition.resources.memory_mb == 65536
    assert definition.timeout_secs == 7200
    assert definition.retry_policy.retries == 2
    assert definition.single_use_containers
    (variant,) = [v for v in plane.variants.values() if v.name == "evaluate"]
    assert variant.options.resources.gpu_config.gpu_type == "H100!"
    assert variant.options.timeout_secs == 7200
    for cheap in ("prepare", "publish", "run_programs"):
        assert plane.functions[cheap].definition.resources.gpu_config.count == 0
    assert plane.trespasses == []
    assert plane.commits["sdar-results"] > 0 and plane.commits["sdar-models-cache"] > 0


def test_each_function_has_what_it_needs_and_no_more(sharded: Sharded) -> None:
    """Only `prepare` writes to the models' volume; `run_programs`, which runs a model's programs, has no volume."""
    plane, models, results = sharded.plane, "sdar-models-cache", "sdar-results"
    writes = {"/models": f"{models} (read-only)", "/results": results}
    assert {name: plane.volumes_of(name) for name in plane.functions} == {
        "prepare": {"/models": models, "/results": f"{results} (read-only)"},
        "evaluate": writes,
        "publish": writes,
        "run_programs": {},
    }
    for name, function in plane.functions.items():
        apart = name == "run_programs"
        assert (function.definition.block_network, function.definition.untrusted) == (apart, apart)
    assert plane.functions["run_programs"].definition.single_use_containers


HUMANEVAL = (
    {"task_id": "HumanEval/0", "entry_point": "one", "test": "def check(one): assert one() == 1"},
    {"task_id": "HumanEval/1", "entry_point": "one", "test": "def check(one): assert one() == 2"},
)


def _humaneval(folder: Path) -> Path:
    """Two problems; any answer of one line solves the first alone. A program that runs leaves a mark."""
    mark = f"open({str(folder / 'ran')!r}, 'a').write('.')\n"
    prompt = f"{mark}def one():\n    return 1\n# "
    lines = (json.dumps(row | {"prompt": prompt}) for row in HUMANEVAL)
    (folder / "HumanEval.jsonl").write_text("\n".join(lines))
    return folder


def test_programs_of_a_model_run_in_a_container_of_their_own(tmp_path: Path) -> None:
    output = tmp_path / "results.json"
    words = (*DEMO[:2], "--model-name", "my-sdar", "--tasks", "humaneval_sdar", "--confirm-run-unsafe-code")
    folder = {"SDAR_HUMANEVAL_DIR": str(_humaneval(tmp_path))}
    with ControlPlane(tmp_path / "modal", variables=folder) as plane:
        fetched = plane.volume("sdar-models-cache")
        shutil.copytree(DEMO_CHECKPOINT, fetched / "my-sdar")
        done = plane.modal(
            "run", "modal_runner.py", *words, "--max-gen-length", "4", "--temperature", "0",
            "--output-file", str(output), HF_TOKEN="hf_mine",
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        assert plane.started == ["prepare", "evaluate", "publish", "run_programs"]
        assert plane.trespasses == []
        assert "my-sdar" in (fetched / "huggingface" / "sdar_lm_eval" / "sha256.json").read_text()
        holders = [name for name in plane.functions if plane.functions[name].definition.secret_ids]
        assert holders == ["prepare"] and {"HF_TOKEN": "hf_mine"} in plane.secrets.values()
    assert json.loads(output.read_text())["metrics"]["humaneval_sdar"]["pass@1,code-block"] == 0.5
    assert (tmp_path / "ran").read_text() == ".."  # each once: none where answers were made


def test_what_is_shipped(sharded: Sharded) -> None:
    shipped = sharded.plane.shipped("evaluate")
    package = ROOT / "sdar_lm_eval"
    needed = {p for p in package.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    assert {f"/root/sdar_lm_eval/{p.relative_to(package).as_posix()}" for p in needed} <= shipped
    assert "/root/sdar_lm_eval/tasks/gsm8k_sdar.yaml" in shipped
    assert not any("__pycache__" in path for path in shipped)


@pytest.mark.slow
def test_a_part_of_a_larger_run_takes_no_gpu(sharded: Sharded, tmp_path: Path) -> None:
    plane, output = sharded.plane, tmp_path / "results.json"
    words = (*DEMO, "--verbose", "false", "--output-file", str(output))
    for number, started in (
        (2, ["prepare", "publish"]),
        (DOCUMENTS + 1, ["prepare", "publish", "evaluate", "publish"]),
    ):
        plane.started.clear()
        done = _run(plane, *words, "--num-samples", str(number))
        assert done.returncode == 0, done.stdout + done.stderr
        assert plane.started == started
        assert [result["idx"] for result in json.loads(output.read_text())["results"]] == list(range(number))
    # The second call of `publish` must not see the volume as the first one's container does.
    assert plane.functions["publish"].definition.single_use_containers


@pytest.mark.slow
def test_a_sweep(tmp_path: Path) -> None:
    output = tmp_path / "sweep.json"
    words = (*DEMO, "--num-samples", "6", "--temperature", "0.0", "--verbose", "false", "--output-file", str(output))
    with ControlPlane(tmp_path / "modal") as plane:
        sweep = ("--threshold", "0.5,0.9", "--remasking-strategy", "static", "--strategy", "dynamic")
        done = _run(plane, *words, *sweep, "--gpu", "H200", "--timeout", "900")
        assert done.returncode == 0, done.stdout + done.stderr
        assert plane.started.count("evaluate") == 2
        assert {v.options.resources.gpu_config.gpu_type for v in plane.variants.values()} == {"H200"}
        assert {v.options.timeout_secs for v in plane.variants.values()} == {900}
    runs = json.loads(output.read_text())["runs"]
    assert [run["confidence_threshold"] for run in runs] == [0.5, 0.9]
    assert [run["config"]["confidence_threshold"] for run in runs] == [0.5, 0.9]
    assert len({run["folder"] for run in runs}) == 2
    assert runs[0]["performance"]["tokens_per_forward"] > runs[1]["performance"]["tokens_per_forward"]
    table = done.stdout[done.stdout.index("confidence_threshold  accuracy, %") :].splitlines()
    assert [row.split()[0] for row in table[1:3]] == ["0.5", "0.9"] and "±" in table[1]


def test_a_container_that_dies(tmp_path: Path) -> None:
    output = tmp_path / "results.json"
    with ControlPlane(tmp_path / "modal", trouble=lambda _: signal.SIGKILL) as plane:
        done = _run(plane, *DEMO, "--num-samples", "2", "--output-file", str(output))
        assert done.returncode == 1, done.stdout + done.stderr
        assert re.search(r"error: demo-native-\w+, shard 1 of 1: RemoteError: the container ended with -9", done.stderr)
        assert "none of the machines finished one. Run the same command again." in done.stderr
        assert not output.exists()


@pytest.mark.slow
def test_a_container_that_dies_before_or_after_the_gpu(tmp_path: Path) -> None:
    output = tmp_path / "results.json"
    words = (*DEMO, "--num-samples", "2", "--output-file", str(output))
    with ControlPlane(tmp_path / "modal", lambda _: signal.SIGKILL, troubled="publish") as plane:
        done = _run(plane, *words)
        assert done.returncode == 1 and not output.exists()
        (line,) = done.stderr.strip().splitlines()
        assert line.startswith("modal_runner: error: Modal: RemoteError: the container ended with -9. Finished answers")
        plane.started.clear()
        again = _run(plane, *words[:-1], "/dev/full")
        assert again.returncode == 1
        assert "--output-file /dev/full cannot be written: No space left on device. The results are on" in again.stderr
        assert "Accuracy: " in again.stdout and "all answers are there already" in again.stdout
        assert plane.started == ["prepare", "publish"]
        plane.started.clear()
        assert _run(plane, *words).returncode == 0 and output.exists()
        assert plane.started == ["prepare"]


def test_a_missing_model_and_the_image_of_jetengine(tmp_path: Path) -> None:
    with ControlPlane(tmp_path / "modal") as plane:
        (plane.volume("sdar-models-cache") / "my-sdar").mkdir()
        (plane.volume("sdar-models-cache") / "my-sdar" / "config.json").write_text("{}")
        words = ("run", "modal_runner.py", "--model-name", "nope", "--output-file", str(tmp_path / "out.json"))
        done = plane.modal(*words, HF_TOKEN="hf_mine")
        assert done.returncode == 1
        assert {"HF_TOKEN": "hf_mine"} in plane.secrets.values() and "hf_mine" not in done.stdout + done.stderr
        assert "--model-name nope: no such folder on the volume sdar-models-cache, which has my-sdar." in done.stderr
        assert plane.started == ["prepare"] and not (tmp_path / "out.json").exists()
        lines = plane.dockerfile("evaluate")
    assert lines[0] == "FROM nvidia/cuda:12.9.1-devel-ubuntu22.04"
    steps = [
        "torch==2.8.0+cu129",
        "flash-attn==2.8.3",
        f"git+https://github.com/Labman42/JetEngine@{PINNED}",
        "lm_eval==0.4.13",
        "ENV HF_HOME=",
    ]
    places = [next(n for n, line in enumerate(lines) if step in line) for step in steps]
    assert places == sorted(places)
    assert "https://download.pytorch.org/whl/cu129" in lines[places[0]]
    assert "--no-build-isolation" in lines[places[1]] and "--no-deps" in lines[places[2]]
    assert any("transformers==4.52.4" in line for line in lines)
    assert any(line.startswith("# COPY is from python-build-standalone") and "3.11" in line for line in lines)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--verbose", "maybe"], 2, "'maybe' is not one of 'true', 'false'"),
        (["--engine", "vllm"], 2, "'vllm' is not one of 'native', 'jetengine', 'lmdeploy'"),
        (["--engine", "native", "--remasking-strategy", "low_confidence"], 1, "'low_confidence' is unknown; choose"),
        (["--output-file", ""], 1, "--output-file '' is no name of a file. Give one, such as gsm8k_results.json."),
        (["--output-file", "tests"], 1, "--output-file 'tests' is no name of a file."),
        (["--gpu", ""], 1, "--gpu is empty. Name one: H100! (an H100 and nothing else)"),
        (
            ["--tasks", "gsm8k_sdar,humaneval_sdar"],
            1,
            "--tasks humaneval_sdar: scored by running programs that the model writes. They run in a container without "
            "network, token and volumes; say --confirm-run-unsafe-code to agree. Nothing was run.",
        ),
        (["--gpu", "h100:4"], 1, "--gpu h100:4: a container uses one GPU. Give --gpu H100, and --shards N"),
    ],
)
def test_a_wrong_flag(tmp_path: Path, words: list[str], code: int, message: str) -> None:
    with ControlPlane(tmp_path / "modal") as plane:
        done = _run(plane, *words)
        assert done.returncode == code
        assert message in re.sub(r"[│\s]+", " ", done.stderr)
        assert plane.started == []
        assert bool(plane.functions) == (code == 1)  # what the client refuses is not built


def test_help_says_what_each_flag_means(tmp_path: Path, runner: Any) -> None:
    flags = inspect.signature(runner.main.info.raw_f).parameters
    assert FLAGS.keys() == flags.keys()
    with ControlPlane(tmp_path / "modal") as plane:
        done = _run(plane, "--help")
        assert done.returncode == 0 and plane.started == [] and not plane.functions
    told = " ".join(done.stdout.split())
    for name, meaning in FLAGS.items():
        assert re.search(rf"--{name.replace('_', '-')}( VALUE)? {re.escape(' '.join(meaning.split()))}", told), name
    assert "of sampling (0)" in told and "tokens that are denoised together (4) *" in told


def test_it_says_how_it_is_run() -> None:
    done = subprocess.run([sys.executable, ROOT / "modal_runner.py"], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("modal_runner: error: Modal's client runs this file: ") and "modal run" in done.stderr


def test_what_is_fetched_is_read_without_network_and_left_alone(tmp_path: Path) -> None:
    """A checkpoint and a data set in the hub's cache layout; `datasets` writes lock files where it reads."""
    volume, commit = tmp_path / "volume", "0" * 40
    shutil.copytree(DEMO_CHECKPOINT, volume / "hub" / "models--me--demo" / "snapshots" / commit)
    rows = datasets.Dataset.from_list([{"question": "1 + 1?", "answer": "#### 2"}])
    kept = volume / "datasets" / "openai___gsm8k" / "main" / "0.0.0" / commit
    kept.mkdir(parents=True)
    with ArrowWriter(path=str(kept / "gsm8k-test.arrow"), features=rows.features) as writer:
        writer.write(rows[0])
        _, size = writer.finalize()
    info = {"builder_name": "parquet", "dataset_name": "gsm8k", "config_name": "main", "version": "0.0.0"}
    splits = {"test": {"name": "test", "num_bytes": size, "num_examples": 1, "dataset_name": "gsm8k"}}
    datasets.DatasetInfo(features=rows.features, splits=splits, **info).write_to_directory(str(kept))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(volume))
        fingerprint = Checkpoint.open(str(shutil.copytree(DEMO_CHECKPOINT, tmp_path / "weights"))).fingerprint
    before = sorted(volume.rglob("*"))
    code = (
        "import modal_runner; modal_runner.use_prepared_files()\n"
        "import datasets, huggingface_hub.constants\n"
        "from sdar_lm_eval.checkpoint import Checkpoint, fingerprint\n"
        "print(huggingface_hub.constants.HF_HUB_OFFLINE)\n"
        "print(datasets.load_dataset('openai/gsm8k', 'main', split='test')[0]['answer'])\n"
        f"print(Checkpoint.open('me/demo', {commit!r}).fingerprint)\n"
        "fingerprint._read_sha256 = None\n"
        f"print(Checkpoint.open({str(tmp_path / 'weights')!r}).fingerprint)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment() | {"HF_HOME": str(volume)}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.stdout.splitlines() == ["True", "#### 2", fingerprint, fingerprint], done.stderr
    assert sorted(volume.rglob("*")) == before


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> Any:
    spec = importlib.util.spec_from_file_location("modal_runner", ROOT / "modal_runner.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "modal_runner", module)
    spec.loader.exec_module(module)
    return module


def test_the_page_has_each_flag(runner: Any) -> None:
    flags = {f"--{name.replace('_', '-')}" for name in inspect.signature(runner.main.info.raw_f).parameters}
    section = (ROOT / "docs" / "modal.md").read_text("utf-8").partition("## Flags")[2].partition("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `--")]
    assert {flag for row in rows for flag in re.findall(r"`(--[\w-]+)`", row)} == flags


def test_pins_and_engines_are_the_package_s(runner: Any) -> None:
    assert get_args(runner.Engine) == tuple(ENGINES)
    assert runner.jetengine_requirement().endswith(PINNED)
    required = re.search(r"\njetengine = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL)
    assert required is not None
    for pin in re.findall(r'"([\w-]+==[\w.]+)"', required[1]):
        assert pin in runner.pins("jetengine")
    assert f"lm_eval=={lm_eval.__version__}" in runner.pins("native")
    for engine in ENGINES:  # each package once
        names = [pin.partition("==")[0] for pin in runner.pins(engine)]
        assert len(set(names)) == len(names)
        assert {"torch", "transformers", "lm_eval"} <= set(names)
    assert runner.engine_asked_for(["modal", "run", "x.py", "--engine", "native"]) == "native"
    assert runner.engine_asked_for(["x.py", "--engine=lmdeploy"]) == "lmdeploy"
    assert runner.engine_asked_for(["modal", "run", "x.py"]) == "jetengine"
