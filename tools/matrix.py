"""Try this package with the oldest, the newest and some versions between of Python and of what the package needs.

    python tools/matrix.py [NAME …]       try all combinations, or those named; then write docs/versions.md
    python tools/matrix.py --list         list the combinations
    python tools/matrix.py --page         write docs/versions.md from tools/matrix.json

Each combination gets an environment of its own in a temporary folder, which the command deletes. uv makes the
environments (`pip install uv`), and finds the interpreters on PATH. In each environment the command runs a part of the
test suite, then the command line on 20 problems of the demo, in one process and in two. tools/matrix.json keeps each
combination's last outcome.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
OUTCOMES = ROOT / "tools" / "matrix.json"
PAGE = ROOT / "docs" / "versions.md"
SHOWN = ("torch", "transformers", "lm-eval")
KEPT = (*SHOWN, "accelerate", "datasets", "huggingface-hub", "numpy", "pandas", "pytest", "safetensors", "triton")
NEWEST_TORCH = "2.13.0"
PROBLEMS = 20
TESTS = (
    "tests/golden", "tests/test_autoload.py", "tests/test_loaded.py", "tests/lm/test_model.py",
    "tests/lm/test_evaluation.py", "tests/checkpoint/test_checkpoint.py", "tests/tasks/test_gsm8k_yaml.py",
    "tests/engines/native/test_families.py", "tests/report/test_frames.py", "tests/commands/test_commands.py",
)  # fmt: skip
DEMO = f"--model sdar --model_args pretrained=demo --tasks gsm8k_sdar_demo --limit {PROBLEMS} --output_path"
TWO_PROCESSES = "-m torch.distributed.run --standalone --nproc_per_node 2"

HEAD = """\
# Tested versions

This page lists the versions of Python, torch, transformers and lm-eval with which the package was tested, each with
the outcome of the tests. `python tools/matrix.py` installs each combination below into a fresh environment. The
script then runs {files} files of the test suite, among them the golden answers, and the command line on 20 problems
of the demo, in one process and in two (`torchrun`). All runs are on the CPU. Versions that a combination does not name
are the newest that the package index offers with the named versions. The combination `lowest` takes the oldest version
of each requirement that `pyproject.toml` allows. lm-eval 0.4.9 and 0.4.9.1 cannot be imported beside transformers 5, so
these two combinations have transformers 4. The columns "demo" and "two processes" count the problems with the right
answer; "-" is a combination that did not run in two processes. Combinations that were tried on different dates ran
different numbers of tests.

| combination | Python | torch | transformers | lm-eval | tests | demo | two processes | date |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""


@dataclass(frozen=True)
class Combination:
    """Versions to try together; the resolver chooses what `pins` leaves out.

    Attributes:
        python: "3.12".
        pins: package -> version.
        resolution: uv's: "highest", or "lowest-direct" for the oldest version that each requirement allows.
    """

    python: str
    pins: Mapping[str, str] = field(default_factory=dict)
    resolution: str = "highest"


def _combinations() -> dict[str, Combination]:
    torch = {"torch": NEWEST_TORCH}
    found = {"lowest": Combination("3.10", resolution="lowest-direct")}
    for python in ("3.10", "3.11", "3.12", "3.13"):
        found[f"python-{python}"] = Combination(python, torch)
    for version in ("2.6.0", "2.8.0", "2.9.1", "2.11.0", "2.15.0"):
        found[f"torch-{version}"] = Combination("3.12", {"torch": version})
    for version in ("0.4.9", "0.4.9.1"):  # they import what transformers 5 has no longer
        found[f"lm-eval-{version}"] = Combination("3.11", {**torch, "lm-eval": version, "transformers": "4.57.6"})
    for version in ("0.4.10", "0.4.11", "0.4.12"):
        found[f"lm-eval-{version}"] = Combination("3.11", {**torch, "lm-eval": version})
    for version in ("4.52.4", "4.53.3", "4.57.6", "5.0.0"):
        found[f"transformers-{version}"] = Combination("3.11", {**torch, "transformers": version})
    return found


COMBINATIONS = _combinations()


def attempt(combination: Combination, folder: Path) -> dict[str, Any]:
    """Install a combination into `folder`, run tests and demo, and return the outcome, as tools/matrix.json keeps it.

    The outcome has `error`, the last lines of what failed, where a step failed.
    """
    outcome: dict[str, Any] = {"date": datetime.date.today().isoformat(), "python": combination.python}
    python = folder / "env" / "bin" / "python"
    made = _run(["uv", "venv", "--python", combination.python, folder / "env"])
    if made.returncode:
        return outcome | {"error": _end(made, folder)}
    wanted = [f"{name}=={version}" for name, version in combination.pins.items()]
    install = ["uv", "pip", "install", "--python", python, "--resolution", combination.resolution]
    packages = [f"{ROOT}[tasks]", "pytest>=8", "hypothesis>=6.100", "tenacity>=8", *wanted]
    installed = _run([*install, "--editable", *packages])
    if installed.returncode:
        return outcome | {"error": _end(installed, folder)}
    listed = json.loads(_run(["uv", "pip", "list", "--python", python, "--format", "json"]).stdout)
    outcome["versions"] = {each["name"]: each["version"] for each in listed if each["name"] in KEPT}
    outcome["python"] = _run([python, "-c", "import platform; print(platform.python_version())"]).stdout.strip()

    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    tested = _run(
        [python, "-m", "pytest", *TESTS, "-m", "not slow", "-p", "no:cacheprovider"], cwd=ROOT, env=environment
    )
    outcome["tests"] = _counts(tested.stdout)
    ran = [tested]
    for name, launcher in (("demo", ""), ("two processes", TWO_PROCESSES)):
        command = [python, *launcher.split(), "-m", "sdar_lm_eval", *DEMO.split(), name]
        ran.append(_run(command, cwd=folder, env=environment))
        outcome[name] = _right(folder / name)
    errors = [_end(done, folder) for done in ran if done.returncode]
    return outcome | ({"error": "\n".join(errors)} if errors else {})


def _run(command: Sequence[str | Path], **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, **options)


def _right(folder: Path) -> str | None:
    """The number of right answers in a folder with results of the demo, "19/20"; None where there are no results."""
    for file in folder.rglob("results_*.json"):
        (scores,) = json.loads(file.read_text())["results"].values()
        return f"{scores['exact_match,flexible-extract'] * PROBLEMS:.0f}/{PROBLEMS}"
    return None


def _counts(printed: str) -> dict[str, int]:
    """What pytest's last line counts: {"passed": 533, "skipped": 2}."""
    return {what: int(count) for count, what in re.findall(r"(\d+) (passed|failed|error|skipped)", printed[-400:])}


def _end(done: subprocess.CompletedProcess[str], folder: Path) -> str:
    """The last lines that a command printed, without this machine's folders."""
    lines = (done.stdout + done.stderr).strip().splitlines()[-15:]
    return "\n".join(lines).replace(str(folder), "").replace(str(ROOT), ".")


def page(outcomes: Mapping[str, Mapping[str, Any]]) -> str:
    """Return docs/versions.md: the table, then what failed."""
    rows, failures = [], []
    for name in COMBINATIONS:
        outcome = outcomes.get(name)
        if outcome is None:
            rows.append(f"| {name} | {COMBINATIONS[name].python} | | | | not run | | | |")
            continue
        versions = outcome.get("versions", {})
        counts = outcome.get("tests")
        told = ", ".join(f"{count:,} {what}" for what, count in counts.items()) if counts else "not installed"
        cells = [outcome["python"], *(versions.get(each, "") for each in SHOWN)]
        cells += [told, *(outcome.get(column) or "-" for column in ("demo", "two processes")), outcome["date"]]
        rows.append(f"| {name} | {' | '.join(cells)} |")
        if "error" in outcome:
            failures.append(f"## What failed: {name}\n\n```\n{outcome['error']}\n```\n")
    return HEAD.format(files=len(TESTS)) + "\n".join(rows) + "\n" + "".join(f"\n{each}" for each in failures)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="combinations to try (default: all)")
    parser.add_argument("--list", action="store_true", help="list the combinations")
    parser.add_argument("--page", action="store_true", help="write the page from the outcomes that are kept")
    arguments = parser.parse_args(argv)
    if unknown := set(arguments.names) - set(COMBINATIONS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}. Combinations: {', '.join(COMBINATIONS)}")
    if arguments.list:
        for name, combination in COMBINATIONS.items():
            print(f"{name:22} Python {combination.python}  {dict(combination.pins) or combination.resolution}")
        return
    if not arguments.page and shutil.which("uv") is None:
        sys.exit("uv is not on PATH: pip install uv")
    outcomes = json.loads(OUTCOMES.read_text()) if OUTCOMES.exists() else {}
    for name in [] if arguments.page else arguments.names or COMBINATIONS:
        with tempfile.TemporaryDirectory() as folder:
            outcomes[name] = attempt(COMBINATIONS[name], Path(folder))
        OUTCOMES.write_text(json.dumps(outcomes, indent=1, sort_keys=True) + "\n")
        print(name, *(outcomes[name].get(told) for told in ("tests", "demo", "two processes", "error")), flush=True)
    PAGE.write_text(page(outcomes), encoding="utf-8")


if __name__ == "__main__":
    main()
