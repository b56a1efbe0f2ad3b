"""More than one machine: two agents of torchrun, each in a folder of its own, meet on the loopback address.

What two agents on one machine cannot show: a network between them, and GPUs of each.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.model import LM
from support import QUICK_START, environment, fork_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(LM, "gather_object"), reason="lm_eval before 0.4.12 refuses uneven ranks"),
]

LAUNCHER = "-m torch.distributed.run --nnodes 2 --nproc_per_node 2 --master_addr 127.0.0.1"
EVALUATION = "-m sdar_lm_eval run --model sdar --tasks gsm8k_sdar_demo --output_path results --log_samples"
MACHINES, RANKS = 2, 4


@pytest.fixture(autouse=True)
def _variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment(QUICK_START).items():
        monkeypatch.setenv(name, value)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


def evaluation(answers: Path, limit: int, tokens: int) -> list[str]:
    settings = f"--model_args pretrained=demo,max_active=1,answers={answers}"
    return [*EVALUATION.split(), *settings.split(), "--limit", str(limit), "--gen_kwargs", f"max_gen_toks={tokens}"]


def start(folders: list[Path], command: list[str]) -> list[subprocess.Popen[str]]:
    """Start an agent in each folder, as a user does on each machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for number, folder in enumerate(folders):
        folder.mkdir(exist_ok=True)
        agent = [*LAUNCHER.split(), "--master_port", str(port), "--node_rank", str(number)]
        with (folder / "log.txt").open("w") as log:
            started.append(
                subprocess.Popen([sys.executable, *agent, *command], stdout=log, stderr=log, text=True, cwd=folder)
            )
    return started


def results(folder: Path) -> Any:
    (file,) = folder.glob("results/*/results_*.json")
    return json.loads(file.read_text())


def samples(folder: Path) -> list[tuple[int, str, Any, Any]]:
    (file,) = folder.glob("results/*/samples_*.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return sorted((line["doc_id"], line["filter"], line["resps"], line["exact_match"]) for line in lines)


def stored(answers: Path) -> dict[str, list[int]]:
    """The documents in each file of the shared folder: a file is of one process."""
    return {
        file.name: [line["document"] for line in map(json.loads, file.read_text().split("\n")[:-1]) if "key" in line]
        for file in answers.glob("*.jsonl")
    }


def test_two_machines_and_a_shared_folder_give_what_one_process_gives(tmp_path: Path) -> None:
    answers, alone, after = tmp_path / "answers", tmp_path / "alone", tmp_path / "after"
    for folder in (alone, after):
        folder.mkdir()
    # One process answers three documents; two machines go on from them.
    subprocess.run([sys.executable, *evaluation(answers, 3, 12)], check=True, cwd=after, capture_output=True)
    machines = [tmp_path / f"machine{number}" for number in range(MACHINES)]
    for agent, folder in zip(start(machines, evaluation(answers, 9, 12)), machines, strict=True):
        assert agent.wait(timeout=300) == 0, (folder / "log.txt").read_text()

    files = stored(answers)
    assert sorted(map(len, files.values())) == [1, 1, 2, 2, 3]  # 3 before; then 6 among four ranks
    assert sorted(document for documents in files.values() for document in documents) == [*range(9)]
    assert not (machines[1] / "results").exists()  # rank 0 is of the first machine
    logs = [(folder / "log.txt").read_text() for folder in machines]
    assert "4 ranks: 3 answers were there already; 6 requests" in logs[0]
    assert "GSM8K Eval" not in logs[1] and "exact_match" not in logs[1]
    run = results(machines[0])["config"]["sdar_lm_eval"]
    assert (run["ranks"], run["run"]["requests"], run["run"]["stored_requests"]) == (RANKS, 6, 3)

    command = evaluation(tmp_path / "others", 9, 12)
    subprocess.run([sys.executable, *command], check=True, cwd=alone, capture_output=True)
    assert samples(machines[0]) == samples(alone)
    assert results(machines[0])["results"] == results(alone)["results"]


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds a rank by /proc")
def test_a_machine_that_dies_ends_the_other_and_its_answers_stay(tmp_path: Path) -> None:
    answers = tmp_path / "answers"
    machines = [tmp_path / f"machine{number}" for number in range(MACHINES)]
    agents = start(machines, evaluation(answers, 40, 24))
    deadline = time.monotonic() + 120
    while len([1 for documents in stored(answers).values() if len(documents) > 1]) < RANKS:
        assert all(agent.poll() is None for agent in agents) and time.monotonic() < deadline, machines
        time.sleep(0.02)
    dead = fork_of(agents[1].pid)
    children = Path(f"/proc/{dead}/task/{dead}/children").read_text().split()
    for process in (dead, *(fork_of(int(child)) for child in children)):
        os.kill(process, signal.SIGKILL)
    agents[1].wait(timeout=60)
    assert agents[0].wait(timeout=120) != 0, (machines[0] / "log.txt").read_text()
    kept = sorted(document for documents in stored(answers).values() for document in documents)
    assert 2 * RANKS <= len(kept) < 40 and len(set(kept)) == len(kept)

    # One process is what is left of the machines; it computes what is missing.
    done = subprocess.run(
        [sys.executable, *evaluation(answers, 40, 24)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    run = results(tmp_path)["config"]["sdar_lm_eval"]["run"]
    assert (run["requests"], run["stored_requests"]) == (40 - len(kept), len(kept))
