"""Check that a release can be uploaded: build it, install it, run the demo from it, refuse placeholders.

    python tools/release_check.py                          all checks; `make release-check`
    python tools/release_check.py --allow-placeholders     all but the last one; `make wheel`

The command writes the sdist and the wheel to dist/. The wheel is built from the sdist. The exit code is 1 if a check
fails.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
DIST = ROOT / "dist"
PLACEHOLDER = re.compile(r"PLACEHOLDER|example\.invalid", re.IGNORECASE)
METADATA = ("pyproject.toml", "CITATION.cff", "CHANGELOG.md", "README.md")
DEMO = "run --model sdar --model_args pretrained=demo --tasks gsm8k_sdar_demo --limit 20 --output_path runs"
LEAST_ACCURACY = 0.75
"""Of the demo's first 20 problems. The bundled checkpoint answers more than nine of ten problems right."""


class CheckError(Exception):
    """A check failed; the message says which, and what to do."""


def build(folder: Path) -> tuple[Path, Path]:
    """Build the sdist, and the wheel from the sdist, into `folder`. Return both files.

    Raises:
        CheckError: a file cannot be built, or twine refuses its metadata.
    """
    shutil.rmtree(folder, ignore_errors=True)
    _run("the build", [sys.executable, "-m", "build", "--outdir", folder, ROOT])
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    _run("twine", [sys.executable, "-m", "twine", "check", "--strict", sdist, wheel])
    return sdist, wheel


def check_contents(sdist: Path, wheel: Path) -> None:
    """Check that the sdist holds what a developer needs, and that the wheel holds the package and nothing else.

    Raises:
        CheckError: a file is missing, or does not belong there.
    """
    with tarfile.open(sdist) as archive:
        in_sdist = {name.partition("/")[2] for name in archive.getnames()}
    needed = {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "Makefile"}
    if missing := needed - in_sdist:
        raise CheckError(f"{sdist.name} lacks {', '.join(sorted(missing))}.")
    with zipfile.ZipFile(wheel) as archive:
        in_wheel = set(archive.namelist())
    if missing := {"sdar_lm_eval/py.typed", "sdar_lm_eval/demo/checkpoint/model.safetensors"} - in_wheel:
        raise CheckError(f"{wheel.name} lacks {', '.join(sorted(missing))}.")
    foreign = {name.split("/")[0] for name in in_wheel if not name.startswith("sdar_lm_eval")}
    if foreign := {name for name in foreign if not name.endswith(".dist-info")}:
        raise CheckError(f"{wheel.name} has {', '.join(sorted(foreign))}, which users do not need.")


def install(wheel: Path, folder: Path) -> Path:
    """Install the wheel, and what it needs in the pinned versions, into a fresh environment. Return its `bin`.

    Raises:
        CheckError: pip cannot install them.
    """
    _run("venv", [sys.executable, "-m", "venv", folder])
    bin_ = folder / ("Scripts" if os.name == "nt" else "bin")
    pip = [bin_ / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    pip += ["--constraint", ROOT / "constraints.txt"]
    # torch first, on its own: the pinned version is a wheel for the CPU where an index offers one.
    _run("pip", [*pip, "torch"])
    _run("pip", [*pip, wheel])
    return bin_


def run_demo(bin_: Path, folder: Path, version: str) -> str:
    """Evaluate 20 of the demo's problems by an environment's `lm_eval`, in an empty folder. Return what it found.

    Raises:
        CheckError: the run fails, another installation answered, or fewer answers are right than the demo gives.
    """
    _run("lm_eval", [bin_ / "lm_eval", *DEMO.split()], folder)
    shown = _run("sdar_lm_eval --version", [bin_ / "sdar_lm_eval", "--version"], folder).strip()
    (file,) = folder.glob("runs/*/results_*.json")
    results = json.loads(file.read_text(encoding="utf-8"))
    ran = results["config"]["sdar_lm_eval"]["version"]
    if ran != version or not shown.startswith(f"sdar_lm_eval {version},"):
        raise CheckError(f"The wheel is {version}, but {ran} evaluated the demo, and --version shows {shown!r}.")
    accuracy = results["results"]["gsm8k_sdar_demo"]["exact_match,flexible-extract"]
    if accuracy < LEAST_ACCURACY:
        raise CheckError(f"The wheel answers {accuracy:.0%} of the demo right, less than {LEAST_ACCURACY:.0%}.")
    return f"{accuracy:.0%} of 20 problems of the demo; {shown}"


def placeholders(root: Path) -> list[str]:
    """Return the lines of a project's metadata that somebody must fill in, as "file:line: text"."""
    return [
        f"{name}:{number}: {line.strip()}"
        for name in METADATA
        for number, line in enumerate((root / name).read_text(encoding="utf-8").splitlines(), 1)
        if PLACEHOLDER.search(re.sub(r"#.*", "", line) if name == "pyproject.toml" else line)
    ]


def changelog_fault(root: Path, version: str) -> str | None:
    """Return what CHANGELOG.md lacks for a release of `version`; None: nothing."""
    headings = re.findall(r"^## \[(.+?)\] - (.+)$", (root / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    if not headings or headings[0][0] != version:
        return f"CHANGELOG.md begins with {headings[0][0] if headings else 'no version'}, not {version}."
    if not re.fullmatch(r"\d{4}-\d\d-\d\d", headings[0][1]):
        return f"CHANGELOG.md: {version} has no date (YYYY-MM-DD) but {headings[0][1]!r}."
    return None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--allow-placeholders", action="store_true", help="do not refuse placeholders")
    arguments = parser.parse_args(argv)
    try:
        sdist, wheel = build(DIST)
        check_contents(sdist, wheel)
        version = wheel.name.split("-")[1]
        print(f"built {sdist.name} and {wheel.name}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            work = Path(folder) / "work"
            work.mkdir()
            print(run_demo(install(wheel, Path(folder) / "env"), work, version), flush=True)
    except CheckError as failure:
        print(f"release check: {failure}", file=sys.stderr)
        return 1
    if arguments.allow_placeholders:
        return 0
    faults = [*placeholders(ROOT), *filter(None, [changelog_fault(ROOT, version)])]
    for fault in faults:
        print(f"release check: fill in {fault}", file=sys.stderr)
    return 1 if faults else 0


def _run(what: str, command: Sequence[str | Path], folder: Path | None = None) -> str:
    """Run a command without the tester's own Python settings; return what it prints to standard output."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "SDAR_"))}
    done = subprocess.run(
        list(map(str, command)), cwd=folder, env=variables, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise CheckError(f"{what} failed with code {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
