"""What `make release-check` accepts and refuses."""

from __future__ import annotations

import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import release_check
from release_check import ROOT, CheckError
from test_install import Environment

import sdar_lm_eval

FILLED = {
    "pyproject.toml": 'authors = [{ name = "A. Person" }]  # no PLACEHOLDER\n',
    "CITATION.cff": "authors:\n  - name: A. Person\n",
    "README.md": "# A project\n",
    "CHANGELOG.md": "# Changelog\n\n## [1.2.3] - 2026-12-01\n\n## [1.2.2] - 2026-11-01\n",
}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    for name, text in FILLED.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def test_metadata_that_is_filled_in_passes(project: Path) -> None:
    assert release_check.placeholders(project) == []
    assert release_check.changelog_fault(project, "1.2.3") is None


@pytest.mark.parametrize("name", FILLED)
@pytest.mark.parametrize("text", ["x = 'PLACEHOLDER'", "https://example.invalid/project"])
def test_a_placeholder_is_named_with_its_line(project: Path, name: str, text: str) -> None:
    (project / name).write_text(FILLED[name] + text + "\n")
    line = FILLED[name].count("\n") + 1
    assert release_check.placeholders(project) == [f"{name}:{line}: {text}"]


@pytest.mark.parametrize(
    ("version", "heading", "fault"),
    [
        ("1.2.4", "## [1.2.3] - 2026-12-01", "CHANGELOG.md begins with 1.2.3, not 1.2.4."),
        ("1.2.3", "## [1.2.3] - Unreleased", "CHANGELOG.md: 1.2.3 has no date (YYYY-MM-DD) but 'Unreleased'."),
        ("1.2.3", "# nothing", "CHANGELOG.md begins with no version, not 1.2.3."),
    ],
)
def test_a_changelog_of_another_version_is_refused(project: Path, version: str, heading: str, fault: str) -> None:
    (project / "CHANGELOG.md").write_text(heading + "\n")
    assert release_check.changelog_fault(project, version) == fault


def test_the_changelog_begins_with_the_packages_version() -> None:
    fault = release_check.changelog_fault(ROOT, sdar_lm_eval.__version__)
    assert fault is None or "has no date" in fault


# What is built


def archives(folder: Path, sdist: set[str], wheel: set[str]) -> tuple[Path, Path]:
    """An sdist and a wheel of empty files."""
    (folder / "empty").touch()
    with tarfile.open(folder / "p-1.tar.gz", "w:gz") as tar:
        for name in sdist:
            tar.add(folder / "empty", f"p-1/{name}")
    with zipfile.ZipFile(folder / "p-1-py3-none-any.whl", "w") as archive:
        for name in wheel:
            archive.writestr(name, "")
    return folder / "p-1.tar.gz", folder / "p-1-py3-none-any.whl"


SDIST = {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "Makefile"}
WHEEL = {"sdar_lm_eval/py.typed", "sdar_lm_eval/demo/checkpoint/model.safetensors", "p-1.dist-info/METADATA"}


def test_whole_archives_pass(tmp_path: Path) -> None:
    release_check.check_contents(*archives(tmp_path, SDIST, WHEEL))


@pytest.mark.parametrize(
    ("sdist", "wheel", "told"),
    [
        (SDIST - {"CHANGELOG.md"}, WHEEL, r"p-1\.tar\.gz lacks CHANGELOG\.md\."),
        (SDIST, WHEEL - {"sdar_lm_eval/py.typed"}, r"\.whl lacks sdar_lm_eval/py\.typed\."),
        (SDIST, WHEEL | {"tests/support.py"}, r"\.whl has tests, which users do not need\."),
    ],
)
def test_other_archives_are_refused(tmp_path: Path, sdist: set[str], wheel: set[str], told: str) -> None:
    with pytest.raises(CheckError, match=told):
        release_check.check_contents(*archives(tmp_path, sdist, wheel))


# The demo

LM_EVAL = """#!{python}
import json, pathlib
folder = pathlib.Path("runs/demo")
folder.mkdir(parents=True)
found = {{"config": {{"sdar_lm_eval": {{"version": "{version}"}}}}}}
found["results"] = {{"gsm8k_sdar_demo": {{"exact_match,flexible-extract": {accuracy}}}}}
(folder / "results_1.json").write_text(json.dumps(found))
"""


@pytest.mark.parametrize(
    ("version", "accuracy", "told"),
    [
        ("1.0", 0.95, None),
        ("0.9", 0.95, r"The wheel is 1\.0, but 0\.9 evaluated the demo"),
        ("1.0", 0.5, "The wheel answers 50% of the demo right, less than 75%"),
    ],
)
def test_the_demos_outcome_is_judged(tmp_path: Path, version: str, accuracy: float, told: str | None) -> None:
    programs = {
        "lm_eval": LM_EVAL.format(python=sys.executable, version=version, accuracy=accuracy),
        "sdar_lm_eval": f"#!{sys.executable}\nprint('sdar_lm_eval 1.0, lm_eval 0.4.13')\n",
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    work = tmp_path / "work"
    work.mkdir()
    if told is None:
        found = release_check.run_demo(tmp_path, work, "1.0")
        assert found == "95% of 20 problems of the demo; sdar_lm_eval 1.0, lm_eval 0.4.13"
    else:
        with pytest.raises(CheckError, match=told):
            release_check.run_demo(tmp_path, work, "1.0")


def test_a_program_that_fails_is_told_with_its_output(tmp_path: Path) -> None:
    (tmp_path / "lm_eval").write_text(f"#!{sys.executable}\nraise SystemExit('out of memory')\n")
    (tmp_path / "lm_eval").chmod(0o755)
    with pytest.raises(CheckError, match="lm_eval failed with code 1:\nout of memory"):
        release_check.run_demo(tmp_path, tmp_path, "1.0")


# The real ones


@pytest.mark.slow
def test_the_project_builds_and_its_wheel_runs_the_demo(tmp_path: Path) -> None:
    """Here without pip's downloads: dependencies are the testing side's."""
    pytest.importorskip("build")
    pytest.importorskip("twine")
    sdist, wheel = release_check.build(tmp_path / "dist")
    release_check.check_contents(sdist, wheel)
    environment = Environment(tmp_path / "fresh")
    environment.pip("install", str(wheel))
    told = release_check.run_demo(environment.bin, environment.work, sdar_lm_eval.__version__)
    assert f"; sdar_lm_eval {sdar_lm_eval.__version__}, lm_eval " in told


def test_placeholders_end_the_check_with_an_error(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The steps before are stood in for: they are tested above."""
    monkeypatch.setattr(release_check, "ROOT", project)
    monkeypatch.setattr(release_check, "build", lambda _: archives(project, SDIST, WHEEL))
    monkeypatch.setattr(release_check, "install", lambda *_: project)
    monkeypatch.setattr(release_check, "run_demo", lambda *_: "95%")
    (project / "CHANGELOG.md").write_text("## [1] - 2026-12-01\n")
    assert release_check.main([]) == 0
    (project / "CITATION.cff").write_text("authors:\n  - name: PLACEHOLDER\n")
    assert release_check.main(["--allow-placeholders"]) == 0
    capsys.readouterr()
    assert release_check.main([]) == 1
    assert capsys.readouterr().err == "release check: fill in CITATION.cff:2: - name: PLACEHOLDER\n"
