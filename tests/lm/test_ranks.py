"""Several processes evaluate together, with the same numbers and answers as one.

The first test starts them once for each number and lets them run through all of `scenarios`; this file is their program
too. The second one kills a process of the command line, and runs the same command again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import json
import logging
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import lm_eval
import lm_eval.evaluator
import pytest
import torch
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from scripted_lm import SAMPLED, Evaluate, MakeLM
from support import QUICK_START, environment, fork_of

import sdar_lm_eval.tasks
from sdar_lm_eval.errors import EngineError, OtherRankError, UserError
from sdar_lm_eval.lm import ranks
from sdar_lm_eval.lm.account import Account, facts_of_evaluation
from sdar_lm_eval.lm.evaluation import Evaluation, TaskRequests
from sdar_lm_eval.lm.model import SDARLM
from sdar_lm_eval.lm.ranks import SAME_ON_ALL_RANKS, Ranks

TASKS = str(Path(sdar_lm_eval.tasks.__file__).parent)
REPEATED = """
include: gsm8k_sdar_demo.yaml
task: demo_repeated
repeats: 3
generation_kwargs: {until: [], do_sample: true, temperature: 1.0, max_gen_toks: 12}
"""
CHOICES = """
include: gsm8k_sdar_demo.yaml
task: demo_choices
output_type: multiple_choice
doc_to_text: "{{question}} It is"
doc_to_choice: ["1", "20", "300"]
doc_to_target: 1
filter_list: null
metric_list: [{metric: acc}]
"""
SHOTS = """
include: gsm8k_sdar_demo.yaml
task: demo_shots
num_fewshot: 2
fewshot_split: test
"""
SLOW = 2  # seconds that a rank is late, more than gloo waits by itself in `scenarios`
LAUNCHER_VARIABLES = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "ACCELERATE_USE_CPU",
    "OMP_NUM_THREADS",
)  # fmt: skip


def scenarios(folder: Path) -> dict[str, Any]:
    """Evaluate in several ways; return what this process learns of each: scores and answers, and what it computed."""
    manager = TaskManager(include_path=[TASKS, str(folder)], include_defaults=False)
    lm = SDARLM("demo")
    found: dict[str, Any] = {"threads": torch.get_num_threads()}

    def evaluate(name: str, task: str, **settings: Any) -> None:
        settings |= {"gen_kwargs": "max_gen_toks=12", "bootstrap_iters": 0, "log_samples": True}
        results = lm_eval.simple_evaluate(lm, tasks=[task], task_manager=manager, **settings)
        counts = lm.counts
        computed = counts.requests + counts.scored_requests
        info = results and results["config"]["sdar_lm_eval"]
        found[name] = {"computed": computed, "results": results and _essence(results), "run": info and info["run"]}
        found[name]["written"] = info and [
            [line["document"], line["repeat"], line["token_ids"], line["steps"]] for line in lm.denoising_lines()(task)
        ]
        found[name]["sent"] = info and [of["tokens_sha256"] for of in info["prompts"].values()]

    cache = str(folder / "cache")
    evaluate("greedy", "gsm8k_sdar_demo", limit=5)
    evaluate("fewer", "gsm8k_sdar_demo", limit=3)
    evaluate("one", "gsm8k_sdar_demo", limit=1)
    if lm.rank == 1:
        generate = lm.engine.generate
        lm.engine.generate = lambda requests: (time.sleep(SLOW), generate(requests))[1]  # type: ignore[method-assign]
    evaluate("slow rank", "gsm8k_sdar_demo", limit=2)
    if lm.rank == 1:
        lm.engine.generate = generate  # type: ignore[method-assign]
    evaluate("chosen", "gsm8k_sdar_demo", samples={"gsm8k_sdar_demo": [5, 2, 9]})
    evaluate("repeated", "demo_repeated", limit=3)
    evaluate("cached", "gsm8k_sdar_demo", limit=4, use_cache=cache)  # each rank has a cache of its own
    if lm.rank == 0:
        lm.cache_hook.dbdict.terminate()  # deletes the file
    evaluate("cached on rank 1", "gsm8k_sdar_demo", limit=4, use_cache=cache)
    evaluate("all cached", "gsm8k_sdar_demo", limit=4, use_cache=cache)
    evaluate("repeated, cached", "demo_repeated", limit=3, use_cache=cache)
    evaluate("repeated, all cached", "demo_repeated", limit=3, use_cache=cache)
    blanks = str(folder / "blanks")
    evaluate("one, cached", "gsm8k_sdar_demo", samples={"gsm8k_sdar_demo": [5]}, use_cache=blanks)
    evaluate("with the one", "gsm8k_sdar_demo", limit=6, use_cache=blanks)
    evaluate("choices", "demo_choices", limit=3)
    evaluate("choices of one", "demo_choices", limit=1)
    evaluate("examples", "demo_shots", limit=5)
    evaluate("examples of chosen", "demo_shots", samples={"demo_shots": [5, 2, 9, 4]})
    return found


def _essence(results: Any) -> dict[str, Any]:
    samples = {}
    for task, of_task in results["samples"].items():
        # lm_eval logs the answers to its padding with the document that it copied: they stand behind its own.
        own = results["configs"][task]["repeats"]
        samples[task] = [
            (s["doc_id"], s["filter"], _rounded(s["resps"][0][:own]), s["doc"]["question"]) for s in of_task
        ]
    return {"scores": results["results"], "samples": samples}


def _rounded(responses: list[Any]) -> list[Any]:
    """Log-likelihoods up to what batches of other shapes change in their last bits; texts as they are."""
    return [r if isinstance(r, str) else (round(r[0], 3), r[1]) for r in responses]


if __name__ == "__main__":
    logging.disable()
    lm_eval.evaluator.add_env_info = lambda _: None  # as below
    torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    torch.distributed.barrier()
    torch.distributed.distributed_c10d._set_pg_timeout(
        datetime.timedelta(seconds=SLOW / 2), torch.distributed.group.WORLD
    )
    output = Path(sys.argv[1])
    found = scenarios(output)
    (output / f"found{os.environ['RANK']}.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    os._exit(0)  # on a busy machine gloo's threads abort a process that ends in the usual way while its peer still runs


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment(QUICK_START).items():
        monkeypatch.setenv(name, value)
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("one", "2", "3"):
        (tmp_path / name).mkdir()
        for task, text in {"repeated": REPEATED, "choices": CHOICES, "shots": SHOTS}.items():
            (tmp_path / name / f"demo_{task}.yaml").write_text(text.replace("gsm8k", f"{TASKS}/gsm8k", 1))
    return tmp_path


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(LM, "gather_object"), reason="lm_eval before 0.4.12 refuses a rank without documents")
def test_several_processes_give_what_one_gives(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda _: None)  # slow, and of no interest here
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    started = {
        count: subprocess.Popen(
            [*launcher, str(count), __file__, str(folder / str(count))], stderr=subprocess.PIPE, text=True, cwd=folder
        )
        for count in (2, 3)
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in each of the others, where there are two cores
    alone = json.loads(json.dumps(scenarios(folder / "one")))
    torch.set_num_threads(threads)
    for count, launched in started.items():
        _, errors = launched.communicate(timeout=300)
        assert launched.returncode == 0, errors
        of_ranks = [json.loads((folder / str(count) / f"found{rank}.json").read_text()) for rank in range(count)]
        check_ranks(of_ranks, alone)


def check_ranks(of_ranks: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    def computed(name: str) -> list[int]:
        return [of_rank[name]["computed"] for of_rank in of_ranks]

    def share(documents: int, requests: int = 1) -> list[int]:
        return [requests * len(range(rank, documents, len(of_ranks))) for rank in range(len(of_ranks))]

    names = [name for name in alone if name != "threads"]
    for name in names:
        assert of_ranks[0][name]["results"] == alone[name]["results"], name
        assert of_ranks[0][name]["sent"] == alone[name]["sent"], name
        assert of_ranks[0][name]["written"] == alone[name]["written"], name
        run = of_ranks[0][name]["run"]
        assert run["requests"] + run.get("likelihoods", {"requests": 0})["requests"] == sum(computed(name)), name
        assert all(of_rank[name]["results"] is None for of_rank in of_ranks[1:])
    assert computed("greedy") == share(5)  # and none for the padding
    assert computed("fewer") == computed("chosen") == share(3)
    assert computed("one") == share(1)  # and none for what is borrowed
    assert computed("slow rank") == share(2)
    assert computed("repeated") == computed("repeated, cached") == share(3, 3)
    assert computed("cached") == share(4)
    assert computed("cached on rank 1") == [*share(4)[:1], *[0] * (len(of_ranks) - 1)]
    assert sum(computed("all cached") + computed("repeated, all cached")) == 0
    assert [document for document, *_ in alone["chosen"]["written"]] == [2, 5, 9]
    assert len(alone["repeated, all cached"]["written"]) == 9
    answers = of_ranks[0]["repeated"]["results"]["samples"]["demo_repeated"]
    assert any(len(set(responses)) == 3 for _, _, responses, _ in answers)
    assert computed("choices") == share(3, 3)
    assert computed("choices of one") == share(1, 3)
    assert computed("examples") == share(5)
    # The document of the run before was rank 0's there, and another rank's cache file has no blank for it.
    assert sum(computed("one, cached")) == 1
    assert sum(computed("with the one")) == 6 - (5 % len(of_ranks) == 0)
    assert {of_rank["threads"] for of_rank in of_ranks} == {max(1, len(os.sched_getaffinity(0)) // len(of_ranks))}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds a rank by /proc")
def test_a_killed_rank_ends_the_command_and_its_answers_stay(folder: Path) -> None:
    """Then the same command computes what is missing, and says everything once."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launcher += ["--main_process_port", "0", "-m", "sdar_lm_eval", "run"]
    arguments = "--model sdar --model_args pretrained=demo,max_active=1,trace=trace.jsonl --tasks gsm8k_sdar_demo"
    arguments += " --limit 25 --gen_kwargs max_gen_toks=24 --use_cache cache --output_path results --log_samples"
    command = [*launcher, *arguments.split()]

    def traced() -> list[list[int]]:
        """The documents that each rank has computed."""
        found: list[list[int]] = [[], []]
        for rank, documents in enumerate(found):
            for file in folder.glob(f"*.rank{rank}"):
                lines = [json.loads(line) for line in file.read_text().split("\n")[:-1]]
                documents += [line["document"] for line in lines[1:] if not line.get("stored")]
        return found

    log = folder / "log.txt"
    with log.open("w") as file:
        killed = subprocess.Popen(command, stdout=file, stderr=file, cwd=folder)
    deadline = time.monotonic() + 120
    while len(traced()[1]) < 2 and killed.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(_rank_of(fork_of(killed.pid), 1), signal.SIGKILL)
    assert killed.wait(timeout=60) != 0, log.read_text()
    assert not list((folder / "results").iterdir())
    before = traced()
    assert 2 <= len(before[1]) < 12, log.read_text()

    done = subprocess.run(command, timeout=300, capture_output=True, text=True, cwd=folder, check=False)
    assert done.returncode == 0, done.stderr
    after = traced()
    assert all(set(documents) <= set(range(rank, 25, 2)) for rank, documents in enumerate(after))
    assert all(len(set(documents)) == len(documents) for documents in after)  # none is computed twice
    computed = sum(map(len, after)) - sum(map(len, before))
    assert sum(map(len, after)) >= 25 - 2  # a rank that ends between cache and trace leaves its last answer untraced
    assert done.stdout.count("exact_match") == 2  # a table with a row for each of two filters
    for said in ("on the native engine", "checkpoint's chat template is applied to prompts", "requests, "):
        assert done.stderr.count(said) == 1, said
    kept = 25 - computed
    assert f"2 ranks: {kept} answers were there already; {computed} requests" in done.stderr
    assert done.stderr.count("[00:00<?, ?q/s]") == 1  # how a bar begins
    (samples,) = folder.glob("results/*/samples_*.jsonl")
    assert sorted(json.loads(line)["doc_id"] for line in samples.read_text().splitlines()) == sorted([*range(25)] * 2)
    (results,) = folder.glob("results/*/results_*.json")
    info = json.loads(results.read_text())["config"]["sdar_lm_eval"]
    assert (info["ranks"], info["run"]["requests"], info["run"]["stored_requests"]) == (2, computed, kept)


def _rank_of(launcher: int, rank: int) -> int:
    """The process of a rank."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    (found,) = (c for c in children if f"\0RANK={rank}\0".encode() in Path(f"/proc/{c}/environ").read_bytes())
    return fork_of(int(found))


def test_a_process_alone_needs_no_others() -> None:
    alone = Ranks()
    assert (alone.rank, alone.world_size) == (0, 1)
    assert alone.gather_object("x") == ["x"]
    alone.barrier()


def test_a_rank_that_lost_another_says_so_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    several = Ranks()
    several.world_size, several._group = 2, None

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:17075.")

    exchanges: list[tuple[str, Callable[[], object]]] = [
        ("all_gather", lambda: several.all_gather(torch.tensor(1))),
        ("gather_object", lambda: several.gather_object({})),
        ("barrier", several.barrier),
    ]
    for name, exchange in exchanges:
        monkeypatch.setattr(torch.distributed, name, broken)
        with pytest.raises(OtherRankError, match=r"^Another process of the run ended, so rank 0 ends too\..*finished"):
            exchange()


def test_rank_0_reads_of_another_rank_what_that_rank_noted(
    make_lm: MakeLM, evaluate: Evaluate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of an evaluation, in the form that ranks send."""
    lm = make_lm()
    answer = lm.generate_until

    def answer_and_meet(*args: Any) -> list[str]:
        texts = answer(*args)
        lm.barrier()
        return texts

    def over_the_wire(obj: object) -> list[object]:
        sent.append(obj)
        return [pickle.loads(pickle.dumps(obj))]

    sent: list[object] = []
    monkeypatch.setattr(lm, "generate_until", answer_and_meet)
    monkeypatch.setattr(lm.ranks, "gather_object", over_the_wire)
    published = "metadata: {sdar_decoding: {denoising_steps: 2}}"
    evaluate(lm, f"generation_kwargs: {json.dumps(SAMPLED)}", "output_type: generate_until", "repeats: 3", published)
    assert sent == [lm.evaluation.account]
    facts: Any = lm.get_model_info()["sdar_lm_eval"]
    assert facts | {"run": None} == facts | facts_of_evaluation([lm.evaluation.account]) | {"run": None}
    assert facts["run"]["requests"] == lm.counts.requests == 15
    assert facts["published_decoding_of_tasks"] == {"five": {"denoising_steps": 2}}
    assert "Question 0" in facts["prompts"]["five"]["example"]
    assert len(list(lm.denoising_lines()("five"))) == 15


def test_the_engine_s_own_counts_are_of_the_evaluation_and_of_all_ranks(
    make_lm: MakeLM, evaluate: Evaluate, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = make_lm()
    generate, info = lm.engine.generate, lm.engine.info

    def preempting(requests: Any) -> Any:
        before = lm.engine.info.counts["preemptions"]
        lm.engine.info = dataclasses.replace(info, extra={"preemptions": before + 2}, counted=("preemptions",))
        lm.barrier()
        return generate(requests)

    monkeypatch.setattr(lm.engine, "generate", preempting)
    for number in (1, 3, 1):
        monkeypatch.setattr(lm.ranks, "gather_object", functools.partial(_as_sent_by, number))
        evaluate(lm)
        facts: Any = lm.get_model_info()["sdar_lm_eval"]
        assert facts["preemptions"] == 2 * number


def _as_sent_by(ranks: int, obj: object) -> list[object]:
    return [pickle.loads(pickle.dumps(obj)) for _ in range(ranks)]


def test_ranks_that_would_give_other_answers_are_refused(make_lm: MakeLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Machines may have other weights and versions, and their users may type other settings."""
    sent: list[Any] = []

    def gather(_: Ranks, obj: Any) -> list[object]:
        sent.append(obj)
        return [obj, pickle.loads(pickle.dumps(obj)) | changes]

    monkeypatch.setattr(Ranks, "gather_object", gather)
    changes: dict[str, object] = {}
    make_lm(threshold=0.9, seed=5)
    assert sent[-1]["confidence_threshold"] == 0.9 and sent[-1]["seed"] == 5
    assert "checkpoint" not in sent[-1]  # the ranks of a machine read the same files
    changes = {"confidence_threshold": 0.85, "thinking": {"enable_thinking": True}}
    with pytest.raises(UserError) as refused:
        make_lm(threshold=0.9)
    assert str(refused.value) == (
        'Rank 1 would give other answers than rank 0: thinking is {"enable_thinking": true} there, {} here; '
        "confidence_threshold is 0.85 there, 0.9 here. Give all machines the same checkpoint, versions and command."
    )
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")  # more than one machine
    for rank, refusal in ((0, r"checkpoint is 'x' there, '\w+' here"), (1, None)):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        changes = {"checkpoint": "x"}
        with pytest.raises(UserError, match=refusal) if refusal else contextlib.nullcontext():
            make_lm()


def test_what_ranks_gather_is_in_the_order_of_one_process() -> None:
    """Of three ranks with five documents, of which two filters make samples; the third rank lacks a metric."""
    evaluation = Evaluation(Account(0), {"t": TaskRequests("t")})

    def samples(documents: Iterable[int]) -> list[object]:
        own = list(documents)
        return [{"doc_id": document, "filter": name} for name in ("strict", "loose") for document in own]

    metrics: list[object] = [
        {"t": {("acc", "strict"): [0, 3], ("acc", "loose"): [0, 3]}},
        {"t": {("acc", "strict"): [1, 4], ("acc", "loose"): [1, 4]}},
        {"t": {("acc", "strict"): [2]}},
    ]
    first, *others = evaluation.in_document_order([{"t": samples(range(rank, 5, 3))} for rank in range(3)])
    assert (first, others) == ({"t": samples(range(5))}, [{"t": []}] * 2)
    first, *others = evaluation.in_document_order(metrics)
    assert first == {"t": {("acc", "strict"): [0, 1, 2, 3, 4], ("acc", "loose"): [0, 1, 3, 4]}}
    assert others == [{"t": {("acc", "strict"): [], ("acc", "loose"): []}}] * 2
    assert evaluation.in_document_order(["x", "y"]) == ["x", "y"]


def test_accelerate_that_started_one_process_is_told_apart(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    Ranks()
    assert not caplog.text
    # What `accelerate launch --cpu --num_processes 2` sets: the address for others, but no rank.
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    Ranks()
    assert not caplog.text
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    Ranks()
    assert "the only process" in caplog.text
    assert "torchrun --nproc_per_node N" in caplog.text


@pytest.mark.parametrize("address", [None, "127.0.0.1"])
def test_others_that_never_come_are_an_error_not_a_wait(monkeypatch: pytest.MonkeyPatch, address: str | None) -> None:
    monkeypatch.setattr(ranks, "PATIENCE_AT_START", datetime.timedelta(seconds=1))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    if address:
        monkeypatch.setenv("MASTER_ADDR", address)
        monkeypatch.setenv("MASTER_PORT", "0")
    with pytest.raises(EngineError, match="WORLD_SIZE is 2, but the other processes cannot be reached"):
        Ranks()


@pytest.mark.parametrize(
    ("world_size", "variables", "threads"),
    [
        (1, {}, None),
        (2, {}, 4),
        (4, {"LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}, 4),  # torchrun's, on two machines
        (16, {}, 1),
        (2, {"OMP_NUM_THREADS": "3"}, None),  # somebody chose it
    ],
)
def test_ranks_share_the_cores(
    monkeypatch: pytest.MonkeyPatch, world_size: int, variables: dict[str, str], threads: int | None
) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(8))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    several = Ranks()
    several.world_size = world_size
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    several.share_cpu()
    assert chosen == ([] if threads is None else [threads])


def test_a_rank_above_0_says_what_only_it_knows(caplog: pytest.LogCaptureFixture) -> None:
    """Truncated prompts, halved batches: by its number. Rank 0 says for all what holds for all."""
    root, loggers = (
        logging.getLogger(),
        [logging.getLogger(name) for name in (*SAME_ON_ALL_RANKS, "sdar_lm_eval")],
    )
    filters = {handler: list(handler.filters) for handler in root.handlers}
    several = Ranks()
    several.rank = 3
    try:
        several.log_own_warnings()
        for name in ("sdar_lm_eval.lm.model", "sdar_lm_eval.engines.native.engine", *SAME_ON_ALL_RANKS, "others"):
            logging.getLogger(name).info("info of %s", name)
            logging.getLogger(name).warning("warning of %s", name)
    finally:
        for handler, before in filters.items():
            handler.filters = before
        for logger in loggers:
            logger.setLevel(logging.NOTSET)
    assert [record.getMessage() for record in caplog.records] == [
        "rank 3: warning of sdar_lm_eval.lm.model",
        "rank 3: warning of sdar_lm_eval.engines.native.engine",
        "warning of others",
    ]
